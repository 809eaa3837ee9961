"""Train, export and come back: what ftjax writes gives PyTorch the trained model's logits, and not the base's."""

import json
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.training.loop import summary
from ftjax.training.report import Progress, read_metrics

IDS = np.array([[1, 403, 407, 261, 378, 298, 10, 100], [1, 5, 6, 7, 8, 9, 11, 12]])


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """Directory of a base model: the real starter, or a random GPT-2 that borrows its tokenizer."""
    starter = assets.resolve("builtin:stories260K")
    if request.param == "llama":
        return starter
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    shape = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    shutil.copy(f"{starter}/tokenizer.json", folder)
    named = json.loads(Path(starter, "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return str(folder)


def settings(base, method, run_dir, formats):
    c = configs.default()
    c.update(run_dir=str(run_dir))
    c.model.path = base
    c.tuning.update(method=method, rank=4)
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=64, buckets=1)
    c.optim.update(lr=1e-2)
    c.train.update(steps=4, batch_size=8, eval_every=4)
    c.evaluate.rows = 8
    c.export.formats = formats
    c.log.update(tensorboard=False, compilation_cache=False)
    return c


def torch_logits(folder, adapter=None):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-4 and (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
def test_lora_comes_back_as_adapter_and_merged(base, tmp_path):
    run = tmp_path / "run"
    result = ftjax.train(settings(base, "lora", run, ("adapter", "merged")), say=lambda line: None)
    assert result.steps == 4 and result.val_loss > 0
    trained = ftjax.load(run).logits(IDS)
    untrained = ftjax.load(base).logits(IDS)
    assert np.abs(trained - untrained).max() > 1e-2
    assert close(ftjax.load(run / "adapter").logits(IDS), trained)
    assert close(ftjax.load(run / "merged").logits(IDS), trained)
    assert close(torch_logits(base, run / "adapter"), trained)
    assert close(torch_logits(run / "merged"), trained)
    assert close(torch_logits(base), untrained)
    for folder in ("adapter", "merged"):  # the config lies beside every result
        assert json.loads((run / folder / "ftjax.json").read_text())["config"]["tuning"]["rank"] == 4
    with pytest.raises(FtjaxError, match="dtype: float16 is of a whole model"):
        ftjax.export(run, tmp_path / "again", dtype="float16")
    ftjax.export(run, tmp_path / "again", "merged")
    assert close(torch_logits(tmp_path / "again"), trained)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
def test_full_training_comes_back_as_a_model(base, tmp_path):
    run = tmp_path / "run"
    ftjax.train(settings(base, "full", run, ("auto",)), say=lambda line: None)
    trained = ftjax.load(run).logits(IDS)
    assert np.abs(trained - ftjax.load(base).logits(IDS)).max() > 1e-2
    assert close(ftjax.load(run / "full").logits(IDS), trained)
    assert close(torch_logits(run / "full"), trained)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_patience_stops_the_run_and_the_best_state_is_kept(base, tmp_path):
    run = tmp_path / "run"
    config = settings(base, "lora", run, ("adapter",))
    config.data.limit = 8  # learned by heart soon, at the cost of the rows held out
    config.optim.update(lr=3e-2, schedule="constant", warmup=0.0)
    config.train.update(steps=40, eval_every=1, save_every=100, patience=3)
    result = ftjax.train(config, say=lambda line: None)
    losses = {row["step"]: row["val_loss"] for row in read_metrics(run) if "val_loss" in row}
    assert result.stopped_early and result.steps == result.best_step + 3 < 40
    assert result.val_loss == losses[result.best_step] == min(losses.values())
    best, last = ftjax.load(run).logits(IDS), ftjax.load(run, checkpoint="last").logits(IDS)
    assert close(ftjax.load(run / "adapter").logits(IDS), best)
    assert np.abs(best - last).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_interrupted_run_goes_on_on_another_mesh(base, tmp_path, monkeypatch):
    def config(run, **mesh):
        c = settings(base, "full", tmp_path / run, ("full",))
        c.optim.lr = 1e-3
        c.train.update(steps=8, save_every=2, eval_every=8, log_every=1, accumulate=1)
        c.mesh.update(data=1, fsdp=1, tensor=1)
        c.mesh.update(mesh)
        return c

    def losses(run):
        return np.array([row["loss"] for row in read_metrics(tmp_path / run) if "loss" in row])

    ftjax.train(config("whole", data=8), say=lambda line: None)
    count = Progress.count

    def interrupted(self, tokens):
        count(self, tokens)
        if len(losses("moved")) >= 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ftjax.train(config("moved", data=8), say=lambda line: None)
    result = ftjax.train(config("moved", fsdp=4, tensor=2), say=lambda line: None)
    assert 2 <= result.resumed_from <= 6 and result.steps == 8
    np.testing.assert_allclose(losses("moved"), losses("whole"), rtol=1e-5)


def test_padding_on_either_side_changes_no_logit():
    lm = ftjax.load("builtin:stories260K")
    plain = lm.logits(IDS)
    pad, mask = np.zeros((2, 3), int), np.ones_like(IDS)
    left = lm.logits(np.hstack([pad, IDS]), np.hstack([pad, mask]))[:, 3:]
    right = lm.logits(np.hstack([IDS, pad]), np.hstack([mask, pad]))[:, :-3]
    assert close(left, plain) and close(right, plain)


def test_public_names_are_there_and_importing_them_is_free():
    assert {"load", "LM", "train", "Result", "evaluate", "export"} <= set(dir(ftjax))
    assert callable(ftjax.train) and callable(ftjax.evaluate) and callable(ftjax.export)
    import_module("ftjax.training.loop")  # submodules must not hide the functions

    assert callable(ftjax.train) and callable(ftjax.evaluate)
    with pytest.raises(AttributeError, match="no attribute"):
        ftjax.nothing  # noqa: B018


@pytest.mark.slow
def test_a_mixture_of_cleaned_chats_from_disk_comes_back_with_its_template(tmp_path):
    """The whole way of the data in one run: mixed, cleaned, streamed, templated, packed; its losses, its leavings."""
    rows = [{"prompt": f"Say {word}", "completion": f"{word}, {word}!"} for word in ("one", "two", "six", "ten") * 12]
    chats = [
        {"conversations": [{"from": "human", "value": f"Is {i} big?"}, {"from": "gpt", "value": "No." * (i % 3 + 1)}]}
        for i in range(24)
    ]
    for name, content in (("rows", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    c = settings(assets.resolve("builtin:stories260K"), "lora", tmp_path / "run", ("adapter", "merged"))
    c.data.update(prompt="", completion="", limit=0, packing=True, streaming=True, max_length=128, template="plain")
    c.data.update(end="<s>", split=(0.5, 0.5, 0.0), cache=str(tmp_path / "cache"))
    c.data.mixture = (
        {"train": str(tmp_path / "rows.jsonl"), "weight": 0.5, "system": "Be short."},
        {"train": str(tmp_path / "chats.jsonl"), "weight": 0.5, "clean.exact": True},
    )
    said = []
    result = ftjax.train(c, say=said.append)
    assert any("mixture: chats is 50.0% of an epoch's rows" in line for line in said)
    validated = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    assert result.steps == 4 and validated
    for row in validated:
        assert min(row["val_loss/rows"], row["val_loss/chats"]) < row["val_loss"]
        assert row["val_loss"] < max(row["val_loss/rows"], row["val_loss/chats"])
    text = ftjax.load(tmp_path / "run").tokenizer.chat_template
    for folder in ("adapter", "merged"):
        assert ftjax.load(tmp_path / "run" / folder).tokenizer.chat_template == text
    (answered,) = import_module("ftjax.evaluation.run").answer(str(tmp_path / "run"), ["Is 3 big?"], max_new_tokens=2)
    lm = ftjax.load(tmp_path / "run" / "merged")
    asked = [{"role": "user", "content": "Is 3 big?"}]
    shown = lm.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert answered["prompt"].replace("<s> ", "<s>") == shown  # decoding puts a blank behind a special token


@pytest.mark.parametrize("run_dir", ["runs/x", "my runs/it's $1"])
def test_commands_that_come_next_can_be_pasted(run_dir):
    fields = {
        "steps": 1,
        "seconds": 1.0,
        "train_loss": 1.0,
        "val_loss": None,
        "best_step": 0,
        "best": None,
        "files": {},
        "privacy": None,
    }
    text = summary(SimpleNamespace(run_dir=run_dir, **fields), configs.default(), chat=False)
    commands = [shlex.split(line) for line in text.partition("next:\n")[2].splitlines()]
    assert [command[1] for command in commands] == ["generate", "evaluate", "export"]
    assert all(command[3] == run_dir for command in commands)
