"""Runs on labelled rows, from files to files, on tiny random models: what PyTorch makes of the results."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_labelled import WORDS, config, make, rows, theirs, write

import ftjax
from ftjax import cli, user_code
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.evaluation.run import answer
from ftjax.training.check import check
from ftjax.training.job import prepared


@pytest.fixture
def encoder(tmp_path):
    return make(tmp_path / "bert", "bert")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_adapter_and_its_head_load_in_peft(kind, tmp_path):
    import peft
    import transformers

    base = make(tmp_path / "base", kind)
    c = config(tmp_path, base, export__formats='("adapter", "merged")')
    result = ftjax.train(c, say=lambda text: None)
    assert result.results["labels"] == ["bad", "good"]
    assert result.results["test"]["metrics"]["accuracy"]["value"] > 0.9
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    texts = [record["text"] for record in records]
    ours = np.array([[record["probabilities"][name] for name in ("bad", "good")] for record in records])

    pad = {"pad_token_id": 0}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **pad)
    adapter = tmp_path / "run" / "adapter"
    tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    np.testing.assert_allclose(theirs(tuned, adapter, texts), ours, atol=1e-4)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged").eval()
    assert whole.config.id2label == {0: "bad", 1: "good"}
    np.testing.assert_allclose(theirs(whole, adapter, texts), ours, atol=1e-4)
    # and back here, from the run, the adapter and the whole model
    test = str(tmp_path / "test.jsonl")
    for path in ("run", "run/adapter", "run/merged"):
        found = ftjax.predict(str(tmp_path / path), test)
        again = np.array([[row["probabilities"][name] for name in ("bad", "good")] for row in found])
        np.testing.assert_allclose(again, ours, atol=1e-4)
        report = ftjax.evaluate(str(tmp_path / path), test)
        assert report["metrics"]["accuracy"]["value"] == result.results["test"]["metrics"]["accuracy"]["value"]


def test_an_export_predicts_with_the_thresholds_of_its_run(encoder, tmp_path):
    """Also one that is written later, and a loaded model; another checkpoint than the judged one has no thresholds."""
    how = {"task__threshold": "mcc", "task__text": "said", "data__label": "verdict", "train__steps": 8}
    c = config(tmp_path, encoder, **how, train__eval_every=4, optim__lr=2e-3, export__formats='("adapter", "merged")')
    for path in (c.data.train, c.data.test):  # `text` and `label` are not the columns that the run reads
        found = [json.loads(line) for line in Path(path).read_text().splitlines()]
        write(Path(path), [row | {"said": row["text"], "verdict": row["label"], "text": "a"} for row in found])
    results = ftjax.train(c, say=lambda text: None).results
    (cut,), records = results["thresholds"], (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    want = [row["prediction"] for row in map(json.loads, records)]
    plain = [("bad", "good")[json.loads(row)["probabilities"]["good"] >= 0.5] for row in records]
    assert cut != 0.5 and plain != want  # so that a forgotten threshold shows
    ftjax.export(tmp_path / "run", tmp_path / "later", "merged")
    test = c.data.test
    for model in (tmp_path / "run", ftjax.load(tmp_path / "run"), tmp_path / "run/merged", tmp_path / "later"):
        assert [row["prediction"] for row in ftjax.predict(model, test)] == want
    report = ftjax.evaluate(tmp_path / "run/adapter", test)
    assert report["metrics"]["mcc"]["value"] == results["test"]["metrics"]["mcc"]["value"]
    with pytest.raises(FtjaxError, match="task.threshold: the model has no thresholds. A run chooses them at its end"):
        ftjax.predict(encoder_of(c, tmp_path), test)
    kept = tmp_path / "later" / "ftjax.json"
    whole = kept.read_text()
    kept.write_text(whole.replace(f"{cut}", f"{cut}, 0.5"))
    with pytest.raises(FtjaxError, match="has 2 thresholds .* its labels need 1"):
        ftjax.predict(str(tmp_path / "later"), test)
    kept.write_text(whole)
    kept.write_text(kept.read_text().replace(f"{cut}", '"x"'))
    with pytest.raises(FtjaxError, match="ftjax.json: .*thresholds"):
        ftjax.load(tmp_path / "later")


def encoder_of(c, tmp_path) -> str:
    """An export of a checkpoint that the run did not judge."""
    (tmp_path / "run" / "results.json").unlink()
    ftjax.export(tmp_path / "run", tmp_path / "other", "merged", checkpoint="last")
    return str(tmp_path / "other")


def test_an_adapter_made_by_peft_reads_the_pooler_of_its_base(encoder, tmp_path):
    """PEFT by default carries a BERT's classifier alone; a base that has no pooler either leaves nothing to read."""
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    made.save_pretrained(tmp_path / "adapter")
    texts = [row["text"] for row in rows(8, 5)]
    lm = ftjax.load(tmp_path / "adapter")
    found = ftjax.predict(lm, write(tmp_path / "asked.jsonl", [{"text": text} for text in texts]))
    ours = [[row["probabilities"][f"LABEL_{i}"] for i in range(2)] for row in found]
    np.testing.assert_allclose(theirs(made, encoder, texts), ours, atol=1e-4)
    with pytest.raises(FtjaxError, match="has a head over labels, which .* lacks; pass the adapter itself"):
        ftjax.load(encoder, adapters={"a": tmp_path / "adapter"})
    transformers.BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(encoder)
    with pytest.raises(FtjaxError, match=r"SEQ_CLS, but tensor .*pooler.dense.* of its head is missing"):
        ftjax.load(tmp_path / "adapter")


