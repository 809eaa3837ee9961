"""A run knows what it was made from: its base, its tokenizer, its rows, its start and the settings of its results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.training import sharding
from ftjax.training.run_folder import open_run
from ftjax.tree import flatten

IDS = np.array([[1, 403, 407, 261, 378, 298, 10, 100]])


def settings(project: Path):
    c = configs.default()
    c.update(run_dir=str(project / "run"))
    c.model.update(path=str(project / "base"), dtype="bfloat16")
    c.tuning.update(rank=4, alpha=8.0, init="pissa", targets=("q_proj", "down_proj"))
    c.data.update(train=str(project / "rows.jsonl"), prompt="{src}:", completion=" {tgt}", buckets=1, cache="")
    c.optim.update(lr=1e-2, warmup=0.0)
    c.train.update(steps=2, batch_size=8)
    c.evaluate.update(compare=True, compare_rows=2, batch_size=4)
    c.generate.update(max_new_tokens=3, batch_size=2)
    c.export.formats = ("adapter",)
    c.log.update(tensorboard=False)
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project folder with a base, rows, and a finished run of PiSSA in bfloat16."""
    project = tmp_path_factory.mktemp("made") / "project"
    shutil.copytree(assets.resolve("builtin:stories260K"), project / "base")
    rows = [{"src": f"{word} {i}", "tgt": f"The {word} is {i}."} for i in range(5) for word in ("dog", "cat", "sun")]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = sharding.make_mesh
    one = lambda config, devices=None: make(config, jax.devices()[:1])  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", one)
        ftjax.train(settings(project), say=lambda line: None)
    return project


@pytest.fixture
def project(made, tmp_path):
    """The project as if it had been moved: all paths in its files are those of the first place."""
    shutil.copytree(made, tmp_path / "moved place")
    shutil.move(made, made.with_name("away"))
    yield tmp_path / "moved place"
    shutil.move(made.with_name("away"), made)


def logits(path, dtype="float32"):
    return ftjax.load(path, dtype=dtype).logits(IDS)


def torch_logits(base, adapter=None):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_a_start_that_was_drawn_from_the_base_is_kept(made):
    """Trained in bfloat16, the run loads in float32 as the model that peft makes of its adapter."""
    trained = torch_logits(made / "base", made / "run/adapter")
    assert np.abs(trained - torch_logits(made / "base")).max() > 0.1
    np.testing.assert_allclose(logits(made / "run"), trained, atol=1e-4)
    np.testing.assert_allclose(logits(made / "run/adapter"), trained, atol=1e-4)
    stored = load_file(made / "run/start.safetensors")
    frozen = flatten(open_run(made / "run", "float32").frozen)
    assert stored and all(np.array_equal(frozen[path], x) for path, x in stored.items())


def test_a_run_without_its_start_is_refused(project):
    (project / "run/start.safetensors").unlink()
    with pytest.raises(FtjaxError, match=r"start.safetensors: is missing.*cannot be computed again to the bit"):
        logits(project / "run")
    with pytest.raises(FtjaxError, match=r"start.safetensors: is missing"):
        ftjax.train(settings(project), say=lambda line: None)


def test_a_project_that_moved_goes_on(project, tmp_path):
    assert np.isfinite(logits(project / "run")).all() and np.isfinite(logits(project / "run/adapter")).all()
    ftjax.export(project / "run", tmp_path / "again")
    ours = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert ours["base_model_name_or_path"] == str(project / "base")
    said = []
    result = ftjax.train(settings(project), say=said.append)
    assert result.resumed_from == result.steps == 2
    kept = json.loads((project / "run/run.json").read_text())
    assert kept["config"]["data"]["train"] == str(project / "rows.jsonl")
    # Alone elsewhere, the run names its base and says what to do.
    (project / "run").rename(tmp_path / "alone")
    (project / "base").rename(project / "new base")
    with pytest.raises(FtjaxError, match=r"alone: its base .*base is at none of .*set config.model.path in .*run.json"):
        logits(tmp_path / "alone")
    kept = json.loads((tmp_path / "alone/run.json").read_text())
    kept["config"]["model"]["path"] = str(project / "new base")
    (tmp_path / "alone/run.json").write_text(json.dumps(kept))
    assert np.isfinite(logits(tmp_path / "alone")).all()


