"""Which of two answers is better: win rates by a metric, ballots for people who rate blindly, agreement, strengths.

N rows, K contenders, R raters. A vote is a share of a win: 1 for the first of two, 0 for the second, 0.5 for a tie.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax.data.read import numbered
from ftjax.errors import FtjaxError, nearest
from ftjax.evaluation.resample import intervals, mean_interval, of_sums
from ftjax.files import replace_text, write_jsonl

# ---------------------------------------------------------------------------------------------- by a metric


def win_rate(a, b, *, higher: bool = True, margin: float = 0.0, level: float = 0.95) -> dict[str, dict]:
    """How often a scores better than b on a row: {"win", "tie", "loss", "win_rate"}, each with its interval over rows.

    Args:
        a, b: Scores (N,) of the same rows.
        higher: Whether more is better.
        margin: Rows that differ by so much at most are ties, which `win_rate` counts half.
        level: Of the intervals, see ftjax.evaluation.resample.mean_interval.

    Raises:
        FtjaxError: For scores that are not of the same rows.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise FtjaxError(
            f"win_rate: expected a score of each contender for the same rows; found {a.shape} and {b.shape}"
        )
    gain = (a - b) if higher else (b - a)
    win, loss = gain > margin, gain < -margin
    shares = {"win": win, "tie": ~(win | loss), "loss": loss, "win_rate": (1 + win - 1.0 * loss) / 2}
    found = {name: (np.mean(x), *mean_interval(x, level)) for name, x in shares.items()}
    return {name: dict(zip(("value", "low", "high"), map(float, three))) for name, three in found.items()}


# ---------------------------------------------------------------------------------------------- ballots

RATINGS = {"left": 1.0, "right": 0.0, "tie": 0.5}  # what a rater writes -> the share of a win of the left side
BALLOT = ("id", "prompt", "left", "right", "rating")


class Vote(NamedTuple):
    """What a rater said of two contenders' answers to a prompt."""

    rater: str
    row: int  # of the prompts that the ballots were made of
    first: str  # a contender; of a pair, always the same one
    second: str
    share: float  # of a win of `first`


def write_ballots(
    path: str | Path,
    key: str | Path,
    prompts: Sequence[str],
    answers: dict[str, Sequence[str]],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    seed: int = 0,
) -> int:
    """Write a file to be rated blindly, and apart from it the key that says whose answer is on which side.

    path: .jsonl or .csv, a ballot a line with the columns of BALLOT, in which a rater fills `rating` with a word of
    RATINGS; prompts: N; answers: contender -> N texts; pairs: of contenders, None: all. Sides and order are drawn by
    `seed`; ids say nothing of either. Returns the number of ballots. Raises FtjaxError for answers that do not fit.
    """
    path, key = Path(path), Path(key)
    if path.suffix not in WRITERS:
        raise FtjaxError(f"{path}: expected a file that ends in {' or '.join(WRITERS)}")
    for name, texts in answers.items():
        if len(texts) != len(prompts):
            raise FtjaxError(f"ballots: {name!r} has {len(texts)} answers to {len(prompts)} prompts")
    pairs = list(itertools.combinations(answers, 2)) if pairs is None else [tuple(pair) for pair in pairs]
    for name in itertools.chain(*pairs):
        if name not in answers:
            raise FtjaxError(f"ballots: no contender {name!r}{nearest(name, answers)}; there are {', '.join(answers)}")
    if not pairs or not prompts:
        raise FtjaxError(f"ballots: {len(prompts)} prompts and {len(pairs)} pairs of contenders leave nothing to rate")
    rng = np.random.default_rng(seed)
    asked = [(row, *pair) for row in range(len(prompts)) for pair in pairs]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    swapped = rng.integers(2, size=len(asked))
    ballots, hidden = [], []
    content = json.dumps([list(prompts), {name: list(texts) for name, texts in answers.items()}, pairs, seed])
    batch = hashlib.sha256(content.encode()).hexdigest()[:6]  # so that a key is not taken for that of other ballots
    for number, ((row, *pair), swap) in enumerate(zip(asked, swapped), 1):
        left, right = pair[::-1] if swap else pair
        name = f"{batch}-{number:0{len(str(len(asked)))}}"
        ballots.append(dict(zip(BALLOT, (name, prompts[row], answers[left][row], answers[right][row], ""))))
        hidden.append({"id": name, "row": row, "left": left, "right": right})
    WRITERS[path.suffix](path, ballots)
    write_jsonl(key, hidden)
    return len(ballots)


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, BALLOT)
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())


