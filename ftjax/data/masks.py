"""Texts for masked-language modelling: cut into pieces here, and masked anew in each epoch when batches are built.

T tokens of a piece, n of them that may be masked, K of those that are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ftjax.data.labelled import Labelled, need_offsets
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become the mask, or a random token; others stay (BERT)


def encode(how: Labelled, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
    """Cut texts into pieces of at most how.max_length tokens, special tokens included.

    Args:
        how: The recipe.
        tokenizer: The tokenizer, from transformers.
        rows: The rows.
        places: Names of the rows for errors.

    Returns:
        One Example for each piece. trained: tokens that may be masked; targets (n,): for each of these tokens, the
        number of its word in the text, from 0.

    Raises:
        FtjaxError: If the tokenizer cannot map tokens to words, if it makes no token of a text, or if how.max_length
            leaves no room for text.
    """
    need_offsets(tokenizer, "words")
    out = []
    (texts,) = how.cells(rows, places)
    encoded = tokenizer(texts, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    for i, place in enumerate(places):
        ids = np.array(encoded["input_ids"][i], np.int32)
        special = np.array(encoded["special_tokens_mask"][i], bool)
        body = np.flatnonzero(~special)
        if not len(body):
            raise FtjaxError(f"{place}: the tokenizer makes no token of this text")
        word = np.array([-1 if w is None else w for w in encoded.word_ids(i)])
        a, b = body[0], body[-1] + 1
        room = how.max_length - (len(ids) - (b - a))
        if room < 1:
            raise FtjaxError(f"data.max_length={how.max_length}: leaves no room for text; raise it")
        for start in range(a, b, room):
            kept = np.r_[0:a, start : min(start + room, b), b : len(ids)]
            trained = ~special[kept]
            if trained.any():
                out.append(Example(ids[kept], trained, word[kept][trained].astype(np.int32), row=i))
    return out


class Masking(NamedTuple):
    """How tokens are masked.

    Attributes:
        rate: Share of the tokens that are masked.
        whole_words: Whether words are masked as a whole.
        mask: Id of the mask token.
        vocab: Random tokens are drawn from the ids 0 to vocab - 1.
    """

    rate: float
    whole_words: bool
    mask: int
    vocab: int

    def count(self, n):
        """Most tokens that are masked of n tokens: at least one. n may be an array."""
        return np.maximum(1, np.rint(np.asarray(n) * self.rate)).astype(int)

    def draw(self, key: tuple[int, ...], tokens: np.ndarray, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw the tokens that are masked.

        Whole words are drawn one after another, and taken if they fit into `count`. If no word fits, the beginning of
        the first one is masked.

        Args:
            key: Seed. The result is a function of the arguments.
            tokens: (n,) ids.
            word: (n,) number of each token's word.

        Returns:
            (K ascending indices of masked tokens, (K,) int32 tokens that replace them).
        """
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        n, most = len(tokens), int(self.count(len(tokens)))
        if self.whole_words:
            starts = np.flatnonzero(np.r_[True, word[1:] != word[:-1]])
            sizes = np.diff(np.r_[starts, n])
            order, taken, room = rng.permutation(len(starts)), [], most
            for i in order:
                if sizes[i] <= room:
                    taken.append(np.arange(starts[i], starts[i] + sizes[i]))
                    room -= sizes[i]
            chosen = np.sort(np.concatenate(taken)) if taken else starts[order[0]] + np.arange(most)
        else:
            chosen = np.sort(rng.permutation(n)[:most])
        kind, other = rng.random(len(chosen)), rng.integers(0, self.vocab, len(chosen))
        shown = np.where(kind < MASKED + RANDOM, other, tokens[chosen])
        return chosen, np.where(kind < MASKED, self.mask, shown).astype(np.int32)


def masking(task, tokenizer) -> Masking:
    """The Masking of config.task. Raises FtjaxError if the tokenizer has no mask token."""
    if tokenizer.mask_token_id is None:
        raise FtjaxError("task.kind: masked needs a mask token, and this model's tokenizer has none")
    return Masking(task.mask_rate, task.whole_words, tokenizer.mask_token_id, len(tokenizer))
