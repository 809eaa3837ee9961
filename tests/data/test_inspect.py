"""Inspection: faults planted by seed in copies of real sets are found; each check on rows made for it; the reports."""

import copy
import itertools
import json
import random
from html.parser import HTMLParser

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftjax import assets
from ftjax import config as configs
from ftjax.data import domain, verbs
from ftjax.data.inspect import inspect
from ftjax.data.inspect_checks import CHECKS
from ftjax.data.inspect_report import WIDTH, table, to_json
from ftjax.data.inspect_report import html as page
from ftjax.data.prepare import read_and_clean
from ftjax.data.similar import normalise, row_text
from ftjax.errors import FtjaxError
from ftjax.hub.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def gpt2(shared):
    return load_tokenizer(shared / "tokenizers/gpt2")


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models/stories260K")


def run(folder, tokenizer, parts, **data):
    """Inspect parts {name: rows}, each written as JSON lines."""
    config = configs.default()
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.data[name] = str(path)
    for key, value in data.items():
        config.data[key] = value
    configs.validate(config)
    return inspect(config, tokenizer)


def rows_of(inspection, check, part="train"):
    """Indices of the rows that a check found in a part."""
    found = (f.rows for f in inspection.findings if f.check == check and f.part == part)
    return {number - 1 for rows in found for numbers in rows.values() for number in numbers}


# ---------------------------------------------------------------------------------------------- planted faults


class Set:
    """A real set: rows, the column that faults go into, the one whose text may not be empty, and the label."""

    def __init__(self, train, other, text, answer=None, label=None, **data):
        self.train, self.other, self.text, self.answer, self.label, self.data = train, other, text, answer, label, data