WRITERS = {".jsonl": write_jsonl, ".csv": _write_csv}


def read_ballots(paths: dict[str, str | Path], key: str | Path, *, partial: bool = False) -> list[Vote]:
    """The votes in rated files. paths: rater -> file; key: as `write_ballots` wrote it.

    partial: ballots without a rating are left out. Raises FtjaxError that names the file and the line: no rating, an
    unknown one, an id that the key does not have, one that comes twice.
    """
    sides = {entry["id"]: entry for _, entry in _lines(Path(key), ("id", "row", "left", "right"))}
    votes = []
    for rater, path in paths.items():
        seen: dict[str, int] = {}
        for line, ballot in _lines(Path(path), ("id", "rating")):
            place, name = f"{path} line {line}", str(ballot["id"])
            if name not in sides:
                raise FtjaxError(f"{place}: the key {key} has no ballot {name!r}{nearest(name, sides)}")
            if name in seen:
                raise FtjaxError(f"{place}: the ballot {name!r} stands in line {seen[name]} already")
            seen[name] = line
            said = str(ballot["rating"] or "").strip().lower()
            if not said and partial:
                continue
            if said not in RATINGS:
                found = f"{said!r}{nearest(said, RATINGS)}" if said else "nothing (partial=True leaves such lines out)"
                raise FtjaxError(f"{place}: `rating` should be {', '.join(RATINGS)}; found {found}")
            entry = sides[name]
            first, second = sorted((entry["left"], entry["right"]))
            share = RATINGS[said] if first == entry["left"] else 1 - RATINGS[said]
            votes.append(Vote(rater, int(entry["row"]), first, second, share))
    return votes


