"""Prompts for a model that was not trained on a task: with examples before a question, with passages of documents."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax import assets
from ftjax.data.read import read_table
from ftjax.data.similar import row_text
from ftjax.data.template import Rendered, question
from ftjax.data.tokenise import encode_prompts
from ftjax.errors import FtjaxError


class Prompting(NamedTuple):
    """What stands before a question."""

    shots: bool = False  # examples of the training part
    near: bool = False  # the nearest ones to the question; else the same for all questions, drawn by the seed
    passages: bool = False  # of compare.documents


PROMPTS = {
    "zero-shot": Prompting(),
    "few-shot": Prompting(shots=True),
    "few-shot-near": Prompting(shots=True, near=True),
    "retrieval": Prompting(passages=True),
    "retrieval-few-shot": Prompting(shots=True, passages=True),
    "retrieval-few-shot-near": Prompting(shots=True, near=True, passages=True),
}


# ---------------------------------------------------------------------------------------------- what is near


@functools.lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def stems(text: str) -> list[str]:
    """The English stems (Porter 1980) of its words, in lower case."""
    return [_stem(word) for word in re.findall(r"[^\W_]+", text.lower())]


class Index:
    """Texts found by BM25 over their `stems`, in the form that Lucene has, by `bm25s`: the one of Python's BM25
    libraries that is kept up, and of numpy alone."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells every step
        words = [stems(text) for text in texts]
        if not any(words):
            raise FtjaxError(f"BM25: none of the {len(words)} texts to be searched holds a word")
        self.bm25 = bm25s.BM25(method="lucene")
        self.bm25.index(words, show_progress=False)
        self.size = len(words)

    def nearest(self, text: str, k: int) -> list[int]:
        """Places of the k texts of highest score, highest first; of equal ones the earlier first."""
        words = stems(text)
        scores = self.bm25.get_scores(words) if words else np.zeros(self.size)
        return np.argsort(-scores, kind="stable")[:k].tolist()


def pieces(texts: Sequence[str], words: int) -> list[str]:
    """Texts cut into passages of at most so many words (white space divides them), of about equal length each; none is
    empty."""
    out = []
    for text in texts:
        own = text.split()
        count = -(-len(own) // words)
        borders = [round(k * len(own) / count) for k in range(count + 1)] if count else []
        out += [" ".join(own[a:b]) for a, b in zip(borders, borders[1:])]
    return out


class Library:
    """What prompts are made of: examples of a part of the data, and passages of documents; read when first needed."""

    def __init__(self, config, part):
        self.config, self.part = config.compare, part

    @functools.cached_property
    def examples(self) -> list[Rendered]:
        """The first row of each question."""
        found: dict[str, Rendered] = {}
        for rendered, _ in self.part.each():
            found.setdefault(question(rendered), rendered)
        return list(found.values())

    @functools.cached_property
    def by_question(self) -> Index:
        return Index([question(example) for example in self.examples])

    @functools.cached_property
    def passages(self) -> list[str]:
        source = self.config.documents
        if not source:
            raise FtjaxError("compare.documents: `retrieval` needs rows or a folder of text files to find passages in")
        table = read_table(assets.resolve(source), "compare.documents")
        texts = (row_text(row) for _, rows in table.chunks() for row in rows)
        return pieces(list(texts), self.config.passage_words)

    @functools.cached_property
    def by_passage(self) -> Index:
        return Index(self.passages)

    def shots(self, rows: Sequence[Rendered], how: Prompting, k: int, seed: int) -> list[list[Rendered]]:
        """The k examples of each row. The nearest one stands next to the question (Liu et al. 2022, "What makes good
        in-context examples for GPT-3?")."""
        if not how.shots or not k:
            return [[] for _ in rows]
        if k > len(self.examples):
            raise FtjaxError(f"compare.shots: {k}, and train has {len(self.examples)} rows that ask different things")
        if len({shot.messages is None for shot in [*self.examples, *rows]}) > 1:
            raise FtjaxError("compare: some rows are plain text and some are conversations; no example fits them all")
        if how.near:
            return [[self.examples[i] for i in self.by_question.nearest(question(row), k)[::-1]] for row in rows]
        drawn = np.random.default_rng(seed).choice(len(self.examples), k, replace=False)
        return [[self.examples[i] for i in drawn] for _ in rows]

    def context(self, rows: Sequence[Rendered], how: Prompting) -> list[list[str]]:
        """The passages of each row, the nearest first."""
        if not how.passages:
            return [[] for _ in rows]
        found = self.by_passage
        return [[self.passages[i] for i in found.nearest(question(row), self.config.passages)] for row in rows]


# ---------------------------------------------------------------------------------------------- prompts


def compose(
    row: Rendered, shots: Sequence[Rendered] = (), passages: Sequence[str] = (), *, between: str, context: str
) -> Rendered:
    """A row with examples and passages before its question.

    Plain text: the passages, then each example with `between` behind it, then the question. Conversations: examples
    are earlier turns, and the passages begin the user's last message. context: text with `{passages}`.
    """
    before = context.replace("{passages}", "\n".join(passages)) if passages else ""
    if row.messages is None:
        text = "".join(shot.prompt + shot.completion + between for shot in shots)
        return Rendered(before + text + row.prompt, row.completion)
    system = [m for m in row.messages if m["role"] in SYSTEM]
    own = [m for m in row.messages if m["role"] not in SYSTEM]
    earlier = [m for shot in shots for m in shot.messages if m["role"] not in SYSTEM]
    last = max((k for k, m in enumerate(own) if m["role"] == "user"), default=None)
    if before and last is not None:
        own[last] = own[last] | {"content": before + own[last]["content"]}
    return dataclasses.replace(row, messages=(*system, *earlier, *own))


SYSTEM = ("system", "developer")  # roles whose text holds for a whole conversation


class Prompts(NamedTuple):
    """What contenders are asked."""

    ids: list[list[int]]
    shortened: int  # prompts that lost an example or a passage


def fitted(
    rows: Sequence[Rendered],
    shots: Sequence[Sequence[Rendered]],
    passages: Sequence[Sequence[str]],
    tokenizer,
    limit: int,
    *,
    between: str,
    context: str,
    end: str = "",
) -> Prompts:
    """The ids of every row's prompt; where they exceed `limit` tokens, the first example goes, and so on, then the last
    passage, and so on. What does not fit without either is left as it is. end: see data.end."""
    shots, passages = [list(s) for s in shots], [list(p) for p in passages]
    ids: list[list[int]] = [[]] * len(rows)
    todo, shortened = list(range(len(rows))), set()
    while todo:
        asked = [compose(rows[i], shots[i], passages[i], between=between, context=context) for i in todo]
        for i, found in zip(todo, encode_prompts(asked, tokenizer, end=end), strict=True):
            ids[i] = found.tolist()
        todo = [i for i in todo if len(ids[i]) > limit and (shots[i] or passages[i])]
        for i in todo:
            if shots[i]:
                shots[i].pop(0)
            else:
                passages[i].pop()
        shortened.update(todo)
    return Prompts(ids, len(shortened))
