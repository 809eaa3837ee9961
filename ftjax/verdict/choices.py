"""Log-likelihoods of texts, for multiple choice without generation and for perplexity, as in lm-evaluation-harness.

N rows, C choices per row, B rows per batch, T tokens, M scored tokens of a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import xla
from ftjax.data.batches import Batches
from ftjax.data.tokenise import Example
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.objectives.causal import states

BUCKETS = 8  # number of lengths that rows are padded to; each is compiled once
CHUNK = 128  # tokens of a row whose logits are in memory at once
Pair = tuple[list[int], list[int]]  # (given ids, at least one; scored ids)


class Likelihood(NamedTuple):
    """The log-likelihood of a text that follows another."""

    log: float  # sum over the scored tokens, nats
    greedy: bool  # whether each of them is the most likely token at its place
    tokens: int


# ---------------------------------------------------------------------------------------------- ids


def log_likelihoods(lm, pairs: Sequence[Pair], batch_size: int = 16) -> list[Likelihood]:
    """Log-likelihood of the second part of each pair, given the first.

    Args:
        lm: The model.
        pairs: (given ids, scored ids) of N texts, see `batched`.
        batch_size: Rows per batch.

    Returns:
        N Likelihoods, in the order of the pairs.

    Raises:
        FtjaxError: If a pair cannot be scored.
        NotFinite: If a log-likelihood is NaN or infinite.
    """
    out: list[Likelihood] = [None] * len(pairs)
    for batch, rows in batched(pairs, lm.max_tokens, batch_size):
        logs, greedy = map(np.asarray, _told(lm.model, lm.variables, batch))
        for row, i, n in rows:
            if not np.isfinite(logs[row, :n]).all():
                raise NotFinite(f"text {i + 1}: its likelihood is NaN or infinite. {WEIGHTS}")
            out[i] = Likelihood(float(logs[row, :n].sum(dtype=np.float64)), bool(greedy[row, :n].all()), n)
    return out


def batched(
    pairs: Sequence[Pair], limit: int, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]]:
    """Batches for objectives, sorted by length, whose labels are the scored tokens.

    Args:
        pairs: (given ids, scored ids) of N texts. If a pair exceeds the limit, tokens at the beginning of its first
            part are left out.
        limit: Number of the model's positions.
        batch_size: Rows per batch.

    Yields:
        (batch, [(row of the batch, index of the pair, number of scored tokens)]).

    Raises:
        FtjaxError: If one part of a pair is empty, or if its scored part exceeds the limit.
    """
    examples = []
    for number, (given, scored) in enumerate(pairs, 1):
        if not len(given) or not 0 < len(scored) <= limit:
            raise FtjaxError(
                f"text {number}: {len(given)} context tokens and {len(scored)} tokens to score; expected at least one "
                f"of each, and at most {limit} (the model's positions) to score"
            )
        ids = np.array([*given, *scored][-(limit + 1) :], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) >= len(ids) - len(scored)))
    if not examples:
        return
    batches = Batches(examples, min(batch_size, len(examples)), limit + 1, buckets=BUCKETS, shuffle=False)
    for step in range(len(batches)):
        batch = batches[step]
        for name in ("tokens", "positions", "segment_ids"):
            batch[name] = batch[name][:, :limit]  # the last token of the longest rows is scored but not read
        members = enumerate(batches.rows(step))
        yield batch, [(row, int(i), int(batches.examples.labels[i])) for row, found in members for i in found]


@functools.partial(xla.jit, static_argnums=0)
def _told(model, variables, batch):
    """(B, M) each: the log-probability of each label in float32, and whether no other token has a higher one."""

    def told(found, labels):
        logits = model.apply(variables, found, method="logits")
        mine = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return mine - jax.nn.logsumexp(logits, axis=-1), mine >= jnp.max(logits, axis=-1)

    return in_chunks(told, states(model, variables, batch), batch["labels"])


def in_chunks(f: Callable, *arrays):
    """Apply f, which maps arrays (B, M, ...) to arrays (B, M), to CHUNK of the M places at a time."""
    B, M = arrays[0].shape[:2]
    if M <= CHUNK:
        return f(*arrays)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -M % CHUNK)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, CHUNK, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda piece: f(*piece), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :M], pieces)


# ---------------------------------------------------------------------------------------------- texts


def encode_pair(tokenizer, given: str, scored: str) -> Pair:
    """Ids of a text and of its continuation, encoded together. Spaces at the end of the first belong to the second.

    If the first text is empty, it becomes the tokenizer's BOS, or EOS if there is no BOS.
    """
    if not given:
        start, ids = _start(tokenizer), tokenizer(scored, add_special_tokens=False)["input_ids"]
        return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
    kept = given.rstrip()
    before, whole = _ids(tokenizer, kept), _ids(tokenizer, given + scored)
    return before, whole[len(before) :]


def _start(tokenizer) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise FtjaxError(
            "the tokenizer has neither a BOS nor an EOS token, so the first token of a text has nothing before it and "
            "cannot be scored; set one in the tokenizer's files"
        )
    return start


def _ids(tokenizer, text: str) -> list[int]:
    """Ids of a text with the tokenizer's special tokens, unless the text itself begins with BOS."""
    special = not text.startswith(tokenizer.decode(_start(tokenizer)))
    return tokenizer(text, **({} if special else {"add_special_tokens": False}))["input_ids"]