def test_a_classifier_of_other_labels_is_a_start(encoder, tmp_path):
    """For another number of labels its last map is new, and the run says so; PyTorch and ftjax read the result."""
    import peft
    import transformers

    def started(names, labels, **more):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            encoder, id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
        )
        model.save_pretrained(encoder)
        lines = []
        result = ftjax.train(config(tmp_path, encoder, task__labels=labels, **more), say=lines.append)
        return lines, result

    lines, result = started(["x", "y", "z"], '("bad", "good")', export__formats='("adapter", "merged")')
    new = "new, and trained whole: head/out (the model's own is for 3 labels, and the run has 2)"
    assert [line for line in lines if "head/out" in line] == [new]
    assert result.results["test"]["metrics"]["accuracy"]["value"] > 0.9
    texts = [row["text"] for row in rows(8, 5)]
    asked = write(tmp_path / "asked.jsonl", [{"text": text} for text in texts])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=2, ignore_mismatched_sizes=True
    )
    models = {
        "adapter": peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"),
        "merged": transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged"),
    }
    for name, model in models.items():
        found = ftjax.predict(str(tmp_path / "run" / name), asked)
        ours = [[row["probabilities"][label] for label in ("bad", "good")] for row in found]
        np.testing.assert_allclose(theirs(model.eval(), encoder, texts), ours, atol=1e-4)

    lines, _ = started(["z", "y"], '("bad", "good")', overwrite=True, train__steps=2)
    kept = "warning: the model's head has the labels z, y, and the run starts from it with bad, good in their places"
    assert kept in lines and not any("head/out" in line for line in lines)


@pytest.mark.parametrize("method", ["full", "head", "bitfit", "dora", "ia3", "last_layers"])
def test_every_method_trains_the_head_and_hands_it_over(method, encoder, tmp_path):
    import peft
    import transformers

    formats = '("full",)' if method == "full" else '("adapter", "full")'
    c = config(tmp_path, encoder, tuning__method=method, optim__lr=5e-3, export__formats=formats)
    result = ftjax.train(c, say=lambda text: None)
    # What a few trained numbers can make of random layers is little; what there is of it must come through.
    assert result.val_loss < 0.66
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    texts = [record["text"] for record in records]
    ours = np.array([[record["probabilities"][name] for name in ("bad", "good")] for record in records])
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "full").eval()
    np.testing.assert_allclose(theirs(whole, encoder, texts), ours, atol=1e-4)
    if method != "full":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter").eval()
        np.testing.assert_allclose(theirs(tuned, encoder, texts), ours, atol=1e-4)
        found = ftjax.predict(str(tmp_path / "run" / "adapter"), str(tmp_path / "test.jsonl"))
        again = np.array([[row["probabilities"][name] for name in ("bad", "good")] for row in found])
        np.testing.assert_allclose(again, ours, atol=1e-4)


def predicted(folder) -> tuple[list[str], np.ndarray]:
    """Texts, and probabilities (N, 2) of their labels, of a run's predictions."""
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [r["text"] for r in records], np.array([[r["probabilities"][n] for n in ("bad", "good")] for r in records])


