"""`ftjax upcycle`: a dense decoder as a mixture of experts with the same logits (Komatsuzaki et al. 2023).

L layers, E experts, D width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.tree import flatten, unflatten

INTO = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}  # model_type -> that of the mixture


def upcycle(folder: Path, out: Path, experts: int, used: int, noise: float = 0.0, seed: int = 0) -> str:
    """Write a mixture whose experts are copies of a dense model's feed-forward parts.

    The weights of the experts used add up to 1, so that without noise the logits are those of the dense model. The
    routers are random, because otherwise all experts would stay alike.

    Args:
        folder: The dense model's directory.
        out: The directory to write.
        experts: E.
        used: Experts of each token.
        noise: Standard deviation of normal noise on the experts, as a multiple of that of each of their kernels.
        seed: Seed of routers and noise.

    Returns:
        The model_type of the mixture.

    Raises:
        FtjaxError: For another family, a head over labels, a shape that the mixture's config.json cannot express, or
            numbers of experts that are impossible.
    """
    family, shape = families.read_config(folder)
    if family.model_type not in INTO or shape.head.task != "causal":
        able = ", ".join(INTO)
        raise FtjaxError(f"{folder}: upcycle is for {able} with a head over the vocabulary, not a {family.model_type}")
    if not 0 < used <= experts or noise < 0:
        raise FtjaxError(
            f"upcycle: expected 1 <= top-k <= experts and noise >= 0; found top-k {used}, experts {experts} and noise "
            f"{noise:g}"
        )
    into, rng = families.FAMILIES[INTO[family.model_type]], np.random.default_rng(seed)
    params = flatten(weights.read_params(folder, family, shape))
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = np.asarray(params.pop(f"layers/mlp/{name}/kernel"))
        copies = np.broadcast_to(kernel[:, None], (shape.layers, experts, *kernel.shape[1:]))
        if noise:
            draws = rng.standard_normal(copies.shape, np.float32)
            copies = (copies + noise * kernel.astype(np.float32).std() * draws).astype(kernel.dtype)
        params[f"layers/mlp/{name}/experts"] = copies
    router = rng.standard_normal((shape.layers, experts, shape.width), np.float32)
    params["layers/mlp/gate/router"] = (shape.initializer_range * router).astype(kernel.dtype)
    mixed = dataclasses.replace(
        shape, experts=experts, experts_used=used, experts_normed=True, balance=into.defaults["router_aux_loss_coef"],
        dense_hidden=shape.hidden if "dense_hidden" in into.keys else 0,
    )  # fmt: skip
    weights.write_model(out, unflatten(params), folder, into, mixed)
    return into.model_type
