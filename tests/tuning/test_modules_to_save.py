"""Parameters that are trained whole beside an adapter, and tables that an adapter replaces: peft's own files in, the
same logits out."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import peft as peft_files
from ftjax.training.program import check_method
from ftjax.tuning import adapters

IDS = np.stack(tiny.documents((12, 12), vocab=47))
TABLES = ["embed_tokens", "lm_head"]

# name -> (model, rows of a resized vocabulary or 0, kind of config, its settings)
SAVED = {
    "embeddings and head": ("llama2", 0, "lora", {"modules_to_save": TABLES}),
    "tied, embeddings": ("llama-tied", 0, "lora", {"modules_to_save": ["embed_tokens"]}),
    "tied, head": ("llama-tied", 0, "lora", {"modules_to_save": ["lm_head"]}),
    "tied, both": ("llama-tied", 0, "lora", {"modules_to_save": TABLES}),
    "norms": ("llama2", 0, "lora", {"modules_to_save": ["norm"], "target_modules": "all-linear"}),
    "a block's part": ("llama2", 0, "lora", {"modules_to_save": ["layers.1.mlp"], "target_modules": ["up_proj"]}),
    "all biases": ("gpt2", 0, "lora", {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "their biases": (
        "llama-biases", 0, "lora",
        {"bias": "lora_only", "target_modules": ["q_proj"],
         "rank_pattern": {"0.*q_proj": 3}, "layers_to_transform": [0], "modules_to_save": ["norm"]},
    ),
    "by expression": (
        "llama2", 0, "lora",
        {"target_modules": r".*\.[02]\..*_proj", "exclude_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "dora": ("llama-biases", 0, "lora", {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all"}),
    "ia3": (
        "llama-tied", 0, "ia3", {"target_modules": ["v_proj"], "feedforward_modules": [], "modules_to_save": TABLES}
    ),
}  # fmt: skip
REPLACED = {
    "tied, by wish": ("llama-tied", 0, "lora", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "resized": ("llama2", 53, "lora", {}),
    "resized, tied": ("llama-tied", 53, "lora", {}),
    "resized, tied and saved": ("llama-tied", 53, "lora", {"modules_to_save": ["embed_tokens"]}),
    "resized, both saved": ("llama2", 53, "lora", {"modules_to_save": TABLES}),
    "smaller, tied and adapted": ("llama-tied", 47, "lora", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": ("llama2", 0, "lora", {"trainable_token_indices": [3, 7]}),
    "tokens, tied": ("llama-tied", 0, "lora", {"trainable_token_indices": [3, 7]}),
    "tokens of both": ("llama2", 0, "lora", {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4]}}),
    "tokens, resized and tied": ("llama-tied", 53, "lora", {"trainable_token_indices": [50, 51]}),
}  # fmt: skip
CASES = SAVED | REPLACED


def resized(pair, rows):
    model = copy.deepcopy(pair.torch)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture
def made(tmp_path):
    """name of a case -> (Pair of its base, folder of peft's adapter, logits of the two together)."""

    def make(name):
        model, rows, kind, settings = CASES[name]
        pair = tiny.pair(model)
        pair.torch.save_pretrained(tmp_path / "base")  # whose vocabulary peft compares with
        kinds = {"lora": (peft.LoraConfig, {"r": 2, "target_modules": ["q_proj"]}), "ia3": (peft.IA3Config, {})}
        config, usual = kinds[kind]
        torch.manual_seed(1)
        made = peft.get_peft_model(resized(pair, rows), config(task_type="CAUSAL_LM", **usual | settings)).eval()
        made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(tmp_path / "adapter")
        want = tiny.torch_logits(made, IDS)
        assert np.abs(want[..., :47] - tiny.torch_logits(pair.torch, IDS)[..., :47]).max() > 1e-1
        return pair, tmp_path / "adapter", want

    return make


def logits(pair, variables):
    model = pair.model.clone(config=dataclasses.replace(
        pair.model.config, vocab_size=len(variables["params"]["embed"]["embedding"])
    ))  # fmt: skip
    return np.asarray(tiny.jit(lambda variables: model.apply(variables, IDS))(variables))


@pytest.mark.parametrize("name", CASES)
def test_adapters_made_by_peft_have_its_logits(made, name):
    pair, folder, want = made(name)
    before = [np.array(x) for x in jax.tree.leaves(pair.params)]
    variables = adapters.variables(adapters.read(folder), pair.params, pair.spec)
    np.testing.assert_allclose(logits(pair, variables), want, rtol=0, atol=1e-4)
    for x, old in zip(jax.tree.leaves(pair.params), before, strict=True):
        np.testing.assert_array_equal(x, old)  # the base stays as it is, for the other adapters beside it


@pytest.mark.parametrize("name", SAVED)
def test_what_a_run_starts_from_and_writes_again(made, name, tmp_path):
    """As a run does it: fields from the files, the adapter as trained; exported it is peft's, merged it is the same."""
    pair, folder, want = made(name)
    method, adapter_config, tensors = adapters.read(folder)
    trained, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    pair = tiny.tuned(pair, **fields)
    start, frozen = method.init(jax.random.key(0), pair.params, pair.spec)
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, trained)
    trained = jax.tree.map(jnp.asarray, trained)
    merged = method.merge(trained, frozen, pair.spec)
    np.testing.assert_allclose(logits(pair, {"params": merged}), want, rtol=0, atol=1e-4)

    again, out = method.to_peft(trained, frozen, pair.spec)
    copies = {tensor for tensor in tensors if ".base_layer.weight" in tensor}
    assert out.keys() == tensors.keys() - copies
    peft_files.write_adapter(tmp_path / "again", out, again, None, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "again").eval()
    np.testing.assert_allclose(tiny.torch_logits(model, IDS), want, rtol=0, atol=1e-4)


