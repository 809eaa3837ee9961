"""The shape of a transformer: what distinguishes one family from another, as plain data.

B batch, T tokens, D width, H heads, K KV heads, d head size, F hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained length, see `layers.rotary_frequencies`."""

    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope | proportional
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 8192  # tokens; llama3, yarn, longrope
    attention_factor: float | None = None  # of cosines and sines; None: by the formula of yarn or longrope
    beta_fast: float | None = None  # yarn: turns in the pretrained length above which nothing is stretched; None: 32
    beta_slow: float | None = None  # yarn: turns below which all is stretched; None: 1
    mscale: float | None = None  # yarn: with mscale_all_dim, gives attention_factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whether the ends of the ramp are whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies of texts up to the pretrained length
    long_factor: tuple[float, ...] = ()  # longrope: those of longer texts
    share: float = 1.0  # proportional: share of the frequencies, the highest; the others are 0


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
    hidden: int  # F, of each expert where there are experts
    max_positions: int  # tokens; longer rows are refused
    # Norms
    norm: str = "rms"  # rms | rms_plus_one (its weight is added to 1) | layer
    norm_eps: float = 1e-6
    norm_bias: bool = True  # of layer norms
    norms: str = "input"  # of a sublayer: input | output, before the addition | both | sum, after the addition, as BERT
    first_norm: bool = True  # False: no norm before the first block's attention
    final_norm: bool = True  # a norm after the blocks
    embed_norm: bool = False  # a norm after the sum of embeddings
    # Residual stream
    parallel: bool = False  # both sublayers read the block's input, and their outputs are added together
    one_norm: bool = False  # parallel sublayers share the norm of their input
    embed_scale: float = 1.0  # factor of the embeddings that are looked up
    input_scale: float = 1.0  # factor of what enters the blocks, soft prompts included
    residual_scale: float = 1.0  # factor of each sublayer's output
    input_width: int = 0  # P, of a vector that each layer gets for each token, see `transformer.Inputs`; 0: no vector
    # Attention
    fused_qkv: str = ""  # one projection c_attn: `parts`, q, k, v one after another | `heads`, q, k, v of each head
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    qk_norm: str = ""  # RMS norm of q and k before rotary: `head`, over each head | `all`, over all heads together
    v_norm: bool = False  # RMS norm of v over each head, without a scale
    global_head_dim: int = 0  # d of the sublayers `global`, which layers without a window have then; 0: there are none
    global_kv_heads: int = 0  # K of these sublayers
    values_from_keys: bool = False  # the v of these sublayers are the outputs of k_proj
    attn_gate: bool = False  # outputs of heads are multiplied by the sigmoid of gates, which q_proj gives behind each q
    qkv_clip: float | None = None  # bound of |q|, |k| and |v|
    score_scale: float | None = None  # factor of q kᵀ; None: d^-0.5
    score_cap: float | None = None  # scores s become cap · tanh(s / cap)
    sinks: bool = False  # each head has a learned score more in its softmax, without a value
    causal: bool = True  # a token sees itself and those before it; else all of its segment
    windows: tuple[int, ...] = ()  # of each layer: tokens seen on a side, itself included; 0: all; empty: all 0
    # Positions
    types: int = 0  # token types, each with an embedding
    positions: str = "rotary"  # rotary | learned
    position_offset: int = 0  # rows of the table of positions before that of the first
    rope_theta: float = 10000.0
    local_theta: float = 0.0  # that of layers with a window, which is never scaled; 0: all layers have the same angles
    rope_scaling: RopeScaling = RopeScaling()
    rotary_share: float = 1.0  # share of each head that is rotated, its first dimensions
    rotary_pairs: str = "halves"  # which dimensions turn together: halves (i, i + d/2) | neighbours (2i, 2i + 1)
    rotary: tuple[bool, ...] = ()  # of each layer: whether q and k are rotated; empty: in all
    # Feed-forward
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    gated: bool = True  # act(gate(x)) * up(x) instead of act(up(x))
    fused_gate: str = ""  # one projection gate_up_proj: `parts`, the gate first | `neighbours`, the outputs alternate
    gate_limit: float | None = None  # gates of gpt-oss with this bound, see `transformer.gated`
    gate_slope: float = 1.0  # factor in the sigmoid of such gates
    mlp_bias: bool = False  # of the projections; of the router too where there are experts
    experts: int = 0  # E; 0: one dense feed-forward part
    experts_used: int = 1  # of each token: those with the greatest router probabilities
    experts_normed: bool = False  # the probabilities of the experts used are divided by their sum
    mixing: int = 0  # a mixture of tokens: rows whose tokens are mixed in training; 0: each token goes to its experts
    dense_hidden: int = 0  # F of the sublayer `dense`, which layers without experts have among layers with experts
    shared_hidden: int = 0  # of a dense part beside the experts that every token goes through; 0: there is none
    balance: float = 0.0  # weight of the load-balance loss in training, see objectives.routed
    balanced: bool = False  # whether transformers adds this loss
    # Head
    tied: bool = True  # the head is the embedding table
    logit_scale: float = 1.0  # factor of the logits over the vocabulary
    logit_cap: float | None = None  # such logits y become cap · tanh(y / cap)
    initializer_range: float = 0.02  # standard deviation of newly initialised kernels
    head: Head = Head()
    # The gated delta rule, the sublayer `delta`
    delta_key_heads: int = 0  # those of queries and keys, a divisor of the next
    delta_value_heads: int = 0
    delta_key_dim: int = 0  # size of each
    delta_value_dim: int = 0
    delta_width: int = 4  # tokens of the convolution before it
    # Kinds of layers
    parts: tuple[tuple[str, ...], ...] = ()  # of each layer: the names of its sublayers; empty: SUBLAYERS in all

    @property
    def shares_table(self) -> bool:
        """Whether the logits are products with the embedding table. A head over labels has no such table."""
        return self.tied and self.head.task in VOCABULARY


