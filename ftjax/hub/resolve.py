"""Names -> folders to read from, and folders to write to, which are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from ftjax import assets, seals
from ftjax.errors import FtjaxError, nearest, of_disk
from ftjax.files import as_json, below, drafted, mode
from ftjax.foreign import listed, mapped, read_json, string, whole

MARKER = "ftjax.json"  # in every folder that ftjax wrote, and in no other
WHOLE = ("merged", "full")  # folders of a run that hold a whole model
WRITTEN = {"files": listed(string), "checksums": mapped(whole(0, 2**32))}  # its fields
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# Files of some repositories that hold the same weights again, in other formats than Hugging Face's.
UNWANTED = ("original/*", "consolidated*", "onnx/*", "openvino/*", "gguf/*")


def resolve(name: str, revision: str = "") -> Path:
    """The local folder of a model or adapter directory, `builtin:` name or hub name; it is downloaded if necessary.

    revision: branch, tag or commit of a hub name. Raises FtjaxError if there is no such folder or repository.
    """
    path = Path(assets.resolve(str(name))).expanduser()
    if found := mode(path):  # a folder that may not be entered is no name on the hub
        if stat.S_ISDIR(found):
            return path
        raise FtjaxError(f"{path}: expected a model directory, found a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise FtjaxError(f"{path}: no such folder{nearest(path.name, beside)}")
    return _download(str(name), revision)


def resolve_model(name: str, revision: str = "") -> Path:
    """The local folder of a base model: as `resolve`, or the whole model that a run folder holds.

    Raises FtjaxError for a run folder in which no whole model was written, and for a folder with an adapter.
    """
    folder = resolve(name, revision)
    found = whole_model(folder)
    if found == folder and (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise FtjaxError(
            f"{folder}: a run folder without a whole model, from which another run could start; write one with "
            f"`ftjax export --run {folder} --out {folder / WHOLE[0]} --format {WHOLE[0]}`"
        )
    if (found / "adapter_config.json").is_file():  # transformers applies it, even beside a whole model
        raise FtjaxError(
            f"{found}: holds a PEFT adapter, and here a base model is needed: name the base, and for a run that goes "
            "on with the adapter set tuning.init_from to this folder"
        )
    return found


def whole_model(folder: Path) -> Path:
    """The folder of the whole model in a run folder; for any other folder, that folder."""
    parts = [folder / part for part in WHOLE if (folder / "run.json").is_file()]
    return next((part for part in parts if (part / "config.json").is_file()), folder)


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


def foreign_files(out: Path) -> list[str]:
    """Names of the files in a folder that no export wrote, according to the folder's ftjax.json."""
    if not out.is_dir():
        return []
    written = read_json(out / MARKER, files=listed(string)).get("files") if (out / MARKER).is_file() else None
    if written is None:
        return sorted(path.name for path in out.iterdir() if path.name != MARKER)
    return sorted(set(_files(out)) - {MARKER, *written})


def check_out(out: str | Path, source: str | Path | None = None) -> Path:
    """The real path of a folder to write to. source: the model from which it is made.

    Raises FtjaxError if it is a file or `source`, or if it holds files that no export wrote and that would be lost.
    """
    out = Path(os.path.realpath(out))
    if source and out == Path(os.path.realpath(source)):
        raise FtjaxError(
            f"{out}: is the folder of the base model, which an export must not replace; choose another folder"
        )
    if out.is_file():
        raise FtjaxError(f"{out}: expected a folder to write to, found a file")
    if foreign := foreign_files(out):
        if (out / MARKER).is_file() and "files" not in read_json(out / MARKER):
            raise FtjaxError(
                f"{out}: an earlier version of ftjax wrote this folder without a list of its files, so it is not "
                "overwritten; move it away"
            )
        some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise FtjaxError(
            f"{out}: holds files that no export of ftjax wrote: {some}. Move them, or choose another folder"
        )
    return out


def remove_written(out: Path) -> None:
    """Delete the files that an export wrote to a folder, and the folders that are then empty."""
    if not (out / MARKER).is_file():
        return
    for name in set(_files(out)) - set(foreign_files(out)):
        (out / name).unlink()
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True) + [out]:
        with contextlib.suppress(OSError):  # not empty, or a link
            folder.rmdir()


@contextlib.contextmanager
def new_folder(out: str | Path, record: dict | None = None) -> Iterator[Path]:
    """A context with a temporary folder next to `out`, which replaces `out` when the block ends.

    If there is an error, or the process is killed, `out` is not changed. record: what is kept about the export; it is
    written to the folder's ftjax.json with its files and their checksums. Raises FtjaxError as `check_out` does.
    """
    out = check_out(out)
    old = out.with_name(f".{out.name}.ftjax.old")
    with drafted(out) as partial:
        if old.is_dir() and not out.exists():  # killed between the two renames below
            check_out(old).rename(out)
        shutil.rmtree(old, ignore_errors=True)
        try:
            yield partial
            files = sorted(set(_files(partial)) - {MARKER})
            written = {"written_by": "ftjax", "files": files, "checksums": seals.checksums(partial, files)}
            write_json(partial / MARKER, written | (record or {}))
            check_out(out)
        except Exception as error:
            if isinstance(error, FtjaxError) or not (reason := of_disk(error)):
                raise
            raise FtjaxError(
                f"{out}: cannot be written: {reason}. What was there before is whole. Make room, or choose another "
                "folder: the same command then goes on"
            ) from error
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def written(folder: Path) -> dict:
    """The fields of the ftjax.json of a folder; empty without one. Raises FtjaxError if it names a file elsewhere."""
    marker = Path(folder) / MARKER
    found = read_json(marker, **WRITTEN) if marker.is_file() else {}
    for name in (*found.get("files", ()), *found.get("checksums", ())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FtjaxError(f"{marker}: expected names of files in this folder; found {name!r:.80}")
    return found


def check_written(folder: Path, names: Collection[str]) -> None:
    """Compare the files of an export with their checksums. Raises FtjaxError if one of these names has changed, and
    warns of other files that have. A folder that no export wrote has no checksums. A large file is read once, and again
    after its size or times have changed; `ftjax check` reads all."""
    changed = seals.changed(folder, written(folder).get("checksums", {}), again=False)
    for name in sorted(changed, key=lambda name: name not in names):
        message = (
            f"{Path(folder) / name}: the file has changed since it was written (its checksum in {MARKER} differs); "
            f"export it again, or remove its entry of `checksums` in {MARKER} if the change is meant"
        )
        if name in names:
            raise FtjaxError(message)
        warnings.warn(message, stacklevel=3)


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in below(folder)]


def is_plain_name(name) -> bool:
    """Whether `name` is a text that names something directly in the folder from which it is read, and not elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name != ".." and "\\" not in name


def write_json(file: Path, value: dict | list) -> None:
    """Write JSON, indented and with keys in the given order, like Hugging Face's files."""
    file.write_text(as_json(value, 2) + "\n", encoding="utf-8")
