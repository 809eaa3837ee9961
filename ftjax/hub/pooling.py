"""What sentence-transformers' files say, read and written: how vectors of texts are made of hidden states, and a head
over labels that reads their mean, which no class of transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ftjax.errors import FtjaxError
from ftjax.foreign import maybe, parse_json, read_json, read_text, string, whole
from ftjax.hub.resolve import is_plain_name, write_json
from ftjax.models.config import Head

MODULES, LIMITS, FOLDER = "modules.json", "sentence_bert_config.json", "1_Pooling"
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}  # ours -> the key that is true
# Head.activation -> what a Dense module calls it; the last one of a head has none.
DENSE = {"tanh": "torch.nn.modules.activation.Tanh", "": "torch.nn.modules.linear.Identity"}


class Pooling(NamedTuple):
    """pool: mean | cls, see config.task.pool; max_length: tokens to which a text is cut; 0: as many as the model has
    positions for."""

    pool: str = "mean"
    max_length: int = 0


def modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module of a directory, such as ("Pooling", "1_Pooling"); empty where none are listed."""
    file = Path(folder) / MODULES
    if not file.is_file():
        return []
    said = parse_json(read_text(file), file)
    try:
        found = [(m["type"].split(".")[-1], m["path"]) for m in said]
    except (TypeError, KeyError, AttributeError) as error:
        raise FtjaxError(f"{file}: expected a JSON list of objects with type and path: {error!r}") from None
    if outside := next((path for _, path in found if not is_plain_name(path)), None):
        raise FtjaxError(f"{file}: path {outside!r}: expected the name of a folder beside this file")
    return found


def read(folder: Path) -> Pooling | None:
    """How a directory makes vectors; None where it says nothing. Raises FtjaxError for what is not known here."""
    there, file = modules(folder), Path(folder) / FOLDER / "config.json"
    if not there or not file.is_file():
        return None
    if other := [kind for kind, _ in there if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise FtjaxError(f"{Path(folder) / MODULES}: vectors by {', '.join(other)} are not supported")
    limits = Path(folder) / LIMITS
    said = read_json(limits, max_seq_length=maybe(whole())) if limits.is_file() else {}
    return Pooling(_mode(file), said.get("max_seq_length") or 0)


def _mode(file: Path) -> str:
    said = read_json(file, pooling_mode=maybe(string))
    modes = [name for name, on in said.items() if name.startswith("pooling_mode_") and on]
    modes = modes or [MODES.get(said.get("pooling_mode"), str(said.get("pooling_mode")))]
    pool = next((ours for ours, theirs in MODES.items() if modes == [theirs]), None)
    if pool is None:
        raise FtjaxError(f"{file}: {', '.join(modes)} is not supported; known: {', '.join(MODES.values())}")
    return pool


def dense_folders(folder: Path) -> list[str]:
    """The folders of a directory's Dense modules, whose tensors lie in them."""
    return [path for kind, path in modules(folder) if kind == "Dense"]


def read_head(folder: Path) -> Head | None:
    """The head over labels of a directory whose modules end in two Dense ones; None where they do not.

    Raises FtjaxError where they are not as `write_head` leaves them.
    """
    folder = Path(folder)
    if [kind for kind, _ in modules(folder)[1:]] != ["Pooling", "Dense", "Dense"]:
        return None
    fields = {"activation_function": string, "in_features": whole(1), "out_features": whole(1)}
    said = [read_json(folder / path / "config.json", **fields) for path in dense_folders(folder)]
    found = [dense.get("activation_function") for dense in said]
    if found != list(DENSE.values()) or (pool := _mode(folder / FOLDER / "config.json")) != "mean":
        raise FtjaxError(
            f"{folder / MODULES}: expected a head of a Dense module with tanh and one without an activation on means; "
            f"found {', '.join(map(str, found))}" + ("" if found != list(DENSE.values()) else f" on {pool}")
        )
    return Head("sequence", labels=said[1].get("out_features", 0), pool="mean", activation="tanh")


def write(folder: Path, pooling: Pooling, width: int) -> None:
    """Files by which sentence-transformers makes the same vectors, of length 1, of a model in a directory."""
    _write(Path(folder), pooling, width, {"2_Normalize": "Normalize"})
    (Path(folder) / "2_Normalize").mkdir(exist_ok=True)


def write_head(folder: Path, pooling: Pooling, width: int, labels: int) -> None:
    """Files by which sentence-transformers gives the logits of a head on means; its tensors are written apart."""
    names = ("2_Dense", "3_Dense")
    _write(Path(folder), pooling, width, dict.fromkeys(names, "Dense"))
    for name, out, activation in zip(names, (width, labels), DENSE.values(), strict=True):
        (Path(folder) / name).mkdir(exist_ok=True)
        said = {"in_features": width, "out_features": out, "bias": True, "activation_function": activation}
        write_json(Path(folder) / name / "config.json", said)


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
