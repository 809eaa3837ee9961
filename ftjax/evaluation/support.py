"""Which claims of an answer a passage supports, by their shared words.

This is lexical entailment, the baseline of the entailment challenges (Dagan, Glickman & Magnini 2006): a claim counts
as supported if enough of its content occurs in the passage. It ignores negation and who did what to whom, and it counts
a paraphrase as unsupported. Use the rate to compare contenders on the same passages, not to count hallucinations.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import regex

from ftjax.evaluation.words import spaced, stem

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
    share: float  # of its content that the passage has
    numbers: tuple[str, ...]  # numbers that the passage does not have

    @property
    def supported(self) -> bool:
        return self.share >= LEAST and not self.numbers


def claims(answer: str, passage: str) -> list[Claim]:
    """The sentences of an answer that have content, each with the share of its content that occurs in the passage.

    Content is the stems (Porter 1980) of words that are not in EMPTY. A number that the passage lacks makes the whole
    claim unsupported.
    """

    def content(text: str) -> list[str]:
        return [stem(word.replace(",", "")) for word in WORD.findall(spaced(text).lower()) if word not in EMPTY]

    there, out = set(content(passage)), []
    for sentence in SENTENCE.split(answer):
        if own := content(sentence):
            numbers = tuple(w for w in dict.fromkeys(own) if w[0].isdigit() and w not in there)
            out.append(Claim(sentence, sum(w in there for w in own) / len(own), numbers))
    return out


def unsupported_rate(answer: str, passage: str) -> float | None:
    """Share of an answer's claims that the passage does not support; None for an answer without a claim."""
    found = claims(answer, passage)
    return sum(not claim.supported for claim in found) / len(found) if found else None
