"""Model directories <-> parameters: safetensors are read slice by slice into any sharding, and written in shards.

L layers, E experts. Parameters of the blocks are stacked along a leading layer axis, see ftjax.hub.families.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  gives numpy, and so safetensors, the name `bfloat16`
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ftjax.errors import FtjaxError
from ftjax.foreign import mapped, read_json
from ftjax.hub import families, pooling
from ftjax.hub.families import Tensors, shapes, tensor_names
from ftjax.hub.family_table import Family
from ftjax.hub.resolve import check_out, check_written, is_plain_name, new_folder, write_json
from ftjax.hub.tokenizer import copy_tokenizer, generation, has_tokenizer, load_tokenizer, pad_token, write_settings
from ftjax.models.config import READS, TABLES, ModelConfig
from ftjax.tree import flatten, not_finite, unflatten

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Files of a tied model may repeat parameters in its head: end of the tensor's name -> the parameter.
TWINS = {"weight": "embed/embedding", "bias": "head/bias"}
KEPT = "kept/"  # before the paths of tensors that exports copy
READERS = min(8, os.cpu_count() or 1)  # threads that read at the same time
LARGE = 1 << 24  # bytes above which several threads read one tensor
BLOCK = 4096  # rows of a table that are read at a time
ALIGNED = 64  # bytes; on a CPU, JAX does not copy a host array that begins at a multiple of it


# Microscaling FP4 (Open Compute Project 2023): blocks of 32 values, two in a byte, the first in the low bits, and a
# power of two for each block, stored as the exponent plus 127.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 32


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    offset: int  # bytes of the file before the tensor
    scales: Stored | None = None  # of MXFP4: then this is the tensor of the blocks, (..., out, in / 32, 16)


def param_shapes(config: ModelConfig, dtype=jnp.float32) -> dict:
    """The parameter tree of a model as jax.ShapeDtypeStruct, made from its config alone."""
    return unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes(config).items()})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises FtjaxError if there are none, or if one that the index names is missing.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index, weight_map=mapped()).get("weight_map", {})
        if outside := [name for name in weight_map.values() if not is_plain_name(name)]:
            raise FtjaxError(f"{index}: weight_map: expected names of files in this folder; found {outside[0]!r:.80}")
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise FtjaxError(f"{index}: names files that are missing: {', '.join(missing)}; fetch them again")
        return [folder / name for name in names]
    found = "a repository that has pytorch_model.bin only must be converted"
    if any((folder / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        found = "it has pytorch_model.bin only, a pickle, which may run code and is not read"
    raise FtjaxError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; {found}. To convert it, where torch is "
        'installed: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        "M.from_pretrained('OLD').save_pretrained('NEW'); T.from_pretrained('OLD').save_pretrained('NEW')\""
    )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """{name: Stored} of every tensor of a model directory, from the headers of the files alone."""
    found = {}
    files = [(file, "") for file in weight_files(folder)]
    files += [(Path(folder) / at / "model.safetensors", f"{at}.") for at in pooling.dense_folders(folder)]
    for file, start in files:
        try:
            with safe_open(file, "numpy") as f:
                names = f.keys()  # an incomplete file raises here
        except (SafetensorError, FileNotFoundError) as error:
            raise FtjaxError(f"{file}: not a whole safetensors file: {error}; fetch it again") from None
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        for name in names:
            at = header[name]
            offset = 8 + size + at["data_offsets"][0]
            found[start + name] = Stored(file, name, tuple(at["shape"]), at["dtype"], offset)
    return found


def stored_dtype(folder: Path) -> str:
    """The dtype of most parameters of a model directory, such as `bfloat16`."""
    sizes = Counter()
    for tensor in stored_tensors(folder).values():
        sizes[DTYPES.get(tensor.dtype)] += math.prod(tensor.shape)
    del sizes[None]  # MXFP4 stands for numbers in the dtype of the others
    return sizes.most_common(1)[0][0] if sizes else "float32"


def read_params(
    folder: Path,
    family: Family,
    config: ModelConfig,
    shardings: dict | None = None,
    dtype: Callable[[str], np.dtype] | None = None,
    quantise: Callable[[str], Callable[[jax.Array], Any] | None] = lambda path: None,
    new_head: jax.Array | None = None,
    given_away: bool = False,
    new_rows: int | None = None,
) -> dict:
    """Read the parameters of a model directory as a tree of jax arrays.

    The host holds the local part of one parameter at a time.

    Args:
        folder: The directory.
        family: The model's family.
        config: The model's shape.
        shardings: Tree of jax.sharding.Sharding with the structure of the parameters. Only the part of each device is
            read for it. None: the default device.
        dtype: Path of a parameter -> its dtype; None: as stored.
        quantise: Path of a parameter -> a function that quantises (out, in) float32, or None if the parameter is not
            quantised. It is applied layer by layer, so that a device never holds two unquantised layers.
        new_head: Random key that initialises modules of the head that the files lack, and its last linear map if the
            files have it for another number of labels. None: the files must have all modules.
        given_away: Whether the arrays will be donated. Otherwise JAX uses the memory that was read into without a copy
            if the device is a CPU, and such memory cannot be donated.
        new_rows: Seed of the rows for tokens which the files lack, where `config` has a larger vocabulary than they
            have. None: the files must have all rows.

    Returns:
        The nested dict of parameters.

    Raises:
        FtjaxError: If a tensor is missing, is not expected, has the wrong shape or is not floating point, or if a file
            of an export has changed since it was written.
    """
    stored = config if new_rows is None else _as_stored(folder, config)
    located = _locate(Path(folder), family, stored, new_head is not None)
    if jax.process_count() == 1:  # several processes read only their parts of the files
        found = [tensor for tensors in located.values() for tensor in tensors.found if tensor]
        files = {part.file for tensor in found for part in (tensor, tensor.scales) if part}
        check_written(folder, ["config.json", *(file.relative_to(Path(folder)).as_posix() for file in files)])
    shardings = flatten(shardings) if shardings is not None else {}
    params = {}
    for path, shape in shapes(config).items():
        tensors, transposed, depth = located[path]
        stack = shape[:depth]
        dtypes = {DTYPES.get(t.dtype, "bfloat16") for t in tensors if t} or {"float32"}
        target = np.dtype(dtype(path) if dtype else jnp.result_type(*dtypes))
        sharding = shardings[path] if shardings else None
        if not tensors:
            made = _fresh(path, shape, config, jax.random.fold_in(new_head, zlib.crc32(path.encode())))
            params[path] = _place(functools.partial(_cut, np.asarray(made, target)), shape, sharding)
            continue
        load = functools.partial(_load, tensors, transposed, stack, target, given_away)
        exact = functools.partial(_load, tensors, transposed, stack, np.dtype(np.float32), False)
        # Wait for each parameter: transfers in flight would keep the host's copies of several parameters alive.
        if small := quantise(path):
            # Quantise from float32 whatever the dtype of the run, so that the base is the same wherever it is loaded.
            params[path] = jax.block_until_ready(_quantised(exact, shape, sharding, small))
            continue
        if path in TABLES and shape[0] > stored.vocab_size:
            seed = [new_rows, zlib.crc32(path.encode())]
            new = _new_rows(exact, stored.vocab_size, shape, seed).astype(target)
            load = functools.partial(_with_rows, load, new, given_away, stored.vocab_size)
        params[path] = jax.block_until_ready(_place(load, shape, sharding))
    return unflatten(params)


def check_finite(folder: Path, params: dict, family: Family, config: ModelConfig) -> None:
    """Raise FtjaxError, which names a tensor, if parameters read from a directory contain NaN or infinite values.

    Args:
        folder: The directory.
        params: The parameters.
        family: The model's family.
        config: The model's shape.
    """
    bad, leaves = not_finite(params), flatten(params)
    if not bad:
        return
    names = tensor_names(family, config, files=True)
    path = next(path for path in names if bad[0].startswith(path))  # a quantised kernel consists of several leaves
    stored, x = names[path].names, leaves.get(bad[0])
    layer = 0
    if len(stored) > 1 and x is not None:
        layer = int(jnp.argmin(jnp.isfinite(x).all(axis=range(names[path].stacked, x.ndim))))
    raise FtjaxError(
        f"{folder}: {len(bad)} of the model's parameters hold values that are NaN or infinite, tensor {stored[layer]} "
        "the first. The files are damaged, or a value overflowed when they were converted to float16: get them again, "
        "or convert them to bfloat16 or float32"
    )


def head_is_new(folder: Path, family: Family, config: ModelConfig) -> list[str]:
    """The modules of the head that a directory's files lack for this number of labels.

    Args:
        folder: The model directory.
        family: The model's family.
        config: The model's shape, with its head.

    Returns:
        Their paths, such as `head/out`.

    Raises:
        FtjaxError: If other tensors are missing or do not fit.
    """
    located = _locate(Path(folder), family, _as_stored(folder, config), True)
    return list(dict.fromkeys(path.rsplit("/", 1)[0] for path, tensors in located.items() if not tensors.found))


def _fresh(path: str, shape: tuple[int, ...], config: ModelConfig, key: jax.Array) -> jax.Array:
    """A parameter of a new head, initialised as in transformers: kernels normal, scales 1, biases 0."""
    if path.endswith("/kernel"):
        return config.initializer_range * jax.random.normal(key, shape)
    return jnp.full(shape, 1.0 if path.endswith("/scale") else 0.0)


def _as_stored(folder: Path, config: ModelConfig) -> ModelConfig:
    """`config` with the vocabulary of a directory's files, which may lack rows of new tokens."""
    return dataclasses.replace(config, vocab_size=families.read_config(folder)[1].vocab_size)


