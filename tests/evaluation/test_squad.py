"""Extractive answers against the official rules, on hand-made cases and on all of SQuAD's dev set."""

import collections
import json
import random
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_labelled import values

from ftjax.errors import FtjaxError
from ftjax.evaluation import squad as ours

# The referee: the steps of evaluate-v1.1.py and evaluate-v2.0.py, one by one.


def normalize_answer(s):
    s = s.lower()
    s = "".join(ch for ch in s if ch not in set(string.punctuation))
    s = re.sub(r"\b(a|an|the)\b", " ", s)
    return " ".join(s.split())


def official_f1(prediction, ground_truth, v2=False):
    prediction, truth = normalize_answer(prediction).split(), normalize_answer(ground_truth).split()
    same = sum((collections.Counter(prediction) & collections.Counter(truth)).values())
    if v2 and (len(prediction) == 0 or len(truth) == 0):
        return int(prediction == truth)
    if same == 0:
        return 0
    precision, recall = same / len(prediction), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def official_exact(prediction, ground_truth):
    return int(normalize_answer(prediction) == normalize_answer(ground_truth))


def official(answers, prediction, v2=False):
    """(exact match, F1) of one question."""
    if v2:
        answers = [a for a in answers if normalize_answer(a)] or [""]
    return max(official_exact(prediction, a) for a in answers), max(official_f1(prediction, a, v2) for a in answers)


def compare(answers, predictions, v2=False):
    rows = ours.answer_rows(answers, predictions, no_answer=v2)
    exact, f1 = np.array([official(a, p, v2) for a, p in zip(answers, predictions)]).T
    assert np.array_equal(rows["exact_match"], exact)
    assert rows["f1"] == pytest.approx(f1, abs=1e-15)
    found = values(len(answers), ours.answer_metrics(rows))
    assert (found["exact_match"], found["f1"]) == pytest.approx((exact.mean(), f1.mean()))
    if v2:
        has = np.array([bool(a) for a in answers])
        for name, x in (("exact_match_has_answer", exact[has]), ("f1_has_answer", f1[has]), ("no_answer", f1[~has])):
            assert found[name] == pytest.approx(x.mean() if len(x) else np.nan, nan_ok=True)
    return found


@pytest.mark.parametrize(
    "answer, prediction, exact, f1",
    [
        ("the Denver Broncos", "Denver Broncos!", 1, 1),
        ("Denver Broncos", "an Denver a Broncos the", 1, 1),
        ("theatre", "the atre", 0, 0),  # an article is a whole word
        ("the-end", "theend", 1, 1),  # punctuation goes before articles
        ("A.", "", 1, 0),  # no word left on either side: F1 0 by v1.1
        ("one two two", "two two three", 0, 2 / 3),  # words count as often as both have them
        ("", "something", 0, 0),
        ("café", "CAFÉ", 1, 1),
        ("café", "cafe", 0, 0),
        ("3–4", "34", 0, 0),  # a dash that is not ASCII stays
        ("3-4", "34", 1, 1),
        ("“quoted”", "quoted", 0, 0),
        ("two\u00a0words\t here\n", "two words here", 1, 1),  # white space of any kind
        ("İstanbul", "i̇stanbul", 1, 1),  # lower case of one letter is two
        ("the 北京 a", "北京", 1, 1),
        ("an_a", "ana", 1, 1),
        ("$1.5 million", "15 million", 1, 1),
        ("The The", "the", 1, 0),
    ],
)
def test_the_rule_on_cases_worked_out_by_hand(answer, prediction, exact, f1):
    rows = ours.answer_rows([[answer]], [prediction])
    assert (rows["exact_match"][0], rows["f1"][0]) == pytest.approx((exact, f1))
    assert official([answer], prediction) == pytest.approx((exact, f1))


def test_each_character_of_a_script_without_spaces_is_a_word():
    rows = ours.answer_rows([["the北京"], ["北京"]], ["北京", "北京"])
    # The official rule, which splits at spaces, gives the first an F1 of 0; "the" is no article within a word.
    assert rows["exact_match"].tolist() == [0, 1] and rows["f1"].tolist() == pytest.approx([0.8, 1])


def test_questions_without_an_answer():
    answers = [[], [], ["Paris"], ["Paris"], ["the"], ["A", "Paris"]]
    predictions = ["", "Paris", "", "Paris", "a", ""]
    found = compare(answers, predictions, v2=True)
    assert found == {
        "exact_match": pytest.approx(3 / 6),
        "f1": pytest.approx(3 / 6),
        "exact_match_has_answer": pytest.approx(2 / 4),
        "f1_has_answer": pytest.approx(2 / 4),
        "no_answer": 0.5,
    }
    with pytest.raises(FtjaxError, match="row 1: the question has no reference answer.*no_answer=True"):
        ours.answer_rows(answers, predictions)
    with pytest.raises(FtjaxError, match="expected an answer for each question; found 1 for 6"):
        ours.answer_rows(answers, [""])


TEXTS = st.lists(
    st.sampled_from(["the", "A", "an", "Ünï", "x", "X", "y.", "-", "…", "", " ", "\u2003", "a-n", "the's", "42", "İ"]),
    max_size=5,
).map(lambda parts: " ".join(parts)) | st.text(max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(TEXTS, max_size=3), TEXTS), min_size=1, max_size=4))
def test_both_rules_on_random_texts(questions):
    answers, predictions = zip(*questions)
    compare(answers, predictions, v2=True)
    if all(answers):
        compare(answers, predictions)


def constructed(rng, answers, context):
    """A prediction made from an answer, or from the context, in one of the ways in which models and rules go astray."""
    answer = rng.choice(answers)
    words, start = answer.split(), rng.randrange(len(context.split()))
    ways = (
        lambda: answer,
        lambda: "",
        lambda: f"the {answer}",
        lambda: f"{rng.choice(['A', 'an', 'The'])} {answer}.",
        lambda: answer.upper(),
        lambda: f'"{answer}",',
        lambda: f"\u201c{answer}\u201d",
        lambda: answer.replace(" ", "\u00a0"),
        lambda: answer.replace("-", "\u2013"),
        lambda: "".join(ch for ch in answer if ch not in string.punctuation),
        lambda: " ".join(words[: max(1, len(words) // 2)]),
        lambda: " ".join(reversed(words)),
        lambda: f"{answer} {answer}",
        lambda: " ".join(context.split()[start : start + 5]),
        lambda: rng.choice(["the", ".", "\u00e9", "北京"]),
    )
    return rng.choice(ways)()


def test_both_rules_on_all_of_dev(shared):
    data = json.loads((shared / "data/squad/dev-v1.1.json").read_text(encoding="utf-8"))["data"]
    asked = [
        ([answer["text"] for answer in question["answers"]], paragraph["context"])
        for article in data
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    answers, rng = [a for a, _ in asked], random.Random(0)
    assert len(answers) == 10_570
    predictions = [constructed(rng, *question) for question in asked]
    found = compare(answers, predictions)
    assert 0.4 < found["exact_match"] < 0.7 and found["exact_match"] < found["f1"] < 0.85
    # v2.0's rule, every fourth question having no answer
    without = [[] if i % 4 == 0 else a for i, a in enumerate(answers)]
    assert 0.02 < compare(without, predictions, v2=True)["no_answer"] < 0.2
