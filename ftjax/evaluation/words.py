"""Words of a text in any script, for the metrics that count words.

In scripts without spaces between words (Chinese, Japanese, Thai, ...) each character is a word. All other words are
runs of letters, digits and the marks that belong to them, so that the vowel signs of Hindi stay within their word. On
ASCII texts each function splits exactly as the tool that its metric is named after, except for texts without any letter
or digit.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import regex

UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Yi")
)
WIDE = r"\u3000-\u303f\uff00-\uffef"  # punctuation and full-width forms of Chinese and Japanese
OTHER = rf"(?![{UNSPACED}])[\p{{L}}\p{{N}}"  # a letter or digit of another script; its user closes the bracket
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|{OTHER}](?:{OTHER}\p{{M}}])*")
SYMBOL = regex.compile(r"\S")
APART = regex.compile(rf"[{UNSPACED}{WIDE}]\p{{M}}*")
# All of string.punctuation, and the punctuation of other scripts. The marks that Latin text shares (quotes, dashes) are
# kept, because the official scripts of SQuAD keep them.
PUNCTUATION = regex.compile(r"(?V1)[[!-/:-@\[-`{-~]||[\p{P}--[\u0080-\u036f\u2000-\u206f]]]")


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), so that é is the same text however it was typed."""
    return unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    A text that holds no word, such as `<=` or one of emoji, is split into its symbols instead.
    """
    text = composed(text).lower()
    return WORD.findall(text) or SYMBOL.findall(text)


def spaced(text: str) -> str:
    """The text with spaces around each character of a script without spaces between words, in composed form (NFC).

    Tools that split at spaces then take each of these characters for a word.
    """
    return APART.sub(r" \g<0> ", composed(text))


def without_punctuation(text: str) -> str:
    """The text without ASCII's punctuation and symbols, and without the punctuation of scripts other than Latin."""
    return PUNCTUATION.sub("", text)


@functools.lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The stem of an English word in lower case (Porter 1980)."""
    return _stemmer().stem(word)


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def grams(units: Sequence, n: int) -> list[tuple]:
    """The n-grams of words, or of other units."""
    return list(zip(*(units[i:] for i in range(n))))
