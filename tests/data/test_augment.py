"""Augmentation: rows as they were, then marked synthetic ones that keep label and answer, each by its own seed."""

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import table

from ftjax import config
from ftjax.data.augment import KEPT, KEYS, MARK, OPS, PROMPT, TYPOS, augment
from ftjax.data.read import read_table
from ftjax.errors import FtjaxError


def asked(data=None, **fields):
    group = config.default().data
    group.update(data or {})
    group.augment.update(fields)
    return group


def rows(augmented):
    return list(augmented.table)


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    "file, column, label",
    [("sst2/dev.tsv", "content", "label"), ("gsm8k/test.jsonl", "question", ""), ("dolly", "prompt", "")],
)
def test_originals_come_first_and_synthetic_rows_keep_all_but_the_named_column(shared, file, column, label):
    file = file.replace("dolly", "instruct/dolly_hhrlhf_train_small.jsonl")
    given_rows = read_table(str(shared / "data" / file)).select(range(0, 800, 2))
    found = augment(given_rows, asked({"label": label}, copies=2, columns=(column,)), seed=0)
    n = len(given_rows)
    originals, synthetic = rows(found)[:n], rows(found)[n:]
    assert originals == [{**row, MARK: None} for row in given_rows]
    assert len(synthetic) + sum(found.failed.values()) == 2 * n
    assert Counter(row[MARK] for row in synthetic) == found.made and set(found.made) == set(OPS)
    assert len(synthetic) > 1.98 * n
    of_place = {given_rows.place(i): originals[i] for i in range(n)}
    for i, row in enumerate(synthetic, n):
        origin = of_place[found.table.place(i)]
        assert {**row, column: None, MARK: None} == {**origin, column: None}
        assert row[column] != origin[column] and row[column].strip()
        kept, now = ([w for w in text[column].lower().split() if KEPT.search(w)] for text in (origin, row))
        assert kept == now
    texts = [(found.table.place(i), row[column]) for i, row in enumerate(synthetic, n)]
    assert len(set(texts)) == len(texts)


def test_every_row_has_noise_of_its_own_by_seed_and_place():
    texts = [{"text": f"the quick brown fox number {i} jumps over the lazy dog"} for i in range(30)]
    data = asked({"label": "none"}, copies=3, columns=("text",))
    given_rows = table(texts)

    def made(some, seed=0):
        found = augment(some, data, seed).table
        synthetic = [(found.place(i), found.row(i)) for i in range(len(some), len(found))]
        return {place: [row for p, row in synthetic if p == place] for place, _ in synthetic}

    whole = made(given_rows)
    assert made(given_rows) == whole and made(given_rows, seed=1) != whole
    some = made(given_rows.select([3, 17, 29]))
    assert some == {place: whole[place] for place in some} and len(some) == 3
    assert sum(map(len, whole.values())) == 90


def test_files_on_disk_and_chunks_change_nothing(tmp_path, shared):
    given_rows = read_table(str(shared / "data/gsm8k/test.jsonl"))
    prompts = asked({"prompt": "{question}", "completion": "{answer}"}, copies=1, prompts=("Q: {question}",))
    prompts.augment.columns = ("question",)
    in_memory, on_disk = (augment(given_rows, prompts, 0, folder) for folder in (None, str(tmp_path)))
    assert len(in_memory.table) > 3 * 1300 and rows(in_memory) == rows(on_disk)
    assert list(tmp_path.iterdir()) and in_memory[1:] == on_disk[1:]


def test_what_cannot_be_altered_is_counted_and_not_doubled():
    given_rows = table(
        [{"text": "word", "y": 0}, {"text": None, "y": 1}, {"text": "", "y": 0}, {"text": "7 8", "y": 0}]
    )
    data = asked({"label": "y"}, copies=2, columns=("text",), ops=("word_dropout",))
    found = augment(given_rows, data, 0)
    assert (found.made, found.failed) == ({}, {"word_dropout": 8}) and len(found.table) == 4
    assert found.table is given_rows
    few = augment(table([{"text": "ab cd", "y": 0}]), asked({"label": "y"}, **{**data.augment, "copies": 5}), 0)
    assert (few.made, few.failed) == ({"word_dropout": 2}, {"word_dropout": 3})
    assert sorted(row["text"] for row in rows(few)) == ["ab", "ab cd", "cd"]


