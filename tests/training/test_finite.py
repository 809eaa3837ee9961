"""Numbers that are NaN or infinite end a run, with the right step and reason, and nothing of them is kept."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny_labelled
from safetensors.numpy import load_file, save_file

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError, NotFinite
from ftjax.training import export, finite, hosts, loop
from ftjax.training.optimizer import schedule
from ftjax.training.report import read_metrics
from ftjax.training.run_folder import open_run
from ftjax.training.step import bad_step, init_state, norms_by_layer, train_step
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
    source = open_run(tmp_path / "run")
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


def test_a_run_that_diverges_names_the_layers_whose_gradients_grew(tmp_path):
    c = settings(tmp_path / "run", tuning__method="full", optim__warmup=0, train__steps=9, train__eval_every=100)
    c.optim.update(lr=100.0, clip_norm=0.0, schedule="constant", name="sgd")
    told = r"^step 4: the loss is nan .* In the 3 good steps before, the gradient norm grew most in embed .*, layer 0"
    with pytest.raises(NotFinite, match=told):
        ftjax.train(c, say=quiet)


def test_a_run_that_settles_at_a_uniform_guess_is_no_success(tmp_path):
    c, lines = settings(tmp_path / "run", optim__warmup=0, train__steps=7, train__log_every=1), []
    c.optim.update(lr=1000.0, schedule="constant")
    c.data.split = (1.0, 0.0, 0.0)
    result = ftjax.train(c, say=lines.append)
    assert [row["grad_norm"] for row in result.history if "loss" in row][-5:] == [0.0] * 5
    wanted = "the gradient was exactly 0 in the last 5 logged steps, so that nothing was trained. The model has most"
    assert lines[-1].startswith(f"warning: {wanted}")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["doubt"].startswith(wanted)
    del lines[:]
    ftjax.train(c, say=lines.append)  # the same command, after the end of the run
    assert lines[-1].startswith(f"warning: {wanted}")


def test_a_loss_that_ends_far_above_its_start_is_told_and_the_scatter_of_batches_is_not():
    row = lambda loss: {"step": 1, "loss": loss, "grad_norm": 1.0}  # noqa: E731
    settled, scattered = [row(6.2 + 0.01 * i) for i in range(9)], [row(3.0 + i % 3) for i in range(9)]
    wanted = r"the training loss ended at 6.26, far above 5.1, where it began. The model has most likely diverged"
    assert finite.doubt(5.1, settled, True).startswith(wanted)
    assert not finite.doubt(5.1, settled, False)  # a policy's loss measures nothing
    assert not finite.doubt(None, settled, True) and not finite.doubt(6.1, settled, True)
    assert not finite.doubt(3.0, scattered, True)  # an easy first batch
    assert not finite.doubt(5.1, settled[:4] + [{"step": 5, "val_loss": 9.0}, row(None)], True)
    reached = [{"step": 1, "loss": 0.0, "grad_norm": 0.0}] * 5  # as a hinge loss is behind its margin
    assert finite.doubt(1.0, reached, True).startswith("the loss and its gradient were exactly 0 in the last 5 logged")
    flat = [row | {"flat": 1.0} for row in reached]  # all answers of a rollout have the same reward
    assert finite.doubt(0.0, flat, False).startswith("all answers to a prompt had the same reward in the last 5 logged")


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
    rows = lambda: [f"a.jsonl row {i}" for i in range(1, 12)]  # noqa: E731
    finite.check_step(7, good, 3.0, 1e-3, 0.01, rows)
    finite.check_step(7, {"loss": None, "grad_norm": 0.0}, 3.0, 1e-3, 0.01, rows)
    told = r"^step 7: the loss is nan, and the loss before it was 3\. .*rate 0.001.*lower optim.lr.*row 8 and 3 more$"
    with pytest.raises(NotFinite, match=told):
        finite.check_step(7, bad, 3.0, 1e-3, 0.01, rows)
    with pytest.raises(
        NotFinite, match="^step 1: the loss is nan, in the first step, before any update: the learning rate is not"
    ):
        finite.check_step(1, bad, None, 1e-3, 0.01, rows)
    with pytest.raises(NotFinite, match="^step 7: the gradient norm is inf"):
        finite.check_step(7, {"loss": 2.5, "grad_norm": float("inf")}, 3.0, 1e-3, 0.01, rows)
    with pytest.raises(NotFinite, match="optim.weight_decay=1e.06 at the learning rate 0.001 takes 1e.03 times a"):
        finite.check_step(7, bad, 3.0, 1e-3, 1e6, rows)


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


def odd(tmp_path, name, base, **overrides):
    """A config of 12 rows in 3 batches, of which row 5 has a label whose weight overflows in the loss."""
    (tmp_path / name).mkdir()
    found = [row | {"label": ("good", "bad")[i % 2]} for i, row in enumerate(tiny_labelled.rows(12, 3))]
    found[4]["label"] = "odd"
    train = tiny_labelled.write(tmp_path / name / "rows.jsonl", found)
    c = tiny_labelled.config(tmp_path / name, base, data__train=train, data__test=train, train__on_bad_step="skip")
    c.data.split, c.export.formats, c.task.class_weights = (1.0, 0.0, 0.0), (), (1.0, 1.0, 3.4e38)
    c.task.labels = ("bad", "good", "odd")
    c.train.update(steps=6, batch_size=4, log_every=1, save_every=1, keep=9)
    configs.override(c, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    return c


def kept(run_dir, step):
    """Bytes of the arrays of a checkpoint."""
    folder = run_dir / "checkpoints" / str(step)
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for item in ("trained", "optimizer", "ema", "guard")
        for file in (folder / item).rglob("*")
        if file.is_file() and file.name[0] not in "._" and file.name != "commit_success.txt"  # which holds a time
    }


def test_a_step_that_overflows_is_left_out_and_named_and_a_resume_has_the_same_bits(tmp_path):
    base = tiny_labelled.make(tmp_path / "bert", "bert")
    said, c = [], odd(tmp_path, "skip", base)
    ftjax.train(c, say=said.append)
    run = tmp_path / "skip" / "run"
    skipped = json.loads((run / "run.json").read_text())["skipped"]
    steps = [entry["step"] for entry in skipped]
    assert len(steps) == 2 and steps[0] <= 3 < steps[1]  # once in each epoch
    assert all(
        len(entry["rows"]) == 4 and any(r.endswith("rows.jsonl row 5") for r in entry["rows"]) for entry in skipped
    )
    rows = [row for row in read_metrics(run) if "skipped" in row]
    assert [(row["step"], row["skipped"], row["rows"]) for row in rows] == [
        (entry["step"], i + 1, entry["rows"]) for i, entry in enumerate(skipped)
    ]
    assert sum(f"step {steps[0]}: the loss is" in text and "row 5" in text for text in said) == 1
    after, before = kept(run, steps[1]), kept(run, steps[1] - 1)
    same = [name for name in before if name.startswith(("trained", "optimizer"))]
    assert same and all(after[name] == before[name] for name in same)
    rates = {row["step"]: row["lr"] for row in read_metrics(run) if "lr" in row}
    assert list(rates.values()) == pytest.approx([1e-2, 9.33e-3, 7.5e-3, 5e-3], rel=1e-3)  # those of four updates

    # Killed behind the first bad step: the same command ends in the same bits and the same record.
    whole = kept(run, 6)
    for step in range(steps[0] + 1, 7):
        shutil.rmtree(run / "checkpoints" / str(step))
    ftjax.train(c, say=quiet)
    assert kept(run, 6) == whole
    assert json.loads((run / "run.json").read_text())["skipped"] == skipped


def test_ten_bad_steps_in_a_row_and_a_spike_that_may_not_be_skipped_end_the_run(tmp_path):
    c = settings(tmp_path / "run", optim__lr=1e30, optim__clip_norm=0.0, optim__warmup=0, train__steps=15)
    c.data.split, c.train.on_bad_step, c.train.save_every, c.optim.schedule = (1.0, 0.0, 0.0), "skip", 15, "constant"
    with pytest.raises(
        NotFinite,
        match=r"^step 11: .*\(all gradients are NaN.*the last of 10 bad steps in a row.*Lower",
    ):
        ftjax.train(c, say=quiet)
    c = settings(tmp_path / "spike", optim__lr=1.0, optim__clip_norm=0.0, optim__warmup=0, train__spike=1.5)
    with pytest.raises(
        NotFinite,
        match=r"above train.spike=1.5 times the median of the last losses.*norms: layer \d .*Look at the rows",
    ):
        ftjax.train(c, say=quiet)
    with pytest.raises(FtjaxError, match="train.spike: expected 0 or a number above 1"):
        ftjax.train(settings(tmp_path / "low", train__spike=0.5), say=quiet)


def test_a_loss_has_no_spikes_beside_a_median_that_is_not_above_zero():
    guard = {"skipped": np.int32(0), "in_a_row": np.int32(0)}
    for median, loss, expected in ((1.0, 3.5, True), (1.0, 2.5, False), (0.0, 1e-3, False), (-1.0, -1.1, False)):
        bad, _ = bad_step(guard | {"losses": np.full(50, median, "f")}, False, np.float32(loss), np.float32(1), 3.0)
        assert bool(bad) == expected, (median, loss)


def test_a_bad_batch_leaves_the_state_of_a_run_without_it():
    def sums(variables, batch, rngs):
        error = ((batch["x"] @ variables["w"] - batch["y"]) ** 2).sum()
        return error, 1.0 * len(batch["x"]), {"loss": error, "correct": 0.0}

    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(4, 3)).astype("f"), "y": rng.normal(size=4).astype("f")} for _ in range(70)]
    nan, spike = ({name: x.copy() for name, x in batches[0].items()} for _ in range(2))
    nan["x"][1, 1], spike["y"][2] = 1e25, 1e3
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 80))

    def run(batches, accumulate=1, devices=1):
        mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state, told = init_state(optimizer, {"w": np.ones(3, "f")}, 0.9, guarded=True), []
        state = jax.device_put(state, everywhere)
        take = jax.jit(
            functools.partial(
                train_step, sums=sums, variables=lambda trained, frozen: trained, optimizer=optimizer, seed=0,
                accumulate=accumulate, ema=0.9, spike=20.0,
            )
        )  # fmt: skip
        for batch in batches:
            state, report = take(state, {}, jax.device_put(batch, rows))
            told.append({name: np.asarray(x) for name, x in report.items()})
        return state, told

    for how in ((1, 1), (2, 1), (1, 2), (2, 2)):  # microbatches and devices decide the same
        plain, losses = run(batches, *how)
        mixed, told = run([nan, *batches[:60], nan, spike, *batches[60:]], *how)
        assert np.flatnonzero([x["bad"] for x in told]).tolist() == [0, 61, 62]
        assert int(mixed.guard["skipped"]) == 3 and told[62]["in_a_row"] == 2 and told[63]["in_a_row"] == 0
        ours, theirs = (jax.tree.leaves((x.trained, x.optimizer, x.ema, x.guard["losses"])) for x in (mixed, plain))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert np.array_equal(plain.guard["losses"], [x["loss"] for x in losses[-50:]])
        assert told[62]["loss"] > 20 * np.median([x["loss"] for x in losses[10:60]])


def test_a_run_goes_back_to_its_checkpoint_and_a_resume_has_the_same_bits(tmp_path, monkeypatch):
    base = tiny_labelled.make(tmp_path / "bert", "bert")
    fields = {"train__on_bad_step": "rewind", "train__keep": 9, "train__save_every": 4, "train__log_every": 7}
    fields |= {"train__batch_size": 2, "train__steps": 14, "train__ema": 0.9, "seed": 10}  # row 5 is in steps 6 and 12
    said, c = [], odd(tmp_path, "run", base, **fields)
    ftjax.train(c, say=said.append)
    run = tmp_path / "run" / "run"
    skipped = json.loads((run / "run.json").read_text())["skipped"]
    assert [(entry["step"], entry["back_to"]) for entry in skipped] == [(6, 4), (12, 8)]
    assert all(any(row.endswith("rows.jsonl row 5") for row in entry["rows"]) for entry in skipped)
    assert any("goes back to the checkpoint of step 4, and steps 5 to 6 change nothing" in text for text in said)
    rows = read_metrics(run)
    assert [(row["step"], row["back_to"]) for row in rows if "back_to" in row] == [(6, 4), (12, 8)]
    # Step 8 makes the sixth update, and step 14 the eighth.
    rate, rates = schedule(c.optim, 14, c.optim.lr), {row["step"]: row["lr"] for row in rows if "lr" in row}
    assert rates[8] == pytest.approx(float(rate(5))) and rates[14] == pytest.approx(float(rate(7)))
    at, back = kept(run, 12), kept(run, 8)
    same = [name for name in back if not name.startswith("guard")]
    assert same and all(at[name] == back[name] for name in same)
    whole, rows = kept(run, 14), [row for row in rows if row["step"] <= 4 or row["step"] >= 8]

    # Stopped between a checkpoint and the bad step: the run still goes back to that checkpoint.
    c.train.keep = 1
    for step in range(5, 15):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    with monkeypatch.context() as patched:
        patched.setattr(hosts, "preempted", lambda step: step == 5)
        with pytest.raises(KeyboardInterrupt):
            ftjax.train(c, say=quiet)
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"4", "5"}
    ftjax.train(c, say=quiet)
    assert kept(run, 14) == whole and json.loads((run / "run.json").read_text())["skipped"] == skipped
    again = [row for row in read_metrics(run) if row["step"] <= 4 or row["step"] >= 8]
    figures = lambda rows: [(row["step"], row.get("loss"), row.get("lr"), row.get("back_to")) for row in rows]  # noqa: E731
    assert figures(again) == figures(rows)


def test_the_layers_of_a_bad_step_are_named():
    norms = {"layers": np.array([np.inf, np.nan, 2.0]), "head": np.float32(1.0)}
    assert finite.by_layer(norms) == " (gradients are NaN or infinite in layer 0, layer 1)"
    largest = {"layers": np.array([1.0, 30.0, 2.0]), "head": np.float32(0.5)}
    assert finite.by_layer(largest) == " (largest gradient norms: layer 1 30, layer 2 2, layer 0 1)"
    known = [{"layers": np.array([1, 0.5, x]), "head": np.float32(y)} for x, y in ((0.5, 0.1), (0.1, 9), (9, 0.2))]
    found = finite.grown(known)
    assert found == " In the 3 good steps before, the gradient norm grew most in layer 2 (0.1 to 9)."
    assert finite.grown(known[:2]).endswith("grew most in head (0.1 to 9).")
    assert finite.grown(known[:1] * 2).endswith("no layer's gradient grew much.") and not finite.grown(known[:1])
    report, c = {"norms": largest, "in_a_row": 10, "skipped": 3}, configs.default()
    c.train.on_bad_step, bad = "rewind", {"loss": float("nan"), "grad_norm": 1.0}
    with pytest.raises(NotFinite, match="layer 1 30.*last of 10 bad steps in a row, which train.on_bad_step=rewind"):
        finite.check_bad(7, bad, ["a row 1"], report, c, 3.0, 4)
    with pytest.raises(NotFinite, match="no checkpoint to go back to: lower train.save_every, or look at the rows"):
        finite.check_bad(7, bad, ["a row 1"], report | {"in_a_row": 1}, c, 3.0, 0)

    rng = np.random.default_rng(0)
    tree = {"layers": {"a": rng.normal(size=(3, 2, 4)), "b": rng.normal(size=3)}}
    tree["head"] = {"c": rng.normal(size=(2, 2))}
    found = norms_by_layer(tree)
    expected = [np.linalg.norm([*tree["layers"]["a"][i].ravel(), tree["layers"]["b"][i]]) for i in range(3)]
    np.testing.assert_allclose(found["layers"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["head"], np.linalg.norm(tree["head"]["c"]), rtol=1e-5)
