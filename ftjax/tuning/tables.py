"""Embedding tables in a PEFT adapter that replace those of its base.

PEFT saves them outside `modules_to_save` if the vocabulary was resized before training, and saves the rows of single
tokens if `trainable_token_indices` names some. A tied head stays tied to such a table. V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families
from ftjax.hub.peft import CONFIG, PREFIX, ROWS
from ftjax.models.config import TABLES
from ftjax.models.quantised import dequantised
from ftjax.tree import flatten, unflatten
from ftjax.tuning.targets import saves
from ftjax.tuning.whole import stored

EMBED, HEAD = TABLES


def find(adapter_config: dict, tensors: dict[str, np.ndarray], spec) -> tuple[dict, dict, dict, dict]:
    """Separate the tables of the base from an adapter's other tensors.

    Args:
        adapter_config: The content of adapter_config.json.
        tensors: {name: array}, as stored.
        spec: The Spec of the base.

    Returns:
        The other tensors; {path: table (V', D)} of the base; {path: (token ids, rows (n, D))}; and {path: table} of
        modules in `modules_to_save` with another number of rows than the base's, which stay among the tensors.

    Raises:
        FtjaxError: For tensors that contradict each other, and for rows without their token ids.
    """
    rest, tables, rows, saved = dict(tensors), {}, {}, {}
    asked = adapter_config.get("trainable_token_indices")
    for path, (names, *_) in stored(spec).items():
        if path not in (EMBED, HEAD):
            continue
        module = f"{PREFIX}{names[0].removesuffix('.weight')}"
        own, resized = f"{module}.weight", lambda name: len(rest[name]) != spec.model.vocab_size
        if any(saves(entry, names[0]) for entry in adapter_config.get("modules_to_save") or ()):
            if own in rest and resized(own):
                saved[path] = rest[own]
        elif own in rest and not any(name.startswith(f"{module}.lora_") for name in rest):  # PEFT wraps such a table
            tables[path] = rest.pop(own)
        for inner in ("original_module", "base_layer", "token_adapter.base_layer"):
            name = f"{module}.{inner}.weight"
            # A copy of the base's own table, beside a LoRA on it, is compared with the base, see lora_peft.
            if name in rest and (inner != "base_layer" or resized(name)):
                tables[path] = rest.pop(name)
        delta = rest.pop(f"{module}.{ROWS}", None)
        if delta is not None:
            by_name = asked if isinstance(asked, dict) else {names[0].split(".")[-2]: asked or ()}
            tied = rows[EMBED][0] if path == HEAD and EMBED in rows and spec.model.tied else ()  # PEFT names them once
            ids = next((ids for entry, ids in by_name.items() if saves(entry, names[0])), tied)
            if len(ids) != len(delta):
                raise FtjaxError(
                    f"{CONFIG}: trainable_token_indices names {len(ids)} tokens of {names[0]}, but the adapter has "
                    f"{len(delta)} rows for them"
                )
            rows[path] = list(ids), delta
    if asked and not rows:
        raise FtjaxError(f"{CONFIG}: trainable_token_indices is set, but the adapter has no trainable_tokens_delta")
    return rest, tables, rows, saved


def replaced(adapter_config: dict, tensors: dict[str, np.ndarray], base: dict, spec) -> tuple[dict, dict, dict, dict]:
    """The base model with the tables that an adapter replaces.

    Args:
        adapter_config: The content of adapter_config.json.
        tensors: {name: array}, as stored.
        base: Parameters of the base, which are not changed.
        spec: The Spec of the base.

    Returns:
        adapter_config and tensors of the adapter alone; the parameters that it is applied to, and the Spec of that
        model.

    Raises:
        FtjaxError: If the adapter lacks one of the two tables of a resized vocabulary, or if a tied head differs from
            its table.
    """
    rest, tables, rows, saved = find(adapter_config, tensors, spec)
    adapter_config = adapter_config | {"trainable_token_indices": None}
    if not (tables or rows or saved):
        return adapter_config, rest, base, spec
    params, new = flatten(base), {}
    for path in dict.fromkeys((*tables, *rows, *saved)):
        like = dequantised(params[EMBED if path == HEAD and spec.model.tied else path])
        # If the adapter saves a whole module, its table replaces the base's.
        new[path] = jnp.asarray(tables.get(path, like if path in rows else saved.get(path)), like.dtype)
        if path in rows:
            new[path] = _with_rows(new[path], *rows[path])
    known = new.keys() - (saved.keys() - tables.keys())
    if spec.model.shares_table:
        if {EMBED, HEAD} <= known and not np.array_equal(new[EMBED], new[HEAD]):
            raise FtjaxError("the adapter's table of embeddings differs from that of its head, but the base ties them")
        if known or {EMBED, HEAD} <= new.keys():
            new = {EMBED: new[EMBED if EMBED in known or not known else HEAD]}
        else:  # of the other one PEFT has saved nothing
            new = {}
    params |= new
    size = max(x.shape[0] for x in (*tables.values(), *saved.values(), *new.values(), params[EMBED]))
    spec = spec._replace(model=dataclasses.replace(spec.model, vocab_size=size))
    for path, shape in families.shapes(spec.model).items():
        if params[path].shape != shape:
            raise FtjaxError(
                f"the adapter was trained with a vocabulary of {size}, but its files lack "
                f"{stored(spec)[path].names[0]} at this size: expected {shape}, and the base has {params[path].shape}. "
                "Merge the adapter where it was trained, with peft's merge_and_unload, and use that model"
            )
    return adapter_config, rest, unflatten(params), spec


def _with_rows(table, ids: list[int], rows: np.ndarray):
    """A table (V, D) with other rows (n, D) for some token ids, which may be new. Raises FtjaxError if rows between the
    table and them would be left without values."""
    beyond = sorted({i for i in ids if i >= len(table)})
    if beyond != list(range(len(table), len(table) + len(beyond))):
        raise FtjaxError(
            f"{CONFIG}: trainable_token_indices names the token {beyond[-1]}, but the base has {len(table)} rows, and "
            "the adapter does not have all rows from there on. Merge the adapter where it was trained, with peft's "
            "merge_and_unload, and use that model"
        )
    table = jnp.pad(table, ((0, len(beyond)), (0, 0)))
    return table.at[jnp.array(ids)].set(jnp.asarray(rows, table.dtype))
