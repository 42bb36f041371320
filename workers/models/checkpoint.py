"""The tensors of a model directory: what is there, their hash, and their values as numpy arrays.

Reads the safetensors format itself (https://github.com/huggingface/safetensors#format: eight bytes of header length,
a JSON header, raw data), because finding a model and searching by text must not wait for torch. Nothing is executed:
pickled weights are refused with the way to convert them.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import UsageError
from workers.cache_folder import cache_folder

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CACHE_FROM_BYTES = 64 << 20  # smaller files are hashed faster than anyone notices
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `path`, in safetensors' name of its dtype."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def list_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model directory by name, from one safetensors file or the shards of an index.

    Raises:
        UsageError: no safetensors, a shard missing or damaged, or a name that two shards hold.
    """
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(directory):
        for name, entry in read_header(path).items():
            if name in entries:
                raise UsageError(f"{path}: {name} is also in {entries[name].path.name}; a tensor may be stored once")
            entries[name] = entry
    return entries


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted by name.

    Raises:
        UsageError: there are none (with the way to convert pickled ones), or the index names one that is not there.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        names = shard_names(index, ".safetensors")
        for name in names:
            if not (directory / name).is_file():
                raise UsageError(f"{directory}: {name}, which {index.name} names, is missing; complete the download")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if (directory / "pytorch_model.bin").is_file():
        raise UsageError(
            f"{directory}: has pytorch_model.bin but no model.safetensors, and pickled weights are not read; convert "
            'them once: python -c "import torch, safetensors.torch as s; '
            "w = torch.load('pytorch_model.bin', weights_only=True); "
            "s.save_file({k: v.contiguous() for k, v in w.items()}, 'model.safetensors')\""
        )
    raise UsageError(
        f"{directory}: has no model.safetensors and no model.safetensors.index.json; give a model with safetensors "
        "weights (a hub revision that has them can be named as ID@REVISION)"
    )


def shard_names(index: Path, suffix: str) -> list[str]:
    """The files that an index of weights names, sorted.

    Raises:
        UsageError: it is none, or names something else than files beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{index}: no index of weights: it needs an object named weight_map") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(suffix):
            raise UsageError(f"{index}: {name!r} is no file name of a shard in this directory")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory.

    Raises:
        UsageError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; a model directory needs it") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no JSON object")
    return values


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        UsageError: the file is cut off or its header does not describe it.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise UsageError(f"{path}: no safetensors file, or cut off ({size_bytes} bytes); download it again")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: no safetensors file: its header is not JSON; download it again") from error
    base = 8 + header_bytes
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = value["data_offsets"]
            entry = TensorEntry(path, value["dtype"], tuple(value["shape"]), base + start, base + end)
            item_bytes = _ITEM_BYTES[entry.dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: {name} is described wrongly: {value!r}") from error
        if not base <= entry.start <= entry.end <= size_bytes:
            raise UsageError(f"{path}: {name} lies outside the file ({size_bytes} bytes); download it again")
        if entry.end - entry.start != math.prod(entry.shape) * item_bytes:
            raise UsageError(f"{path}: {name} has {entry.end - entry.start} bytes, not those of {entry.shape}")
        entries[name] = entry
    return entries


def read_float32(entry: TensorEntry, rows: Sequence[int] | None = None) -> np.ndarray:
    """One tensor's values as float32, whatever it is stored as; float32 stays a view of the mapped file.

    Args:
        rows: read only these of the first axis, in this order.
    """
    stored = "<u2" if entry.dtype == "BF16" else _NUMPY[entry.dtype]
    if not entry.shape:
        raise ValueError(f"read_float32 wants an array, not a single value of {entry.path}")
    raw: np.ndarray = np.memmap(entry.path, stored, "r", entry.start, entry.shape)
    if rows is not None:
        raw = raw[list(rows)]
    if entry.dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(raw, dtype=np.float32)


def tensor_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by name: the same however the tensors are sharded."""
    files = weight_files(directory)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter lock
        per_file = list(pool.map(_file_digests, files))
    return {name: digest for digests in per_file for name, digest in digests.items()}


def _file_digests(path: Path) -> Mapping[str, str]:
    real = path.resolve()
    stat = real.stat()
    if stat.st_size < _CACHE_FROM_BYTES:
        return _hash_tensors(real)
    stamp = asdict(_Stamp(os.fspath(real), stat.st_size, stat.st_mtime_ns))
    name = f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a missing or spoilt cache costs time only
        cache = cache_folder() / "tensors" / name
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            return dict(cached["digests"])
    digests = _hash_tensors(real)
    with contextlib.suppress(OSError):  # a home that is not there or cannot be written costs time only
        cache = cache_folder() / "tensors" / name
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"stamp": stamp, "digests": digests}), encoding="utf-8")
        draft.replace(cache)
    return digests


@dataclass(frozen=True)
class _Stamp:
    path: str
    size_bytes: int
    mtime_ns: int


def _hash_tensors(path: Path) -> dict[str, str]:
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