def test_off_means_the_same_table():
    given_rows = table([{"text": "a"}])
    assert augment(given_rows, asked(), 0) == (given_rows, {}, {})


def test_prompts_make_a_copy_of_every_row_each():
    given_rows = table([{"q": f"what {i}", "a": f"that {i}"} for i in range(3)])
    templates = ("Q: {q}\nA:", "{q}?")
    data = asked({"prompt": "{q}\n", "completion": " {a}"}, prompts=templates)
    found = augment(given_rows, data, 0)
    expected = [{**row, MARK: None, PROMPT: None} for row in given_rows]
    expected += [{**row, MARK: "prompt", PROMPT: t} for row in given_rows for t in templates]
    assert rows(found) == expected and found.made == {"prompt": 6}
    assert found.table.number.tolist() == [1, 2, 3, 1, 1, 2, 2, 3, 3]


# ---------------------------------------------------------------------------------------------- ops


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from(["not", "3.5", "film", "a", "Über", "don't", "  "])).map(" ".join),
    op=st.sampled_from(sorted(OPS)),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_ops_never_empty_a_text_and_leave_numbers_negations_and_spaces(text, op, rate, seed):
    found, again = (OPS[op](text, rate, np.random.default_rng(seed)) for _ in range(2))
    assert found == again
    assert bool(found.strip()) == bool(text.strip())
    before, after = text.split(), found.split()
    fixed = [word for word in before if KEPT.search(word)]
    if op != "char_noise":  # which may type such a word by chance
        assert [w.casefold() for w in after if KEPT.search(w)] == [w.casefold() for w in fixed]
    if op == "word_dropout":
        remaining = iter(before)
        assert all(word in remaining for word in after)  # in their order
        assert len(before) - len(after) <= max(1, round(rate * len(before)))
    if op == "word_swap":
        assert Counter(after) == Counter(before)
        assert sum(a != b for a, b in zip(before, after)) <= 2 * max(1, round(rate * len(before)))
    if op == "case":
        assert found.casefold() == text.casefold() or not text.isascii()
    if op == "char_noise":
        assert len(after) == len(before)
        assert all(a == b for a, b in zip(before, after) if KEPT.search(a))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_the_rate_is_the_share_that_is_touched(shared, rate):
    texts = [row["sentence"] for row in read_table(str(shared / "data/sst2/train.tsv")).select(range(2000))]
    words = [t for t in texts if len(t.split()) >= 15 and not any(KEPT.search(w) for w in t.split())]
    assert len(words) > 100
    lost = sum(
        len(t.split()) - len(OPS["word_dropout"](t, rate, np.random.default_rng(i)).split())
        for i, t in enumerate(words)
    )
    assert lost == pytest.approx(rate * sum(len(t.split()) for t in words), rel=0.05)


def test_typing_errors_are_of_four_kinds_and_within_words():
    found = Counter()
    for seed in range(400):
        word = OPS["char_noise"]("wonderful", 0.0, np.random.default_rng(seed))
        assert word[0] == "w" and word[-1] == "l"
        found[len(word) - 9, sorted(word) == sorted("wonderful")] += 1
    assert len(TYPOS) == 4 and set(found) == {(-1, False), (1, False), (0, True), (0, False)}
    assert min(found.values()) > 60
    assert set(KEYS["s"]) == set("awedzx") and set(KEYS["q"]) == set("wa") and set(KEYS["m"]) == set("njk")


def test_words_that_turn_a_sentence_round_stay():
    kept = ["not", "No,", "never", "n't", "don’t", "can't", "cannot", "3", "x2", "«nicht-7»", "NOR"]
    free = ["note", "now", "nothings", "ant", "want", "knot", "tin", "film"]
    assert all(map(KEPT.search, kept)) and not any(map(KEPT.search, free))


