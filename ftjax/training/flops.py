"""Arithmetic of a training step by formula, and peak rates of known devices.

N parameters of matrices, L layers, T tokens, H heads, d head size.
"""

from __future__ import annotations

import numpy as np

from ftjax.hub.families import EXPERTS
from ftjax.models.config import VOCABULARY, ModelConfig, attentions, experts_per_token, layers_with
from ftjax.models.delta import CHUNK
from ftjax.models.transformer import BEHIND
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


def delta_flops(config: ModelConfig, length: int) -> float:
    """Forward FLOPs of the gated delta rule of one layer for one token of a row of `length`, without its linear maps:
    products of its chunks with each other, the triangular system, the state, and the convolution."""
    c, H, d, e = min(CHUNK, length), config.delta_value_heads, config.delta_key_dim, config.delta_value_dim
    channels = 2 * config.delta_key_heads * d + H * e
    return H * (c * (4 * d + 2 * e + d + e) + 6 * d * e) + 2 * config.delta_width * channels


def flops_per_token(
    config: ModelConfig, base: dict, trained: dict, frozen: dict, length: int, passes: int = 0
) -> float:
    """FLOPs of forward and backward for one token of a row of `length`.

    Forward 2 N + 2 L T H d. Backward 2 N + 4 L T H d for the gradients of activations, and 2 N_trained. Together 6 N +
    6 L T H d for full training, and 4 N + 6 N_trained + 6 L T H d for adapters on frozen kernels. Layers with the delta
    rule have the products of its chunks instead of T H d, see `delta_flops`. Layers below the lowest trained one have
    no backward pass if they are stored apart, see ftjax.tuning.parts. A head over labels is counted as if it read every
    token. base, trained, frozen: trees of shapes. passes: number of further forward passes of the base, such as that of
    a reference.
    """

    def matmul(tree, *ends):
        return sum(int(np.prod(x.shape)) for path, x in flatten(tree).items() if path.endswith(ends))

    paths, L = flatten(trained), config.layers
    head = config.vocab_size * config.width if config.head.task in VOCABULARY else 0
    used = experts_per_token(config) / max(config.experts, 1)  # share of the experts that a token goes through
    blocks = matmul(base, "kernel", "router") + used * matmul(base, "experts") - (0 if config.tied else head)
    of_experts = {path: x for path, x in paths.items() if path.startswith(EXPERTS)}
    adapters = matmul(trained, "lora/a", "lora/b") - (1 - used) * matmul(of_experts, "lora/a", "lora/b")
    own = matmul(trained, "kernel", "router") + used * matmul(trained, "experts")
    own += head if config.tied and "embed/embedding" in paths else 0
    top = [x.shape[0] for path, x in (flatten(frozen) | paths).items() if path.startswith("top_layers/")]
    # Layers that gradients go through.
    passed = 0 if all(path.startswith(BEHIND) for path in paths) else max(top, default=L)
    into_head = 0 if all(path.startswith("lm_head") for path in paths) else head
    attention = 0.0
    kinds = [(layers, 2 * length * own.heads * own.head_dim) for own, layers in attentions(config).values()]
    for layers, forward in (*kinds, (layers_with(config, "delta"), delta_flops(config, length))):
        attention += (len(layers) * (1 + passes) + 2 * sum(i >= L - passed for i in layers)) * forward
    forward = (blocks + head) * (1 + passes) + adapters
    return 2 * (forward + blocks * passed // L + into_head + 2 * adapters + own) + attention