def jsonl(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def sst2(data):
    parts = [(data / f"sst2/{n}.tsv").read_text().split("\n")[1:] for n in ("train", "dev")]
    train, dev = ([dict(zip(("label", "sentence"), line.split("\t"))) for line in part if line] for part in parts)
    return Set(train[:3000], dev, "sentence", "sentence", "label")


def commongen(data):
    def rows(part):
        columns = [(data / f"commongen/commongen.{part}.{c}.txt").read_text().split("\n") for c in ("src_alpha", "tgt")]
        return [{"prompt": a, "completion": b} for a, b in zip(*columns) if a and b]

    return Set(rows("train")[:2500], rows("dev")[:500], "completion", "completion")


def gsm8k(data):
    train, test = jsonl(data / "gsm8k/train.jsonl")[:1200], jsonl(data / "gsm8k/test.jsonl")[:400]
    return Set(train, test, "question", "answer", prompt="{question}\n", completion="{answer}")


def dolly(data):
    rows = jsonl(data / "instruct/dolly_hhrlhf_train_small.jsonl")
    return Set(rows[:850], rows[850:], "response", "response")


def wnut17(data):
    def rows(part):
        text = (data / f"wnut17/{part}.conll").read_text().replace("\n\t\n", "\n\n")
        sentences = [[line.split("\t") for line in block.split("\n") if line.strip()] for block in text.split("\n\n")]
        return [{"tokens": [t for t, _ in s], "tags": [t for _, t in s]} for s in sentences if s]

    return Set(rows("train")[:2000], rows("dev")[:500], "tokens", "tokens", "tags")


# Name, reader, and how many of each fault: near duplicates, leaks, addresses, broken, empty, respelled, flipped. The
# 1,000 rows of Dolly have room for fewer.
FULL = (200, 50, 30, 30, 30, 30, 30)
SETS = {"sst2": (sst2, FULL), "commongen": (commongen, FULL), "gsm8k": (gsm8k, FULL), "wnut17": (wnut17, FULL),
        "dolly": (dolly, (40, 30, 15, 15, 15, 0, 0))}  # fmt: skip
KINDS = ("near", "leak", "email", "mojibake", "empty", "respelled", "flipped")
CHECK = {  # a near duplicate may differ in punctuation alone
    "near": ("near_duplicates", "duplicates"),
    "leak": ("overlap",),
    "email": ("personal",),
    "mojibake": ("mojibake",),
    "empty": ("empty",),
    "respelled": ("label_spelling",),
    "flipped": ("label_conflict",),
}


def words_of(row, name):
    return row[name] if isinstance(row[name], list) else row[name].split(" ")


def with_words(row, name, words):
    """The row with other words; tags, where there are any, as many."""
    row = {**row, name: words if isinstance(row[name], list) else " ".join(words)}
    if "tags" in row:
        row["tags"] = (row["tags"] + ["O"] * len(words))[: len(words)]
    return row


def length(row, label):
    return len(normalise(row_text(row, [name for name in row if name != label])).split())


def nearly(row, name, label, rng):
    """One word changed: anywhere in a long text; at the end of a short one, of whose 3-grams it spoils the fewest."""
    words = list(words_of(row, name))
    at = rng.randrange(len(words)) if length(row, label) >= 40 else len(words) - 1
    words[at : at + 1] = rng.choice(([], ["zebra"], [words[at], "zebra"]))
    return with_words(row, name, words)


def insert(row, name, word, rng):
    words = list(words_of(row, name))
    words.insert(rng.randrange(len(words) + 1), word)
    return with_words(row, name, words)


def address(rng):
    name, ending = rng.choice(("jo", "kim.lee", "a_b")), rng.choice(("org", "co.uk"))
    return f"{name}@mail-{rng.randrange(99)}.{ending}"


def broken(rng):
    word = rng.choice(("café", "naïve", "Müller", "it’s", "–", "señor", "20 €", "“so"))
    return word.encode().decode(rng.choice(("latin-1", "cp1252")))


def respelled(row, label, rng):
    """The label, or one entity's tag, written in another way."""
    if isinstance(row[label], str):
        return {**row, label: rng.choice((f" {row[label]}", f"{row[label]}.", f'"{row[label]}"', f"{row[label]}.0"))}
    at = rng.choice([i for i, tag in enumerate(row[label]) if tag != "O"])
    tags = list(row[label])
    tags[at] = rng.choice((tags[at].lower(), tags[at].upper(), f"{tags[at]} "))
    return {**row, label: tags}


def flipped(row, label, rng):
    """The same text with another label."""
    if isinstance(row[label], str):
        return {**row, label: {"0": "1", "1": "0"}[row[label]]}
    tags = list(row[label])
    at = rng.randrange(len(tags))
    tags[at] = "B-person" if tags[at] == "O" else "O"
    return {**row, label: tags}


def plant(one, counts, seed):
    """(train, other, origin, planted): the parts with faults; for each row of train its index before or None; and
    {kind: indices in train that are to be found}. No row gets two faults.
    """
    rng = random.Random(seed)
    number = dict(zip(KINDS, counts))
    if one.label is None:
        number |= {"respelled": 0, "flipped": 0}
    free = list(range(len(one.train)))
    rng.shuffle(free)

    def take(count, fits=lambda row: True):
        chosen = list(itertools.islice((i for i in free if fits(one.train[i])), count))
        assert len(chosen) == count, "too few rows fit"
        gone = set(chosen)
        free[:] = [i for i in free if i not in gone]
        return chosen

    def long(row):
        last = normalise(words_of(row, one.text)[-1])
        return length(row, one.label) >= (12 if last.isalnum() else 40)

    train = copy.deepcopy(one.train)
    marks = [None] * len(train)
    fault = {
        "email": lambda row: insert(row, one.text, address(rng), rng),
        "mojibake": lambda row: insert(row, one.text, broken(rng), rng),
        "empty": lambda row: {**row, one.answer: [] if isinstance(row[one.answer], list) else rng.choice(("", "  "))},
        "respelled": lambda row: respelled(row, one.label, rng),
    }
    for kind, change in fault.items():
        some = (lambda row: set(row[one.label]) != {"O"}) if kind == "respelled" else (lambda row: True)
        for i in take(number[kind], some):
            train[i], marks[i] = change(train[i]), kind
    other = list(one.other)
    for i in take(number["leak"], long):
        exact = rng.random() < 0.5
        other.insert(rng.randrange(len(other) + 1), train[i] if exact else nearly(train[i], one.text, one.label, rng))
        marks[i] = "leak"
    copies = [(i, nearly(train[i], one.text, one.label, rng), "near") for i in take(number["near"], long)]
    copies += [(i, flipped(train[i], one.label, rng), "flipped") for i in take(number["flipped"], long)]
    rows = [(row, i, mark) for i, (row, mark) in enumerate(zip(train, marks))]
    for i, row, mark in copies:  # somewhere after the row that each was made of
        after = next(k for k, (_, origin, _) in enumerate(rows) if origin == i)
        rows.insert(rng.randrange(after + 1, len(rows) + 1), (row, None, mark))
    planted = {kind: {k for k, (_, _, mark) in enumerate(rows) if mark == kind} for kind in KINDS}
    assert all(len(planted[kind]) == number[kind] for kind in KINDS)
    return [row for row, _, _ in rows], other, [origin for _, origin, _ in rows], planted


@pytest.mark.parametrize("name", SETS)
def test_planted_faults_are_found_and_little_else(shared, gpt2, tmp_path, name):
    read, counts = SETS[name]
    one = read(shared / "data")
    before = run(tmp_path, gpt2, {"train": one.train, "validation": one.other}, **one.data)
    train, other, origin, planted = plant(one, counts, seed=7)
    after = run(tmp_path, gpt2, {"train": train, "validation": other}, **one.data)
    faulty = set().union(*planted.values())
    for kind, rows in planted.items():
        found, known = (set().union(*(rows_of(one, check) for check in CHECK[kind])) for one in (after, before))
        assert len(rows & found) >= 0.95 * len(rows), f"{kind}: {len(rows & found)} of {len(rows)} found"
        false = {i for i in found - faulty if origin[i] not in known}
        assert len(false) < 0.02 * len(train), f"{kind}: {len(false)} false alarms"
    # What cannot really be there: no such thing was met on reading what these checks flag in the originals.
    assert len(rows_of(before, "personal")) <= (3 if name == "wnut17" else 0)  # three phone numbers in tweets
    assert len(rows_of(before, "mojibake")) <= (1 if name == "dolly" else 0)  # one with U+FFFD
    assert not rows_of(before, "empty") and not rows_of(before, "label_spelling") and not rows_of(before, "unusable")
    assert len(rows_of(before, "refusals")) <= 1  # "Unfortunately, I can't answer that question."
    if one.answer and one.answer != one.text or name == "commongen":
        assert rows_of(after, "unusable") == planted["empty"]


def test_what_is_flagged_in_reviews_and_tweets_is_there(shared, gpt2):
    """The files as they are: the columns differ, the reader's own rows, and texts that really stand twice."""
    config = configs.default()
    config.data.update(train=str(shared / "data/wnut17/train.conll"), validation=str(shared / "data/wnut17/dev.conll"))
    found = inspect(config, gpt2)
    part = found.parts["train"]
    assert (part.rows, part.form, part.label, part.label_guessed) == (3394, None, "tags", True)
    assert part.labels["O"] == 59_570 and part.columns["tokens"]["type"] == "list of string"
    (conflict,) = [f for f in found.findings if f.check == "label_conflict" and f.part == "train"]
    assert conflict.examples[0]["note"].startswith("O O O") and " but B-corporation O" in conflict.examples[0]["note"]


# ---------------------------------------------------------------------------------------------- each check

TALK = [
    {"prompt": f"Question number {i}, what is it?", "completion": f"It is the answer number {i}."} for i in range(40)
]
LABELLED = [{"text": f"review number {i} of them all", "label": ("good", "bad")[i % 2]} for i in range(60)]


def talk(**changes):
    """TALK with changed cells: talk(completion={3: "..."})."""
    return changed(TALK, changes)


def labelled(**changes):
    return changed(LABELLED, changes)


def changed(rows, changes):
    rows = copy.deepcopy(rows)
    for name, cells in changes.items():
        for i, cell in cells.items():
            rows[i][name] = cell
    return rows


SHOUTED = {name: text.upper() for name, text in TALK[2].items()}
FOUND = [  # check, rows, indices of the rows found, what the message says
    ("unusable", talk(completion={3: None}, prompt={9: None}), {3, 9}, "null"),
    ("empty", talk(completion={3: " \n"}, prompt={9: ""}), {3, 9}, "completion (1); prompt (1)"),
    ("optional", [{**row, "hint": "" if i > 8 else "so"} for i, row in enumerate(TALK)], set(), "empty in 77.5%"),
    ("constant", [{**row, "source": "web"} for row in TALK], set(), "'source'"),
    ("duplicates", [*TALK, SHOUTED], {40}, "1 (2.4%)"),
    ("special_tokens", talk(prompt={5: "what is <|endoftext|> for?"}), {5}, "<|endoftext|> (1)"),
    ("long", talk(completion={5: "word " * 600}), {5}, "1 (2.5%)"),
    ("refusals", talk(completion={6: "I'm sorry, but I can't help with that."}), {6}, "refuse"),
    ("boilerplate", talk(completion={6: "As an AI language model, I see 6."}), {6}, "stock phrases"),
    ("repeated_prompt", talk(completion={6: "Question number 6, what is it? It is 6."}), {6}, "the whole prompt (1)"),
    ("control", talk(completion={6: "It\x1b[31m is\u200b 6."}), {6}, "U+001B, U+200B (1)"),
    ("format", talk(completion={1: '{"n": 1}', 2: "<b>2</b>."}), {1, 2}, "JSON (1); HTML (1)"),
    ("white_space", talk(completion={1: " It is 1."}), {1}, "white space before it (1)"),
    ("ending", talk(completion={1: "It is the"}), {1}, "a letter (1)"),
    ("script", talk(prompt={1: "Что это?"}, completion={1: "Не знаю."}), {1}, "Cyrillic (1)"),
    ("several_answers", [*TALK, {**TALK[0], "completion": "Something quite different."}], {40}, "1 (2.4%)"),
    ("coverage", talk(prompt={i: "漢字混じりの文章 " + chr(0x4E00 + 7 * i) for i in range(40)}), set(), "parts of"),
    ("label_spelling", labelled(label={4: "Good ", 7: "BAD."}), {4, 7}, "'Good ' for 'good' (1)"),
    ("label_rare", labelled(label={4: "god"}), {4}, "'god' (1)"),
    ("label_conflict", labelled(text={8: LABELLED[1]["text"]}), {8}, "1 (1.7%)"),
    ("imbalance", labelled(label={i: "good" for i in range(3, 60)}), set(), "'good' is the label of 98.3%"),
]


@pytest.mark.parametrize(("check", "rows", "found", "said"), FOUND, ids=[row[0] for row in FOUND])
def test_each_check_finds_its_rows(gpt2, tmp_path, check, rows, found, said):
    clean = TALK if "prompt" in rows[0] else LABELLED
    assert check not in {f.check for f in run(tmp_path, gpt2, {"train": clean}).findings}
    inspection = run(tmp_path, gpt2, {"train": rows})
    assert rows_of(inspection, check) == found
    (finding,) = [f for f in inspection.findings if f.check == check]
    assert said in finding.message and finding.advice and finding.count == len(found)
    assert len(finding.examples) == min(3, len(found))


def test_tokens_that_a_vocabulary_lacks(stories, shared, tmp_path):
    """SentencePiece falls back to bytes; a tokenizer without them has an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inspection = run(tmp_path, stories, {"train": [{"text": "漢字"}] * 3})
    assert inspection.parts["train"].bytes > 0.5 and inspection.parts["train"].unknown == 0
    words = {"<unk>": 0, "</s>": 1, "It": 2, "is": 3, "number": 4}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="</s>")
    inspection = run(tmp_path, bare, {"train": [{"text": "It is number"}, {"text": "It is new"}]})
    assert rows_of(inspection, "unknown_tokens") == {1}
    assert inspection.parts["train"].unknown == pytest.approx(1 / 6)


def test_parts_are_compared(gpt2, tmp_path):
    asked = "Question number 7, of which nobody whom I have ever asked knows how anyone came to think of it"
    nearly = {"prompt": asked, "completion": "It is the answer number 7!"}
    train = [*TALK, {"prompt": asked + " first?", "completion": "Nobody knows."}]
    parts = {
        "train": train,
        "validation": [TALK[3], nearly],
        "test": [{"prompt": "Who?", "completion": "She."}, TALK[3]],
    }
    found = {(f.part, f.check): f for f in run(tmp_path, gpt2, parts).findings}
    overlap = [f for f in run(tmp_path, gpt2, parts).findings if f.check == "overlap"]
    assert {(f.part, tuple(*f.rows.values())) for f in overlap} == {
        ("train", (4, 41)),
        ("train", (4,)),
        ("validation", (1,)),
    }
    notes = {e["note"] for f in overlap for e in f.examples}
    assert {f"as {tmp_path}/validation.jsonl row 1", f"nearly {tmp_path}/validation.jsonl row 2"} <= notes
    assert found["train", "overlap"].severity == "error"
    renamed = [{"prompt": "Who?", "response": "She."}]
    found = run(tmp_path, gpt2, {"train": TALK, "validation": renamed}).findings
    assert "validation has prompt, response; train has prompt, completion" in next(
        f.message for f in found if f.check == "columns"
    )


def test_a_label_is_named_guessed_or_absent(gpt2, tmp_path):
    def label(rows, **data):
        part = run(tmp_path, gpt2, {"train": rows}, **data).parts["train"]
        return part.label, part.label_guessed, sum(part.labels.values())

    kinds = [{"text": f"text {i} of many", "kind": i % 3} for i in range(60)]
    assert label(kinds) == (None, False, 0)
    assert label(kinds, label="kind") == ("kind", False, 60)
    assert label(kinds, prompt="{text}", completion=" {kind}") == ("kind", True, 60)
    assert label(LABELLED) == ("label", True, 60)
    assert label([{"text": "a", "label": f"free text {i}"} for i in range(60)]) == (None, False, 0)


def test_cells_with_numbers_are_not_empty(gpt2, tmp_path):
    rows = [{"text": f"text {i} of many", "spans": [i, i + 1], "n": 0, "more": {"at": i}} for i in range(30)]
    rows[3] |= {"spans": [], "more": {"at": None}}
    inspection = run(tmp_path, gpt2, {"train": rows})
    (finding,) = [f for f in inspection.findings if f.check == "empty"]
    assert rows_of(inspection, "empty") == {3} and "spans, more (1)" in finding.message


def test_ids_do_not_hide_duplicates(gpt2, tmp_path):
    rows = [{"id": f"r{i}", **row} for i, row in enumerate([*TALK, TALK[0]])]
    inspection = run(tmp_path, gpt2, {"train": rows})
    assert rows_of(inspection, "duplicates") == {40}
    c = configs.default()
    c.data.update(train=str(tmp_path / "train.jsonl"))
    c.data.clean.exact = True  # as the finding advises
    (source,), _ = read_and_clean(c)
    assert source.tables["train"].number.tolist() == list(range(1, 41))


def test_the_same_text_with_another_label_is_a_conflict_in_a_part_and_across(gpt2, tmp_path):
    texts = [f"text {i} of which there are many in this file, so to say" for i in range(30)]
    train = [{"id": f"a {i}", "text": text, "label": i % 2} for i, text in enumerate(texts)]
    train += [{"id": "once more", "text": texts[0], "label": 1}]
    test = [{"id": f"b {i}", "text": text.upper(), "label": 0} for i, text in enumerate(texts[:10])]
    found = run(tmp_path, gpt2, {"train": train, "test": test}, label="label")
    assert rows_of(found, "overlap") == {*range(10), 30} and rows_of(found, "label_conflict") == {30}
    (finding,) = [f for f in found.findings if f.check == "overlap"]
    assert "also in test (6 with another label), equal" in finding.message
    assert any("test.jsonl row 2, with the label '1' and not '0'" in e["note"] for e in finding.examples)


def test_chats_and_mixtures(shared, tmp_path):
    qwen = load_tokenizer(shared / "tokenizers/qwen3")
    chat = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in TALK
    ]
    chat[4]["messages"][1]["content"] = "I cannot help you with that."
    chat[6]["messages"][1]["content"] = ""
    for name, rows in {"a": chat, "b": TALK}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.default()
    config.data.mixture = ({"train": str(tmp_path / "a.jsonl")}, {"train": str(tmp_path / "b.jsonl"), "name": "talk"})
    found = inspect(config, qwen)
    assert {name: part.form for name, part in found.parts.items()} == {
        "train of a": "messages",
        "train of talk": "prompt",
    }
    assert rows_of(found, "refusals", "train of a") == {4} and rows_of(found, "unusable", "train of a") == {6}


def test_a_tool_call_has_no_white_space_around_it(shared, tmp_path):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]
    turns = [("user", "What is it?"), ("assistant", ""), ("tool", "a cat"), ("assistant", "It is a cat.")]
    chat = [{"role": role, "content": text} for role, text in turns]
    chat[1]["tool_calls"] = calls
    found = run(tmp_path, load_tokenizer(shared / "tokenizers/qwen3"), {"train": [{"messages": chat}] * 3})
    assert not [f for f in found.findings if f.check == "white_space"]
    plain = {"messages": [*chat[:1], {"role": "assistant", "content": " A cat."}]}
    found = run(tmp_path, load_tokenizer(shared / "tokenizers/qwen3"), {"train": [{"messages": chat}, plain] * 3})
    assert [f.count for f in found.findings if f.check == "white_space"] == [3]


def test_streaming_finds_the_same(shared, gpt2, tmp_path):
    rows = dolly(shared / "data").train[:300]
    rows = [*rows, rows[5], {**rows[9], "response": ""}]
    held, streamed = (run(tmp_path, gpt2, {"train": rows}, streaming=s) for s in (False, True))
    assert held == streamed and rows_of(held, "duplicates") == {300}


# ---------------------------------------------------------------------------------------------- reports


class Page(HTMLParser):
    """The tags of a page, the text in them, and whether every tag is closed."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def inspection(gpt2, tmp_path):
    evil = {
        "prompt": "<script>alert('x')</script> & \x1b[2Jwhat?",
        "completion": "It is </pre><img src=http://e.vil> me@a.org.",
    }
    rows = [{**row, "label": ("<b>", "other")[i % 2]} for i, row in enumerate([*TALK, evil, TALK[1], TALK[2]])]
    return run(tmp_path, gpt2, {"train": rows, "validation": [TALK[3] | {"label": "other"}]})


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(inspection):
    text = page(inspection)
    parsed = Page(text)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "iframe", "b"} and {"svg", "table", "details"} <= names
    assert not any(
        key in ("src", "href") or key.startswith("on") for _, attributes in parsed.tags for key in attributes
    )
    assert "<script>alert('x')</script>" in parsed.text and "me@a.org" not in text and "[EMAIL]" in parsed.text
    assert "\x1b" not in text and "\\x1b[2J" in parsed.text
    assert all(f.advice in parsed.text for f in inspection.findings)
    rects = [float(attributes["height"]) for tag, attributes in parsed.tags if tag == "rect"]
    assert len(rects) > 10 and min(rects) >= 0