# ---------------------------------------------------------------------------------------------- the user's function

FUNCTION = """
def shout(row, rng):
    return {**row, "text": row["text"].upper() + "!" * int(rng.integers(1, 100))}

def some(row, rng):
    row["text"] += " indeed"
    return row if row["y"] else None

def broken(row, rng):
    if row["y"] == 2:
        return {}["nothing"]
    return {**row, "text": row["text"] + "."}

def tuples(row, rng):
    return {**row, "l": [(1, 2)]}


def numbered(row, rng):
    return {**row, "l": {1: "one"}}


def wrong(row, rng):
    return {0: "text", 1: {**row, "more": 1}, 2: {**row, "y": "two"}, 3: {**row, "y": 0.5}}[row["y"]]
"""


@pytest.fixture
def function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTION)
    return lambda name, **fields: asked({"label": "y"}, function=f"{file}:{name}", **{"copies": 1, "ops": (), **fields})


def labelled(n=3, start=0):
    return table([{"text": f"row {i}", "y": i} for i in range(start, start + n)])


def test_a_function_makes_rows_alone_or_in_turn_with_the_ops(function):
    found = augment(labelled(), function("shout", copies=2), 0)
    assert found.made == {"function": 6} and all(row["text"].startswith("ROW") for row in rows(found)[3:])
    assert len({row["text"] for row in rows(found)[3:]}) == 6
    both = augment(labelled(8), function("shout", ops=("case",), columns=("text",)), 0)
    assert both.made == {"function": 4, "case": 4}
    assert [row[MARK] for row in rows(both)[8:]] == ["function", "case"] * 4


def test_a_function_may_make_no_row_and_cannot_change_the_original(function):
    found = augment(labelled(), function("some"), 0)
    assert (found.made, found.failed) == ({"function": 2}, {"function": 1})
    assert [row["text"] for row in rows(found)] == ["row 0", "row 1", "row 2", "row 1 indeed", "row 2 indeed"]


def test_an_error_in_a_function_names_row_and_line_and_keeps_its_cause(function):
    with pytest.raises(
        FtjaxError, match=r"t.jsonl row 3: .*mine.py:broken' failed at line 11: KeyError: 'nothing'"
    ) as e:
        augment(labelled(), function("broken"), 0)
    assert isinstance(e.value.__cause__, KeyError) and e.value.__cause__.__traceback__


def test_rows_with_lists_of_another_program_are_augmented_too(function, tmp_path):
    given_rows = [{"text": f"row {i}", "y": i, "tags": ["a", "b"][:i], "o": {"k": [i]}} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given_rows), tmp_path / "t.parquet")
    read = read_table(str(tmp_path / "t.parquet"))
    for folder in (None, tmp_path):
        found = augment(read, function("shout"), 0, folder)
        assert [found.table.row(i) for i in range(3)] == [row | {MARK: None} for row in given_rows]
        assert [found.table.row(i)["tags"] for i in range(3, 6)] == [[], ["a"], ["a", "b"]]
        assert found.table.place(5) == read.place(2)


def test_a_list_that_would_change_as_it_is_stored_is_refused(function):
    listed = table([{"text": "a", "y": 0, "l": [1, 2]}])
    for name in ("tuples", "numbered"):
        with pytest.raises(FtjaxError, match="column 'l' has the type .*, which cannot store"):
            augment(listed, function(name), 0)


@pytest.mark.parametrize(
    "y, told",
    [
        (0, "returned str; expected a row (a dict), or None for no row"),
        (1, "must have the same columns as the row it received; different: more"),
        (2, "column 'y' has the type int64, which cannot store 'two'"),
        (3, "column 'y' has the type int64, which cannot store 0.5"),
    ],
)
def test_what_a_function_returns_must_be_a_row(function, y, told):
    with pytest.raises(FtjaxError) as error:
        augment(labelled(1, start=y), function("wrong"), 0)
    assert "t.jsonl row 1: data.augment.function" in str(error.value) and told in str(error.value)


