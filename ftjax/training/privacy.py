"""Training with differential privacy: DP-SGD (Abadi et al. 2016), with any optimizer.

Every step draws each example with the same probability (`data.batches.Poisson`), scales the gradient of each example
down to a norm of at most `privacy.clip`, and adds normal noise once to the sum. Two sets of training examples are
neighbours if one of them has one example more. With `privacy.unit`, all examples of a person count as one example: a
unit. N units, B expected units a step, R rows that hold them, K rows of each unit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from ftjax import config as configs
from ftjax import pages, tasks
from ftjax.data.table import need_columns
from ftjax.errors import FtjaxError
from ftjax.files import below, replacing
from ftjax.foreign import read_json
from ftjax.models.by_device import by_device
from ftjax.training import step

EMPTY = 10  # without privacy.unit_most, the person with most rows has at most this many times the average
SECRET = "secret"  # the file of a run folder from which draws and noise follow
LEAST = 0.2  # least noise that is tried: without noise there is no finite epsilon
AT_ONCE = 1 << 26  # bytes of single examples' gradients that a device holds at once

# Fields that break the guarantee -> (the value that a private run needs, why).
REFUSED = {
    "data.packing": (False, "a packed row has one gradient for several examples, which cannot be clipped one by one"),
    "data.mixture": ((), "the accountant assumes that all examples are drawn with the same probability"),
    "data.augment.copies": (0, "one example would be trained on several times as different examples"),
    "data.augment.prompts": ((), "one example would be trained on several times as different examples"),
    "data.clean.exact": (False, "one example would decide whether another is trained on"),
    "data.clean.near": (0.0, "one example would decide whether another is trained on"),
    "task.balanced": (False, "the accountant assumes that all examples are drawn with the same probability"),
    "task.class_weights": ((), "the gradient is of the mean loss of each example, in which its weight cancels"),
    "task.threshold": ("", "the threshold would be chosen on rows without noise"),
    "task.reference": ("", "a teacher may have been trained on the same rows without privacy"),
    "optim.ewc": (0.0, "the weights of the parameters are computed from earlier rows without noise"),
    "train.neftune": (0.0, "epsilon is computed from the noise on clipped gradients alone"),
    "train.on_bad_step": ("stop", "the guard would look at losses without noise to decide about an update"),
    "train.spike": (0.0, "the guard would look at losses without noise to decide about an update"),
    "train.patience": (0, "the moment of stopping would be chosen on rows without noise"),
    "train.select": ("val_loss", "no checkpoint is selected in a private run"),
    "export.checkpoint": ("last", "the best checkpoint would be chosen on rows without noise"),
    "mesh.fsdp": (1, "single examples' gradients are computed with whole weights; mesh.data shares the rows"),
    "mesh.expert": (1, "single examples' gradients are computed with whole weights; mesh.data shares the rows"),
    "mesh.sequence": (1, "single examples' gradients are computed from whole rows; mesh.data shares the rows"),
    "mesh.tensor": (1, "single examples' gradients are computed with whole weights; mesh.data shares the rows"),
}  # fmt: skip


def check(config) -> None:
    """Raise FtjaxError if private training is on and the config has a setting that breaks the guarantee."""
    if not config.privacy.epsilon:
        return
    if not tasks.find(config.task.kind).private:
        able = [kind for kind, task in tasks.every().items() if task.private]
        raise FtjaxError(
            f"privacy.epsilon: task.kind {config.task.kind} cannot be trained privately, because its loss may compare "
            f"examples, or a row may give several examples; {', '.join(able)} can"
        )
    if jax.process_count() > 1:
        raise FtjaxError(
            "privacy.epsilon: private training runs in one process, with any number of its devices; that several "
            "processes add the noise once has not been tested"
        )
    values = configs.flat(config)
    for key, (needed, why) in REFUSED.items():
        if values[key] != needed:
            raise FtjaxError(
                f"{key}: private training (privacy.epsilon) needs {needed!r}, found {values[key]!r}: {why}"
            )


def settle(config, part, steps: int) -> None:
    """Fill in `privacy.noise`, or check the given one.

    Args:
        config: The config, whose batch size is filled in.
        part: The training examples, a data.prepare.Part.
        steps: Number of steps of the run.

    Raises:
        FtjaxError: If an example shares its row with another one, if there are fewer examples than a batch holds, if
            delta is not below 1 / N, if the noise given is too small, or if one person has most of the rows.
    """
    privacy, N = config.privacy, len(part)
    privacy.unit_rows = 1
    if privacy.unit:
        unit = units(privacy.unit, part)
        N, largest = int(unit.max()) + 1, int(np.bincount(unit).max())
        if largest > EMPTY * len(unit) / N and not privacy.unit_most:
            raise FtjaxError(
                f"privacy.unit: one person has {largest:,} rows, and a person has {len(unit) / N:.1f} on average. A "
                f"step takes the space of {largest:,} rows for each person, most of it empty. Set privacy.unit_most to "
                f"the number of rows of a person that are trained on, or to {largest} to train on all"
            )
        privacy.unit_rows = min(largest, privacy.unit_most or largest)
    elif any(len(np.unique(piece.kept)) < len(piece.kept) for piece in part.pieces):
        raise FtjaxError(
            "privacy.epsilon: some rows gave several examples each, and the guarantee would hold for each of them and "
            "not for the row; set data.long to truncate or drop, or privacy.unit to a column that names the row"
        )
    if config.train.batch_size > N:
        of = "persons" if privacy.unit else "examples"
        raise FtjaxError(f"train.batch_size: {config.train.batch_size} is more than the {N:,} training {of}")
    if privacy.delta * N >= 1:
        raise FtjaxError(
            f"privacy.delta: {privacy.delta:g} is not below 1 / {N:,}, the number of examples or persons: publishing "
            f"one of them whole would be allowed. Set it to at most {0.1 / N:.0e}"
        )
    how = privacy.accountant, config.train.batch_size / N, steps, privacy.delta
    if privacy.noise is None:
        privacy.noise = calibrated(privacy.epsilon, *how)
    found = epsilon(privacy.noise, *how)
    if found > privacy.epsilon * (1 + 1e-6):
        raise FtjaxError(
            f"privacy.noise: {privacy.noise:g} gives epsilon {found:.3f} after {steps:,} steps, more than "
            f"privacy.epsilon {privacy.epsilon:g}; leave privacy.noise None, or train fewer steps"
        )


def fullest(config, ways: int) -> int:
    """Rows of a step, without its rows of data: for a private run, those of a step whose number of units is 4 standard
    deviations above the expected one. ways: number of parts of the mesh that rows are split over."""
    B, multiple = config.train.batch_size, 8 * ways * config.train.accumulate
    if not config.privacy.epsilon:
        return B
    return math.ceil((B + 4 * math.sqrt(B)) / multiple) * multiple * config.privacy.unit_rows


def units(column: str, part) -> np.ndarray:
    """(N,) number of the person of each example, from 0.

    Args:
        column: The column that names the person.
        part: The training examples, a data.prepare.Part.

    Raises:
        FtjaxError: If rows lack the column, or if a cell is empty or not a text or whole number.
    """
    names: list = []
    for piece in part.pieces:
        need_columns([column], piece.table.columns, f"privacy.unit: {piece.table.files[0]}")
        cells = list(piece.table.column(column))
        for at in np.unique(piece.kept).tolist():
            if not isinstance(cells[at], str | int) or cells[at] == "":
                raise FtjaxError(
                    f"privacy.unit: {piece.table.place(at)} has {cells[at]!r} in {column!r}; expected the name of a "
                    "person, a text or a whole number"
                )
        names += [str(cells[at]) for at in piece.kept.tolist()]
    return np.unique(names, return_inverse=True)[1]


def secret_of(config) -> str:
    """64 hexadecimal digits from which the run's draws and noise follow: the run's own, or newly drawn for a new run.

    Raises FtjaxError if the file of the run does not hold them.
    """
    file = Path(config.run_dir) / SECRET
    if config.overwrite or not file.is_file():
        return os.urandom(32).hex()
    found = file.read_text().strip()
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise FtjaxError(f"{file}: expected the 64 hexadecimal digits that the run wrote; restore the file")
    return found


def keep_secret(run_dir: Path, secret: str, going_on: bool) -> None:
    """Write the secret of a new run, readable for its owner only. Raises FtjaxError if a resumed run has lost its."""
    if going_on and not (run_dir / SECRET).is_file():
        raise FtjaxError(
            f"{run_dir / SECRET}: is missing. The run's draws and noise follow from it, so the run cannot go on; "
            "restore the file, or train again with --config.overwrite=True"
        )
    if not going_on:
        with replacing(run_dir / SECRET) as draft:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secret)


def number_of(secret: str, use: str) -> int:
    """A number of 256 bits that follows from the secret, another one for each use."""
    return int.from_bytes(hashlib.sha256(f"{use} {secret}".encode()).digest())


def key_of(secret: str) -> np.ndarray:
    """(2,) uint32, the data of the random key of noise and dropout. It is an input of the step, and not a constant of
    its program, which a cache on disk may hold."""
    return np.array([number_of(secret, "noise") >> shift & 0xFFFFFFFF for shift in (0, 32)], np.uint32)


def _library():
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise FtjaxError(
            "privacy.epsilon: private training needs the package dp-accounting; pip install 'ftjax[privacy]'"
        ) from None
    return dp_accounting, {"rdp": rdp.RdpAccountant, "pld": pld.PLDAccountant}


def epsilon(noise: float, accountant: str, rate: float, steps: int, delta: float) -> float:
    """The epsilon of a number of steps, for neighbours of which one has one example more.

    Args:
        noise: Standard deviation of the noise as a multiple of the clipping norm.
        accountant: rdp or pld.
        rate: Probability with which a step draws an example.
        steps: Number of steps.
        delta: Probability with which the guarantee may fail.

    Raises:
        FtjaxError: If dp-accounting is not installed.
    """
    if not steps:
        return 0.0
    dp, accountants = _library()
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    return float(accountants[accountant]().compose(event, steps).get_epsilon(delta))


def calibrated(target: float, accountant: str, rate: float, steps: int, delta: float) -> float:
    """The least noise with which the steps keep to epsilon `target`, to 1e-4; at least LEAST. See `epsilon`."""
    dp, accountants = _library()
    if epsilon(LEAST, accountant, rate, steps, delta) < target:
        return LEAST

    def event(noise: float):
        return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)

    bracket = dp.LowerEndpointAndGuess(LEAST, 1.0)
    return float(dp.calibrate_dp_mechanism(accountants[accountant], event, target, delta, bracket, tol=1e-4))


def spent(config, rate: float, steps: int) -> dict:
    """{"epsilon": what the steps so far have spent}; empty if private training is off. rate: see `epsilon`."""
    privacy = config.privacy
    if not privacy.epsilon:
        return {}
    return {"epsilon": epsilon(privacy.noise, privacy.accountant, rate, steps, privacy.delta)}


def record(config, rate: float, steps: int) -> dict:
    """What a checkpoint and a run keep of the guarantee: {"privacy": {...}}, empty if private training is off."""
    if not (found := spent(config, rate, steps)):
        return {}
    how = {name: config.privacy[name] for name in ("delta", "clip", "noise", "accountant", "unit")}
    return {"privacy": found | how | {"rate": rate, "steps": steps}}


def together(folder: Path) -> str:
    """A sentence that says what all finished private runs below a folder have spent; empty if there are not several."""
    records = [read_json(path) for path in below(folder) if path.name == "run.json"]
    found = [record["privacy"] for record in records if "privacy" in record]
    if len(found) < 2:
        return ""
    epsilon, delta = (sum(kept[name] for kept in found) for name in ("epsilon", "delta"))
    return (
        f"privacy: the {len(found)} private runs in {folder} have together spent epsilon {epsilon:.3f} at delta "
        f"{delta:.2g}, if they read the same rows. Whoever publishes more than one of them, or the one with the best "
        "score, spends that much, and the scores themselves are measured without noise"
    )


def card(kept: dict, base: str) -> str:
    """The README.md of an exported model. kept: "privacy" of `record`; base: name of the base model."""
    return pages.page("privacy.md", **{"unit": ""} | kept, base=base)


def gradients_of(config) -> Callable:
    """The function by which a step of this config computes its gradient, see step.train_step."""
    if not config.privacy.epsilon:
        return step.gradients
    return functools.partial(
        gradients, clip=config.privacy.clip, noise=config.privacy.noise or 0.0, expected=config.train.batch_size,
        unit=config.privacy.unit_rows,
    )  # fmt: skip


def gradients(
    sums, variables, trained, frozen, batch, key, accumulate: int, *, clip, noise, expected, unit=1,
    at_once=AT_ONCE,
):  # fmt: skip
    """The noisy mean of the clipped gradients of single units; see step.gradients for the other arguments.

    The loss of a unit is its mean over the trained tokens of its examples. Each device computes several units of its
    own at once, one group after another. The noise is drawn once, for the sum over all of them.

    Args:
        batch: {name: array (R, ...)}; a row is an example, or padding, whose weights are 0.
        accumulate: At most R / accumulate examples are computed at once.
        clip: Largest norm of the gradient of one example.
        noise: Standard deviation of the noise as a multiple of `clip`.
        expected: B, which the sum is divided by. The true number of units in the batch would tell who is in it.
        unit: K; neighbouring rows of a unit, see data.batches.Poisson.
        at_once: Most bytes of gradients that a device holds at once, unless one is larger.

    Returns:
        (gradient tree in float32, weight sum, metric sums).
    """
    mesh, keys = jax.sharding.get_abstract_mesh(), jax.random.split(key)
    ways = 1 if mesh.empty else mesh.shape["data"]
    rows = next(iter(batch.values())).shape[0] // ways

    def local(trained, frozen, batch, key):
        first = jax.lax.axis_index("data") * (rows // unit) if ways > 1 else 0
        return clipped_sums(
            sums, variables, trained, frozen, batch, key, clip=clip, first=first,
            group=group(rows // unit, accumulate, trained, at_once), unit=unit,
        )  # fmt: skip

    total = local
    if ways > 1:
        whole, by_rows = PartitionSpec(), PartitionSpec("data")
        summed = lambda *arrays: jax.lax.psum(local(*arrays), "data")  # noqa: E731
        total = by_device(summed, mesh, mesh.axis_names, (whole, whole, by_rows, whole), whole)
    gradient, weight, metrics = total(trained, frozen, batch, keys[0])
    leaves, tree = jax.tree.flatten(gradient)
    draws = jax.random.split(keys[1], len(leaves))
    noisy = [x + noise * clip * jax.random.normal(k, x.shape) for x, k in zip(leaves, draws, strict=True)]
    return jax.tree.unflatten(tree, [x / expected for x in noisy]), weight, metrics


def group(rows: int, accumulate: int, trained, at_once: int) -> int:
    """Number of units that a device computes at once: the largest divisor of their number within both limits.

    Args:
        rows: Units of the device.
        accumulate: Least number of groups.
        trained: Tree of trained parameters.
        at_once: Most bytes of gradients.
    """
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
    most = max(1, min(rows // accumulate, at_once // size))
    return max(n for n in range(1, most + 1) if rows % n == 0)


def clipped_sums(sums, variables, trained, frozen, batch, key, *, clip, group: int, unit: int = 1, first=0):
    """Sums of the clipped gradients of single units.

    Args:
        sums: See step.gradients.
        variables: See step.gradients.
        trained: Tree of trained parameters.
        frozen: Tree of frozen parameters.
        batch: {name: array (R, ...)}.
        key: Random key of dropout; each unit has its own.
        clip: Largest norm.
        group: Number of units that are computed at once, a divisor of R / K.
        unit: K.
        first: Number of the first unit in the whole batch.

    Returns:
        (gradient tree in float32, weight sum, metric sums).
    """

    def example(row, number):
        rngs = step.rngs(jax.random.fold_in(key, number))

        def loss(trained):
            total, weight, metrics = sums(variables(trained, frozen), row, rngs=rngs)
            return total / step.divisor(weight), (weight, metrics)

        (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        gradient = step.as_float32(gradient)
        norm = optax.tree.norm(gradient)
        return gradient, jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30)), aux

    def examples(rows, numbers, width=None):
        rows = jax.tree.map(lambda x: x[:, :, :width], rows) if width else rows
        gradient, scale, aux = jax.vmap(example)(rows, numbers)
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), gradient), *jax.tree.map(lambda x: jnp.sum(x, 0), aux)

    def narrow(rows, numbers):
        """`examples` without the columns in which the group has padding only; nothing for a group of empty rows."""
        if "segment_ids" not in rows:
            return examples(rows, numbers)
        longest = jnp.max(jnp.sum(rows["segment_ids"] > 0, -1))
        sizes = widths(rows["segment_ids"].shape[-1])
        able = [lambda *_: zeros, *(functools.partial(examples, width=width) for width in sizes)]
        return jax.lax.switch(jnp.searchsorted(jnp.array([0, *sizes]), longest), able, rows, numbers)

    rows = jax.tree.map(lambda x: x.reshape(-1, group, unit, *x.shape[1:]), batch)
    numbers = first + jnp.arange(next(iter(batch.values())).shape[0] // unit).reshape(-1, group)
    zeros = step.zeros_of(examples, rows, numbers)
    return step.summed(narrow, zeros, rows, numbers)


def widths(T: int) -> list[int]:
    """The lengths that groups of rows are cut to, ascending, the last being T. Each is compiled once."""
    return sorted({T, *(-(-T // (8 * part)) * 8 for part in (2, 4, 8) if T >= 8 * part)})