def test_the_table_fits_and_goes_by_severity(inspection):
    text = table(inspection)
    assert max(map(len, text.split("\n"))) <= WIDTH and "\x1b" not in text
    heads = [line.split()[0] for line in text.split("\n") if line.startswith(("ERROR ", "WARNING ", "NOTE "))]
    assert len(heads) == len(inspection.findings) and heads == sorted(heads, key=["ERROR", "WARNING", "NOTE"].index)
    whole = " ".join(text.split())  # where lines break goes by the length of the path
    assert "rows 42, 43" in whole and "data.clean.exact=True" in whole


def test_the_json_holds_every_row_number(inspection, tmp_path):
    plain = json.loads(json.dumps(to_json(inspection)))
    assert plain["parts"]["train"]["rows"] == 43 and len(plain["parts"]["train"]["tokens"]["row"]["quantiles"]) == 7
    duplicates = next(f for f in plain["findings"] if f["check"] == "duplicates")
    assert duplicates["rows"] == {str(tmp_path / "train.jsonl"): [42, 43]} and duplicates["count"] == 2


def test_every_check_is_tested_here():
    assert set(CHECKS) == {row[0] for row in FOUND} | {c for checks in CHECK.values() for c in checks} | {
        "columns",
        "unknown_tokens",
    }


