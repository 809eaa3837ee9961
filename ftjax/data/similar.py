"""Which texts are equal, or similar by the Jaccard similarity of their word 3-grams.

Texts in scripts without blanks between words are compared by their character 4-grams. Candidate pairs come from MinHash
and locality-sensitive hashing, and are then verified.

Broder, "On the resemblance and containment of documents" (1997); Leskovec et al., "Mining of Massive Datasets", ch. 3.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

WORDS = 3  # words of a shingle; a text of fewer words is a single shingle, so that it is similar to itself only
# Scripts without blanks between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana and Han.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
CHARACTERS = 1.7  # characters of a word in such a script; the value is that of Chinese
LONGEST = 20  # mean letters of a word above which a text does not consist of words (a protein's sequence, for example)
PERMUTATIONS = 128  # numbers of a signature, which takes 512 bytes a row
RECALL = 0.98  # share of pairs exactly at the threshold that become candidates; more similar ones are missed less often
WINDOW = 64  # rows before it in a bucket with which a row is compared, so that the cost of a large bucket stays linear
BLOCK = 50_000  # candidate pairs whose shingles are held at once

ROLES = ("role", "from")  # keys of a message whose values belong to the format, not to the text

INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])
# Operators are not punctuation, because "5 - 3" is not "5 / 3". Neither are points and commas within numbers, and
# hyphens before numbers.
PUNCTUATION = re.compile(
    r"""[!?;"'`´‘’‚“”„«»‹›()\[\]{}…—–_¿¡、。，！？；：「」『』（）【】]"""
    r"""|(?<!\d)[.,:]|[.,:](?!\d)|(?<=[^\W\d])[-‐‑](?=[^\W\d])|--+"""
)


def row_text(row: dict, columns: Sequence[str] = ()) -> str:
    """All text of a row, or of the given columns, joined by line feeds. Numbers, truth values and roles are left out.

    Text in nested lists and objects, such as messages, is included. A list of strings is one text, joined by blanks.
    """
    return "\n".join(text for name in columns or row for text in _texts(row.get(name)))


def _texts(cell) -> Iterable[str]:
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, dict):
        for key, value in cell.items():
            if key not in ROLES:
                yield from _texts(value)
    elif isinstance(cell, list | tuple):
        if cell and all(isinstance(c, str) for c in cell):
            yield " ".join(cell)
        else:
            for value in cell:
                yield from _texts(value)


