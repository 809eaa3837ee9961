"""Facts about model families, a row each: names of tensors, keys of config.json, and heads.

D width, F hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ftjax.models.config import Head


class Module(NamedTuple):
    """One module: its path here, its name in Hugging Face's model, and its weight's layout there.

    In names, `{l}` is the layer and `{e}` the expert.
    """

    path: str
    name: str
    transposed: bool = False  # stored (in, out), as GPT-2's Conv1D does, not (out, in)
    first: int = 0  # the lowest layer that has it
    bare: bool = False  # no module but a parameter of one, stored under its own name, with a bias NAME_bias
    file: str = ""  # its name in files, where that is another or has an {e}, which transformers' own names have not


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A model of a family for one task: the class that transformers loads it with, and its head."""

    architecture: str
    head: Head
    modules: tuple[Module, ...] = ()
    prefix: str | None = None  # prefix of the other modules' names instead of the family's; None: the family's
    kept: tuple[str, ...] = ()  # modules of the class that are not computed here: exports copy their tensors
    keys: dict[str, str] = dataclasses.field(default_factory=dict)  # field of Head -> key of config.json
    beside: bool = False  # whether the head is stored in folders of its own, see ftjax.hub.pooling


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A row of FAMILIES: the names of tensors of a `model_type`, and the meaning of its config.json."""

    model_type: str
    # Task of Head -> form. The first form is that of files which do not name a class. A key `task/pool` is for a head
    # that pools in another way than the task's usual head.
    forms: dict[str, Form]
    modules: tuple[Module, ...]
    prefix: str  # prefix of tensor names that some files leave out
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    defaults: dict[str, object]  # key -> the default of transformers 4 and 5 if config.json leaves it out
    # Fields of ModelConfig that are the same in the whole family, or a function of {field: value} of the others.
    constants: dict[str, object]
    # Key that changes the logits -> the values that Transformer can compute.
    only: dict[str, tuple] = dataclasses.field(default_factory=dict)
    # model_type of the text_config in config.json, if the model has other parts too, such as those that read images.
    # Empty: all of config.json describes the text model.
    text: str = ""
    prefixes: tuple[str, ...] = ()  # other prefixes that files may have instead
    buffers: str = r"$^"  # regular expression of names of stored tensors that are not read
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # other spellings of keys
    # Field of ModelConfig -> how its value is computed from that of its key, and back.
    converted: dict[str, tuple[Callable, Callable]] = dataclasses.field(default_factory=dict)
    theta: float = 10000.0  # default base of rotary wavelengths
    local_theta: float = 0.0  # the same of layers with a window; 0: such layers have no rotary embedding of their own
    theta_keys: tuple[str, str] = ("rope_theta", "local_rope_theta")  # keys of both at the top level of config.json
    rotary_share: float | None = None  # default of partial_rotary_factor; None: the family has no such key
    rope_types: dict[str, str] = dataclasses.field(default_factory=dict)  # other spellings of rope_type
    rope: dict = dataclasses.field(default_factory=dict)  # rope_parameters of a config.json that has none


ALL_TASKS = ("causal", "sequence", "token", "span")


def decoder_forms(
    name: str,
    head: str = "ForCausalLM",
    tagger: str = "score",
    span: str = "",
    tasks: tuple[str, ...] = ALL_TASKS,
    file: str = "",
    kept: tuple[str, ...] = (),
) -> dict[str, Form]:
    """The forms of a decoder.

    Args:
        name: Prefix of the names of its classes.
        head: Rest of the name of its causal model's class.
        tagger: Name of the module of its token classifier's head.
        span: Form.prefix of its model for answers in a text; empty: None.
        tasks: The tasks for which transformers has a class.
        file: Module.file of the head over the vocabulary.
        kept: Form.kept of its causal model.
    """
    forms = {
        "causal": Form(f"{name}{head}", Head(), (Module("lm_head", "lm_head", file=file),), kept=kept),
        "sequence": Form(
            f"{name}ForSequenceClassification",
            Head("sequence", pool="last", bias=False),
            (Module("head/out", "score"),),
        ),
        "token": Form(f"{name}ForTokenClassification", Head("token"), (Module("head/out", tagger),)),
        "span": Form(f"{name}ForQuestionAnswering", Head("span"), (Module("head/out", "qa_outputs"),), span or None),
    }
    return {task: forms[task] for task in tasks}


LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn/q_proj": "self_attn.q_proj",
    "attn/k_proj": "self_attn.k_proj",
    "attn/v_proj": "self_attn.v_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "attn/o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}
OUT_NORMS = {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
OLMO_LAYER = {path: name for path, name in LLAMA_LAYER.items() if path not in ("attn_norm", "mlp_norm")} | OUT_NORMS
DELTA = ("norm", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
DELTA_LAYER = LLAMA_LAYER | {"delta": "linear_attn"} | {f"delta/{name}": f"linear_attn.{name}" for name in DELTA}
EXPERTS = {f"mlp/{name}": f"mlp.experts.{{e}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
MOE_LAYER = LLAMA_LAYER | {"mlp/gate": "mlp.gate"} | EXPERTS
MIXTRAL_LAYER = MOE_LAYER | {
    f"mlp/{name}": f"mlp.experts.{{e}}.{theirs}"
    for name, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
}
DENSE = {f"dense/{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
SHARED_LAYER = MOE_LAYER | DENSE | {"mlp/shared_gate": "mlp.shared_expert_gate"}
SHARED_LAYER |= {f"mlp/shared/{name}": f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
GEMMA_LAYER = LLAMA_LAYER | {"mlp_norm": "pre_feedforward_layernorm"} | OUT_NORMS
GEMMA4_LAYER = GEMMA_LAYER | {  # other sublayers with the names of attn and mlp
    path.replace(like, other): name
    for like, others in (("attn/", ("global/", "attn_read/", "global_read/")), ("mlp/", ("wide/",)))
    for other in others
    for path, name in LLAMA_LAYER.items()
    if path.startswith(like)
}
GEMMA4_LAYER |= {"inputs/gate": "per_layer_input_gate", "inputs/out": "per_layer_projection"}
GEMMA4_LAYER |= {"inputs_out_norm": "post_per_layer_input_norm"}
GEMMA4_MODULES = (
    Module("inputs_embed", "model.embed_tokens_per_layer"),
    Module("inputs_proj", "model.per_layer_model_projection"),
    Module("inputs_norm", "model.per_layer_projection_norm"),
    Module("layers/scalar", "model.layers.{l}.layer_scalar", bare=True),
)
FUSED_LAYER = LLAMA_LAYER | {"attn/c_attn": "self_attn.qkv_proj", "mlp/gate_up_proj": "mlp.gate_up_proj"}
GLM_LAYER = FUSED_LAYER | {"attn_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"}
GPT_OSS_LAYER = {path: name for path, name in LLAMA_LAYER.items() if not path.startswith("mlp/")}
GPT_OSS_LAYER |= {"attn": "self_attn", "mlp/gate": "mlp.router"}  # the first for its sinks
GPT_OSS_EXPERTS = tuple(
    Module(f"layers/mlp/{name}", f"model.layers.{{l}}.mlp.experts.{name}", transposed=True, bare=True)
    for name in ("gate_up_proj", "down_proj")
)
STARCODER_LAYER = LLAMA_LAYER | {"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"}


def decoder_modules(layer: dict[str, str] = LLAMA_LAYER, moe: str = "mlp") -> tuple[Module, ...]:
    """The modules of a decoder with LLaMA's names.

    Args:
        layer: {path of a module of its blocks: name}.
        moe: Name in files of what is called `mlp` in the model.
    """

    def module(path, name):
        name = f"model.layers.{{l}}.{name}"
        file = name.replace(".mlp.", f".{moe}.")
        return Module(f"layers/{path}", name, file=file if file != name or "{e}" in file else "")

    return (
        Module("embed", "model.embed_tokens"),
        *(module(path, name) for path, name in layer.items()),
        Module("final_norm", "model.norm"),
    )


LLAMA_KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden": "intermediate_size",
    "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "activation": "hidden_act",
    "tied": "tie_word_embeddings", "initializer_range": "initializer_range",
}  # fmt: skip
LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "intermediate_size": 11008, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip
QWEN_DEFAULTS = {
    "vocab_size": 151936, "num_key_value_heads": 32, "intermediate_size": 22016, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
LLAMA_CONSTANTS = {"norm": "rms", "gated": True, "positions": "rotary"}
EVERY_LAYER = {"layer_types": (None,)}  # a window, where there is one, is that of all layers
NESTED_ROPE = {"rope_scaling": (None, {})}  # rope_parameters alone says how layers without a window are stretched
BALANCE = {"balance": "router_aux_loss_coef", "balanced": "output_router_logits"}
ROUTED = {"experts": "num_experts", "experts_used": "num_experts_per_tok", "experts_normed": "norm_topk_prob"}
SPARSE = BALANCE | {"hidden": "moe_intermediate_size", "dense_hidden": "intermediate_size"} | ROUTED
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}


def llama_like(
    model_type: str,
    forms: dict[str, Form],
    modules: tuple[Module, ...] = decoder_modules(),  # noqa: B008  a tuple of tuples
    **own,
) -> Family:
    """A row that differs from LLaMA's in what is given. See Family for the meaning of all arguments."""
    llama = {"keys": LLAMA_KEYS, "defaults": LLAMA_DEFAULTS, "constants": LLAMA_CONSTANTS}
    merged = {field: entries | own.pop(field, {}) for field, entries in llama.items()}
    return Family(model_type, forms, modules, prefix="model.", buffers=r"rotary_emb\.inv_freq$", **merged, **own)


