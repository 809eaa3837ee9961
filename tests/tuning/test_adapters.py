"""Adapters made elsewhere: several on one base, added as peft adds them, and a run that starts from one."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models

import ftjax
from ftjax import assets, cli
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub.peft import read_adapter
from ftjax.training.report import read_metrics
from ftjax.tuning import adapters

VOCABULARY = 512  # of the starter's tokenizer, which the random models borrow
IDS = np.arange(3, 27).reshape(2, 12) * 7 % VOCABULARY

# name of an adapter -> settings of peft's LoraConfig
LORAS = {
    "left": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 6},
    "right": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"],
        "r": 3,
        "lora_alpha": 12,
    },
    "wide": {"target_modules": ["q_proj", "v_proj"], "r": 5, "use_rslora": True},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a tiny llama with grouped heads and the starter's tokenizer; name -> folder of a peft adapter on it;
    the model under peft with all LORAS loaded)."""
    import torch
    from peft import LoraConfig, get_peft_model

    out = tmp_path_factory.mktemp("adapters")
    base = tiny_models.make("llama", tiny_models.SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 256})
    base.save_pretrained(out / "base")
    starter = assets.resolve("builtin:stories260K")
    shutil.copy(f"{starter}/tokenizer.json", out / "base")
    words = json.loads(Path(starter, "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    (out / "base" / "tokenizer_config.json").write_text(json.dumps(words))
    model = None
    for name, settings in LORAS.items():
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.get_base_model().name_or_path = str(out / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(out)
    return out / "base", {name: out / name for name in LORAS}, model.eval()


def peft_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def test_adapters_are_switched_by_name(made):
    base, folders, model = made
    lm = ftjax.load(base, adapters=folders)
    with model.disable_adapter():
        np.testing.assert_allclose(lm.logits(IDS), peft_logits(model), atol=1e-4)
    for name in folders:
        model.set_adapter(name)
        theirs = peft_logits(model)
        np.testing.assert_allclose(lm.with_adapter(name).logits(IDS), theirs, atol=1e-4)
        assert np.abs(theirs - lm.logits(IDS)).max() > 1e-2
    for ours, of_base in zip(jax.tree.leaves(lm.with_adapter("left").params), jax.tree.leaves(lm.params), strict=True):
        assert ours is of_base  # not copied


@pytest.mark.parametrize(
    ("combine", "weights"),
    [
        ("cat", {"left": 0.7, "right": 0.3}),
        ("cat", {"left": 1.0, "wide": -0.5, "right": 2.0}),
        ("linear", {"left": 0.7, "right": 0.3}),
        ("linear", {"right": -0.4, "left": 1.5}),
    ],
)
def test_weighted_sums_are_those_of_peft(made, combine, weights):
    base, folders, model = made
    name = f"{combine} of {' '.join(weights)}".replace(".", "")
    model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type=combine)
    model.set_adapter(name)
    lm = ftjax.load(base, adapters=folders)
    ours = lm.with_adapter(weights, combine).logits(IDS)
    np.testing.assert_allclose(ours, peft_logits(model), atol=1e-4)
    for alone in weights:
        assert np.abs(ours - lm.with_adapter(alone).logits(IDS)).max() > 1e-2


def test_adapters_that_cannot_be_used(made, tmp_path):
    base, folders, _ = made
    lm = ftjax.load(base, adapters=folders)
    with pytest.raises(FtjaxError, match=r'adapter \'wid\': not loaded .did you mean "wide"'):
        lm.with_adapter("wid")
    with pytest.raises(FtjaxError, match="adapter 'c': not loaded"):
        lm.with_adapter({"left": 0.5, "c": 0.5})
    with pytest.raises(FtjaxError, match="linear needs adapters of one rank; at .*q_proj/lora they have 3, 5: use cat"):
        lm.with_adapter({"left": 0.5, "wide": 0.5}, "linear")
    with pytest.raises(FtjaxError, match="combine: unknown way 'svd'; expected one of cat, linear"):
        lm.with_adapter({"left": 1.0}, "svd")
    with pytest.raises(FtjaxError, match="is not a PEFT adapter: it has no adapter_config.json"):
        ftjax.load(base, adapters={"left": base})
    with pytest.raises(FtjaxError, match="adapters need a base model"):
        ftjax.load(folders["left"], adapters=folders)


def test_the_command_line_asks_a_base_under_adapters(made, tmp_path, capsys):
    """One read of the base, an answer and a report for each adapter: those of the adapter's own folder."""
    base, folders, _ = made
    rows, out = tmp_path / "rows.txt", tmp_path / "out.json"
    rows.write_text("One day, Tom went to the park.\n")
    generate = ["generate", "--model", str(base), "--prompt", "One day,", "--max-new-tokens", "6", "--out", str(out)]
    assert cli.main([*generate, "--adapter", f"a={folders['left']}", "--adapter", str(folders["wide"])]) == 0
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["adapter"] for row in told] == ["a", str(folders["wide"])]
    evaluate = ["evaluate", "--data", str(rows), "--out", str(out)]
    adapted = [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]
    assert cli.main([*evaluate, "--model", str(base), *adapted]) == 0
    said, reports = capsys.readouterr().out, json.loads(out.read_text())
    assert list(reports) == list(folders) and all(f"{name}:\nloss" in said for name in folders)
    for name, row in (("left", told[0]), ("wide", told[1])):
        alone = ftjax.load(folders[name])
        assert [row["completion"]] == alone.generate(["One day,"], max_new_tokens=6)
        assert cli.main([*evaluate, "--model", str(folders[name])]) == 0
        assert json.loads(out.read_text())["loss"] == pytest.approx(reports[name]["loss"], rel=1e-6)
    assert abs(reports["left"]["loss"] - reports["wide"]["loss"]) > 1e-3
    assert cli.main([*evaluate, "--model", str(base), *adapted[:2]]) == 0
    assert json.loads(out.read_text()) == reports["left"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "left", "--adapter", "left"], "--adapter left: two adapters have the name left"),
        (["--adapter", "left="], "--adapter left=: expected DIR or NAME=DIR"),
        (["--adapter", "no/such/adapter"], "no such folder"),
    ],
)
def test_adapters_that_the_command_line_refuses(made, capsys, options, message):
    base, _, _ = made
    assert cli.main(["generate", "--model", str(base), "--prompt", "x", *options]) == 2
    assert message in capsys.readouterr().err


