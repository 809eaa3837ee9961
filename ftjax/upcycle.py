"""`ftjax upcycle`: a dense decoder as a mixture of experts with the same logits (Komatsuzaki et al. 2023) or as a
mixture of tokens (Antoniak et al. 2023), and a mixture of tokens as a mixture of experts.

L layers, E experts, D width.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.tree import flatten, unflatten

INTO = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}  # model_type -> that of the mixture
TOKENS = "ftjax_mixture_of_tokens"
DOWN = "layers/mlp/down_proj/experts"


def upcycle(folder: Path, out: Path, experts: int, used: int, noise: float = 0.0, seed: int = 0, group: int = 0) -> str:
    """Write a mixture whose experts are copies of a dense model's feed-forward parts.

    The weights of the experts used add up to 1, so that without noise the logits are those of the dense model. The
    routers are random, because otherwise all experts would stay alike. In a mixture of tokens a token that is not mixed
    gets the sum of all experts, and the output of each expert is divided by E.

    A mixture of tokens becomes a mixture of experts with the same experts and routers, for transition tuning. The
    output of each expert is multiplied by E, because weights then add up to 1: as long as its experts are alike, the
    logits stay those that it generates with.

    Args:
        folder: The directory of a dense model, or of a mixture of tokens.
        out: The directory to write.
        experts: E.
        used: Experts of each token; not read for a mixture of tokens.
        noise: Standard deviation of normal noise on the experts, as a multiple of that of each of their kernels.
        seed: Seed of routers and noise.
        group: Rows of a group of a mixture of tokens; 0: write a mixture of experts.

    Returns:
        The model_type of the mixture.

    Raises:
        FtjaxError: For another family, a head over labels, a shape that the mixture's config.json cannot express, or
            numbers of experts or rows that are impossible.
    """
    family, shape = families.read_config(folder)
    tokens = family.model_type == TOKENS
    if not (tokens or family.model_type in INTO) or shape.head.task != "causal":
        able = ", ".join(INTO)
        raise FtjaxError(f"{folder}: upcycle is for {able} with a head over the vocabulary, not a {family.model_type}")
    if not 0 < used <= experts or not 0 <= noise < math.inf or seed < 0:
        raise FtjaxError(
            "upcycle: expected 1 <= top-k <= experts, a finite noise >= 0 and a seed >= 0; found top-k "
            f"{used}, experts {experts}, noise {noise:g} and seed {seed}"
        )
    if tokens and (experts != shape.experts or noise or group) or group < 0:
        raise FtjaxError(
            f"upcycle: {folder} is a {family.model_type} model; expected a group of 0 or more rows, and for a mixture "
            f"of tokens no group, no noise and its own number of experts; found group {group}, noise {noise:g} and "
            f"experts {experts}"
        )
    name = TOKENS if group else ("qwen3_moe" if shape.qk_norm else "mixtral") if tokens else INTO[family.model_type]
    into, rng = families.FAMILIES[name], np.random.default_rng(seed)
    mixed = dataclasses.replace(shape, experts=experts, mixing=group)
    if not group:
        mixed = dataclasses.replace(
            mixed, experts_used=used, experts_normed=True, balance=into.defaults["router_aux_loss_coef"],
            dense_hidden=shape.hidden if "dense_hidden" in into.keys else 0,
        )  # fmt: skip
    families.to_hf(into, mixed)  # an error if its config.json cannot express this
    params = flatten(weights.read_params(folder, family, shape))
    for part in ("gate_proj", "up_proj", "down_proj") if not tokens else ():
        kernel = np.asarray(params.pop(f"layers/mlp/{part}/kernel"))
        copies = np.broadcast_to(kernel[:, None], (shape.layers, experts, *kernel.shape[1:]))
        if noise:
            draws = rng.standard_normal(copies.shape, np.float32)
            copies = (copies + noise * kernel.astype(np.float32).std() * draws).astype(kernel.dtype)
        params[f"layers/mlp/{part}/experts"] = copies
    if not tokens:
        router = rng.standard_normal((shape.layers, experts, shape.width), np.float32)
        params["layers/mlp/gate/router"] = (shape.initializer_range * router).astype(kernel.dtype)
    if tokens or group:
        down = np.asarray(params[DOWN])
        params[DOWN] = (down.astype(np.float32) * (experts if tokens else 1 / experts)).astype(down.dtype)
    weights.write_model(out, unflatten(params), folder, into, mixed)
    return into.model_type