def other_weights(base: Path):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def other_tokenizer(base: Path):
    said = json.loads((base / "tokenizer.json").read_text())
    vocab = said["model"]["vocab"]
    by_id = {i: token for token, i in vocab.items()}
    vocab[by_id[300]], vocab[by_id[403]] = 403, 300
    (base / "tokenizer.json").write_text(json.dumps(said))


def other_ends(base):
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')


def other_template(base: Path):
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_weights, "model.safetensors was "),
        (other_tokenizer, "tokenizer.json was "),
        (other_template, "chat_template.jinja was not there"),
        (other_ends, "generation_config.json was "),
    ],
)
def test_another_base_at_its_place_is_refused(project, change, name):
    change(project / "base")
    with pytest.raises(FtjaxError, match=rf"run: was trained on another base than .*base .*{name}.*Put back the files"):
        logits(project / "run")
    with pytest.raises(FtjaxError, match="was trained on another base"):
        ftjax.export(project / "run", project / "out")
    with pytest.raises(FtjaxError, match=f"holds another run: .*{name}"):
        ftjax.train(settings(project), say=lambda line: None)
    if change in (other_tokenizer, other_template):  # an adapter brings its own
        logits(project / "run/adapter")
        return
    with pytest.raises(FtjaxError, match=f"adapter: was trained on another base than .*{name}"):
        logits(project / "run/adapter")
    with pytest.raises(FtjaxError, match=r"adapter: was trained on another base .*remove `base` from .*ftjax.json"):
        ftjax.load(project / "base", adapters={"a": project / "run/adapter"})
    kept = json.loads((project / "run/adapter/ftjax.json").read_text())
    (project / "run/adapter/ftjax.json").write_text(json.dumps({"files": kept["files"]}))
    ftjax.load(project / "base", adapters={"a": project / "run/adapter"})


def test_results_before_and_after_are_of_the_same_settings(project):
    said, before = [], project / "run/before.json"
    first = before.read_text()
    ftjax.train(settings(project), say=said.append)
    assert before.read_text() == first and not any("measured again" in line for line in said)
    c = settings(project)
    c.generate.max_new_tokens = 8
    c.evaluate.update(compare_rows=1, metrics=("rouge_l", "exact_match"))
    results = ftjax.train(c, say=said.append).results
    assert any("before.json: was measured with another evaluate, generate" in line for line in said)
    assert results["before"].keys() == results["after"].keys() >= {"exact_match"}
    assert results["settings"]["generate"]["max_new_tokens"] == 8
    (sample,) = (json.loads(line) for line in (project / "run/samples.jsonl").read_text().splitlines())
    short = json.loads(first)["measured"]["samples"][0]
    assert sample["prompt"] == short["prompt"] and len(sample["before"]) > len(short["prediction"])


def test_overwriting_deletes_what_the_run_wrote(project, tmp_path):
    run, mine = project / "run", ["notes.txt", "checkpoints/why.md", "tensorboard/x.txt", "full/weights.bin"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    c = settings(project)
    c.overwrite, c.optim.lr = True, 2e-2
    result = ftjax.train(c, say=lambda line: None)
    assert result.resumed_from == 0 and all((run / name).read_text() == "mine" for name in mine)
    assert {p.name for p in (tmp_path / "scratch").iterdir() if p.is_dir()} == {"2"}
    assert not (run / "lock").exists() and np.isfinite(logits(run)).all()
    # What an export would delete is told before the first step.
    (run / "adapter/README.md").write_text("mine")
    c.optim.lr = 3e-2
    with pytest.raises(FtjaxError, match=r"adapter: holds files that no export of ftjax wrote: README.md"):
        ftjax.train(c, say=lambda line: None)
    with pytest.raises(FtjaxError, match=r"adapter: holds files that no export of ftjax wrote: README.md"):
        ftjax.export(run, run / "adapter")
    assert (run / "adapter/README.md").read_text() == "mine"
