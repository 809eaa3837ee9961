"""Tokenised rows: the same flat, cut, joined, encoded by several processes or found again on disk."""

import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ftjax import config
from ftjax.assets import resolve
from ftjax.data import prepare as preparing
from ftjax.data import store
from ftjax.data.prepare import Recipe, fingerprint, prepare
from ftjax.data.read import read_table
from ftjax.data.store import Cache, Chain, Examples, fit, join, table_digest, tokenised
from ftjax.data.tokenise import Example
from ftjax.errors import FtjaxError


@pytest.fixture(scope="module")
def starter():
    return AutoTokenizer.from_pretrained(resolve("builtin:stories260K"))


@pytest.fixture
def table(tmp_path):
    rows = [{"prompt": f"Row {i}", "completion": " and more" * (i % 5 + 1)} for i in range(2500)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(str(path))


def recipe(**changed):
    fields = dict.fromkeys(("prompt", "completion", "template", "system", "end", "labelled"), "")
    fields |= {"form": "prompt", "train_on": "assistant", "labels": ()}
    return Recipe(**(fields | changed))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.ids.tolist() == y.ids.tolist() and x.trained.tolist() == y.trained.tolist()


ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=20)


def examples_of(rows):
    return [Example(np.arange(len(r), dtype=np.int32) + 7 * i, np.array([False, *r[1:]])) for i, r in enumerate(rows)]


@settings(deadline=None)
@given(ROWS, ROWS, st.integers(2, 12))
def test_flat_rows_joined_and_cut_are_those_of_the_list(first, second, most):
    one, two = examples_of(first), examples_of(second)
    flat = join([Examples.of(one), Examples.of(two)])
    same(flat, one + two)
    same(flat[1:], (one + two)[1:])
    assert flat.labels.tolist() == [e.trained.sum() for e in one + two]
    assert flat.ends() == sorted({int(e.ids[-1]) for e in one + two if e.trained[-1]})
    long = [e for e in one + two if len(e.ids) > most]
    dropped = fit(one + two, most, "drop")
    same(dropped.examples, [e for e in one + two if len(e.ids) <= most])
    assert (dropped.long, dropped.lost) == (len(long), sum(int(e.trained.sum()) for e in long))
    emptied = [i for i, e in enumerate(one + two) if len(e.ids) > most and not e.trained[:most].any()]
    if emptied:
        with pytest.raises(FtjaxError, match=f"row {emptied[0] + 1}: cut to data.max_length={most}, no trained token"):
            fit(one + two, most, "truncate")
    else:
        cut = fit(one + two, most, "truncate")
        same(cut.examples, [Example(e.ids[:most], e.trained[:most]) for e in one + two])
        assert cut.lost == sum(int(e.trained[most:].sum()) for e in long)


def test_rows_too_long_may_be_refused():
    with pytest.raises(FtjaxError, match="row 2: 3 tokens, more than data.max_length=2"):
        fit(examples_of([[True, True], [True] * 3]), 2, "raise")


def test_chain_reads_any_positions():
    arrays = [np.arange(5), np.arange(10, 12), np.arange(20, 27)]
    chain, whole = Chain(arrays), np.concatenate(arrays)
    at = np.random.default_rng(0).integers(0, len(whole), 50)
    assert len(chain) == len(whole) and (chain[at] == whole[at]).all() and (chain[5:7] == [10, 11]).all()


def test_a_second_run_finds_the_rows_of_the_first(table, starter, tmp_path):
    calls = []

    def encode(rows, places):
        calls.append(len(rows))
        return recipe().encode(starter, rows, places)

    cache = Cache(tmp_path / "cache")
    first, second = (tokenised(table, encode, "key", cache) for _ in range(2))
    assert calls == [1000, 1000, 500]
    assert isinstance(second.ids, np.memmap)
    same(first, tokenised(table, encode, "key", Cache(None)))
    same(second, first)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_several_processes_give_the_same_rows_and_the_same_first_error(table, starter):
    encode = functools.partial(Recipe.encode, recipe(), starter)
    same(tokenised(table, encode, "", Cache(None), processes=2), tokenised(table, encode, "", Cache(None)))
    late = functools.partial(Recipe.encode, recipe(form="instruction"), starter)
    with pytest.raises(FtjaxError, match="rows.jsonl row 1: column 'instruction' does not exist"):
        tokenised(table, late, "", Cache(None), processes=2)


SCRIPT = """print("runs")
import functools, sys
from transformers import AutoTokenizer
from ftjax.assets import resolve
from ftjax.data.prepare import Recipe
from ftjax.data.read import read_table
from ftjax.data.store import Cache, tokenised
encode = functools.partial(Recipe.encode, Recipe("prompt", "", "", "", "", "assistant", "", (), ""),
                           AutoTokenizer.from_pretrained(resolve("builtin:stories260K")))
print(len(tokenised(read_table(sys.argv[1]), encode, "", Cache(None), processes=2)), __file__ == sys.argv[0])
"""


