"""Names -> folders to read from, and folders to write that are whole or not there at all."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ftjax import assets
from ftjax.errors import FtjaxError, nearest

MARKER = "ftjax.json"  # lies in every folder that ftjax wrote, and only there
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# What some repositories carry beside the weights in Hugging Face's form: the same weights again.
UNWANTED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "gguf/*")


def resolve(name: str, revision: str = "") -> Path:
    """A model or adapter directory, `builtin:` name or hub name -> a local folder, downloaded where need be.

    revision: branch, tag or commit of a hub name. Raises FtjaxError where there is no such folder or repository.
    """
    path = Path(assets.resolve(str(name))).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FtjaxError(f"{path}: expected a model directory, found a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise FtjaxError(f"{path}: no such folder{nearest(path.name, beside)}")
    return _download(str(name), revision)


def _download(name: str, revision: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except errors.GatedRepoError:
        raise FtjaxError(f"{name}: a gated repository: accept its terms on the hub, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise FtjaxError(f"{name}: no such folder, and no such repository on the Hugging Face hub") from None
    except errors.RevisionNotFoundError:
        raise FtjaxError(f"{name}: the repository has no revision {revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise FtjaxError(
            f"{name}: no such folder here; as a hub name it is not in the local cache, and the Hugging Face hub cannot "
            f"be reached (HF_HUB_OFFLINE set, or no network): {error}"
        ) from None
    except (OSError, errors.HFValidationError) as error:
        raise FtjaxError(f"{name}: download from the Hugging Face hub failed: {error}") from None
    return Path(folder)


@contextlib.contextmanager
def new_folder(out: str | Path, overwrite: bool = False, record: dict | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends; an error or a kill leaves `out` alone.

    record: what ftjax wants to remember of it, written to its ftjax.json. Raises FtjaxError where `out` holds files
    that ftjax did not write, unless `overwrite`.
    """
    out = Path(out).resolve()
    if out.is_file():
        raise FtjaxError(f"{out}: expected a folder to write to, found a file")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file() and not overwrite:
        raise FtjaxError(f"{out}: holds files that ftjax did not write; choose another folder, or overwrite")
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        write_json(partial / MARKER, {"written_by": "ftjax"} | (record or {}))
    except BaseException:
        shutil.rmtree(partial)
        raise
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


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


def write_json(file: Path, value: dict | list) -> None:
    """Indented, keys in the order given, as Hugging Face's files are."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