@pytest.mark.parametrize(("method", "format"), [("full", "full"), ("lora", "merged")])
def test_a_head_on_means_loads_in_sentence_transformers(method, format, encoder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    c = config(tmp_path, encoder, tuning__method=method, task__pool="mean", optim__lr=5e-3)
    c.export.formats = (format,)
    c.data.packing = method == "lora"
    assert ftjax.train(c, say=lambda text: None).results["test"]["metrics"]["accuracy"]["value"] > 0.9
    texts, ours = predicted(tmp_path / "run")
    folder = tmp_path / "run" / format
    logits = st.SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    np.testing.assert_allclose(logits.softmax(-1).numpy(), ours, atol=1e-4)
    # and back here; who goes on from it goes on with its head
    for path in ("run", f"run/{format}"):
        found = ftjax.predict(str(tmp_path / path), str(tmp_path / "test.jsonl"))
        again = np.array([[row["probabilities"][name] for name in ("bad", "good")] for row in found])
        np.testing.assert_allclose(again, ours, atol=1e-4)
    c = config(tmp_path, folder, tuning__method="head", train__steps=1, optim__lr=1e-9)
    c.run_dir = str(tmp_path / "further")
    assert ftjax.train(c, say=lambda text: None).results["test"]["metrics"]["accuracy"]["value"] > 0.9
    assert (tmp_path / "further" / "full" / "3_Dense" / "model.safetensors").is_file()


def test_a_head_on_means_where_the_class_of_the_family_has_one(tmp_path):
    import transformers

    base = make(tmp_path / "base", "modernbert")
    c = config(tmp_path, base, task__pool="mean", tuning__method="full", optim__lr=5e-3)
    ftjax.train(c, say=lambda text: None)
    texts, ours = predicted(tmp_path / "run")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "full").eval()
    assert whole.config.classifier_pooling == "mean"
    np.testing.assert_allclose(theirs(whole, base, texts), ours, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "formats", "message"),
    [("llama", '("full",)', "task.pool: a llama model's head.*reads the last token"), ("bert", '("adapter",)', "full")],
)
def test_a_head_on_means_that_pytorch_could_not_load_is_refused(kind, formats, message, tmp_path):
    base = make(tmp_path / "base", kind)
    with pytest.raises(FtjaxError, match=message):
        ftjax.train(config(tmp_path, base, task__pool="mean", export__formats=formats), say=lambda text: None)


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_virtual_tokens_want_a_causal_model(method, encoder, tmp_path):
    with pytest.raises(FtjaxError, match=f"tuning.method: {method}.*needs a causal model.*Use lora"):
        ftjax.train(config(tmp_path, encoder, tuning__method=method), say=lambda text: None)


def test_what_cannot_be_used_is_told(encoder, tmp_path):
    def fails(match, **overrides):
        with pytest.raises(FtjaxError, match=match):
            ftjax.train(config(tmp_path, encoder, overwrite=True, **overrides), say=lambda text: None)

    fails("data.label: .*: no column 'lable' .*\"label\"", data__label="lable")
    fails("row [0-9]+: column 'label' holds .*expected one of no, yes", task__labels='("no", "yes")')
    fails("task.class_weights: expected 2 numbers", task__class_weights="(1.0, 2.0, 3.0)")
    fails("has no form for causal, preference, policy, gkd; it has those for classify, multi", task__kind="causal")
    fails("task.balanced: is of task.kind classify", task__kind="multilabel", task__balanced=True)
    fails(
        "task.text: none of the usual names is a column",
        data__train=write(tmp_path / "x.jsonl", [{"a": 1, "label": "x"}, {"a": 1, "label": "y"}] * 9),
    )


def test_rare_labels_drawn_as_often_and_weighed(encoder, tmp_path):
    c = config(tmp_path, encoder, task__balanced=True, task__threshold="f1")
    result = ftjax.train(c, say=lambda text: None)
    (cut,) = result.results["thresholds"]
    assert 0 <= cut <= 1 and result.results["validation"]["metrics"]["accuracy"]["value"] > 0.9
    c = config(tmp_path, encoder, task__class_weights='("balanced",)', overwrite=True, data__packing=True)
    assert ftjax.train(c, say=lambda text: None).results["test"]["metrics"]["accuracy"]["value"] > 0.9


