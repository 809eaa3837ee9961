"""One training step and one evaluation step: pure functions, which the caller compiles.

A microbatches, B rows a step, b = B / A rows a microbatch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax.tree import flatten

MEDIAN_OF = 50  # losses; the guard against spikes compares a loss with their median


class State(NamedTuple):
    """The arrays that a step changes. The frozen parameters are passed separately and never donated."""

    step: jax.Array  # steps taken, () int32
    trained: dict
    optimizer: Any
    ema: dict | None = None  # exponential moving average of `trained`, float32; None where none is kept
    guard: dict | None = None  # what decides whether a step is bad, see `bad_step`; None where no step is left out

    @property
    def averaged(self) -> dict:
        """The parameters that are validated, kept as the best and exported: the moving average if there is one."""
        return self.trained if self.ema is None else self.ema


COUNTS = ("tokens", "bad", "skipped", "in_a_row", "norms")  # entries of a report that are no figures of the step
NAMES = {"correct": "accuracy"}  # sum of an objective -> name of its mean


def as_float32(tree):
    """Every leaf in float32. Gradients, moments and updates are kept in float32, whatever the dtype of the weights."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def init_state(optimizer, trained, ema: float = 0.0, guarded: bool = False) -> State:
    """The state before the first step, with a moving average if its decay `ema` is not 0. guarded: see `train_step`."""
    start = as_float32(trained)
    average = jax.tree.map(jnp.copy, start) if ema else None  # buffers of its own, because the step donates both
    zero = jnp.zeros((), jnp.int32)
    guard = {"losses": jnp.full(MEDIAN_OF, jnp.nan), "skipped": zero, "in_a_row": zero} if guarded else None
    return State(zero, trained, optimizer.init(start), average, guard)


def gradients(sums, variables, trained, frozen, batch, key, accumulate: int):
    """Gradient of the loss, which is summed over the batch and divided once by the number of its trained tokens.

    Args:
        sums: sums(variables, batch, rngs=...) -> (loss sum, weight sum, metric sums), see ftjax.objectives. It may have
            a method `of_whole`, see objectives.routed.Sums.
        variables: variables(trained, frozen) -> the Flax variables that the model is applied to.
        trained: Tree of trained parameters.
        frozen: Tree of frozen parameters.
        batch: {name: array (B, ...)}.
        key: Random key of the step.
        accumulate: Number of microbatches, computed one after another. Row r belongs to microbatch r % accumulate, so
            that each microbatch holds rows of every device.

    Returns:
        (gradient tree in float32, weight sum, metric sums).
    """

    more = {}  # what sums of a microbatch must know of the whole batch

    def loss(trained, rows, key):
        total, weight, metrics = sums(variables(trained, frozen), rows, rngs=rngs(key), **more)
        return total, (weight, metrics)

    def microbatch(rows, key):
        (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(trained, rows, key)
        return as_float32(gradient), *aux

    if accumulate == 1:
        total = microbatch(batch, key)
    else:
        rows = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, accumulate)
        if hasattr(sums, "of_whole"):
            of_part = lambda part: sums.of_whole(variables(trained, frozen), part[0], rngs=rngs(part[1]))  # noqa: E731
            more = {"whole": jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_part, (rows, keys)))}
        # A gradient has the shapes of what is trained, so that its backward pass is traced once.
        shaped = lambda rows, key: (as_float32(trained), *loss(trained, rows, key)[1])  # noqa: E731
        total = summed(microbatch, zeros_of(shaped, rows, keys), rows, keys)
    gradient, weight, metrics = total
    return jax.tree.map(lambda g: g / divisor(weight), gradient), weight, metrics


def rngs(key) -> dict:
    """The random keys of a forward pass. One key would draw the same numbers for both."""
    return {"dropout": key, "noise": jax.random.fold_in(key, 1)}


def zeros_of(f, *arrays):
    """Zeros in the shapes of f(*parts), where the parts lie on the leading axis of `arrays`, trees of arrays."""
    shapes = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], arrays))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def summed(f, start, *arrays):
    """`start` plus the sum of f(*parts) over the parts on the leading axis of `arrays`, computed one after another."""
    add = lambda total, parts: (jax.tree.map(jnp.add, total, f(*parts)), None)  # noqa: E731
    return jax.lax.scan(add, start, arrays)[0]


def divisor(weight):
    """The weight sum of a batch as a divisor: 1 if all rows weigh 0, so that such a batch changes nothing."""
    return jnp.where(weight > 0, weight, 1)


def norms_by_layer(gradient: dict) -> dict[str, jax.Array]:
    """{"layers": (L,), any other first part of a path: ()} norms of a gradient tree.

    If the leaves of the stack differ in length, because not all of its layers are trained, "layers" is one number too.
    """
    sums: dict[str, jax.Array] = {}
    leaves = flatten(gradient)
    lengths = {x.shape[:1] for path, x in leaves.items() if path.startswith("layers/")}
    for path, x in leaves.items():
        part = path.partition("/")[0]
        axes = tuple(range(1, x.ndim)) if part == "layers" and len(lengths) == 1 else None
        sums[part] = sums.get(part, 0.0) + jnp.sum(jnp.square(x), axes)
    return {part: jnp.sqrt(x) for part, x in sums.items()}


