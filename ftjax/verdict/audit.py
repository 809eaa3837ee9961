"""`ftjax audit RUN`: how well an attacker tells training rows from others, and what that says of a private run.

N members (rows that the checkpoint was trained on), O others, m canaries.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import config as configs
from ftjax import tasks, user_code, xla
from ftjax.data.batches import by_example
from ftjax.data.prepare import given, prepare
from ftjax.errors import WEIGHTS, FtjaxError, NotFinite
from ftjax.evaluation.resample import share_interval
from ftjax.files import replace_json, write_jsonl
from ftjax.lm import open_base
from ftjax.loading import load
from ftjax.objectives import causal
from ftjax.pages import macros
from ftjax.training import privacy, sharding
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.job import scheduled
from ftjax.training.run_folder import read_record, run_config
from ftjax.verdict.memorisation import exposure

FILE = "audit.json"
LEVEL = 0.95
LEAST = 0.2  # share of a text's tokens that min-k% looks at (Shi et al. 2024)
FALSE = (0.01, 0.001)  # rates of false alarms
ROWS = 2000


def audit(
    run_dir: str | Path,
    data: str = "",
    rows: int = ROWS,
    say: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
) -> dict:
    """Attack a finished run, and write the report into its folder as audit.json.

    A held-out row whose tokens are those of a training row is on neither side. Of a mixture, both sides have the same
    shares of its sources.

    Args:
        run_dir: The run folder.
        data: Rows of the same source that were not trained on; empty: the run's validation rows, else its test rows.
        rows: Most rows of each side.
        say: Called with each line for a person.
        overrides: Texts `dotted.key=value`, which name the functions of the run that may be run to make its rows.

    Returns:
        The report: `members`, `others`, `shared` (held-out rows that are training rows too), `attacks` (see `attack`),
        `canaries` (where some were planted), `epsilon` (`rows` and `canaries`: what the attacks prove it to be at
        least; `computed`: that of the run, or None), `succeeds`, `verdict`, and for texts `base`, the attack on the
        base, which saw neither side. If it tells them apart, the sides differ otherwise than by training, and only the
        canaries count; without any, `succeeds` is None.

    Raises:
        FtjaxError: If the run cannot be opened, if it is private and has not ended, if its rows have changed, if
            there are no others, or if its rows are made by code that no override names.
    """
    run_dir, config, kept = Path(run_dir), run_config(run_dir), read_record(run_dir)
    configs.override(config, overrides)
    if left := user_code.not_named_by(overrides, {"data": config.data.to_dict()}):
        raise FtjaxError(
            f"audit: rows of {run_dir} were made by code that only the run folder names, {user_code.listed(left)}, and "
            f"such code is not run. If you trust it, add --config.data.augment.function={left[0][1]}"
        )
    task = tasks.find(config.task.kind)
    if not task.private:
        raise FtjaxError(
            f"audit: task.kind {config.task.kind} has no loss of a single row, by which it could be attacked"
        )
    if config.privacy.epsilon and not kept.get("privacy"):
        raise FtjaxError(
            f"audit: {run_dir} is a private run that has not ended, so that its epsilon is not recorded; finish it "
            "by the command that started it"
        )
    lm = load(run_dir, checkpoint=config.export.checkpoint)
    pool = lm.model.config.head.pool
    found = prepare(config, lm.tokenizer, lm.max_tokens, pool=pool)
    if found.fingerprint != kept["rows"]:
        raise FtjaxError(f"audit: the rows that {run_dir} was trained on have changed; `ftjax check` says which files")
    fresh = functools.partial(given, config, tokenizer=lm.tokenizer, max_positions=lm.max_tokens, pool=pool)
    others = fresh(data).test if data else found.validation if len(found.validation) else found.test
    trained = set(_hashes(found.train.examples))
    apart = np.flatnonzero([text not in trained for text in _hashes(others.examples)])
    planted = sum(canary["planted"] for canary in found.canaries)
    saved = Checkpoints(run_dir, read_only=True)
    steps = saved.best() if config.export.checkpoint == "best" else saved.latest()
    skipped = saved.record(steps).get("skipped", [])
    saved.close()
    members = drawn(config, found, lm.tokenizer, steps, planted, skipped)
    inside, outside = matched(found.train.source[members] * (not data), others.source[apart], rows)
    if not len(outside):
        raise FtjaxError(
            "audit: the run has no held-out rows that were not trained on too; name rows of the same source by --data"
        )
    sides = found.train.examples.select(members[inside]), others.examples.select(apart[outside])

    base = None
    if task.head == "causal":  # with the rows of tokens that the run added, as they were before the first step
        base, _ = open_base(lm.folder, "auto", config, tokenizer_folder=lm.tokenizer_folder)
    scored = functools.partial(scores, config, lm, base)
    delta = config.privacy.delta if config.privacy.epsilon else 0.0
    inside, outside = map(scored, sides)
    tried = {name: (inside[name], outside[name]) for name in inside}
    control = tried.pop("base", None)  # it has seen neither side
    if 0 < planted < len(found.canaries):
        with tempfile.TemporaryDirectory() as folder:
            losses = []
            for side in (True, False):
                write_jsonl(
                    file := Path(folder) / "rows.jsonl", [c["row"] for c in found.canaries if c["planted"] == side]
                )
                losses.append(scored(fresh(str(file)).test.examples)["loss"])
        tried["canaries"] = tuple(losses)
    level = 1 - (1 - LEVEL) / len(tried)  # so that all intervals hold together
    report = {"members": len(sides[0]), "others": len(sides[1]), "shared": len(others) - len(apart)}
    report["attacks"] = {name: attack(*pair, level) for name, pair in tried.items()}
    proven = {}
    if control:
        report["base"] = attack(*control, LEVEL)
    fair = not control or report["base"]["low"] <= 0.5 <= report["base"]["high"]
    if fair:
        proven["rows"] = max(least_epsilon(*pair, delta) for name, pair in tried.items() if name != "canaries")
    if "canaries" in tried:
        inside, outside = tried["canaries"]
        bits = [exposure(-x, -outside) for x in inside]
        report["canaries"] = {"planted": len(inside), "others": len(outside), "mean": float(np.mean(bits))}
        report["canaries"] |= {"highest": max(bits), "most": math.log2(len(outside) + 1)}
        proven["canaries"] = one_run_epsilon(inside, outside, delta)
    computed = (kept.get("privacy") or {}).get("epsilon")
    report["epsilon"] = proven | {"computed": computed, "delta": delta}
    counted = [a for name, a in report["attacks"].items() if fair or name == "canaries"]
    report["succeeds"] = any(a["low"] > 0.5 for a in counted) if counted else None
    words = macros("audit.jinja")
    report["verdict"] = words.verdict(report, fair)
    replace_json(run_dir / FILE, report)
    say(f"{words.text(report, FALSE)}\nthe report is in {run_dir / FILE}")
    return report


def drawn(config, data, tokenizer, steps: int, planted: int = 0, skipped: Sequence[dict] = ()) -> np.ndarray:
    """Indices of the training examples, canaries aside, that the first steps of a run were trained on.

    A run of less than an epoch, the draws of a private run and the shares of a mixture leave examples out.

    Args:
        config: The run's config.
        data: Its rows.
        tokenizer: Its tokenizer.
        steps: Number of steps.
        planted: Number of canaries, which are the last rows.
        skipped: The steps that were left out, see loop.Standing.

    Raises:
        FtjaxError: If a private run's secret is not in its folder, or if there is no such example.
    """
    if config.privacy.epsilon and not (file := Path(config.run_dir) / privacy.SECRET).is_file():
        raise FtjaxError(f"audit: {file} is missing, from which the rows of each step follow; restore the file")
    mesh = sharding.abstract_mesh({"sequence": max(1, config.mesh.sequence)})
    batches, last = scheduled(config, data, mesh, tokenizer).batches, data.train.pieces[-1]
    seen = np.zeros(len(data.train), bool)
    left_out = {step for bad in skipped for step in range(bad.get("back_to", bad["step"] - 1), bad["step"])}
    for step in range(steps):
        if step in left_out:
            continue
        seen[np.concatenate(batches.rows(step))] = True
        if seen.all():
            break
    seen[len(seen) - np.count_nonzero(last.kept >= len(last.table) - planted) :] = False
    if not seen.any():
        raise FtjaxError(f"audit: {config.run_dir} has a checkpoint that was trained on no row of data.train; train on")
    return np.flatnonzero(seen)


def matched(inside: np.ndarray, outside: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose members and others with the same shares of sources: another mixture would tell them apart by itself.

    Args:
        inside: (N,) source of each member.
        outside: (O,) source of each other.
        most: Most rows of each side.

    Returns:
        Ascending indices of the members and of the others.
    """
    places = [[np.flatnonzero(side == z) for z in np.intersect1d(inside, outside)] for side in (inside, outside)]
    counts = np.array([[len(own) for own in side] for side in places])
    shares, chosen = counts[0] / max(1, counts[0].sum()), []
    for side, count in zip(places, counts, strict=True):
        size = min(most, (count / shares).min(initial=most))
        each = [own[_spread(len(own), max(1, round(size * share)))] for own, share in zip(side, shares, strict=True)]
        chosen.append(np.sort(np.concatenate([np.zeros(0, int), *each])))
    return chosen[0], chosen[1]


