"""Duplicates: what counts as the same text, and near pairs against every pair compared by brute force."""

import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from ftjax.data.similar import WINDOW, clusters, firsts, near_pairs, normalise, row_text, shingles


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Hello,  World!", "hello world", True),
        ("“It’s” done…", '"it\'s" done', True),
        ("ﬁne　print", "Fine print", True),
        ("STRASSE", "straße", True),
        ("well-known", "well known", True),
        ("zero\u200bwidth", "zerowidth", True),
        ("5 - 3", "5 / 3", False),
        ("1.5 litres", "15 litres", False),
        ("1.5 litres", "1 5 litres", False),
        ("C++", "C", False),
        ("!", "?", False),
        ("good", "bad", False),
    ],
)
def test_texts_are_the_same_up_to_case_punctuation_and_white_space(a, b, same):
    assert (normalise(a) == normalise(b)) == same
    assert normalise(normalise(a)) == normalise(a)


def test_the_text_of_a_row_is_all_its_strings():
    row = {
        "id": 7,
        "flag": True,
        "none": None,
        "text": "one",
        "tokens": ["two", "three"],
        "messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": None, "n": [1, "five"]}],
    }
    assert row_text(row) == "one\ntwo three\nfour\nfive"
    assert row_text(row, ("tokens", "id", "text")) == "two three\none"


def test_short_texts_are_only_like_themselves():
    assert shingles("good film") == {"good film"} and shingles("") == set()
    texts = ["good film", "bad film", "good", "film", "a good film", "the good film", "", " ", "Good film."]
    assert near_pairs(texts, 0.8).tolist() == [[0, 8]]


def variants(texts, rng):
    """Each text, and one in which up to four words are dropped, doubled or replaced."""
    out = list(texts)
    for text in texts:
        words = text.split()
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(words))
            words[at : at + 1] = rng.choice(([], [words[at]] * 2, ["another"])) or ["x"]
        out.append(" ".join(words))
    return out


def real(shared, name):
    if name == "sst2":
        lines = (shared / "data/sst2/train.tsv").read_text().split("\n")[1:]
        return [line.split("\t")[1] for line in lines[:700] if line]
    file = {"gsm8k": "gsm8k/train.jsonl", "dolly": "instruct/dolly_hhrlhf_train_small.jsonl"}[name]
    return [row_text(json.loads(line)) for line in (shared / "data" / file).read_text().split("\n")[:300] if line]


def random_texts(shared, name):
    rng = random.Random(3)
    return [" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 40))) for _ in range(500)]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "texts"), [("sst2", real), ("gsm8k", real), ("dolly", real), ("random", random_texts)]
)
def test_near_pairs_are_those_that_brute_force_finds(shared, name, texts, threshold):
    texts = variants(texts(shared, name), random.Random(0))
    sets = [shingles(normalise(t)) for t in texts]
    first = firsts(texts)
    alone = [i for i in range(len(texts)) if first[i] == i and sets[i]]
    want = {
        (i, j)
        for i, j in itertools.combinations(alone, 2)
        if (shared := len(sets[i] & sets[j])) >= threshold * (len(sets[i]) + len(sets[j]) - shared)
    }
    pairs = near_pairs(texts, threshold)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    found = {(i, j) for i, j in pairs.tolist() if first[j] != i}
    assert found <= want, "a pair that is not so alike"
    assert len(want) > 20 and len(found) >= 0.95 * len(want)
    assert {(i, j) for i, j in pairs.tolist() if first[j] == i} == {(int(f), j) for j, f in enumerate(first) if f != j}


def test_thousands_of_identical_and_of_similar_rows_stay_linear():
    mould = " ".join(f"word{i}" for i in range(60))
    texts = ["The same row, again and again."] * 20_000 + [f"{mould} {i}" for i in range(2000)]
    pairs = near_pairs(texts, 0.8)
    assert (pairs[:19_999] == np.stack([np.zeros(19_999), np.arange(1, 20_000)], axis=1)).all()
    assert 1999 <= len(pairs) - 19_999 <= 2 * WINDOW * 2000  # all pairs would be 2 million
    assert np.unique(clusters(pairs, len(texts))).tolist() == [0, 20_000]


def test_clusters_join_what_pairs_join():
    assert clusters(np.array([[1, 4], [4, 5], [2, 3]]), 7).tolist() == [0, 1, 2, 2, 1, 1, 6]
    assert clusters(np.empty((0, 2), int), 3).tolist() == [0, 1, 2]
    assert clusters(near_pairs([], 0.8), 0).tolist() == []


def test_pairs_do_not_depend_on_the_process():
    script = (
        "import random\nfrom ftjax.data.similar import near_pairs\nrng = random.Random(1)\n"
        "texts = [' '.join(rng.choice('abc') for _ in range(9)) for _ in range(300)]\n"
        "print(near_pairs(texts, 0.5).tolist())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in "12"
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 100


# Article 1 of the Universal Declaration of Human Rights, without blanks between words, and one word of it changed.
UNSPACED = {
    "Chinese": (
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。", "理性", "智慧",
    ),
    "Japanese": (
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを"
        "授けられており、互いに同胞の精神をもって行動しなければならない。", "平等", "同等",
    ),
    "Thai": (
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักด[เกียรติศักดิ์]และสิทธิ ต่างมีเหตุผลและมโนธรรม "
        "และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ", "สิทธิ", "หน้าที่",
    ),
    "a protein": ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSL", "RVG", "RAG"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSPACED)
def test_near_duplicates_are_found_where_no_blank_parts_words(name):
    text, word, other = UNSPACED[name]
    others = [other_text for kind, (other_text, *_) in UNSPACED.items() if kind != name]
    assert near_pairs([text, *others, text.replace(word, other)], 0.7).tolist() == [[0, 4]]
    assert near_pairs([text, *others, text[len(text) // 2 :]], 0.7).tolist() == []


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_pairs_of_unspaced_texts_are_those_of_their_character_4_grams(threshold):
    rng = random.Random(0)
    texts = ["".join(rng.choice("天地人山水火木金土日月星") for _ in range(rng.randint(20, 60))) for _ in range(150)]
    for text in texts[:100]:
        at = rng.randrange(len(text))
        texts.append(text[:at] + rng.choice(["", "風", "雲雨"]) + text[at + 1 :])
    sets = [{text[i : i + 4] for i in range(len(text) - 3)} for text in texts]
    pairs = itertools.combinations(range(len(texts)), 2)
    want = {(i, j) for i, j in pairs if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])}
    found = set(map(tuple, near_pairs(texts, threshold).tolist()))
    assert len(want) > 20 and found <= want and len(found) >= 0.95 * len(want)
