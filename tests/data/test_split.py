"""Splits: disjoint and whole, in the shares asked for, groups on one side, train free of evaluation rows."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import table

from ftjax import config
from ftjax.data.read import read_table
from ftjax.data.similar import normalise, shingles
from ftjax.data.split import GRAM, PARTS, absent, decontaminate, limit, shots, split
from ftjax.errors import FtjaxError


def asked(**fields):
    data = config.default().data
    for key, value in fields.items():
        setattr(data, key, value)
    return data


def numbered(n, **columns):
    return table([{"text": f"row {i}", **{k: v[i] for k, v in columns.items()}} for i in range(n)])


def assert_whole(parts, n):
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(n))
    assert all((np.diff(indices) > 0).all() for indices in parts.values())


# ---------------------------------------------------------------------------------------------- at random


def test_a_plain_split_is_the_seeds_permutation_cut_in_three():
    for n, shares in ((40, (0.8, 0.1, 0.1)), (7, (0.5, 0.25, 0.25)), (101, (0.9, 0.0, 0.1))):
        parts = split({"train": numbered(n)}, asked(split=shares), seed=3)
        order = np.random.Generator(np.random.PCG64(3)).permutation(n)
        sizes = [max(1, round(n * share)) if share else 0 for share in shares[1:]]
        cuts = np.split(order, np.cumsum(sizes))
        for name, cut in zip(("validation", "test", "train"), cuts):
            assert parts[name].tolist() == sorted(cut)
        assert_whole(parts, n)


def test_parts_with_a_table_are_whole_and_leave_the_others_their_share():
    tables = {"train": numbered(20), "validation": numbered(3)}
    parts = split(tables, asked(), seed=0)
    assert [len(parts[name]) for name in PARTS] == [18, 3, 2]
    with_labels = split({**tables, "train": numbered(20, y=[0, 1] * 10)}, asked(label="y"), seed=0)
    assert [len(with_labels[name]) for name in PARTS] == [18, 3, 2]
    parts = split({**tables, "test": numbered(4)}, asked(label="nowhere, and not asked for"), seed=0)
    assert [len(parts[name]) for name in PARTS] == [20, 3, 4]


def test_a_lower_limit_takes_of_the_same_rows():
    parts = split({"train": numbered(50)}, asked(), seed=1)
    few, more = (limit(parts["train"], most, 50, seed=1) for most in (7, 20))
    order = np.random.Generator(np.random.PCG64(1)).permutation(50)
    assert few.tolist() == sorted([i for i in order if i in parts["train"]][:7])
    assert set(few) < set(more) < set(parts["train"]) and len(more) == 20
    assert limit(parts["train"], 0, 50, seed=1).tolist() == parts["train"].tolist()


# ---------------------------------------------------------------------------------------------- by value


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 5), min_size=12, max_size=150),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.9, 0.1, 0.0), (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 9),
)
def test_each_value_has_its_share_of_each_part_to_within_one_row(values, shares, seed):
    rows = numbered(len(values), y=values)
    parts = split({"train": rows}, asked(label="y", split=shares), seed)
    again = split({"train": rows}, asked(stratify="y", split=shares), seed)
    assert all((parts[name] == again[name]).all() for name in PARTS)
    assert_whole(parts, len(values))
    whole = Counter(values)
    found = [Counter(values[i] for i in parts[name]) for name in PARTS]
    # One row more may be moved for a part that would be empty; no such small share is expected of so many rows.
    small = min(len(values) * share for share in shares if share) < 3
    for value, n in whole.items():
        for counts, share in zip(found, shares):
            assert abs(counts[value] - n * share) < (2 if small else 1) + 1e-6
    for name, share in zip(PARTS, shares):
        assert abs(len(parts[name]) - len(values) * share) < 3
        assert (len(parts[name]) > 0) == (share > 0)


def test_rare_values_are_trained_on_first_and_said_to_be_missing_elsewhere():
    values = ["a"] * 60 + ["b"] * 38 + ["c", None]
    rows = numbered(100, y=values)
    parts = split({"train": rows}, asked(stratify="y"), seed=0)
    assert {98, 99} <= set(parts["train"].tolist())
    assert absent(rows, "y", parts) == {'"c"': ["validation", "test"], "null": ["validation", "test"]}
    assert absent(rows, "y", {**parts, "test": []}) == {'"c"': ["validation"], "null": ["validation"]}


def test_sst2_keeps_its_balance(shared):
    rows = read_table(str(shared / "data/sst2/train.tsv"))
    parts = split({"train": rows}, asked(label="label"), seed=0)
    labels = np.array(list(rows.column("label")))
    assert_whole(parts, len(rows))
    for name, share in zip(PARTS, (0.8, 0.1, 0.1)):
        for label in "01":
            assert abs((labels[parts[name]] == label).sum() - share * (labels == label).sum()) < 1
    other = split({"train": rows}, asked(label="label"), seed=1)
    assert not np.array_equal(other["test"], parts["test"])


# ---------------------------------------------------------------------------------------------- by group


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(
        st.tuples(st.integers(0, 30) | st.none(), st.integers(0, 40) | st.none(), st.integers(0, 2)),
        min_size=60,
        max_size=150,
    ),
    label=st.sampled_from(["", "y"]),
    seed=st.integers(0, 5),
)
def test_a_group_is_in_one_part_whatever_joins_it(cells, label, seed):
    a, b, y = zip(*cells)
    rows = numbered(len(cells), a=a, b=b, y=y)
    try:
        parts = split({"train": rows}, asked(group=("a", "b"), label=label), seed)
    except FtjaxError as error:
        assert re.search(r"make only [12] groups?", str(error))
        return
    assert_whole(parts, len(cells))
    assert all(len(parts[name]) for name in PARTS)
    for values in (a, b):
        for value in set(values) - {None}:
            assert sum(any(values[i] == value for i in parts[name]) for name in PARTS) == 1


def test_groups_come_in_the_shares_and_values_as_near_as_their_sizes_allow(shared):
    # Sets of words that share two words or more would be one group; here: sentences of one set of words.
    words = (shared / "data/commongen/commongen.train.src_alpha.txt").read_text().splitlines()[:6000]
    rows = table([{"src": src, "text": f"sentence {i}", "many": len(src.split())} for i, src in enumerate(words)])
    parts = split({"train": rows}, asked(group=("src",), stratify="many"), seed=0)
    assert_whole(parts, 6000)
    sets = [{words[i] for i in parts[name]} for name in PARTS]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    many = np.array(list(rows.column("many")))
    for name, share in zip(PARTS, (0.8, 0.1, 0.1)):
        for value in np.unique(many):
            assert abs((many[parts[name]] == value).sum() - share * (many == value).sum()) <= 2


def test_near_duplicates_stay_on_one_side(shared):
    questions = [row["question"] for row in read_table(str(shared / "data/gsm8k/test.jsonl"))]
    n = 300
    # Two further tellings of each of the first hundred, with a word more.
    texts = questions[:n] + [f"{text} Please {end}." for text in questions[:100] for end in ("answer", "explain")]
    rows = table([{"text": text} for text in texts])
    parts = split({"train": rows}, asked(group_near=0.8), seed=0)
    assert_whole(parts, len(texts))
    of = {int(i): name for name in PARTS for i in parts[name]}
    long = [i for i in range(100) if len(shingles(normalise(questions[i]))) >= 15]
    assert len(long) > 90
    assert all(of[i] == of[n + 2 * i] == of[n + 2 * i + 1] for i in long)
    assert abs(len(parts["train"]) - 0.8 * len(texts)) <= 3
    apart = split({"train": rows}, asked(), seed=0)
    of = {int(i): name for name in PARTS for i in apart[name]}
    assert any(of[i] != of[n + 2 * i] for i in long)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields, n, told",
    [
        ({}, 1, "leaves no row to train on, of 1"),
        ({"split": (0.0, 0.5, 0.5), "label": "y"}, 9, "leaves no row to train on, of 9"),
        ({"label": "z"}, 9, "data.label: no column 'z'"),
        ({"stratify": "tex"}, 9, "data.stratify: no column 'tex' (did you mean \"text\"?)"),
        ({"group": ("y", "sorce")}, 9, "data.group: no column 'sorce'"),
        ({"stratify": "text"}, 9, "data.stratify='text' has 9 values in 9 rows, so that the part validation would"),
        (
            {"group": ("one",)},
            9,
            "data.group=('one',), data.group_near=0: the 9 rows make only 1 group, the largest of 9",
        ),
        (
            {"group": ("y",)},
            9,
            "the 9 rows make only 2 groups, the largest of 5 rows, for 3 parts (train, validation, t",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(fields, n, told):
    rows = numbered(n, y=[i % 2 for i in range(n)], one=["same"] * n)
    with pytest.raises(FtjaxError) as error:
        split({"train": rows}, asked(**fields), seed=0)
    assert told in str(error.value)


# ---------------------------------------------------------------------------------------------- decontamination


def jaccard(a, b):
    a, b = shingles(normalise(a)), shingles(normalise(b))
    return len(a & b) / len(a | b)


def planted(train, test, how, seed):
    """Train's rows with 50 of test's among them, changed by `how`, at known places."""
    rng = np.random.default_rng(seed)
    leaks = [how(test[i], rng) for i in rng.choice(len(test), 50, replace=False)]
    at = set(rng.choice(len(train) + 50, 50, replace=False).tolist())
    fresh, leaked = iter(train), iter(leaks)
    return [next(leaked) if i in at else next(fresh) for i in range(len(train) + 50)], at


def reworded(row, rng):
    """A word in fifteen or so replaced, left out or added, such that the whole stays 0.8 alike."""
    text = row["question"] + " " + row["answer"]
    words = text.split()
    for i in rng.permutation(len(words))[: max(1, len(words) // 15)].tolist():
        other = [[], ["indeed", *words[i : i + 1]], ["something"]][rng.integers(3)]
        changed = words[:i] + other + words[i + 1 :]
        if jaccard(text, " ".join(changed)) >= 0.8:
            words = changed
    return {"question": " ".join(words), "answer": ""}


def shouted(row, rng):
    return {key: text.upper().replace(",", " ,") for key, text in row.items()}


@pytest.mark.parametrize("how", [lambda row, rng: row, shouted, reworded], ids=["verbatim", "shouted", "reworded"])
def test_planted_rows_of_gsm8k_are_found_and_hardly_any_other(shared, how):
    train, test = (list(read_table(str(shared / f"data/gsm8k/{part}.jsonl"))) for part in ("train", "test"))
    rows, at = planted(train[:2500], test, how, seed=0)
    kept, removed = decontaminate(table(rows), [("test", table(test, "test.jsonl"))], asked())
    gone = [r.index for r in removed]
    assert sorted([*kept.tolist(), *gone]) == list(range(len(rows)))
    assert at <= set(gone)
    assert len(gone) - len(at) <= 5  # GSM8K's own: eight of all 7,473 share 13 words with a row of test
    for r in removed:
        mine, theirs = rows[r.index], test[int(r.twin.removeprefix("test.jsonl row ")) - 1]
        ours, others = (" ".join(map(normalise, row.values())).split() for row in (mine, theirs))
        runs = {tuple(others[i : i + GRAM]) for i in range(len(others) - GRAM + 1)}
        shared_run = any(tuple(ours[i : i + GRAM]) in runs for i in range(len(ours) - GRAM + 1))
        assert shared_run or jaccard(*("\n".join(row.values()) for row in (mine, theirs))) >= 0.8
        assert r.why.startswith(("shares 13 words with a row of test", "is "))


def test_short_texts_overlap_only_where_they_are_the_same(shared):
    train, dev = (read_table(str(shared / f"data/sst2/{part}.tsv")) for part in ("train", "dev"))
    some = train.select(range(0, 20000))
    kept, removed = decontaminate(some, [("dev", dev)], asked(label="label"))
    sentences = {normalise(row["content"]) for row in dev}
    same = [i for i, row in enumerate(some) if normalise(row["sentence"]) in sentences]
    assert set(same) <= {r.index for r in removed}
    leaks = [{"sentence": row["content"], "label": row["label"]} for row in dev.select(range(0, 872, 20))]
    kept, removed = decontaminate(table(leaks), [("dev", dev)], asked(label="label"))
    assert len(kept) == 0 and len(removed) == len(leaks) == 44


def test_near_overlap_is_exact_against_all_pairs():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), rng.integers(1, 12))) for _ in range(300)]
    texts += [texts[i] + " a" for i in range(60)]
    train, test = texts[::2], texts[1::2]
    kept, _ = decontaminate(table([{"t": t} for t in train]), [("x", table([{"t": t} for t in test]))], asked())
    assert kept.tolist() == [i for i, a in enumerate(train) if all(jaccard(a, b) < 0.8 for b in test)]
    assert 20 < len(kept) < 160


def test_a_template_is_no_overlap(shared):
    rows = list(read_table(str(shared / "data/instruct/dolly_hhrlhf_train_small.jsonl")))
    start = "Below is an instruction that describes a task."
    assert all(row["prompt"].startswith(start) for row in rows)
    train, test = rows[:700], rows[700:]
    planted_rows, at = planted(train, test, lambda row, rng: row, seed=1)
    _, removed = decontaminate(table(planted_rows), [("test", table(test))], asked())
    gone = {r.index for r in removed}
    assert at <= gone and len(gone - at) <= 10
    assert not any("instruction that describes a task" in r.why for r in removed)


def test_columns_named_for_cleaning_are_those_compared():
    train = table([{"id": "x1", "q": "who is it"}, {"id": "x2", "q": "what is it"}])
    others = [("test", table([{"id": "y1", "q": "Who is it?"}], "e.jsonl"))]
    assert decontaminate(train, others, asked())[1] == []
    data = asked()
    data.clean.columns = ("q",)
    (removed,) = decontaminate(train, others, data)[1]
    assert (removed.place, removed.twin) == ("t.jsonl row 1", "e.jsonl row 1")
    assert removed.why == "is 1.00 alike to a row of test"


def test_shots_are_so_many_rows_of_each_value_and_fewer_are_among_more():
    values = [i % 3 for i in range(60)] + ["rare"]
    cells = {i: values[i] for i in range(10, 61)}
    few, more = (shots(cells, k, 61, seed=3) for k in (2, 5))
    assert [sum(values[i] == v for i in few) for v in (0, 1, 2, "rare")] == [2, 2, 2, 1]
    assert set(few) < set(more) <= set(cells) and list(more) == sorted(more) and len(more) == 16
    assert list(few) != list(shots(cells, 2, 61, seed=4))


def labelled_rows(texts, start, label):
    return [{"id": f"row {start + i}", "review": text, "label": label(i)} for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["classify", "causal"])
def test_ids_and_labels_do_not_hide_what_the_model_has_read(kind):
    """Ten of twenty test texts stand in train, under other ids, five of them with another label."""
    texts = [f"a film of {n} hours about {n} sisters and the {n} lakes they lost" for n in range(60)]
    c = config.default()
    c.task.kind = kind
    c.task.text = "review" if kind == "classify" else ""
    if kind == "causal":
        c.data.update(prompt="Review: {review}\nIs it good?", completion=" {label}")
    train = table(labelled_rows(texts[:40], 0, lambda i: "good"))
    test = table(labelled_rows(texts[30:50], 900, lambda i: ["bad", "good"][i % 2]), "test.jsonl")
    kept, removed = decontaminate(train, [("test", test)], c.data, c.task)
    assert kept.tolist() == list(range(30))
    assert [r.twin for r in removed] == [f"test.jsonl row {i}" for i in range(1, 11)]
    assert sum(r.conflict for r in removed) == (5 if kind == "classify" else 0)
    if kind == "classify":
        assert removed[0].why == "is 1.00 alike to a row of test; its label is 'good', there 'bad'"
    c.data.group_near = 0.9
    parts = split({"train": table(labelled_rows(texts[:40] * 2, 0, lambda i: "good"))}, c.data, 0, c.task)
    assert all(set(i % 40 for i in at) == set(at) & set(range(40)) for at in (p.tolist() for p in parts.values()))


def test_a_prompt_that_very_many_rows_have_is_no_overlap():
    stories = [{"prompt": "Write a story.", "completion": f"Once {n} and {n * n} went to {n + 7}."} for n in range(60)]
    _, removed = decontaminate(table(stories[:50]), [("test", table(stories[48:]))], asked())
    assert [r.index for r in removed] == [48, 49]


@pytest.mark.parametrize("form", ["question", "messages", "calls", "developer", "trl", "hh"])
def test_fields_that_no_template_shows_do_not_hide_what_the_model_has_read(form):
    def row(n, mark):
        text, answer = f"Of what is soup {n * n}?", f"Of {mark}."
        said = [
            {"role": "user", "content": text, "id": mark},
            {"role": "assistant", "content": answer, "at": f"{mark} h"},
        ]
        if form == "calls":
            call = {"id": mark, "type": "function", "function": {"name": "cook", "arguments": {"soup": "fish"}}}
            said[1:1] = [
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": mark, "content": "2"},
            ]
        return {
            "question": {"id": mark, "question": text, "answer": answer},
            "messages": {"messages": said},
            "calls": {"messages": said},
            "developer": {"messages": [{"role": "developer", "content": f"Day {mark}"}, *said]},
            "trl": {"prompt": said[:1], "completion": said[1:]},
            "hh": {
                "chosen": f"\n\nHuman: {text}\n\nAssistant: {answer}",
                "rejected": f"\n\nHuman: {text}\n\nAssistant: {n}",
            },
        }[form]

    train, test = table([row(n, f"a{n}") for n in range(40)]), table([row(n, f"b{n}") for n in range(30, 50)])
    kept, _ = decontaminate(train, [("test", test)], asked())
    assert kept.tolist() == list(range(30))


def test_the_last_answer_of_a_chat_is_no_part_of_what_is_asked():
    def chat(*texts):
        roles = ["system", *["user", "assistant"] * 2]
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}

    train = [chat("Be kind.", "Who are you?", "A cook.", "Of what?", "Of soup."), chat("Be kind.", "Who?", "I.")]
    test = [chat("Be brief.", "Who are you?", "A cook.", "Of what?", "Bread."), chat("Be brief.", "Where?", "I.")]
    _, removed = decontaminate(table(train), [("test", table(test))], asked())
    assert [r.index for r in removed] == [0]