def _hashes(examples) -> list[int]:
    """The hash of the tokens of each example."""
    ends = examples.start + examples.length
    return [hash(examples.ids[a:b].tobytes()) for a, b in zip(examples.start.tolist(), ends.tolist(), strict=True)]


def scores(config, lm, base, examples) -> dict[str, np.ndarray]:
    """Scores of N examples, each higher for an example that the model knows better, in nats.

    Args:
        config: The run's config.
        lm: The trained model.
        base: The model before training; None: not for this task, because its head has no start in common.
        examples: The examples.

    Returns:
        `loss`, the negative mean loss; for texts also `relative`, the same less that of the base, `least`, the mean
        log-probability of the least likely LEAST of the tokens, and `base`, the base's own negative mean loss.

    Raises:
        NotFinite: If a loss is NaN or infinite.
    """
    task = tasks.find(config.task.kind)
    layout = task.layout(config, lm.tokenizer)

    def logs(lm):
        @xla.jit
        def single(variables, batch):
            if task.head == "causal":
                return causal.log_probs(lm.model, variables, batch)

            def loss(row):
                row = jax.tree.map(lambda x: x[None], row)
                total, weight, _ = task.sums(lm.model, variables, row, **task.always(config))
                return -total / jnp.maximum(weight, 1)

            return jnp.broadcast_to(jax.vmap(loss)(batch)[:, None], batch["weights"].shape)

        size = config.evaluate.batch_size or config.train.batch_size
        run = functools.partial(single, lm.variables)
        return by_example(run, examples, size, int(examples.length.max()), **layout)

    own = [x.astype(np.float64) for x in logs(lm)]
    found = {"loss": np.array([x.mean() for x in own])}
    if base:
        before = np.array([x.mean(dtype=np.float64) for x in logs(base)])
        least = [np.sort(x)[: max(1, round(LEAST * len(x)))].mean() for x in own]
        found |= {"relative": found["loss"] - before, "least": np.array(least), "base": before}
    if not all(np.isfinite(score).all() for score in found.values()):
        raise NotFinite(f"audit: the loss of a row is NaN or infinite. {WEIGHTS}")
    return found


