"""Log-likelihoods, multiple choice and perplexity against lm-evaluation-harness, and against logits summed by hand."""

import json
import math

import numpy as np
import pytest
from scipy.special import log_softmax

from ftjax.errors import FtjaxError
from ftjax.loading import load
from ftjax.verdict import choices as mc

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high. "
)
QUESTIONS = [
    "Lily and Tom went to the",
    "She was very",
    "One day, a boy named Tim",
    STORY * 12 + "She",
    "The dog said,",
]
CHOICES = [
    ["park", "computational park", "p", "moon of Jupiter"],
    ["happy.", "sad and tired.", "é.", "zebra"],
    ["went to the park with his mom.", "is", "ate ate ate ate"],
    ["played with the ball.", "high ball"],
    ['"Woof!"', "it is — naïvely — warm"],
]
RIGHT = [0, 1, 0, 0, 1]
TEXTS = [STORY * 14, " A short one.\nOf two lines. ", "é", STORY]


@pytest.fixture(scope="module")
def lm():
    return load("builtin:stories260K")


@pytest.fixture(scope="module")
def harness(tmp_path_factory, lm):
    """What lm-evaluation-harness makes of the same rows as two tasks of its own, on local files alone."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": q, "cs": c, "at": r} for q, c, r in zip(QUESTIONS, CHOICES, RIGHT)]
    (folder / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"page": t}) + "\n" for t in TEXTS))
    for name, fields in {
        "mc": {
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "cs", "doc_to_target": "at",
            "metric_list": [{"metric": m} for m in mc.LENGTHS],
        },
        "texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }.items():  # fmt: skip
        task = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, **fields,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    results = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(lm.folder), "dtype": "float32"}, tasks=["mc", "texts"], device="cpu",
        batch_size=4, bootstrap_iters=0, task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    return results


def test_multiple_choice_is_the_harnesss(lm, harness):
    logs = mc.choose(lm, QUESTIONS, CHOICES, batch_size=3)
    for ours, sample in zip(logs, harness["samples"]["mc"], strict=True):
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert ours == pytest.approx(theirs, abs=1e-4)
    found = mc.accuracies(logs, CHOICES, RIGHT)
    for name in mc.LENGTHS:
        assert found[name].mean() == pytest.approx(harness["results"]["mc"][f"{name},none"])
        assert found[name].tolist() == [sample[name] for sample in harness["samples"]["mc"]]
    assert len({tuple(scores) for scores in found.values()}) > 1  # the rows tell the rules apart


def test_whether_a_choice_is_greedy_is_the_harnesss(lm, harness):
    pairs = [mc.encode_pair(lm.tokenizer, q, " " + c) for q, cs in zip(QUESTIONS, CHOICES) for c in cs]
    theirs = [str(answer[1]) == "True" for s in harness["samples"]["mc"] for answer in s["filtered_resps"]]
    assert [told.greedy for told in mc.log_likelihoods(lm, pairs)] == theirs


def test_perplexities_are_the_harnesss(lm, harness):
    rolled = mc.roll(lm, TEXTS, batch_size=2)
    theirs = [float(sample["filtered_resps"][0]) for sample in harness["samples"]["texts"]]
    assert rolled.tokens[0] > lm.max_tokens  # in windows
    assert rolled.log == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    figures = rolled.perplexities()
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(harness["results"]["texts"][f"{name},none"], rel=1e-4)
    assert figures["token_perplexity"] == pytest.approx(math.exp(-rolled.log.sum() / rolled.tokens.sum()))


def test_a_pair_is_scored_by_the_logits_where_it_stands(lm):
    pairs = [([1, 400, 30], [17, 5]), ([1], [403]), ([1, 7], [int(lm.logits([[1, 7]])[0, -1].argmax())])]
    told = mc.log_likelihoods(lm, pairs, batch_size=2)
    for (given, scored), found in zip(pairs, told, strict=True):
        logs = log_softmax(lm.logits([given + scored])[0].astype(np.float64), axis=-1)
        at = np.arange(len(given), len(given) + len(scored))
        assert found.log == pytest.approx(logs[at - 1, scored].sum(), abs=1e-4)
        assert found.greedy == (logs[at - 1].argmax(-1) == scored).all() and found.tokens == len(scored)
    assert told[2].greedy and not told[0].greedy
    assert mc.log_likelihoods(lm, []) == []


def test_windows_score_each_token_once_behind_as_much_as_there_is_room_for():
    assert mc.windows([5, 6, 7, 8, 9, 10, 11], 1, 3) == [([1], [5, 6, 7]), ([7], [8, 9, 10]), ([8, 9, 10], [11])]
    assert mc.windows([5, 6, 7], 1, 3) == [([1], [5, 6, 7])] and mc.windows([], 1, 3) == []


def test_a_pair_is_encoded_as_one_text(lm):
    given, scored = mc.encode_pair(lm.tokenizer, "One day ", "the dog")
    assert lm.tokenizer.decode(given, skip_special_tokens=True) == "One day"
    assert given + scored == lm.tokenizer("One day the dog")["input_ids"]
    assert mc.encode_pair(lm.tokenizer, "", "the")[0] == [lm.tokenizer.bos_token_id]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda lm: mc.choose(lm, ["a", "b"], [["x"], ["y", ""]]),
            "question 2: expected at least one choice, and no empty choice",
        ),
        (lambda lm: mc.accuracies([np.zeros(2)], [["x", "y"]], [2]), "question 1: the index of the right choice is 2"),
        (
            lambda lm: mc.log_likelihoods(lm, [([1], [5]), ([1], [5] * 600)]),
            "text 2: 1 context tokens and 600 tokens to score",
        ),
        (lambda lm: mc.log_likelihoods(lm, [([], [5])]), "text 1: 0 context tokens"),
    ],
)
def test_bad_input_is_named(lm, call, message):
    with pytest.raises(FtjaxError, match=message):
        call(lm)