def settings(base, run_dir, start, **tuning):
    c = configs.default()
    c.run_dir = str(run_dir)
    c.model.path = str(base)
    c.tuning.update(init_from=str(start), **tuning)
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=32, buckets=1, max_length=128)
    c.data.end = "<s>"
    c.optim.update(lr=1e-3, warmup=0.0)
    c.train.update(steps=2, batch_size=8, eval_every=1, log_every=1)
    c.evaluate.rows = 4
    c.log.update(tensorboard=False, compilation_cache=False)
    return c


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_made_elsewhere(made, tmp_path):
    """Its tensors, ranks, scales and targets; a run that goes on, loading and export are as ever."""
    base, folders, _ = made
    config = settings(base, tmp_path / "run", folders["right"])
    config.optim.lr = 1e-12  # nothing moves: what comes out is what went in
    ftjax.train(config, say=lambda line: None)
    before = ftjax.load(base, adapters=folders).with_adapter("right").logits(IDS)
    np.testing.assert_allclose(ftjax.load(tmp_path / "run").logits(IDS), before, atol=1e-4)
    _, out = read_adapter(tmp_path / "run" / "adapter")
    _, given = read_adapter(folders["right"])
    assert out.keys() == given.keys()
    for name in given:
        np.testing.assert_allclose(out[name], given[name], atol=1e-6)

    config = settings(base, tmp_path / "moved", folders["right"])
    first = ftjax.train(config, say=lambda line: None)
    assert np.abs(ftjax.load(tmp_path / "moved").logits(IDS) - before).max() > 1e-3
    again = ftjax.train(config, say=lambda line: None)  # finds itself done
    assert again.resumed_from == first.steps == 2
    told = json.loads((tmp_path / "moved" / "run.json").read_text())["config"]["tuning"]
    assert told["rank"] == 3 and "model.layers.2.mlp.up_proj" in told["targets"]
    assert len(read_metrics(tmp_path / "moved")) > 0


