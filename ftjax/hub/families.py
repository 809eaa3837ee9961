"""config.json and names of tensors <-> ModelConfig and paths of parameters, by the table of families."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ftjax import tasks
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.foreign import Kind, check_fields, either, flag, listed, mapped, maybe, number, read_json, string, whole
from ftjax.hub import pooling
from ftjax.hub.family_table import FAMILIES, Family, Form, Module
from ftjax.models.config import READS, Head, ModelConfig, RopeScaling, layers_with
from ftjax.models.transformer import shapes

# leaf of a module -> the end of its tensor's name, for modules and for Module.bare
LEAVES = dict.fromkeys(("kernel", "scale", "embedding", "router", "experts"), (".weight", ""))
LEAVES |= {"bias": (".bias", "_bias"), "biases": ("", "_bias"), "sinks": (".sinks", "")}
LEAVES |= {"conv": (".conv1d.weight", ""), "A_log": (".A_log", ""), "dt_bias": (".dt_bias", "")}

EXPERTS = "layers/mlp/experts/"  # the beginning of paths of adapters of experts
DENSE = ("layers/mlp/shared/", "layers/dense/")  # of dense feed-forward parts in mixtures of experts

# Hugging Face's name -> ours. Of several names with the same meaning, the first is the one that is written.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "tanh": "tanh", "gelu": "gelu", "gelu_python": "gelu"}
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast")
ACTIVATIONS |= dict.fromkeys(GELU_TANH, "gelu_tanh")

# RopeScaling.kind -> (keys of config.json that it needs, others that it may have)
ORIGINAL = "original_max_position_embeddings"
ROPE = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("factor", "short_factor", "long_factor", ORIGINAL), ("attention_factor",)),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
# key -> field of RopeScaling, where they differ
ROPE_NAMES = {ORIGINAL: "original_max_positions", "partial_rotary_factor": "share"}
ROPE_KEYS = tuple(dict.fromkeys(key for keys in ROPE.values() for part in keys for key in part))
PLACES = ("mrope_section", "mrope_interleaved")  # of images; the three positions of a token of text are equal
LAYER_TYPES = ("full_attention", "sliding_attention")
HYBRID_TYPES = ("full_attention", "linear_attention")

ANY_FAMILY = {
    "quantization_config": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": (None, {}),
}
# Keys with which some decoders of transformers change their arithmetic. A family whose row does not read such a key
# refuses it, unless its value has no effect.
ARITHMETIC = {
    *("alibi", "attention_multiplier", "attn_logit_softcapping", "clip_qkv", "embedding_multiplier", "logit_scale"),
    *("final_logit_softcapping", "logits_scaling", "n_routed_experts", "no_rope_layers", "num_experts", "qk_layernorm"),
    *("num_local_experts", "query_pre_attn_scalar", "residual_multiplier", "use_mrope", "use_qk_norm", "lm_head_bias"),
    *("sliding_window_pattern", "use_bidirectional_attention", "parallel_attn", "num_kv_shared_layers", "layer_scale"),
    *("per_layer_config", "hidden_size_per_layer_input", "attention_k_eq_v", "enable_moe_block", "global_head_dim"),
}
# Keys of rotary embeddings that are refused likewise -> the values without an effect.
ROTARY = {"partial_rotary_factor": (None, 1.0), "default_theta": (None,), ORIGINAL: (None,)}

# Type of a field of ModelConfig or Head -> what config.json may hold.
KINDS = {
    "int": whole(1),
    "float": number(least=0),
    "bool": flag,
    "str": string,
    "float | None": maybe(number(above=0)),
}
ALWAYS = ("score_scale", "logit_scale", "gate_limit")  # numbers that a family has in all models or in none
MXFP4 = "mxfp4"  # quant_method of parameters that are stored as NAME_blocks and NAME_scales
TEXT = "text_config"
MOST_LAYERS = 10_000  # a limit, because the names of the tensors of a billion layers would fill the memory
# Fields of config.json that are read here by name, in addition to those of a family's row.
FIELDS = {
    "model_type": string,
    "problem_type": maybe(string),
    **dict.fromkeys(("architectures", "layer_types"), maybe(listed(string))),
    "id2label": maybe(mapped(either(string, number()))),
    **dict.fromkeys(("num_labels", "global_attn_every_n_layers", "no_rope_layer_interval"), whole(1)),
    **dict.fromkeys(("decoder_sparse_step", "full_attention_interval"), whole(1)),
    "max_window_layers": whole(),
    "local_attention": whole(2),
    **dict.fromkeys(("sliding_window", "num_kv_shared_layers", "hidden_size_per_layer_input"), maybe(whole())),
    **dict.fromkeys(("vocab_size_per_layer_input", "global_head_dim", "num_global_key_value_heads"), maybe(whole(1))),
    "sliding_window_pattern": maybe(whole(1)),
    "mlp_only_layers": maybe(listed(whole())),
    "no_rope_layers": maybe(listed(whole(0, 1))),
    **dict.fromkeys(("use_sliding_window", "use_double_wide_mlp"), maybe(flag)),
    **dict.fromkeys(("global_rope_theta", "local_rope_theta", "rope_local_base_freq"), number(above=0)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), maybe(number(above=0))),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config", TEXT), maybe(mapped())),
    "per_layer_config": maybe(mapped(mapped(head_dim=whole(1), num_key_value_heads=whole(1)))),
}
ROPE_FIELDS = {
    **dict.fromkeys(("rope_theta", *ROPE_KEYS), maybe(number(above=0))),
    **dict.fromkeys(("rope_type", "type"), maybe(string)),
    **dict.fromkeys(("short_factor", "long_factor"), listed(number(above=0))),
    "truncate": flag,
}

POOLS = {"cls": "first", "mean": "mean"}  # Hugging Face's name -> Head.pool


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and shape of the model in a directory; see `from_hf`.

    The head of a bare encoder may be in modules of sentence-transformers in the same directory.
    """
    file = Path(folder) / "config.json"
    family, shape = from_hf(read_json(file), str(file))
    beside = pooling.read_head(folder) if shape.head.task == "none" else None
    return family, dataclasses.replace(shape, head=beside) if beside else shape


