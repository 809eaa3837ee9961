"""Files of sentence-transformers, read and written: how texts become vectors, and a head over labels.

The head reads the mean of the hidden states, for which transformers has no class.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError
from ftjax.files import mode
from ftjax.foreign import maybe, parse_json, read_json, read_text, string, whole
from ftjax.hub.resolve import is_plain_name, write_json
from ftjax.models.config import Head

MODULES, LIMITS, FOLDER = "modules.json", "sentence_bert_config.json", "1_Pooling"
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}  # our name -> the key that is true
# Head.activation -> its name in a Dense module. The last Dense module of a head has no activation.
DENSE = {"tanh": "torch.nn.modules.activation.Tanh", "": "torch.nn.modules.linear.Identity"}


class Pooling(NamedTuple):
    """How texts become vectors.

    Attributes:
        pool: `mean` or `cls`, see config.task.pool.
        max_length: Most tokens of a text; a longer text is cut. 0: the number of the model's positions.
    """

    pool: str = "mean"
    max_length: int = 0


def modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module of a directory, such as ("Pooling", "1_Pooling"); empty if none are listed."""
    file = Path(folder) / MODULES
    if not file.is_file():
        return []
    entries = parse_json(read_text(file), file)
    try:
        found = [(m["type"].split(".")[-1], m["path"]) for m in entries]
    except (TypeError, KeyError, AttributeError) as error:
        raise FtjaxError(f"{file}: expected a JSON list of objects with type and path: {error!r}") from None
    if outside := next((path for _, path in found if not is_plain_name(path)), None):
        raise FtjaxError(f"{file}: path {outside!r}: expected the name of a folder beside this file")
    return found


def read(folder: Path) -> Pooling | None:
    """How a directory makes vectors; None if it does not say. Raises FtjaxError for a way that is not supported."""
    there, file = modules(folder), Path(folder) / FOLDER / "config.json"
    if not there or not mode(file):
        return None
    if other := [kind for kind, _ in there if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise FtjaxError(f"{Path(folder) / MODULES}: vectors by {', '.join(other)} are not supported")
    limits = Path(folder) / LIMITS
    settings = read_json(limits, max_seq_length=maybe(whole())) if limits.is_file() else {}
    return Pooling(_mode(file), settings.get("max_seq_length") or 0)


def _mode(file: Path) -> str:
    settings = read_json(file, pooling_mode=maybe(string))
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
    modes = modes or [MODES.get(settings.get("pooling_mode"), str(settings.get("pooling_mode")))]
    pool = next((ours for ours, theirs in MODES.items() if modes == [theirs]), None)
    if pool is None:
        raise FtjaxError(f"{file}: {', '.join(modes)} is not supported; known: {', '.join(MODES.values())}")
    return pool


def dense_folders(folder: Path) -> list[str]:
    """The folders of a directory's Dense modules, which hold their tensors."""
    return [path for kind, path in modules(folder) if kind == "Dense"]


def read_head(folder: Path) -> Head | None:
    """The head over labels of a directory whose modules end in two Dense modules; None if they do not.

    Raises FtjaxError if these modules differ from those of `write_head`.
    """
    folder = Path(folder)
    if [kind for kind, _ in modules(folder)[1:]] != ["Pooling", "Dense", "Dense"]:
        return None
    fields = {"activation_function": string, "in_features": whole(1), "out_features": whole(1)}
    settings = [read_json(folder / path / "config.json", **fields) for path in dense_folders(folder)]
    found = [dense.get("activation_function") for dense in settings]
    if found != list(DENSE.values()) or (pool := _mode(folder / FOLDER / "config.json")) != "mean":
        raise FtjaxError(
            f"{folder / MODULES}: expected a head of a Dense module with tanh and one without an activation on means; "
            f"found {', '.join(map(str, found))}" + ("" if found != list(DENSE.values()) else f" on {pool}")
        )
    return Head("sequence", labels=settings[1].get("out_features", 0), pool="mean", activation="tanh")


def write(folder: Path, pooling: Pooling, width: int) -> None:
    """Write the files with which sentence-transformers makes the same vectors, of length 1.

    Args:
        folder: The model directory.
        pooling: How texts become vectors.
        width: Size of a vector.
    """
    _write(Path(folder), pooling, width, {"2_Normalize": "Normalize"})
    (Path(folder) / "2_Normalize").mkdir(exist_ok=True)


def write_head(folder: Path, pooling: Pooling, width: int, labels: int) -> None:
    """Write the files with which sentence-transformers computes the logits of a head on means, except its tensors.

    Args:
        folder: The model directory.
        pooling: How texts are pooled and cut.
        width: Size of a hidden state.
        labels: Number of labels.
    """
    names = ("2_Dense", "3_Dense")
    _write(Path(folder), pooling, width, dict.fromkeys(names, "Dense"))
    for name, out, activation in zip(names, (width, labels), DENSE.values(), strict=True):
        (Path(folder) / name).mkdir(exist_ok=True)
        settings = {"in_features": width, "out_features": out, "bias": True, "activation_function": activation}
        write_json(Path(folder) / name / "config.json", settings)


def _write(folder: Path, pooling: Pooling, width: int, behind: dict[str, str]) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(({"": "Transformer", FOLDER: "Pooling"} | behind).items())
    ]
    write_json(folder / MODULES, modules)
    (folder / FOLDER).mkdir(exist_ok=True)
    modes = {theirs: ours == pooling.pool for ours, theirs in MODES.items()}
    write_json(folder / FOLDER / "config.json", {"word_embedding_dimension": width} | modes)
    write_json(folder / LIMITS, {"max_seq_length": pooling.max_length or None, "do_lower_case": False})
