"""Which of two answers is better: win rates by a metric, ballots for blind rating, agreement of raters, strengths.

N rows, K contenders, R raters. A vote is a share of a win: 1 if the first of two wins, 0 if the second does, 0.5 for a
tie.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax.data.read import numbered
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.evaluation.resample import intervals, mean_interval
from ftjax.files import replacing, write_jsonl

# ---------------------------------------------------------------------------------------------- by a metric


def win_rate(a, b, *, higher: bool = True, margin: float = 0.0, level: float = 0.95) -> dict[str, dict]:
    """How often a scores better than b on a row.

    Args:
        a, b: Scores (N,) of the same rows.
        higher: Whether more is better.
        margin: Rows whose scores differ by at most this are ties.
        level: Level of the intervals, see ftjax.evaluation.resample.mean_interval.

    Returns:
        {"win", "tie", "loss", "win_rate"}: shares of rows as {"value", "low", "high"}, with intervals over rows. In
        `win_rate` a tie counts half.

    Raises:
        FtjaxError: If a and b are not scores of the same rows.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise FtjaxError(
            f"win_rate: expected two score arrays of the same shape, one score per row; found {a.shape} and {b.shape}"
        )
    gain = (a - b) if higher else (b - a)
    win, loss = gain > margin, gain < -margin
    shares = {"win": win, "tie": ~(win | loss), "loss": loss, "win_rate": (1 + win - 1.0 * loss) / 2}
    found = {name: (np.mean(x), *mean_interval(x, level)) for name, x in shares.items()}
    return {name: dict(zip(("value", "low", "high"), map(float, three))) for name, three in found.items()}


# ---------------------------------------------------------------------------------------------- ballots

RATINGS = {"left": 1.0, "right": 0.0, "tie": 0.5}  # what a rater writes -> share of a win for the left side
BALLOT = ("id", "prompt", "left", "right", "rating")


class Vote(NamedTuple):
    """A rater's vote on two contenders' answers to a prompt."""

    rater: str
    row: int  # index of the prompt
    first: str  # a contender; always the same one of a pair
    second: str
    share: float  # share of a win for `first`


def write_ballots(
    path: str | Path, key: str | Path, prompts: Sequence[str], answers: dict[str, Sequence[str]], *, seed: int = 0
) -> int:
    """Write a file for blind rating, and a separate key that says whose answer is on which side.

    Args:
        path: The file to rate, .jsonl or .csv: one ballot per line with the columns of BALLOT. A rater fills `rating`
            with a key of RATINGS.
        key: The .jsonl file of the key.
        prompts: N prompts.
        answers: {contender: N answers}. Each pair of contenders is rated.
        seed: Seed that draws sides and order. A ballot's id reveals neither.

    Returns:
        The number of ballots.

    Raises:
        FtjaxError: If the numbers of answers and prompts differ, if the file has another suffix, or if there is nothing
            to rate.
    """
    path, key = Path(path), Path(key)
    if path.suffix not in WRITERS:
        raise FtjaxError(f"{path}: expected a file that ends in {' or '.join(WRITERS)}")
    for name, texts in answers.items():
        if len(texts) != len(prompts):
            raise FtjaxError(
                f"ballots: {name!r} has {len(texts)} answers; expected one for each of {len(prompts)} prompts"
            )
    pairs = list(itertools.combinations(answers, 2))
    if not pairs or not prompts:
        raise FtjaxError(
            f"ballots: nothing to rate: found {len(prompts)} prompts and {len(pairs)} pairs of contenders; expected at "
            "least one of each"
        )
    rng = np.random.default_rng(seed)
    asked = [(row, *pair) for row in range(len(prompts)) for pair in pairs]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    swapped = rng.integers(2, size=len(asked))
    ballots, hidden = [], []
    content = json.dumps([list(prompts), {name: list(texts) for name, texts in answers.items()}, pairs, seed])
    batch = hashlib.sha256(content.encode()).hexdigest()[:6]  # so that a key cannot be used with other ballots
    for number, ((row, *pair), swap) in enumerate(zip(asked, swapped), 1):
        left, right = pair[::-1] if swap else pair
        name = f"{batch}-{number:0{len(str(len(asked)))}}"
        ballots.append(dict(zip(BALLOT, (name, prompts[row], answers[left][row], answers[right][row], ""))))
        hidden.append({"id": name, "row": row, "left": left, "right": right})
    WRITERS[path.suffix](path, ballots)
    write_jsonl(key, hidden)
    return len(ballots)


