"""The tensors of a model directory: names and shapes, hashes, and values as numpy arrays.

Does not import torch, which finding a model and searching by text need not wait for. Pickled weights are never read;
the error message says how to convert them.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from storage.errors import UsageError
from workers.cache_folder import cache_folder

_CACHE_FROM_BYTES = 64 << 20  # hashes of smaller files are not remembered: hashing them takes no noticeable time
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: bytes [start, end) of `path`; dtype has safetensors' name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def list_tensors(directory: Path) -> dict[str, TensorEntry]:
    """The tensors of a model directory, by name.

    Raises:
        UsageError: there are no safetensors files, one is missing or damaged, or two have a tensor of the same name.
    """
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(directory):
        for name, entry in read_header(path).items():
            if name in entries:
                raise UsageError(f"{path}: {name} is also in {entries[name].path.name}; a tensor may be stored once")
            entries[name] = entry
    return entries


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or the shards that an index names, sorted.

    Raises:
        UsageError: there are none, or a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        names = shard_names(index, ".safetensors")
        for name in names:
            if not (directory / name).is_file():
                raise UsageError(f"{directory}: {name} is missing ({index.name} names it); complete the download")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if (directory / "pytorch_model.bin").is_file():
        raise UsageError(
            f"{directory}: has pytorch_model.bin but no model.safetensors; pickled weights are not read, convert "
            'them once: python -c "import torch, safetensors.torch as s; '
            "w = torch.load('pytorch_model.bin', weights_only=True); "
            "s.save_file({k: v.contiguous() for k, v in w.items()}, 'model.safetensors')\""
        )
    raise UsageError(
        f"{directory}: has no model.safetensors and no model.safetensors.index.json; give a model with safetensors "
        "weights (for a hub revision that has them: OWNER/NAME@REVISION)"
    )


def shard_names(index: Path, suffix: str) -> list[str]:
    """The files that an index of weights names, sorted.

    Raises:
        UsageError: the file is no such index, or names a file outside its directory or with another suffix.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{index}: no index of weights; it needs an object named weight_map") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(suffix):
            raise UsageError(f"{index}: {name!r} must be the name of a {suffix} file in this directory")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
        UsageError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; a model directory needs it") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold a JSON object")
    return values


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        UsageError: the file cannot be read, is damaged, or has a tensor of a dtype that is not supported.
    """
    entries, dtypes = {}, ", ".join(_ITEM_BYTES)
    try:
        with open(path, "rb") as raw, safe_open(path, framework="np") as file:
            end = 8 + int.from_bytes(raw.read(8), "little")  # tensors follow the header, without gaps
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in _ITEM_BYTES:
                    raise UsageError(f"{path}: {name} is {dtype}; supported are {dtypes}")
                start, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
                entries[name] = TensorEntry(path, dtype, shape, start, end)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UsageError(f"{path}: no safetensors file, or damaged ({reason}); download it again") from error
    return entries


def read_float32(entry: TensorEntry, rows: Sequence[int] | None = None) -> np.ndarray:
    """A tensor's values as float32; a view of the mapped file if they are stored as float32.

    Args:
        entry: an array, not a single value.
        rows: read only these rows of the first axis, in this order.
    """
    stored = "<u2" if entry.dtype == "BF16" else _NUMPY[entry.dtype]
    raw: np.ndarray = np.memmap(entry.path, stored, "r", entry.start, entry.shape)
    if rows is not None:
        raw = raw[list(rows)]
    if entry.dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(raw, dtype=np.float32)


def tensor_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by name; the same for any sharding.

    Digests of large files are remembered in the cache folder until path, size or time of the file changes.
    """
    files = weight_files(directory)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter lock
        per_file = list(pool.map(_file_digests, files))
    return {name: digest for digests in per_file for name, digest in digests.items()}


def _file_digests(path: Path) -> Mapping[str, str]:
    real = path.resolve()
    stat = real.stat()
    if stat.st_size < _CACHE_FROM_BYTES:
        return _hash_tensors(real)
    stamp = {"path": os.fspath(real), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        cache = cache_folder() / "tensors" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    except OSError:  # no home folder
        return _hash_tensors(real)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            return dict(cached["digests"])
    digests = _hash_tensors(real)
    with contextlib.suppress(OSError):  # cannot be written
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"stamp": stamp, "digests": digests}), encoding="utf-8")
        draft.replace(cache)
    return digests


def _hash_tensors(path: Path) -> dict[str, str]:
    # By their bytes in the file: safetensors gives bfloat16 values only through torch.
    digests = {}
    entries = read_header(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        for name, entry in entries.items():
            digest = hashlib.sha256(f"{entry.dtype} {entry.shape} ".encode())
            with view[entry.start : entry.end] as data:
                digest.update(data)
            digests[name] = digest.hexdigest()
        view.release()
    return digests
