"""Prompts for a model that was not trained on the task: with examples or passages of documents before the question."""

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
from ftjax.evaluation.words import stem


class Prompting(NamedTuple):
    """What a prompt holds before the question."""

    shots: bool = False  # whether it has examples of the training part
    near: bool = False  # whether these are the nearest to the question; else the seed draws them once for all questions
    passages: bool = False  # whether it has passages of compare.documents


PROMPTS = {
    "zero-shot": Prompting(),
    "few-shot": Prompting(shots=True),
    "few-shot-near": Prompting(shots=True, near=True),
    "retrieval": Prompting(passages=True),
    "retrieval-few-shot": Prompting(shots=True, passages=True),
    "retrieval-few-shot-near": Prompting(shots=True, near=True, passages=True),
}


# ---------------------------------------------------------------------------------------------- what is near


def stems(text: str) -> list[str]:
    """The English stems (Porter 1980) of a text's words, in lower case."""
    return [stem(word) for word in re.findall(r"[^\W_]+", text.lower())]


class Index:
    """A BM25 index of texts over their `stems`, in Lucene's form. `bm25s` needs numpy only and is maintained."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every step
        words = [stems(text) for text in texts]
        if not any(words):
            raise FtjaxError(f"BM25: none of the {len(words)} texts to search contains a word; pass texts with words")
        self.bm25 = bm25s.BM25(method="lucene")
        self.bm25.index(words, show_progress=False)
        self.size = len(words)

    def nearest(self, text: str, k: int) -> list[int]:
        """Indices of the k texts with the highest score, highest first; of equal scores the earlier text comes
        first."""
        words = stems(text)
        scores = self.bm25.get_scores(words) if words else np.zeros(self.size)
        return np.argsort(-scores, kind="stable")[:k].tolist()


def pieces(texts: Sequence[str], words: int) -> list[str]:
    """Cut texts into passages of about equal length, of at most `words` words (separated by white space). No passage is
    empty."""
    out = []
    for text in texts:
        own = text.split()
        count = -(-len(own) // words)
        borders = [round(k * len(own) / count) for k in range(count + 1)] if count else []
        out += [" ".join(own[a:b]) for a, b in zip(borders, borders[1:])]
    return out


class Library:
    """Examples of a part of the data and passages of documents, for prompts. Both are read when they are first used."""

    def __init__(self, config, part):
        self.config, self.part = config.compare, part

    @functools.cached_property
    def examples(self) -> list[Rendered]:
        """The first row of each distinct question."""
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
            raise FtjaxError(
                "compare.documents is empty: the contender `retrieval` needs rows or a folder of text files to search"
            )
        table = read_table(assets.resolve(source), "compare.documents")
        texts = map(row_text, table)
        return pieces(list(texts), self.config.passage_words)

    @functools.cached_property
    def by_passage(self) -> Index:
        return Index(self.passages)

    def shots(self, rows: Sequence[Rendered], how: Prompting, k: int, seed: int) -> list[list[Rendered]]:
        """The examples of each row, with the nearest one next to the question.

        This order is that of Liu et al. 2022, "What makes good in-context examples for GPT-3?".

        Args:
            rows: N rows.
            how: The kind of prompt, which decides whether examples are the nearest ones or drawn once for all rows.
            k: Number of examples per row.
            seed: Seed of the draw.

        Returns:
            N lists of k examples; empty lists if the prompt has no examples.

        Raises:
            FtjaxError: If there are fewer than k distinct examples, or if plain text and conversations are mixed.
        """
        if not how.shots or not k:
            return [[] for _ in rows]
        if k > len(self.examples):
            raise FtjaxError(
                f"compare.shots={k}, but the training part has only {len(self.examples)} rows with different "
                "questions; set a smaller number"
            )
        if len({shot.messages is None for shot in [*self.examples, *rows]}) > 1:
            raise FtjaxError(
                "compare: some rows are plain text and some are conversations, so no example fits all prompts; use "
                "rows of one form"
            )
        if how.near:
            return [[self.examples[i] for i in self.by_question.nearest(question(row), k)[::-1]] for row in rows]
        drawn = np.random.default_rng(seed).choice(len(self.examples), k, replace=False)
        return [[self.examples[i] for i in drawn] for _ in rows]

    def context(self, rows: Sequence[Rendered], how: Prompting) -> list[list[str]]:
        """The passages of each row, the nearest first; empty lists if the prompt has no passages."""
        if not how.passages:
            return [[] for _ in rows]
        found = self.by_passage
        return [[self.passages[i] for i in found.nearest(question(row), self.config.passages)] for row in rows]


# ---------------------------------------------------------------------------------------------- prompts


def compose(
    row: Rendered, shots: Sequence[Rendered] = (), passages: Sequence[str] = (), *, between: str, context: str
) -> Rendered:
    """A row with examples and passages before its question.

    In plain text the passages come first, then each example followed by `between`, then the question. In a
    conversation, examples are earlier turns, and the passages begin the last message of the user.

    Args:
        row: The row.
        shots: The examples, in order.
        passages: The passages, in order.
        between: Text after each example.
        context: Text around the passages, in which `{passages}` stands for them.

    Returns:
        The composed row.
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


SYSTEM = ("system", "developer")  # roles whose text applies to the whole conversation


class Prompts(NamedTuple):
    """The prompts of a contender."""

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
    """Encode the prompt of every row within `limit` tokens.

    While a prompt is too long, it first loses its examples, beginning with the first, and then its passages, beginning
    with the last. A prompt that does not fit without either is left as it is.

    Args:
        rows: N rows.
        shots: The examples of each row.
        passages: The passages of each row.
        tokenizer: The tokenizer.
        limit: Most tokens of a prompt.
        between, context: See `compose`.
        end: See data.end.

    Returns:
        The Prompts: N lists of ids, and how many prompts lost something.
    """
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
