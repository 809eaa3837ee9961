"""Optimizers and schedules, all of them from Optax, composed as the config says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax.models.transformer import BEHIND, STACKS
from ftjax.tree import map_paths


def schedule(config, steps: int, lr: float) -> optax.Schedule:
    """Learning rate at each step (0 first): linear warm-up, then `config.schedule` down to final_lr times the peak.

    wsd: warm-up, stable, linear decay over the last `config.decay` share (Hu et al. 2024, MiniCPM).
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    warmup, end = min(warmup, steps), lr * config.final_lr
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(lr)
    elif config.schedule == "linear":
        after = optax.linear_schedule(lr, end, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, rest, alpha=config.final_lr)
    else:
        decay = min(max(round(config.decay * steps), 1), rest)  # a warm-up may leave fewer steps
        after = optax.linear_schedule(lr, end, decay, transition_begin=rest - decay)
    # The warm-up is (step + 1) / warmup, so that the first batch does not have a learning rate of zero.
    up = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
    return optax.join_schedules([up, after], [warmup]) if warmup else after


def decayed(params) -> dict:
    """Tree of booleans: True for the leaves that weight decay acts on, which are matrices, not vectors of norms, biases
    and adapters."""
    return map_paths(is_matrix, params)


def is_matrix(path: str, leaf) -> bool:
    """Whether a leaf is a matrix, or a stack of them on leading axes of layers and experts. The biases of experts are
    vectors, although one for each expert makes a matrix of them, and so are short filters of channels."""
    return leaf.ndim - (path.split("/", 1)[0] in STACKS) > 1 and not path.endswith(("/bias", "/biases", "/conv"))


def multipliers(
    config, layers: int, lr_scale: Callable = lambda path, optim: 1.0, layer_ids: Callable | None = None
) -> Callable:
    """Factors of the learning rate.

    A factor is the product of what the tuning method says (`Method.lr_scale`) and of layer-wise decay (Howard & Ruder
    2018; Clark et al. 2020, ELECTRA), which is decay^(L-1-l) in layer l, of shape (L, 1, ...) for stacked leaves;
    decay^L for parameters before the blocks and a head tied to them; 1 for parameters after the blocks.

    Args:
        config: config.optim.
        layers: L, the number of layers.
        lr_scale: The method's factor of a path.
        layer_ids: Function from a path to the layers that a stacked leaf holds; None: all layers.

    Returns:
        A function from the path of a trained leaf and the leaf to its factor.
    """

    def multiplier(path: str, leaf):
        first, decay = path.split("/", 1)[0], config.layer_decay
        below = 0
        if first in STACKS:
            ids = layer_ids(path) if layer_ids else np.arange(layers)
            below = layers - 1 - ids.reshape(-1, *(1,) * (leaf.ndim - 1))
        elif first not in BEHIND:
            below = layers
        return np.float32(lr_scale(path, config) * decay**below)

    return multiplier


class Anchor(NamedTuple):
    """State of `anchored`. start: the trained parameters before the first step, float32. importance: see `anchored`;
    None: 1 for all parameters."""

    start: dict
    importance: dict | None


def anchored(weight: float, importance: bool) -> optax.GradientTransformation:
    """Add the gradient of weight · Σ importance · (parameter - its start)² to the gradient.

    Without importance this is L2-SP (Li et al. 2018). With the diagonal of the Fisher information of earlier rows as
    importance, and half the weight, it is EWC (Kirkpatrick et al. 2017). The importance starts as 0; the run sets it
    before the first step. The terms are part of the gradient norm but not of the reported loss.

    Args:
        weight: The weight.
        importance: Whether parameters have an importance each.
    """

    def init(params):
        return Anchor(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params) if importance else None)

    def update(updates, state, params):
        pull = jax.tree.map(lambda x, start: 2 * weight * (x - start), params, state.start)
        pull = jax.tree.map(jnp.multiply, pull, state.importance) if importance else pull
        return jax.tree.map(jnp.add, updates, pull), state

    return optax.GradientTransformation(init, update)


def optimizer(
    config, learning_rate: optax.Schedule, multiplier: Callable | None = None
) -> optax.GradientTransformation:
    """The pull to the start, global-norm clipping, then the optimizer `config.name` with decoupled weight decay.

    Updates are -lr · direction.

    Args:
        config: config.optim.
        learning_rate: A number, or a function of the step.
        multiplier: See `multipliers`; it scales the whole update of a leaf, weight decay included.
    """
    c = config
    decay = optax.add_decayed_weights(c.weight_decay, mask=decayed) if c.weight_decay else optax.identity()
    direction = {
        "adamw": lambda: optax.scale_by_adam(c.b1, c.b2, c.eps),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), _clip_by_rms(1.0)),
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        "sgd": lambda: optax.trace(c.b1) if c.b1 else optax.identity(),
        "muon": lambda: _muon(c),
    }[c.name]()
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    scale = optax.identity()
    if multiplier:
        scale = optax.stateless(lambda updates, _: map_paths(lambda path, u: u * multiplier(path, u), updates))
    pulls = [anchored(w, fisher) for w, fisher in ((c.start_l2, False), (c.ewc / 2, True)) if w]
    return optax.chain(*pulls, clip, direction, decay, optax.scale_by_learning_rate(learning_rate), scale)


def _clip_by_rms(most: float) -> optax.GradientTransformation:
    """Scale the update of each parameter down to a root mean square of `most` (Shazeer & Stern 2018, Adafactor), one a
    layer: a stack is many parameters."""

    def clipped(path, update):
        axes = tuple(range(path.split("/", 1)[0] in STACKS, update.ndim))
        return update / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True)) / most)

    return optax.stateless(lambda updates, _: map_paths(clipped, updates))


def _muon(c):
    """Muon (Jordan et al. 2024) on matrices inside blocks, one a layer; Adam on embeddings, heads, norms and biases."""

    def label(path, leaf):
        return "muon" if path.split("/", 1)[0] in STACKS and is_matrix(path, leaf) else "adam"

    # Stacked matrices are (L, out, in): the layer axis is one of batch, each layer is made orthogonal by itself.
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    muon = optax.contrib.scale_by_muon(
        beta=c.b1, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrices, tree)
    )
    # Scaled to the root mean square of an Adam step, so that one learning rate serves both (Liu et al. 2025,
    # Moonlight).
    rescale = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * 0.2 * jnp.sqrt(max(u.shape[-2:])), updates))
    return optax.partition(
        {"muon": optax.chain(muon, rescale), "adam": optax.scale_by_adam(c.b1, c.b2, c.eps)},
        lambda tree: map_paths(label, tree),
    )