def test_several_labels_and_numbers(encoder, tmp_path):
    def several(row):
        return [name for name in ("fine", "dull", "film") if name in row["text"]]

    found = [row | {"label": several(row), "score": row["text"].count("good")} for row in rows(300, 3)]
    full = {"tuning__method": "full", "optim__lr": 5e-3, "train__steps": 150}
    c = config(tmp_path, encoder, task__kind="multilabel", **full)
    c.data.update(train=write(tmp_path / "several.jsonl", found), test="")
    result = ftjax.train(c, say=lambda text: None)
    assert result.results["labels"] == ["dull", "film", "fine"]
    assert result.results["validation"]["metrics"]["f1_micro"]["value"] > 0.9
    assert ftjax.load(tmp_path / "run" / "full").kind == "multilabel"

    one = [row | {"label": several(row)[:1] and ["word"]} for row in rows(60, 3)]
    c = config(tmp_path, encoder, task__kind="multilabel", overwrite=True, **full | {"train__steps": 2})
    c.data.update(train=write(tmp_path / "one.jsonl", one), test="")
    shares = ftjax.train(c, say=lambda text: None).results["validation"]["metrics"]
    assert shares["subset_accuracy"]["value"] is not None

    numbered = [row | {"label": float(sum(row["text"].count(word) for word in WORDS["good"]))} for row in rows(300, 4)]
    c = config(tmp_path, encoder, task__kind="regress", overwrite=True, **full)
    c.data.update(train=write(tmp_path / "numbers.jsonl", numbered), test="")
    result = ftjax.train(c, say=lambda text: None)
    assert result.results["validation"]["metrics"]["pearson"]["value"] > 0.9


RECIPES = [
    {"data.clean.exact": True, "data.clean.parts": ("train", "validation", "test"), "data.clean.min_chars": 60},
    {"data.limit": 4, "data.split": (0.5, 0.25, 0.25), "data.stratify": "label", "data.group_near": 0.9},
    {"data.shots": 1, "data.decontaminate": ("test",), "data.clean.drop": ("fine",)},
    {"data.augment.copies": 2, "data.augment.ops": ("word_swap",), "data.augment.columns": ("text",)},
    {"data.mixture": ({"name": "a", "train": "missing.jsonl", "clean.near": 0.1}, {"name": "b", "train": "b.jsonl"})},
    {"data.long": "drop", "data.max_length": 8, "data.packing": True},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    c = config(folder, make(folder / "bert", "bert"), train__steps=2, export__formats="()")
    ftjax.train(c, say=lambda text: None)
    return folder / "run"


def test_the_record_of_a_run_reads_files_that_name_their_text_differently(encoder, tmp_path):
    c = config(tmp_path, encoder)
    other = [{"content": row["text"], "label": row["label"]} for row in rows(40, 1)]
    c.data.test = write(tmp_path / "test.jsonl", other)
    first = prepared(c, print)
    assert (first.config.task.text, first.config.data.label) == ("", "label")
    assert prepared(first.config, print).data.fingerprint == first.data.fingerprint


def changed(run, to, settings: dict):
    """A copy of a run folder whose config says something else, as if it had been trained so."""
    shutil.copytree(run, to)
    record = json.loads((to / "run.json").read_text())
    for key, value in settings.items():
        *groups, last = key.split(".")
        functools.reduce(dict.get, groups, record["config"])[last] = value
    (to / "run.json").write_text(json.dumps(record))
    return str(to)


def test_every_row_that_is_given_gets_an_answer_whatever_the_run_did_to_its_own(trained, tmp_path):
    texts = ["a fine film", "a fine film", "A FINE film!", "the dull film " * 9, "it was fine", "a dull film"]
    given = write(tmp_path / "given.jsonl", [{"text": text, "label": "good"} for text in texts])
    lm = ftjax.load(trained)
    for n, recipe in enumerate(RECIPES):
        c = configs.load(changed(trained, tmp_path / str(n), recipe) + "/run.json")
        found = ftjax.predict(lm, given, c, say=lambda text: None)
        assert [record["text"] for record in found] == texts, recipe
        assert [record["row"] for record in found] == [f"{given} row {i}" for i in range(1, 7)]
        assert ftjax.evaluate(lm, given, c, say=lambda text: None)["rows"] == 6, recipe


def test_given_rows_are_read_as_those_of_the_run_were(trained, tmp_path):
    both = {"sentence": "dull flat stale", "text": "a fine film", "label": "good"}  # `sentence` is the first usual name
    given = write(tmp_path / "given.jsonl", [both])
    (record,) = ftjax.predict(str(trained), given, say=lambda text: None)
    assert record["text"] == "a fine film"
    other = write(tmp_path / "other.jsonl", [{"sentence": "a fine film"}])
    with pytest.raises(FtjaxError, match="task.text: .*other.jsonl: no column 'text'; the columns are sentence"):
        ftjax.predict(str(trained), other)
    # The names came from the rows, so that a number is no id, unless that is said.
    ids = write(tmp_path / "ids.jsonl", [both | {"label": 1}, both | {"label": 0}])
    with pytest.raises(FtjaxError, match="row 1: .* holds 1; expected one of bad, good; .* set task.labels_as=ids"):
        ftjax.evaluate(str(trained), ids)
    named = write(tmp_path / "named.jsonl", [both, both | {"label": "bad"}])
    figures = [
        ftjax.evaluate(str(trained), rows, overrides=how, say=lambda text: None)["metrics"]
        for rows, how in ((ids, ["task.labels_as=ids"]), (named, []))
    ]
    assert figures[0] == figures[1]
    odd = write(tmp_path / "odd.jsonl", [both | {"label": 2}])
    with pytest.raises(FtjaxError, match="holds 2; expected one of bad, good, which are written by their ids, 0 to 1"):
        ftjax.evaluate(str(trained), odd, overrides=["task.labels_as=ids"])


def test_rows_that_are_cut_are_told_and_may_be_refused(trained, tmp_path):
    given = write(tmp_path / "given.jsonl", [{"text": "a fine film"}, {"text": "the dull film " * 9}])
    told = []
    assert len(ftjax.predict(str(trained), given, say=told.append)) == 2
    assert [line for line in told if "1 rows (50.0%) are longer than 16 tokens: cut at the end" in line]
    with pytest.raises(FtjaxError, match="given.jsonl row 2: 29 tokens, more than data.max_length=16"):
        ftjax.predict(str(trained), given, overrides=["data.long=raise"])


def test_a_model_of_labels_continues_no_text(trained, tmp_path):
    lm = ftjax.load(trained)
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "a film"}])
    for ask in (lambda: lm.generate(["a film"]), lambda: answer(lm, ["a film"]), lambda: answer(lm, [], asked)):
        with pytest.raises(FtjaxError, match="generate: this model is for task.kind classify, .*ftjax predict"):
            ask()


