"""From the config to examples: splits, limits, the report and its preview, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
from tables import mapped
from transformers import AutoTokenizer

from ftjax import config
from ftjax.assets import resolve
from ftjax.data import prepare as prepare_module
from ftjax.data.batches import Batches
from ftjax.data.prepare import PARTS, prepare
from ftjax.data.preview import show
from ftjax.errors import FtjaxError


@pytest.fixture(scope="module")
def starter():
    return AutoTokenizer.from_pretrained(resolve("builtin:stories260K"))


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def settings(train, **data):
    c = config.default()
    c.data.train, c.data.cache = train, ""
    for key, value in data.items():
        c.data[key] = value
    return c


def rows(n, start=0):
    return [{"prompt": f"Tell me about {i}.", "completion": f" It was big, {i}."} for i in range(start, start + n)]


def run(c, tokenizer, positions=512):
    return prepare(c, tokenizer, positions)


def names(part):
    return [part.row(i)["prompt"] for i in range(len(part))]


def test_split_is_seeded_disjoint_and_whole(write, starter):
    source = write("t.jsonl", rows(40))
    data = run(settings(source), starter)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [32, 4, 4]
    assert sorted(names(data.train) + names(data.validation) + names(data.test)) == sorted(
        r["prompt"] for r in rows(40)
    )
    assert names(run(settings(source), starter).test) == names(data.test)
    other = settings(source)
    other.seed = 1
    assert names(run(other, starter).test) != names(data.test)
    limited = run(settings(source, limit=7), starter)
    assert len(limited.train) == 7 and set(names(limited.train)) < set(names(data.train))
    assert names(limited.validation) == names(data.validation)


def test_named_files_win(write, starter):
    train, validation = write("t.jsonl", rows(20)), write("v.jsonl", rows(3, 100))
    data = run(settings(train, validation=validation), starter)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [18, 3, 2]
    data = run(settings(train, validation=validation, split=(1.0, 0.0, 0.0)), starter)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [20, 3, 0]
    assert names(data.train) == [r["prompt"] for r in rows(20)]


def test_a_column_that_deals_rows_is_not_needed_where_none_are_dealt(write, starter):
    train, validation = write("t.jsonl", rows(20)), write("v.jsonl", rows(3, 100))
    for field in ("label", "stratify"):
        with pytest.raises(FtjaxError, match=f"data.{field}: no column 'topic'"):
            run(settings(train, validation=validation, **{field: "topic"}), starter)
        data = run(settings(train, validation=validation, split=(1.0, 0.0, 0.0), **{field: "topic"}), starter)
        assert [len(p) for p in (data.train, data.validation, data.test)] == [20, 3, 0]


def test_rows_that_are_not_held_out_are_told_of(write, starter):
    train, other = write("t.jsonl", rows(9)), write("v.jsonl", rows(3, 10))
    again = f"{Path(train).parent}/./t.jsonl"
    data = run(settings(train, validation=again, test=other), starter)
    assert data.notes == (f"warning: validation reads {train}, as train does, so its rows are not held out",)
    assert not run(settings(train, validation=other), starter).notes


def test_special_tokens_in_plain_texts_are_counted_and_named(write, starter):
    there = [{"prompt": p, "completion": c} for p, c in (("<s>a", "b"), ("a</s>", "b"), ("a", "b<s>b"), ("a", "b</s>"))]
    source = write("t.jsonl", [*rows(3), *there])
    note = "2 rows whose text of a special token is read as the token itself, the first of them "
    data = run(settings(source, split=(1.0, 0.0, 0.0)), starter)
    assert [told for told in data.notes if "special" in told] == [f"{note}{source} row 5"]
    pairs = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in rows(4)]
    c = settings(write("p.jsonl", pairs), split=(1.0, 0.0, 0.0))
    c.task.kind = "preference"
    asked = {"prompt": "{prompt}</s>", "completion": "<s>{completion}"}
    for how in {"template": "plain"}, asked:
        assert not [t for t in run(settings(source, split=(1.0, 0.0, 0.0), **how), starter).notes if "special" in t]
    assert not [told for told in run(c, starter).notes if "special" in told]


def test_parts_stay_aligned_when_rows_are_dropped(write, starter):
    long = {"prompt": "x" * 200, "completion": "y"}
    source = write("t.jsonl", [*rows(3), long, *rows(3, 10)])
    data = run(settings(source, split=(1.0, 0.0, 0.0), max_length=64, long="drop"), starter)
    assert names(data.train) == [r["prompt"] for r in rows(3) + rows(3, 10)]
    for i, example in enumerate(data.train.examples):
        row, rendered = data.train.row(i), data.train.rendered(i)
        assert rendered.completion == row["completion"]
        assert starter.decode(example.ids, skip_special_tokens=True).strip() == row["prompt"] + row["completion"]
    report = data.report["train"][""]
    assert (report["rows"], report["dropped"], report["long"], report["form"]) == (7, 1, 1, "prompt")
    assert report["tokens"] == sum(len(e.ids) for e in data.train.examples)
    assert report["quantiles"][-1] > 200
    json.dumps(data.report)


def test_reported_efficiency_is_that_of_full_batches(shared):
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    c = settings(
        str(shared / "data/gsm8k/test.jsonl"), prompt="{question}\n", completion="{answer}", split=(1.0, 0.0, 0.0)
    )
    shares = []
    for packing in (True, False):
        c.data.packing = packing
        data = run(c, gpt2, 1024)
        b = Batches(data.train.examples, 1, 512, packing=packing)
        batches = [b[i]["segment_ids"] for i in range(len(b))]
        share = sum((s > 0).sum() for s in batches) / sum(s.size for s in batches)
        assert data.train.efficiency == pytest.approx(share)
        shares.append(share)
    assert shares[0] > 0.98 and shares[1] > 0.8


def test_max_length_is_capped_unless_asked_for(write, starter):
    source = write("t.jsonl", rows(9))
    assert run(settings(source), starter, positions=128).max_length == 128
    assert run(settings(source, max_length=100), starter, positions=128).max_length == 100
    with pytest.raises(FtjaxError, match="data.max_length=200 is more than the model's 128 positions"):
        run(settings(source, max_length=200), starter, positions=128)


def test_refusals_name_file_and_row_also_after_a_split(write, starter):
    good, bad = write("a.jsonl", rows(30)), write("b.jsonl", [*rows(30), {"prompt": "x", "completion": None}])
    with pytest.raises(FtjaxError, match=r"b.jsonl row 31: column 'completion' is null or absent"):
        run(settings(f"{good},{bad}"), starter)
    long = write("c.jsonl", [*rows(2), {"prompt": "x" * 600, "completion": "y"}])
    with pytest.raises(FtjaxError, match=r"c.jsonl row 3: cut to data.max_length=512, no trained token is left"):
        run(settings(long, split=(1.0, 0.0, 0.0)), starter)
    with pytest.raises(FtjaxError, match=r"c.jsonl row 3: 60\d tokens, more than data.max_length=512"):
        run(settings(long, split=(1.0, 0.0, 0.0), long="raise"), starter)
    with pytest.raises(FtjaxError, match="leaves no row to train on, of 1"):
        run(settings(write("one.jsonl", rows(1))), starter)
    with pytest.raises(FtjaxError, match="set only one of the two"):
        run(settings(good, form="text", completion="{completion}"), starter)
    with pytest.raises(FtjaxError, match="dropped all rows"):
        run(settings(good, long="drop", max_length=2), starter)
    # One source of a mixture, with weights or without; and rows that are all in the held-out ones.
    wordy = write("wordy.jsonl", [{"prompt": "x" * 90, "completion": "y"}] * 9)
    for weight in ({"weight": 1.0}, {}):
        mixed = tuple({"train": one, "split": (1.0, 0.0, 0.0)} | weight for one in (good, wordy))
        with pytest.raises(FtjaxError, match="wordy.jsonl: .*dropped all rows.* or remove wordy from data.mixture"):
            run(settings("", mixture=mixed, long="drop", max_length=60), starter)
    with pytest.raises(FtjaxError, match="a.jsonl: cleaning and data.decontaminate dropped all rows"):
        run(settings(good, validation=good, split=(1.0, 0.0, 0.0), decontaminate=("validation",)), starter)


@pytest.mark.parametrize(
    "row, left, fields",
    [
        ({"prompt": "a", "completion": "b", "id": 1}, "id", {}),
        ({"question": "who", "answer": "b", "context": "c"}, "context", {}),
        ({"instruction": "a", "output": "b", "history": [["q", "r"]], "system": "s"}, "history, system", {}),
        ({"src": "a", "tgt": "b", "more": None}, "more", {"prompt": "{src}", "completion": " {tgt}"}),
        ({"prompt": "a", "completion": "b"}, "", {}),
        ({"sentence1": "a", "sentence2": "b", "label": "x"}, "sentence2", {"kind": "classify"}),
        (
            {"premise": "a", "hypothesis": "b", "label": "x", "idx": 3},
            "idx",
            {"kind": "classify", "pair": "hypothesis"},
        ),
    ],
)
def test_columns_that_no_text_holds_are_told(row, left, fields, write, starter):
    fields = dict(fields)
    c = settings(write("rows.jsonl", [row, row | ({"label": "y"} if "label" in row else {})]), split=(1.0, 0.0, 0.0))
    c.task.kind, c.task.pair = fields.pop("kind", "causal"), fields.pop("pair", "")
    c.data.update(fields)
    told = [note for note in run(c, starter).notes if note.startswith("columns")]
    assert told == ([f"columns that are no part of the texts or labels: {left}"] if left else [])


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_a_column_in_double_braces_is_refused(key, write, starter):
    c = settings(
        write("rows.jsonl", [{"src": "a", "tgt": "b"}]),
        prompt="{src} {{x}}",
        completion=" {tgt}",
        split=(1.0, 0.0, 0.0),
    )
    assert run(c, starter).train.rendered(0).prompt == "a {x}"
    c.data[key] += "{{ src }}"
    with pytest.raises(FtjaxError, match=f"data.{key}: .* has src in double braces, .* name a column in single"):
        run(c, starter)


def test_preview_shows_figures_and_marks_what_is_trained(write, starter, monkeypatch):
    data = run(settings(write("t.jsonl", rows(10)), split=(1.0, 0.0, 0.0)), starter)
    text = show(data, starter, colour=False)
    assert "form 'prompt' (guessed by the columns)" in text and "no padding" in text
    assert text.endswith("<s> Tell me about 0.[[ It was big, 0.</s>]]")
    assert show(data, starter, colour=True).endswith("<s> Tell me about 0.\x1b[32m It was big, 0.</s>\x1b[0m")
    assert "\x1b" not in show(data, starter)  # not a terminal here
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b" in show(data, starter)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in show(data, starter)


def test_preview_tells_what_is_cut(write, starter):
    long = {"prompt": "Tell", "completion": " x" * 300}
    text = show(
        run(settings(write("t.jsonl", [*rows(9), long]), split=(1.0, 0.0, 0.0), max_length=64), starter), starter
    )
    assert "1 rows (10.0%) are longer than 64 tokens: cut at the end" in text


def test_commongen_part_is_disjoint_grouped_and_short_enough(starter):
    parts = {}
    for name in ("train", "validation", "test"):
        lines = Path(resolve(f"builtin:commongen/{name}.jsonl")).read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line)["src"] for line in lines]
    sets = {name: {frozenset(src.split()) for src in srcs} for name, srcs in parts.items()}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    assert len(parts["train"]) == 11_953
    assert all(len(src.split()) == 3 for part in parts.values() for src in part)
    changes = 1 + int(np.sum([a != b for a, b in zip(parts["test"], parts["test"][1:])]))
    assert changes == len(set(parts["test"]))  # the references of one set stand together


def test_commongen_part_is_what_the_script_makes(shared, tmp_path):
    import importlib.util

    path = resolve("builtin:commongen/train.jsonl")
    script = Path(__file__).parents[2] / "scripts/make_commongen_part.py"
    spec = importlib.util.spec_from_file_location("make_commongen_part", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OUT = tmp_path
    module.main(shared / "data/commongen")
    folder = Path(path).parent
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "LICENSE"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_every_step_of_a_run_is_told_and_kept_to_its_part(write, starter):
    labels = ["big", "small"]
    made = [{"text": f"the {w} thing number {i} is here", "label": w} for i in range(20) for w in labels]
    doubles = [row | {"text": row["text"].upper() + " "} for row in made[:4]]
    leak = {"text": "a row that both sides have, word for word, as it stands, and long enough", "label": "big"}
    train, test = (
        write("t.jsonl", [*made, *doubles, leak, {"text": "one more", "label": "odd"}]),
        write("x.jsonl", [leak]),
    )
    c = settings(train, test=test, split=(0.8, 0.2, 0.0), prompt="{text}:", completion=" {label}", label="label")
    c.data.decontaminate = ("test",)
    c.data.clean.update(exact=True, whitespace=True)
    c.data.augment.update(copies=1, columns=("text",), prompts=("Is it big? {text}:",))
    data = run(c, starter)
    removed = {record["place"].rpartition("/")[2]: record["rule"] for record in data.removed()}
    assert removed == {f"t.jsonl row {41 + i}": "exact" for i in range(4)} | {"t.jsonl row 45": "decontaminate"}
    rows_of = {name: [getattr(data, name).row(i) for i in range(len(getattr(data, name)))] for name in PARTS}
    assert not any(row.get("augmented") for name in ("validation", "test") for row in rows_of[name])
    synthetic = [row for row in rows_of["train"] if row["augmented"]]
    assert len(rows_of["train"]) == 3 * (len(rows_of["train"]) - len(synthetic)) and len(synthetic) == 2 * 33
    asked = [data.train.rendered(i) for i in range(len(data.train))]
    for row, rendered in zip(rows_of["train"], asked):
        prompt = "Is it big? {text}:" if row["augmented"] == "prompt" else "{text}:"
        assert rendered.prompt == prompt.format(text=row["text"]) and rendered.completion == f" {row['label']}"
    shown = show(data, starter, colour=False)
    for said in (
        "cleaning changed rows of train: whitespace 4",
        "5 rows left out: exact 4, decontaminate 1",
        "no row of it",
    ):
        assert said in shown


def test_a_limit_counts_the_rows_that_are_trained(write, starter):
    leaks = rows(10)
    c = settings(write("t.jsonl", rows(40)), test=write("x.jsonl", leaks), split=(1.0, 0.0, 0.0), limit=12)
    c.data.decontaminate = ("test",)
    data = run(c, starter)
    assert len(data.train) == 12 and not set(names(data.train)) & {row["prompt"] for row in leaks}


def test_a_mixture_keeps_each_source_to_its_own_settings(write, starter):
    a, b = write("a.jsonl", rows(30)), write("b.jsonl", [{"q": f"Q{i}", "a": f"A{i}"} for i in range(10)])
    c = settings("", packing=True)
    c.data.mixture = (
        {"train": a, "weight": 1, "validation": a, "split": (1.0, 0.0, 0.0)},
        {
            "name": "questions",
            "train": b,
            "weight": 3.0,
            "prompt": "{q}?",
            "completion": " {a}",
            "split": (0.5, 0.5, 0.0),
        },
    )
    data = run(c, starter)
    assert data.sources == ("a", "questions") and data.shares.tolist() == [0.25, 0.75]
    assert np.bincount(data.train.source).tolist() == [30, 5] and np.bincount(data.validation.source).tolist() == [
        30,
        5,
    ]
    assert data.train.rendered(31).prompt.endswith("?") and data.train.place(31).startswith(b)
    assert [len(data.validation.of_source(z)) for z in (0, 1)] == [30, 5]
    assert len(list(data.train.prompts(starter))) == len(data.train) == 35
    shown = show(data, starter, colour=False)
    assert "mixture: questions is 75.0% of an epoch's rows; each of its 5 comes 5.25 times on average" in shown
    c.data.mixture = tuple({k: v for k, v in entry.items() if k != "weight"} for entry in c.data.mixture)
    assert run(c, starter).shares is None
    c.data.temperature = 2.0
    np.testing.assert_allclose(run(c, starter).shares, np.sqrt([30, 5]) / np.sqrt([30, 5]).sum())


def test_streamed_rows_are_those_in_memory(write, starter):
    train = write("t.jsonl", rows(60))
    c = settings(train, max_length=64)
    c.data.clean.update(exact=True, control=True)
    data = run(c, starter)
    c.data.streaming = True
    streamed = run(c, starter)
    assert streamed.fingerprint == data.fingerprint
    assert mapped(streamed.train.pieces[0].table) and not mapped(data.train.pieces[0].table)
    for name in PARTS:
        one, other = getattr(data, name), getattr(streamed, name)
        assert [e.ids.tolist() for e in one.examples] == [e.ids.tolist() for e in other.examples]
        assert names(one) == names(other)


@pytest.mark.parametrize("kind", ["classify", "multilabel", "regress", "causal"])
def test_a_guessed_label_splits_rows_as_a_named_one(kind, tmp_path):
    """A run records the column that it guessed, and its recorded config must read the same parts."""
    names = ["a", "b", "c"]
    labels = {"multilabel": lambda i: [names[i % 3]], "regress": float}.get(kind, lambda i: names[i % 7 % 3])
    found = [{"text": f"text {i}", "label": labels(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    c = config.default()
    c.task.kind, c.data.train, c.data.split = kind, str(tmp_path / "rows.jsonl"), (0.6, 0.2, 0.2)

    def parts(label):
        c.data.label = label
        (source,), _ = prepare_module.rows(c)
        return {part: [table.place(i) for i in range(len(table))] for part, table in source.tables.items()}

    assert parts("") == parts("label") if kind != "causal" else parts("") != parts("label")
