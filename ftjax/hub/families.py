"""What tells one model family on disk from another: one row of FAMILIES each, read both ways.

D width, H heads, K KV heads, d head size, F hidden, V vocabulary, P positions, L layers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError, nearest
from ftjax.models.config import ModelConfig, RopeScaling


class Module(NamedTuple):
    """One module: our path, its name in Hugging Face's model (`{l}`: the layer), and how its weight lies there."""

    path: str
    name: str
    transposed: bool = False  # stored (in, out), as GPT-2's Conv1D does, not (out, in)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A row of FAMILIES: the names of a `model_type`, and what its config.json means."""

    model_type: str
    architecture: str  # the class that transformers loads it with
    modules: tuple[Module, ...]
    prefix: str  # start of tensor names that some files leave out
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    defaults: dict[str, object]  # key -> what transformers 4 and 5 both assume where config.json leaves it out
    constants: dict[str, object]  # fields of ModelConfig that are the same in the whole family
    only: dict[str, tuple]  # key -> the values, of those that change the logits, which Transformer can compute
    buffers: str = r"$^"  # regular expression of stored tensors that are no parameters
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # other spellings of keys


LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Hugging Face's spelling -> ours; of several with one meaning the first is the one that is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}

# RopeScaling.kind -> (its field, the key of config.json)
ROPE = {
    "default": (),
    "linear": (("factor", "factor"),),
    "llama3": (
        ("factor", "factor"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("original_max_positions", "original_max_position_embeddings"),
    ),
}
ROPE_KEYS = ("rope_type", "rope_theta", *(key for _, key in ROPE["llama3"]))

ANY_FAMILY = {
    "quantization_config": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
}

LLAMA_MODULES = (
    Module("embed", "model.embed_tokens"),
    Module("layers/attn_norm", "model.layers.{l}.input_layernorm"),
    Module("layers/attn/q_proj", "model.layers.{l}.self_attn.q_proj"),
    Module("layers/attn/k_proj", "model.layers.{l}.self_attn.k_proj"),
    Module("layers/attn/v_proj", "model.layers.{l}.self_attn.v_proj"),
    Module("layers/attn/q_norm", "model.layers.{l}.self_attn.q_norm"),
    Module("layers/attn/k_norm", "model.layers.{l}.self_attn.k_norm"),
    Module("layers/attn/o_proj", "model.layers.{l}.self_attn.o_proj"),
    Module("layers/mlp_norm", "model.layers.{l}.post_attention_layernorm"),
    Module("layers/mlp/gate_proj", "model.layers.{l}.mlp.gate_proj"),
    Module("layers/mlp/up_proj", "model.layers.{l}.mlp.up_proj"),
    Module("layers/mlp/down_proj", "model.layers.{l}.mlp.down_proj"),
    Module("final_norm", "model.norm"),
    Module("lm_head", "lm_head"),
)
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
LLAMA_CONSTANTS = {"norm": "rms", "gated": True, "positions": "rotary"}
LLAMA_ONLY = {"partial_rotary_factor": (None, 1.0), "original_max_position_embeddings": (None,)}
LLAMA_BUFFERS = r"rotary_emb\.inv_freq$"

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            modules=(
                Module("embed", "transformer.wte"),
                Module("pos_embed", "transformer.wpe"),
                Module("layers/attn_norm", "transformer.h.{l}.ln_1"),
                Module("layers/attn/c_attn", "transformer.h.{l}.attn.c_attn", transposed=True),
                Module("layers/attn/o_proj", "transformer.h.{l}.attn.c_proj", transposed=True),
                Module("layers/mlp_norm", "transformer.h.{l}.ln_2"),
                Module("layers/mlp/up_proj", "transformer.h.{l}.mlp.c_fc", transposed=True),
                Module("layers/mlp/down_proj", "transformer.h.{l}.mlp.c_proj", transposed=True),
                Module("final_norm", "transformer.ln_f"),
                Module("lm_head", "lm_head"),
            ),
            prefix="transformer.",
            keys={
                "vocab_size": "vocab_size",
                "width": "n_embd",
                "layers": "n_layer",
                "heads": "n_head",
                "hidden": "n_inner",
                "max_positions": "n_positions",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "tied": "tie_word_embeddings",
                "initializer_range": "initializer_range",
            },
            defaults={
                "vocab_size": 50257,
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_inner": None,
                "n_positions": 1024,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
                "tie_word_embeddings": True,
                "initializer_range": 0.02,
            },
            constants={
                "norm": "layer",
                "gated": False,
                "fused_qkv": True,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "positions": "learned",
            },
            only={
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "reorder_and_upcast_attn": (False,),
            },
            buffers=r"\.attn\.(bias|masked_bias)$",
            aliases={
                "hidden_size": "n_embd",
                "max_position_embeddings": "n_positions",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
            },
        ),
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            modules=LLAMA_MODULES,
            prefix="model.",
            keys=LLAMA_KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
            defaults=LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
            constants=LLAMA_CONSTANTS,
            only=LLAMA_ONLY,
            buffers=LLAMA_BUFFERS,
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            modules=LLAMA_MODULES,
            prefix="model.",
            keys=LLAMA_KEYS,
            defaults=LLAMA_DEFAULTS
            | {
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            constants=LLAMA_CONSTANTS,
            only=LLAMA_ONLY | {"layer_types": (None,)},
            buffers=LLAMA_BUFFERS,
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            modules=LLAMA_MODULES,
            prefix="model.",
            keys=LLAMA_KEYS,
            defaults=QWEN_DEFAULTS,
            constants=LLAMA_CONSTANTS | {"qkv_bias": True},
            only=LLAMA_ONLY,
            buffers=LLAMA_BUFFERS,
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            modules=LLAMA_MODULES,
            prefix="model.",
            keys=LLAMA_KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
            defaults=QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
            constants=LLAMA_CONSTANTS | {"qk_norm": True},
            only=LLAMA_ONLY,
            buffers=LLAMA_BUFFERS,
        ),
    )
}


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises FtjaxError where there is no file, no JSON or no object."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FtjaxError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FtjaxError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FtjaxError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and shape of the model in a directory; see `from_hf`."""
    file = Path(folder) / "config.json"
    return from_hf(read_json(file), str(file))


