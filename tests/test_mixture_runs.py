"""Runs of several tasks with one adapter: what a source of a mixture has for itself, and the scores of each task."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_labelled
import torch
import transformers
from tiny_labelled import WORDS, make, write

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.evaluation import run as answering
from ftjax.lm import LM
from ftjax.training import sharding
from ftjax.training.job import prepared
from ftjax.training.report import read_metrics
from ftjax.verdict import contenders, cost, measure
from ftjax.verdict import setting as verdict
from ftjax.verdict.baselines import PROMPTS

quiet = {"say": lambda text: None}
FACTOR = 3.0


def told(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"src": " ".join(rng.choice(WORDS["good"], 2)), "tgt": "it was " + rng.choice(WORDS["good"])}
            for _ in range(count)]  # fmt: skip


def films(count: int, seed: int) -> list[dict]:
    """Texts with the id of their label; the held-out rows of some seeds have its name."""
    found = tiny_labelled.rows(count, seed)
    return [row | {"label": ["bad", "good"].index(row["label"])} for row in found]


@pytest.fixture
def setting(tmp_path):
    """setting(name of the run, **overrides) -> a config of two tasks, texts and labels, for a tiny random model."""
    base = make(tmp_path / "llama", "llama")
    code = tmp_path / "mine.py"
    code.write_text("def score(prediction, references, row):\n    return float(prediction == 'fine')\n")
    files = {f"{name}_{part}": write(tmp_path / f"{name}_{part}.jsonl", rows(count, seed))
             for name, rows in (("told", told), ("films", films))
             for seed, (part, count) in enumerate((("train", 24), ("validation", 6), ("test", 10)))}  # fmt: skip

    def own(name):
        return {"name": name} | {part: files[f"{name}_{part}"] for part in ("train", "validation", "test")}

    def made(name="run", **overrides):
        c = tiny_labelled.config(tmp_path, base, **{"task__kind": "causal", "data__max_length": "24"} | overrides)
        c.run_dir = str(tmp_path / name)
        c.data.update(train="", validation="", test="", buckets=1)
        c.data.mixture = (
            own("told") | {"prompt": "{src}", "completion": " {tgt}", "evaluate.metrics": ("coverage",),
                           "evaluate.words": "src"},
            own("films") | {"prompt": "{text} it was", "completion": " {label}", "labels": ("dull", "fine"),
                            "loss_weight": FACTOR, "evaluate.metrics": ("exact_match", "f1_macro", f"{code}:score")},
        )  # fmt: skip
        c.train.update(steps=3, batch_size=8, log_every=1, eval_every=3)
        c.generate.max_new_tokens = 4
        return c

    return made


def log_probs(folder: Path, ids) -> np.ndarray:
    """(T - 1,) the log-probability that PyTorch gives to each token but the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        all_ = model(torch.tensor(np.asarray(ids))[None].long()).logits[0].log_softmax(-1)
    return all_[:-1].gather(1, torch.tensor(np.asarray(ids[1:])).long()[:, None])[:, 0].numpy()


