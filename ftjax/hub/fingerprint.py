"""Digests of the files of a base model, by which it is recognised again wherever it is stored.

Files of up to WHOLE bytes are read completely. Of a larger file, the header and samples of every tensor are read, so
that checking a base of 16 GB reads 20 MB. Training changes all values of any tensor that it changes; the check cannot
see a change of a few rows of a large table.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

from ftjax import assets, user_code
from ftjax.errors import FtjaxError
from ftjax.files import within
from ftjax.foreign import mapped, maybe, read_json, read_text, string
from ftjax.hub import peft, pooling, resolve, weights
from ftjax.hub import tokenizer as tokenizers

WHOLE = 1 << 28  # bytes, which are read in a quarter of a second
BLOCK = 1 << 14  # bytes of a sample
SAMPLES = 4  # samples of each tensor, evenly spaced
KEYS = dict.fromkeys(("name", "path", "relative", "revision"), string)
GROUPS = {"weights": "the base's files", "tokenizer": "the tokenizer's files", "adapter": "the initial adapter's files"}
GROUPS |= {"others": "the files that the config names"}
ALONE = {"adapter": None, "others": None}  # groups that are no part of a base


def stored(value: object) -> str | None:
    """The ftjax.foreign.Kind of a base's record in a file: null, or an object with all of KEYS."""
    missing = sorted(KEYS.keys() - value.keys()) if isinstance(value, dict) and value else []
    return f"an object with {missing[0]}" if missing else maybe(mapped(maybe(mapped()), **KEYS))(value)


def record(
    folder: Path, name: str, tokenizer_folder: Path | None = None, adapter: Path | None = None, others=()
) -> dict:
    """What is stored about a base model together with whatever is trained on it.

    Args:
        folder: Directory of the base.
        name: Name of the base in the config.
        tokenizer_folder: Directory of the tokenizer in use; None: `folder`.
        adapter: Directory of the adapter from which training starts; None: there is none.
        others: {key: name} of what else training depends on, see `of_named`.

    Returns:
        {"name", "path": absolute, "revision": the commit of a hub name, and for each of GROUPS {file: digest}}.
    """
    folder = Path(folder)
    return {
        "name": name,
        "path": os.path.abspath(folder),
        "revision": folder.name if folder.parent.name == "snapshots" else "",  # a folder of the hub's cache
        "weights": weights_digests(folder),
        "tokenizer": {n: _digest(file) for n, file in tokenizers.files(tokenizer_folder or folder).items()},
        "adapter": adapter_digests(adapter) if adapter else {},
        "others": of_named(dict(others)),
    }


def of_named(names: dict[str, str]) -> dict[str, str]:
    """{key/file: digest} of the files of models, functions and texts that a config names. Those of a function include
    the modules beside its file that it imports.

    Args:
        names: {key of the config: a name that ftjax.load opens, `file.py:function`, or a file}.

    Raises:
        FtjaxError: If there is no such folder or file; it starts with the key.
    """
    found: dict[str, str] = {}
    for key, name in names.items():
        try:
            if (source := Path(name.rpartition(":")[0])).suffix == ".py":
                texts = {os.path.relpath(file, source.parent): read_text(file) for file in user_code.files(source)}
                files = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
            elif (file := Path(assets.resolve(name))).is_file():
                files = {file.name: _digest(file)}
            elif ((folder := resolve.resolve(name)) / "run.json").is_file():  # by the checksums of all its arrays
                sums = within(folder / "checkpoints", "checksums.json")
                files = {str(file.relative_to(folder)): _digest(file) for file in sums}
            else:
                files = adapter_digests(folder) or weights_digests(folder)
                files |= {path: _digest(file) for path, file in tokenizers.files(folder).items()}
        except FtjaxError as error:
            raise FtjaxError(f"{key}: {error}") from error
        found |= {f"{key}/{file}": digest for file, digest in files.items()}
    return found


def adapter_digests(folder: Path) -> dict[str, str]:
    """{file: digest} of an adapter's config and weights; without those that are missing."""
    files = [Path(folder) / name for name in (peft.CONFIG, peft.WEIGHTS)]
    return {file.name: _digest(file) for file in files if file.is_file()}


