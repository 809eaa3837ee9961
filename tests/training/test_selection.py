"""The best checkpoint by any figure of a task, and what is found out before the first step."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_labelled

import ftjax
from ftjax import config as configs
from ftjax import tasks
from ftjax.errors import FtjaxError, NotFinite
from ftjax.evaluation.outputs import Asked
from ftjax.lm import open_base
from ftjax.training import job as jobs
from ftjax.training import loop, selection
from ftjax.training.report import Metrics, read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_task_runs import asked, tagged  # noqa: E402


def quiet(text):
    pass


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_labelled.make(tmp_path_factory.mktemp("bert"), "bert")


def validated(run, *names):
    return [[row[name] for name in ("step", *names)] for row in read_metrics(run) if "val_loss" in row]


def test_the_best_checkpoint_has_the_best_mcc_and_an_undefined_one_is_never_it(encoder, tmp_path, monkeypatch):
    from sklearn.metrics import matthews_corrcoef

    def run(name):
        c = tiny_labelled.config(
            tmp_path, encoder, train__steps=40, train__eval_every=5, train__select="mcc",
            optim__schedule="constant",
        )  # fmt: skip
        c.run_dir = str(tmp_path / name)
        c.export.formats = ()
        return c

    result = ftjax.train(run("whole"), say=quiet)
    history = validated(tmp_path / "whole", "val_mcc", "val_loss")
    undefined, defined = ([row for row in history if (row[1] is None) == none] for none in (True, False))
    assert undefined and defined  # at first the commoner label is all that is predicted
    best = max(defined, key=lambda row: (row[1], -row[0]))
    assert [result.best_step, result.best, result.val_loss] == best
    assert "NaN" not in (tmp_path / "whole" / "metrics.jsonl").read_text()

    # What is kept as the best is judged so by scikit-learn.
    found = ftjax.predict(str(tmp_path / "whole"), str(tmp_path / "train.jsonl"))
    labels = {row["text"]: row["label"] for row in tiny_labelled.rows(200, 5)}
    data = jobs.prepared(run("again"), quiet).data.validation
    held = {data.rendered(i).prompt for i in range(len(data))}
    pairs = [(labels[row["text"]], row["prediction"]) for row in found if row["text"] in held]
    assert matthews_corrcoef(*zip(*pairs, strict=True)) == pytest.approx(result.best, abs=1e-9)

    # Stopped behind a validation and started again, it ends in the same figures.
    write = Metrics.write

    def stop(self, step, values):
        write(self, step, values)
        if step >= 20 and "val_mcc" in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "write", stop)
        with pytest.raises(KeyboardInterrupt, match="the last checkpoint is that of step 15 of 40"):
            ftjax.train(run("stopped"), say=quiet)
    again = ftjax.train(run("stopped"), say=quiet)
    assert again.resumed_from == 15 and validated(tmp_path / "stopped", "val_mcc", "val_loss") == history
    assert (again.best_step, again.best) == (result.best_step, result.best)


def labelled(tmp_path, encoder, kind, rows, **settings):
    c = tiny_labelled.config(tmp_path, encoder, **{"task__kind": kind, "data__max_length": 24} | settings)
    c.data.update(train=tiny_labelled.write(tmp_path / "all.jsonl", rows), test="", split=(0.6, 0.2, 0.2))
    return c


def numbers(count):
    return [row | {"label": len(row["text"]) / 10} for row in tiny_labelled.rows(count, 0)]


def several(count):
    return [row | {"label": [row["label"], *(["film"] if "film" in row["text"] else [])]}
            for row in tiny_labelled.rows(count, 0)]  # fmt: skip


def pairs(count):
    return [{"text": row["text"], "pair": row["text"][::-1]} for row in tiny_labelled.rows(count, 0)]


@pytest.mark.parametrize(
    "kind, rows, name, higher",
    [
        ("regress", numbers(60), "pearson", True),
        ("regress", numbers(60), "mae", False),
        ("multilabel", several(60), "f1_macro", True),
        ("tag", tagged(60, 0), "token_accuracy", True),
        ("span", asked(60, 0), "f1", True),
        ("embed", pairs(60), "mean_rank", False),
    ],
)
def test_every_kind_of_task_selects_by_its_own_figures(kind, rows, name, higher, encoder, tmp_path):
    more = {"task__pair": "pair"} if kind == "embed" else {}
    job = jobs.prepared(labelled(tmp_path, encoder, kind, rows, train__select=name, **more), quiet)
    assert (job.selection.name, job.selection.higher) == (name, higher)
    lm, _ = open_base(encoder, config=job.config, task=(kind, job.config.task.labels))
    found = selection.measure(job.selection, job, lm.model, lm.variables, {})
    this, whole = (
        tasks.find(kind).judge,
        Asked(lm.model, lm.variables, job.tokenizer, job.data, job.data.validation, job.config),
    )
    report = this.report(whole, this.predict(whole), None, draws=2)
    assert found == report["metrics"][name]["value"] and found is not None
    broken = jax.tree.map(lambda x: x * np.nan, lm.variables)
    with pytest.raises(NotFinite, match="all.jsonl row .*: the model's output for this row is not finite"):
        selection.measure(job.selection, job, lm.model, broken, {})
    assert job.selection.rank(2.0) == (2.0 if higher else -2.0) and job.selection.rank(None) is None


@pytest.mark.parametrize("rows, most", [(3, 0), (0, 3)])
def test_a_row_of_several_windows_is_validated_with_all_of_them(rows, most, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "bounds", lambda config, held_out, trained: (1, most))
    settings = {"train__select": "f1", "data__max_length": 14, "task__stride": 4, "evaluate__rows": rows}
    job = jobs.prepared(labelled(tmp_path, encoder, "span", asked(60, 0), **settings), quiet)
    whole, part = job.data.validation, job.selection.part
    number = [whole.place(i) for i in range(len(whole))]
    distinct = list(dict.fromkeys(number))
    used = distinct[:3] if rows else [distinct[0], distinct[(len(distinct) - 1) // 2], distinct[-1]]
    assert [part.place(i) for i in range(len(part))] == [place for place in number if place in used]
    assert len(part) > 3 == len(used)
    lm, _ = open_base(encoder, config=job.config, task=("span", job.config.task.labels))
    assert selection.measure(job.selection, job, lm.model, lm.variables, {}) is not None


def refused(config, match):
    with pytest.raises(FtjaxError, match=match):
        jobs.prepared(config, quiet)


def test_what_cannot_be_judged_is_refused_before_the_first_step(encoder, tmp_path):
    three = [row | {"label": str(i % 3), "domain": "d"} for i, row in enumerate(tiny_labelled.rows(60, 0))]

    def config(rows=three, kind="classify", **settings):
        return labelled(tmp_path, encoder, kind, rows, **settings)

    refused(
        config(train__select="mccc"), r"train.select: 'mccc' is no score of task.kind classify \(did you mean \"mcc\""
    )
    refused(config(train__select="rouge_l"), "is no score of task.kind classify")
    refused(config(task__group="domian"), "task.group: no column 'domian' .*; the columns are text, label, domain")
    refused(config(task__threshold="f1"), "task.threshold: is for two labels or task.kind multilabel; there are 3")
    refused(config(kind="regress", rows=numbers(60), task__threshold="f1"), "task.kind regress has no thresholds")
    refused(
        config(evaluate__metrics='("mcc",)'),
        "evaluate.metrics: 'mcc' is not a metric of generated answers.*train.select",
    )
    refused(config(task__class_weights="(0, 0, 0)"), "give every row of train the weight 0")
    words = [
        {"tokens": row["tokens"], "tags": [tag[0].replace("B", "I") for tag in row["tags"]]} for row in tagged(60, 0)
    ]
    named = {"kind": "tag", "rows": words, "task__labels": '("O", "I")'}
    refused(config(**named), "expected tags of entities, such as O, B-PER and I-PER")
    for setting, match in (
        ({"task__threshold": "f1"}, "task.threshold: is chosen on validation rows, and there are none"),
        ({"train__select": "mcc"}, "train.select needs validation rows, and there are none"),
        ({"train__patience": 2}, "train.patience needs validation rows, and there are none"),
    ):
        c = config(**setting)
        c.data.split = (0.8, 0.0, 0.2)
        refused(c, match)


def causal(tmp_path, **settings):
    c = configs.default()
    c.run_dir = str(tmp_path / "run")
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=60, cache="")
    c.train.update(steps=4, batch_size=4, eval_every=2, log_every=1)
    c.generate.update(max_new_tokens=6, batch_size=4)
    c.evaluate.rows, c.log.tensorboard, c.export.formats, c.tuning.rank = 8, False, (), 4
    configs.override(c, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
    return c


def test_a_metric_of_generated_answers_selects_too(tmp_path):
    result = ftjax.train(causal(tmp_path, train__select="rouge_1"), say=quiet)
    history = validated(tmp_path / "run", "val_rouge_1")
    assert [step for step, _ in history] == [2, 4]
    assert [result.best_step, result.best] == max(history, key=lambda row: (row[1], -row[0]))
    # Settings of judging and generating make no other run, what selects does.
    (tmp_path / "run" / "merged").mkdir()
    (tmp_path / "run" / "merged" / "thesis.txt").write_text("years of work")
    with pytest.raises(FtjaxError, match="merged: holds files that no export of ftjax wrote"):
        ftjax.train(causal(tmp_path, train__select="rouge_1", export__formats='("merged",)'), say=quiet)
    more = {"generate__max_new_tokens": 5, "evaluate__samples": 1, "task__group": "src", "task__max_answer": 3}
    assert ftjax.train(causal(tmp_path, train__select="rouge_1", **more), say=quiet).resumed_from == 4
    with pytest.raises(FtjaxError, match="train.select was 'rouge_1', is 'rouge_2'"):
        ftjax.train(causal(tmp_path, train__select="rouge_2"), say=quiet)


@pytest.mark.parametrize(
    "kind, select, free, bound",
    [
        ("causal", "val_loss", ("generate.top_k", "evaluate.words", "evaluate.batch_size"), ("evaluate.rows",)),
        ("causal", "rouge_1", ("generate.batch_size",), ("generate.top_k", "evaluate.words", "evaluate.rows")),
        ("policy", "val_loss", ("task.threshold",), ("generate.max_new_tokens",)),
        ("classify", "accuracy", ("generate.top_k", "task.group"), ("task.threshold",)),
        ("span", "val_loss", ("task.max_answer",), ()),
        ("span", "f1", (), ("task.max_answer",)),
    ],
)
def test_what_a_score_depends_on(kind, select, free, bound):
    changed = {"evaluate.words": "src", "task.group": "src", "task.threshold": "mcc"}
    c = configs.from_dict({"task.kind": kind, "train.select": select})
    before = configs.flat(c)
    for key in (*free, *bound):
        now = configs.from_dict(before | {key: changed.get(key, 5)})
        if key in free:
            selection.check_same(now, before, "run")
        else:
            with pytest.raises(FtjaxError, match=f"run: {key} was .*, is .*Put the value back until the run has ended"):
                selection.check_same(now, before, "run")


def test_scores_that_are_measured_otherwise_are_not_compared(encoder, tmp_path, monkeypatch):
    """A run that goes on after step 2 of 4 keeps the best of all its validations."""

    def run(**settings):
        more = {"train__steps": 4, "train__eval_every": 2, "export__formats": "()"}
        return tiny_labelled.config(tmp_path, encoder, **more | settings)

    def save_and_stop(self, state, rank, save=loop.Training.save):
        save(self, state, rank)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(loop.Training, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt, match="step 2 of 4"):
            ftjax.train(run(), say=quiet)
    with pytest.raises(FtjaxError, match="evaluate.rows was 0, is 4"):
        ftjax.train(run(evaluate__rows=4), say=quiet)
    assert ftjax.train(run(), say=quiet).resumed_from == 2


def test_how_answers_are_made_is_checked_before_the_first_step(tmp_path):
    select = {"train__select": "rouge_l"}
    refused(
        causal(tmp_path, **select, generate__stop='("the end",)'), "stop: the tokenizer makes . tokens of 'the end'"
    )
    refused(
        causal(tmp_path, **select, generate__max_new_tokens=505), "prompt 1 has .* exceeds the model's 512 positions"
    )
    prompt = {"tuning__method": "prompt", "tuning__virtual_tokens": 200, "generate__max_new_tokens": 310}
    refused(causal(tmp_path, **select, **prompt), "exceeds the model's 312 positions")
    refused(
        causal(tmp_path, **select, generate__best_of=2), "generate.reward: expected the directory of a reward model"
    )
    refused(causal(tmp_path, **select, generate__temperature=1e-38), "generate.temperature: expected 0 .greedy., or")
    with pytest.raises(FtjaxError, match="generate.top_p: expected a number above 0"):
        causal(tmp_path, **select, generate__top_p=0)


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path):
    for warmup, expected in ((4, False), (5, True), (0.9, False)):
        said = []
        jobs.prepared(causal(tmp_path, optim__warmup=warmup), said.append)
        wanted = "optim.warmup=5 is more than the 4 steps of the run: the learning rate rises over all of them"
        assert any(line.startswith(wanted) for line in said) == expected, warmup


def test_what_a_metric_asks_for_is_known_before_the_first_step(tmp_path):
    refused(causal(tmp_path, train__select="coverage"), "evaluate.words: the metric coverage needs the column")
    refused(causal(tmp_path, train__select="number_match"), "number_match: the reference .* contains no number")
    refused(causal(tmp_path, train__select="length"), "length has no better direction")
    refused(causal(tmp_path, train__select="rouge"), 'did you mean "rouge_')
    refused(causal(tmp_path, evaluate__metrics='("rougel",)'), "evaluate.metrics: unknown metric 'rougel'")
    refused(
        causal(tmp_path, train__select="rouge_l", evaluate__rows=501, data__limit=0), "set evaluate.rows to at most 500"
    )


@pytest.mark.parametrize("steps, held, validations", [(100, 50, 10), (100, 100, 5), (100, 900, 4), (10, 900, 4)])
def test_validation_takes_a_fifth_of_the_training_at_most(steps, held, validations):
    """By counts of tokens alone, so that a run's validations depend on nothing but its config and rows."""

    class Held:
        class examples:
            length = np.full(held, 10)

        numbers = np.arange(held)

        def __len__(self):
            return held

    c = configs.default()
    trained = steps * 9 * 10.0  # a step of nine rows of ten tokens
    found, most = jobs.bounds(c, Held(), trained)
    assert found == validations
    assert found * (most or held) * 10 / 3 <= jobs.SHARE * trained or (found, most) == (jobs.FEWEST, jobs.LEAST_ROWS)
    c.evaluate.rows = 50
    assert jobs.bounds(c, Held(), trained) == (jobs.VALIDATIONS, 0)


def test_the_numbers_of_results_are_json(tmp_path):
    from ftjax.files import as_json, replace_json

    replace_json(
        tmp_path / "a.json", {"é": [float("nan"), -float("inf"), 1.5, (np.float64("nan"), 2)], "b": {"c": np.inf}}
    )
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"é": [None, None, 1.5, [None, 2]], "b": {"c": None}}
    assert as_json("ü") == '"ü"'
