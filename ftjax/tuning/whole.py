"""Parameters that are trained whole beside an adapter: a head over labels, and `tuning.modules_to_save`.

A head over labels is usually new, and small, so every method trains it. PEFT stores such parameters as
`modules_to_save`, and biases whose module is not saved by `bias`. L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np

from ftjax.errors import FtjaxError, nearest
from ftjax.hub import families
from ftjax.hub.peft import CONFIG, PREFIX, ROWS
from ftjax.models.config import TABLES, layers_with
from ftjax.models.transformer import parameter_axes
from ftjax.tree import flatten, unflatten
from ftjax.tuning.targets import saves

PEFT_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}  # task of a head -> PEFT's
POOLER = "head/dense"  # the one map of a head over labels that PEFT may adapt instead of training it whole


def has_labels(spec) -> bool:
    """Whether the model ends in a head over labels."""
    return spec.model.head.labels > 0


def stored(spec) -> dict[str, families.Tensors]:
    """As `families.tensor_names`, with the head of a tied model as a parameter of its own."""
    return families.tensor_names(spec.family, dataclasses.replace(spec.model, tied=False))


def with_pooler(spec, adapted: bool = False):
    """`spec` with the pooler among the maps that a method may adapt, if `tuning.targets` has its full name.

    adapted: Add the pooler in any case.
    """
    if not has_labels(spec):
        return spec
    maps = {m.path: m.name for m in families.modules(spec.family, spec.model) if m.path == POOLER}
    return spec._replace(names=spec.names | {p: n for p, n in maps.items() if adapted or n in spec.tuning.targets})


def chosen(spec) -> dict[str, np.ndarray]:
    """{path of each parameter that is trained whole: in which layers}, (L,) bool, or (1,) if not stacked; and of each
    table of embeddings with rows of `tuning.token_ids`: which rows, (V,) bool.

    Raises FtjaxError for a name in `tuning.modules_to_save` that matches no module of the model, and if one of two
    tables would be trained whole and rows of the other.
    """
    entries, ids = tuple(spec.tuning.modules_to_save), list(spec.tuning.token_ids)
    if not (entries or ids or has_labels(spec)):
        return {}
    adapted, found, used = with_pooler(spec).names, {}, set()
    tensors = stored(spec)
    for path, (names, *_) in tensors.items():
        by = [[entry for entry in entries if saves(entry, name)] for name in names]
        used.update(*by)
        head = has_labels(spec) and path.startswith("head/") and path.rsplit("/", 1)[0] not in adapted
        if any(hits := [head or bool(entry) for entry in by]):
            found[path] = np.array(hits)
    for entry in entries:
        if entry not in used:
            tails = sorted({name.split(".")[-2] for names, *_ in tensors.values() for name in names if name})
            raise FtjaxError(
                f"tuning.modules_to_save: {entry!r} matches no module of this model{nearest(entry, tails)}; it has "
                f"{', '.join(tails)}; `bias` takes all biases"
            )
    tables = [path for path in TABLES if path in tensors]
    if ids and not found.keys() >= {*tables}:
        if found.keys() & {*tables}:
            names = " and ".join(tensors[path][0][0].removesuffix(".weight") for path in tables)
            raise FtjaxError(f"tuning.modules_to_save: rows of new tokens need both of {names} there, or none")
        rows = np.isin(np.arange(spec.model.vocab_size), ids)
        found |= dict.fromkeys(tables[:1] if spec.model.tied else tables, rows)
    return found


def without_form(paths) -> list[str]:
    """Those of the paths of trained parameters for which PEFT's files have no form."""
    ends = "/experts", "/biases", "/router", "/sinks", "/A_log", "/dt_bias"
    return [path for path in paths if path.endswith(ends)]


def of_rows(path: str, hits: np.ndarray) -> bool:
    """Whether single rows of a table are trained, and not the whole table."""
    return path in TABLES and len(hits) > 1


