"""Arithmetic of a training step by formula, and what known devices can do.

N matmul parameters, L layers, T tokens, H heads, d head size.
"""

from __future__ import annotations

import numpy as np

from ftjax.models.config import DecoderConfig
from ftjax.tree import flatten

# device_kind of JAX -> dense bfloat16 FLOP/s of one device, from its maker's datasheet
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(config: DecoderConfig, base: dict, trained: dict, frozen: bool, length: int) -> float:
    """FLOPs of forward and backward for one token of a row of `length`.

    Full training: 6 N + 6 L T H d; with frozen kernels 4 N + 6 N_trained + 6 L T H d: the kernels' own gradients fall
    away. base, trained: trees of shapes; frozen: whether the base's kernels are, or are themselves what is trained.
    """

    def matmul(tree):
        inside = ("kernel", "lora/a", "lora/b")
        return sum(int(np.prod(x.shape)) for path, x in flatten(tree).items() if path.endswith(inside))

    N = matmul(base) + (config.vocab_size * config.width if config.tied else 0)
    attention = 6 * config.layers * length * config.heads * config.head_dim
    if not frozen:
        return 6 * N + attention
    return 4 * N + 6 * matmul(trained) + attention
