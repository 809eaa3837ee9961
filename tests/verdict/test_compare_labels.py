"""Contenders for labels: the commonest one, what is trained, and a run folder, judged on the same rows."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_labelled
from transformers import AutoConfig, AutoModelForSequenceClassification

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.verdict import contenders, cost, run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    c = tiny_labelled.config(folder, tiny_labelled.make(folder / "base", "bert"), tuning__method="head")
    c.train.update(steps=30, eval_every=30, log_every=5, batch_size=16)
    c.data.buckets = 1
    c.compare.seeds = 2
    c.compare.contenders = ("majority", {"name": "the head", "tuning.method": "head"})
    return c


def test_accuracy_is_that_of_the_runs_and_of_the_commonest_label(config, tmp_path):
    data = ftjax.compare(config, str(tmp_path), say=lambda text: None)
    majority, head = data["contenders"]
    rows = [json.loads(line) for line in Path(config.data.test).read_text().splitlines()]
    share = np.mean([row["label"] == "good" for row in rows])
    assert majority["figures"]["accuracy"]["value"] == pytest.approx(share) and share > 0.5
    results = [json.loads(Path(run, "results.json").read_text()) for run in head["runs"]]
    measured = [r["test"]["metrics"]["accuracy"]["value"] for r in results]
    assert len(measured) == 2 and head["figures"]["accuracy"]["value"] == pytest.approx(np.mean(measured))
    assert head["cost"]["trained"] > 0 and head["cost"]["train_flops"] > 0 and majority["cost"]["trained"] == 0
    assert head["cost"]["request_seconds"] > 0 and head["cost"]["request_flops"] > 0
    assert 0 < head["cost"]["train_seconds"] <= head["cost"]["run_seconds"]
    assert "head" in data["answer"] and (tmp_path / "verdict.html").stat().st_size > 10_000

    again = config.copy_and_resolve_references()
    again.compare.contenders = ("majority", {"name": "first", "model": head["runs"][0]})
    data = ftjax.compare(again, str(tmp_path / "again"), say=lambda text: None)
    assert data["contenders"][1]["figures"]["accuracy"]["value"] == pytest.approx(measured[0])
    lines = [json.loads(line) for line in (tmp_path / "again/answers.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [[row["label"]] for row in rows]
    assert [line["prompt"] for line in lines] == [row["text"] for row in rows]


def test_a_contender_that_fails_is_reported_and_the_others_go_on(config, tmp_path, monkeypatch):
    c = config.copy_and_resolve_references()
    c.compare.contenders = (*c.compare.contenders, {"name": "too large", "tuning.method": "lora"})
    real, stop = run.measure, RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def measure(contender, *args):
        if contender.name == "too large":
            raise stop
        return real(contender, *args)

    monkeypatch.setattr(run, "measure", measure)
    data = ftjax.compare(c, str(tmp_path), say=lambda text: None)
    assert [entry["name"] for entry in data["contenders"]] == ["majority", "the head"]
    [found] = [f for f in data["findings"] if f["check"] == "failed runs"]
    assert found["contender"] == "too large" and "RuntimeError: RESOURCE_EXHAUSTED" in found["seen"]
    assert "RESOURCE_EXHAUSTED" in (tmp_path / "verdict.html").read_text()
    c.compare.contenders = ("majority", c.compare.contenders[-1])
    with pytest.raises(FtjaxError, match="there is nothing to compare: too large: RuntimeError"):
        ftjax.compare(c, str(tmp_path), say=lambda text: None)
    stop = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ftjax.compare(c, str(tmp_path), say=lambda text: None)


def test_states_that_are_kept_are_paid_for_once(config):
    """30 steps of 16 rows are three epochs of 160 rows, each with one place that the head reads."""
    rows, again = (
        types.SimpleNamespace(length=np.full(160, 12), labels=np.ones(160)),
        config.copy_and_resolve_references(),
    )
    again.train.cache_features = False
    (_, kept), (_, three), (_, one) = (
        cost.training(c, 2, rows, n) for c, n in ((config, 30), (again, 30), (again, 10))
    )
    assert three == pytest.approx(3 * one) and one < kept < 1.5 * one


@pytest.mark.slow
def test_a_learning_curve_is_checked_on_all_rows(config, tmp_path):
    c, said = config.copy_and_resolve_references(), []
    c.compare.update(curve=(32, 64), curve_shots=(2, 6), curve_steps=10, curve_to=(1000,))
    c.train.update(steps=0, epochs=2.0)
    c.run_dir = str(tmp_path / "run")
    data = ftjax.compare(c, say=said.append)
    (curve,) = data["curves"]
    assert [p["amount"] for p in curve["points"]] == [4, 12, 32, 64, 160] and curve["failed"] == []
    assert all(len(p["values"]) == 2 for p in curve["points"])
    head = data["contenders"][1]
    assert np.mean(curve["points"][-1]["values"]) == pytest.approx(head["figures"]["accuracy"]["value"])
    check = curve["check"]
    assert check["measured"] == pytest.approx(head["figures"]["accuracy"]["value"])
    assert check["inside"] == (check["low"] <= check["measured"] <= check["high"]) and check["amount"] == 160
    folder = tmp_path / "run/the_head/curve"
    runs = {p.name: json.loads((p / "run.json").read_text()) for p in folder.iterdir() if p.is_dir()}
    assert set(runs) == {f"data.{a},seed={s}" for a in ("limit=32", "limit=64", "shots=2", "shots=6") for s in (0, 1)}
    # 2 epochs of 64 rows are 8 steps of 16 rows: ten at least.
    assert runs["data.limit=64,seed=0"]["config"]["train"]["steps"] == 10
    results = json.loads((folder / "data.limit=64,seed=1/results.json").read_text())["test"]["metrics"]
    assert results["accuracy"]["value"] == pytest.approx(curve["points"][3]["values"][1])
    # Asked once more as contenders are, which other rows would need.
    c.evaluate.compare_rows = 10**6
    again = ftjax.compare(c, str(tmp_path / "again"), say=lambda text: None)
    assert again["curves"][0]["points"] == [
        {"amount": p["amount"], "values": pytest.approx(p["values"])} for p in curve["points"]
    ]
    page, text = ((tmp_path / "run" / name).read_text() for name in ("verdict.html", "verdict.md"))
    assert "Of 160 rows the law of the smaller amounts says" in page and "## Learning curves" in text
    assert "With 1,000 rows: " in text and (tmp_path / "run/curve.png").stat().st_size > 10_000
    assert f"With more rows for the head: {curve['says']}." in data["detail"] and "twice the data" in curve["says"]


def test_a_model_with_other_labels_is_refused_before_anything_is_trained(config, tmp_path):
    def made(*names):
        shape = AutoConfig.from_pretrained(config.model.path, id2label=dict(enumerate(names)))
        model = AutoModelForSequenceClassification.from_config(shape)
        model.save_pretrained(folder := shutil.copytree(config.model.path, tmp_path / "-".join(names)))
        return str(folder)

    c = config.copy_and_resolve_references()
    c.run_dir, turned = str(tmp_path / "run"), made("good", "bad")
    rows = [json.loads(line) for line in Path(c.data.test).read_text().splitlines()]
    ids = [row | {"label": int(row["label"] == "good")} for row in rows]

    def refused(model, match):
        theirs = model if isinstance(model, dict) else {"name": "theirs", "model": model}
        c.compare.contenders = ({"name": "the head", "tuning.method": "head"}, theirs)
        with pytest.raises(FtjaxError, match=f"^compare.contenders: theirs: {match}"):
            ftjax.compare(c, say=lambda text: None)
        assert not (tmp_path / "run/the_head").exists()

    refused(made("yes", "no"), ".*train.jsonl row 1: .*'(good|bad)'")
    refused(str(tmp_path / "nowhere"), ".*nowhere: no such folder")
    c.data.test = c.data.train = tiny_labelled.write(tmp_path / "ids.jsonl", ids)
    c.task.update(labels=("bad", "good"), labels_as="ids")
    other = {"name": "theirs", "tuning.method": "head", "task.labels": ("good", "bad")}
    refused(other, ".*test.jsonl row 1: has the label 'good' by .* \\(bad, good\\), and 'bad' by .* \\(good, bad\\)")
    refused(other | {"task.kind": "regress", "task.labels": ()}, "task.kind: regress, and the comparison is of classif")
    refused(turned, ".*test.jsonl row 1: has the label 'good' by .* \\(bad, good\\), and 'bad' by .* \\(good, bad\\)")
    # Without the two tokens around a text, another tokenizer has room for more of the rows.
    plain = Path(made("bad", "good"), "tokenizer.json")
    plain.write_text(json.dumps(json.loads(plain.read_text()) | {"post_processor": None}))
    rows = [{"text": "it was " * (2 + i % 2), "label": label} for i, label in enumerate(["good", "bad"] * 8)]
    c.data.test = c.data.train = tiny_labelled.write(tmp_path / "rows.jsonl", rows + [rows[0] | {"label": "bad"}])
    c.data.update(long="drop", max_length=7, split=(1.0, 0.0, 0.0))
    c.task.labels_as = "names"
    refused(str(plain.parent), "data.long: drop leaves out other held-out rows")


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"curve": (10, 400)}, "data.limit=400 does not select fewer than the 160 training rows"),
        ({"curve": (10,), "curve_of": ("head",)}, 'did you mean "the head"'),
        ({"curve": (0, 5)}, "a whole number at least 1"),
        ({"curve": (10,), "contenders": ("majority", {"name": "few", "data.limit": 100})}, "'few' sets data.limit"),
    ],
)
def test_amounts_that_cannot_be_are_refused_before_anything_is_trained(config, tmp_path, fields, told):
    c = config.copy_and_resolve_references()
    c.run_dir = str(tmp_path / "run")
    c.compare.update(fields)
    with pytest.raises(FtjaxError) as error:
        ftjax.compare(c, say=lambda text: None)
    assert told in str(error.value) and not (tmp_path / "run/the_head").exists()


def test_prompts_and_other_tasks_are_refused(config):
    c = config.copy_and_resolve_references()
    c.compare.contenders = ("zero-shot", "majority")
    with pytest.raises(FtjaxError, match="'zero-shot' is a prompt, which needs task.kind causal") as error:
        contenders.parse(c)
    advice = str(error.value).partition("--config.")[2].replace('"', "")
    configs.override(c, [advice])
    assert [each.kind for each in contenders.parse(c)] == ["majority", "tuned"]
    c.task.kind = "tag"
    with pytest.raises(FtjaxError, match="task.kind tag; expected causal or classify, multilabel"):
        contenders.parse(c)