def from_hf(hf: dict, where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The family and the ModelConfig that a config.json describes, written by transformers 4 or 5.

    Args:
        hf: Content of the file.
        where: Name of the file, with which an error begins.

    Raises:
        FtjaxError: If `model_type` is unknown, a value has the wrong type, or a value would change the logits in a way
            that Transformer cannot compute.
    """
    check_fields(hf, FIELDS, where)
    kind = hf.get("model_type")
    check_known(kind, FAMILIES, f"{where}: unknown model_type")
    family = FAMILIES[kind]
    hf = text_part(hf, family, where)
    for key, name in family.aliases.items():
        if key in hf and name in hf and hf[key] != hf[name]:
            raise FtjaxError(f"{where}: {key} = {hf[key]!r}, but {name} = {hf[name]!r}, and both are one field")
        rotary = {"rope_theta": family.theta, "partial_rotary_factor": family.rotary_share}
        if name in rotary and name in hf and key not in hf:
            if hf[name] not in (rotary[name], (hf.get("rope_parameters") or {}).get(name)):
                raise FtjaxError(
                    f"{where}: {name} = {hf[name]!r}, which transformers 5 does not read in a {kind} model; expected "
                    f"{key} instead"
                )
    spelled = {name: key for key, name in family.aliases.items() if key in hf}
    hf = {family.aliases.get(key, key): value for key, value in hf.items()}
    if family.rotary_share not in (None, 1.0) and hf.get("partial_rotary_factor", 1.0) is None:
        raise FtjaxError(
            f"{where}: partial_rotary_factor is null, which may mean 1 or the family's own share; expected a number"
        )
    if (hf.get("quantization_config") or {}).get("quant_method") == MXFP4 and any(m.bare for m in family.modules):
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}  # read as what it stands for
    read = {*family.keys.values(), *family.defaults}
    unread = dict.fromkeys(ARITHMETIC, (None, False, 0, 1, [], "none")) | ROTARY
    unread = {key: allowed for key, allowed in unread.items() if key not in read}
    for key, allowed in (unread | ANY_FAMILY | family.only).items():
        # True equals 1, which changes nothing as a factor or a number of parts, but it turns something on.
        if key in hf and (hf[key] not in allowed or hf[key] is True and key in unread):
            raise FtjaxError(
                f"{where}: {key} = {hf[key]!r} is not supported for {kind} models, because it changes the logits. "
                f"Supported are models without this key, or where it is {' or '.join(map(repr, allowed))}"
            )
    hf = family.defaults | hf
    check_fields(hf, _kinds(family), where)
    values = {field: hf[key] for field, key in family.keys.items()}
    values |= {field: read(values[field]) for field, (read, _) in family.converted.items()}
    activation = values["activation"]
    check_known(activation, ACTIVATIONS, f"{where}: {family.keys['activation']} =")
    values["activation"] = ACTIVATIONS[activation]

    def said(field: str) -> str:
        """A field as the file has it."""
        return f"{spelled.get(key := family.keys[field], key)} = {values[field]}"

    heads = values["heads"]
    values["kv_heads"] = values.get("kv_heads") or heads
    values["hidden"] = values["hidden"] or 4 * values["width"]
    values["max_positions"] -= family.constants.get("position_offset", 0)
    if not values.get("head_dim"):
        values["head_dim"], rest = divmod(values["width"], heads)
        if rest:
            raise FtjaxError(
                f"{where}: {said('width')} is not a multiple of {said('heads')}; expected heads of one size"
            )
    if heads % values["kv_heads"]:
        raise FtjaxError(f"{where}: {said('kv_heads')} does not divide {said('heads')}; expected a divisor of it")
    if values.get("experts_used", 1) > values.get("experts", 1):
        raise FtjaxError(f"{where}: {said('experts_used')} is more than {said('experts')}; expected at most that")
    values["windows"] = _windows_from_hf(hf, family, where)
    if "full_attention_interval" in family.defaults:
        values["parts"] = _parts_from_hf(hf, values, where)
    for field, value in family.constants.items():
        values[field] = value(values) if callable(value) else value
    if "no_rope_layers" in family.defaults:
        values["rotary"] = _rotary_from_hf(hf, values["layers"], where)
    if "mlp_only_layers" in family.defaults:
        values["parts"] = _dense_from_hf(hf, values["layers"], where)
    if "num_kv_shared_layers" in family.defaults:
        values |= _sharing_from_hf(hf, values, where)
    if values["positions"] == "rotary":
        values |= _rope_from_hf(hf, family, values, where)
    return family, ModelConfig(**values, head=_head_from_hf(hf, family, where))


WHOLE = ("architectures", "quantization_config", "tie_word_embeddings")  # keys of the whole model


def text_part(hf: dict, family: Family, where: str = "config.json") -> dict:
    """What a config.json says of the text model; see Family.text."""
    if not family.text:
        return hf
    text = hf.get(TEXT) or {}
    check_fields(text, FIELDS, f"{where}: {TEXT}")
    if (kind := text.get("model_type", family.text)) != family.text:
        raise FtjaxError(f"{where}: {TEXT}: model_type = {kind!r}; the text part of this family is a {family.text}")
    tied = hf.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    if text.get("tie_word_embeddings", tied) != tied:
        raise FtjaxError(f"{where}: tie_word_embeddings is {tied} of the model, but not in {TEXT}; make them equal")
    return text | {key: hf[key] for key in WHOLE if key in hf}


def with_text_part(hf: dict, family: Family, text: dict) -> dict:
    """A config.json of which the text model is described by `text`, the inverse of `text_part`."""
    if not family.text:
        return text
    whole = {key: text[key] for key in (*WHOLE, "dtype", "torch_dtype") if key in text}
    inner = {key: value for key, value in text.items() if key not in ("architectures", "quantization_config")}
    hf = {key: value for key, value in hf.items() if key not in WHOLE}
    return hf | whole | {"model_type": family.model_type, TEXT: inner | {"model_type": family.text}}


def _head_from_hf(hf: dict, family: Family, where: str) -> Head:
    named = (hf.get("architectures") or [None])[0]
    classes = list(dict.fromkeys(form.architecture for form in family.forms.values()))
    prefixes = {re.split("For|LMHead|Model", name)[0] for name in classes}
    if named and not named.startswith(tuple(prefixes)):
        raise FtjaxError(
            f"{where}: architectures: {named!r} is not a class of {family.model_type} models{nearest(named, classes)}; "
            f"known: {', '.join(classes)}"
        )
    task = next((task for task, form in family.forms.items() if form.architecture == named), next(iter(family.forms)))
    labels = len(hf.get("id2label") or ()) or hf.get("num_labels", 2)
    return _head(family, task, labels, hf, where)


def _head(family: Family, task: str, labels: int, hf: dict, where: str) -> Head:
    form = family.forms[task]
    if task == "masked" and not hf.get("tie_word_embeddings", True):
        raise FtjaxError(
            f"{where}: tie_word_embeddings is false: a masked head with a table of its own is not supported"
        )
    fields = {field: hf[key] for field, key in form.keys.items() if key in hf}
    for field, known in (("activation", ACTIVATIONS), ("pool", POOLS)):
        if field in fields:
            check_known(fields[field], known, f"{where}: {form.keys[field]} =")
            fields[field] = known[fields[field]]
    if form.head.task in ("sequence", "token", "span"):
        fields["labels"] = 2 if task == "span" else labels
    return dataclasses.replace(form.head, **fields)


def with_head(
    family: Family, config: ModelConfig, task: str, labels: int, folder: Path, pool: str = "auto"
) -> ModelConfig:
    """The shape of a directory's model with a head for `task` instead of its own.

    Args:
        family: The model's family.
        config: The model's shape.
        task: The head's task, see ModelConfig.head.
        labels: C, number of labels, see ModelConfig.head.
        folder: The directory.
        pool: What a head over labels of whole texts reads, see config.task.pool. `auto`: as the model's own head for
            this task, or else as the family's.

    Raises:
        FtjaxError: If the family has no head for the task, or if its heads cannot pool in this way.
    """
    if task not in family.forms:
        kinds = lambda heads: ", ".join(kind for kind, one in tasks.every().items() if one.head in heads)  # noqa: E731
        able = ", ".join(name for name, other in FAMILIES.items() if task in other.forms)
        raise FtjaxError(
            f"task.kind: a {family.model_type} model has no form for {kinds({task})}; it has those for "
            f"{kinds(family.forms)}. The model types that have one are {able}"
        )
    file = Path(folder) / "config.json"
    head = _head(family, task, labels, read_json(file), str(file))
    own = config.head.pool if config.head.task == task else head.pool
    if task == "sequence" and (wanted := POOLS.get(pool, own)) != head.pool:
        form = family.forms.get(f"{task}/{wanted}")
        if form is None and "pool" not in family.forms[task].keys:
            raise FtjaxError(
                f"task.pool: a {family.model_type} model's head over labels reads the {head.pool} token of a text, and "
                f"no class of transformers or sentence-transformers has another; set it to auto, not {pool}"
            )
        head = dataclasses.replace(form.head if form else head, pool=wanted, labels=labels)
    return dataclasses.replace(config, head=head)


def with_rows(config: ModelConfig, ids: Sequence[int]) -> ModelConfig:
    """The shape of a model whose tables of embeddings have a row for each of these token ids too."""
    size = max([config.vocab_size - 1, *ids]) + 1
    if config.input_width and size > config.vocab_size:
        raise FtjaxError(
            "data.add_tokens, data.pad_vocabulary_to: this model has a second table of embeddings, of inputs of each "
            "layer (hidden_size_per_layer_input of its config.json), which cannot get new rows; leave them out"
        )
    return dataclasses.replace(config, vocab_size=size)


def form_of(family: Family, head: Head) -> Form:
    """The form of a family's model that has this head."""
    return family.forms.get(f"{head.task}/{head.pool}") or family.forms[head.task]


def _kinds(family: Family) -> dict[str, Kind]:
    """{key of config.json: the kind of its value}, for the keys that a family's row reads."""
    out = {}
    for keys, fields in [(family.keys, ModelConfig), *((form.keys, Head) for form in family.forms.values())]:
        types = {field.name: field.type for field in dataclasses.fields(fields)}
        for field, key in keys.items():
            kind = whole(1, MOST_LAYERS) if field == "layers" else KINDS[types[field]]
            kind = number(above=0) if field in ALWAYS else kind
            optional = field == "kv_heads" or key in family.defaults and family.defaults[key] is None
            out[key] = maybe(kind) if optional else kind
    return out


def _rope_from_hf(hf: dict, family: Family, values: dict, where: str) -> dict:
    # Version 4 has `rope_theta` at the top level and the rest in `rope_scaling`, version 5 all in `rope_parameters`, or
    # there in a part for each type of layers.
    parts, stretched = hf.get("rope_parameters"), hf.get("rope_scaling") or {}
    parts = ({} if stretched else family.rope) if parts is None else parts
    top = {"rope_theta": hf.get(family.theta_keys[0]), "partial_rotary_factor": hf.get("partial_rotary_factor")}
    if not family.local_theta:
        said = {*stretched, *(key for key in top if top[key] is not None)}
        if stretched and (unread := parts.keys() - said):
            raise FtjaxError(
                f"{where}: rope_parameters: {min(unread)}: transformers reads nothing here beside rope_scaling; write "
                "it there too, or leave rope_scaling out"
            )
        return _one_rope((top, stretched, parts), hf, family, values, where)
    if "type" in stretched and "rope_type" not in stretched:  # transformers 5 puts it beside a rope_type of its own
        raise FtjaxError(f"{where}: rope_scaling: type = {stretched['type']!r}; expected it under the name rope_type")
    check_fields(parts, dict.fromkeys(LAYER_TYPES, maybe(mapped())), f"{where}: rope_parameters")
    if others := parts.keys() - set(LAYER_TYPES):
        raise FtjaxError(f"{where}: rope_parameters: expected {' and '.join(LAYER_TYPES)}; found {min(others)!r}")
    full, local = (parts.get(kind) for kind in LAYER_TYPES)
    found = _one_rope((top, stretched, full), hf, family, values, where)
    own = (local or {}).get("rope_theta")  # before the key at the top level, which some families have for both
    key = family.theta_keys[1]
    if not own and key == family.theta_keys[0] and hf.get(key) not in (None, family.local_theta):
        raise FtjaxError(
            f"{where}: {key} = {hf[key]!r}, which transformers 4 reads for all layers of a {family.model_type} model, "
            "and 5 for those without a window alone; expected rope_parameters with a rope_theta for each of "
            f"{' and '.join(LAYER_TYPES)}"
        )
    top = {"rope_theta": None if own else hf.get(key) or family.local_theta}
    of_windows = _one_rope((top, local), hf, family, values, where)
    scaling = found["rope_scaling"]  # transformers looks for `truncate` in another place than that of the other keys
    if of_windows["rope_scaling"] != RopeScaling() or scaling.kind == "longrope" or not scaling.truncate:
        raise FtjaxError(
            f"{where}: rope_parameters of a {family.model_type} model: expected rope_type = 'default' in "
            "sliding_attention, and neither 'longrope' nor truncate = false in full_attention"
        )
    return found | {"local_theta": of_windows["rope_theta"]}


def _one_rope(parts, hf: dict, family: Family, values: dict, where: str) -> dict:
    """Fields of ModelConfig for one rotary embedding, from objects that may each say a part of it.

    If a value that two of them have differed, each version of transformers would compute another model.
    """
    rope = {}
    for part in parts:
        check_fields(part or {}, ROPE_FIELDS, f"{where}: rotary embedding")
        for key, value in (part or {}).items():
            key = "rope_type" if key == "type" else key
            if key in PLACES and "full_attention_interval" in family.defaults:
                continue
            if value is not None and rope.setdefault(key, value) != value:
                raise FtjaxError(f"{where}: {key} of the rotary embedding is given twice: {rope[key]!r} and {value!r}")
    kind = rope.pop("rope_type", "default")
    kind = family.rope_types.get(kind, kind)
    known = [name for name in ROPE if name != "proportional" or family.rotary_share is None]
    check_known(kind, known, f"{where}: rope_type =")
    theta = float(rope.pop("rope_theta", family.theta))
    share = None if kind == "proportional" else rope.pop("partial_rotary_factor", None)
    if family.rotary_share is None and share not in (None, 1.0):
        raise FtjaxError(f"{where}: partial_rotary_factor of the rotary embedding is not supported; expected 1.0")
    share = (family.rotary_share or 1.0) if share is None else share
    turned = 2 * -(-int(values["head_dim"] * share) // 2)
    if not 0 < turned <= values["head_dim"]:
        raise FtjaxError(
            f"{where}: rotary embedding: heads have {values['head_dim']} dimensions (head_dim, or the width divided by "
            f"the number of heads), and {turned} of them would turn by partial_rotary_factor = {share:g}; expected an "
            f"even number of 2 to {values['head_dim']}"
        )
    for key in rope:
        check_known(key, ROPE_KEYS, f"{where}: unknown key of the rotary embedding")
    needed, others = ROPE[kind]
    if ORIGINAL in family.defaults:
        rope[ORIGINAL] = hf[ORIGINAL]
    rope.setdefault(ORIGINAL, values["max_positions"])
    if kind == "longrope" and rope[ORIGINAL]:
        rope.setdefault("factor", values["max_positions"] / rope[ORIGINAL])
    for key in needed:
        if rope.get(key) is None:
            raise FtjaxError(f"{where}: rope_type {kind!r} needs {key!r}, which is missing")
    known = {ROPE_NAMES.get(key, key): rope[key] for key in (*needed, *others) if key in rope}
    scaling = RopeScaling(kind, **{key: tuple(x) if isinstance(x, list) else x for key, x in known.items()})
    if kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise FtjaxError(f"{where}: rotary embedding: low_freq_factor: expected less than high_freq_factor")
    for key in ("short_factor", "long_factor"):
        if kind == "longrope" and len(rope[key]) != turned // 2:
            raise FtjaxError(f"{where}: {key}: expected {turned // 2} numbers; found {len(rope[key])}")
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_share": share}


def rope_to_hf(config: ModelConfig, family: Family) -> dict:
    """The fields of config.json for the rotary embedding, for transformers 4 (top level) and 5 (nested) at once."""
    if config.positions != "rotary":
        return {}
    scaling, (needed, others) = config.rope_scaling, ROPE[config.rope_scaling.kind]
    known = {key: getattr(scaling, ROPE_NAMES.get(key, key)) for key in (*needed, *others)}
    known = {key: list(x) if isinstance(x, tuple) else x for key, x in known.items() if x is not None}
    rope = {"rope_type": scaling.kind} | known
    share = {} if family.rotary_share is None else {"partial_rotary_factor": config.rotary_share}
    whole, key, of_windows = rope | share | {"rope_theta": config.rope_theta}, *family.theta_keys
    stretched = rope if known and "rope_scaling" not in family.only else None
    hf = {key: config.rope_theta, "rope_scaling": stretched, "rope_parameters": whole} | share
    if ORIGINAL in family.defaults and ORIGINAL in known:
        hf[ORIGINAL] = known[ORIGINAL]
    if config.local_theta:
        local = {"rope_type": "default", "rope_theta": config.local_theta}
        hf |= {of_windows: config.local_theta, "rope_parameters": dict(zip(LAYER_TYPES, (whole, local)))}
        if key == of_windows and config.rope_theta != config.local_theta:
            del hf[key]  # one key cannot say both
    if "per_layer_config" in family.defaults:  # transformers 4 has no such family, and 5 would misread its keys
        return {"rope_parameters": hf["rope_parameters"]}
    return {theirs: hf[ours] for theirs, ours in family.aliases.items() if ours in hf} | hf


def _windows_from_hf(hf: dict, family: Family, where: str) -> tuple[int, ...]:
    # Files of a family may have keys that only others read.
    layers, hf = hf[family.keys["layers"]], {key: value for key, value in hf.items() if key in family.defaults}
    if "local_attention" in family.defaults:
        window, every = hf["local_attention"] // 2 + 1, hf["global_attn_every_n_layers"]
        sliding = [layer % every > 0 for layer in range(layers)]
    elif "sliding_window" in family.defaults:
        window = hf["sliding_window"] if hf.get("use_sliding_window", True) else None
        if window == 0:
            raise FtjaxError(f"{where}: sliding_window = 0; expected 1 or more, or null for no window")
        full = hf.get("max_window_layers", 0)  # number of first layers without a window
        every = hf.get("sliding_window_pattern") or layers + 1  # each such layer has none
        sliding = [window is not None and layer >= full and (layer + 1) % every > 0 for layer in range(layers)]
        if "no_rope_layers" in family.defaults:
            turned = _rotary_from_hf(hf, layers, where)
            sliding = [slides and not turns for slides, turns in zip(sliding, turned)]
    else:
        return ()
    if (types := hf.get("layer_types")) is not None:
        _check_layer_types(types, layers, LAYER_TYPES, where)
        sliding = [t == "sliding_attention" for t in types]
        if any(sliding) and window is None:
            raise FtjaxError(f"{where}: layer_types has sliding_attention, but sliding_window is off")
    return tuple(window if s else 0 for s in sliding) if any(sliding) else ()


def _check_layer_types(types: list[str], layers: int, known: tuple[str, ...], where: str) -> None:
    if len(types) != layers or set(types) - set(known):
        raise FtjaxError(f"{where}: layer_types: expected {layers} of {', '.join(known)}; found {types!r:.200}")


def _parts_from_hf(hf: dict, values: dict, where: str) -> tuple[tuple[str, str], ...]:
    """The sublayers of each layer of a family in which some have the delta rule in place of attention."""
    every, layers = hf["full_attention_interval"], values["layers"]
    types = hf.get("layer_types") or [HYBRID_TYPES[(layer + 1) % every > 0] for layer in range(layers)]
    _check_layer_types(types, layers, HYBRID_TYPES, where)
    if values["delta_value_heads"] % values["delta_key_heads"]:
        raise FtjaxError(
            f"{where}: linear_num_key_heads = {values['delta_key_heads']} does not divide linear_num_value_heads = "
            f"{values['delta_value_heads']}; expected a divisor of it"
        )
    return tuple(("delta" if kind == HYBRID_TYPES[1] else "attn", "mlp") for kind in types)


def _rotary_from_hf(hf: dict, layers: int, where: str) -> tuple[bool, ...]:
    """Of each layer whether it has rotary embeddings: 1 in `no_rope_layers`, in spite of the name."""
    every = hf["no_rope_layer_interval"]
    turned = hf["no_rope_layers"] or [(layer + 1) % every > 0 for layer in range(layers)]
    if len(turned) != layers:
        raise FtjaxError(f"{where}: no_rope_layers: expected {layers} entries; found {len(turned)}")
    return tuple(map(bool, turned))


def _dense_from_hf(hf: dict, layers: int, where: str) -> tuple[tuple[str, str], ...]:
    """The sublayers of each layer of a mixture; empty if all layers have experts."""
    only, every = hf["mlp_only_layers"] or (), hf["decoder_sparse_step"]
    routed = [layer not in only and (layer + 1) % every == 0 for layer in range(layers)]
    if not any(routed):
        raise FtjaxError(f"{where}: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    return () if all(routed) else tuple(("attn", "mlp" if own else "dense") for own in routed)


def _sharing_from_hf(hf: dict, values: dict, where: str) -> dict:
    """Fields of ModelConfig for the layers of Gemma 4. The last has no window, whatever `layer_types` says."""
    L, P, shared = values["layers"], hf["hidden_size_per_layer_input"] or 0, hf["num_kv_shared_layers"] or 0
    windows = (*(values["windows"] or (0,) * L)[:-1], 0)
    kinds = ["attn" if window else "global" for window in windows]
    if {*kinds} - {*kinds[: max(L - shared, 0)]}:
        raise FtjaxError(
            f"{where}: num_kv_shared_layers = {shared} leaves a type of layer without one that has keys of its own"
        )
    if P and hf["vocab_size_per_layer_input"] != values["vocab_size"]:
        raise FtjaxError(f"{where}: vocab_size_per_layer_input: expected that of vocab_size, {values['vocab_size']}")
    d, K = hf["global_head_dim"], hf["num_global_key_value_heads"] if hf["attention_k_eq_v"] else None
    # Of transformers 5.24, in place of these keys. It is empty if all layers have the sizes of those with a window.
    if (per_layer := hf["per_layer_config"]) is not None:
        known = ("head_dim", "num_key_value_heads")
        sizes = {key: size for key, size in per_layer.get(str(L - 1), {}).items() if key in known}
        d, K = map(sizes.get, known)
        full = [str(layer) for layer, kind in enumerate(kinds) if kind == "global"]
        if per_layer and per_layer != dict.fromkeys(full, sizes):
            raise FtjaxError(
                f"{where}: per_layer_config: expected the same {' and '.join(known)} in all layers of full attention, "
                f"{', '.join(full)}, and nothing else; found {per_layer!r:.200}"
            )
    d, K = d or values["head_dim"], K or values["kv_heads"]
    if values["heads"] % K or d % 2:
        raise FtjaxError(
            f"{where}: layers of full attention have num_attention_heads = {values['heads']}, {K} KV heads "
            f"(num_global_key_value_heads or per_layer_config) and heads of {d} dimensions (global_head_dim or "
            "per_layer_config); expected KV heads that divide the heads, and an even number of dimensions"
        )
    more, last = ("inputs",) * (P > 0) + ("scalar",), "wide" if hf["use_double_wide_mlp"] else "mlp"
    parts = tuple((kind, "mlp", *more) for kind in kinds[: L - shared])
    parts += tuple((kind + READS, last, *more) for kind in kinds[L - shared :])
    windows = windows if any(windows) else ()
    return {"windows": windows, "parts": parts, "input_width": P, "global_head_dim": d, "global_kv_heads": K}


def _sharing_to_hf(config: ModelConfig) -> dict:
    sizes = {"head_dim": config.global_head_dim, "num_key_value_heads": config.global_kv_heads}
    return {
        "num_kv_shared_layers": sum(READS in names[0] for names in config.parts),
        "use_double_wide_mlp": any("wide" in names for names in config.parts),
        "hidden_size_per_layer_input": config.input_width, "vocab_size_per_layer_input": config.vocab_size,
        "global_head_dim": config.global_head_dim, "num_global_key_value_heads": config.global_kv_heads,
        "per_layer_config": {str(i): sizes for i, names in enumerate(config.parts) if names[0].startswith("global")},
        "sliding_window": max(config.windows, default=512),  # transformers reads no null here
    }  # fmt: skip


def layers_to_hf(config: ModelConfig, family: Family) -> dict:
    """The fields of config.json that say which layers have a window, rotary positions or experts."""
    hf = _windows_to_hf(config, family)
    if "num_kv_shared_layers" in family.defaults:
        hf |= _sharing_to_hf(config)
    if "mlp_only_layers" in family.defaults:
        dense = [layer for layer, parts in enumerate(config.parts) if "dense" in parts]
        hf |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return hf


def _windows_to_hf(config: ModelConfig, family: Family) -> dict:
    windows, window = config.windows or (0,) * config.layers, max(config.windows, default=0) or None
    types = {"layer_types": [LAYER_TYPES[w > 0] for w in windows]} if "layer_types" in family.defaults else {}
    if "full_attention_interval" in family.defaults:
        return {"layer_types": [HYBRID_TYPES["delta" in parts] for parts in config.parts]}
    if "local_attention" in family.defaults:
        full = next((i for i, w in enumerate(windows) if i and not w), 3)
        return {"local_attention": 2 * ((window or 65) - 1), "global_attn_every_n_layers": full} | types
    if "sliding_window" not in family.defaults:
        return {}
    hf = {"sliding_window": window} | types
    if "no_rope_layers" in family.defaults:
        hf["no_rope_layers"] = list(map(int, config.rotary))
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = window is not None
    if "max_window_layers" in family.defaults:  # old releases of transformers 4 do not read layer_types
        hf["max_window_layers"] = next((i for i, w in enumerate(windows) if w), config.layers)
    return hf


def to_hf(family: Family, config: ModelConfig) -> dict:
    """The content of a complete config.json for a model of this shape: the inverse of `from_hf`.

    Raises FtjaxError if the family's config.json cannot express the shape.
    """
    form, head = form_of(family, config.head), config.head
    hf = {"model_type": family.model_type, "architectures": [form.architecture]}
    hf |= {key: getattr(config, field) for field, key in family.keys.items()}
    hf |= {family.keys[field]: write(getattr(config, field)) for field, (_, write) in family.converted.items()}
    hf[family.keys["max_positions"]] += config.position_offset
    if head.labels:
        hf |= names_of_labels([f"LABEL_{i}" for i in range(head.labels)])
    hf |= head_to_hf(form, head)
    hf[family.keys["activation"]] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    hf |= layers_to_hf(config, family)
    hf |= rope_to_hf(config, family)
    whole = dataclasses.replace(config, head=family.forms["none"].head) if form.beside else config
    hf = with_text_part({}, family, hf)
    read, meant = dataclasses.asdict(from_hf(hf)[1]), dataclasses.asdict(whole)
    lost = [f"{field} = {meant[field]!r}" for field in meant if read[field] != meant[field]]
    if lost:
        raise FtjaxError(f"a {family.model_type} model cannot have {', '.join(lost)}")
    return hf


def head_to_hf(form: Form, head: Head) -> dict:
    """The fields of config.json for a head, except its labels."""
    values = {**dataclasses.asdict(head), "pool": {ours: theirs for theirs, ours in POOLS.items()}.get(head.pool)}
    return {key: values[field] for field, key in form.keys.items()}


def names_of_labels(names: list[str]) -> dict:
    """The fields of config.json for labels, whose names are in the order of their ids."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def label_names(folder: Path) -> tuple[str, ...]:
    """Names of the labels of a directory's head, in the order of their ids; empty if it names none."""
    file = Path(folder) / "config.json"
    return labels_in(read_json(file), file)


def labels_in(hf: dict, where: str | Path = "config.json") -> tuple[str, ...]:
    """Names of the labels in a config.json or in an adapter's file of labels. `where` names the file in errors."""
    check_fields(hf, FIELDS, where)
    found = hf.get("id2label") or {}
    ids = [str(i) for i in range(len(found))]
    if found.keys() != set(ids):
        raise FtjaxError(f"{where}: id2label has the ids {', '.join(found)[:100]}; expected 0 to {len(found) - 1}")
    return tuple(str(found[i]) for i in ids)


def modules(family: Family, config: ModelConfig) -> list[Module]:
    """The modules of a model, including those of its head, with the names that its class gives them."""
    form = form_of(family, config.head)
    start = family.prefix if form.prefix is None else form.prefix
    names = [start + m.name.removeprefix(family.prefix) for m in family.modules]
    return [m._replace(name=name) for m, name in zip(family.modules, names, strict=True)] + list(form.modules)


def other_heads(family: Family, config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of names of tensors that only models with other heads have."""
    mine = {module.name for module in modules(family, config)}
    known = {module.name for form in family.forms.values() for module in form.modules}
    known |= {name for form in family.forms.values() for name in form.kept}
    return tuple(f"{name}." for name in known - mine)


def module_name(path: str, family: Family, config: ModelConfig) -> str:
    """The name of a module in Hugging Face's model, such as `model.layers.{l}.self_attn.q_proj`.

    Args:
        path: Its path here, such as `layers/attn/q_proj`.
        family: The model's family.
        config: The model's shape.

    Raises:
        KeyError: If the model has no module at this path.
    """
    return {module.path: module.name for module in modules(family, config)}[path]


def linear_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """{path: module name} of every linear map and every table of embeddings, in the order of the family's row, and
    {path: parameter name} of the experts.

    The linear maps of a head over labels are not included. They are trained as a whole, see ftjax.tuning.whole. The
    path of experts is that of their adapters: transformers has gates and what they multiply in one parameter. Dense
    parts of mixtures are left out: PEFT takes all names that end in gate_proj, up_proj or down_proj for experts.
    """
    found = {path for path in shapes(config) if not path.startswith(("head/", *DENSE))}
    leaves, own = ("kernel", "embedding"), modules(family, config)
    names = {m.path: m.name for m in own if any(f"{m.path}/{leaf}" in found for leaf in leaves)}
    experts = next((m.name.replace(".{e}", "").rsplit(".", 1)[0] for m in own if f"{m.path}/experts" in found), "")
    return names | {f"{EXPERTS}{name}": f"{experts}.{name}" for name in ("gate_up_proj", "down_proj") if experts}


def kernel_shape(path: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape (..., out, in) of a linear map, a table of embeddings or experts at a path of `linear_names`."""
    known, name = shapes(config), path.removeprefix(EXPERTS)
    if path.startswith(EXPERTS):
        if (own := f"layers/mlp/{name}/experts") in known:
            return known[own]
        *lead, rows, columns = known["layers/mlp/up_proj/experts"]
        return *lead, 2 * rows, columns
    return known[f"{path}/kernel"] if f"{path}/kernel" in known else known[f"{path}/embedding"][::-1]


class Tensors(NamedTuple):
    """The tensors of one parameter, and how they lie in files.

    Attributes:
        names: One for each index of the parameter's first `stacked` axes, which are layers and experts. It is empty if
            a norm has a row for a layer that does not have it.
        transposed: Whether they are stored as (..., in, out).
        stacked: 0, 1 or 2.
    """

    names: list[str]
    transposed: bool
    stacked: int


def tensor_names(family: Family, config: ModelConfig, files: bool = False) -> dict[str, Tensors]:
    """{path of a parameter: its Tensors}.

    files: names in the files of a model, where in most families each expert of a layer has one, and which in some
    families are not those of the model's class.
    """
    names, expected = {}, shapes(config)
    for module in modules(family, config):
        layers = layers_with(config, module.path) if module.path.startswith("layers/") else (0,)
        for leaf, suffixes in LEAVES.items():
            if (path := f"{module.path}/{leaf}") in expected:
                name = module.file if files and module.file else module.name.replace(".{e}", "")
                each = [(layer, e) for layer in layers for e in range(config.experts if "{e}" in name else 1)]
                found = [name.format(l=layer, e=e) + suffixes[module.bare] for layer, e in each]
                stored = [""] * module.first + found[module.first :]
                transposed = module.transposed and leaf in ("kernel", "experts")
                names[path] = Tensors(stored, transposed, ("{l}" in name) + ("{e}" in name))
    return names


def is_buffer(name: str, family: Family) -> bool:
    """Whether a stored tensor is not read, because it matches the family's `buffers`."""
    return re.search(family.buffers, name) is not None