def test_code_that_a_run_folder_names_is_not_run(encoder, tmp_path):
    code = tmp_path / "code.py"
    code.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "def score(prediction, references, row):\n    return 1.0\ndef change(row, rng):\n    return row\n"
    )
    (tmp_path / "made").mkdir()
    c = config(tmp_path / "made", encoder, train__steps=2, export__formats="()")
    c.data.augment.update(function=f"{code}:change", copies=1, ops=())
    ftjax.train(c, say=lambda text: None)
    (tmp_path / "ran").unlink()
    run = changed(tmp_path / "made" / "run", tmp_path / "run", {"evaluate.metrics": (f"{code}:score", "rouge_l")})
    test, told = str(tmp_path / "test.jsonl"), []
    write(tmp_path / "test.jsonl", rows(4, 2))
    for ask in (ftjax.evaluate, ftjax.predict):
        ask(run, test, say=told.append)
    ftjax.evaluate(run, say=told.append)
    said = [line for line in told if "names functions that are not run" in line]
    assert len(said) == 3 and all(f"{code}:change" in line and f"{code}:score" in line for line in said)
    for verb in ("train", "sweep", "plan", "compare", "evaluate", "data"):
        options = {"evaluate": ["--model", run], "data": ["inspect"]}.get(verb, [])
        assert cli.main([verb, *options, "--config", f"{run}/run.json"]) == 2
    assert not check(run, told.append) and any(line.startswith("the rows: not compared: code that") for line in told)
    assert not (tmp_path / "ran").exists()
    # What the user names is run.
    override = f"data.augment.function={code}:change", f"evaluate.metrics={code}:score"
    assert configs.load(f"{run}/run.json", override).data.augment.function == f"{code}:change"
    told.clear()
    check(run, told.append, override)
    assert "the rows: ok" in told
    ftjax.evaluate(run, test, overrides=override, say=told.append)
    assert not [line for line in told if "not run" in line]


def test_code_in_an_entry_of_a_mixture_or_of_a_comparison_is_found():
    entries = [{"name": "a", "train": "a.jsonl", "augment.function": "a.py:f"}]
    contenders = ["zero-shot", {"name": "b", "data.augment.function": "b.py:f", "evaluate.metrics": ["c.py:f"]}]
    values = {"data": {"mixture": entries, "prompt": "a: b"}, "compare": {"contenders": contenders}}
    values |= {"train": {"select": "d.py:f"}, "stages": [{"name": "x", "train.select": "e.py:f"}]}
    assert [function for _, function in user_code.named(values)] == [f"{name}.py:f" for name in "abcde"]
