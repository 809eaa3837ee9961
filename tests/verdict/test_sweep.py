"""Runs over a grid: each once, what failed told, and what they came to."""

import json

import pytest
import tiny_labelled

import ftjax
from ftjax.errors import FtjaxError
from ftjax.verdict import sweep
from ftjax.verdict.sweep import Axis, Outcome


def test_a_grid_is_read_as_the_command_line_reads_fields():
    assert sweep.axes(["tuning.rank=4,8", "tuning.targets=('query',),('query', 'value')", 'data.prompt="a, b",c']) == [
        Axis("tuning.rank", ("4", "8")),
        Axis("tuning.targets", ("('query',)", "('query', 'value')")),
        Axis("data.prompt", ('"a, b"', "c")),
    ]
    for text, match in (("rank", "expected key="), ("rank=", "expected key="), ("seed=1,2", "--seeds")):
        with pytest.raises(FtjaxError, match=match):
            sweep.axes([text])
    with pytest.raises(FtjaxError, match="named twice"):
        sweep.axes(["tuning.rank=4", "tuning.rank=8"])


def test_every_run_is_run_once_and_one_that_fails_is_told(tmp_path):
    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "base", "bert"), tuning__method="head")
    c.train.update(steps=6, eval_every=6, log_every=1, batch_size=8)
    c.data.buckets, c.export.formats = 1, ()
    c.optim.clip_norm = 0.0
    said = []
    first = ftjax.sweep(c, ["data.shots=2,8"], seeds=2, say=said.append)
    assert [(o.settings, o.seed) for o in first] == [({"data.shots": k}, s) for k in (2, 8) for s in (0, 1)]
    assert all(0 <= o.figures["accuracy"] <= 1 and o.figures["val_loss"] > 0 for o in first)
    assert first[0].figures["val_loss"] != first[1].figures["val_loss"]
    assert "±" in said[-2] and "accuracy" in said[-2]
    assert (tmp_path / "run" / "sweep.png").stat().st_size > 5_000
    written = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [o["figures"] for o in written] == [o.figures for o in first]

    said.clear()
    wider = ftjax.sweep(c, ["data.shots=2,8", "optim.lr=1e-2,1e38"], seeds=1, say=said.append)
    bad = [o for o in wider if o.settings["optim.lr"] == 1e38]
    assert all("the loss became" in o.failed and not o.figures for o in bad) and not any(o.failed for o in wider[::2])
    assert sum(text.startswith("failed: ") for text in said) == 2 and "failed: data.shots=2,optim.lr=1e38" in said[-2]
    again = ftjax.sweep(c, ["data.shots=2,8", "optim.lr=1e-2,1e38"], seeds=1, say=said.append)
    assert "4 runs, of which 4 have ended" in said[-3] and again[::2] == wider[::2]

    c.train.steps = 7
    with pytest.raises(FtjaxError, match="shots=2.* holds another run: train.steps was 6, is 7"):
        ftjax.sweep(c, ["data.shots=2,8"], seeds=2, say=said.append)
    with pytest.raises(FtjaxError, match="tuning.rnk: no such key"):
        ftjax.sweep(c, ["tuning.rnk=2,8"], say=said.append)
    with pytest.raises(FtjaxError, match="nowhere.tsv"):
        ftjax.sweep(c, ["data.train=nowhere.tsv"], say=said.append)


def test_a_table_tells_mean_and_spread_over_seeds():
    outcomes = [
        Outcome({"a": a}, seed, f"{a}-{seed}", {"f1": a + seed / 10}, 3.0) for a in (1, 2) for seed in (0, 1, 2)
    ]
    outcomes[-1] = Outcome({"a": 2}, 2, "2-2", {}, float("nan"), failed="the loss became nan")
    text = sweep.table(outcomes, ["f1"])
    assert "1.1 ± 0.1" in text and "2.05 ± 0.071" in text and "failed: 2-2: the loss became nan" in text


def test_settings_name_folders_and_odd_ones_are_set_apart():
    assert sweep._name(["tuning.rank=4", "seed=0"]) == "tuning.rank=4,seed=0"
    one, other = (sweep._name([f"data.train=a{between}b", "seed=0"]) for between in "/ ")
    assert one.startswith("data.train=a_b") and one != other
