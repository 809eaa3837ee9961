"""Numbers that are NaN or infinite end a run, with the right step and reason, and nothing of them is kept."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_labelled
from safetensors.numpy import load_file, save_file

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError, NotFinite
from ftjax.training import export, finite, loop
from ftjax.training.report import read_metrics
from ftjax.training.run_folder import open_run
from ftjax.tree import not_finite


def quiet(text):
    pass


def settings(run, **overrides):
    c = configs.default()
    c.run_dir = str(run)
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=60, cache="", buckets=1)
    c.train.update(steps=4, batch_size=4, eval_every=2, log_every=3)
    c.evaluate.rows, c.log.tensorboard, c.export.formats, c.tuning.rank = 4, False, (), 4
    configs.override(c, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    return c


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_as_the_best(tmp_path, monkeypatch):
    validate, calls = loop.validate, []

    def diverges(*args):
        calls.append(1)
        if len(calls) > 1:
            raise NotFinite("evaluation: the loss is nan")
        return validate(*args)

    monkeypatch.setattr(loop, "validate", diverges)
    with pytest.raises(
        NotFinite,
        match=r"step 4: after its update, the loss.*The best checkpoint is that of step 2; the run is not finished",
    ):
        ftjax.train(settings(tmp_path / "run"), say=quiet)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
    assert np.isfinite(ftjax.load(tmp_path / "run").logits([[1, 403, 407]])).all()
    source, _ = open_run(tmp_path / "run")
    source.trained = jax.tree.map(lambda x: x * np.inf, source.trained)
    with pytest.raises(FtjaxError, match="not written: .* of the checkpoint holds values that are NaN or infinite"):
        export.write(source, tmp_path / "out", "adapter")
    assert not (tmp_path / "run" / "results.json").exists()
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "val_loss" in row] == [2]


def test_a_last_update_that_ruins_the_model_is_found_without_validation_rows(tmp_path):
    c = settings(tmp_path / "run", optim__lr=1e30, optim__clip_norm=0.0, optim__warmup=0, train__steps=1)
    c.data.split, c.optim.schedule = (1.0, 0.0, 0.0), "constant"
    with pytest.raises(
        NotFinite, match="step 1: after its update, the loss is nan.*rate 1e.30 .*There is no checkpoint"
    ):
        ftjax.train(c, say=quiet)
    assert not (tmp_path / "run" / "checkpoints").exists()
    tree = {"a": {"b": np.array([1.0, np.nan], np.float32)}, "c": np.array([1], np.int8), "d": np.ones(2, np.float16)}
    assert not_finite(tree) == ["a/b"]


def test_damaged_weights_are_named_before_the_first_step(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(assets.resolve("builtin:stories260K"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].copy()
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.inf
    save_file(tensors, folder / "model.safetensors")
    c = settings(tmp_path / "run")
    c.model.path = str(folder)
    with pytest.raises(
        FtjaxError,
        match=f"{re.escape(str(folder))}: 1 of the model.s.*layers.2.mlp.up_proj.weight",
    ):
        ftjax.train(c, say=quiet)


def test_the_step_and_the_likely_cause_are_told():
    good, bad = {"loss": 2.5, "grad_norm": 1.0}, {"loss": float("nan"), "grad_norm": 1.0}
    finite.check_step(7, good, 3.0, 1e-3, 0.01)
    finite.check_step(7, {"loss": None, "grad_norm": 0.0}, 3.0, 1e-3, 0.01)
    with pytest.raises(
        NotFinite, match=r"^step 7: the loss is nan, and the loss before it was 3\. .*rate 0.001.*lower optim.lr"
    ):
        finite.check_step(7, bad, 3.0, 1e-3, 0.01)
    with pytest.raises(
        NotFinite, match="^step 1: the loss is nan, in the first step, before any update: the learning rate is not"
    ):
        finite.check_step(1, bad, None, 1e-3, 0.01)
    with pytest.raises(NotFinite, match="^step 7: the gradient norm is inf"):
        finite.check_step(7, {"loss": 2.5, "grad_norm": float("inf")}, 3.0, 1e-3, 0.01)
    with pytest.raises(NotFinite, match="optim.weight_decay=1e.06 at the learning rate 0.001 takes 1e.03 times a"):
        finite.check_step(7, bad, 3.0, 1e-3, 1e6)


def test_a_batch_whose_rows_weigh_nothing_teaches_nothing_and_has_no_loss(tmp_path):
    base = tiny_labelled.make(tmp_path / "bert", "bert")
    c = tiny_labelled.config(
        tmp_path, base, train__steps=12, train__eval_every=6, train__batch_size=2, train__log_every=1
    )
    c.task.class_weights, c.export.formats = (1.0, 0.0), ()
    ftjax.train(c, say=quiet)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    losses = [row["loss"] for row in found if "loss" in row]
    assert len(losses) == 12 and None in losses and not all(x is None for x in losses)
    assert all((row["loss"] is None) == (row["accuracy"] is None) for row in found if "loss" in row)
    assert all(row["grad_norm"] == 0 for row in found if "loss" in row and row["loss"] is None)