def weights_digests(folder: Path) -> dict[str, str]:
    """{file: digest} of a directory's configs, its weights, and its modules of sentence-transformers.

    generation_config.json is included, because it determines which tokens end an answer.
    """
    folder = Path(folder)
    files = [folder / "config.json", folder / "generation_config.json", *weights.weight_files(folder)]
    files += [folder / pooling.MODULES, folder / pooling.LIMITS]
    for _, path in pooling.modules(folder):
        files += [folder / path / name for name in ("config.json", "model.safetensors")]
    offsets: dict[Path, list[int]] = {}
    if any(file.is_file() and file.stat().st_size > WHOLE for file in files):
        for tensor in weights.stored_tensors(folder).values():
            offsets.setdefault(tensor.file, []).append(tensor.offset)
    return {str(file.relative_to(folder)): _digest(file, offsets.get(file, ())) for file in files if file.is_file()}


def changes(kept: dict, found: dict) -> list[str]:
    """How the files of two records differ, one text for each file. Groups that `kept` lacks are ignored."""
    out = []
    for group, what in GROUPS.items():
        old, new = kept.get(group), found.get(group, {})
        for name in sorted(old | new) if isinstance(old, dict) else ():
            if old.get(name) != new.get(name):
                was, is_ = (files[name][:8] if name in files else "not there" for files in (old, new))
                out.append(f"of {what}, {name} was {was}, is {is_}")
    return out


def find(kept: dict | None, holder: Path, named: str, revision: str, key: str, tokenizer_folder=None) -> Path:
    """The directory of the base model on which the content of a folder was trained.

    The base is searched for under its name, at its former absolute path, and at its former path relative to `holder`,
    in case both were moved together. Its digests decide.

    Args:
        kept: The `record` in the folder. None or empty: there is no record, and the name alone decides.
        holder: The folder of the run or adapter.
        named: Name of the base.
        revision: Revision of the base.
        key: File and key of the base's name, for errors.
        tokenizer_folder: Directory of the tokenizer in use if it is not the base's. It is ignored if the record has no
            group `tokenizer`.

    Raises:
        FtjaxError: If the base is not found, or if its content differs.
    """
    if not kept:
        return resolve.resolve(named, revision)
    places = [resolve.whole_model(Path(assets.resolve(name)).expanduser()) for name in (named, kept["name"])]
    places += [Path(kept["path"]), Path(os.path.normpath(Path(holder) / kept["relative"]))]
    there = [place for place in dict.fromkeys(places) if place.is_dir()]
    if not there and kept["revision"]:
        there = [resolve.resolve(named, revision or kept["revision"])]
    if not there:
        raise FtjaxError(
            f"{holder}: its base {named} is at none of {', '.join(map(str, dict.fromkeys(places)))}. Put it back, or "
            f"set {key} to the folder in which it lies; its files are compared with those of the training"
        )
    remedy = f"Put back the files of the training, or set {key} to the folder that has them"
    for place in there:
        found = record(place, named, tokenizer_folder)
        if not changes(kept | ALONE, found) or place == there[-1]:
            _check(kept | ALONE, found, holder, remedy)
            return place


def check_adapter(adapter: Path, base: Path) -> None:
    """Raise FtjaxError if the record of an adapter names another base than that in the directory `base`."""
    if kept := of_adapter(adapter):
        found = {"path": base, "weights": weights_digests(base)}
        again = f"To put it on this one all the same, remove `base` from {adapter / resolve.MARKER}"
        _check(kept | ALONE, found, adapter, f"Name the base of its training. {again}")


def _check(kept: dict, found: dict, holder: Path, remedy: str) -> None:
    if differences := changes(kept, found):
        raise FtjaxError(
            f"{holder}: was trained on another base than {found['path']} ({kept['name']}, then at {kept['path']}): "
            f"{'; '.join(differences)}. {remedy}"
        )


def of_adapter(folder: Path) -> dict | None:
    """The record of its base in an exported adapter; None if it has none, as an adapter made by another program.

    The tokenizer's files are not included, because an adapter has its own.
    """
    file = Path(folder) / resolve.MARKER
    kept = read_json(file, base=stored).get("base") if file.is_file() else None
    return {key: value for key, value in kept.items() if key != "tokenizer"} if isinstance(kept, dict) else None


def _digest(file: Path, offsets=()) -> str:
    """Digest of a whole file. Of a file larger than WHOLE with `offsets` of tensors: of its header and of samples."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        if size <= WHOLE or not offsets:
            return hashlib.file_digest(f, lambda: digest).hexdigest()
        bounds = [0, *sorted(offsets), size]
        digest.update(size.to_bytes(8, "little") + f.read(bounds[1]))
        for start, stop in itertools.pairwise(bounds[1:]):
            few = stop - start <= SAMPLES * BLOCK
            starts = [start] if few else [start + (stop - start - BLOCK) * i // (SAMPLES - 1) for i in range(SAMPLES)]
            for at in starts:
                f.seek(at)
                digest.update(f.read(stop - start if few else BLOCK))
    return digest.hexdigest()
