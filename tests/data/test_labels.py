"""Labels are values: which id each row gets, for every way in which people write labels, and what is refused."""

import json
import re

import datasets
import pytest

from ftjax import config as configs
from ftjax.assets import resolve
from ftjax.data import verbs
from ftjax.data.prepare import given, prepare
from ftjax.errors import FtjaxError
from ftjax.hub.families import labels_in
from ftjax.hub.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(resolve("builtin:stories260K"))


def settings(folder, labels, kind="classify", column="label", **data):
    c = configs.default()
    c.task.kind, c.data.cache, c.data.split = kind, "", (1.0, 0.0, 0.0)
    c.data.train = write(folder / "train.jsonl", labels, column)
    c.data.update(data)
    return c


def write(file, labels, column="label", text="one two"):
    text = text.split() if column == "tags" else text
    rows = [{"tokens" if column == "tags" else "text": text, column: label} for label in labels]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def meant(data, part) -> list:
    """What the targets of a part's rows say, by the names of the labels."""
    found = []
    for example in getattr(data, part).examples:
        target = example.targets if example.targets.ndim == 1 else example.targets[0]
        if target.dtype == "float32":
            found.append([name for name, there in zip(data.labels, target, strict=True) if there])
        else:
            found.append([data.labels[i] for i in target] if len(target) > 1 else data.labels[target[0]])
    return found


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 2, 5, 2], ["0", "2", "5"]),
        ([10, 9, -1, 9], ["-1", "9", "10"]),
        (["0", "1", "0"], ["0", "1"]),
        ([1, 0.0, 1.0], ["0", "1"]),
        (["1", 1, 2], ["1", "2"]),
        ([True, False, True], ["False", "True"]),
        (["red ", "blue", "red"], ["blue", "red"]),
        (["1 star", "5 stars"], ["1 star", "5 stars"]),
    ],
)
def test_the_names_are_the_values_of_the_rows(labels, names, words, tmp_path):
    data = prepare(settings(tmp_path, labels), words, 512, pool="last")
    assert list(data.labels) == names

    def value(label):
        return str(int(label)) if isinstance(label, float) else str(label).strip()

    assert meant(data, "train") == [value(label) for label in labels]


@pytest.mark.parametrize("how", [{"limit": 4}, {"shots": 1}, {"split": (0.2, 0.4, 0.4)}])
def test_names_are_of_all_rows_before_any_is_left_out(how, words, tmp_path):
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3
    c = settings(tmp_path, labels, **{"split": (0.5, 0.25, 0.25)} | how)
    data = prepare(c, words, 512, pool="last")
    assert data.labels == tuple("0123456789")
    for part in ("train", "validation", "test"):
        assert meant(data, part) == [str(getattr(data, part).row(i)["label"]) for i in range(len(getattr(data, part)))]


@pytest.mark.parametrize(
    ("kind", "train", "test", "names", "told"),
    [
        ("classify", [1, 3, 4, 5], [4, 2], (), "row 2: column 'label' holds 2; expected one of 1, 3, 4, 5"),
        ("classify", [1, 3, 4, 5], ["0"], (), "row 1: column 'label' holds '0'"),
        ("classify", ["a", "b"], [1], (), "row 1: column 'label' holds 1; expected one of a, b"),
        ("classify", ["a", "b"], ["b", "c"], (), "row 2: column 'label' holds 'c'"),
        ("classify", [0, 1], ["a", 1], ("a", "b"), "row 2: column 'label' holds 1; expected one of a, b"),
        ("classify", [0, 1], [1, 2], ("a", "b"), "row 2: column 'label' holds 2"),
        ("classify", [True, False], [True], ("no", "yes"), "row 1: column 'label' holds True"),
        ("classify", ["2", "1"], [0], ("1", "2"), "row 1: column 'label' holds 0; expected one of 1, 2"),
        ("classify", [0, 1], [-1], ("a", "b"), "row 1: column 'label' holds -1"),
        ("classify", [0.5, 1], [1], (), "row 1: column 'label' holds 0.5; expected a label"),
        ("classify", [["a"], ["b"]], [["a"]], (), "row 1: column 'label' holds .*\"multilabel\""),
        ("classify", ["a", "b"], ["a"], ("a", "a"), "task.labels: two labels are called 'a'"),
        ("classify", ["a", "b", None, "", " "], ["a"], (), "3 of 5 rows have no label in column 'label'.*row 3.*row 5"),
        ("regress", [1.5, None, 2], [1], (), "1 of 3 rows have no label.*row 2; .*data.clean.empty=True"),
        ("multilabel", [[1], [3, 5]], [[1], [2]], (), "row 2: column 'label' holds 2"),
        ("multilabel", [["a"], ["b", "a"]], [["a", "a"]], (), "row 1: .* names 'a' twice"),
        ("multilabel", [[1, 0, 1], [0, 0, 1]], [[1, 0]], (), "row 1: .*expected 3 numbers, each 0 or 1"),
        ("multilabel", [[1, 0, 1], [0, 0, 1]], [[1, 0, 2]], (), "row 1: .*expected 3 numbers, each 0 or 1"),
        ("multilabel", [[1, 0, 1], [0, 0, 1]], [[1, 0, 1]], ("a", "b"), "row 1: .*names '?1'? twice.* vectors of 2"),
        ("multilabel", ["0 1 1", "1 0 0"], ["a"], (), "row 1: column 'label' holds '0 1 1', which looks like a vector"),
        ("multilabel", ["a", "0;1"], ["a"], (), "row 2: column 'label' holds '0;1', which looks like a vector"),
        ("regress", [1.0, 1e20], [1.0], (), "row 2: column 'label' holds 1e.20; expected a number between"),
        ("multilabel", [1, 0, 1], [1], (), "row 1: column 'label' holds 1; expected a list of labels"),
        ("multilabel", ["[a, b]"], ["a"], (), "row 1: column 'label' holds '.a, b.'"),
        ("tag", [["DET", "NOUN"]], [["DET", "DET"]], ("DET", "NOUN"), "expected tags of entities.* found 'DET'"),
        ("tag", [[0, 1]], [[1, 0]], (), "expected tags of entities.*found '0'; numbers are ids of tags"),
        ("tag", [[0, 1]], [[1, 2]], ("O", "B-A"), "row 1: column 'tags' holds 2; expected one of O, B-A"),
        ("tag", [["O", "B-A"]], [[1, 0]], (), "row 1: column 'tags' holds 1"),
    ],
)
def test_a_label_that_is_not_known_is_refused_by_name_with_its_row(kind, train, test, names, told, words, tmp_path):
    column = "tags" if kind == "tag" else "label"
    c = settings(tmp_path, train, kind, column)
    c.data.test, c.task.labels = write(tmp_path / "test.jsonl", test, column), names
    with pytest.raises(FtjaxError, match=f"{told}"):
        prepare(c, words, 512, pool="last")


