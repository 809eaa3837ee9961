"""Words with tags as tokens: which token is of which word, what carries a tag, what a cut leaves."""

import numpy as np
import pytest
from tiny_words import wordpiece
from transformers import AutoTokenizer

from ftjax.data import labelled, tags
from ftjax.data.labelled import Labelled
from ftjax.data.read import read_table
from ftjax.errors import FtjaxError

NAMES = ("O", "B-person", "I-person", "B-place")
WORDS = ["Pierre", "Vinken", "sails", "to", "Ile-de-France", ",", "again"]
TAGS = ["B-person", "I-person", "O", "O", "B-place", "O", "O"]


def how(**more) -> Labelled:
    return Labelled(**{"form": "tag", "text": "tokens", "pair": "", "label": "tags", "names": NAMES, "pool": "",
                       "max_length": 0} | more)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece(WORDS * 3, 70)


@pytest.fixture(scope="module")
def sentences(shared):
    table = read_table(str(shared / "data/wnut17/dev.conll"))
    return list(table)[:400]


def test_tokens_are_of_the_words_that_the_tokenizer_says(sentences):
    words = [row["tokens"] for row in sentences]
    tokenizer = wordpiece([" ".join(w) for w in words], 500)
    theirs = tokenizer(words, is_split_into_words=True)
    for i, found in enumerate(tags.in_words(tokenizer, words, 0)):
        assert found.ids.tolist() == theirs["input_ids"][i]
        assert [None if w < 0 else w for w in found.word] == theirs.word_ids(i)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_tokens_with_the_blank_before_them_are_of_the_word_behind_it(name, sentences, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    words = [row["tokens"] for row in sentences]
    for row, found in zip(words, tags.in_words(tokenizer, words, 0), strict=True):
        for i, word in enumerate(row):
            ids = found.ids[found.word == i]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == word


def test_a_cut_leaves_whole_words_between_the_special_tokens(sentences):
    words = [row["tokens"] for row in sentences]
    tokenizer = wordpiece([" ".join(w) for w in words], 400)
    for most in (6, 17):
        whole, short = tags.in_words(tokenizer, words, 0), tags.in_words(tokenizer, words, most)
        assert sum(len(s.ids) < len(w.before) for s, w in zip(short, whole)) > 200
        for s, w in zip(short, whole, strict=True):
            assert s.before.tolist() == w.word.tolist() and len(s.ids) <= most
            assert (s.ids[0], s.ids[-1]) == (w.ids[0], w.ids[-1])
            kept = s.word[s.word >= 0]
            n = len(kept)
            np.testing.assert_array_equal(s.ids[1:-1], w.ids[1:-1][:n])
            if len(s.ids) < len(w.ids) and w.word[n] != w.word[1]:
                assert w.word[1 + n] != w.word[n]  # the next word begins behind the cut
                begun = w.word == w.word[1 + n]
                assert n + begun.sum() + 2 > most  # and would not fit


def test_the_first_token_of_a_word_carries_its_tag_or_all_do(tokenizer):
    row = {"tokens": WORDS, "tags": TAGS}
    (first,) = how().encode(tokenizer, [row], ["row 1"])
    assert [NAMES[t] for t in first.targets] == TAGS
    (found,) = tags.in_words(tokenizer, [WORDS], 0)
    assert np.bincount(found.word[found.word >= 0]).max() > 1
    np.testing.assert_array_equal(np.flatnonzero(first.trained), [list(found.word).index(i) for i in range(len(WORDS))])
    (every,) = how(subwords="all").encode(tokenizer, [row], ["row 1"])
    np.testing.assert_array_equal(every.trained, found.word >= 0)
    for whole, subwords in ((first, "first"), (every, "all")):
        (short,) = how(subwords=subwords, max_length=7).encode(tokenizer, [row], ["row 1"])
        assert short.lost == len(whole.targets) - len(short.targets) > 2 and (whole.lost, whole.whole) == (
            0,
            short.whole,
        )
    for word, name in enumerate(TAGS):
        mine = [NAMES[t] for t in every.targets[found.word[found.word >= 0] == word]]
        inside = "I-person" if name == "B-person" else name  # there is no I-place
        assert mine == [name] + [inside] * (len(mine) - 1)


def test_tags_are_in_order_and_rows_may_lack_them(tokenizer, shared):
    table = read_table(str(shared / "data/wnut17/train.conll"))
    names = tags.in_order(labelled.label_names(table, "tags", several=True))
    assert names[0] == "O" and len(names) == 13
    assert names[1:3] == ("B-corporation", "I-corporation")
    (example,) = how(label="").encode(tokenizer, [{"tokens": WORDS}], ["row 1"])
    assert not example.targets.any() and len(example.targets) == len(WORDS)


def test_rows_that_cannot_be_used_are_told(tokenizer):
    def fails(match, row):
        with pytest.raises(FtjaxError, match=match):
            how().encode(tokenizer, [{"tokens": WORDS, "tags": TAGS}, row], ["a row 1", "a row 2"])

    fails("a row 2: .*expected 2 tags", {"tokens": ["a", "b"], "tags": ["O"]})
    fails("a row 2: .*'B-persn'.*B-person", {"tokens": ["a"], "tags": ["B-persn"]})
    fails("a row 2: .*expected a list of words", {"tokens": "a b", "tags": ["O", "O"]})
    fails("a row 2: the tokenizer makes no token", {"tokens": ["\u200b"], "tags": ["O"]})
    with pytest.raises(FtjaxError, match="expected tags.*'NOUN'"):
        tags.in_order({"O", "NOUN"})
