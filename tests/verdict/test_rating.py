"""Win rates, ballots read back, agreement and strengths against published tables, scikit-learn and simulation."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax.errors import FtjaxError
from ftjax.verdict.rating import (
    ELO,
    Vote,
    agreement,
    bradley_terry,
    cohen_kappa,
    fleiss_kappa,
    read_ballots,
    strengths,
    win_rate,
    write_ballots,
)

PROMPTS = [f'prompt {i}, with a comma\nand a line, "quoted"\x85' for i in range(40)]
ANSWERS = {"base": [f"base {i}" for i in range(40)], "lora": [f"lora {i}" for i in range(40)], "full": ["é"] * 40}


def test_win_rate_counts_ties_half():
    a, b = [1.0, 0.5, 0.2, 0.9], [0.5, 0.5, 0.3, 0.8]
    found = win_rate(a, b)
    assert {name: entry["value"] for name, entry in found.items()} == pytest.approx(
        {"win": 0.5, "tie": 0.25, "loss": 0.25, "win_rate": 0.625}
    )
    assert win_rate(a, b, higher=False)["win_rate"]["value"] == pytest.approx(0.375)
    assert win_rate(a, b, margin=0.15)["tie"]["value"] == pytest.approx(0.75)
    assert win_rate(a, b)["win"]["low"] < 0.5 < win_rate(a, b)["win"]["high"]
    with pytest.raises(FtjaxError, match=r"one score per row; found \(4,\) and \(3,\)"):
        win_rate(a, b[:3])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_win_rates_of_two_sides_add_up(scores):
    a, b = np.array(scores).T
    one, other = win_rate(a, b), win_rate(b, a)
    assert one["win_rate"]["value"] + other["win_rate"]["value"] == pytest.approx(1)
    assert one["win"]["value"] == other["loss"]["value"] and one["tie"]["value"] == other["tie"]["value"]


def rate(path, rater):
    """Fill in the ratings of a file as `rater`(ballot) says."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets do
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows([row | {"rating": rater(row)} for row in rows])
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        path.write_text("".join(json.dumps(row | {"rating": rater(row)}) + "\n" for row in rows), encoding="utf-8")


def likes_lora(row):
    """As a rater who sees the texts alone."""
    sides = [row[side].split()[0] for side in ("left", "right")]
    return "Left " if sides[0] == "lora" else "right" if sides[1] == "lora" else "tie"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_ballots_are_blind_and_read_back(tmp_path, suffix):
    path, key = tmp_path / f"a{suffix}", tmp_path / "key.jsonl"
    assert write_ballots(path, key, PROMPTS, ANSWERS, seed=3) == 120
    again = tmp_path / f"b{suffix}"
    write_ballots(again, tmp_path / "key2.jsonl", PROMPTS, ANSWERS, seed=3)
    assert path.read_bytes() == again.read_bytes() and key.read_bytes() == (tmp_path / "key2.jsonl").read_bytes()
    hidden = [json.loads(line) for line in key.read_text().splitlines()]
    left = [entry["left"] for entry in hidden]
    assert all(20 < left.count(name) < 60 for name in ANSWERS)  # sides are drawn
    assert [entry["row"] for entry in hidden] != sorted(entry["row"] for entry in hidden)  # and the order
    rate(path, likes_lora)
    votes = read_ballots({"ann": path}, key)
    assert len(votes) == 120 and {vote.first < vote.second for vote in votes} == {True}
    won = {}
    for vote in votes:
        won.setdefault((vote.first, vote.second), []).append(vote.share)
    assert {pair: set(shares) for pair, shares in won.items()} == {
        ("base", "full"): {0.5}, ("base", "lora"): {0.0}, ("full", "lora"): {0.0},
    }  # fmt: skip
    assert sorted(vote.row for vote in votes if vote.second == "full") == list(range(40))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda rows: rows[1].update(rating="lft"),
            "a.jsonl line 2: `rating` should be left, right, tie; found 'lft' .did",
        ),
        (lambda rows: rows[2].update(rating=""), "line 3: `rating` should be .*; found nothing .partial=True"),
        (lambda rows: rows[3].update(id="x-1"), "line 4: ballot 'x-1' is not in the key file .*key.jsonl"),
        (lambda rows: rows[4].update(id=rows[0]["id"]), "line 5: ballot '.*' is already in line 1"),
        (lambda rows: rows[5].pop("rating"), "line 6: column `rating` is missing; found id, prompt, left, right"),
        (lambda rows: rows.__setitem__(6, [1]), "line 7: expected an object, found '.1.'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    path, key = tmp_path / "a.jsonl", tmp_path / "key.jsonl"
    write_ballots(path, key, PROMPTS, ANSWERS)
    rate(path, likes_lora)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FtjaxError, match=message):
        read_ballots({"ann": path}, key)


def test_lines_of_csv_are_counted_as_an_editor_does_and_half_a_file_may_be_read(tmp_path):
    path, key = tmp_path / "a.csv", tmp_path / "key.jsonl"
    write_ballots(path, key, PROMPTS, ANSWERS)
    done = []
    rate(path, lambda row: likes_lora(row) if not done and not done.append(row) else "")
    with pytest.raises(FtjaxError, match="a.csv line 4: `rating` should be"):  # each prompt has two lines
        read_ballots({"ann": path}, key)
    assert len(read_ballots({"ann": path}, key, partial=True)) == 1