TEMPLATE = (
    "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|bot|>') + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
TURNS = [{"role": "user", "content": "One day"}]


@pytest.fixture(scope="module")
def talkers(made, tmp_path_factory):
    """(a base with a padded table; name -> folder of an adapter): one brings tokens and a template, one a template."""
    from transformers import AutoTokenizer

    base, folders, _ = made
    out = tmp_path_factory.mktemp("talkers")
    sizes = {"vocab_size": VOCABULARY + 8, "max_position_embeddings": 256}
    tiny_models.make("llama", tiny_models.SIZES | sizes).save_pretrained(out / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, out / "base")
    for name, source in (("tokens", "left"), ("template", "right"), ("none", "wide")):
        shutil.copytree(folders[source], out / name)
        said = json.loads((out / name / "adapter_config.json").read_text())
        said["base_model_name_or_path"] = str(out / "base")
        (out / name / "adapter_config.json").write_text(json.dumps(said))
    own = AutoTokenizer.from_pretrained(out / "base")
    own.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    own.chat_template = TEMPLATE
    own.save_pretrained(out / "tokens")
    (out / "template" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    return out / "base", {name: out / name for name in ("tokens", "template", "none")}


def asked(lm) -> list[int]:
    text = lm.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_adapter_brings_its_tokenizer_and_template(talkers):
    from transformers import AutoTokenizer

    base, folders = talkers
    theirs = AutoTokenizer.from_pretrained(folders["tokens"])
    text = theirs.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    end = theirs.convert_tokens_to_ids("<|end|>")
    assert min(expected[0], expected[-1], end) >= VOCABULARY
    lm = ftjax.load(base, adapters=folders)
    for own in (
        ftjax.load(folders["tokens"]),
        lm.with_adapter("tokens"),
        lm.with_adapter("none").with_adapter("tokens"),
    ):
        assert asked(own) == expected and end in own.end_tokens
    for other in (lm, lm.with_adapter("none"), ftjax.load(folders["none"])):
        assert len(other.tokenizer) == VOCABULARY and not other.tokenizer.chat_template and end not in other.end_tokens
    for shown in (lm.with_adapter("template"), ftjax.load(folders["template"])):
        assert shown.tokenizer.decode(asked(shown)[-1:]) == "</s>"
    assert lm.tokenizer.chat_template is None  # the base's own is left as it is
    with pytest.raises(FtjaxError, match="adapters tokens, none: they have different tokenizers or chat templates"):
        lm.with_adapter({"tokens": 0.5, "none": 0.5})


def test_a_tokenizer_larger_than_the_table_of_the_base(made, talkers):
    with pytest.raises(FtjaxError, match=r"larger than the embedding: token '<\|end\|>' has id 514, the embedding 512"):
        ftjax.load(made[0], adapters={"a": talkers[1]["tokens"]})


@pytest.mark.slow
def test_a_run_reads_by_the_tokenizer_of_its_initial_adapter(talkers, tmp_path):
    """And it keeps that: loading and both exports need the adapter no more."""
    base, folders = talkers
    start = shutil.copytree(folders["tokens"], tmp_path / "start")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": [*TURNS, {"role": "assistant", "content": "x"}]}) + "\n"
    )
    c = settings(base, tmp_path / "run", start)
    c.data.update(train=str(tmp_path / "rows.jsonl"), split=(1.0, 0.0, 0.0), prompt="", completion="", end="", limit=0)
    c.train.update(steps=1, batch_size=1)
    c.tuning.init_from = str(folders["template"])
    with pytest.raises(FtjaxError, match="tuning.init_from: .*template brings a chat template without a tokenizer"):
        ftjax.train(c, say=lambda line: None)
    c.tuning.init_from = str(start)
    c.export.formats = ("adapter", "merged")
    ftjax.train(c, say=lambda line: None)
    shutil.rmtree(start)
    ids = [asked(ftjax.load(tmp_path / path)) for path in ("run", "run/adapter", "run/merged")]
    assert ids == [asked(ftjax.load(folders["tokens"]))] * 3
    (tmp_path / "run" / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(FtjaxError, match="of the tokenizer's files, chat_template.jinja was"):
        ftjax.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 8}, "tuning.rank: 8, but the adapter in tuning.init_from .* has 3; leave tuning.rank out"),
        ({"alpha": 7.0}, "tuning.alpha: 7.0, but the adapter"),
        ({"targets": ("k_proj",)}, r"tuning.targets: \('k_proj',\), but the adapter"),
        ({"method": "ia3"}, "tuning.method: 'ia3', but tuning.init_from .* holds an adapter of 'lora'"),
    ],
)
def test_a_config_that_says_otherwise(made, tmp_path, fields, message):
    base, folders, _ = made
    with pytest.raises(FtjaxError, match=message):
        ftjax.train(settings(base, tmp_path / "run", folders["right"], **fields), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_whole_parameters_are_not_added_as_if_they_were_nothing():
    with pytest.raises(
        FtjaxError,
        match="adapter 'head' contains whole parameters; only adapters with nothing but LoRA can be combined",
    ):
        adapters.weighted({"head": {"params": {}}}, {}, {"head": 1.0}, "cat")
