"""Checks of a single text: personal data, broken characters, refusals. Tables and pure functions on strings.

The checks prefer precision to recall, because a check with many false alarms is soon switched off.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

# ---------------------------------------------------------------------------------------------- personal data

Span = tuple[int, int]  # start and end in the text

EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9](?:[\w.+%-]{0,62}[\w+%-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@-])",
    re.ASCII,
)
# International numbers, with + or 00 and a country; North American numbers, by their punctuation (NXX NXX XXXX, where N
# is 2 to 9); and groups of digits after a word such as `phone`. Other digits are not taken for telephone numbers.
PHONE = re.compile(
    r"""(?<![\w.,=+*/$-])(?:
        (?:\+|00)[1-9]\d{0,2}(?:[ .-]?\(0?\d{1,4}\)|[ .-]\d{1,4}|\d{1,4})(?:[ .-]?\d{2,4}){2,4}
      | (?:1[ .-])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}
      | (?:1[ .-])?\([2-9]\d\d\)[ ]?[2-9]\d\d[ ]\d{4}
    )(?![\w=]|[.,*/+-]\d|[ ]?[=*/+%])
    |(?i:\b(?:phone|telephone|tel|mobile|cell|fax|whatsapp)(?:[ ](?:number|no|nr))?[.:]?[ ]?(?:is[ ]|at[ ])?)
        (?P<number>\+?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4})(?![\w=]|[.,*/+-]\d|[ ]?[=*/+%])""",
    re.VERBOSE | re.ASCII,
)
# 14 to 16 digits of a known issuer, without blanks or in the groups that are printed on the card (ISO/IEC 7812).
CARD = re.compile(
    r"(?<![\w.,=+*/$-])(?:4\d{15}|(?:5[1-5]|2[2-7]|6[05]|35)\d{14}|3[47]\d{13}|3[068]\d{12}"
    r"|(?:4\d|5[1-5]|2[2-7]|6[05]|35)\d\d([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -])\d{6}\2\d{5})"
    r"(?![\w=]|[.,*/+-]\d|[ ]?[=*/+%])",
    re.ASCII,
)
# Prefixes of issuers (as gitleaks and GitHub's secret scanning list them), and values after a name such as `password`.
KEY = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:
        (?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}                                          # AWS access key
      | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_[A-Za-z0-9_]{22,} | glpat-[\w-]{20,} # GitHub, GitLab
      | sk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-|or-v1-)?(?=[\w-]*\d)[\w-]{20,}    # OpenAI, Anthropic, OpenRouter
      | [sr]k_(?:live|test)_[A-Za-z0-9]{16,} | hf_[A-Za-z]{34} | npm_[A-Za-z0-9]{36}   # Stripe, Hugging Face, npm
      | AIza[\w-]{35} | ya29\.[\w-]{20,} | xox[abeoprs]-[\w-]{10,} | pypi-[\w-]{50,} # Google, Slack, PyPI
      | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}                                     # JSON web token
    )(?![A-Za-z0-9_-])
    |-----BEGIN[ ](?:[A-Z]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----
        (?:[\s\S]*?-----END[ ][A-Z ]*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----)?
    |(?i:\b\w*(?:api[_ -]?key|secret|token|passw(?:or)?d|credential)\w*["']?\s*(?:=|:|is)\s*["']?)
        (?P<value>[\w+/=.-]{16,})""",
    re.VERBOSE | re.ASCII,
)
ENTROPY = 3.5  # bits a character from which a value with such a name looks random; English words have about 3


def _phone(match: re.Match) -> Span | None:
    """The span of the number alone, if it has 7 to 15 digits (ITU-T E.164)."""
    digits = sum(c.isdigit() for c in match["number"] or match[0])
    return match.span("number" if match["number"] else 0) if 7 <= digits <= 15 else None


def _card(match: re.Match) -> Span | None:
    """The span of the number, if its check digit is right (Luhn)."""
    digits = [int(c) for c in reversed(match[0]) if c.isdigit()]
    total = sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return match.span() if total % 10 == 0 and len(set(digits)) > 1 else None


def _key(match: re.Match) -> Span | None:
    """The span of the key. A value after a name such as `password` must look random: letters and digits mixed.

    Its entropy must be at least ENTROPY.
    """
    value = match["value"]
    if value is None:
        return match.span()
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return match.span("value") if mixed and entropy(value) >= ENTROPY else None


PERSONAL: dict[str, tuple[re.Pattern, Callable[[re.Match], Span | None]]] = {  # of overlapping matches the first counts
    "key": (KEY, _key),
    "email": (EMAIL, re.Match.span),
    "card": (CARD, _card),
    "phone": (PHONE, _phone),
}


def personal(text: str) -> list[tuple[str, int, int]]:
    """(kind of PERSONAL, start, end) of addresses, numbers and keys in a text, in order and without overlaps."""
    found = []
    for kind, (pattern, check) in PERSONAL.items():
        for match in pattern.finditer(text):
            span = check(match)
            if span and all(span[1] <= start or end <= span[0] for _, start, end in found):
                found.append((kind, *span))
    return sorted(found, key=lambda f: f[1])


def mask(text: str) -> str:
    """The text with `[EMAIL]`, `[PHONE]`, `[CARD]` or `[KEY]` in place of everything that `personal` finds."""
    out, at = "", 0
    for kind, start, end in personal(text):
        out, at = f"{out}{text[at:start]}[{kind.upper()}]", end
    return out + text[at:]


