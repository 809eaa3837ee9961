"""Runs over a grid: each once, what failed told, and what they came to."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_labelled

import ftjax
from ftjax.errors import FtjaxError
from ftjax.training import claims
from ftjax.verdict import rows, search, sweep
from ftjax.verdict.search import Axis
from ftjax.verdict.sweep import Outcome


def test_a_grid_is_read_as_the_command_line_reads_fields():
    assert search.axes(["tuning.rank=4,8", "tuning.targets=('query',),('query', 'value')", 'data.prompt="a, b",c']) == [
        Axis("tuning.rank", ("4", "8")),
        Axis("tuning.targets", ("('query',)", "('query', 'value')")),
        Axis("data.prompt", ('"a, b"', "c")),
    ]
    twice = ["optim.lr=1e-3,0.001,1e-4,.001", "data.packing=True,true", "tuning.targets=('a','b'),(\"a\", \"b\")"]
    assert [axis.values for axis in search.axes(twice)] == [("1e-3", "1e-4"), ("True",), ("('a','b')",)]
    for text, match in (("rank", "expected key="), ("rank=", "expected key="), ("seed=1,2", "--seeds")):
        with pytest.raises(FtjaxError, match=match):
            search.axes([text])
    with pytest.raises(FtjaxError, match="the key tuning.rank occurs twice"):
        search.axes(["tuning.rank=4", "tuning.rank=8"])


@pytest.mark.slow
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
    told = next(text for text in said if "mean ± standard" in text)
    assert "accuracy" in told and "accuracy: a learning curve needs at least 4 different amounts; found 2" in said
    assert (tmp_path / "run" / "sweep.png").stat().st_size > 5_000
    written = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [o["figures"] for o in written] == [o.figures for o in first]

    said.clear()
    wider = ftjax.sweep(c, ["data.shots=2,8", "optim.lr=1e-2,1e38"], seeds=1, say=said.append)
    bad = [o for o in wider if o.settings["optim.lr"] == 1e38]
    assert all("lower optim.lr" in o.failed and not o.figures for o in bad) and not any(o.failed for o in wider[::2])
    assert sum(text.startswith("failed: ") for text in said) == 2
    assert any("\nfailed: data.shots=2,optim.lr=1e38" in text for text in said)
    said.clear()
    again = ftjax.sweep(c, ["data.shots=2,8", "optim.lr=1e-2,1e38"], seeds=1, say=said.append)
    assert any("4 runs, 4 of them already finished" in text for text in said) and again[::2] == wider[::2]

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


def test_points_that_read_other_rows_have_files_of_their_own_in_any_order(tmp_path):
    c = small(tmp_path)
    points = [("data.stratify=label",), ("data.stratify=",)]

    def dealt(points):
        jobs = sweep._plan(c, points, seeds=2, fixed={}, say=lambda text: None)
        assert len({job.data.test for _, job in jobs}) == 2
        return {(settings["data.stratify"], job.seed): job.data.test for settings, job in jobs}

    assert dealt(points) == dealt(points[::-1]) and dealt(points)["", 1] == str(tmp_path / "run/rows/test.jsonl")


def test_an_axis_of_amounts_gets_its_law(tmp_path):
    said = []
    outcomes = []
    for lr, n, seed in itertools.product((0.1, 0.2), (0, 50, 100, 200, 400), (0, 1)):
        f1 = 1 - lr - max(n, 1) ** -0.5 + seed / 1000
        outcomes.append(Outcome({"data.limit": n, "optim.lr": lr}, seed, "", {"f1": f1}, 1.0, noise={"f1": 0.01}))
    assert sweep.draw(outcomes, "f1", tmp_path / "sweep.png", said.append).stat().st_size > 10_000
    told = json.loads((tmp_path / "curves.json").read_text())
    assert list(told) == ["lr=0.1", "lr=0.2"] and [p["amount"] for p in told["lr=0.1"]["points"]] == [50, 100, 200, 400]
    assert said == [f"{label}: {one['says']}" for label, one in told.items()] and "twice the data" in said[0]
    assert told["lr=0.2"]["law"][-1]["value"] == pytest.approx(1 - 0.2 - 1600**-0.5, abs=0.02)

    tiny = str(tiny_labelled.make(tmp_path / "tiny", "bert"))
    models = [
        Outcome({"model.path": path}, 0, "", {"perplexity": x}, 1.0)
        for path, x in (("builtin:stories260K", 3.0), (tiny, 4.0))
    ]
    sweep.draw(models, "perplexity", tmp_path / "sweep.png", said.append)
    told = json.loads((tmp_path / "curves.json").read_text())["perplexity"]
    assert 260_032 in [p["amount"] for p in told["points"]] and len(told["points"]) == 2
    assert "at least 4 different amounts; found 2" in said[-1]
    assert (
        sweep.law_of("perplexity") == {"higher": False, "best": 1.0, "worst": None}
        and sweep.law_of("bleu")["best"] == 100
    )
    assert sweep.law_of("val_loss")["higher"] is False and sweep.law_of("accuracy")["higher"] is True
    assert sweep.law_of("unsupported") == {"higher": False, "best": 0.0, "worst": 1.0, "bounded": True}
    (tmp_path / "own.py").write_text("def cost(prediction, references, row):\n    return -3\n\n\ncost.higher = False\n")
    unbounded = {"higher": False, "best": None, "worst": None, "bounded": False}
    assert sweep.law_of(f"{tmp_path / 'own.py'}:cost") == unbounded


def test_settings_name_folders_and_odd_ones_are_set_apart():
    assert sweep._name(["tuning.rank=4", "seed=0"]) == "tuning.rank=4,seed=0"
    one, other = (sweep._name([f"data.train=a{between}b", "seed=0"]) for between in "/ ")
    assert one.startswith("data.train=a_b") and one != other


def small(tmp_path):
    """Two steps of a head, on rows of which every seed would hold out others."""
    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "base", "bert"), tuning__method="head")
    c.train.update(steps=2, eval_every=2, log_every=1, batch_size=8)
    c.data.update(buckets=1, test="", split=(0.6, 0.2, 0.2))
    c.export.formats = ()
    return c


def test_rows_belong_to_a_run_defaults_are_not_run_again_and_errors_of_one_run_are_reported(tmp_path, monkeypatch):
    c, said = small(tmp_path), []
    real, ran = sweep.train, []

    def train(config, say):
        ran.append(config)
        if config.optim.lr == 1e-3 and len(ran) == 2:
            raise MemoryError("RESOURCE_EXHAUSTED: 9 GB\nand more")
        if config.optim.lr == 5e-3:
            raise KeyboardInterrupt
        return real(config, say=say)

    monkeypatch.setattr(sweep, "train", train)
    grid = [f"optim.lr={c.optim.lr},1e-3"]
    first, second = ftjax.sweep(c, grid, say=said.append)
    assert first.figures and second.failed == "MemoryError: RESOURCE_EXHAUSTED: 9 GB" and not second.figures
    assert any("failed: " in text and "RESOURCE_EXHAUSTED" in text for text in said)
    assert not ftjax.sweep(c, grid, say=said.append)[1].failed and len(ran) == 3  # the same command tries again

    # A new axis at its default is the same run.
    (wider,) = ftjax.sweep(c, [f"optim.lr={c.optim.lr}", f"tuning.rank={c.tuning.rank}"], say=said.append)
    assert len(ran) == 3 and wider.figures == first.figures and wider.settings["tuning.rank"] == c.tuning.rank

    with pytest.raises(KeyboardInterrupt):
        ftjax.sweep(c, ["optim.lr=5e-3"], say=said.append)

    # A run that was stopped is not marked as failed by an error before it goes on, and by no error that may pass.
    name = f"optim.lr={c.optim.lr},seed=0"
    (tmp_path / "run" / name / "outcome.json").unlink()
    c.train.steps = 3
    with pytest.raises(sweep.AnotherRun, match=f"^{name}: run_dir: .* holds another run: train.steps was 2, is 3"):
        ftjax.sweep(c, [f"optim.lr={c.optim.lr}"], say=said.append)
    c.train.steps = 2
    (again,) = ftjax.sweep(c, [f"optim.lr={c.optim.lr}"], say=said.append)
    assert again.figures == first.figures and again.joules is None  # that of the process before is not known

    def full(config, say):
        (Path(config.run_dir) / "metrics.jsonl").write_text("{}")
        raise FtjaxError("no space left")

    (tmp_path / "run" / name / "outcome.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "train", full)
        assert ftjax.sweep(c, [f"optim.lr={c.optim.lr}"], say=said.append)[0].failed == "no space left"
    assert not (tmp_path / "run" / name / "outcome.json").exists()
    (tmp_path / "run" / name / "metrics.jsonl").write_text("")
    assert (
        ftjax.sweep(c, [f"optim.lr={c.optim.lr}"], say=said.append)[0].figures["val_loss"] == first.figures["val_loss"]
    )
    ran[:] = ran[:4]

    # Other rows in the same file: dealt into a folder of their own, and the old results are not returned.
    before = (tmp_path / "run/rows/train.jsonl").read_bytes()
    file, given = tmp_path / "train.jsonl", (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(given[1:] + given[1:2]))
    with pytest.raises(sweep.AnotherRun, match="the content of data.train has changed"):
        ftjax.sweep(c, grid, say=said.append)
    assert (tmp_path / "run/rows/train.jsonl").read_bytes() == before and len(ran) == 4
    assert any("has changed since these rows were written" in text for text in said)


def test_a_folder_of_runs_may_be_moved_and_be_older_than_a_field(tmp_path, monkeypatch):
    c = small(tmp_path)
    (first,) = ftjax.sweep(c, [f"optim.lr={c.optim.lr}"], say=lambda text: None)
    for name in ("run", "base", "train.jsonl"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    moved = tmp_path / "moved"
    c.run_dir, c.model.path, c.data.train = str(moved / "run"), str(moved / "base"), str(moved / "train.jsonl")
    outcome = moved / "run" / Path(first.run_dir).name / "outcome.json"
    record = json.loads(outcome.read_text())
    del record["asked"]["train.label_smoothing"]
    outcome.write_text(json.dumps(record))
    monkeypatch.delattr(sweep, "train")  # nothing is run again
    for more in ([], [f"tuning.rank={c.tuning.rank}"]):
        (again,) = ftjax.sweep(c, [f"optim.lr={c.optim.lr}", *more], say=lambda text: None)
        assert again.figures == first.figures
        assert Path(again.run_dir) == moved / "run" / Path(first.run_dir).name


def test_all_files_that_a_run_reads_are_part_of_what_it_is(tmp_path):
    c = small(tmp_path)
    (tmp_path / "set/data/deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "own.py", "general.txt", "set/data/v.jsonl", "set/data/deep/d.jsonl"):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "reward.py").write_text("from own import score")
    teacher = shutil.copytree(c.model.path, tmp_path / "teacher")
    c.data.update(validation=str(tmp_path / "set"), decontaminate=(f"{tmp_path}/set/data/**/d.jsonl",))
    c.data.update(train=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", test=f"{tmp_path}/[ab].jsonl")
    own = f"{tmp_path}/own.py:score"
    c.evaluate.update(metrics=("rouge_l", own), forgetting=str(tmp_path / "general.txt"))
    c.task.update(reference=str(teacher), rewards=("rouge_l", f"{tmp_path}/reward.py:score"))
    before = rows.contents(c)
    assert {key for key in before if "task.reference" not in key} == {
        f"content of {key}"
        for key in (
            "model.path", "data.train", "data.validation", "data.test", "data.decontaminate",
            f"evaluate.metrics {own}/own.py", "evaluate.forgetting/general.txt", "task.rewards[1]/reward.py",
            "task.rewards[1]/own.py",
        )
    }  # fmt: skip
    for name, changed in (
        ("b.jsonl", {"content of data.train", "content of data.test"}),
        ("own.py", {f"content of evaluate.metrics {own}/own.py", "content of task.rewards[1]/own.py"}),
        ("general.txt", {"content of evaluate.forgetting/general.txt"}),
        ("teacher/model.safetensors", {"content of task.reference/model.safetensors"}),
        ("set/data/v.jsonl", {"content of data.validation"}),
        ("set/data/deep/d.jsonl", {"content of data.validation", "content of data.decontaminate"}),
    ):
        (tmp_path / name).write_text("something else\n")
        assert {key for key, value in rows.contents(c).items() if value != before[key]} == changed
        before = rows.contents(c)


def test_a_run_that_may_not_be_read_is_not_run_again(tmp_path, bound_by_permissions):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "outcome.json").write_text(json.dumps({"asked": {"seed": name}}))
    (tmp_path / "a.claim").write_text("")
    assert [json.loads(asked)["seed"] for asked in sweep._known(tmp_path)] == ["a", "b"]
    assert sweep._known(tmp_path / "none") == {}
    (tmp_path / "a").chmod(0)
    with pytest.raises(PermissionError, match=str(tmp_path / "a")):
        sweep._known(tmp_path)
    (tmp_path / "a").chmod(0o755)
    (tmp_path / "a" / "outcome.json").write_text('{"asked": ')
    with pytest.raises(FtjaxError, match="a/outcome.json: "):
        sweep._known(tmp_path)


def test_points_are_drawn_from_lists_and_ranges():
    found = search.axes(["optim.lr=1e-5..1e-3:log", "tuning.rank=4..64", "optim.name=adamw,lion"], drawn=True)
    points = search.drawn(found, 300, seed=1)
    assert len(set(points)) == 300 and points[:20] == search.drawn(found, 20, seed=1)
    rates, ranks, names = (np.array([p[i].partition("=")[2] for p in points]) for i in range(3))
    assert abs(np.mean(rates.astype(float) < 1e-4) - 0.5) < 0.1 and 1e-5 <= rates.astype(float).min()
    assert {int(r) for r in ranks} <= set(range(4, 65)) and {*names} == {"adamw", "lion"}
    assert len(search.drawn(search.axes(["a=1,2"], drawn=True), 9, seed=0)) == 2
    for text, match in (("optim.lr=0..1:log", "above 0 for :log"), ("optim.lr=2..1", "low..high")):
        with pytest.raises(FtjaxError, match=match):
            search.axes([text], drawn=True)
    with pytest.raises(FtjaxError, match="add --random N to draw from it"):
        search.axes(["optim.lr=1e-5..1e-3"])
    assert [search.rungs(n) for n in (1, 2, 9, 10)] == [[1], [2, 1], [9, 3, 1], [10, 4, 2, 1]]


@pytest.mark.slow
def test_halving_goes_on_with_the_best_and_all_seeds_share_their_rows(tmp_path):
    c, said = small(tmp_path), []
    c.train.update(steps=9, eval_every=3)
    found = ftjax.sweep(c, ["optim.lr=1e-6,1e-2,3e-2"], seeds=2, say=said.append, halving=True)
    first, last = found[:6], found[6:]
    assert [o.settings["train.steps"] for o in found] == [3] * 6 + [9] * 2
    losses = {
        lr: np.mean([o.figures["val_loss"] for o in first if o.settings["optim.lr"] == lr]) for lr in (1e-6, 1e-2, 3e-2)
    }
    assert {o.settings["optim.lr"] for o in last} == {min(losses, key=losses.get)}
    assert any("rung 2 of 2: 1 point, train.steps=9, trained from the start" in text for text in said)
    runs = [json.loads((tmp_path / "run" / f"{name}/run.json").read_text()) for name in
            ("optim.lr=1e-2,train.steps=3,seed=0", "optim.lr=1e-2,train.steps=3,seed=1")]  # fmt: skip
    assert {run["config"]["data"]["test"] for run in runs} == {str(tmp_path / "run/rows/test.jsonl")}
    with pytest.raises(FtjaxError, match="--halving sets train.steps itself"):
        ftjax.sweep(c, ["train.steps=2,4"], say=said.append, halving=True)


def test_optuna_proposes_points_and_runs_none_twice(tmp_path):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    c = small(tmp_path)
    found = ftjax.sweep(c, ["optim.lr=1e-4..1e-1:log"], say=lambda text: None, optuna=3)
    assert len({o.settings["optim.lr"] for o in found}) == 3 and all(
        1e-4 <= o.settings["optim.lr"] <= 0.1 for o in found
    )


SWEEP = """
import sys
import ftjax
from ftjax import config
c = config.load(sys.argv[1])
ftjax.sweep(c, ["optim.lr=1e-3,1e-2"], seeds=2, say=lambda text: print(text, flush=True))
"""


@pytest.mark.slow
def test_two_processes_divide_the_runs(tmp_path, forks):
    c = small(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(c.to_dict()))
    said = [tmp_path / "said.0", tmp_path / "said.1"]
    both = [forks.start(tmp_path, text, [str(tmp_path / "c.json")], SWEEP) for text in said]
    codes, texts = [process.wait() for process in both], [text.read_text() for text in said]
    assert codes == [0, 0], texts
    ran = [line.split(": ")[1] for text in texts for line in text.splitlines() if line.startswith("---- run")]
    assert sorted(ran) == [f"optim.lr={lr},seed={seed}" for lr in ("1e-2", "1e-3") for seed in (0, 1)]
    assert len(json.loads((tmp_path / "run/sweep.json").read_text())) == 4
    assert not list((tmp_path / "run").glob("*.claim")) and not list((tmp_path / "run").glob("**/*.part"))


DIES = """
import os, sys
from pathlib import Path
from ftjax.training import claims
with claims.claimed(Path(sys.argv[1])) as mine:
    assert mine
    os._exit(0)
"""


def test_claims_are_of_one_and_are_taken_over_from_the_dead_and_the_silent(tmp_path, forks):
    path = tmp_path / "a.claim"
    with claims.claimed(path) as mine:
        assert mine and claims.owner(path).startswith(f"process {os.getpid()} of ")
        with claims.claimed(path) as second:
            assert not second
    assert not path.exists() and claims.owner(path) == "nobody"

    assert forks.run(tmp_path, [str(path)], program=DIES)[0] == 0
    assert path.exists()
    with claims.claimed(path) as mine:
        assert mine

    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with claims.claimed(path, stale=60) as mine:
        assert not mine
    os.utime(path, (time.time() - 61,) * 2)
    with claims.claimed(path, stale=60) as mine:
        assert mine
    assert not list(tmp_path.iterdir())

    with claims.claimed(path, stale=0.4) as mine:  # the owner lives, and says so
        time.sleep(0.8)
        with claims.claimed(path, stale=0.4) as second:
            assert mine and not second