def bad_step(guard: dict, bad, loss, weight, spike: float) -> tuple[jax.Array, dict]:
    """Whether a step is bad, spikes included, and what the guard is after it.

    Args:
        guard: "losses" (MEDIAN_OF,) float32 of the latest good steps, the newest last, NaN where there are fewer;
            "skipped", the number of bad steps so far, and "in_a_row", of those since the last good one, () int32.
        bad: Whether its loss or gradient norm is not finite, () bool.
        loss: Loss of the step, ().
        weight: Weight sum of its batch, (); the loss of a batch of weight 0 is not kept.
        spike: A loss above `spike` times the median of "losses" is bad; 0: no loss is too large. A median of 0 or less
            has no multiples that a loss could be compared with, so that no loss is too large beside it either.

    Returns:
        (() bool, the guard).
    """
    losses = guard["losses"]
    if spike:
        median = jnp.nanmedian(losses)
        bad |= (median > 0) & (loss > spike * median)  # never true before the first good step
    losses = jnp.where(bad | (weight == 0), losses, jnp.append(losses[1:], loss))
    return bad, {
        "losses": losses, "skipped": guard["skipped"] + bad, "in_a_row": jnp.where(bad, guard["in_a_row"] + 1, 0)
    }  # fmt: skip


def train_step(
    state: State, frozen, batch, *, sums, variables, optimizer, seed: int, accumulate=1, ema=0.0, spike=0.0,
    gradients=gradients, temperature=None,
):  # fmt: skip
    """One update.

    The random key depends on seed and step alone, so a resumed run draws the same numbers. If the state has a guard, a
    bad step changes nothing but the number of steps and the guard: the decision is made on the device.

    Args:
        state: The State.
        frozen: Tree of frozen parameters.
        batch: {name: array (B, ...)}, and `key` (2,) uint32 if the random numbers follow from it instead of the seed.
        sums: See `gradients`.
        variables: See `gradients`.
        optimizer: The Optax optimizer.
        seed: Seed of dropout and noise.
        accumulate: Number of microbatches.
        ema: Decay of the moving average. The first step sets the average to its own result, as torch's AveragedModel
            does.
        spike: See `bad_step`.
        gradients: A function with the arguments and results of `gradients`, which computes the gradient.
        temperature: step -> temperature of a mixture of tokens, whose rows are mixed in training alone; None: there is
            nothing to mix.

    Returns:
        (the new State, {"loss", "accuracy", further means of the task, "grad_norm", "tokens"} as device scalars, and
        "norms", see `norms_by_layer`). If "tokens", the sum of weights, is 0, then all means are undefined. With a
        guard also "bad", "skipped" and "in_a_row", see `bad_step`.
    """
    batch = dict(batch)
    key = jax.random.wrap_key_data(batch.pop("key"), impl="threefry2x32") if "key" in batch else jax.random.key(seed)
    key = jax.random.fold_in(key, state.step)
    mixing = {"mixing": {"temperature": temperature(state.step)}} if temperature else {}
    if mixing:
        unmixed = variables
        variables = lambda trained, frozen: unmixed(trained, frozen) | mixing  # noqa: E731
    gradient, weight, metrics = gradients(sums, variables, state.trained, frozen, batch, key, accumulate)
    norms = norms_by_layer(gradient)
    trained = as_float32(state.trained)
    updates, moments = optimizer.update(gradient, state.optimizer, trained)
    updated = optax.apply_updates(trained, updates)
    trained = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, state.trained)
    average = state.ema
    if ema:
        updates_before = state.step if state.guard is None else state.step - state.guard["skipped"]
        decay = jnp.where(updates_before == 0, 0.0, ema)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, updated)
    report = {
        **{NAMES.get(name, name): total / divisor(weight) for name, total in metrics.items()},
        "grad_norm": optax.tree.norm(norms),
        "norms": norms,
        "tokens": weight,
        **mixing.get("mixing", {}),
    }
    after = State(state.step + 1, trained, moments, average)
    bad = ~(jnp.isfinite(report["loss"]) & jnp.isfinite(report["grad_norm"]))
    if state.guard is not None:
        bad, guard = bad_step(state.guard, bad, report["loss"], weight, spike)
        before = state._replace(step=after.step, guard=None)
        after = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)._replace(guard=guard)
        report |= {"bad": bad, "skipped": guard["skipped"], "in_a_row": guard["in_a_row"]}
    return after, report


def compile_step(state_shardings, options: dict | None = None, **fixed):
    """Compile `train_step` with everything but (state, frozen, batch) bound. The state is donated.

    options: compiler options of XLA.
    """
    step = functools.partial(train_step, **fixed)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None), compiler_options=options or None)