@pytest.mark.parametrize(
    "how, message",
    [
        ({"answers": {"base": ["x"]}}, "'base' has 1 answers; expected one for each of 40 prompts"),
        ({"path": "a.txt"}, "expected a file that ends in .jsonl or .csv"),
        ({"answers": {"base": ANSWERS["base"]}}, "40 prompts and 0 pairs"),
    ],
)
def test_ballots_that_cannot_be_are_refused(tmp_path, how, message):
    how = {"path": "a.csv", "answers": ANSWERS} | how
    with pytest.raises(FtjaxError, match=message):
        write_ballots(tmp_path / how.pop("path"), tmp_path / "k.jsonl", PROMPTS, **how)


def test_kappas_are_the_published_ones():
    # Cohen's: 20 and 15 of 50 alike, 5 and 10 not (Wikipedia's worked example).
    x, y = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(x, y) == pytest.approx(0.4)
    # Fleiss': 14 raters, 10 subjects, 5 categories (Wikipedia's worked example).
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(FtjaxError, match="the same number of raters"):
        fleiss_kappa([[1, 1], [2, 1]])


def test_cohens_kappa_is_that_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    x = rng.integers(3, size=200)
    y = np.where(rng.random(200) < 0.6, x, rng.integers(3, size=200))
    assert cohen_kappa(x, y) == pytest.approx(cohen_kappa_score(x, y))


def test_agreement_takes_what_all_raters_rated():
    def vote(rater, row, share):
        return Vote(rater, row, "a", "b", share)

    x, y = [1, 1, 0, 0.5, 0], [1, 0, 0, 0.5, 1]
    votes = [vote("ann", i, s) for i, s in enumerate(x)] + [vote("bob", i, s) for i, s in enumerate(y)]
    votes.append(vote("ann", 5, 1))
    assert agreement(votes) == {"kappa": pytest.approx(cohen_kappa(x, y)), "raters": 2, "ballots": 5}
    votes += [vote("cy", i, s) for i, s in enumerate(x[:4])]
    counts = [[(x[i], y[i], x[i]).count(s) for s in (0, 0.5, 1)] for i in range(4)]
    assert agreement(votes) == {"kappa": pytest.approx(fleiss_kappa(counts)), "raters": 3, "ballots": 4}
    assert agreement(votes[:5])["kappa"] is None
    assert agreement([vote("ann", 0, 1), vote("bob", 0, 1)])["kappa"] is None  # one rating throughout


# American League of 1987, games that the row won against the column (Agresti 2002, table 10.10).
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
GAMES = [
    [0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0],
]  # fmt: skip
STRENGTHS = [1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0]  # over Baltimore, as the book fits them


def test_strengths_are_the_published_ones():
    s = bradley_terry(GAMES, prior=0)
    assert s - s[-1] == pytest.approx(STRENGTHS, abs=0.006) and s.mean() == pytest.approx(0, abs=1e-9)
    both = bradley_terry(np.stack([GAMES, np.transpose(GAMES)]), prior=0)
    assert both == pytest.approx(np.stack([s, -s]), abs=1e-9)


def test_one_who_never_lost_has_a_strength_by_the_prior():
    wins = [[0, 9], [0, 0]]
    with pytest.raises(FtjaxError, match="never lost to the others"):
        bradley_terry(wins, prior=0)
    s = bradley_terry(wins)
    assert s[0] - s[1] == pytest.approx(np.log(9.5 / 0.5))
    assert np.abs(bradley_terry(np.array(wins) * 1e6)).max() < 10  # and Newton's method ends


def test_votes_make_strengths_with_intervals():
    rng = np.random.default_rng(0)
    true = {"a": 0.8, "b": 0.0, "c": -0.8}
    held, n = 0, 400
    for trial in range(n):
        votes = []
        for row in range(150):
            first, second = [("a", "b"), ("a", "c"), ("b", "c")][row % 3]
            p = 1 / (1 + np.exp(true[second] - true[first]))
            votes.append(Vote("ann", row, first, second, float(rng.random() < p)))
        found = strengths(votes, draws=200, seed=trial)
        held += sum(e["strength"]["low"] <= true[name] <= e["strength"]["high"] for name, e in found.items())
    assert 0.91 <= held / (3 * n) <= 0.97
    assert list(found) == ["a", "b", "c"] and sum(e["wins"] for e in found.values()) == 150
    based = strengths([*votes, Vote("ann", 0, "a", "b", 0.5)], base="b", draws=50)
    assert based["b"]["elo"] == pytest.approx({"value": 1000, "low": 1000, "high": 1000} | based["b"]["elo"])
    gap = based["a"]["strength"]["value"] - based["b"]["strength"]["value"]
    assert based["a"]["elo"]["value"] - 1000 == pytest.approx(ELO * gap) and based["a"]["ties"] == 1
    with pytest.raises(FtjaxError, match="no vote concerns 'd'"):
        strengths(votes, base="d")


def test_ten_to_one_is_400_points():
    wins = [[0, 1000], [100, 0]]
    s = bradley_terry(wins, prior=0)
    assert ELO * (s[0] - s[1]) == pytest.approx(400)
