"""The preview: what it shows is what stands in the batches' arrays, token for token."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from ftjax import config as configs
from ftjax.assets import resolve
from ftjax.data import preview, verbs
from ftjax.data.batches import Batches
from ftjax.data.template import Rendered
from ftjax.data.tokenise import encode

DATA = SimpleNamespace(train=SimpleNamespace(place=lambda i: f"a<b>.jsonl row {i + 1}", recipe=lambda i: None))
TEXTS = [
    ("Once", " upon a time."),
    ("Größe: ", "🙂 & 日本語"),
    ("<script>alert(1)</script>", "\n\n</p>\t<b>"),
    ("a\x1b[2Jb", " \u202eright \u200bto left"),
    ("", "all of it"),
]


@pytest.fixture(params=["starter", "qwen3"], scope="module")
def tokenizer(request, shared):
    starter = request.param == "starter"
    return AutoTokenizer.from_pretrained(
        resolve("builtin:stories260K") if starter else shared / "tokenizers" / request.param
    )


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def batches(request, tokenizer):
    examples = encode([Rendered(*text) for text in TEXTS], tokenizer)
    return Batches(examples, 4, 96, packing=request.param, seed=3)


class Page(HTMLParser):
    """The spans of a page, by row and section: (title, whether trained, text)."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.open = [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag == "div":
            self.rows.append([])
        elif tag == "section":
            self.rows[-1].append([])
        elif tag == "span" and "title" in attributes:
            self.open = [attributes["title"], attributes.get("class") == "trained", ""]
            self.rows[-1][-1].append(self.open)

    def handle_endtag(self, tag):
        self.open = None if tag == "span" else self.open

    def handle_data(self, text):
        if self.open:
            self.open[2] += text


def test_the_page_holds_the_batches(tokenizer, batches):
    text = preview.html(DATA, batches, tokenizer, count=99)
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags and "a&lt;b&gt;.jsonl row 1" in text
    expected = [
        (batch, b, members)
        for step in range(len(batches))
        for batch, rows in [(batches[step], batches.rows(step))]
        for b, members in enumerate(rows)
        if len(members)
    ]
    for row, (batch, b, members) in zip(page.rows, expected, strict=True):
        segments = batch["segment_ids"][b]
        sizes = [int((segments == k).sum()) for k in (*range(1, len(members) + 1), 0)]
        assert [len(section) for section in row] == [size for size in sizes if size]
        spans = [span for section in row for span in section]
        assert [int(title.split()[1]) for title, _, _ in spans] == batch["tokens"][b].tolist()
        labels = {
            int(i) + 1: int(t) for i, t, w in zip(*(batch[n][b] for n in ("loss_index", "labels", "weights"))) if w
        }
        assert {k: int(title.split()[1]) for k, (title, trained, _) in enumerate(spans) if trained} == labels
        for member, section in zip(members, row):
            shown = "".join(shown for _, _, shown in section).replace("↵\n", "\n").replace("·", "")
            ids = batches.examples[member].ids
            assert shown == preview.visible(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            assert [f"position {k}, column" in title for k, (title, _, _) in enumerate(section)] == [True] * len(
                section
            )


def test_rows_in_the_terminal(tokenizer, batches):
    shown = preview.rows(DATA, batches, tokenizer, count=99, ids=True, colour=False)
    assert "\x1b" not in shown and "\u202e" not in shown and "<U+001B>[2J" in shown and "<U+200B>" in shown
    assert "[[ upon a time." in shown and shown.count("── a<b>.jsonl row ") == len(TEXTS)
    for example in batches.examples:
        ids, trained = list(map(str, example.ids)), example.trained
        assert (
            "ids: " + " ".join(filter(None, (*_group(ids, ~trained), f"[[{' '.join(_group(ids, trained))}]]"))) in shown
        )
    for step in range(len(batches)):
        padding = (batches[step]["segment_ids"] == 0).sum(1)
        for members, pad in zip(batches.rows(step), padding):
            assert not len(members) or f"and {pad} of padding" in shown
    assert preview.rows(DATA, batches, tokenizer, count=99, colour=True).count(preview.GREEN) == len(TEXTS)


def _group(ids, chosen):
    return [i for i, mine in zip(ids, chosen) if mine]


def test_as_many_rows_as_asked_for(tokenizer):
    examples = encode([Rendered("a", f" {k}") for k in range(9)], tokenizer)
    batches = Batches(examples, 4, 32)
    for count in (0, 1, 5, 9, 50):
        assert len(preview.views(batches, count)) == min(count, 9)
    assert sorted(int(i) for view in preview.views(batches, 50) for i in view.members) == list(range(9))


def test_pieces_of_a_text_make_up_the_text(tokenizer):
    for text in ("🙂🙃 naïve", "  two  spaces", "\ufffd and then", "日本語のテキスト", "a\ufffd"):
        ids = tokenizer(text)["input_ids"]
        assert "".join(preview.pieces(ids, tokenizer)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        cut = preview.pieces(ids[:-1], tokenizer)  # maybe within a character
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert len(cut) == len(ids) - 1 and whole.startswith("".join(cut).rstrip("\ufffd"))
    assert len(preview.pieces(np.arange(5).tolist(), tokenizer)) == 5 and preview.pieces([], tokenizer) == []


@pytest.mark.parametrize(
    "task, row, shown",
    [
        (
            {"kind": "preference", "loss": "kto"},
            {"prompt": "Who?", "completion": " Lily.", "label": False},
            ["2 segments (6 trained)", "undesirable", "Who?[[ Lily.</s>]]"],
        ),
        (
            {"kind": "reward"},
            {"prompt": "Who?", "chosen": " Lily.", "rejected": " Tim.", "margin": 0.5},
            ["2 segments (2 trained)", "margin 0.5", "<s> Who? Lily[[.]]</s><s> Who? Tim[[.]]</s>"],
        ),
        (
            {"kind": "policy"},
            {"prompt": "Who?", "answer": "Lily"},
            ["1 segment (0 trained)", "a prompt: what the model writes after it is trained", "<s> Who?\n"],
        ),
    ],
)
def test_what_is_trained_of_answers_rewards_and_prompts(task, row, shown, tmp_path):
    c = configs.default()
    c.task.update(task)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    c.data.update(train=str(tmp_path / "rows.jsonl"), split=(1.0, 0.0, 0.0), cache="")
    said = []
    verbs.show(c, 1, say=said.append)
    for text in shown:
        assert text in "\n".join(said)
