"""A smaller model of some layers of another, as a start for distillation (Sanh et al. 2019, DistilBERT)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ftjax.errors import FtjaxError
from ftjax.files import write_json
from ftjax.foreign import read_json
from ftjax.hub import families, resolve, weights
from ftjax.models.transformer import STACKS
from ftjax.tree import map_paths


def student(model: str, layers: tuple[int, ...], out: str | Path) -> Path:
    """Write a model directory with some layers of a model; everything else is the same.

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
    params = map_paths(lambda path, x: x[np.array(kept)] if path.split("/")[0] in STACKS else x, params)
    each = {
        name: tuple(getattr(shape, name)[i] for i in kept) for name in ("windows", "rotary") if getattr(shape, name)
    }
    if not any(each.get("windows", ())):
        each["windows"] = ()
    smaller = dataclasses.replace(shape, layers=len(kept), **each)

    def describe(written: Path) -> None:
        hf, name = read_json(written / "config.json"), family.keys["layers"]
        hf |= {
            key: len(kept) for key in (name, *(a for a, ours in family.aliases.items() if ours == name)) if key in hf
        }
        if shape.windows or "layer_types" in hf:
            hf |= families.windows_to_hf(smaller, family)
        write_json(written / "config.json", hf)
        if families.read_config(written)[1] != smaller:
            raise FtjaxError(
                f"{out}: not written: which layers of a {family.model_type} model have a window or rotary positions "
                "follows from their number, and the kept layers are another pattern; keep other layers"
            )

    labels = families.label_names(folder) if shape.head.labels else ()
    weights.write_model(Path(out), params, folder, family, smaller, labels=labels, beside=describe)
    return Path(out)