INVERSE = (lambda x: 1 / x, lambda x: float(f"{1 / x:.12g}"))
INVERSE_ROOT = (lambda x: x**-0.5, lambda x: round(x**-2))
GEMMA_KEYS = ATTENTION_BIAS | {"activation": "hidden_activation", "logit_cap": "final_logit_softcapping"}
GEMMA_DEFAULTS = {
    "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False,
    "final_logit_softcapping": 30.0, "sliding_window": 4096, "sliding_window_pattern": 2, "layer_types": None,
}  # fmt: skip
GEMMA_CONSTANTS = {"norm": "rms_plus_one", "norms": "both", "embed_scale": lambda shape: shape["width"] ** 0.5}
OLMO_DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
OLMO_CONSTANTS = {"norms": "output", "qk_norm": "all"}


def with_other_parts(
    model_type: str, text: Family, architecture: str, parts: tuple[str, ...], only: dict[str, tuple]
) -> Family:
    """The row of a model that reads images or sound too, and of which the text part is computed here.

    Args:
        model_type: Its model_type.
        text: The row of its text part.
        architecture: The class of the whole model.
        parts: Names of its other modules, without `model.` where they lie within it.
        only: As Family.only, beside those of the text part.
    """
    prefix = "model.language_model."
    modules = tuple(m._replace(name=prefix + m.name.removeprefix(text.prefix)) for m in text.modules)
    form = dataclasses.replace(text.forms["causal"], architecture=architecture, kept=text.forms["causal"].kept + parts)
    return dataclasses.replace(
        text, model_type=model_type, forms={"causal": form}, modules=modules, prefix=prefix, text=text.model_type,
        prefixes=("language_model.model.", "language_model.", "model."), only=text.only | only,
    )  # fmt: skip


