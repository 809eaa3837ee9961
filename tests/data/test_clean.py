"""Cleaning: every row kept or removed with its reason, edits that reach all text and nothing else, and no surprises."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import mapped, table

from ftjax import config
from ftjax.data import template, verbs
from ftjax.data.clean import RULES, clean, records, whitespace
from ftjax.data.compared import sides
from ftjax.data.read import read_table
from ftjax.data.similar import normalise, shingles
from ftjax.errors import FtjaxError


def asked(**fields):
    group = config.default().data.clean
    for key, value in fields.items():
        setattr(group, key, value)
    return group


def answers(row, place):
    rendered = template.renderer("prompt")(row, place)
    return rendered.prompt, template.reference(rendered)


def pairs(*rows):
    return table([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def rows(cleaned):
    return list(cleaned.table)


# ---------------------------------------------------------------------------------------------- what holds always

ALL = dict(unicode="NFKC", mojibake=True, whitespace=True, control=True, exact=True, near=0.8, personal="mask")
ALL |= dict(empty=True, min_chars=2, max_chars=200, max_ratio=20.0, drop=(r"^spam\b",))
PIECES = [
    "a",
    "the cat sat on the mat",
    "clichÃ©s",
    "é",
    "e\u0301",
    "\u200b",
    "\x07",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
]
PIECES += [
    "me@x.org",
    "+1 415 555 2671",
    "spam",
    "ﬁne",
    "\xa0",
    "Â",
    "Ã",
    "©",
    "€",
    "â",
    "\x80",
    "\x99",
    "👨\u200d👩",
    "x" * 80,
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=12), st.sampled_from(["mask", "drop", "keep"]))
def test_rows_are_kept_or_removed_once_and_cleaning_again_changes_nothing(drawn, personal):
    # A last row that no rule removes, for a set that comes out empty is refused.
    given_rows = pairs(*drawn, ("what is it then", "an answer of its own"))
    group = asked(**{**ALL, "personal": personal})
    cleaned = clean(given_rows, group, answers)
    gone = [r.index for r in cleaned.removed]
    assert sorted([*(cleaned.table.number - 1).tolist(), *gone]) == list(range(len(given_rows)))
    assert all(r.why and r.place == f"t.jsonl row {r.index + 1}" for r in cleaned.removed)
    kept = {cleaned.table.place(i) for i in range(len(cleaned.table))}
    assert all(r.twin in kept for r in cleaned.removed if r.twin and r.rule == "near")
    again = clean(cleaned.table, group, answers)
    assert not again.removed and not any(again.changed.values())
    assert rows(again) == rows(cleaned)
    assert clean(given_rows, group, answers)[1:] == cleaned[1:]


def test_nothing_is_touched_by_default(shared):
    group = asked()
    assert not any(rule.on(group) for rule in RULES)
    given_rows = read_table(str(shared / "data/instruct/dolly_hhrlhf_train_small.jsonl"))
    cleaned = clean(given_rows, group)
    assert cleaned.table is given_rows and cleaned.removed == [] and cleaned.changed == {}


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_and_files_on_disk_change_nothing(monkeypatch, tmp_path, chunk):
    given_rows = pairs(*[(f" what  is {i % 7}", f"it is {i % 5} me@x.org") for i in range(20)], ("", ""))
    group = asked(**ALL)
    expected = clean(given_rows, group, answers)
    monkeypatch.setattr("ftjax.data.table.CHUNK", chunk)
    found = clean(given_rows, group, answers, str(tmp_path))
    assert (found.removed, found.changed, rows(found)) == (expected.removed, expected.changed, rows(expected))
    assert {file.parent for file in mapped(found.table)} == {tmp_path} and not mapped(expected.table)


# ---------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize(
    "fields, before, after",
    [
        ({"unicode": "NFC"}, "e\u0301ﬁ", "éﬁ"),
        ({"unicode": "NFKC"}, "e\u0301ﬁ\xa0½", "éfi 1⁄2"),
        ({"mojibake": True}, "the clichÃ©s donâ€™t", "the clichés don’t"),
        ({"mojibake": True}, "clichés — naïve façade", "clichés — naïve façade"),
        ({"control": True}, "a\x00b\u200bc\x1b d\te\nf\r\n", "abc d\te\nf\r\n"),
        ({"whitespace": True}, " \na \t b  \r\n\n\n\nc\xa0\u3000d \n", "a b\n\nc d"),
        ({"personal": "mask"}, "write to me@x.org", "write to [EMAIL]"),
        # Each edit sees what the others made of the text, also one before it in the table.
        ({"control": True, "mojibake": True}, "clichÃ\u200b©s", "clichés"),
        ({"control": True, "unicode": "NFC"}, "e\u200b\u0301", "é"),
        ({"whitespace": True, "personal": "mask", "control": True}, "m\x07e@x.org", "[EMAIL]"),
    ],
)
def test_an_edit_does_what_it_says(fields, before, after):
    cleaned = clean(table([{"text": before}, {"text": "same"}]), asked(**fields))
    assert rows(cleaned) == [{"text": after}, {"text": "same"}]
    assert set(cleaned.changed.values()) <= {0, 1} and sum(cleaned.changed.values()) >= (before != after)


def test_whitespace_keeps_code_and_the_ends_that_join_prompt_and_answer():
    code = "def f(x):\n    if  x:\n\n\n\n        return   1   \n"
    assert whitespace(code) == "def f(x):\n    if x:\n\n        return 1"
    assert whitespace("    one()\n    two()") == "    one()\n    two()"
    cleaned = clean(pairs(("Say  it:\n", " well ,  now\n"), ("  ", "x")), asked(whitespace=True))
    assert [tuple(row.values()) for row in rows(cleaned)] == [("Say it:\n", " well , now\n"), ("  ", "x")]


def test_edits_reach_nested_text_and_leave_keys_roles_and_numbers():
    row = {
        "messages": [{"role": " user ", "content": " a  b "}, {"role": "assistant", "content": None}],
        "conversations": [{"from": " gpt ", "value": " c  d "}],
        "words": [[" e "], []],
        "n": 3,
        "none": None,
        " key ": {" inner ": " f "},
        "mixed": 1,
    }
    rows_given = [row, {**row, "mixed": [" x ", {"role": " r "}]}]
    given_rows = table(rows_given)
    cleaned = clean(given_rows, asked(whitespace=True))
    expected = {
        "messages": [{"role": " user ", "content": "a b"}, {"role": "assistant", "content": None}],
        "conversations": [{"from": " gpt ", "value": "c d"}],
        "words": [["e"], []],
        "n": 3,
        "none": None,
        " key ": {" inner ": "f"},
        "mixed": 1,
    }
    assert rows(cleaned) == [expected, {**expected, "mixed": ["x", {"role": " r "}]}]
    assert cleaned.changed == {"whitespace": 2} and cleaned.table.columns == given_rows.columns
    assert cleaned.table.cells.schema == given_rows.cells.schema


# ---------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    "fields, row, rule, why",
    [
        ({"empty": True}, ("p", "  "), "empty", "t.jsonl row 2: the answer is empty"),
        ({"empty": True}, (None, "a"), "empty", "t.jsonl row 2: column 'prompt' is null"),
        ({"min_chars": 4}, ("p", "  abc  "), "min_chars", "an answer of 3 characters, fewer than 4"),
        ({"max_chars": 40}, ("p" * 20, "a" * 20), "max_chars", "41 characters, more than 40"),
        ({"max_ratio": 2.5}, ("pppp", "a" * 11), "max_ratio", "an answer of 11 characters, more than 2.5 x 4"),
        ({"max_ratio": 2.5}, ("", "a"), "max_ratio", "an answer of 1 characters, more than 2.5 x 0"),
        ({"personal": "drop"}, ("me@x.org", "call +1 415 555 2671"), "personal", "personal data: email, phone"),
        ({"drop": ("z", "^bad$")}, ("good\nbad", "a"), "drop", "'^bad$' matches 'bad'"),
        ({"exact": True}, ("What IS it?", " fine thanks."), "exact", "the same text"),
    ],
)
def test_a_filter_removes_its_row_and_says_why(fields, row, rule, why):
    good = ("what is it", "fine, thanks")
    cleaned = clean(pairs(good, row), asked(**fields), answers)
    assert rows(cleaned) == [{"prompt": good[0], "completion": good[1]}]
    (removed,) = cleaned.removed
    assert removed.rule == rule and removed.why.startswith(why) and removed.place == "t.jsonl row 2"
    assert removed.twin == ("t.jsonl row 1" if rule == "exact" else "")


def test_rows_of_no_known_form_are_empty_without_text():
    given_rows = table([{"label": "1", "sentence": " "}, {"label": "0", "sentence": "good"}])
    assert len(clean(given_rows, asked(empty=True)).removed) == 0
    (removed,) = clean(given_rows, asked(empty=True, columns=("sentence",))).removed
    assert (removed.place, removed.why) == ("t.jsonl row 1", "no text")


def test_what_was_removed_can_be_put_back():
    given_rows = pairs(("q", " a  answer "), ("q", "a answer"), ("me@x.org", "b"), ("q2", "c"))
    cleaned = clean(given_rows, asked(whitespace=True, exact=True, personal="drop"), answers)
    written = [json.loads(json.dumps(record)) for record in records(given_rows, cleaned.removed)]
    assert [w["place"] for w in written] == ["t.jsonl row 2", "t.jsonl row 3"]
    assert [w["row"] for w in written] == list(given_rows.select([1, 2]))
    assert written[0]["twin"] == "t.jsonl row 1" and written[1]["why"] == "personal data: email"


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"drop": ("fine", "a(b")}, "data.clean.drop: 'a(b' is not a regular expression"),
        ({"drop": ("[[a]",)}, "data.clean.drop: '[[a]' is not a regular expression: Possible nested set"),
        ({"exact": True, "columns": ("sentense",)}, "data.clean.columns: no column 'sentense' (did you mean \"sente"),
        (
            {"min_chars": 3},
            "data.clean.min_chars needs the answer of each row, and no known form fits the columns label",
        ),
        ({"max_ratio": 3.0}, "data.clean.max_ratio needs the answer of each row"),
        (
            {"max_chars": 1},
            "data.clean: the rules removed all 2 rows, for example t.jsonl row 1 by 'max_chars': 9 characters, more",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(fields, told):
    given_rows = table([{"label": "1", "sentence": "one two"}, {"label": "0", "sentence": "other"}])
    with pytest.raises(FtjaxError) as error:
        clean(given_rows, asked(**fields))
    assert told in str(error.value)


def test_the_config_refuses_what_needs_no_file():
    for override, told in [
        ("data.clean.drop=('a(b',)", "data.clean.drop: 'a(b' is not a regular expression"),
        ("data.clean.parts=('train', 'dev')", "data.clean.parts, entry 2: expected one of train, validation, test"),
        ("data.clean.min_chars=-1", "data.clean.min_chars: expected a whole number at least 0"),
        ("data.clean.near=1.5", "data.clean.near: expected a number at least 0 and at most 1"),
    ]:
        with pytest.raises(FtjaxError) as error:
            config.override(config.default(), [override])
        assert told in str(error.value)


def test_the_rows_that_go_are_the_right_ones_beyond_a_chunk():
    given_rows = table([{"text": f"row {i}"} for i in range(2500)])
    cleaned = clean(given_rows, asked(drop=(r"\b(7|999|1000|2499)$",)))
    assert [r.place for r in cleaned.removed] == [f"t.jsonl row {i}" for i in (8, 1000, 1001, 2500)]
    assert [record["row"]["text"] for record in records(given_rows, cleaned.removed)][1:3] == ["row 999", "row 1000"]
    assert cleaned.table.row(1000)["text"] == "row 1003" and cleaned.table.place(1000) == "t.jsonl row 1004"


# ---------------------------------------------------------------------------------------------- duplicates


def jaccard(a, b):
    a, b = shingles(normalise(a)), shingles(normalise(b))
    return len(a & b) / len(a | b)


def test_of_near_duplicates_the_first_stays_and_those_like_it_go():
    words = [f"w{i}" for i in range(40)]
    chain = [
        " ".join(words[: 40 - 4 * k]) for k in range(4)
    ]  # each 0.9 like the one before, the third not like the first
    cleaned = clean(table([{"text": text} for text in [*chain, chain[1], "other"]]), asked(near=0.85))
    assert [r.index for r in cleaned.removed] == [1, 3, 4]
    assert [(r.rule, r.twin) for r in cleaned.removed] == [
        ("near", "t.jsonl row 1"),
        ("near", "t.jsonl row 3"),
        ("exact", "t.jsonl row 2"),
    ]


def test_near_duplicates_in_gsm8k_are_removed_and_nothing_else(shared):
    given_rows = read_table(str(shared / "data/gsm8k/test.jsonl"))
    rows_given = list(given_rows)
    rng = np.random.default_rng(0)
    copies = []
    for i in rng.choice(len(rows_given), 100, replace=False):
        words = rows_given[i]["question"].split(" ")
        words.insert(int(rng.integers(len(words))), "really")
        copies.append({**rows_given[i], "question": " ".join(words)})
    texts = ["\n".join(row.values()) for row in rows_given + copies]
    cleaned = clean(table(rows_given + copies), asked(near=0.8))
    for r in cleaned.removed:
        twin = int(r.twin.removeprefix("t.jsonl row ")) - 1
        assert twin < r.index and jaccard(texts[twin], texts[r.index]) >= 0.8
    gone = {r.index for r in cleaned.removed}
    assert len(gone & set(range(len(rows_given), len(texts)))) >= 98
    assert len(gone & set(range(len(rows_given)))) <= 2


def test_a_label_noise_pair_is_no_duplicate_unless_columns_say_so(shared):
    sst2 = read_table(str(shared / "data/sst2/dev.tsv"))
    rows_given = list(sst2)
    flipped = [{**row, "label": str(1 - int(row["label"]))} for row in rows_given[:50]]
    both = table(rows_given + flipped)
    assert len(clean(both, asked(exact=True)).removed) == 0
    removed = clean(both, asked(exact=True, columns=("content",))).removed
    assert [r.index for r in removed] == list(range(872, 922))
    assert Counter(r.rule for r in removed) == {"exact": 50}


def test_duplicates_are_judged_by_what_the_model_reads_and_says_and_conflicts_stay():
    rows_given = [
        {"id": "a one", "text": "The same text.", "label": 1},
        {"id": "b two", "text": "the same text", "label": 0},
        {"id": "c three", "text": "the SAME text", "label": 1.0},
        {"id": "d four", "text": "another text", "label": 1},
    ]
    c = config.default()
    c.task.kind = "classify"
    by = sides(c.data, ["id", "text", "label"], c.task)
    cleaned = clean(table(rows_given), asked(exact=True), by=by)
    assert [(r.index, r.twin) for r in cleaned.removed] == [(2, "t.jsonl row 1")]
    assert cleaned.conflict == (
        "1 rows have the text of another row and another label, and stay: t.jsonl row 2 ('0') and t.jsonl row 1 ('1')"
    )
    answered = [{"id": f"{i} it", "prompt": "Who?", "completion": text} for i, text in enumerate(["I.", "You.", "i"])]
    by = sides(c.data, ["id", "prompt", "completion"])
    assert [r.index for r in clean(table(answered), asked(exact=True), by=by).removed] == [2]


def test_a_command_that_is_stopped_leaves_no_part_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"src": "a {i}", "tgt": "b {i}"}}\n' for i in range(30)))
    c, lines = config.default(), []
    c.data.update(train=str(tmp_path / "rows.jsonl"), validation="", test="", split=(0.8, 0.1, 0.1))

    def stopped(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(verbs, "write_jsonl", stopped)
        with pytest.raises(KeyboardInterrupt):
            verbs.write("split", c, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    (tmp_path / ".out.ftjax.part").mkdir()  # of a process that was killed
    (tmp_path / ".out.ftjax.part" / "train.jsonl").write_text("{")
    verbs.write("split", c, str(tmp_path / "out"), say=lines.append)
    assert lines[0] == f"{tmp_path / 'out' / 'train.jsonl'}: 24 rows" and not (tmp_path / ".out.ftjax.part").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    with pytest.raises(FtjaxError, match="already exists and is not empty"):
        verbs.write("split", c, str(tmp_path / "out"))