VOCABULARY = ("causal", "masked")  # tasks of heads over the vocabulary
TABLES = ("embed/embedding", "lm_head/kernel")  # parameters with a row for each token; a tied model has the first alone
SUBLAYERS = ("attn", "mlp")  # the sublayers of a block, where all layers are of one kind
READS = "_read"  # end of the name of a sublayer that reads the keys and values of the last one without this end
ATTENTION = ("attn", "global", f"attn{READS}", f"global{READS}")  # sublayers with attention
BY_LAYER = ("windows", "rotary", "parts")  # fields of ModelConfig that are empty or have an entry for each layer


def layers_with(config: ModelConfig, path: str) -> tuple[int, ...]:
    """The layers that a stacked parameter or adapter has a row for, in order: those whose block has its sublayer.

    Args:
        config: The ModelConfig.
        path: A path below the blocks, such as `layers/attn/q_proj`, or the name of a sublayer.
    """
    name = path.removeprefix("top_").removeprefix("layers/").split("/")[0]
    parts = config.parts or (SUBLAYERS,) * config.layers
    return tuple(layer for layer, own in enumerate(parts) if name in own or name.endswith("norm"))  # all have norms


def of_sublayer(config: ModelConfig, name: str) -> ModelConfig:
    """The shape that a sublayer of this name computes with. Its windows are those of the layers that have it."""
    own = {"hidden": {"dense": config.dense_hidden, "wide": 2 * config.hidden}.get(name, config.hidden)}
    if name.startswith("global"):
        own |= {"head_dim": config.global_head_dim, "kv_heads": config.global_kv_heads}
    windows = tuple(config.windows[layer] for layer in layers_with(config, name)) if config.windows else ()
    return dataclasses.replace(config, windows=windows, **own)


def attentions(config: ModelConfig) -> dict[str, tuple[ModelConfig, tuple[int, ...]]]:
    """{sublayer with attention: its shape and the layers that have it}, for those that some layer has."""
    return {name: (of_sublayer(config, name), layers) for name in ATTENTION if (layers := layers_with(config, name))}


def experts_per_token(config: ModelConfig) -> float:
    """Number of experts that a token pays for in training. The rows of a group share the cost of a mixture."""
    return config.experts / config.mixing if config.mixing else config.experts_used


def hidden_per_token(config: ModelConfig) -> float:
    """Hidden values of the feed-forward parts that a token goes through in a layer, on average over the layers."""
    sizes = {name: of_sublayer(config, name).hidden for name in ("dense", "wide")}
    sizes["mlp"] = config.hidden * experts_per_token(config) + config.shared_hidden
    return sum(size * len(layers_with(config, name)) for name, size in sizes.items()) / config.layers


def with_layers(config: ModelConfig, layers: list[int]) -> ModelConfig:
    """The shape of a model that has only these of the layers."""
    kept = {name: tuple(getattr(config, name)[i] for i in layers if getattr(config, name)) for name in BY_LAYER}
    return dataclasses.replace(config, layers=len(layers), **kept)


@functools.cache
def runs(kinds: tuple) -> tuple[tuple[int, int, int], ...]:
    """Cut a list of layers into runs, each a pattern that is repeated, so that the fewest blocks are compiled.

    Args:
        kinds: The kind of each layer.

    Returns:
        (first layer, length of the pattern, number of its repetitions) of each run.
    """
    best: list[tuple[int, tuple]] = [(0, ())]  # of the first layers: (blocks to compile, runs)
    for end in range(1, len(kinds) + 1):
        found = []
        for period in range(1, end + 1):
            start = end - period
            while start >= 0 and kinds[start : start + period] == kinds[end - period : end]:
                blocks, before = best[start]
                found.append((blocks + period, (*before, (start, period, (end - start) // period))))
                start -= period
        best.append(min(found, key=lambda x: (x[0], len(x[1]))))
    return best[-1][1]
