"""The process that reads pickled weights, `python -m workers.models.unpickle_child SOCKET LIFELINE SOURCE TARGET PATH`.

Its owner is workers.models.unpickle. torch.load with weights_only=True accepts tensors and refuses everything else. If
that check ever failed, the process could still reach only one open file to read and one to write.
"""

import io
import json
import os
import pickle
import re
import resource
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.protocol import Closed, send
from workers.sandbox import die_with_owner, leave_network_and_files, limit_memory

BASE_BYTES = 2 << 30  # memory for torch itself
PROCESSOR_SECONDS = 3600
WRITTEN_AT_ONCE = 64 << 20
MOST_TIMES = 4  # most bytes of the tensors, as a multiple of their file's; tensors may share values
# Names in safetensors.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Refused(Exception):
    """The file is damaged, or holds something other than tensors."""


def main(arguments: list[str]) -> None:
    """Converts one file, and reports the result."""
    channel, lifeline, source, target = map(int, arguments[:4])
    die_with_owner(lifeline)
    connection = socket.socket(fileno=channel)
    size_bytes = os.fstat(source).st_size
    _load_everything()
    limit_memory(BASE_BYTES + 2 * MOST_TIMES * size_bytes)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    send(connection, {"kind": "ready", "sandbox": leave_network_and_files([source])})
    try:
        tensors = checked(load(arguments[4], source), size_bytes)
        write(tensors, target, lambda done: send(connection, {"kind": "written", "bytes": done}))
    except Refused as error:
        send(connection, {"kind": "refused", "detail": str(error)})
    except MemoryError:
        send(connection, {"kind": "refused", "detail": "reading it takes more memory than weights of its size need"})
    except OSError as error:
        send(connection, {"kind": "unwritten", "detail": error.strerror or str(error)})
    else:
        send(connection, {"kind": "done"})


def load(path: str, source: int) -> Any:
    """The content of a file of pickled weights; memory-mapped if its format allows that.

    Raises:
        Refused: the file is damaged, or holds something other than tensors.
    """
    for is_mapped in (True, False):
        file: Any = path if is_mapped else os.fdopen(os.dup(source), "rb")
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
        except pickle.UnpicklingError as error:
            named = re.search(r"(?:GLOBAL|Unsupported class) ([a-zA-Z_][\w.]*)", str(error))
            if named is None:
                raise Refused("it is damaged, or holds something other than tensors") from error
            raise Refused(f"it asks for {named[1]}, which is not allowed in weights") from error
        except MemoryError:
            raise
        except Exception as error:  # any class: the bytes may be anything
            if "can't allocate memory" in str(error):
                raise MemoryError from error
            if not is_mapped:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise Refused(f"it cannot be read: {reason}") from error
    raise AssertionError


def checked(loaded: Any, size_bytes: int) -> dict[str, Tensor]:
    """The loaded tensors by name, in the order in which they are written.

    Raises:
        Refused: there is something other than tensors, or they are much larger than their file.
    """
    if not isinstance(loaded, Mapping) or not loaded:
        raise Refused(f"it holds {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Refused(f"{str(name)[:100]!r} is {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            raise Refused(f"{name[:100]!r} is a tensor of an unsupported kind ({value.dtype}, {value.layout})")
    total = sum(value.nbytes for value in loaded.values())
    if total > MOST_TIMES * size_bytes:
        raise Refused(f"its tensors take {total} bytes, more than {MOST_TIMES} times the file's {size_bytes}")
    # Wide dtypes first, so that every tensor is aligned to its item size.
    return dict(sorted(loaded.items(), key=lambda item: (-item[1].element_size(), item[0])))


def write(tensors: Mapping[str, Tensor], target: int, report: Any) -> None:
    """Writes a safetensors file: the length of a JSON header, the header, the values in its order.

    safetensors' own writers need a path, or all values in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with os.fdopen(target, "wb", closefd=False) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for value in tensors.values():
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), WRITTEN_AT_ONCE):
                done += file.write(raw[start : start + WRITTEN_AT_ONCE])
                report(done)


def _load_everything() -> None:
    """Loads what torch loads on first use, for both of its formats, because no file can be opened in the sandbox."""
    for is_zip in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(2, dtype=torch.float16)}, buffer, _use_new_zipfile_serialization=is_zip)
        buffer.seek(0)
        loaded = torch.load(buffer, map_location="cpu", weights_only=True)
        with open(os.devnull, "wb") as nowhere:
            write(loaded, nowhere.fileno(), lambda done: None)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Closed:
        sys.exit(0)
