"""Models that are made of others without training: some layers of one, or the weighted average of two."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.foreign import read_json
from ftjax.hub import families, pooling, resolve, weights
from ftjax.models.config import SUBLAYERS, ModelConfig, with_layers
from ftjax.models.transformer import keep_layers
from ftjax.tree import flatten, unflatten


def student(model: str, layers: tuple[int, ...], out: str | Path) -> Path:
    """Write a model directory with some layers of a model, as a start for distillation (Sanh et al. 2019, DistilBERT).

    Args:
        model: Model directory, hub name, or run folder with a whole model.
        layers: The layers that are kept, counted from 0, in rising order.
        out: The directory to write.

    Returns:
        The directory.

    Raises:
        FtjaxError: If the model does not have these layers, or if its config.json cannot describe what is left.
    """
    folder = resolve.resolve_model(model)
    family, shape = families.read_config(folder)
    kept = sorted({*layers})
    if list(layers) != kept or not kept or kept[0] < 0 or kept[-1] >= shape.layers:
        raise FtjaxError(
            f"layers: expected some of the layers 0 to {shape.layers - 1} of {folder}, each once and in rising order; "
            f"found {', '.join(map(str, layers)) or 'none'}"
        )
    params = weights.read_params(folder, family, shape)
    params, smaller = keep_layers(params, shape, kept), with_layers(shape, kept)
    if not any(smaller.windows):
        smaller = dataclasses.replace(smaller, windows=())
    if {*smaller.parts} == {SUBLAYERS}:
        smaller = dataclasses.replace(smaller, parts=())
    same = _same(folder, smaller)

    def describe(written: Path) -> None:
        same["beside"](written)
        whole, name = read_json(written / "config.json"), family.keys["layers"]
        hf = families.text_part(whole, family)
        hf |= {key: len(kept) for key in hf if family.aliases.get(key, key) == name}
        if shape.windows or smaller.rotary or shape.parts or "layer_types" in hf:
            hf |= families.layers_to_hf(smaller, family)
        if len(types := hf.get("layer_types") or ()) == shape.layers:  # transformers writes it for more families
            hf["layer_types"] = [types[i] for i in kept]
        resolve.write_json(written / "config.json", families.with_text_part(whole, family, hf))
        if families.read_config(written)[1] != smaller:
            raise FtjaxError(
                f"{out}: not written: which layers of a {family.model_type} model have a window or rotary positions "
                "follows from their number, and the kept layers are another pattern; keep other layers"
            )

    labels = families.label_names(folder) if shape.head.labels else ()
    weights.write_model(Path(out), params, folder, family, smaller, labels=labels, **same | {"beside": describe})
    return Path(out)


def _same(source: Path, shape: ModelConfig) -> dict[str, Any]:
    """The arguments of `write_model` for a model that is used as the one in `source` is: with its vectors of texts, its
    recipe for predictions, and what it says of private training."""
    written = resolve.written(source)
    how = pooling.read(source) if shape.head.task == "none" else None

    def beside(folder: Path) -> None:
        if how:
            pooling.write(folder, how, shape.width)
        for name in {"README.md", pooling.LIMITS}.intersection(written.get("files", ())):
            shutil.copy(source / name, folder)

    return {"record": {key: written[key] for key in ("recipe", "privacy") if key in written}, "beside": beside}


def averaged(start: Path, end: Path, factor: float, out: Path, seed: int = 0) -> Path:
    """Write the model (1 - factor) · start + factor · end, parameter by parameter (WiSE-FT, Wortsman et al. 2022).

    If `end` is `start` with a merged adapter, this scales the adapter's change by the factor; of a quantised base, also
    the change by its rounding. Rows of tokens and a head over labels that `start` lacks begin as in training, and a
    tied head as its table.

    Args:
        start: Directory of the model before training.
        end: Directory of the model after training, whose other files are copied.
        factor: From 0 to 1.
        out: The directory to write.
        seed: Of the training, see `new_head` and `new_rows` of weights.read_params.

    Returns:
        The directory.

    Raises:
        FtjaxError: If the two models do not have the same parameters.
    """
    (source, shape), (family, after) = (families.read_config(folder) for folder in (start, end))
    grown = dataclasses.replace(shape, vocab_size=max(shape.vocab_size, after.vocab_size), head=after.head)
    first = flatten(weights.read_params(start, source, grown, new_head=jax.random.key(seed), new_rows=seed))
    last = flatten(weights.read_params(end, family, after))
    if "lm_head/kernel" in last:
        first.setdefault("lm_head/kernel", first["embed/embedding"])
    shapes = [{(path, x.shape) for path, x in tree.items()} for tree in (first, last)]
    if differing := shapes[0] ^ shapes[1]:
        path = min(differing)[0]
        raise FtjaxError(f"average: {start} and {end} differ in the parameter {path}, so they have no average")
    first, last = jax.tree.map(lambda x: x.astype(np.float32), (first, last))
    params = {path: (1 - factor) * first[path] + factor * x for path, x in last.items()}
    labels = families.label_names(end) if after.head.labels else ()
    weights.write_model(out, unflatten(params), end, family, after, labels=labels, **_same(end, after))
    return out
