"""How vectors of texts are made of hidden states: what sentence-transformers' files say, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError
from ftjax.hub.families import read_json
from ftjax.hub.resolve import write_json

MODULES, LIMITS, FOLDER = "modules.json", "sentence_bert_config.json", "1_Pooling"
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}  # ours -> the key that is true


class Pooling(NamedTuple):
    """pool: mean | cls, see config.task.pool; max_length: tokens to which a text is cut; 0: as many as the model has
    positions for."""

    pool: str = "mean"
    max_length: int = 0


def read(folder: Path) -> Pooling | None:
    """What a directory says; None where it says nothing. Raises FtjaxError for another way of pooling."""
    file = Path(folder) / FOLDER / "config.json"
    if not (Path(folder) / MODULES).is_file() or not file.is_file():
        return None
    said = read_json(file)
    modes = [name for name, on in said.items() if name.startswith("pooling_mode_") and on]
    modes = modes or [MODES.get(said.get("pooling_mode"), str(said.get("pooling_mode")))]
    pool = next((ours for ours, theirs in MODES.items() if modes == [theirs]), None)
    if pool is None:
        raise FtjaxError(f"{file}: {', '.join(modes)} is not supported; known: {', '.join(MODES.values())}")
    limits = Path(folder) / LIMITS
    return Pooling(pool, (limits.is_file() and read_json(limits).get("max_seq_length")) or 0)


def write(folder: Path, pooling: Pooling, width: int) -> None:
    """Files by which sentence-transformers makes the same vectors, of length 1, of a model in a directory."""
    folder = Path(folder)
    kinds = (("", "Transformer"), (FOLDER, "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path, _ in kinds[1:]:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / MODULES, modules)
    modes = {theirs: ours == pooling.pool for ours, theirs in MODES.items()}
    write_json(folder / FOLDER / "config.json", {"word_embedding_dimension": width} | modes)
    write_json(folder / LIMITS, {"max_seq_length": pooling.max_length or None, "do_lower_case": False})