def test_loaded_alone_and_beside_others(tmp_path):
    """By `ftjax.load`: a head trained whole, and a vocabulary resized for tokens of a tokenizer beside the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, want, lms = tmp_path / "base", {}, {}
    tiny.tiny_models.make("llama", tiny.tiny_models.SIZES | {"vocab_size": 512}).save_pretrained(base)
    words = AutoTokenizer.from_pretrained(assets.resolve("builtin:stories260K"))
    words.save_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    settings = {"whole": {"modules_to_save": ["lm_head"]}, "resized": {}, "plain": {}}
    for name, own in settings.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        if name == "resized":
            words.save_pretrained(tmp_path / name)
            model.resize_token_embeddings(len(words))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **own)).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        model.save_pretrained(tmp_path / name)
        want[name], lms[name] = tiny.torch_logits(model, IDS), ftjax.load(tmp_path / name)
    assert want["resized"].shape[-1] == 515
    together = ftjax.load(base, adapters={name: tmp_path / name for name in settings})
    for name, lm in lms.items():
        np.testing.assert_allclose(lm.logits(IDS), want[name], rtol=0, atol=1e-4)
        np.testing.assert_allclose(together.with_adapter(name).logits(IDS), want[name], rtol=0, atol=1e-4)
    assert together.logits(IDS).shape[-1] == 512
    assert lms["resized"].generate(["One day"], max_new_tokens=2)
    refused = {
        "whole": "'whole' contains whole parameters; only adapters with nothing but LoRA",
        "resized": "different tokenizers",
    }
    for name, message in refused.items():
        with pytest.raises(FtjaxError, match=message):
            together.with_adapter({name: 0.5, "plain": 0.5})


# -- bad input, each with its message


PREFIX = "base_model.model."
Q, K = (f"{PREFIX}model.layers.0.self_attn.{name}_proj" for name in "qk")
EMBED, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embeddings and head", lambda t: t.pop(HEAD), f"{HEAD} is missing: .* has 'lm_head' in modules_to_save"),
        ("norms", lambda t: t.update({f"{PREFIX}model.norm.weight": np.ones(3)}), r"shape \(3,\), expected \(16,\)"),
        ("norms", lambda t: t.update({f"{PREFIX}model.gorm.weight": np.ones(16)}), r"model.gorm.weight: expected"),
        (
            "embeddings and head",
            lambda t: t.update({f"{PREFIX}lm_head.modules_to_save.default.weight": t[HEAD] + 1}),
            "lm_head.modules_to_save.default.weight differs from .*lm_head.weight, of which it should be a copy",
        ),
        (
            "norms",
            lambda t: t.update({"model.norm.weight": t.pop(f"{PREFIX}model.norm.weight")}),
            "norm.weight is miss",
        ),
        (
            "all biases",
            lambda t: t.update({"module.transformer.ln_f.bias": np.ones(16)}),
            "ln_f.bias: expected the pre",
        ),
        # Names that peft ignores: of a module with an adapter, and of one without.
        (
            "their biases",
            lambda t: t.update({f"{Q}.bias": t.pop(f"{Q}.base_layer.bias")}),
            "PEFT ignores it, because .*q_proj has an adapter; expected",
        ),
        ("their biases", lambda t: t.update({f"{K}.base_layer.bias": np.ones(8)}), f"k_proj has no .*; expected {K}.b"),
        (
            "smaller, tied and adapted",
            lambda t: t.update({EMBED: np.ones((47, 16))}),
            "embed_tokens has an adapter; ex",
        ),
        ("resized", lambda t: t.pop(HEAD), r"vocabulary of 53, but its files lack lm_head.weight at this size"),
        ("resized, tied", lambda t: t.update({HEAD: t[HEAD] + 1}), "embeddings differs from that of its head, but the"),
        (
            "tokens",
            lambda t: [t.pop(n) for n in list(t) if "delta" in n],
            "but the adapter has no trainable_tokens_delta",
        ),
        (
            "tokens",
            lambda t: t.update({n: x[:1] for n, x in t.items() if "delta" in n}),
            "names 2 tokens of .*, but the adapter has 1 rows",
        ),
    ],
)
def test_tensors_that_do_not_fit(made, name, change, message):
    pair, folder, _ = made(name)
    method, adapter_config, tensors = adapters.read(folder)
    change(tensors)
    with pytest.raises(FtjaxError, match=message):
        adapters.variables((method, adapter_config, tensors), pair.params, pair.spec)


def test_names_that_a_run_does_not_know(made, tmp_path):
    pair = tiny.tuned(tiny.pair("llama2"), modules_to_save=("lm_haed",))
    with pytest.raises(FtjaxError, match=r"tuning.modules_to_save: 'lm_haed' matches no module .*did you mean \"lm_he"):
        tiny.start(pair)
    pair = tiny.tuned(tiny.pair("llama2"), targets=("q_proj",), modules_to_save=("self_attn",))
    with pytest.raises(FtjaxError, match="tuning.targets: tuning.modules_to_save trains whole all that q_proj selects"):
        tiny.start(pair)
    config = configs.default()
    config.tuning.update(method="prompt", modules_to_save=("lm_head",))
    with pytest.raises(FtjaxError, match="tuning.modules_to_save: prompt cannot train modules beside"):
        check_method(config, pair.family, pair.model.config)
    pair, folder, _ = made("resized")
    config.tuning.update(method="lora", init_from=str(folder), modules_to_save=())
    with pytest.raises(FtjaxError, match="tuning.init_from: .* replaces tables of embeddings of its base"):
        adapters.Start(config.tuning).fill(pair.spec)


@pytest.mark.slow
def test_a_run_that_trains_a_table_beside_lora(tmp_path):
    """Run folder, adapter and whole model are one model, here and in PyTorch; another run goes on from the adapter."""
    from transformers import AutoModelForCausalLM

    def config(name, **tuning):
        c = configs.default()
        c.run_dir = str(tmp_path / name)
        c.tuning.update(**tuning)
        c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=60, buckets=1, cache="")
        c.optim.update(lr=1e-3, warmup=0.0)
        c.train.update(steps=3, batch_size=8, eval_every=3, log_every=1)
        c.evaluate.rows = 8
        c.export.update(formats=("adapter", "merged"), checkpoint="last")
        c.log.update(tensorboard=False, compilation_cache=False)
        return c

    ftjax.train(config("run", rank=4, modules_to_save=("embed_tokens", "norm")), say=lambda line: None)
    got = {
        name: ftjax.load(tmp_path / "run" / name, checkpoint="last").logits(IDS) for name in ("", "adapter", "merged")
    }
    base = assets.resolve("builtin:stories260K")
    assert np.abs(got[""] - ftjax.load(base).logits(IDS)).max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    got |= {"peft": tiny.torch_logits(theirs.eval(), IDS), "transformers": tiny.torch_logits(whole.eval(), IDS)}
    for name, logits in got.items():
        np.testing.assert_allclose(logits, got[""], rtol=0, atol=1e-4, err_msg=name)

    again = config("again", init_from=str(tmp_path / "run" / "adapter"))
    again.optim.lr = 1e-12  # nothing moves: what comes out is what went in
    ftjax.train(again, say=lambda line: None)
    np.testing.assert_allclose(ftjax.load(tmp_path / "again").logits(IDS), got[""], rtol=0, atol=1e-4)
    told = json.loads((tmp_path / "again" / "run.json").read_text())["config"]["tuning"]
    assert "model.embed_tokens" in told["modules_to_save"] and told["rank"] == 4
