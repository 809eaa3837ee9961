"""Contenders for labels: the commonest one, what is trained, and a run folder, judged on the same rows."""

import json

import numpy as np
import pytest
import tiny_labelled

import ftjax
from ftjax.errors import FtjaxError
from ftjax.verdict import contenders


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
    rows = [json.loads(line) for line in open(config.data.test)]
    share = np.mean([row["label"] == "good" for row in rows])
    assert majority["figures"]["accuracy"]["value"] == pytest.approx(share) and share > 0.5
    results = [json.loads(open(f"{run}/results.json").read()) for run in head["runs"]]
    measured = [r["test"]["metrics"]["accuracy"]["value"] for r in results]
    assert len(measured) == 2 and head["figures"]["accuracy"]["value"] == pytest.approx(np.mean(measured))
    assert head["cost"]["trained"] > 0 and head["cost"]["train_flops"] > 0 and majority["cost"]["trained"] == 0
    assert "head" in data["answer"] and (tmp_path / "verdict.html").stat().st_size > 10_000

    again = config.copy_and_resolve_references()
    again.compare.contenders = ("majority", {"name": "first", "model": head["runs"][0]})
    data = ftjax.compare(again, str(tmp_path / "again"), say=lambda text: None)
    assert data["contenders"][1]["figures"]["accuracy"]["value"] == pytest.approx(measured[0])
    lines = [json.loads(line) for line in (tmp_path / "again/answers.jsonl").read_text().splitlines()]
    assert [line["references"] for line in lines] == [[row["label"]] for row in rows]
    assert [line["prompt"] for line in lines] == [row["text"] for row in rows]


def test_prompts_and_other_tasks_are_refused(config):
    c = config.copy_and_resolve_references()
    c.compare.contenders = ("zero-shot", "majority")
    with pytest.raises(FtjaxError, match="'zero-shot' asks by a prompt, which is for task.kind causal"):
        contenders.parse(c)
    c.task.kind = "tag"
    with pytest.raises(FtjaxError, match="task.kind tag; expected causal or classify, multilabel"):
        contenders.parse(c)