def attack(members: np.ndarray, others: np.ndarray, level: float) -> dict[str, float]:
    """How well a score tells members from others.

    Args:
        members: (N,) scores, higher for what looks like a member.
        others: (O,) scores.
        level: Confidence of the intervals.

    Returns:
        `auc` (chance: 0.5) with `low` and `high`, by DeLong et al. 1988; for each rate of FALSE the share of members
        that are found at this rate of false alarms (chance: the same rate), `tpr_0.01`, with `_low` and `_high`
        (Clopper-Pearson).
    """
    from scipy import stats

    N, M = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    above = (ranks[:N] - stats.rankdata(members)) / M  # share of the others below each member
    below = 1 - (ranks[N:] - stats.rankdata(others)) / N
    spread = math.sqrt(above.var() / max(N - 1, 1) + below.var() / max(M - 1, 1))
    half = stats.norm.ppf((1 + level) / 2) * spread
    auc = float(above.mean())
    found = {"auc": auc, "low": max(0.0, auc - half), "high": min(1.0, auc + half)}
    for rate in FALSE:
        hits = int((members > np.sort(others)[::-1][int(rate * M)]).sum())
        low, high = map(float, share_interval(hits / N, N, level))
        name = f"tpr_{rate:g}"
        found |= {name: hits / N, f"{name}_low": low, f"{name}_high": high}
    return found


