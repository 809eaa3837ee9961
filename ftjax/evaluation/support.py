"""Which claims of an answer a passage supports, by their shared words.

This is lexical entailment, the baseline of the entailment challenges (Dagan, Glickman & Magnini 2006): a claim counts
as supported if enough of its content occurs in the passage. It ignores negation and who did what to whom, and it counts
a paraphrase as unsupported. Use the rate to compare contenders on the same passages, not to count hallucinations.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import regex

from ftjax.evaluation.words import spaced

# Chinese and Japanese have no space after the end of a sentence.
SENTENCE = re.compile(r"(?<=[.!?।؟])[\"'”’)]*\s+|(?<=[。！？])[”’」』）]*(?!$)|\n+")
WORD = regex.compile(r"\d+(?:[.,]\d+)*|\p{L}[\p{L}\p{M}]*(?:['’]\p{L}[\p{L}\p{M}]*)?")
LEAST = 0.5  # a claim is supported if the passage has this share of its content
# English words without content of their own. In other languages all words count.
EMPTY = frozenset(
    "a about after all also am an and any are as at be because been before being but by can could did do does "
    "doing for from had has have having he her hers him his how i if in into is it its just may me might more "
    "most must my no nor not of on once only or other our ours out over own same shall she should so some such "
    "than that the their theirs them then there these they this those through to too under until up us very "
    "was we were what when where which while who whom whose why will with would you your yours".split()
)


class Claim(NamedTuple):
    """A sentence of an answer, compared with a passage."""

    text: str
    share: float  # of its content n-grams that the passage has
    numbers: tuple[str, ...]  # numbers that the passage does not have

    @property
    def supported(self) -> bool:
        return self.share >= LEAST and not self.numbers


def claims(answer: str, passage: str, n: int = 1) -> list[Claim]:
    """The sentences of an answer that have content, each with the share of its content that occurs in the passage.

    Content is n-grams of the stems (Porter 1980) of words that are not in EMPTY. A sentence with fewer than n such
    words is one n-gram. A number that the passage lacks makes the whole claim unsupported.

    Args:
        answer: The answer.
        passage: The passage.
        n: Words of an n-gram.
    """
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem

    def content(text: str) -> list[str]:
        return [stem(word.replace(",", "")) for word in WORD.findall(spaced(text).lower()) if word not in EMPTY]

    words = content(passage)
    there = {size: set(_grams(words, size)) for size in range(1, n + 1)}
    out = []
    for sentence in SENTENCE.split(answer):
        own = content(sentence)
        if own:
            grams = _grams(own, min(n, len(own)))
            numbers = tuple(w for w in dict.fromkeys(own) if w[0].isdigit() and (w,) not in there[1])
            out.append(Claim(sentence, sum(g in there[len(g)] for g in grams) / len(grams), numbers))
    return out


def unsupported_rate(answer: str, passage: str, n: int = 1) -> float | None:
    """Share of an answer's claims that the passage does not support; None for an answer without a claim. n: see
    `claims`."""
    found = claims(answer, passage, n)
    return sum(not claim.supported for claim in found) / len(found) if found else None


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))