def test_nothing_found_is_said(gpt2, tmp_path):
    clean = run(tmp_path, gpt2, {"train": TALK})
    assert clean.findings == [] and "Nothing was found" in table(clean) and "Nothing was found" in page(clean)


def test_a_domain_is_compared_with_general_text(tmp_path, capsys):
    """Counted by hand, with a tokenizer of four whole words."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "dog": 2, "cell": 3, "ran": 4}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "general.txt").write_text("The dog ran.\nthe dog\n")
    (tmp_path / "domain.jsonl").write_text(
        '{"body": "the cell", "end": "ran"}\n{"body": "cell,", "end": "mitochondria"}\n'
    )
    config = configs.default()
    config.model.path = str(tmp_path / "words")
    config.data.update(prompt="{body}", completion=" {end}")
    config.data.update(train=str(tmp_path / "domain.jsonl"), domain_report=str(tmp_path / "general.txt"))
    verbs.inspect(config, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out/domain.json").read_text())
    # General: the words the, dog, ran, the, dog and the tokens [UNK] dog ran [UNK] the dog; all words are whole tokens.
    assert found["general text"] == {
        "words": 5, "distinct_words": 3, "tokens_per_word": 6 / 5, "words_of_one_token": 1.0, "vocabulary_used": 4 / 5,
        "unknown_tokens": 2 / 6, "known_words": 1.0, "known_distinct_words": 1.0, "new_words": [],
    }  # fmt: skip
    # Domain: the, cell, ran, cell, mitochondria and the tokens the cell ran cell [UNK] [UNK].
    assert found["train"] == {
        "words": 5, "distinct_words": 4, "tokens_per_word": 6 / 5, "words_of_one_token": 4 / 5,
        "vocabulary_used": 4 / 5, "unknown_tokens": 2 / 6, "known_words": pytest.approx(2 / 5),
        "known_distinct_words": 2 / 4,
        "new_words": [["cell", 2], ["mitochondria", 1]],
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "new words of train: cell (2), mitochondria (1)" in shown and "known distinct words" in shown
    pieces = AutoTokenizer.from_pretrained(assets.resolve("builtin:stories260K"))
    config.data.domain_report = "builtin:tinystories/stories.txt"
    found = domain.report(config, pieces)["train"]
    assert found["words_of_one_token"] == 1 / 5  # "the"; the others are pieces
    texts = "the cell\nran", "cell,\nmitochondria"
    assert found["tokens_per_word"] == sum(len(pieces.tokenize(text)) for text in texts) / 5
    clash = configs.copy(config)
    clash.data.mixture = ({"name": "general text", "train": config.data.train},)
    with pytest.raises(FtjaxError, match="'general text' is the name of what the sources are compared with"):
        domain.report(clash, pieces)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    config.data.domain_report = str(tmp_path / "empty.jsonl")
    with pytest.raises(FtjaxError, match="data.domain_report: .*empty.jsonl holds no word"):
        domain.report(config, pieces)