# ---------------------------------------------------------------------------------------------- multiple choice

LENGTHS = {  # what the log-likelihood of a choice is divided by
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def choose(
    lm, questions: Sequence[str], choices: Sequence[Sequence[str]], *, between: str = " ", batch_size: int = 16
) -> list[np.ndarray]:
    """Log-likelihoods of the choices of each question.

    Args:
        lm: The model.
        questions: N questions.
        choices: The choices of each question.
        between: Text before a choice. It is scored, but it does not count for the choice's length.
        batch_size: Rows per batch.

    Returns:
        N arrays (C,), in nats.

    Raises:
        FtjaxError: If a question has no choice, or if a choice is empty.
    """
    for number, options in enumerate(choices, 1):
        if not options or not all(options):
            raise FtjaxError(
                f"question {number}: expected at least one choice, and no empty choice; found {list(options)!r}"
            )
    pairs = [encode_pair(lm.tokenizer, q, between + c) for q, cs in zip(questions, choices, strict=True) for c in cs]
    logs = np.array([told.log for told in log_likelihoods(lm, pairs, batch_size)])
    return np.split(logs, np.cumsum([len(cs) for cs in choices])[:-1])


def accuracies(logs: Sequence[np.ndarray], choices: Sequence[Sequence[str]], right: Sequence[int]) -> dict:
    """Whether the most likely choice is the right one. The first one of equally likely choices counts.

    Args:
        logs: N arrays (C,) from `choose`.
        choices: The choices of each question.
        right: Index of the right choice of each question.

    Returns:
        {name: (N,) float64 of 0 and 1} by each rule of LENGTHS: `acc` as it is, `acc_norm` divided by characters,
        `acc_bytes` divided by bytes.

    Raises:
        FtjaxError: If an index is out of range.
    """
    for number, (cs, at) in enumerate(zip(choices, right, strict=True), 1):
        if not 0 <= at < len(cs):
            raise FtjaxError(f"question {number}: the index of the right choice is {at}; expected 0 to {len(cs) - 1}")
    return {
        name: np.array(
            [float(np.argmax(x / np.array([length(c) for c in cs])) == r) for x, cs, r in zip(logs, choices, right)]
        )
        for name, length in LENGTHS.items()
    }


# ---------------------------------------------------------------------------------------------- perplexity


class Rolled(NamedTuple):
    """Log-likelihoods and lengths of N texts, (N,) each."""

    log: np.ndarray  # log-likelihood, nats
    tokens: np.ndarray
    words: np.ndarray
    bytes: np.ndarray

    def perplexities(self) -> dict[str, float]:
        """Perplexity by token, word and byte, and bits per byte. Only those by word and byte compare models with
        different tokenizers."""
        units = {"token": self.tokens, "word": self.words, "byte": self.bytes}
        out = {f"{name}_perplexity": math.exp(-self.log.sum() / n.sum()) for name, n in units.items()}
        return out | {"bits_per_byte": float(-self.log.sum() / self.bytes.sum() / math.log(2))}


def roll(lm, texts: Sequence[str], batch_size: int = 16) -> Rolled:
    """Log-likelihood of whole texts after BOS, as in `loglikelihood_rolling` and `wikitext` of lm-evaluation-harness.

    A text that exceeds the model's positions is scored window by window, each token once. The last window reads as much
    of the text before it as there is room for. BOS is scored too if the tokenizer puts it before a text. Words are
    separated by white space. An empty one at either end counts.

    Args:
        lm: The model.
        texts: N texts, none of them empty.
        batch_size: Windows per batch.

    Returns:
        The Rolled.

    Raises:
        FtjaxError: If a text is empty.
        NotFinite: If a log-likelihood is NaN or infinite.
    """
    limit, start = lm.max_tokens, _start(lm.tokenizer)
    found = [windows(_ids(lm.tokenizer, text), start, limit) for text in texts]
    for number, pairs in enumerate(found, 1):
        if not pairs:
            raise FtjaxError(f"text {number} is empty, so there is nothing to score; remove it")
    told = iter(log_likelihoods(lm, [pair for pairs in found for pair in pairs], batch_size))
    scored = [[next(told) for _ in pairs] for pairs in found]
    return Rolled(
        np.array([sum(t.log for t in parts) for parts in scored]),
        np.array([sum(t.tokens for t in parts) for parts in scored]),
        np.array([len(re.split(r"\s+", text)) for text in texts]),
        np.array([len(text.encode()) for text in texts]),
    )


def windows(ids: list[int], start: int, limit: int) -> list[Pair]:
    """Pairs that together score each of `ids` once, and each read at most `limit` tokens. `start` precedes the first
    token."""
    out = [([start], ids[:limit])] if ids else []
    for first in range(limit, len(ids), limit):
        last = min(first + limit, len(ids))
        out.append((ids[last - limit - 1 : first], ids[first:last]))
    return out