def take(params: dict, parts: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Split flat parameters into those that are trained and the others.

    For a stacked parameter that is trained in some layers only, the first holds those layers, and the second the whole
    stack, in which `put` replaces them.
    """
    trained, frozen = {}, {}
    for path, leaf in params.items():
        hits = parts.get(path, np.zeros(1, bool))
        if not hits.all():
            frozen[path] = leaf
        if hits.any():
            trained[path] = leaf if hits.all() else leaf[np.flatnonzero(hits)]
    return trained, frozen


def put(params: dict, trained: dict, parts: dict[str, np.ndarray]) -> dict:
    """The reverse of `take`: flat `params` with the trained parameters in their places."""
    out = dict(params)
    for path, hits in parts.items():
        x = trained[path]
        out[path] = x if hits.all() else params[path].astype(x.dtype).at[np.flatnonzero(hits)].set(x)
    return out


def with_whole(method: Any) -> Any:
    """A Method that trains the parameters of `chosen` too. If there are none, it does what `method` does."""

    def init(key, base, spec):
        parts = chosen(spec)
        trained, frozen = method.init(key, base, with_pooler(spec))
        tables = {path for path in TABLES if path in parts}
        rows = [path for path in tables if of_rows(path, parts[path])]
        if adapted := [path for path in rows if path.split("/")[0] in trained]:
            raise FtjaxError(f"tuning.targets: {adapted[0]} has rows of new tokens, and cannot have an adapter as well")
        if spec.model.shares_table and tables and not rows and "lm_head" not in frozen:
            # As in PEFT, which copies the module: the table that is not trained does not change.
            frozen = frozen | {"lm_head": {"kernel": frozen["embed"]["embedding"]}}
        whole, frozen = take(flatten(frozen), parts)
        return unflatten(flatten(trained) | whole), unflatten(frozen)

    def inside(trained, frozen, spec):
        """The arguments of `method`: its own trained leaves, the other parameters in their places, and its spec."""
        parts, leaves = chosen(spec), flatten(trained)
        own = {path: x for path, x in leaves.items() if path not in parts}
        return unflatten(own), unflatten(put(flatten(frozen), leaves, parts)), with_pooler(spec)

    def to_peft(trained, frozen, spec):
        parts, leaves = chosen(spec), flatten(trained)
        own = unflatten({path: x for path, x in leaves.items() if path not in parts})
        config, tensors = method.to_peft(own, frozen, with_pooler(spec))
        return saved(config, tensors, parts, leaves, spec, method.peft_prefix)

    def from_peft(adapter_config, tensors, base, spec):
        mine, rest = _divide(adapter_config, tensors, spec, method.peft_prefix)
        plain = {key: {"modules_to_save": None, "bias": "none"}.get(key, x) for key, x in adapter_config.items()}
        trained, fields = method.from_peft(plain, rest, base, with_pooler(spec, adapted=True))
        spec = spec._replace(tuning=spec.tuning.copy_and_resolve_references())
        spec.tuning.update(fields, modules_to_save=())
        fields |= {"modules_to_save": _entries(mine, spec)}
        spec.tuning.update(fields)
        return unflatten(flatten(trained) | _read(mine, base, spec, method.peft_prefix)), fields

    def axes(path):
        of_model = "/" in path and path.rsplit("/", 1)[1] in families.LEAVES
        return parameter_axes(path) if of_model else method.axes(path)

    def layer_ids(path, spec):
        parts = chosen(spec)
        return np.array(layers_with(spec.model, path))[parts[path]] if path in parts else method.layer_ids(path, spec)

    return dataclasses.replace(
        method,
        init=init,
        variables=lambda trained, frozen, spec: method.variables(*inside(trained, frozen, spec)),
        merge=method.merge and (lambda trained, frozen, spec: method.merge(*inside(trained, frozen, spec))),
        to_peft=method.to_peft and to_peft,
        from_peft=method.from_peft and from_peft,
        axes=axes,
        layer_ids=layer_ids,
    )


# ---- PEFT's files --------------------------------------------------------------------------------------------------


def saved(
    config: dict, tensors: dict[str, np.ndarray], parts: dict[str, np.ndarray], leaves: dict, spec, start: str = PREFIX
) -> tuple[dict, dict[str, np.ndarray]]:
    """An adapter in PEFT's format, with the parameters that are trained whole.

    Args:
        config: The adapter_config of the method.
        tensors: {name: tensor} of the method.
        parts: {path: (L,) or (1,) bool}, the layers in which it is trained whole.
        leaves: {path: the trained layers in order, or the parameter if it is not stacked}.
        spec: The Spec.
        start: Prefix of parameter names in the files.

    Returns:
        adapter_config and tensors, the tensors in float32 with the layout of the model's files.
    """
    whole, names = {}, stored(spec)
    if without_form(parts):
        raise FtjaxError(
            "PEFT's files have no form for experts, routers, attention sinks and rates of the delta rule that are "
            "trained whole; export the merged model"
        )
    tokens = {}
    for path, hits in parts.items():
        tensor_names, transposed, _ = names[path]
        rows = np.asarray(leaves[path], np.float32)
        if of_rows(path, hits):
            module = tensor_names[0].removesuffix(".weight")
            tokens[module.rsplit(".", 1)[-1]] = np.flatnonzero(hits).tolist()
            tensors = tensors | {f"{start}{module}.{ROWS}": rows}
            continue
        for row, layer in enumerate(np.flatnonzero(hits)):
            x = rows[row] if path.startswith("layers/") else rows
            if tensor_names[layer]:
                whole[tensor_names[layer]] = x.T if transposed else x
    adapted = _adapted(tensors)
    modules = {name.rsplit(".", 1)[0] for name in whole if not name.endswith(".bias")}
    biases = {module for name in whole if (module := name.rsplit(".", 1)[0]) not in modules}
    for name, x in whole.items():
        module, leaf = name.rsplit(".", 1)
        inner = "base_layer." * (module in adapted)
        tensors = tensors | {f"{start}{module}.{inner}{leaf}": x}
    if biases and "bias" in config:
        config = config | {"bias": "lora_only" if biases <= adapted else "all"}
    head = _head_modules(parts, spec)
    others = {name for name in modules if not any(f"{name}.".startswith(f"{module}.") for module in head)}
    config = config | {"modules_to_save": sorted(others | head) or None}
    config = config | ({"trainable_token_indices": tokens} if tokens else {})
    return config | ({"task_type": PEFT_TASKS[spec.model.head.task]} if has_labels(spec) else {}), tensors


def _head_modules(parts: dict[str, np.ndarray], spec) -> set[str]:
    """Modules of the head that are saved: those outside the base as a whole, one within it by itself.

    A pooler that the method adapts is not among them, and the module around it is not saved as a whole.
    """
    adapted = with_pooler(spec).names
    paths = {path.rsplit("/", 1)[0] for path in parts if path.startswith("head/") and has_labels(spec)} - adapted.keys()
    names = [m.name for m in families.modules(spec.family, spec.model) if m.path in paths]
    alone = (spec.family.prefix, f"{adapted.get(POOLER, '').split('.')[0]}.")
    return {name if f"{name}.".startswith(alone) else name.split(".")[0] for name in names}


def _adapted(tensors) -> set[str]:
    """The modules that have a LoRA or IA3 among an adapter's tensors."""
    parts = [re.split(r"\.(?:lora|ia3)_", name.removeprefix(PREFIX)) for name in tensors]
    return {module for module, *end in parts if end}


def _divide(adapter_config: dict, tensors: dict[str, np.ndarray], spec, start: str) -> tuple[dict, dict]:
    """Split the tensors of an adapter into whole parameters, by their names in the model's files, and those of the
    method.

    With `bias="all"`, and after the vocabulary was resized, PEFT writes a saved module twice, and also the base's copy.
    Raises FtjaxError if the two differ, if a tensor of a module in `modules_to_save` is missing, or for a name that
    PEFT ignores, because it expects another one of a module with an adapter.
    """
    known = {name: path for path, (names, *_) in stored(spec).items() for name in names if name}
    mine, rest, adapted = {}, {}, _adapted(tensors)
    for name, x in tensors.items():
        once = re.sub(r"\.(modules_to_save(\.default)?|original_module)\.", ".", name)
        plain = once.removeprefix(start).replace(".base_layer.bias", ".bias")
        if plain == once or plain not in known:
            if not families.is_buffer(plain, spec.family):
                rest[name] = x
        elif once == name:
            module, leaf = plain.rsplit(".", 1)
            inner = "base_layer." * (module in adapted)
            if once != (expected := f"{start}{module}.{inner}{leaf}"):
                raise FtjaxError(
                    f"adapter tensor {name}: PEFT ignores it, because {module} has {'an' if inner else 'no'} adapter; "
                    f"expected {expected}"
                )
            mine[plain] = x
        elif ".modules_to_save." in name and not np.array_equal(x, tensors.get(once)):
            raise FtjaxError(f"adapter tensor {name} differs from {once}, of which it should be a copy")
    for name, entry in itertools.product(known, adapter_config.get("modules_to_save") or ()):
        of_head = known[name].startswith("head/") and has_labels(spec)
        if saves(entry, name) and name not in mine and not of_head:
            raise FtjaxError(f"adapter tensor {start}{name} is missing: {CONFIG} has {entry!r} in modules_to_save")
    return mine, rest


def _entries(mine: dict[str, np.ndarray], spec) -> tuple[str, ...]:
    """The `tuning.modules_to_save` that describes tensors by their names: whole modules, and biases of others."""
    always = {name for path in chosen(spec) for name in stored(spec)[path][0]}
    names = [name for name in mine if name not in always]
    modules = {name.rsplit(".", 1)[0] for name in names if not name.endswith(".bias")}
    return tuple(sorted(modules | {name for name in names if name.rsplit(".", 1)[0] not in modules}))


def _read(mine: dict[str, np.ndarray], base: dict, spec, start: str) -> dict[str, np.ndarray]:
    """The parameters that an adapter trains whole: {path: array, float32}.

    Args:
        mine: {name in the model's files: tensor} of the adapter.
        base: Parameters of the base. Its head is used for what the adapter lacks: PEFT by default trains the last map
            alone, and leaves a BERT's pooler unchanged.
        spec: The Spec.
        start: Prefix of parameter names in the files.

    Raises:
        FtjaxError: For a tensor that is missing or of another shape.
    """
    shapes, names, own = families.shapes(dataclasses.replace(spec.model, tied=False)), stored(spec), flatten(base)
    out = {}
    for path, hits in chosen(spec).items():
        (tensor_names, transposed, _), rows = names[path], []
        stacked = path.startswith("layers/")
        shape = shapes[path][1:] if stacked else shapes[path]
        for layer in np.flatnonzero(hits):
            name = tensor_names[layer]
            if name not in mine and path.startswith("head/") and not path.startswith("head/out/"):
                rows.append(own[path])
                continue
            expected = shape[::-1] if transposed else shape
            if name not in mine or mine[name].shape != expected:
                there = f"has shape {mine[name].shape}" if name in mine else "is missing"
                what = "the head over labels, trained whole" if path.startswith("head/") else "trained whole"
                raise FtjaxError(f"adapter tensor {start}{name} {there}, expected {expected}: {what}")
            rows.append(np.asarray(mine[name].T if transposed else mine[name], np.float32))
        out[path] = np.stack(rows) if stacked else rows[0]
    return out