def test_the_processes_do_not_run_a_script_again(table, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), table.files[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("runs\n2500 True\n", 0), done.stderr[-2000:]


def killed(rows, places):
    os._exit(9)


def test_a_process_that_is_killed_ends_the_others(table):
    with pytest.raises(FtjaxError, match="a process that tokenised rows was killed.*set data.processes=1"):
        tokenised(table, killed, "", Cache(None), processes=2)


def test_an_encoder_that_fails_leaves_nothing_behind(table, tmp_path):
    def encode(rows, places):
        raise FtjaxError(places[0])

    with pytest.raises(FtjaxError, match="rows.jsonl row 1"):
        tokenised(table, encode, "key", Cache(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("file", [store.META, store.IDS, store.TRAINED, store.LENGTHS])
@pytest.mark.parametrize("damage", ["gone", "zeros", "cut", "one bit"])
def test_a_damaged_entry_is_made_again(file, damage, table, starter, tmp_path):
    encode = functools.partial(Recipe.encode, recipe(), starter)

    def rows():
        return [(e.ids.tolist(), e.trained.tolist()) for e in tokenised(table, encode, "key", Cache(tmp_path))]

    want = rows()
    path = tmp_path / "key" / file
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"zeros": bytes(len(content)), "cut": content[:middle], "one bit": flipped}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    with pytest.warns(UserWarning, match="key: these cached tokens are damaged"):
        assert rows() == want
    assert path.read_bytes() == content


def test_links_in_another_entry_do_not_matter(table, starter, tmp_path):
    encode = functools.partial(Recipe.encode, recipe(), starter)
    tokenised(table, encode, "other", Cache(tmp_path))
    for name, target in ((store.IDS, store.IDS), (store.LENGTHS, "nowhere")):
        (tmp_path / "other" / name).unlink()
        (tmp_path / "other" / name).symlink_to(target)
    assert len(tokenised(table, encode, "key", Cache(tmp_path))) == len(table)
    tokenised(table, encode, "third", Cache(tmp_path, size=0))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["third"]  # the other is evicted too


def test_what_was_used_longest_ago_goes_first(table, starter, tmp_path):
    encode = functools.partial(Recipe.encode, recipe(), starter)
    for age, key in enumerate(("a", "b", "c")):
        tokenised(table, encode, key, Cache(tmp_path))
        os.utime(tmp_path / key, (time.time() - 100 + age,) * 2)
    killed = tmp_path / "k.123.part"
    killed.mkdir()
    os.utime(killed, (1, 1))
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    tokenised(table, encode, "a", Cache(tmp_path, size=2 * size))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "c"]


def test_the_digest_of_a_table_is_that_of_its_cells(table, tmp_path):
    shuffled = table.select(np.random.default_rng(0).permutation(len(table)))
    back = shuffled.select(np.argsort(np.random.default_rng(0).permutation(len(table))))
    assert table_digest(back) == table_digest(table) != table_digest(shuffled)
    changed = table.edit(lambda rows: [r | {"prompt": r["prompt"].replace("Row 7", "row 7")} for r in rows])
    assert table_digest(changed) != table_digest(table)


def keys(monkeypatch, c, tokenizer):
    """The cache keys that preparing asks for."""
    asked = []

    def spy(table, encode, key, *rest):
        asked.append(key)
        return tokenised(table, encode, key, *rest)

    monkeypatch.setattr(preparing.store, "tokenised", spy)
    prepare(c, tokenizer, 512)
    return asked


CHANGES = {
    "data.prompt": "Say {prompt}",
    "data.completion": " so: {completion}",
    "data.train_on": "all",
    "data.end": "<s>",
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_recipe_never_finds_the_old_rows(key, table, starter, tmp_path, monkeypatch):
    c = config.default()
    c.data.update(train=table.files[0], cache=str(tmp_path / "cache"), prompt="{prompt}", completion="{completion}")
    first, again = keys(monkeypatch, c, starter), keys(monkeypatch, c, starter)
    config.override(c, [f"{key}={CHANGES[key]}"])
    assert first == again and not set(first) & set(keys(monkeypatch, c, starter))


def test_a_changed_tokenizer_or_chat_template_never_finds_the_old_rows(starter, shared):
    def load():
        return AutoTokenizer.from_pretrained(resolve("builtin:stories260K"))

    assert fingerprint(starter) == fingerprint(load())
    other, added = load(), load()
    other.chat_template = "{{ messages[0].content }}"
    added.add_tokens(["<new>"])
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    assert len({fingerprint(t) for t in (starter, other, added, gpt2)}) == 4


def test_limits_of_length_do_not_ask_for_new_rows(table, starter, tmp_path, monkeypatch):
    c = config.default()
    c.data.update(train=table.files[0], cache=str(tmp_path / "cache"))
    first = keys(monkeypatch, c, starter)
    c.data.max_length = 16
    assert keys(monkeypatch, c, starter) == first
