"""Every family of decoders, on a tiny random model each, against transformers and peft.

`scripts/check_families.py` draws the models, and more of them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import TRANSFORMERS_5, VARIANTS, make

from ftjax import check_model, cli
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import derived, families, family_table, weights
from ftjax.training import program as programs
from ftjax.training import sharding
from ftjax.tree import flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="the configs are those of Transformers 5")
# Decoding adds little to what the others show, and takes long to compile.
ANSWERS = ("gemma2", "cohere2", "gpt_neox")


@pytest.mark.parametrize("name", check_families.DRAWS)
def test_a_random_model_is_that_of_transformers_and_peft(name):
    found = check_families.check(name, seed=0, answers=name in ANSWERS)
    assert found.pop("leak") == 0 and found.pop("answers", 0) == 0
    assert all(x < 1e-4 for x in found.values()), found


def test_the_other_parts_of_a_model_stay_as_they_are_in_its_files(tmp_path):
    from safetensors.numpy import load_file, save_file
    from transformers import Gemma3ForConditionalGeneration

    model, _ = check_families.draw("gemma3", 0)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").write_text("{}")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with the names of the class instead
    spelled = {re.sub("^language_model.model", "model.language_model", name): x for name, x in stored.items()}
    spelled = {re.sub("^(vision_tower|multi_modal)", r"model.\1", name): x for name, x in spelled.items()}
    assert not stored.keys() & spelled.keys() - {"lm_head.weight"}
    save_file(spelled, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    for name, source in (("a", stored), ("b", spelled)):
        family, shape = families.read_config(tmp_path / name)
        params = weights.read_params(tmp_path / name, family, shape)
        params = jax.tree.map(lambda x: x + 1, params)
        weights.write_model(tmp_path / "out", params, tmp_path / name, family, shape, dtype="bfloat16")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert written.keys() == source.keys()
        for tensor, x in source.items():
            if re.search("vision_tower|multi_modal", tensor):
                assert written[tensor].dtype == x.dtype and np.array_equal(written[tensor], x), tensor
            else:
                assert written[tensor].dtype == "bfloat16" and not np.array_equal(written[tensor], x), tensor
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("a", "out"))
    assert (
        before["vision_config"] == after["vision_config"] and before["image_token_index"] == after["image_token_index"]
    )
    same = {key: after["text_config"][key] for key in before["text_config"]}
    assert same | {"dtype": "float32"} == before["text_config"] | {"dtype": "float32"}
    theirs, info = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert np.array_equal(
        theirs.model.vision_tower.post_layernorm.weight.float().detach().numpy(),
        stored["vision_tower.post_layernorm.weight"].astype("bfloat16").astype(np.float32),
    )
    derived.student(str(tmp_path / "b"), (0, 2), tmp_path / "small")
    assert families.read_config(tmp_path / "small")[1].layers == 2
    _, info = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    with pytest.raises(FtjaxError, match="the other parts of a gemma3 model can only be copied from a directory"):
        weights.write_model(tmp_path / "none", params, None, family, shape)
    stored["vision_tower.more"] = stored.pop("language_model.model.norm.weight")
    save_file(stored, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FtjaxError, match="language_model.norm.weight .* is missing"):
        weights.read_params(tmp_path / "a", family, shape)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_text", "gemma4", "gemma4_text"])
def test_tensors_that_transformers_does_not_load_stay_as_they_are_in_the_files(name, tmp_path):
    """Published files of Qwen 3.5 have a head `mtp` beside `model`; those of Gemma 4 may have maps of keys and values
    for layers that read those of others."""
    from safetensors.numpy import load_file, save_file

    model, _ = check_families.draw(name, 0)
    model.save_pretrained(tmp_path / "a")
    more = {"mtp.fc.weight": np.ones((3, 5), np.float16), "mtp.layers.0.input_layernorm.weight": np.ones(7, np.float32)}
    if name.startswith("gemma4"):
        last = ("model.language_model" if name == "gemma4" else "model") + ".layers.4.self_attn"
        more = {f"{last}.{part}.weight": np.ones(5, np.float16) for part in ("k_proj", "v_proj", "k_norm")}
    stored = load_file(tmp_path / "a" / "model.safetensors") | more
    save_file(stored, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    family, shape = families.read_config(tmp_path / "a")
    params = jax.tree.map(lambda x: x + 1, weights.read_params(tmp_path / "a", family, shape))
    weights.write_model(tmp_path / "out", params, tmp_path / "a", family, shape, dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    for tensor, x in stored.items():
        same = written[tensor].dtype == x.dtype and np.array_equal(written[tensor], x)
        assert same == (tensor in more or bool(re.match(r"model\.(visual|vision_tower|embed_vision)\.", tensor))), (
            tensor
        )
    _, info = check_families.auto(name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    if "sequence" in family.forms:  # models for other tasks begin from these files too
        labelled = families.with_head(family, shape, "sequence", 2, tmp_path / "a")
        assert weights.head_is_new(tmp_path / "a", family, labelled) == ["head/out"]


def test_layers_of_gemma_4_that_are_cut_out_and_what_is_not_trained(tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = check_families.draw("gemma4_text", 4)
    pair = check_families.tiny.read(model)
    shape, ids = pair.model.config, jax.numpy.asarray(check_families.tiny.documents((8,))[0][None])
    gradient = check_families.tiny.jit(jax.grad(lambda p: pair.model.apply({"params": p}, ids).var()))(pair.params)
    zero = [path for path, x in flatten(gradient).items() if not np.abs(x).max()]
    assert zero == ["layers/scalar/scale"] and np.ptp(pair.params["layers"]["scalar"]["scale"]) > 0
    model.save_pretrained(tmp_path / "a")
    kept = (0, 1, 3, 4)  # of each kind
    assert {shape.parts[layer][0] for layer in kept} == {parts[0] for parts in shape.parts}
    derived.student(str(tmp_path / "a"), kept, tmp_path / "small")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    table = model.model.embed_tokens_per_layer.weight.detach().reshape(shape.vocab_size, 5, -1)[:, list(kept)]
    assert np.array_equal(theirs.model.embed_tokens_per_layer.weight.detach(), table.flatten(1))
    assert check_model.check(tmp_path / "small")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_layers_of_gemma_4_read_keys_of_layers_that_are_not_trained(count):
    """The upper stack has layers with keys of its own (3), or only such that read those of the lower stack."""
    tiny = check_families.tiny
    pair = tiny.read(check_families.draw("gemma4_text", 0)[0])
    assert [parts[0].endswith("_read") for parts in pair.model.config.parts] == [False] * 3 + [True] * 2
    pair = tiny.tuned(pair, method="last_layers", layers=count)
    method, trained, frozen = tiny.start(pair)
    ids = jax.numpy.asarray(tiny.documents((8,))[0][None])
    apply = lambda trained: pair.model.apply(method.variables(trained, frozen, pair.spec), ids)  # noqa: E731
    want, gradient = jax.value_and_grad(lambda p: pair.model.apply({"params": p}, ids).var())(pair.params)
    got, own = tiny.jit(jax.value_and_grad(lambda trained: apply(trained).var()))(trained)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    whole, own = flatten(gradient), flatten(own)
    compared = [path for path in own if path.startswith("top_layers/mlp_norm/")]
    for path in compared:  # every layer has this norm
        expected = whole[path.replace("top_layers", "layers")][-count:]
        np.testing.assert_allclose(own[path], expected, rtol=1e-3, atol=1e-6)
    assert compared


def test_noise_does_not_reach_what_gemma_4_does_not_train():
    pair = check_families.tiny.read(check_families.draw("gemma4_text", 0)[0])
    config = configs.default()
    configs.override(config, ["tuning.method=full", "privacy.epsilon=3.0"])
    programs.fill_defaults(config)
    spec = check_families.tiny.tuned(pair, method="full").spec._replace(tuning=config.tuning)
    mesh = sharding.abstract_mesh(dict.fromkeys(sharding.MESH_AXES, 1))
    with pytest.raises(FtjaxError, match="full has the factors of this model's blocks, which have no gradient"):
        programs.build(config, spec, mesh, jax.numpy.dtype("float32"), 1)


def test_a_family_is_added_by_a_row_of_the_table(monkeypatch):
    """Helium of Kyutai, which is not in the table: LLaMA with neighbouring rotary dimensions."""

    def draw(rng):
        shape = check_families.sizes(rng, multiple=True)
        return shape | {"head_dim": shape["hidden_size"] // shape["num_attention_heads"]}

    monkeypatch.setitem(check_families.DRAWS, "helium", ("helium", draw))
    with pytest.raises(FtjaxError, match="unknown model_type 'helium'"):
        check_families.check("helium", seed=0, answers=False)
    row = family_table.llama_like(
        "helium",
        family_table.decoder_forms("Helium", tasks=("causal", "sequence", "token")),
        defaults={"vocab_size": 48000, "hidden_size": 2560, "head_dim": 128, "rms_norm_eps": 1e-8},
        constants={"rotary_pairs": "neighbours"},
        theta=100000.0,
    )
    monkeypatch.setitem(family_table.FAMILIES, "helium", row)
    found = check_families.check("helium", seed=0, answers=False)
    assert found["leak"] == 0 and all(x < 1e-4 for x in found.values()), found


def test_check_model_names_the_block_where_a_model_parts_from_transformers(tmp_path, capsys, monkeypatch):
    make(*VARIANTS["mistral"]).save_pretrained(tmp_path)
    assert cli.main(["check-model", str(tmp_path)]) == cli.main(["check-model", "builtin:stories260K"]) == 0
    assert capsys.readouterr().out.count("they differ from transformers' by") == 2
    read = weights.read_params

    def spoilt(*arguments, **more):
        params = read(*arguments, **more)
        layers = params["layers"]
        return params | {"layers": jax.tree.map(lambda x: x.at[1].multiply(1.1), layers)}

    monkeypatch.setattr(weights, "read_params", spoilt)
    assert not check_model.check(tmp_path)
    assert "they part in block 1 (from 0)\n" in capsys.readouterr().out