@pytest.mark.slow
def test_the_weight_of_a_loss_does_not_depend_on_microbatches_and_devices(setting, tmp_path):
    found, make_mesh = {}, sharding.make_mesh
    cuts = {"one": {}, "two": {"train__accumulate": "2"}, "four": {"train__accumulate": "4"}}
    cuts |= {"devices": {"mesh__data": "2"}, "eight": {"mesh__data": "8"}}
    for name, cut in cuts.items():
        with pytest.MonkeyPatch.context() as patched:
            if name == "devices":  # two of the eight
                patched.setattr(sharding, "make_mesh", lambda c, devices=None: make_mesh(c, jax.devices()[:2]))
            c = setting(name, **cut)
            c.data.split = (1.0, 0.0, 0.0)  # no validation to compile
            c.data.mixture = [{k: v for k, v in entry.items() if k != "validation"} for entry in c.data.mixture]
            c.train.steps = 2
            ftjax.train(c, **quiet)
        rows = read_metrics(tmp_path / name)
        found[name] = [row[key] for row in rows for key in row if not key.startswith(("tokens", "seconds", "step"))]
        assert len(found[name]) > 2 * 3 and found[name] == pytest.approx(found["one"], rel=1e-5), name

    # The first loss is that of PyTorch: the mean over the trained tokens of all rows, each by the factor of its source.
    job = prepared(setting("again"), print)
    members = np.concatenate(job.batches.rows(0))
    total = weight = 0.0
    for i in members:
        example, factor = job.data.train.examples[int(i)], (1.0, FACTOR)[job.data.train.source[i]]
        total -= factor * log_probs(tmp_path / "llama", example.ids)[example.trained[1:]].sum()
        weight += factor * example.trained[1:].sum()
    assert len(set(job.data.train.source[members])) == 2
    assert read_metrics(tmp_path / "one")[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.slow
def test_every_task_is_scored_by_its_own_metrics(setting, tmp_path):
    c = setting(evaluate__compare="True", train__select="val_mean_loss")
    result = ftjax.train(c, **quiet)
    before, after = result.results["before"], result.results["after"]
    code = f"{tmp_path / 'mine.py'}:score"
    scores = ["coverage of told", "exact_match of films", "f1_macro of films", f"{code} of films"]
    assert list(before) == ["perplexity", "perplexity of told", "perplexity of films", *scores, "mean of tasks",
                            "worst of tasks"]  # fmt: skip
    for figures in (before, after):
        first = [figures["coverage of told"], figures["exact_match of films"]]
        assert figures["mean of tasks"] == np.mean(first) and figures["worst of tasks"] == min(first)

    # The answer to a text with a label is the one that PyTorch finds more probable, the token that ends it included.
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    ours = [sample for sample in samples if sample["source"] == "films"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    rows = [json.loads(line) for line in (tmp_path / "films_test.jsonl").read_text().splitlines()]
    assert len(ours) == len({row["text"] for row in rows}) > 5
    asked = {f"{row['text']} it was": row["label"] for row in rows}
    right = []
    for sample in ours:
        prompt = words(sample["prompt"])["input_ids"]
        both = [[*prompt, words.convert_tokens_to_ids(name), words.eos_token_id] for name in ("dull", "fine")]
        known = [log_probs(tmp_path / "llama", ids)[len(prompt) - 1 :].sum() for ids in both]
        assert sample["before"] == ("dull", "fine")[int(np.argmax(known))]
        assert sample["references"] == [("dull", "fine")[asked[sample["prompt"]]]]
        right.append(sample["before"] == sample["references"][0])
    assert before["exact_match of films"] == np.mean(right)

    (validated,) = (row for row in read_metrics(tmp_path / "run") if "val_loss" in row)
    losses = [validated[f"val_loss/{name}"] for name in ("told", "films")]
    assert {"val_accuracy/told", "val_accuracy/films"} <= validated.keys()
    assert validated["val_mean_loss"] == pytest.approx(np.mean(losses)) and validated["val_worst_loss"] == max(losses)
    assert result.best == validated["val_mean_loss"]

    # A command that does not name the user's function does not run it; the other scores are those of the run.
    said = []
    report = ftjax.evaluate(c.run_dir, generate=True, say=said.append)
    assert any("names functions that are not run" in line for line in said)
    assert f"{code} of films" not in report
    assert {name: report[name] for name in scores[:3]} == {name: after[name] for name in scores[:3]}
    # Rows that the command names are of no source.
    shown = ("prompt={text} it was", "completion= {label}", "labels=('dull', 'fine')")
    overrides = [*(f"data.{field}" for field in shown), "evaluate.metrics=exact_match"]
    report = ftjax.evaluate(
        c.run_dir, str(tmp_path / "films_test.jsonl"), overrides=overrides, generate=True, say=said.append
    )
    assert report["exact_match"] == after["exact_match of films"] and "coverage of told" not in report


def test_a_source_without_metrics_is_in_no_mean_and_an_unbounded_one_makes_it_undefined(setting, tmp_path, monkeypatch):
    from ftjax.evaluation import compare

    c = setting()
    part = (job := prepared(c, print)).data.test
    monkeypatch.setattr(compare, "answers", lambda lm, variables, part, config: (
        {name: 0.5 for name in config.evaluate.metrics}, []))  # fmt: skip
    told, films = c.data.mixture
    means = []
    for metrics in (("unsupported",), ("bleu",), ("length",), ()):
        c.data.mixture = told | {"evaluate.metrics": metrics}, films
        found, _ = compare.by_source(None, {}, part, c)
        means.append(found.get("mean of tasks", "none"))
    assert means == [0.5, (0.5 / 100 + 0.5) / 2, None, "none"]
    monkeypatch.setattr(compare, "max_tokens", lambda *shape: 4)
    i = int(np.flatnonzero(part.source)[0])
    prompt = list(part.prompts(job.tokenizer))[i].tolist()
    lm = SimpleNamespace(tokenizer=job.tokenizer, model=SimpleNamespace(config=None))
    with pytest.raises(
        FtjaxError, match="films_test.jsonl row 1: the prompt with an answer of data.labels has .* tokens"
    ):
        compare.ranked(lm, {}, part, [i], [prompt], c)
    assert compare.is_higher("mean of tasks") and not compare.is_higher("unsupported of a of b")
    assert compare.is_higher("length of a") is None
    code = tmp_path / "one of ours.py"
    code.write_text("def wrong(prediction, references, row):\n    return 1.0\n\n\nwrong.higher = False\n")
    assert compare.is_higher(f"{code}:wrong") is compare.is_higher(f"{code}:wrong of a: b of c") is False


def test_a_comparison_ranks_the_labels_that_an_evaluation_does(setting, tmp_path):
    """And the time of a request is that of ranking, although nothing is generated."""
    c = setting()
    _, one = c.data.mixture
    c.data.mixture = ()
    c.data.update({key: one[key] for key in ("train", "validation", "test", "prompt", "completion", "labels")})
    c.evaluate.metrics = ("exact_match",)
    found = verdict.setting(c, tmp_path)
    few = contenders.Contender("few-shot", "prompt", PROMPTS["few-shot"], 2)
    answers = {}
    for contender in (contenders.Contender("zero-shot", "prompt"), few):
        scores, answers[contender.name], spent, _ = measure.answer(contender, found, found.base, 0)
        assert set(answers[contender.name]) <= {"dull", "fine"} and spent["request_seconds"] > 0
        tokens = spent["prompt_tokens"] + spent["answer_tokens"]
        assert spent["request_flops"] == pytest.approx(2 * cost.forward_flops(found.base, tokens))
    known = ftjax.evaluate(found.base, c.data.test, c, generate=True, **quiet)
    assert answers["zero-shot"] == [sample["prediction"] for sample in known["samples"]]
    assert (scores["exact_match"] == [a in q.references for a, q in zip(answers["few-shot"], found.questions)]).all()


def test_a_prompt_for_a_mixture_is_written_as_all_its_sources_have_it(setting, tmp_path):
    c, file = setting(), write(tmp_path / "asked.jsonl", [{"src": "warm", "text": "warm"}])
    told, other = c.data.mixture
    (tmp_path / "run").mkdir()

    def rendered(**how):
        said = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(answering, "_config", lambda *args: c)
            patched.setattr(
                answering, "encode_prompts", lambda rows, *args, **how: said.extend(rows) or [np.zeros(1)] * len(rows)
            )
            patched.setattr(answering, "continued", lambda lm, variables, ids, **how: [""] * len(ids))
            answering.answer(LM(None, {}, {}, SimpleNamespace(batch_decode=list), tmp_path, ()), **how)
        return said

    with pytest.raises(FtjaxError, match="several values of data.prompt .told: '{src}'; films: '{text} it was'.; name"):
        rendered(file=file)
    assert [row.prompt for row in rendered(prompts=["it"], file=file, template="A {text}:")] == ["it", "A warm:"]
    c.data.mixture = told, other | {"prompt": "{src}"}
    assert rendered(file=file)[0].prompt == "warm"
    c.data.mixture = told | {"template": "chatml"}, other | {"template": "chatml"}
    assert rendered(prompts=["it"])[0].messages == ({"role": "user", "content": "it"},)
    c.data.system = "Answer."
    c.data.mixture = told | {"template": "chatml", "system": "Tell."}, other | {"template": "chatml"}
    assert rendered(prompts=["it"])[0].messages[0] == {"role": "system", "content": "Answer."}
    c.data.mixture = told | {"template": "chatml"}, other | {"template": "alpaca"}
    with pytest.raises(FtjaxError, match="several values of data.template .told: 'chatml'; films: 'alpaca'.; answer"):
        rendered(prompts=["it"], chat=True)


def test_what_sources_cannot_have_for_themselves_is_refused(setting, tmp_path):
    def refused(said, changed, **overrides):
        c = setting(**overrides)
        told, films = c.data.mixture
        with pytest.raises(FtjaxError, match=said):
            c.data.mixture = told, films | changed
            prepared(c, print)

    refused(
        r"several task kinds \(told: causal, films: classify\), and the model has one head", {"task.kind": "classify"}
    )
    refused("data.mixture entry 2: loss_weight: expected a number above 0; found 0", {"loss_weight": 0})
    refused("evaluate.rows: no such key", {"evaluate.rows": 4})
    refused("evaluate.metrics: unknown metric 'coverge'", {"evaluate.metrics": ("coverge",)})
    refused("data.labels: expected two or more names that differ", {"labels": ("dull", "dull")})
    own = [row | {"prompt_template": "{text}: {label}, it was"} for row in tiny_labelled.rows(4, 0)]
    shown = {"train": write(tmp_path / "shown.jsonl", own), "labels": ("bad", "good")}
    refused("shown.jsonl row 1: prompt_template names 'label', the column of data.labels", shown)
    refused("expected data.completion, and not data.prompt, to name the column", {"completion": " {text}"})
    refused("expected data.completion, and not data.prompt, to name the column", {"prompt": "{text} {label}"})
    c = setting(train__select="val_mean_loss")
    c.data.mixture = c.data.mixture[:1]
    with pytest.raises(FtjaxError, match="train.select: 'val_mean_loss' is no score of task.kind causal"):
        prepared(c, print)
    beyond = write(tmp_path / "beyond.jsonl", [{"text": "a film", "label": 2}])
    refused("beyond.jsonl row 1: column 'label' holds 2; expected one of data.labels", {"train": beyond})
    refused("has label in double braces, which write the name itself", {"completion": " {text} {{label}}"})
    refused("expected data.completion, and not data.prompt, to name the column", {"completion": " {text} {{kind}}"})
    # Ids 0 and 1 beside names 1 and 2: a 1 would be read as the first name.
    refused("holds 0; expected one of data.labels .1, 2. or, where no name is a number, the id", {"labels": ("1", "2")})
    refused("holds [01]; expected one of data.labels .-1.5, 2.0. or, where no", {"labels": ("-1.5", "2.0")})
    c = setting()
    c.data.mixture = c.data.mixture[0], c.data.mixture[1] | {"labels": ("1", "0"), "prompt": "{text} {{kind}}"}
    part = prepared(c, print).data.test
    i = int(np.flatnonzero(part.source)[0])
    assert part.rendered(i).prompt == f"{part.row(i)['text']} {{kind}}"
    assert part.rendered(i).completion == f" {part.row(i)['label']}"
    kto = {"task__kind": "preference", "task__loss": "kto"}
    c = setting(**kto)
    films = c.data.mixture[1] | {"labels": (), "label": "label"}
    c.data.mixture = films | {"name": "a", "loss_weight": 2.0}, films | {"name": "b"}
    with pytest.raises(FtjaxError, match="loss_weight is for task.kind causal, classify.* this one is preference"):
        prepared(c, print)
    with pytest.raises(FtjaxError, match="data.labels: expected none where task.kind is not causal or gkd"):
        configs.validate(configs.from_dict({"task.kind": "classify", "data.labels": ("a", "b")}))