@pytest.mark.parametrize(
    "named, told",
    [
        ("mine.py", "expected \"file.py:name\"; 'mine.py' is not a file"),
        ("gone.py:f", "'gone.py' is not a file"),
        ("{}/mine.py:shuot", "has no function 'shuot' (did you mean \"shout\"?)"),
        ("{}/bad.py:f", "failed at line 2: ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_told(function, tmp_path, named, told):
    (tmp_path / "bad.py").write_text("\n1 / 0\n")
    data = function("shout")
    data.augment.function = named.format(tmp_path)
    with pytest.raises(FtjaxError) as error:
        augment(labelled(), data, 0)
    assert told in str(error.value)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "data, fields, told",
    [
        (
            {},
            {"copies": 1},
            "data.augment.columns is empty: name the columns whose text may be changed, some of q, a, n",
        ),
        ({}, {"copies": 1, "columns": ("quest",)}, "data.augment.columns: no column 'quest'"),
        ({}, {"copies": 1, "columns": ("q",), "ops": ("swap",)}, "data.augment.ops: unknown operation 'swap'"),
        ({}, {"copies": 1, "ops": ()}, "data.augment.copies needs a way to make the copies"),
        ({}, {"copies": 1, "columns": ("q", "n")}, "t.jsonl row 1: data.augment.columns: expected text in column 'n'"),
        ({"label": "a"}, {"copies": 1, "columns": ("a",)}, "data.augment.columns: 'a' holds answers or labels"),
        ({"stratify": "a"}, {"copies": 1, "columns": ("a",)}, "'a' holds answers or labels"),
        ({"prompt": "{q}", "completion": " {a}"}, {"copies": 1, "columns": ("a",)}, "'a' holds answers or labels"),
        ({}, {"prompts": ("{q}",)}, "data.augment.prompts adds templates to data.prompt, which is empty"),
        ({"prompt": "{q}", "completion": "{a}"}, {"prompts": ("{x}",)}, "data.augment.prompts: no column 'x'"),
        (
            {"prompt": "{q}", "completion": "{a}"},
            {"prompts": ("{q}",)},
            "data.augment.prompts: the template '{q}' occurs twice",
        ),
        ({"prompt": "{q}", "completion": "{a}"}, {"prompts": ("-{q}", "-{q}")}, "the template '-{q}' occurs twice"),
        ({"prompt": "{q}", "completion": "{a}"}, {"prompts": ("{q",)}, "data.augment.prompts: '{q'"),
    ],
)
def test_what_cannot_be_met_is_refused(data, fields, told):
    with pytest.raises(FtjaxError) as error:
        augment(table([{"q": "what is it", "a": "that", "n": 3}]), asked(data, **fields), 0)
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["completion", "response", "output", "answer", "left", "chosen", "text"])
def test_answers_by_convention_are_refused_too(name):
    with pytest.raises(FtjaxError, match="holds answers or labels"):
        augment(table([{name: "some text"}]), asked(copies=1, columns=(name,)), 0)


@pytest.mark.parametrize(
    "kind, label, text", [("classify", "label", "text"), ("span", "answers", "question"), ("embed", "", "answer")]
)
def test_of_labelled_rows_the_label_is_kept_and_every_text_may_change(kind, label, text):
    task = config.default().task
    task.kind = kind
    data = table([{text: "some words to swap", **({label: "five of five"} if label else {})}])
    found = augment(data, asked(copies=1, columns=(text,), ops=("word_swap",)), 0, task=task)
    assert len(rows(found)) == 2 and rows(found)[1][text] != "some words to swap"
    if label:
        with pytest.raises(FtjaxError, match=f"'{label}' holds answers or labels"):
            augment(data, asked(copies=1, columns=(label,)), 0, task=task)


def test_rows_that_were_augmented_before_are_refused():
    once = augment(table([{"text": "some words", "y": 0}]), asked({"label": "y"}, copies=1, columns=("text",)), 0)
    assert json.loads(json.dumps(rows(once)))[1][MARK] in OPS
    with pytest.raises(FtjaxError, match="already have a column 'augmented'"):
        augment(once.table, asked({"label": "y"}, copies=1, columns=("text",)), 0)