def short(text: str, most: int) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def entropy(text: str) -> float:
    """Shannon entropy of the text's own distribution of characters, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


# ---------------------------------------------------------------------------------------------- characters

# Control characters that no text needs: C0 and C1 except tab, line feed, carriage return and NEL (U+0085), with which
# old corpora end lines; unpaired surrogates; non-characters.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Characters without width. Joiners count only if they join nothing, because emoji, Indic scripts and Persian need them.
INVISIBLE = re.compile(
    "[\xad\u200b\u200e\u200f\u2060-\u2064\u202a-\u202e\u2066-\u2069\ufeff]"
    "|(?<![^\x00-\u02ff])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u02ff])"
)


def mojibake(text: str) -> bool:
    """Whether a part of the text was decoded with a wrong encoding, such as `clichÃ©s`, or contains U+FFFD.

    ftfy's `badness` decides, which counts sequences that real text does not have; and `ftfy` must be able to repair it.
    """
    if text.isascii():
        return False
    if "\ufffd" in text:
        return True
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    return is_bad(text) and fix_encoding(text) != text


def mojibake_at(text: str) -> int:
    """The index of the first broken character of a text for which `mojibake` is true."""
    from ftfy import fix_encoding

    mended = fix_encoding(text)
    differ = (i for i, (a, b) in enumerate(zip(text, mended)) if a != b or a == "\ufffd")
    return next(differ, min(len(text), len(mended)))


def control(text: str) -> list[int]:
    """Indices of control characters, unpaired surrogates and characters without width."""
    if text.isascii() and text.isprintable():
        return []
    return sorted(m.start() for pattern in (CONTROL, INVISIBLE) for m in pattern.finditer(text))


def without_control(text: str) -> str:
    """The text without the characters that `control` finds."""
    return text if text.isascii() and text.isprintable() else INVISIBLE.sub("", CONTROL.sub("", text))


def scripts(text: str) -> Counter[str]:
    """Number of letters by script, such as {"Latin": 40, "Cyrillic": 3}.

    A letter's script is the first word of its Unicode name.
    """
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters} if letters else {})
    out = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            out[_script(character)] += count
    return out


@functools.lru_cache(maxsize=4096)
def _script(character: str) -> str:
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "other").split()
    word = name[0].split("-")[0]
    return {"CJK": "Han", "HALFWIDTH": "Katakana", "MODIFIER": "Latin", "FEMININE": "Latin", "MASCULINE": "Latin"}.get(
        word, word.capitalize()
    )


# ---------------------------------------------------------------------------------------------- answers

HELP = (
    "help|assist|comply|fulfil+|provide|answer|do that|generate|create|write|support|engage|discuss|share|offer|access"
    "|browse|continue|with (?:that|this)"
)
# An assistant that declines at the beginning of an answer, after any apology. "I can't believe it" is not a refusal.
REFUSAL = re.compile(
    r"\W*(?:(?:(?:i'm |i am )?(?:really |very |so |truly )?sorry|unfortunately|i apologi[sz]e|my apologies)[,.;:]? "
    r"(?:but )?|as an? (?:ai|artificial|(?:large )?language)\b[^.!?\n]{0,60}?,? )*"
    rf"(?:i (?:can't|can ?not|couldn't|could not|won't|will not) (?:be able to )?(?:{HELP})"
    rf"|(?:i'm|i am) (?:not able|unable|not programmed|not comfortable|not going) (?:to )?(?:{HELP})"
    rf"|i (?:don't|do not) feel comfortable|i must (?:decline|refuse)|(?:it's|it is|it would be) against my )",
    re.IGNORECASE,
)
# Phrases in which an assistant describes itself or that it adds by habit, and words that stand for a missing answer.
BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large |ai )?language) (?:language )?(?:model|assistant)\b"
    r"|\b(?:i'm|i am) (?:just |only )?an? (?:ai|(?:large )?language) (?:language )?(?:model|assistant|chatbot)\b"
    r"|\bmy (?:knowledge cut-?off|training data (?:only )?(?:goes|ends|extends))\b"
    r"|\bi (?:don't|do not) have (?:personal (?:opinions|beliefs|feelings|experiences|preferences)|access to real)"
    r"|\bi hope this (?:helps|information)\b"
    r"|\blet me know if you (?:have|need) any(?:thing\b| (?:other|further|more|additional|questions)\b)"
    r"|\b(?:is there anything|what) else (?:i can|can i) (?:help|assist)\b"
    r"|\A\W*(?:sure|certainly|of course|absolutely)[!,.:] (?:here\b|i can\b|i'd be happy\b)"
    r"|\blorem ipsum\b"
    r"|\A\W*(?:n/a|null|nan|todo|tbd|undefined|no (?:answer|response|output))\W*\Z",
    re.IGNORECASE,
)


def refusal(text: str) -> bool:
    """Whether an answer refuses to answer, or begins with what its author is not able to do."""
    return REFUSAL.match(text[:400].replace("’", "'")) is not None


def boilerplate(text: str) -> bool:
    """Whether an answer contains an assistant's set phrases, or is only a word for a missing answer, such as `N/A`."""
    return BOILERPLATE.search(text.replace("’", "'")) is not None
