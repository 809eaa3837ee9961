"""From the config to examples: splits, limits, the report and its preview, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ftjax import config
from ftjax.assets import resolve
from ftjax.data.batches import Batches
from ftjax.data.prepare import prepare
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
    with pytest.raises(FtjaxError, match="expected three shares that add up to 1"):
        run(settings(good, split=(0.8, 0.1, 0.3)), starter)
    with pytest.raises(FtjaxError, match="set one or the other"):
        run(settings(good, form="text", completion="{completion}"), starter)
    with pytest.raises(FtjaxError, match="dropped them all"):
        run(settings(good, long="drop", max_length=2), starter)


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
    assert "1 rows (10.0%) are longer: cut at the end" in text


def test_commongen_part_is_disjoint_grouped_and_short_enough(starter):
    parts = {}
    for name in ("train", "validation", "test"):
        lines = open(resolve(f"builtin:commongen/{name}.jsonl"), encoding="utf-8").read().splitlines()
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