def _new_rows(load: Callable, count: int, shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
    """Rows of new tokens: the mean of a table's rows, with normal noise of 1e-9 times their covariance.

    This is the distribution of `resize_token_embeddings` in transformers (Hewitt 2021, "Initializing New Word
    Embeddings"), drawn without the root of a matrix.

    Args:
        load: Function from bounds to a part of the table in the files, float32.
        count: Number of rows in the files.
        shape: Shape of the whole table, (V, D).
        seed: Seed of the noise.

    Returns:
        (V - count, D) float32.
    """
    (V, D), rng = shape, np.random.default_rng(seed)
    blocks = [(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)]
    mean = sum(load((block, (0, D))).sum(0, dtype=np.float64) for block in blocks) / count
    noise = sum(rng.standard_normal((V - count, b - a)) @ (load(((a, b), (0, D))) - mean) for a, b in blocks)
    return (mean + (1e-9 / count) ** 0.5 * noise).astype(np.float32)


def _with_rows(load: Callable, new: np.ndarray, given_away: bool, count: int, bounds) -> np.ndarray:
    """The part within `bounds` of a table whose first `count` rows are in the files, and `new` the others."""
    (start, stop), columns = bounds
    cut = min(max(count, start), stop)
    out = _buffer([stop - start, columns[1] - columns[0]], new.dtype, given_away)
    if cut > start:
        out[: cut - start] = load(((start, cut), columns))
    out[cut - start :] = new[cut - count : stop - count, slice(*columns)]
    return out


def _cut(x: np.ndarray, bounds) -> np.ndarray:
    return x[tuple(slice(*b) for b in bounds)]


def _quantised(load: Callable, shape: tuple[int, ...], sharding, quantise: Callable):
    """A quantised table, or a stacked kernel whose layers are read and quantised one after another."""
    if len(shape) == 2:
        return quantise(_place(load, shape, sharding))
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def of_layer(layer, bounds):
        return load(((layer, layer + 1), *bounds))[0]

    layers = []
    for layer in range(shape[0]):
        kernel = _place(functools.partial(of_layer, layer), shape[1:], sharding)
        layers.append(jax.block_until_ready(quantise(kernel)))
    return jax.jit(lambda *layers: jax.tree.map(lambda *x: jnp.stack(x), *layers))(*layers)


def _place(load: Callable, shape: tuple[int, ...], sharding) -> jax.Array:
    """An array whose parts are `load(bounds)`. Each part is loaded once, however many devices hold a copy of it."""
    load = functools.cache(load)

    def part(index):
        return load(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _swapped(axes: tuple, transposed: bool) -> tuple:
    """One entry for each axis, those of the last two axes exchanged if the tensor is stored transposed."""
    return (*axes[:-2], axes[-1], axes[-2]) if transposed else tuple(axes)


def _load(tensors, transposed, stacked, dtype, given_away, bounds) -> np.ndarray:
    """The part of one parameter within `bounds`, which are (start, stop) for each axis. stacked: the sizes of the axes
    along which the parameter has tensors of their own."""
    out = _buffer([stop - start for start, stop in bounds], dtype, given_away)
    (first, last), rest = bounds[0], bounds[1:]
    if not stacked:
        cuts = np.linspace(0, last - first, READERS + 1 if out.nbytes > LARGE else 2).astype(int).tolist()

        def piece(cut):
            start, stop = cut
            _fill(out[start:stop], tensors[0], ((first + start, first + stop), *rest), transposed)

        _each(piece, list(itertools.pairwise(cuts)))
        return out

    chosen, rest = list(itertools.product(*(range(*b) for b in bounds[: len(stacked)]))), bounds[len(stacked) :]
    parts = out.reshape(len(chosen), *out.shape[len(stacked) :])

    def one(i):
        tensor = tensors[np.ravel_multi_index(chosen[i], stacked)]
        if tensor is None:
            parts[i] = 1  # this layer has no such norm, and a scale of 1 takes its place
        else:
            _fill(parts[i], tensor, rest, transposed)

    _each(one, range(len(chosen)))
    return out


def _each(f: Callable, items) -> None:
    """Apply f to every item, in threads if there are several: reading releases Python's lock."""
    if len(items) == 1:
        f(items[0])
        return
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(f, items))


def _buffer(shape, dtype, given_away: bool) -> np.ndarray:
    """Memory for an array, for which numpy requests large pages.

    given_away: the memory is not aligned, so that JAX copies it, because only memory that JAX copied can be donated.
    """
    size = math.prod(shape) * dtype.itemsize
    whole = np.empty(size + 2 * ALIGNED, np.uint8)
    start = -whole.ctypes.data % ALIGNED + (ALIGNED // 2 if given_away else 0)
    return whole[start : start + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, tensor: Stored, bounds, transposed: bool) -> None:
    """Read the part of a tensor within `bounds` into `out`; they are (start, stop) for each axis of `out`."""
    if out.size == 0:
        return
    if tensor.scales:
        _fill_mxfp4(out, tensor, bounds)
        return
    index = tuple(slice(*b) for b in _swapped(bounds, transposed))
    whole = all(b == (0, n) for b, n in zip(bounds[1:], tensor.shape[1:]))
    if whole and not transposed and out.dtype == DTYPES[tensor.dtype] and out.flags.c_contiguous:
        first = bounds[0][0] * math.prod(tensor.shape[1:])
        _read_into(out.reshape(-1).view(np.uint8), tensor.file, tensor.offset + first * out.itemsize)
        return
    # Mapped for this part only, because the pages of an open mapping count as memory of this process.
    mapped = np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
    out[...] = mapped[index].swapaxes(-1, -2) if transposed else mapped[index]


def _fill_mxfp4(out: np.ndarray, tensor: Stored, bounds) -> None:
    """Read the part of a parameter (E, out, in) in MXFP4 within `bounds` into `out`, one expert at a time."""
    blocks, scales = (np.memmap(t.file, np.uint8, "r", t.offset, t.shape) for t in (tensor, tensor.scales))
    rows, (start, stop) = slice(*bounds[1]), bounds[2]
    groups = slice(start // GROUP, -(-stop // GROUP))
    for place, expert in zip(out, range(*bounds[0]), strict=True):
        codes = blocks[expert, rows, groups]
        values = FP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:2], GROUP)
        values = np.ldexp(values, scales[expert, rows, groups, None].astype(np.int32) - 127)
        place[...] = values.reshape(len(codes), -1)[:, start % GROUP :][:, : stop - start]


def _read_into(out: np.ndarray, file: Path, offset: int) -> None:
    """Fill an array of bytes from a file, beginning at `offset`."""
    with file.open("rb", buffering=0) as f:
        f.seek(offset)
        done = 0
        while done < out.size:  # one call reads 2 GiB at most
            read = f.readinto(memoryview(out)[done:])
            if not read:
                raise FtjaxError(f"{file}: ends before its last tensor; fetch it again")
            done += read


def _slice(tensor: Stored, bounds, transposed) -> np.ndarray:
    """The part of a tensor within `bounds`, as a new array."""
    out = np.empty([stop - start for start, stop in bounds], DTYPES[tensor.dtype])
    _fill(out, tensor, bounds, transposed)
    return out


def _plain(name: str, family: Family) -> str:
    """A tensor's name without the prefix that files may leave out, in the newer of two spellings."""
    for prefix in (family.prefix, *family.prefixes, *(form.prefix for form in family.forms.values())):
        if prefix and name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


class Located(NamedTuple):
    """The stored tensors of one parameter; see `families.Tensors`."""

    found: list[Stored | None]  # None: the layer does not have the module
    transposed: bool
    stacked: int


def _locate(folder: Path, family: Family, config: ModelConfig, new_head: bool = False) -> dict[str, Located]:
    """{path: Located}; all names and shapes are checked.

    new_head: modules of the head may be missing, and its last linear map may have another number of labels; these have
    no tensors.
    """
    stored: dict[str, Stored] = {}
    expected, problems, out = shapes(config), [], {}
    for name, tensor in stored_tensors(folder).items():
        if (first := stored.setdefault(_plain(name, family), tensor)) is not tensor:
            problems.append(f"tensors {first.name} and {name} are one parameter by two names; remove one")
    used = set()
    for path, (names, transposed, stacked) in tensor_names(family, config, files=True).items():
        whole_shape = expected[path][stacked:]
        shape = _swapped(whole_shape, transposed)
        found = []
        for name in names:
            if not name:
                found.append(None)
                continue
            tensor, scales = stored.get(_plain(name, family)), stored.get(_plain(f"{name}_scales", family))
            if tensor is None and scales and path.endswith("/experts"):
                tensor = stored.get(_plain(f"{name}_blocks", family))
                *lead, last = whole_shape
                sizes = (*lead, last // GROUP, GROUP // 2)
                there = (
                    f"{tensor.dtype} {tensor.shape} with scales {scales.dtype} {scales.shape}" if tensor else "missing"
                )
                wanted = f"U8 {sizes} with scales U8 {sizes[:-1]}"
                if last % GROUP or there != wanted:
                    problems.append(f"tensor {name}_blocks is {there}, expected {wanted}")
                    continue
                used |= {tensor, scales}
                found.append(tensor._replace(scales=scales))
                continue
            others = tensor is not None and tensor.shape != shape and tensor.shape[1:] == shape[1:]
            if new_head and (path.startswith("head/out/") and others or path.startswith("head/") and tensor is None):
                used.add(tensor)
                continue
            if tensor is None:
                problems.append(f"tensor {name} {shape} is missing")
                continue
            used.add(tensor)
            found.append(tensor)
            if tensor.shape != shape:
                problems.append(f"{tensor.file.name}: tensor {tensor.name} has shape {tensor.shape}, expected {shape}")
            elif tensor.dtype not in DTYPES:
                problems.append(
                    f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(DTYPES)} "
                    "(quantised weights are not read)"
                )
        out[path] = Located(found, transposed, stacked)
    heads = [m.file or m.name for m in families.modules(family, config) if m.path in ("lm_head", "head")]
    for head, inner, (leaf, path) in itertools.product(heads, ("", ".decoder"), TWINS.items()):
        tensor = stored.get(_plain(f"{head}{inner}.{leaf}", family))
        if tensor is None or tensor in used or path not in out or problems:
            continue
        used.add(tensor)
        if not _equal(tensor, out[path].found[0]):
            problems.append(
                f"{tensor.file.name}: {tensor.name} differs from {out[path].found[0].name}, but tie_word_embeddings of "
                f"config.json says that they are one{'; set it to false' * (config.head.task == 'causal')}"
            )
    others = tuple(_plain(name, family) for name in (*families.other_heads(family, config), *_beside(family, config)))
    for name, tensor in stored.items():
        told_elsewhere = families.is_buffer(tensor.name, family) or name.startswith(others)
        if tensor not in used and not told_elsewhere:
            problems.append(f"{tensor.file.name}: tensor {tensor.name} {tensor.shape} is not expected")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FtjaxError(
            f"{folder}: the weights are not those of the {family.model_type} model that config.json describes: "
            f"{'; '.join(problems[:3])}{more}"
        )
    return out


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors (V, D) or (V,) are equal."""
    return a.shape == b.shape and all(
        np.array_equal(_slice(a, bounds, False), _slice(b, bounds, False))
        for start in range(0, a.shape[0], BLOCK)
        for bounds in [((start, min(start + BLOCK, a.shape[0])), *((0, n) for n in a.shape[1:]))]
    )


def write_model(
    out: Path,
    params: dict,
    source: Path | None,
    family: Family,
    config: ModelConfig,
    *,
    dtype: str | None = None,
    shard_size: float = 5e9,
    end_tokens: tuple[int, ...] = (),
    labels: tuple[str, ...] = (),
    problem: str = "",
    max_length: int = 0,
    tokenizer_folder: Path | None = None,
    record: dict | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a complete Hugging Face model directory that transformers 4 and 5 load.

    One shard is in memory at a time. If there are several processes, all of them must call this, and the first one
    writes. If the model is tied and `params` has an `lm_head`, training has untied it: both tables are written, and
    config.json says that they are not tied.

    Args:
        out: The directory to write; see `new_folder`.
        params: The whole tree of parameters.
        source: Directory of the original model, whose config, tokenizer, template and generation config are copied.
            None: config.json is made from `config`.
        family: The model's family.
        config: The model's shape.
        dtype: Dtype of the tensors; None: as in the source.
        shard_size: Most bytes of a file, unless a single tensor is larger.
        end_tokens: Ids that are added to those that end a generation.
        labels: Names of a head's labels, in the order of their ids.
        problem: `problem_type`, by which transformers chooses a loss; empty: it is not set.
        max_length: Most tokens of a text, for a head that is stored in folders of its own, see Form.
        tokenizer_folder: Directory of the tokenizer that is copied; None: `source`.
        record: See `new_folder`.
        beside: beside(folder) writes further files into the directory.

    Raises:
        FtjaxError: If the parameters do not fit `config` or `dtype`, or if `out` contains files that no export wrote.
    """
    check_out(out, source)
    leaves = flatten(params)
    if config.head.task == "causal":
        config = dataclasses.replace(config, tied="lm_head/kernel" not in leaves)
    elif config.shares_table and "lm_head/kernel" in leaves:
        raise FtjaxError(
            f"{out}: the head of a {family.model_type} model over masked tokens is its table of embeddings, and "
            "training has changed one of the two alone, for which there is no whole model; export the adapter"
        )
    expected, found = shapes(config), {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if expected != found:
        paths = [path for path in expected | found if expected.get(path) != found.get(path)]
        wrong = "; ".join(f"{p}: {found.get(p, 'missing')}, expected {expected.get(p, 'none')}" for p in paths[:3])
        raise FtjaxError(f"{out}: these parameters are not a whole {family.model_type} model: {wrong}")
    if dtype is None:
        dtype = stored_dtype(source) if source else str(leaves["embed/embedding"].dtype)
    if family.text and not source:
        raise FtjaxError(f"{out}: the other parts of a {family.model_type} model can only be copied from a directory")
    form, hf = families.form_of(family, config.head), _described(source, family, config, dtype, labels, problem)
    tokenizer_folder = tokenizer_folder or source
    tokenizer = None
    if tokenizer_folder and config.head.pool == "last" and has_tokenizer(tokenizer_folder):
        # transformers finds the last token of a text by the id of the padding token, see data.labelled.sequence.
        tokenizer = load_tokenizer(tokenizer_folder, source)
        hf["pad_token_id"] = pad_token(tokenizer)
    leaves, names = _named(leaves, source, family, config)
    pieces = _pieces(leaves, names, dtype)
    if jax.process_index():  # the first process writes; the others take part in gathering arrays of several hosts
        for piece in pieces:
            _value(piece, leaves, dtype)
        return
    with new_folder(out, record) as folder:
        apart = [p for p in pieces if form.beside and p.path.startswith("head/")]
        _write_shards(folder, [p for p in pieces if p not in apart], leaves, dtype, shard_size)
        if apart:
            pooling.write_head(folder, pooling.Pooling("mean", max_length), config.width, config.head.labels)
            _write_beside(folder, apart, leaves, dtype)
        write_json(folder / "config.json", hf)
        if config.head.task == "causal":
            write_json(folder / "generation_config.json", _generation_config(source, end_tokens))
        if tokenizer_folder:
            copy_tokenizer(tokenizer_folder, folder)
        if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
            write_settings(folder, pad_token=tokenizer.eos_token)
        beside(folder)


def _described(source, family: Family, config: ModelConfig, dtype: str, labels: tuple[str, ...], problem: str) -> dict:
    """The config.json of a model that is written, with what the source's says of other things than its shape.

    Args:
        source, family, config, labels, problem: See `write_model`.
        dtype: Dtype of the tensors.
    """
    form, hf = families.form_of(family, config.head), families.text_part(families.to_hf(family, config), family)
    of_source = read_json(Path(source) / "config.json") if source else {}
    if source:
        kept = of_source
        if kept.get("model_type") != family.model_type:
            # Made from a model of another family. What that file says under our keys, it may not have read itself.
            kept = {key: value for key, value in kept.items() if key not in family.only and key not in hf}
        hf |= families.text_part(kept, family) | {"model_type": family.model_type}
    hf |= {"architectures": [form.architecture], "tie_word_embeddings": config.tied}
    hf |= {"dtype": dtype, "torch_dtype": dtype}  # versions 5 and 4
    hf.pop("quantization_config", None)  # all tensors are written in `dtype`
    hf |= families.rope_to_hf(config, family)
    if config.head.labels:
        hf |= families.names_of_labels(labels or [f"LABEL_{i}" for i in range(config.head.labels)])
        hf |= {"problem_type": problem} if problem else {}
        hf.pop("num_labels", None)  # of old releases; transformers 5 takes it before the names
    hf[family.keys["vocab_size"]] = config.vocab_size  # a run may have added rows
    if key := form.keys.get("pool"):  # a run may have chosen another than the source's
        hf[key] = families.head_to_hf(form, config.head)[key]
    return families.with_text_part(of_source, family, hf)


def _named(leaves: dict, source, family: Family, config: ModelConfig) -> tuple[dict, dict[str, Tensors]]:
    """{path: parameter} and {path: Tensors} of a model that is written, with the tensors of the source that are not
    computed here."""
    kept = _kept(source, family, config) if source else {}
    names = tensor_names(family, config, files=True) | {f"{KEPT}{name}": Tensors([name], False, 0) for name in kept}
    if family.text:  # as they are spelled there
        theirs = {_plain(name, family): name for name in stored_tensors(source)}
        names = {p: t._replace(names=[theirs.get(_plain(n, family), n) for n in t.names]) for p, t in names.items()}
    return leaves | {f"{KEPT}{name}": x for name, x in kept.items()}, names


def _beside(family: Family, config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of names of tensors of modules that are not computed here: Form.kept, and the maps of keys and values
    that files may have for layers which read those of others."""
    readers = [layer for layer, own in enumerate(config.parts) if own[0].endswith(READS)]
    unused = {f"layers/attn/{name}" for name in ("k_proj", "v_proj", "k_norm")}
    maps = [module.name for module in families.modules(family, config) if module.path in unused]
    idle = [_plain(name.format(l=layer), family) for layer in readers for name in maps]
    return tuple(f"{name}." for name in (*families.form_of(family, config.head).kept, *idle))


def _kept(source: Path, family: Family, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of these modules in a directory, as they are there."""
    form, starts, kept = families.form_of(family, config.head), _beside(family, config), {}
    for name, tensor in stored_tensors(source).items() if starts else ():
        if (plain := _plain(name, family)).startswith(starts):
            with safe_open(tensor.file, "numpy") as file:
                start = (form.prefix or "") if plain.startswith(form.kept) else family.prefix
                kept[f"{start}{plain}"] = file.get_tensor(tensor.name)
    return kept


def _generation_config(source, end_tokens) -> dict:
    config = generation(source) if source else {}
    eos = config.get("eos_token_id")
    eos = list(dict.fromkeys((eos if isinstance(eos, list) else [] if eos is None else [eos]) + list(end_tokens)))
    return config | ({"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})


class _Piece(NamedTuple):
    """One tensor to be written: a parameter, or one layer of it."""

    name: str
    path: str
    index: tuple[int, ...]  # of its layer, and of its expert
    transposed: bool
    size: int  # bytes


def _pieces(leaves: dict, names: dict, dtype: str) -> list[_Piece]:
    """All tensors in the order in which a model uses them, so that a shard has whole layers."""
    pieces = []
    for path, (stored, transposed, stacked) in names.items():
        indices = np.ndindex(leaves[path].shape[:stacked])
        written = leaves[path].dtype if path.startswith(KEPT) else dtype
        size = leaves[path].size // len(stored) * np.dtype(written).itemsize
        pieces += [_Piece(name, path, i, transposed, size) for name, i in zip(stored, indices, strict=True) if name]
    depth = max((piece.index[0] for piece in pieces if piece.index), default=0) + 1
    after = ("final_norm", "lm_head", "head")
    return sorted(pieces, key=lambda p: p.index[0] if p.index else depth if p.path.startswith(after) else -1)


def _write_shards(folder: Path, pieces: list[_Piece], leaves: dict, dtype: str, shard_size: float) -> None:
    shards, room = [[]], shard_size
    for piece in pieces:
        if shards[-1] and piece.size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(piece)
        room -= piece.size
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {piece.name: file for file, shard in zip(files, shards, strict=True) for piece in shard}
        index = {"metadata": {"total_size": sum(piece.size for piece in pieces)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        save_file({piece.name: _value(piece, leaves, dtype) for piece in shard}, folder / file, {"format": "pt"})


def _write_beside(folder: Path, pieces: list[_Piece], leaves: dict, dtype: str) -> None:
    """Write each piece to the folder with which its name begins, under the rest of its name."""
    for at in dict.fromkeys(piece.name.split(".")[0] for piece in pieces):
        mine = {p.name.removeprefix(f"{at}."): _value(p, leaves, dtype) for p in pieces if p.name.startswith(f"{at}.")}
        save_file(mine, folder / at / "model.safetensors", {"format": "pt"})


def _value(piece: _Piece, leaves: dict, dtype: str) -> np.ndarray:
    leaf = leaves[piece.path]
    if piece.path.startswith(KEPT):
        return leaf
    with np.errstate(over="ignore"):  # an overflow raises below
        value = _on_host(leaf, piece.index).astype(dtype, copy=False)
    if not np.isfinite(value).all():
        raise FtjaxError(f"tensor {piece.name} holds values not finite, or too large for {dtype}; nothing is written")
    return np.ascontiguousarray(value.swapaxes(-1, -2) if piece.transposed else value)


def whole(x) -> np.ndarray:
    """An array as numpy. If it is spread over several hosts it is gathered, in which every process must take part."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(x, tiled=True)


def _on_host(leaf, index: tuple[int, ...]) -> np.ndarray:
    """A parameter, or one layer or expert of a stacked one, as numpy.

    It is a view if it is in the host's memory, otherwise a copy of that part only.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return whole(leaf[index] if index else leaf)
    if not index:
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_replicated and next(iter(leaf.devices())).platform == "cpu"):
        return np.asarray(leaf[index])
    return np.asarray(leaf)[index]
