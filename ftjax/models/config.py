"""The shape of a transformer: what distinguishes one family from another, as plain data.

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
class Head:
    """The head after the hidden states: [a dense layer, its activation,] [a norm,] and a map to `labels`."""

    task: str = "causal"  # causal | masked: logits over the vocabulary | sequence | token: over labels | span: of its
    # start and its end, over tokens | none: hidden states themselves
    labels: int = 0  # C; 0 where it is the vocabulary
    pool: str = ""  # sequence: which state of a segment is read: first | last | mean; empty: the one at a given place
    activation: str = ""  # of the dense layer; empty: there is none
    dense_bias: bool = True
    norm: bool = False
    bias: bool = True  # of the last map


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static description of a transformer; hashable, so that it can be a module's field."""

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
    fused_gate: bool = False  # one projection gate_up_proj for both, the gate first
    fused_qkv: bool = False  # one projection c_attn for q, k and v, as GPT-2 has it
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotary
    causal: bool = True  # a token sees itself and those before it; else all of its segment
    post_norm: bool = False  # norms after the addition of each sublayer, as in BERT, not before each sublayer
    first_norm: bool = True  # False: no norm before the first block's attention
    final_norm: bool = True  # a norm after the blocks
    embed_norm: bool = False  # a norm after the sum of embeddings
    norm_bias: bool = True  # of layer norms
    types: int = 0  # token types, each with an embedding
    positions: str = "rotary"  # rotary | learned
    position_offset: int = 0  # rows of the table of positions before that of the first
    rope_theta: float = 10000.0
    local_theta: float = 0.0  # the same of layers with a window; 0: rope_theta
    rope_scaling: RopeScaling = RopeScaling()
    windows: tuple[int, ...] = ()  # of each layer: tokens seen on a side, itself included; 0: all; empty: all 0
    tied: bool = True  # the head is the embedding table
    initializer_range: float = 0.02  # standard deviation of newly initialised kernels
    head: Head = Head()
