"""Prompts with examples and passages: what stands where, what is near, and what goes where there is no room."""

import numpy as np
import pytest

from ftjax import config as configs
from ftjax.data.template import Rendered
from ftjax.errors import FtjaxError
from ftjax.verdict import baselines
from ftjax.verdict.baselines import PROMPTS, Index, Library, compose, fitted, pieces

HOW = {"between": "\n\n", "context": "Context:\n{passages}\n\n"}


class Rows:
    """A part of the data, as far as a library looks at it."""

    def __init__(self, *texts):
        self.rows = [Rendered(f"Q: {q}\nA:", f" {a}") for q, a in texts]

    def each(self):
        return ((row, {}) for row in self.rows)


PART = Rows(
    ("red cats", "meow"), ("red cats", "purr"), ("two dogs run", "woof"), ("a bird", "tweet"), ("old fish", "blub")
)


def library(**fields):
    config = configs.default()
    config.compare.update(fields)
    return Library(config, PART)


def test_bm25_is_that_of_its_formula():
    texts = ["the cat sat", "the dog ran and the dog sat", "birds", "cats and cats and dogs"]
    words = [baselines.stems(text) for text in texts]
    mean, query = np.mean([len(w) for w in words]), ["cat", "dog"]
    expected = []
    for own in words:
        score = 0.0
        for word in query:
            df = sum(word in w for w in words)
            tf = own.count(word)
            idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
        expected.append(score)
    index = Index(texts)
    np.testing.assert_allclose(index.bm25.get_scores(query), expected, rtol=1e-5)
    assert index.nearest("Cats, DOGS!", 4) == np.argsort(-np.array(expected), kind="stable").tolist()
    assert index.nearest("nothing known", 2) == index.nearest("?!", 2) == [0, 1]
    with pytest.raises(FtjaxError, match="none of the 2 texts"):
        Index(["?", ""])


def test_passages_are_of_about_equal_length_and_hold_every_word():
    text = " ".join(map(str, range(25)))
    found = pieces([text, " ", "one two"], 10)
    assert [len(p.split()) for p in found] == [8, 9, 8, 2] and " ".join(found[:3]) == text


def test_examples_by_seed_are_the_same_for_all_questions_and_others_by_another_seed():
    shots = library().shots(PART.rows[:3], PROMPTS["few-shot"], 2, seed=1)
    assert shots[0] == shots[1] == shots[2] and len(shots[0]) == 2
    assert any(library().shots(PART.rows[:1], PROMPTS["few-shot"], 2, seed=s)[0] != shots[0] for s in (2, 3))
    assert library().shots(PART.rows[:1], PROMPTS["zero-shot"], 2, seed=1) == [[]]
    with pytest.raises(FtjaxError, match="only 4 rows with different questions"):
        library().shots(PART.rows, PROMPTS["few-shot"], 5, seed=0)


def test_near_examples_are_the_nearest_with_the_nearest_one_last():
    row = Rendered("Q: two dogs and a cat run\nA:", " ?")
    [shots] = library().shots([row], PROMPTS["few-shot-near"], 2, seed=0)
    assert [s.completion for s in shots] == [" meow", " woof"]


def test_passages_come_from_rows_by_their_words(tmp_path):
    (tmp_path / "facts.txt").write_text("Cats are animals that purr.\nParis is in France.\nDogs run in parks.\n")
    found = library(documents=str(tmp_path / "facts.txt"), passages=1)
    assert found.context(PART.rows[:1], PROMPTS["retrieval"]) == [["Cats are animals that purr."]]
    assert found.context(PART.rows[:1], PROMPTS["few-shot"]) == [[]]
    with pytest.raises(FtjaxError, match="compare.documents"):
        library().context(PART.rows[:1], PROMPTS["retrieval"])


def test_plain_text_stands_in_order():
    row, *shots = PART.rows[:3]
    found = compose(row, shots, ["one", "two"], **HOW)
    assert found.prompt == (
        "Context:\none\ntwo\n\nQ: red cats\nA: purr\n\nQ: two dogs run\nA: woof\n\nQ: red cats\nA:"
    )  # fmt: skip
    assert found.completion == " meow" and compose(row, **HOW) == row


def test_examples_of_a_conversation_are_earlier_turns():
    def chat(question, answer):
        turns = (("system", "Be brief."), ("user", question), ("assistant", answer))
        return Rendered(messages=tuple({"role": role, "content": text} for role, text in turns), template="chatml")

    found = compose(chat("Who?", "I."), [chat("Where?", "Here.")], ["a fact"], **HOW)
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Be brief."),
        ("user", "Where?"),
        ("assistant", "Here."),
        ("user", "Context:\na fact\n\nWho?"),
        ("assistant", "I."),
    ]
    assert found.template == "chatml"


def test_what_does_not_fit_loses_examples_from_the_left_and_then_passages(shared):
    from ftjax.hub.tokenizer import load_tokenizer

    words = load_tokenizer(shared / "tokenizers/gpt2")

    def length(shots, passages):
        return len(words(compose(PART.rows[0], shots, passages, **HOW).prompt)["input_ids"])

    shots, passages = PART.rows[2:4], ["one two three", "four five six"]
    limit = length(shots[1:], passages)
    found = fitted(PART.rows[:2], [shots, []], [passages, []], words, limit, **HOW)
    assert found.shortened == 1
    assert words.decode(found.ids[0]) == compose(PART.rows[0], shots[1:], passages, **HOW).prompt
    assert words.decode(found.ids[1]) == PART.rows[1].prompt
    [ids] = fitted(PART.rows[:1], [shots], [passages], words, length([], passages[:1]), **HOW).ids
    assert words.decode(ids) == compose(PART.rows[0], [], passages[:1], **HOW).prompt
    [ids] = fitted(PART.rows[:1], [shots], [passages], words, 1, **HOW).ids
    assert words.decode(ids) == PART.rows[0].prompt