def _lines(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv file, in which every row has the columns `needed`."""
    if path.suffix not in WRITERS:
        raise FtjaxError(f"{path}: expected a file that ends in {' or '.join(WRITERS)}")
    for line, row in numbered(path):
        lacking = [name for name in needed if name not in row]
        if lacking:
            raise FtjaxError(f"{path} line {line}: has no `{lacking[0]}`; it has {', '.join(map(str, row))}")
        yield line, row


# ---------------------------------------------------------------------------------------------- agreement


def agreement(votes: Sequence[Vote]) -> dict:
    """{"kappa", "raters", "ballots"} of what all raters rated: Cohen's kappa of two raters, Fleiss' of more.

    kappa is None where it is undefined: fewer than two raters, no ballot that all rated, or one rating throughout.
    """
    raters = list(dict.fromkeys(vote.rater for vote in votes))
    said: dict[tuple, dict[str, float]] = {}
    for vote in votes:
        said.setdefault((vote.row, vote.first, vote.second), {})[vote.rater] = vote.share
    by_all = [[given[rater] for rater in raters] for given in said.values() if len(given) == len(raters)]
    kappa = None
    if len(raters) > 1 and by_all:
        codes = sorted(set(RATINGS.values()))
        table = np.array([[codes.index(share) for share in row] for row in by_all])
        if len(raters) == 2:
            kappa = cohen_kappa(*table.T)
        else:
            kappa = fleiss_kappa(np.stack([(table == c).sum(1) for c in range(len(codes))], axis=1))
        kappa = None if math.isnan(kappa) else kappa
    return {"kappa": kappa, "raters": len(raters), "ballots": len(by_all)}


def cohen_kappa(x: Sequence, y: Sequence) -> float:
    """Agreement of two raters beyond chance (Cohen 1960); x, y: (N,) categories. NaN where both know only one."""
    x, y = np.asarray(x), np.asarray(y)
    categories = np.unique(np.concatenate([x, y]))
    chance = sum((x == c).mean() * (y == c).mean() for c in categories)
    return _beyond(float((x == y).mean()), float(chance))


def fleiss_kappa(counts) -> float:
    """Agreement of R raters beyond chance (Fleiss 1971). counts (N, categories): raters who put a row there, R a row.

    NaN where all rows are of one category.
    """
    counts = np.asarray(counts, float)
    R = counts.sum(1)
    if len(set(R.tolist())) != 1 or R[0] < 2:
        raise FtjaxError(f"fleiss_kappa: expected two raters or more, as many for each row; found {sorted(set(R))}")
    agree = (counts * (counts - 1)).sum(1) / (R * (R - 1))
    share = counts.sum(0) / counts.sum()
    return _beyond(float(agree.mean()), float((share**2).sum()))


def _beyond(agree: float, chance: float) -> float:
    return (agree - chance) / (1 - chance) if chance < 1 else math.nan


# ---------------------------------------------------------------------------------------------- strengths

PRIOR = 0.5  # wins added each way between every two contenders
ELO = 400 / math.log(10)  # points by which 10 to 1 differ, over log-odds
STEPS = 100


def bradley_terry(wins, prior: float = PRIOR) -> np.ndarray:
    """Log-strengths (..., K), mean 0: the odds that i beats j are exp(s_i - s_j) (Bradley & Terry 1952).

    wins (..., K, K): how often i beat j, ties half to each. prior is added to both sides of every pair, so that one who
    never lost, or never met another, has a strength too; of two contenders these are Haldane's and Anscombe's log-odds
    (1956). With prior 0 the maximum likelihood, and FtjaxError where there is none (Ford 1957). By Newton's method.
    """
    wins = np.asarray(wins, float)
    K = wins.shape[-1]
    apart = ~np.eye(K, dtype=bool)
    if prior == 0 and not _connected(wins):
        raise FtjaxError("bradley_terry: some contenders never lost to the others, or never met them; set a prior")
    wins = np.where(apart, wins + prior, 0)
    met, s = wins + np.swapaxes(wins, -1, -2), np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., :, None]))
        slope = (wins - met * p).sum(-1)
        weight = met * p * (1 - p)
        bend = np.eye(K) * weight.sum(-1)[..., None] - weight + 1 / K  # the last keeps the mean at 0
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        s = s + step / np.maximum(1, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    return s - s.mean(-1, keepdims=True)


def _connected(wins: np.ndarray) -> bool:
    """Whether everyone beat everyone, at least by way of others."""
    from scipy.sparse.csgraph import connected_components

    matrices = wins.reshape(-1, *wins.shape[-2:])
    return all(connected_components(w > 0, directed=True, connection="strong")[0] == 1 for w in matrices)


def strengths(
    votes: Sequence[Vote], *, base: str | None = None, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict]:
    """contender -> {"wins", "ties", "losses", "strength", "elo"}, the strongest first; the last two with intervals.

    strength: by bradley_terry; elo: 1000 for `base`, or for the mean where there is none, and 400 points for odds of 10
    to 1. Intervals resample rows, with all the votes on a row together; at 95 % they held the truth in 92 to 95 % of
    simulated sets of 60 to 600 votes.
    """
    if not votes:
        raise FtjaxError("strengths: there is no vote")
    names = sorted({vote.first for vote in votes} | {vote.second for vote in votes})
    if base is not None and base not in names:
        raise FtjaxError(f"strengths: no vote on {base!r}{nearest(base, names)}; there are {', '.join(names)}")
    at = {row: n for n, row in enumerate(sorted({vote.row for vote in votes}))}
    K, N = len(names), len(at)
    by_row, tally = np.zeros((N, K, K)), Counter()
    for vote in votes:
        n, i, j = at[vote.row], names.index(vote.first), names.index(vote.second)
        by_row[n, i, j] += vote.share
        by_row[n, j, i] += 1 - vote.share
        for name, share in ((vote.first, vote.share), (vote.second, 1 - vote.share)):
            tally[name, {1.0: "wins", 0.5: "ties", 0.0: "losses"}[share]] += 1

    def reduce(sums):
        s = bradley_terry(sums.reshape(-1, K, K))
        zero = s[:, [names.index(base)]] if base is not None else 0
        return {"strength": s, "elo": 1000 + ELO * (s - zero)}

    found = intervals(N, of_sums(by_row.reshape(N, -1), reduce), draws, seed, level)
    order = sorted(range(K), key=lambda k: -found["strength"][k]["value"])
    return {
        names[k]: {what: tally[names[k], what] for what in ("wins", "ties", "losses")}
        | {what: found[what][k] for what in ("strength", "elo")}
        for k in order
    }
