"""Checks of what an archive says, made before it is used: names, numbers, texts and its small files.

An archive may come from a stranger, or from a disk that has lost data. So a name must be a plain file name before it is
joined to a path, a number must be in range before memory is allocated for it, and a file must be a regular file, no
link and no pipe, before it is opened.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.files import file_path, is_text, join

MOST_TEXT = 1 << 16
INT32, INT64 = 2**31 - 1, 2**63 - 1
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,199}")
_IN_SHARD = re.compile(r"_[0-9]{6}/")
_ID = r"[0-9a-f]{32}"
JOB_ID = re.compile(_ID)
INDEX_NAME = re.compile(_ID + r"\.(keys|codes|runs|rows|parts|centroids)")
VIDEO_ID = "[0-9a-f]{64}"  # this and the next are used by Python and by Arrow
LINE = r"[^\x00-\x1f\x7f]*"


class InvalidValue(ValueError):
    """An archive says something that vidx cannot have written; the message is one line, and does not name the file."""


def file_uri(folder_uri: str, name: str) -> str:
    """The URI of a file of an archive, by the name that the archive gives; no other function joins such a name.

    Raises:
        InvalidValue: the name is no plain file name, with or without the folder of a shard, or there is something else
            than a regular file.
    """
    check_names([name], in_shards=True)
    uri = join(folder_uri, name)
    check_kind(uri)
    return uri


def check_kind(uri: str, kind: Literal["file", "folder"] = "file") -> None:
    """Refuses a link, a pipe or any other thing in the place of a file or folder; a missing one is fine.

    Raises:
        InvalidValue: there is such a thing.
    """
    try:
        mode = os.lstat(file_path(uri)).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise InvalidValue("is a link; an archive must hold the files themselves, so put the link's target there")
    if not (stat.S_ISREG if kind == "file" else stat.S_ISDIR)(mode):
        raise InvalidValue(f"is not a {kind}")


def read_small(uri: str, most_bytes: int) -> bytes:
    """The whole of a file that cannot be large.

    Raises:
        InvalidValue: it is larger, or not a regular file.
        OSError: it is missing or cannot be read.
    """
    try:
        descriptor = os.open(file_path(uri), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            check_kind(uri)
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            check_kind(uri)
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise InvalidValue(f"has more than {most_bytes} bytes")
    return data


def parse_json(text: bytes) -> Any:
    """A JSON document, without NaN and infinity.

    Raises:
        InvalidValue: it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise InvalidValue("its JSON is nested too deeply") from error
    except ValueError as error:
        raise InvalidValue(f"not JSON: {error}") from error


def _refuse_constant(text: str) -> None:
    raise InvalidValue(f"it says {text}, which is not a number")


def get_value(document: Any, name: str) -> Any:
    """One value of a JSON object.

    Raises:
        InvalidValue: it is not an object, or has no such value.
    """
    if not isinstance(document, dict) or name not in document:
        raise InvalidValue(f"it has no {name}")
    return document[name]


def get_list(document: Any, name: str) -> list:
    """One value of a JSON object, which must be a list."""
    value = get_value(document, name)
    if not isinstance(value, list):
        raise InvalidValue(f"its {name} is not a list")
    return value


def check_integer(name: str, value: Any, least: int = 0, most: int = INT64) -> int:
    """The value, which must be an integer in a range, both ends included."""
    if type(value) is not int or not least <= value <= most:
        raise InvalidValue(f"its {name} is {short_repr(value)}, not an integer from {least} to {most}")
    return value


def check_integers(name: str, values: list, least: int = 0, most: int = INT64) -> np.ndarray:
    """(n,) int64: the values, which must be integers in a range, both ends included."""
    return np.array([check_integer(name, value, least, most) for value in values], np.int64)


def check_names(values: list, *, in_shards: bool = False) -> tuple[str, ...]:
    """The values, which must be plain file names, all different; with in_shards, they may begin with a shard's folder.

    A shard is a folder of frames (storage/archive/part_table.py).
    """
    for value in values:
        name = _IN_SHARD.sub("", value, 1) if in_shards and isinstance(value, str) else value
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidValue(f"it names a file {short_repr(value)}; no file of an archive has such a name")
    if len(set(values)) < len(values):
        raise InvalidValue("it names a file twice")
    return tuple(values)


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """The value, which must be a finite number in a range."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise InvalidValue(f"its {name} is {short_repr(value)}, not a number from {least} to {most}")
    return float(value)


def check_text(name: str, value: Any, pattern: str = LINE) -> str:
    """The value, which must be a short text in one line, or match another pattern."""
    if not (isinstance(value, str) and len(value) <= MOST_TEXT and is_text(value) and re.fullmatch(pattern, value)):
        raise InvalidValue(f"its {name} is {short_repr(value)}, which vidx does not write there")
    return value


def check_column_text(name: str, column: pa.ChunkedArray, pattern: str) -> None:
    """Refuses a column with a text that does not match a pattern; nulls are fine."""
    matches = pc.match_substring_regex(column, f"^(?:{pattern})$")
    _refuse_any(name, column, pc.invert(matches), "which vidx does not write there")


def check_column_range(name: str, column: pa.ChunkedArray, least: float, most: float) -> None:
    """Refuses a column with a number that is outside a range or not finite; nulls are fine."""
    is_inside = pc.and_(pc.greater_equal(column, least), pc.less_equal(column, most))  # False for NaN
    _refuse_any(name, column, pc.invert(is_inside), f"not from {least} to {most}")


def check_column_values(name: str, column: pa.ChunkedArray, values: Iterable[Any]) -> None:
    """Refuses a column with a value that is not one of these; nulls are fine."""
    is_unknown = pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, pa.array(list(values), column.type))))
    _refuse_any(name, column, is_unknown, "which this vidx does not know")


def _refuse_any(name: str, column: pa.ChunkedArray, is_wrong: pa.ChunkedArray, why: str) -> None:
    if pc.any(is_wrong).as_py():
        raise InvalidValue(f"its {name} is {short_repr(column.filter(is_wrong)[0].as_py())}, {why}")


def short_repr(value: Any) -> str:
    """A value in one short line of ASCII."""
    found = ascii(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