@pytest.mark.parametrize(
    ("kind", "cells", "names", "expected"),
    [
        ("classify", [1, 0, 1], ("neg", "pos"), ["pos", "neg", "pos"]),
        ("classify", ["1", "0"], ("neg", "pos"), ["pos", "neg"]),
        ("classify", ["pos", "neg"], ("neg", "pos"), ["pos", "neg"]),
        ("classify", [5, 0, 2], ("5", "2", "0"), ["5", "0", "2"]),  # values, whatever their ids
        ("classify", [0, 1], ("LABEL_0", "LABEL_1"), ["LABEL_0", "LABEL_1"]),
        ("tag", [[2, 0], [0, 1]], ("O", "B-A", "I-A"), [["I-A", "O"], ["O", "B-A"]]),
        ("tag", [["I-A", "O"]], ("O", "B-A", "I-A"), [["I-A", "O"]]),
        ("multilabel", [[1, 0, 1], [0, 0, 0]], (), [["0", "2"], []]),
        ("multilabel", [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], ("a", "b", "c"), [["a", "c"], ["b"]]),
        ("multilabel", [[True, False], [False, False]], ("a", "b"), [["a"], []]),
        ("multilabel", ["1,0,1", "0,0,1"], ("a", "b", "c"), [["a", "c"], ["c"]]),
        ("multilabel", ["[1, 0]", "[1, 1]"], ("a", "b"), [["a"], ["a", "b"]]),
        ("multilabel", ["['a', 'b']", "[]", None], (), [["a", "b"], [], []]),
        ("multilabel", [[0], [0, 1], []], (), [["0"], ["0", "1"], []]),
        ("multilabel", [[2, 0], [1]], ("a", "b", "c"), [["a", "c"], ["b"]]),
        ("multilabel", ["a, b", "b", ""], (), [["a", "b"], ["b"], []]),
    ],
)
def test_each_way_of_writing_labels_is_read_as_meant(kind, cells, names, expected, words, tmp_path):
    c = settings(tmp_path, cells, kind, "tags" if kind == "tag" else "label")
    c.task.labels = names
    c.task.subwords = "first"
    data = prepare(c, words, 512, pool="last")
    assert meant(data, "train") == expected
    if names:  # a finished model's rows, one by one too
        for cell, right in zip(cells, expected):
            source = write(tmp_path / "given.jsonl", [cell], "tags" if kind == "tag" else "label")
            if cell not in (["O"], None, [2, 0]) or kind == "tag":
                assert meant(given(c, source, words, 512, pool="last"), "test") == [right]