def from_hf(hf: dict, where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The content of a config.json, written by transformers 4 or 5, -> its family and our ModelConfig.

    Raises FtjaxError for an unknown `model_type`, a value of the wrong type, and whatever would change the logits in a
    way that Transformer cannot compute; `where` starts the message.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise FtjaxError(f"{where}: unknown model_type {kind!r}{nearest(kind, FAMILIES)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    hf = {family.aliases.get(key, key): value for key, value in hf.items()}
    for key, allowed in (ANY_FAMILY | family.only).items():
        if key in hf and hf[key] not in allowed:
            raise FtjaxError(
                f"{where}: {key} = {hf[key]!r} changes the logits of a {kind} model in a way that is not supported; "
                f"expected {' or '.join(repr(v) for v in allowed)}, or no such key"
            )
    hf = family.defaults | hf
    values = {field: hf[key] for field, key in family.keys.items()}
    activation = values["activation"]
    if activation not in ACTIVATIONS:
        key = family.keys["activation"]
        raise FtjaxError(
            f"{where}: {key} = {activation!r} is not supported{nearest(activation, ACTIVATIONS)}; "
            f"known: {', '.join(ACTIVATIONS)}"
        )
    values["activation"] = ACTIVATIONS[activation]
    _check_types(values, family, where)
    heads = values["heads"]
    values["kv_heads"] = values.get("kv_heads") or heads
    values["hidden"] = values["hidden"] or 4 * values["width"]
    if not values.get("head_dim"):
        values["head_dim"], rest = divmod(values["width"], heads)
        if rest:
            raise FtjaxError(f"{where}: width {values['width']} is not a multiple of the {heads} heads")
    if heads % values["kv_heads"]:
        raise FtjaxError(f"{where}: num_key_value_heads = {values['kv_heads']} does not divide the {heads} heads")
    if family.constants["positions"] == "rotary":
        values |= _rope_from_hf(hf, values["max_positions"], where)
    return family, ModelConfig(**values, **family.constants, windows=_windows_from_hf(hf, family, where))


def _check_types(values: dict, family: Family, where: str) -> None:
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for field, value in values.items():
        key, kind = family.keys[field], types[field]
        if value is None and (family.defaults[key] is None or field == "kv_heads"):
            continue
        wrong = not isinstance(value, kinds[kind]) or (kind != "bool" and isinstance(value, bool))
        if wrong or (kind == "int" and value < 1):
            expected = "a positive whole number" if kind == "int" else kind
            raise FtjaxError(f"{where}: {key} = {value!r}; expected {expected}")


def _rope_from_hf(hf: dict, max_positions: int, where: str) -> dict:
    # Version 4 keeps `rope_theta` at the top and the rest in `rope_scaling`, version 5 all in `rope_parameters`. A file
    # for both says things twice; two different answers would give each version another model.
    rope = {}
    for part in ({"rope_theta": hf.get("rope_theta")}, hf.get("rope_scaling"), hf.get("rope_parameters")):
        for key, value in (part or {}).items():
            key = "rope_type" if key == "type" else key
            if value is not None and rope.setdefault(key, value) != value:
                raise FtjaxError(f"{where}: {key} of the rotary embedding is given twice: {rope[key]!r} and {value!r}")
    kind = rope.get("rope_type", "default")
    if kind not in ROPE:
        raise FtjaxError(
            f"{where}: rope_type = {kind!r} is not supported{nearest(kind, ROPE)}; known: {', '.join(ROPE)}"
        )
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise FtjaxError(f"{where}: partial_rotary_factor of the rotary embedding is not supported; expected 1.0")
    for key, value in rope.items():
        if key not in ROPE_KEYS:
            raise FtjaxError(f"{where}: rotary key {key!r} is not supported; known: {', '.join(ROPE_KEYS)}")
        if key != "rope_type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise FtjaxError(f"{where}: {key} = {value!r}; expected a positive number")
    rope.setdefault("original_max_position_embeddings", max_positions)
    for _, key in ROPE[kind]:
        if key not in rope:
            raise FtjaxError(f"{where}: rope_type {kind!r} needs {key!r}, which is missing")
    scaling = RopeScaling(kind, **{field: rope[key] for field, key in ROPE[kind]})
    return {"rope_theta": float(rope.get("rope_theta", 10000.0)), "rope_scaling": scaling}


def rope_to_hf(config: ModelConfig) -> dict:
    """What config.json says of the rotary embedding, for transformers 4 (top level) and 5 (nested) at once."""
    scaling = {key: getattr(config.rope_scaling, field) for field, key in ROPE[config.rope_scaling.kind]}
    rope = {"rope_type": config.rope_scaling.kind} | scaling
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }


def _windows_from_hf(hf: dict, family: Family, where: str) -> tuple[int, ...]:
    if "sliding_window" not in family.defaults:
        return ()
    window, layers = hf["sliding_window"], hf[family.keys["layers"]]
    if not hf.get("use_sliding_window", True):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise FtjaxError(f"{where}: sliding_window = {window!r}; expected a positive number of tokens, or null")
    full = hf.get("max_window_layers", 0)  # so many layers at the bottom see everything
    types = hf.get("layer_types")
    if types is None:
        sliding = [window is not None and layer >= full for layer in range(layers)]
    else:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise FtjaxError(f"{where}: layer_types: expected {layers} of {', '.join(known)}; found {types!r}")
        sliding = [known[t] for t in types]
        if any(sliding) and window is None:
            raise FtjaxError(f"{where}: layer_types has sliding_attention, but sliding_window is off")
    return tuple(window if s else 0 for s in sliding) if any(sliding) else ()


def _windows_to_hf(config: ModelConfig, family: Family) -> dict:
    if "sliding_window" not in family.defaults:
        return {}
    window = max(config.windows, default=0) or None
    if "use_sliding_window" not in family.defaults:
        return {"sliding_window": window}
    windows = config.windows or (0,) * config.layers
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        # Old releases of transformers 4 know no layer_types.
        "max_window_layers": next((i for i, w in enumerate(windows) if w), config.layers),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def to_hf(family: Family, config: ModelConfig) -> dict:
    """The content of a complete config.json for a model of this shape: the inverse of `from_hf`.

    Raises FtjaxError where the family has no way to say it.
    """
    hf = {"model_type": family.model_type, "architectures": [family.architecture]}
    hf |= {key: getattr(config, field) for field, key in family.keys.items()}
    hf[family.keys["activation"]] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    hf |= _windows_to_hf(config, family)
    if config.positions == "rotary":
        hf |= rope_to_hf(config)
    said, meant = dataclasses.asdict(from_hf(hf)[1]), dataclasses.asdict(config)
    lost = [f"{field} = {meant[field]!r}" for field in meant if said[field] != meant[field]]
    if lost:
        raise FtjaxError(f"a {family.model_type} model cannot have {', '.join(lost)}")
    return hf


def module_name(path: str, family: Family) -> str:
    """`layers/attn/q_proj` -> `model.layers.{l}.self_attn.q_proj`. Raises KeyError for a path outside the table."""
    return {module.path: module.name for module in family.modules}[path]


def linear_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """Path -> module name of every linear map of a model, tables of embeddings among them, in the table's order."""
    found = shapes(config)
    leaves = ("kernel", "embedding")
    return {m.path: m.name for m in family.modules if any(f"{m.path}/{leaf}" in found for leaf in leaves)}


def tensor_names(family: Family, config: ModelConfig) -> dict[str, tuple[list[str], bool]]:
    """Path of each parameter -> names of its tensors on disk, one a layer if stacked; whether they are (in, out)."""
    names, expected = {}, shapes(config)
    for module in family.modules:
        layers = range(config.layers) if module.path.startswith("layers/") else (0,)
        for leaf, suffix in LEAVES.items():
            if (path := f"{module.path}/{leaf}") in expected:
                stored = [f"{module.name.format(l=layer)}.{suffix}" for layer in layers]
                names[path] = (stored, module.transposed and leaf == "kernel")
    return names


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path of every parameter -> its shape; those of the blocks are stacked on a leading layer axis."""
    c = config
    D, F, L, q, kv = c.width, c.hidden, c.layers, c.heads * c.head_dim, c.kv_heads * c.head_dim
    linear = {"attn/o_proj": (D, q, c.out_bias), "mlp/up_proj": (F, D, c.mlp_bias), "mlp/down_proj": (D, F, c.mlp_bias)}
    if c.fused_qkv:
        linear["attn/c_attn"] = (q + 2 * kv, D, c.qkv_bias)
    else:
        linear |= {f"attn/{n}_proj": (size, D, c.qkv_bias) for n, size in (("q", q), ("k", kv), ("v", kv))}
    if c.gated:
        linear["mlp/gate_proj"] = (F, D, c.mlp_bias)
    norms = {"attn_norm": D, "mlp_norm": D}
    if c.qk_norm:
        norms |= {"attn/q_norm": c.head_dim, "attn/k_norm": c.head_dim}

    out = {"embed/embedding": (c.vocab_size, D), "final_norm/scale": (D,)}
    if c.positions == "learned":
        out["pos_embed/embedding"] = (c.max_positions, D)
    if c.norm == "layer":
        out["final_norm/bias"] = (D,)
    if not c.tied:
        out["lm_head/kernel"] = (c.vocab_size, D)
    for name, size in norms.items():
        out[f"layers/{name}/scale"] = (L, size)
        if c.norm == "layer":
            out[f"layers/{name}/bias"] = (L, size)
    for name, (rows, columns, bias) in linear.items():
        out[f"layers/{name}/kernel"] = (L, rows, columns)
        if bias:
            out[f"layers/{name}/bias"] = (L, rows)
    return out


def is_buffer(name: str, family: Family) -> bool:
    """Whether a stored tensor is a constant that the family's code computes for itself."""
    return re.search(family.buffers, name) is not None
