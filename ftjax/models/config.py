"""The shape of a decoder: what distinguishes one family from another, as plain data.

B batch, T tokens, D width, H heads, K KV heads, d head size, F hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained length.

    kind: `default`, `linear` (all divided by factor) or `llama3` (low frequencies divided by factor, a smooth ramp
    between wavelengths original / high and original / low; Llama 3.1 model card and its reference code).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static description of a decoder-only transformer; hashable, so that it can be a module's field."""

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K, divides H
    head_dim: int  # d, need not be D / H
    hidden: int  # F
    max_positions: int  # tokens; longer rows are refused
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-6
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    gated: bool = True  # act(gate(x)) * up(x) instead of act(up(x))
    fused_qkv: bool = False  # one projection c_attn for q, k and v, as GPT-2 has it
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotary
    positions: str = "rotary"  # rotary | learned
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    windows: tuple[int, ...] = ()  # one a layer: tokens seen, itself included; 0: all; empty: all layers 0
    tied: bool = True  # the head is the embedding table
    initializer_range: float = 0.02  # only for models made from nothing