DECODERS = (
    Family(
        model_type="gpt2",
        forms=decoder_forms("GPT2", "LMHeadModel", tagger="classifier"),
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
        ),
        prefix="transformer.",
        keys={
            "vocab_size": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head", "hidden": "n_inner",
            "max_positions": "n_positions", "norm_eps": "layer_norm_epsilon", "activation": "activation_function",
            "tied": "tie_word_embeddings", "initializer_range": "initializer_range",
        },
        defaults={
            "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        constants={
            "norm": "layer", "gated": False, "fused_qkv": "parts", "qkv_bias": True, "out_bias": True, "mlp_bias": True,
            "positions": "learned",
        },
        only={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
        buffers=r"\.attn\.(bias|masked_bias)$",
        aliases={
            "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    llama_like(
        "llama",
        decoder_forms("Llama", span="transformer."),
        keys=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        defaults={"attention_bias": False, "mlp_bias": False},
    ),
    llama_like(
        "mistral",
        decoder_forms("Mistral"),
        defaults={
            "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        only=EVERY_LAYER,
    ),
    llama_like(
        "qwen2",
        decoder_forms("Qwen2", span="transformer."),
        defaults=QWEN_DEFAULTS,
        constants={"qkv_bias": True},
    ),
    llama_like(
        "qwen3",
        decoder_forms("Qwen3", span="transformer."),
        keys=ATTENTION_BIAS,
        defaults=QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        constants={"qk_norm": "head"},
    ),
    llama_like(
        "qwen3_5_text",
        {
            # Files have a head that predicts several tokens, which transformers does not compute.
            **decoder_forms("Qwen3_5", tasks=("causal",), kept=("mtp",)),
            **decoder_forms("Qwen3_5Text", tasks=("sequence",)),
        },
        decoder_modules(DELTA_LAYER),
        keys=ATTENTION_BIAS
        | {
            "delta_key_heads": "linear_num_key_heads", "delta_value_heads": "linear_num_value_heads",
            "delta_key_dim": "linear_key_head_dim", "delta_value_dim": "linear_value_head_dim",
            "delta_width": "linear_conv_kernel_dim",
        },
        defaults={
            "vocab_size": 248320, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
            "intermediate_size": 12288, "max_position_embeddings": 32768, "attention_bias": False,
            "partial_rotary_factor": None, "layer_types": None, "full_attention_interval": 4,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        },
        constants={"norm": "rms_plus_one", "qk_norm": "head", "attn_gate": True},
        only={"hidden_act": ("silu", "swish")},  # the delta rule's convolution has the same activation
        rotary_share=0.25,
    ),
    llama_like(
        "mixtral",
        decoder_forms("Mixtral"),
        decoder_modules(MIXTRAL_LAYER, "block_sparse_moe"),
        keys=BALANCE | {"experts": "num_local_experts", "experts_used": "num_experts_per_tok"},
        defaults={
            "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
            "router_aux_loss_coef": 0.001, "output_router_logits": False,
        },
        constants={"experts_normed": True},
        only=EVERY_LAYER,
        aliases={"num_experts": "num_local_experts"},
        theta=1e6,
    ),
    llama_like(  # of ftjax alone, written by ftjax upcycle
        "ftjax_mixture_of_tokens",
        decoder_forms("FtjaxMixtureOfTokens", tasks=("causal",)),
        decoder_modules(MOE_LAYER),
        keys=ATTENTION_BIAS | {"experts": "num_experts", "mixing": "mixing_group_size", "qk_norm": "qk_norm"},
        defaults={
            "num_experts": 8, "mixing_group_size": 8, "qk_norm": "", "attention_bias": False, "sliding_window": None,
            "use_sliding_window": True,
        },
        only=EVERY_LAYER | {"qk_norm": ("", "head")},
    ),
    llama_like(
        "qwen3_moe",
        decoder_forms("Qwen3Moe"),
        decoder_modules(MOE_LAYER | DENSE),
        keys=ATTENTION_BIAS | SPARSE,
        defaults={
            "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4,
            "moe_intermediate_size": 768, "intermediate_size": 6144, "mlp_only_layers": None, "decoder_sparse_step": 1,
            "max_position_embeddings": 32768, "attention_bias": False,
            "use_sliding_window": False, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
            "norm_topk_prob": False, "router_aux_loss_coef": 0.001, "output_router_logits": False,
        },
        constants={"qk_norm": "head"},
        aliases={"num_local_experts": "num_experts"},
        only=EVERY_LAYER,
    ),
    llama_like(
        "qwen2_moe",
        decoder_forms("Qwen2Moe"),
        decoder_modules(SHARED_LAYER),
        keys=SPARSE | {"shared_hidden": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias"},
        defaults={
            "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "num_key_value_heads": 16, "moe_intermediate_size": 1408, "intermediate_size": 5632,
            "mlp_only_layers": None, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 5632,
            "max_position_embeddings": 32768, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
            "qkv_bias": True, "router_aux_loss_coef": 0.001, "output_router_logits": False,
            "use_sliding_window": False, "sliding_window": 4096, "layer_types": None,
        },
        aliases={"num_local_experts": "num_experts"},
        only={"use_sliding_window": (False,)},
    ),
    llama_like(
        "olmoe",
        decoder_forms("Olmoe", tasks=("causal",)),
        decoder_modules(MOE_LAYER),
        keys=ATTENTION_BIAS | BALANCE | {"qkv_clip": "clip_qkv"} | ROUTED,
        defaults={
            "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
            "intermediate_size": 2048, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": False,
            "clip_qkv": None, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01, "output_router_logits": False,
        },
        constants={"qk_norm": "all"},
        only={"sliding_window": (None,)},  # transformers hands it to kernels, of which only some apply it
        aliases={"num_local_experts": "num_experts"},
    ),
    llama_like(
        "gpt_oss",
        decoder_forms("GptOss", tasks=("causal", "sequence", "token")),
        (*decoder_modules(GPT_OSS_LAYER), *GPT_OSS_EXPERTS),
        keys=ATTENTION_BIAS
        | BALANCE
        | {
            "experts": "num_local_experts", "experts_used": "num_experts_per_tok", "gate_limit": "swiglu_limit",
            "gate_slope": "swiglu_alpha",
        },
        defaults={
            "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4,
            "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "router_aux_loss_coef": 0.001, "output_router_logits": False,
            "sliding_window": 128, "sliding_window_pattern": 2, "layer_types": None,
        },
        constants={"sinks": True, "mlp_bias": True, "fused_gate": "neighbours", "experts_normed": True},
        only={"hidden_act": ("silu",), "sliding_window_pattern": (2,)},
        aliases={"num_experts": "num_local_experts"},
        theta=150000.0,
        rope={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    llama_like(
        "gemma2",
        decoder_forms("Gemma2", tasks=("causal", "sequence", "token")),
        decoder_modules(GEMMA_LAYER),
        keys=GEMMA_KEYS | {"score_cap": "attn_logit_softcapping", "score_scale": "query_pre_attn_scalar"},
        defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256},
        constants=GEMMA_CONSTANTS,
        only={"use_bidirectional_attention": (None, False), "sliding_window_pattern": (2,)},
        converted={"score_scale": INVERSE_ROOT},
    ),
    llama_like(
        "gemma3_text",
        {
            **decoder_forms("Gemma3", tasks=("causal",)),
            **decoder_forms("Gemma3Text", tasks=("sequence",)),
        },
        decoder_modules(GEMMA_LAYER),
        keys=GEMMA_KEYS | {"score_scale": "query_pre_attn_scalar"},
        defaults=GEMMA_DEFAULTS
        | {
            "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        },
        constants=GEMMA_CONSTANTS | {"qk_norm": "head"},
        only={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
        converted={"score_scale": INVERSE_ROOT},
        theta=1e6,
        local_theta=1e4,
        theta_keys=("rope_theta", "rope_local_base_freq"),
    ),
    llama_like(
        "gemma4_text",
        decoder_forms("Gemma4", tasks=("causal",)),
        (*decoder_modules(GEMMA4_LAYER), *GEMMA4_MODULES),
        keys=GEMMA_KEYS | {"values_from_keys": "attention_k_eq_v"},
        defaults=GEMMA_DEFAULTS
        | {
            "vocab_size": 262144, "num_hidden_layers": 30, "max_position_embeddings": 131072, "sliding_window": 512,
            "sliding_window_pattern": 6, "final_logit_softcapping": None, "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262144, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
            "attention_k_eq_v": False, "global_head_dim": 512, "num_global_key_value_heads": None,
            "per_layer_config": None,
        },
        constants=GEMMA_CONSTANTS | {"norm": "rms", "qk_norm": "head", "v_norm": True, "score_scale": 1.0},
        # vision: of images alone
        only=NESTED_ROPE
        | {
            "use_bidirectional_attention": (None, False, "vision"), "sliding_window_pattern": (6,),
            "rope_theta": (None,),
        },
        theta=1e6,
        local_theta=1e4,
        theta_keys=("rope_theta", "rope_theta"),
        rope={"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
    ),
    llama_like(
        "olmo2",
        decoder_forms("Olmo2", tasks=("causal", "sequence")),
        decoder_modules(OLMO_LAYER),
        keys=ATTENTION_BIAS,
        defaults=OLMO_DEFAULTS,
        constants=OLMO_CONSTANTS,
    ),
    llama_like(
        "olmo3",
        decoder_forms("Olmo3", tasks=("causal", "sequence")),
        decoder_modules(OLMO_LAYER),
        keys=ATTENTION_BIAS,
        defaults=OLMO_DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
        constants=OLMO_CONSTANTS,
        only={"sliding_window_pattern": (4,)},
        theta=5e5,
        local_theta=5e5,
        theta_keys=("rope_theta", "rope_theta"),
    ),
    llama_like(
        "phi3",
        decoder_forms("Phi3", tasks=("causal", "sequence", "token")),
        decoder_modules(FUSED_LAYER),
        defaults={
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": None, "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        constants={"fused_qkv": "parts", "fused_gate": "parts"},
        only=EVERY_LAYER,
        rotary_share=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    llama_like(
        "smollm3",
        decoder_forms("SmolLM3"),
        keys=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        defaults={
            "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": None,
            "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4,
        },
        theta=2e6,
    ),
    llama_like(
        "granite",
        decoder_forms("Granite", tasks=("causal",)),
        keys={
            **ATTENTION_BIAS, "mlp_bias": "mlp_bias", "input_scale": "embedding_multiplier",
            "score_scale": "attention_multiplier", "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        defaults={
            "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0,
            "residual_multiplier": 1.0, "logits_scaling": 1.0,
        },
        converted={"logit_scale": INVERSE},
    ),
    llama_like(
        "cohere2",
        decoder_forms("Cohere2", tasks=("causal",)),
        keys={**ATTENTION_BIAS, "norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        defaults={
            "vocab_size": 256000, "hidden_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 64,
            "intermediate_size": 22528, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True, "attention_bias": False, "logit_scale": 0.0625, "sliding_window": 4096,
            "sliding_window_pattern": 4, "layer_types": None,
        },
        constants={
            "norm": "layer", "norm_bias": False, "parallel": True, "one_norm": True, "rotary_pairs": "neighbours",
            "rotary": lambda shape: tuple(window > 0 for window in shape["windows"] or (0,) * shape["layers"]),
        },
    ),
    llama_like(
        "starcoder2",
        decoder_forms("Starcoder2", tasks=("causal", "sequence", "token")),
        decoder_modules(STARCODER_LAYER),
        keys={"norm_eps": "norm_epsilon", "qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
        defaults={
            "vocab_size": 49152, "hidden_size": 3072, "num_hidden_layers": 30, "num_attention_heads": 24,
            "num_key_value_heads": 2, "intermediate_size": 12288, "max_position_embeddings": 4096, "norm_epsilon": 1e-5,
            "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "initializer_range": 0.018042,
            "use_bias": True, "sliding_window": None,
        },
        constants={"norm": "layer", "gated": False},
        only=EVERY_LAYER,
    ),
    llama_like(
        "glm4",
        decoder_forms("Glm4", tasks=("causal", "sequence", "token")),
        decoder_modules(GLM_LAYER),
        keys={"qkv_bias": "attention_bias"},
        defaults={
            "vocab_size": 151552, "num_hidden_layers": 40, "num_key_value_heads": 2, "head_dim": 128,
            "intermediate_size": 13696, "max_position_embeddings": 131072, "partial_rotary_factor": None,
            "rms_norm_eps": 1.5625e-07, "attention_bias": True,
        },
        constants={"norms": "both", "fused_gate": "parts", "rotary_pairs": "neighbours"},
        rotary_share=0.5,
    ),
    llama_like(
        "ernie4_5",
        decoder_forms("Ernie4_5", tasks=("causal",)),
        keys={"qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
        defaults={
            "vocab_size": 103424, "hidden_size": 1024, "num_hidden_layers": 18, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "use_bias": False,
        },
        constants={"rotary_pairs": "neighbours"},
        theta=500000.0,
    ),
    llama_like(
        "seed_oss",
        decoder_forms("SeedOss", span="transformer."),
        keys={"qkv_bias": "attention_bias", "out_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
        defaults={
            "vocab_size": 155136, "num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 27648, "max_position_embeddings": 524288, "attention_bias": True,
            "attention_out_bias": False, "mlp_bias": False,
        },
    ),
    Family(
        model_type="gpt_neox",
        forms=decoder_forms("GPTNeoX", tagger="classifier", file="embed_out"),
        modules=(
            Module("embed", "gpt_neox.embed_in"),
            Module("layers/attn_norm", "gpt_neox.layers.{l}.input_layernorm"),
            Module("layers/attn/c_attn", "gpt_neox.layers.{l}.attention.query_key_value"),
            Module("layers/attn/o_proj", "gpt_neox.layers.{l}.attention.dense"),
            Module("layers/mlp_norm", "gpt_neox.layers.{l}.post_attention_layernorm"),
            Module("layers/mlp/up_proj", "gpt_neox.layers.{l}.mlp.dense_h_to_4h"),
            Module("layers/mlp/down_proj", "gpt_neox.layers.{l}.mlp.dense_4h_to_h"),
            Module("final_norm", "gpt_neox.final_layer_norm"),
        ),
        prefix="gpt_neox.",
        keys={
            **{field: key for field, key in LLAMA_KEYS.items() if field not in ("kv_heads", "head_dim")},
            **ATTENTION_BIAS, "norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual",
        },
        defaults={
            "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
            "intermediate_size": 24576, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
            "tie_word_embeddings": False, "initializer_range": 0.02, "attention_bias": True,
            "use_parallel_residual": True, "partial_rotary_factor": None,
        },
        constants={"norm": "layer", "gated": False, "fused_qkv": "heads", "mlp_bias": True, "positions": "rotary"},
        only={"head_dim": (None,), "num_key_value_heads": (None,)},
        buffers=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        rotary_share=0.25,
    ),
)  # fmt: skip


BERT_DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
BERT_KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "hidden": "intermediate_size", "max_positions": "max_position_embeddings", "types": "type_vocab_size",
    "norm_eps": "layer_norm_eps", "activation": "hidden_act", "tied": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}  # fmt: skip
BERT_CONSTANTS = {
    "norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "causal": False,
    "norms": "sum", "final_norm": False, "embed_norm": True, "positions": "learned",
}  # fmt: skip
BERT_ONLY = {"is_causal": (False,), "is_decoder": (False,), "position_embedding_type": ("absolute",)}


def bert_modules(base: str) -> tuple[Module, ...]:
    """The modules of BERT and RoBERTa. base: the name of the encoder in their models with a head."""
    layer = f"{base}.encoder.layer.{{l}}"
    return (
        Module("embed", f"{base}.embeddings.word_embeddings"),
        Module("pos_embed", f"{base}.embeddings.position_embeddings"),
        Module("type_embed", f"{base}.embeddings.token_type_embeddings"),
        Module("embed_norm", f"{base}.embeddings.LayerNorm"),
        Module("layers/attn/q_proj", f"{layer}.attention.self.query"),
        Module("layers/attn/k_proj", f"{layer}.attention.self.key"),
        Module("layers/attn/v_proj", f"{layer}.attention.self.value"),
        Module("layers/attn/o_proj", f"{layer}.attention.output.dense"),
        Module("layers/attn_norm", f"{layer}.attention.output.LayerNorm"),
        Module("layers/mlp/up_proj", f"{layer}.intermediate.dense"),
        Module("layers/mlp/down_proj", f"{layer}.output.dense"),
        Module("layers/mlp_norm", f"{layer}.output.LayerNorm"),
    )


MEAN_HEAD = (Module("head/dense", "2_Dense.linear"), Module("head/out", "3_Dense.linear"))
CLASSIFIER, ANSWERS = (Module("head/out", "classifier"),), (Module("head/out", "qa_outputs"),)


def encoder_forms(
    name: str, masked: tuple[str, str, str], pooler: tuple[str, str, str], activation: str = ""
) -> dict[str, Form]:
    """The forms of an encoder: the bare encoder, and one with each of its heads.

    Args:
        name: Prefix of the names of its classes.
        masked: Names of the masked head's dense layer, of its norm, and of the module with its bias.
        pooler: Activation of the dense layer of the head over labels, the layer's name, and the name of the last map.
        activation: Key of config.json for the activation of the masked head; empty: there is none.
    """
    dense, norm, bias = masked
    over_words = Module("head/dense", dense), Module("head/norm", norm), Module("head", bias)
    nonlinear, pooled, out = pooler
    over_labels = Module("head/dense", pooled), Module("head/out", out)
    bare = Form(f"{name}Model", Head("none"), prefix="", kept=("pooler.dense",))
    return {
        "none": bare,
        "masked": Form(
            f"{name}ForMaskedLM",
            Head("masked", activation="gelu", norm=True),
            over_words,
            keys={"activation": activation} if activation else {},
        ),
        "sequence": Form(
            f"{name}ForSequenceClassification", Head("sequence", pool="first", activation=nonlinear), over_labels
        ),
        "token": Form(f"{name}ForTokenClassification", Head("token"), CLASSIFIER),
        "span": Form(f"{name}ForQuestionAnswering", Head("span"), ANSWERS),
        "sequence/mean": dataclasses.replace(
            bare, head=Head("sequence", pool="mean", activation="tanh"), modules=MEAN_HEAD, beside=True
        ),
    }


MODERNBERT_HEAD = (Module("head/dense", "head.dense"), Module("head/norm", "head.norm"))
MODERNBERT_HEAD_KEYS = {"activation": "classifier_activation", "dense_bias": "classifier_bias"}


def modernbert_forms() -> dict[str, Form]:
    """The forms of ModernBERT. All heads begin with its dense layer and norm, which config.json describes."""

    def form(task, name, last, keys=None, **fields):
        head = Head(task, activation="gelu", dense_bias=False, norm=True, **fields)
        return Form(f"ModernBert{name}", head, (*MODERNBERT_HEAD, last), keys=MODERNBERT_HEAD_KEYS | (keys or {}))

    last = CLASSIFIER[0]
    return {
        "none": Form("ModernBertModel", Head("none"), prefix=""),
        "masked": form("masked", "ForMaskedLM", Module("head", "decoder"), {"bias": "decoder_bias"}),
        "sequence": form("sequence", "ForSequenceClassification", last, {"pool": "classifier_pooling"}, pool="first"),
        "token": form("token", "ForTokenClassification", last),
        "span": form("span", "ForQuestionAnswering", last),
    }


ENCODERS = (
    Family(
        model_type="bert",
        forms=encoder_forms(
            "Bert",
            ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
            ("tanh", "bert.pooler.dense", "classifier"),
            "hidden_act",
        ),
        modules=bert_modules("bert"),
        prefix="bert.",
        keys=BERT_KEYS,
        defaults=BERT_DEFAULTS,
        constants=BERT_CONSTANTS,
        only=BERT_ONLY,
        buffers=r"embeddings\.position_ids$|cls\.predictions\.decoder\.(weight|bias)$|cls\.seq_relationship\.",
    ),
    Family(
        model_type="roberta",
        forms=encoder_forms(
            "Roberta",
            ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
            ("tanh", "classifier.dense", "classifier.out_proj"),
        ),
        modules=bert_modules("roberta"),
        prefix="roberta.",
        keys=BERT_KEYS,
        defaults=BERT_DEFAULTS | {"vocab_size": 50265},
        constants=BERT_CONSTANTS | {"position_offset": 2},  # positions begin after that of the padding token, 1
        only=BERT_ONLY | {"pad_token_id": (1,)},
        buffers=r"embeddings\.position_ids$|lm_head\.decoder\.(weight|bias)$|pooler\.dense\.",
    ),
    Family(
        model_type="distilbert",
        forms=encoder_forms(
            "DistilBert",
            ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            ("relu", "pre_classifier", "classifier"),
            "activation",
        ),
        modules=(
            Module("embed", "distilbert.embeddings.word_embeddings"),
            Module("pos_embed", "distilbert.embeddings.position_embeddings"),
            Module("embed_norm", "distilbert.embeddings.LayerNorm"),
            Module("layers/attn/q_proj", "distilbert.transformer.layer.{l}.attention.q_lin"),
            Module("layers/attn/k_proj", "distilbert.transformer.layer.{l}.attention.k_lin"),
            Module("layers/attn/v_proj", "distilbert.transformer.layer.{l}.attention.v_lin"),
            Module("layers/attn/o_proj", "distilbert.transformer.layer.{l}.attention.out_lin"),
            Module("layers/attn_norm", "distilbert.transformer.layer.{l}.sa_layer_norm"),
            Module("layers/mlp/up_proj", "distilbert.transformer.layer.{l}.ffn.lin1"),
            Module("layers/mlp/down_proj", "distilbert.transformer.layer.{l}.ffn.lin2"),
            Module("layers/mlp_norm", "distilbert.transformer.layer.{l}.output_layer_norm"),
        ),
        prefix="distilbert.",
        keys={
            "vocab_size": "vocab_size", "width": "dim", "layers": "n_layers", "heads": "n_heads",
            "hidden": "hidden_dim", "max_positions": "max_position_embeddings", "activation": "activation",
            "tied": "tie_word_embeddings", "initializer_range": "initializer_range",
        },
        defaults={
            "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072,
            "max_position_embeddings": 512, "activation": "gelu", "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        constants=BERT_CONSTANTS | {"norm_eps": 1e-12},
        only={"is_causal": (False,), "is_decoder": (False,), "sinusoidal_pos_embds": (False, True)},
        buffers=r"embeddings\.position_ids$|vocab_projector\.weight$",
        aliases={"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    ),
    Family(
        model_type="modernbert",
        forms=modernbert_forms(),
        modules=(
            Module("embed", "model.embeddings.tok_embeddings"),
            Module("embed_norm", "model.embeddings.norm"),
            Module("layers/attn_norm", "model.layers.{l}.attn_norm", first=1),
            Module("layers/attn/c_attn", "model.layers.{l}.attn.Wqkv"),
            Module("layers/attn/o_proj", "model.layers.{l}.attn.Wo"),
            Module("layers/mlp_norm", "model.layers.{l}.mlp_norm"),
            Module("layers/mlp/gate_up_proj", "model.layers.{l}.mlp.Wi"),
            Module("layers/mlp/down_proj", "model.layers.{l}.mlp.Wo"),
            Module("final_norm", "model.final_norm"),
        ),
        prefix="model.",
        keys={
            "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
            "heads": "num_attention_heads", "hidden": "intermediate_size", "max_positions": "max_position_embeddings",
            "norm_eps": "norm_eps", "norm_bias": "norm_bias", "qkv_bias": "attention_bias",
            "out_bias": "attention_bias", "mlp_bias": "mlp_bias", "activation": "hidden_activation",
            "tied": "tie_word_embeddings", "initializer_range": "initializer_range",
        },
        defaults={
            "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
            "intermediate_size": 1152, "max_position_embeddings": 8192, "norm_eps": 1e-5, "norm_bias": False,
            "attention_bias": False, "mlp_bias": False, "hidden_activation": "gelu", "tie_word_embeddings": True,
            "initializer_range": 0.02, "local_attention": 128, "global_attn_every_n_layers": 3, "layer_types": None,
        },
        constants={
            "norm": "layer", "gated": True, "fused_gate": "parts", "fused_qkv": "parts", "causal": False,
            "first_norm": False, "embed_norm": True, "positions": "rotary",
        },
        # transformers 5 takes sliding_window for the half of local_attention, and 4 does not read it.
        only=NESTED_ROPE | {"is_causal": (False,), "is_decoder": (False,), "sliding_window": (None,)},
        buffers=r"rotary_emb\.|^decoder\.weight$",
        theta=160000.0,
        local_theta=10000.0,
        theta_keys=("global_rope_theta", "local_rope_theta"),
    ),
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS)}
OTHER_PARTS = (
    with_other_parts(
        "gemma3",
        FAMILIES["gemma3_text"],
        "Gemma3ForConditionalGeneration",
        ("vision_tower", "multi_modal_projector"),
        {"final_logit_softcapping": (None,)},  # this class does not bound its logits
    ),
    with_other_parts("qwen3_5", FAMILIES["qwen3_5_text"], "Qwen3_5ForConditionalGeneration", ("visual",), {}),
    with_other_parts(
        "gemma4",
        FAMILIES["gemma4_text"],
        "Gemma4ForConditionalGeneration",
        ("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
        {},
    ),
)
FAMILIES |= {family.model_type: family for family in OTHER_PARTS}
