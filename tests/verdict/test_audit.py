"""The membership attack against sklearn and scipy, and on runs that memorise their rows and that cannot."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import tiny_labelled
from scipy import stats
from sklearn import metrics

import ftjax
import ftjax.cli
from ftjax import config as configs
from ftjax.data.canaries import plant
from ftjax.data.read import read_table
from ftjax.errors import FtjaxError
from ftjax.pages import macros
from ftjax.training import privacy
from ftjax.training.job import prepared
from ftjax.training.run_folder import run_config
from ftjax.verdict.audit import attack, audit, drawn, least_epsilon, matched, one_run_epsilon, p_value

RNG = np.random.default_rng(0)


def test_figures_of_an_attack_are_those_of_sklearn_and_scipy():
    members, others = np.round(RNG.normal(0.4, 1, 300), 1), np.round(RNG.normal(size=200), 1)  # with ties
    found = attack(members, others, 0.95)
    truth, scores = np.repeat([1, 0], [300, 200]), np.concatenate([members, others])
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(truth, scores))
    fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    for rate in (0.01, 0.001):
        assert found[f"tpr_{rate}"] == tpr[fpr <= rate].max()
        low, high = stats.binomtest(round(found[f"tpr_{rate}"] * 300), 300).proportion_ci(0.95, "exact")
        assert (found[f"tpr_{rate}_low"], found[f"tpr_{rate}_high"]) == pytest.approx((low, high))
    inside = []
    for _ in range(400):  # the interval holds the true AUC as often as it says
        a = attack(RNG.normal(0.5, 1, 60), RNG.normal(size=80), 0.9)
        inside.append(a["low"] <= stats.norm.cdf(0.5 / math.sqrt(2)) <= a["high"])
    assert 0.85 < np.mean(inside) < 0.95


def test_the_bound_of_one_run_is_a_binomial_test_where_delta_is_0():
    for right, guesses in ((90, 100), (70, 100), (40, 40)):
        low = stats.binomtest(right, guesses, alternative="greater").proportion_ci(0.95, "exact").low
        assert p_value(200, guesses, right, math.log(low / (1 - low)), 0.0) == pytest.approx(0.05)
    assert p_value(1000, 100, 90, 1.0, 1e-5) > p_value(1000, 100, 90, 1.0, 0.0)


def test_bounds_keep_below_the_epsilon_of_randomised_response():
    """An answer that is right with probability e / (1 + e) is 1-private, and no attack may prove more than that."""
    proven = {"rows": [], "canaries": []}
    for _ in range(60):
        coins = RNG.random(400) < 0.5
        said = np.where(RNG.random(400) < math.e / (1 + math.e), coins, ~coins) + 1e-9 * RNG.random(400)
        proven["canaries"].append(one_run_epsilon(said[coins], said[~coins], 0.0))
        proven["rows"].append(least_epsilon(said[coins], said[~coins], 0.0))
    for found in proven.values():
        assert np.mean(np.array(found) > 1) <= 0.05 + 0.05
    assert np.median(proven["canaries"]) > 0.5
    assert one_run_epsilon(np.zeros(200), np.zeros(200), 0.0) == 0  # scores that tie prove nothing
    assert one_run_epsilon(np.ones(200), np.zeros(200), 0.0) > 4 and least_epsilon(np.ones(200), np.zeros(200), 0) > 3


def test_canaries_are_rows_of_random_words(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"red fox {i}"}], "label": "x", "n": i} for i in range(40)]
    table = read_table(tiny_labelled.write(tmp_path / "a.jsonl", rows), "data.train")
    joined, found = plant(table, 200, 3, ("label",))
    assert 70 < sum(c["planted"] for c in found) < 130
    assert [joined.row(i) for i in range(40)] == rows
    assert [joined.row(i) for i in range(40, len(joined))] == [c["row"] for c in found if c["planted"]]
    texts = [c["row"]["messages"][0]["content"].split() for c in found]
    words = {word for row in rows for word in row["messages"][0]["content"].split()}
    assert all(len(text) == 3 and words >= set(text) for text in texts) and len({*map(tuple, texts)}) > 150
    assert all(c["row"]["label"] == "x" and c["row"]["messages"][0]["role"] == "user" for c in found)
    assert plant(table, 200, 3, ("label",))[1] == found != plant(table, 200, 4, ("label",))[1]
    file = tmp_path / "a.parquet"  # whose lists have an Arrow type of their own
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for folder in (None, str(tmp_path)):
        again, same = plant(read_table(str(file)), 200, 3, ("label",), folder)
        assert same == found and list(again) == list(joined)
        assert again.place(50).removeprefix(str(file)) == joined.place(50).removeprefix(str(tmp_path / "a.jsonl"))


def test_the_canaries_alone_count_where_the_base_tells_the_sides_apart():
    won, lost = {"low": 0.8, "high": 0.9, "auc": 0.85}, {"low": 0.4, "high": 0.6, "auc": 0.5}
    report = {"base": won, "epsilon": {"computed": 2.0, "canaries": 0.1}, "succeeds": False}
    verdict = macros("audit.jinja").verdict
    assert "only the canaries count, because the base" in verdict(report, fair=False)
    assert verdict(report | {"succeeds": None}, fair=False).startswith("No verdict: the base")
    report = {"base": lost, "epsilon": {"computed": 2.0, "canaries": 2.1}, "succeeds": True}
    assert "The canaries refute the guarantee" in verdict(report, fair=True)


def test_a_task_without_a_loss_of_one_row_is_refused(monkeypatch):
    c = configs.default()
    c.task.kind = "embed"
    monkeypatch.setattr("ftjax.verdict.audit.run_config", lambda folder: c)
    monkeypatch.setattr("ftjax.verdict.audit.read_record", lambda folder: {})
    with pytest.raises(FtjaxError, match="task.kind embed has no loss of a single row, by which it could be attacked"):
        audit("there")
    c.task.kind, c.privacy.epsilon = "classify", 2.0
    with pytest.raises(FtjaxError, match="there is a private run that has not ended, so that its epsilon is not recor"):
        audit("there")
    c.data.augment.function = "made.py:rows"
    with pytest.raises(FtjaxError, match="there were made by code that only the run folder names, .*'made.py:rows'"):
        audit("there")
    with pytest.raises(FtjaxError, match="there is a private run"):
        audit("there", overrides=["data.augment.function=made.py:rows"])


def test_both_sides_of_a_mixture_have_its_sources_in_the_same_shares():
    inside, outside = np.repeat([0, 1, 2], [60, 20, 9]), np.repeat([0, 1, 3], [15, 30, 5])
    members, others = matched(inside, outside, 1000)
    assert np.bincount(inside[members]).tolist() == [60, 20] and np.bincount(outside[others]).tolist() == [15, 5]
    assert (np.diff(members) > 0).all() and (np.diff(others) > 0).all()
    assert [np.bincount(inside[side]).tolist() for side in matched(inside, outside, 8)[:1]] == [[6, 2]]
    assert [side.tolist() for side in matched(np.zeros(5, int), np.zeros(3, int), 3)] == [[0, 2, 4], [0, 1, 2]]
    assert [len(side) for side in matched(np.zeros(5, int), np.zeros(0, int), 3)] == [0, 0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_labelled.make(tmp_path_factory.mktemp("model"), "bert")


def run(folder, base, **more):
    """A run on texts of random words with random labels, which can only be learnt by heart."""
    rng = np.random.default_rng(5)
    words = ["a", "the", "film", "it", "was", "of", *(w for group in tiny_labelled.WORDS.values() for w in group)]
    c = tiny_labelled.config(folder, base, **more)
    texts = [{"text": " ".join(rng.choice(words, 10)), "label": str(rng.choice(["bad", "good"]))} for _ in range(160)]
    c.data.train, c.data.test = tiny_labelled.write(folder / "rows.jsonl", texts), ""
    c.data.split, c.data.canaries, c.tuning.method, c.seed = (0.5, 0.5, 0.0), 80, "full", 9
    c.train.update(steps=250, batch_size=40, eval_every=1000, save_every=250, dropout=0.0)
    c.export.checkpoint = "last"
    ftjax.train(c, say=lambda line: None)
    return c.run_dir


def test_the_attack_succeeds_on_a_run_that_memorises(tmp_path, base, capsys):
    folder = run(tmp_path, base, optim__lr=5e-3)
    assert ftjax.cli.main(["audit", folder]) == 0
    report = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert report["succeeds"] and report["attacks"]["loss"]["low"] > 0.6 and report["attacks"]["canaries"]["low"] > 0.55
    assert report["members"] == report["others"] == 80  # the canaries are not among the rows
    assert report["canaries"]["mean"] > 1.7 and report["epsilon"]["canaries"] > 0.2
    assert "The attack tells training rows from others. The run has no guarantee." in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "canaries.jsonl").read_text().splitlines()]
    assert len(rows) == 80 and sum(row["planted"] for row in rows) == report["canaries"]["planted"]
    # Had the run ended after one step, only the rows of this step would be members.
    c = run_config(folder)
    job = prepared(c, lambda line: None)
    first, second = (sorted(np.concatenate(job.batches.rows(step)).tolist()) for step in range(2))
    assert drawn(c, job.data, job.tokenizer, 1).tolist() == first
    assert drawn(c, job.data, job.tokenizer, 2, skipped=[{"step": 1}]).tolist() == second
    assert drawn(c, job.data, job.tokenizer, 3, skipped=[{"step": 3, "back_to": 1}]).tolist() == first
    # The file has the training rows too.
    again = audit(folder, c.data.train, say=lambda line: None)
    assert (again["members"], again["others"], again["shared"]) == (80, 80, 80)
    assert again["attacks"]["loss"] == pytest.approx(report["attacks"]["loss"])
    with pytest.raises(FtjaxError, match="no held-out rows that were not trained on too; name rows of the same source"):
        audit(folder, tiny_labelled.write(tmp_path / "few.jsonl", [job.data.train.row(0)]))
    with pytest.raises(FtjaxError, match="audit: .* has a checkpoint that was trained on no row of data.train"):
        drawn(c, job.data, job.tokenizer, 0)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows + '{"text": "film", "label": "good"}\n')
    with pytest.raises(FtjaxError, match="the rows that .* was trained on have changed"):
        audit(folder)


def test_the_attack_falls_to_chance_at_epsilon_2(tmp_path, base, monkeypatch):
    monkeypatch.setattr(privacy.os, "urandom", lambda count: bytes([7]) * count)  # the same draws each time
    folder = run(tmp_path, base, optim__lr=5e-3, privacy__epsilon=2.0, privacy__delta=1e-3)
    report = audit(folder, say=lambda line: None)
    assert not report["succeeds"] and all(a["low"] <= 0.5 <= a["high"] for a in report["attacks"].values())
    assert report["epsilon"]["canaries"] < report["epsilon"]["computed"] <= 2
    assert report["verdict"].endswith("Nothing contradicts the guarantee.")
    (tmp_path / "run/secret").unlink()
    with pytest.raises(FtjaxError, match="audit: .*secret is missing, from which the rows of each step follow"):
        audit(folder)