def _write_csv(path: Path, rows: list[dict]) -> None:
    with replacing(path) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, BALLOT)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {".jsonl": write_jsonl, ".csv": _write_csv}


def read_ballots(paths: dict[str, str | Path], key: str | Path, *, partial: bool = False) -> list[Vote]:
    """Read the votes from rated files.

    Args:
        paths: {rater: file}.
        key: The key that `write_ballots` wrote.
        partial: Leave out ballots without a rating, instead of raising.

    Returns:
        The votes.

    Raises:
        FtjaxError: If a rating is missing or unknown, or if an id is not in the key or occurs twice. It names the file
            and line.
    """
    sides = {entry["id"]: entry for _, entry in _lines(Path(key), ("id", "row", "left", "right"))}
    votes = []
    for rater, path in paths.items():
        seen: dict[str, int] = {}
        for line, ballot in _lines(Path(path), ("id", "rating")):
            place, name = f"{path} line {line}", str(ballot["id"])
            if name not in sides:
                raise FtjaxError(
                    f"{place}: ballot {name!r}{nearest(name, sides)} is not in the key file {key}; use the key written "
                    "with the ballots"
                )
            if name in seen:
                raise FtjaxError(
                    f"{place}: ballot {name!r} is already in line {seen[name]}; remove one of the two lines"
                )
            seen[name] = line
            rating = str(ballot["rating"] or "").strip().lower()
            if not rating and partial:
                continue
            if rating not in RATINGS:
                nothing = "nothing (partial=True leaves such lines out)"
                found = f"{rating!r}{nearest(rating, RATINGS)}" if rating else nothing
                raise FtjaxError(f"{place}: `rating` should be {', '.join(RATINGS)}; found {found}")
            entry = sides[name]
            first, second = sorted((entry["left"], entry["right"]))
            share = RATINGS[rating] if first == entry["left"] else 1 - RATINGS[rating]
            votes.append(Vote(rater, int(entry["row"]), first, second, share))
    return votes