def least_epsilon(members: np.ndarray, others: np.ndarray, delta: float) -> float:
    """What epsilon is at least if a threshold on a score tells members from others so well (Nasr et al. 2021).

    Half of the rows choose the threshold, the other half gives Clopper-Pearson bounds of both rates. Because one run
    gives all rows, this is an estimate; `one_run_epsilon` is a bound.

    Args:
        members: (N,) scores.
        others: (O,) scores.
        delta: That of the guarantee.
    """

    def bound(members, others, cuts):
        hits, alarms = ((x > cuts[:, None]).mean(1) for x in (members, others))
        found = share_interval(hits, len(members), LEVEL)[0]
        false = share_interval(alarms, len(others), LEVEL)[1]
        ratios = (found - delta) / false, (1 - false - delta) / (1 - found)
        return np.log(np.maximum(np.maximum(*ratios), 1.0))

    if min(len(members), len(others)) < 2:
        return 0.0
    cuts = np.quantile(others[::2], np.linspace(0, 1, 101))
    best = int(np.argmax(bound(members[::2], others[::2], cuts)))
    return float(bound(members[1::2], others[1::2], cuts[best : best + 1])[0])


def one_run_epsilon(planted: np.ndarray, others: np.ndarray, delta: float) -> float:
    """What epsilon is at least, by the canaries of one run (Steinke, Nasr and Jagielski 2023, theorem 5.2).

    The attacker guesses that the r / 2 canaries of the highest scores were planted, and that the r / 2 of the lowest
    were not, for an r of m, m / 2, m / 4 and m / 8. The confidence is LEVEL for all of them together.

    Args:
        planted: Scores of the canaries that were trained on; a coin decided about each.
        others: Scores of the other canaries.
        delta: That of the guarantee.
    """
    truths = np.repeat([True, False], [len(planted), len(others)])
    order = np.lexsort((truths, -np.concatenate([planted, others])))  # of equal scores, every guess is wrong
    truths, m, found = truths[order], len(truths), 0.0
    for part in (1, 2, 4, 8):
        half = m // (2 * part)
        right = int(truths[:half].sum() + (~truths[m - half :]).sum())
        low, high = 0.0, 20.0
        for _ in range(20 if half else 0):
            middle = (low + high) / 2
            rejected = p_value(m, 2 * half, right, middle, delta) < (1 - LEVEL) / 4
            low, high = (middle, high) if rejected else (low, middle)
        found = max(found, low)
    return found


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most probability of so many right guesses for a training that is (epsilon, delta)-private; see one_run_epsilon.

    Args:
        m: Number of canaries.
        guesses: Number of guesses.
        right: Number of right ones.
        epsilon: Of the guarantee that is tested.
        delta: Of the guarantee that is tested.
    """
    from scipy import stats

    chance = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    short = np.cumsum(chance.pmf(np.arange(right - 1, -1, -1))) / np.arange(1, right + 1)
    return float(min(1.0, chance.sf(right - 1) + 2 * m * delta * short.max(initial=0.0)))


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` ascending indices, spread evenly over `count`."""
    return np.linspace(0, count - 1, min(most, count)).astype(int)
