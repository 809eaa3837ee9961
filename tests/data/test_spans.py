"""Questions and texts as windows: against the tokenizer's own, and where answers lie in them."""

import json

import numpy as np
import pytest
from tiny_words import wordpiece
from transformers import AutoTokenizer

from ftjax.data import spans
from ftjax.data.labelled import Labelled
from ftjax.data.read import read_table
from ftjax.errors import FtjaxError


def how(**more) -> Labelled:
    return Labelled(**{"form": "span", "text": "question", "pair": "context", "label": "answers",
                       "names": ("start", "end"), "pool": "", "max_length": 96, "stride": 20} | more)  # fmt: skip


@pytest.fixture(scope="module")
def rows(shared):
    table = read_table(str(shared / "data/squad/dev-v1.1.json"))
    assert len(table) == 10570 and table.place(6).endswith("dev-v1.1.json row 7")
    return [table.row(i) for i in range(0, 10570, 60)]


@pytest.fixture(scope="module")
def tokenizer(rows):
    return wordpiece([row["context"] for row in rows], 2000)


@pytest.mark.parametrize("name", ["wordpiece", "gpt2", "qwen3"])
def test_windows_are_the_tokenizers_own(name, rows, tokenizer, shared):
    if name != "wordpiece":
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    places = [f"row {i}" for i in range(len(rows))]
    found = spans.windows(how(), tokenizer, rows, places)
    theirs = tokenizer(
        [row["question"] for row in rows], [row["context"] for row in rows], truncation="only_second", max_length=96,
        stride=20, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert len(found) == len(theirs["input_ids"]) > 2 * len(rows)
    for i, window in enumerate(found):
        assert window.ids.tolist() == theirs["input_ids"][i]
        assert window.row == theirs["overflow_to_sample_mapping"][i]
        text = np.array([side == 1 for side in theirs.sequence_ids(i)])
        np.testing.assert_array_equal(window.offsets[text], np.array(theirs["offset_mapping"][i])[text])
        assert (window.offsets[~text] == -1).all()
        types = np.array(theirs["token_type_ids"][i]) if name == "wordpiece" else np.zeros(len(window.ids))
        np.testing.assert_array_equal(types, (np.arange(len(types)) >= window.second) & (window.second > 0))


def test_targets_point_at_the_answer_in_each_window_that_has_it_whole(rows, tokenizer):
    places = [f"row {i}" for i in range(len(rows))]
    examples = how().encode(tokenizer, rows, places)
    windows = spans.windows(how(), tokenizer, rows, places)
    there = np.zeros(len(rows), int)
    for example, window in zip(examples, windows, strict=True):
        row = rows[window.row]
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0])
        (first, last), offsets = example.targets[0], window.offsets
        text = offsets[offsets[:, 1] >= 0]
        if start >= text[0, 0] and end <= text[-1, 1]:
            there[window.row] += 1
            # The fewest whole tokens around the answer.
            assert offsets[first, 0] <= start < offsets[first, 1] and offsets[last, 0] < end <= offsets[last, 1]
        else:
            assert (first, last) == (0, 0)
        assert np.flatnonzero(example.trained).tolist() == [0] and example.row == window.row
    assert (there >= 1).mean() > 0.99  # but for answers longer than the stride at the border of two windows
    assert there.max() > 1


def test_rows_that_cannot_be_used_are_told(rows, tokenizer, tmp_path):
    def fails(match, row, **more):
        with pytest.raises(FtjaxError, match=match):
            how(**more).encode(tokenizer, [rows[0] | row], ["a row 1"])

    fails("a row 1: .*the text holds .* at answer_start 3", {"answers": {"text": ["Panthers"], "answer_start": [3]}})
    fails("a row 1: .*expected answers as", {"answers": {"text": ["x"]}})
    fails("a row 1: .*holds no answer; set task.no_answer", {"answers": {"text": [], "answer_start": []}})
    fails("a row 1: the question leaves 13 of data.max_length=96 tokens", {"question": "who " * 80})
    fails("a row 1: column 'question' holds ''", {"question": ""})
    none = {"answers": {"text": [], "answer_start": []}}
    found = how(no_answer=True).encode(tokenizer, [rows[0] | none], ["a row 1"])
    assert not any(example.targets.any() for example in found)
    given = rows[0]["answers"]
    as_list = [{"text": t, "answer_start": s} for t, s in zip(given["text"], given["answer_start"], strict=True)]
    assert spans.answers(how(), {"answers": as_list}, "") == spans.answers(how(), {"answers": given}, "")

    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}))
    with pytest.raises(FtjaxError, match="squad.json row 1: expected SQuAD's layout.*question"):
        read_table(str(file))