@pytest.mark.parametrize(
    "kind, cells, told",
    [
        ("classify", [True, 1, 0, False], "'0' and 'False'"),
        ("classify", ["pos", "Pos", "neg", "neg"], "'Pos' and 'pos'"),
        ("classify", ["01", "1", "2", "2"], "'01' and '1'"),
        ("classify", ["1.0", "2", "1", "2"], "'1' and '1.0'"),
        ("classify", ["caf\u00e9", "cafe\u0301", "tea", "tea"], "look like one label"),
        ("multilabel", [["a"], ["A", "b"], ["b"], ["a"]], "'A' and 'a'"),
        ("tag", [["O", "B-per"], ["B-PER", "O"]], "'B-PER' and 'B-per'"),
        ("multilabel", ["a;b", "a", "b", "a"], "'a;b', which holds another label"),
        ("multilabel", ["b", "a | b", "c", "a"], "'a | b', which holds another label"),
    ],
)
def test_two_ways_to_write_a_label_are_one_only_by_name(kind, cells, told, words, tmp_path):
    c = settings(tmp_path, cells, kind, "tags" if kind == "tag" else "label")
    with pytest.raises(FtjaxError, match=re.escape(told)) as error:
        prepare(c, words, 512)
    assert "name all labels in task.labels" in str(error.value)
    if kind != "tag":
        names = {str(x).strip() for cell in cells for x in (cell if isinstance(cell, list) else [cell])}
        c.task.labels = tuple(sorted(names))
        assert prepare(c, words, 512).labels == c.task.labels


def test_labels_with_many_digits_are_no_two_ways_to_write_one(words, tmp_path):
    codes = ["8471.3000", "8471.3001", "2204.2142", "2204.2143"]
    assert prepare(settings(tmp_path, codes, "classify", "label"), words, 512).labels == tuple(sorted(codes))


def test_numbers_that_are_read_as_ids_are_told(words, tmp_path):
    c = settings(tmp_path, [0, 1, 1])
    c.task.labels = ("bad", "good")
    (note,) = prepare(c, words, 512, pool="last").notes
    assert note == "column 'label' holds numbers, which are read as ids: 0 is 'bad', 1 is 'good'"


def test_rows_without_a_label_go_where_cleaning_is_asked_for(words, tmp_path):
    c = settings(tmp_path, ["a", None, "b", "", "a"])
    c.data.clean.empty = True
    data = prepare(c, words, 512, pool="last")
    assert meant(data, "train") == ["a", "b", "a"] and [r["rule"] for r in data.removed()] == ["empty", "empty"]


def test_ids_of_a_model_that_are_no_row_of_numbers_are_refused():
    with pytest.raises(FtjaxError, match="id2label has the ids 0, 2; expected 0 to 1"):
        labels_in({"id2label": {"0": "a", "2": "b"}})


@pytest.mark.parametrize("listed", [False, True])
def test_class_labels_of_parquet_files_are_their_names_whatever_their_order(listed, words, tmp_path):
    """Two files of `datasets` number the same classes differently; -1 stands for no label there."""
    kind = "multilabel" if listed else "classify"
    c, files = settings(tmp_path, ["x"], kind), {}
    for part, names, ids in (("train", ["world", "sport"], [0, 1, 1]), ("test", ["sport", "world"], [0, 1, 1])):
        feature = datasets.ClassLabel(names=names)
        features = datasets.Features({"text": datasets.Value("string"),
                                      "label": datasets.List(feature) if listed else feature})  # fmt: skip
        cells = [[i] for i in ids] if listed else ids
        files[part] = str(tmp_path / f"{part}.parquet")
        datasets.Dataset.from_dict({"text": ["a b"] * 3, "label": cells}, features).to_parquet(files[part])
    c.data.update(files)
    data = prepare(c, words, 512, pool="last")
    right = {"train": ["world", "sport", "sport"], "test": ["sport", "world", "world"]}
    for part, names in right.items():
        assert meant(data, part) == ([[name] for name in names] if listed else names)
    unlabelled = datasets.Dataset.from_dict({"text": ["a b"], "label": [-1]}, datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "sport"])}))  # fmt: skip
    unlabelled.to_parquet(files["test"])
    if not listed:
        with pytest.raises(FtjaxError, match="1 of 1 rows have no label"):
            prepare(c, words, 512, pool="last")


@pytest.mark.parametrize(
    ("kind", "cells", "names", "shown"),
    [
        ("classify", ["red", "blue"], (), "label: red"),
        ("classify", [1, 0], ("no", "yes"), "label: yes"),
        ("multilabel", [["b", "a"], []], (), "labels: a, b"),
        ("multilabel", [[], ["a"]], (), "labels: none"),
        ("regress", [2.5, 1], (), "value: 2.5"),
        ("tag", [["B-X", "O"]], (), "tags: B-X O"),
    ],
)
def test_the_preview_shows_the_label_and_the_token_at_which_it_is_read(kind, cells, names, shown, tmp_path):
    c = settings(tmp_path, cells, kind, "tags" if kind == "tag" else "label")
    c.task.labels = names
    told = []
    verbs.show(c, 9, say=told.append)
    place = f"{c.data.train} row 1"
    line = next(line for line in told[1].splitlines() if line.startswith(f"── {place}"))
    assert line.endswith(f" trained, {shown}") and any(line == shown for line in told[0].splitlines())
    if kind != "tag":  # the starter is a decoder, which reads the last token
        assert told[0].splitlines()[-2].endswith(" one tw[[o]]") and " one tw[[o]]" in told[1]