def _lines(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv file, in which every row has the columns `needed`."""
    if path.suffix not in WRITERS:
        raise FtjaxError(f"{path}: expected a file that ends in {' or '.join(WRITERS)}")
    for line, row in numbered(path):
        lacking = [name for name in needed if name not in row]
        if lacking:
            raise FtjaxError(f"{path} line {line}: column `{lacking[0]}` is missing; found {', '.join(map(str, row))}")
        yield line, row


# ---------------------------------------------------------------------------------------------- agreement


def agreement(votes: Sequence[Vote]) -> dict:
    """Agreement of the raters on the ballots that all of them rated.

    Returns:
        {"kappa", "raters", "ballots"}: Cohen's kappa for two raters, Fleiss' for more. kappa is None if it is
        undefined: fewer than two raters, no ballot that all rated, or one rating throughout.
    """
    raters = list(dict.fromkeys(vote.rater for vote in votes))
    by_pair: dict[tuple, dict[str, float]] = {}
    for vote in votes:
        by_pair.setdefault((vote.row, vote.first, vote.second), {})[vote.rater] = vote.share
    by_all = [[given[rater] for rater in raters] for given in by_pair.values() if len(given) == len(raters)]
    kappa = math.nan
    if by_all and len(raters) == 2:
        kappa = cohen_kappa(*zip(*by_all))
    elif by_all and len(raters) > 2:
        kappa = fleiss_kappa([[row.count(share) for share in sorted(RATINGS.values())] for row in by_all])
    return {"kappa": None if math.isnan(kappa) else kappa, "raters": len(raters), "ballots": len(by_all)}


def cohen_kappa(x: Sequence, y: Sequence) -> float:
    """Agreement of two raters beyond chance (Cohen 1960). x, y: (N,) categories. NaN if both use one category only."""
    x, y = np.asarray(x), np.asarray(y)
    categories = np.unique(np.concatenate([x, y]))
    chance = sum((x == c).mean() * (y == c).mean() for c in categories)
    return _beyond(float((x == y).mean()), float(chance))


def fleiss_kappa(counts) -> float:
    """Agreement of R raters beyond chance (Fleiss 1971).

    counts: (N, categories), how many of the R raters put a row into a category. NaN if all rows are of one category.
    Raises FtjaxError if rows have different numbers of raters, or fewer than two.
    """
    counts = np.asarray(counts, float)
    R = counts.sum(1)
    if len(set(R.tolist())) != 1 or R[0] < 2:
        raise FtjaxError(
            f"fleiss_kappa: expected the same number of raters, at least two, for each row; found {sorted(set(R))}"
        )
    agree = (counts * (counts - 1)).sum(1) / (R * (R - 1))
    share = counts.sum(0) / counts.sum()
    return _beyond(float(agree.mean()), float((share**2).sum()))


def _beyond(agree: float, chance: float) -> float:
    return (agree - chance) / (1 - chance) if chance < 1 else math.nan


# ---------------------------------------------------------------------------------------------- strengths

PRIOR = 0.5  # wins that are added in both directions between every two contenders
ELO = 400 / math.log(10)  # Elo points per log-odds: odds of 10 to 1 are 400 points
STEPS = 100


def bradley_terry(wins, prior: float = PRIOR) -> np.ndarray:
    """Log-strengths (..., K) with mean 0, by Newton's method.

    The odds that i beats j are exp(s_i - s_j) (Bradley & Terry 1952).

    Args:
        wins: (..., K, K), how often i beat j; a tie counts half for each.
        prior: Wins that are added to both sides of every pair, so that a contender who never lost, or never met
            another, has a strength too. With two contenders the strengths are the log-odds of Haldane and Anscombe
            (1956). With 0 they are the maximum likelihood.

    Raises:
        FtjaxError: If prior is 0 and there is no maximum (Ford 1957).
    """
    wins = np.asarray(wins, float)
    K = wins.shape[-1]
    apart = ~np.eye(K, dtype=bool)
    if prior == 0 and not _connected(wins):
        raise FtjaxError(
            "bradley_terry: the strengths have no finite estimate, because some contenders never lost to the others or "
            "never met them; set a prior above 0"
        )
    wins = np.where(apart, wins + prior, 0)
    met, s = wins + np.swapaxes(wins, -1, -2), np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., :, None]))
        slope = (wins - met * p).sum(-1)
        weight = met * p * (1 - p)
        bend = np.eye(K) * weight.sum(-1)[..., None] - weight + 1 / K  # 1 / K keeps the mean at 0
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        s = s + step / np.maximum(1, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    return s - s.mean(-1, keepdims=True)


def _connected(wins: np.ndarray) -> bool:
    """Whether every contender beat every other one, directly or through others."""
    from scipy.sparse.csgraph import connected_components

    matrices = wins.reshape(-1, *wins.shape[-2:])
    return all(connected_components(w > 0, directed=True, connection="strong")[0] == 1 for w in matrices)


def strengths(
    votes: Sequence[Vote], *, base: str | None = None, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict]:
    """Strength of each contender by all votes.

    Args:
        votes: The votes, at least one.
        base: The contender with an Elo of 1000; None: the mean has 1000.
        draws: Number of resamples of rows. All votes on a row stay together. At 95 % the intervals covered the truth in
            92 to 95 % of simulated sets of 60 to 600 votes.
        seed: Seed of the resamples.
        level: Level of the intervals.

    Returns:
        {contender: {"wins", "ties", "losses", "strength", "elo"}}, the strongest first. `strength` is that of
        bradley_terry. In `elo` odds of 10 to 1 are 400 points. These two have intervals.

    Raises:
        FtjaxError: If there is no vote, or none on `base`.
    """
    if not votes:
        raise FtjaxError("strengths: there are no votes; pass the ballots of at least one rater")
    names = sorted({vote.first for vote in votes} | {vote.second for vote in votes})
    if base is not None:
        check_known(base, names, "strengths: no vote concerns")
    at = {row: n for n, row in enumerate(sorted({vote.row for vote in votes}))}
    K, N = len(names), len(at)
    by_row, tally = np.zeros((N, K, K)), Counter()
    for vote in votes:
        n, i, j = at[vote.row], names.index(vote.first), names.index(vote.second)
        by_row[n, i, j] += vote.share
        by_row[n, j, i] += 1 - vote.share
        for name, share in ((vote.first, vote.share), (vote.second, 1 - vote.share)):
            tally[name, {1.0: "wins", 0.5: "ties", 0.0: "losses"}[share]] += 1

    def reduce(counts):
        s = bradley_terry((counts @ by_row.reshape(N, -1)).reshape(-1, K, K))
        zero = s[:, [names.index(base)]] if base is not None else 0
        return {"strength": s, "elo": 1000 + ELO * (s - zero)}

    found = intervals(N, reduce, draws, seed, level)
    order = sorted(range(K), key=lambda k: -found["strength"][k]["value"])
    return {
        names[k]: {what: tally[names[k], what] for what in ("wins", "ties", "losses")}
        | {what: found[what][k] for what in ("strength", "elo")}
        for k in order
    }