def normalise(text: str) -> str:
    """The form in which texts are compared: NFKC, case-folded, with punctuation and white space replaced by one blank.

    A text that consists of punctuation only keeps it.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(INVISIBLE))
    text = text.casefold()
    return " ".join(PUNCTUATION.sub(" ", text).split()) or " ".join(text.split())


def units(normalised: str) -> tuple[list[str], str]:
    """(the units of which n-grams of a normalised text consist, the string that joins them).

    They are words and a blank; or characters and an empty string, if most letters are of a script without blanks, or if
    words are very long.
    """
    words = normalised.split()
    letters = len(normalised) - len(words) + 1
    unspaced = 0 if normalised.isascii() else len(UNSPACED.findall(normalised))
    if 2 * unspaced > letters or letters > LONGEST * len(words):
        return list(normalised.replace(" ", "")), ""
    return words, " "


def grams(normalised: str, words: int) -> list[str]:
    """All n-grams of `words` words, or of as many characters as that many words have on average, see `units`."""
    found, between = units(normalised)
    # One character less, because a run need not begin where a word does. So a changed word has the same effect.
    n = words if between else round(words * CHARACTERS) - 1
    return [between.join(found[i : i + n]) for i in range(len(found) - n + 1)]


def without(normalised: str, words: int, left_out: set[str]) -> str:
    """Leave out the units of a normalised text that belong to certain `grams`.

    Args:
        normalised: The text.
        words: Number of words of these grams, see `grams`.
        left_out: The grams.
    """
    found, between = units(normalised)
    covered = np.zeros(len(found), bool)
    for at, gram in enumerate(grams(normalised, words)):
        if gram in left_out:
            covered[at : at + (gram.count(" ") + 1 if between else len(gram))] = True
    return between.join(unit for unit, is_covered in zip(found, covered) if not is_covered)


def shingles(normalised: str) -> set[str]:
    """The word 3-grams or character 4-grams of a normalised text.

    If the text is shorter, the text itself is the only shingle. An empty text has none.
    """
    return set(grams(normalised, WORDS)) or ({normalised} if normalised else set())


def firsts(texts: Iterable[str]) -> np.ndarray:
    """(n,) int64: for each text, the index of the first text with the same normalised form.

    An empty text has its own index.
    """
    normalised = enumerate(map(normalise, texts))
    return np.array(first_equal(digest(text) if text else i for i, text in normalised), np.int64)


def first_equal(keys: Iterable[Hashable]) -> list[int]:
    """For each key, the index of the first key that is equal to it."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def near_pairs(texts: Sequence[str], threshold: float, seed: int = 0) -> np.ndarray:
    """Pairs of texts whose similarity is at least a threshold.

    The similarity is the Jaccard similarity of the `shingles` of the `normalise`d texts. Every pair is verified, and at
    least about RECALL of all such pairs are found. Of equal texts, only the first is paired with similar texts, and
    with each of the others. So thousands of equal texts give thousands of pairs, and `clusters` gives the same result.

    Args:
        texts: The n texts. They are read twice in order, and then by index to verify candidates. Only the signatures
            stay in memory.
        threshold: The smallest similarity, above 0 and at most 1.
        seed: Seed of the hash functions.

    Returns:
        (P, 2) int64, pairs i < j, sorted.
    """
    first = firsts(texts)
    alone = first == np.arange(len(first))
    rows, signatures = _signatures(((i, text) for i, text in enumerate(texts) if alone[i]), seed)
    same = np.flatnonzero(~alone)
    candidates = rows[_candidates(signatures, threshold, seed)]
    alike = [
        block[_alike(texts, block, threshold)] for block in np.split(candidates, range(BLOCK, len(candidates), BLOCK))
    ]
    pairs = np.concatenate([np.stack([first[same], same], axis=1), *alike])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def clusters(pairs: np.ndarray, n: int) -> np.ndarray:
    """(n,) int64: for each of n texts, the smallest index to which pairs (P, 2) connect it, directly or not."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    count, component = connected_components(graph, directed=False)
    smallest = np.full(count, n, np.int64)
    np.minimum.at(smallest, component, np.arange(n))
    return smallest[component]


def digest(text: str) -> bytes:
    """A digest of a text, 16 bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _signatures(texts: Iterable[tuple[int, str]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices (m,), signatures (m, PERMUTATIONS)) of all (index, text) whose text is not empty."""
    from datasketch import MinHash

    rows, signatures = [], []
    empty = MinHash(num_perm=PERMUTATIONS, seed=seed, hashfunc=_hash)
    for i, text in texts:
        grams = shingles(normalise(text))
        if grams:
            minhash = empty.copy()
            minhash.update_batch(grams)
            rows.append(i)
            signatures.append(minhash.hashvalues.astype(np.uint32))
    return np.array(rows, np.int64), np.array(signatures, np.uint32).reshape(len(rows), PERMUTATIONS)


def _hash(shingle: str) -> int:
    return zlib.crc32(shingle.encode("utf-8", "surrogatepass"))


def _candidates(signatures: np.ndarray, threshold: float, seed: int) -> np.ndarray:
    """(C, 2), i < j, sorted: pairs of rows of the signatures that share a bucket of at least one band."""
    n, width = len(signatures), _band(threshold)
    multipliers = np.random.default_rng(seed).integers(0, 2**63, width, np.uint64) | np.uint64(1)
    found = np.empty(0, np.int64)
    for start in range(0, PERMUTATIONS - width + 1, width):
        keys = (signatures[:, start : start + width] * multipliers).sum(axis=1, dtype=np.uint64)  # wraps around
        order = np.argsort(keys, kind="stable")  # a bucket is a run, its rows ascending
        keys = keys[order]
        pairs = [found]
        for distance in range(1, min(WINDOW, n - 1) + 1):
            at = np.flatnonzero(keys[:-distance] == keys[distance:])
            if len(at) == 0:
                break
            pairs.append(order[at] * n + order[at + distance])
        found = np.unique(np.concatenate(pairs))
    return np.stack([found // n, found % n], axis=1) if n else np.empty((0, 2), np.int64)


def _band(threshold: float) -> int:
    """Rows of a band: the most that RECALL at the threshold allows, which gives the fewest false candidates."""
    fit = [r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(fit, default=1)


def _alike(texts: Sequence[str], pairs: np.ndarray, threshold: float) -> np.ndarray:
    """(P,) bool: whether the Jaccard similarity of each pair is at least the threshold."""
    sets = {i: shingles(normalise(texts[i])) for i in np.unique(pairs).tolist()}
    out = np.zeros(len(pairs), bool)
    for k, (i, j) in enumerate(pairs.tolist()):
        a, b = sets[i], sets[j]
        shared = len(a & b)
        out[k] = shared >= threshold * (len(a) + len(b) - shared) - 1e-9
    return out
