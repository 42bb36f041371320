"""What an archive says, checked before it is used: names, numbers, texts and its small files.

An archive may come from a stranger, or from a disk that has lost something. So a name is a plain file name before it is
joined to a path, a number is of its kind and range before anything is made so large, and a file is a file of its own,
no link and no pipe, before it is opened.
"""

import errno
import json
import math
import os
import re
import stat
import string
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.files import file_path, is_text, join, local_path

MOST_NAME = 200
MOST_TEXT = 1 << 16
INT32, INT64 = 2**31 - 1, 2**63 - 1
NAME = rf"[0-9A-Za-z][0-9A-Za-z_.-]{{0,{MOST_NAME - 1}}}"
_NAME_BYTES = (string.ascii_letters + string.digits + "_.-").encode()
_ID = r"[0-9a-f]{32}"
JOB_ID = re.compile(_ID)
INDEX_NAME = re.compile(_ID + r"\.(keys|codes|runs|rows|centroids)")
VIDEO_ID = "[0-9a-f]{64}"  # these are read by Python and by Arrow
LINE = r"[^\x00-\x1f\x7f]*"


class Wrong(ValueError):
    """An archive says something that no vidx has written; the message is one line, and does not say where."""


def place_of(folder_uri: str, name: str) -> str:
    """The URI of a file of an archive, by the name that the archive gives it; there is no other way from one to it.

    Raises:
        Wrong: the name is no plain file name, or what is there is no file of its own.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise Wrong(f"it names a file {shown(name)}, which no file of an archive is called")
    uri = join(folder_uri, name)
    refuse_other_kinds(uri)
    return uri


def refuse_other_kinds(uri: str, is_kind: Any = stat.S_ISREG, kind: str = "file") -> None:
    """Nothing, where there is a file of its own, or nothing at all.

    Args:
        uri: where.
        is_kind, kind: another kind of thing that is wanted there.
    Raises:
        Wrong: there is a link, a pipe or another thing.
    """
    path = local_path(uri)
    if path is None:
        return
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise Wrong("is a link, and an archive holds its files itself; put there what it points to")
    if not is_kind(mode):
        raise Wrong(f"is no {kind}")


def refuse_other_folder(uri: str) -> None:
    """Nothing, where there is a folder of its own, or nothing at all.

    Raises:
        Wrong: there is a link or another thing.
    """
    refuse_other_kinds(uri, stat.S_ISDIR, "folder")


def read_small(uri: str, most_bytes: int) -> bytes:
    """The whole of a local file that cannot be large.

    Raises:
        Wrong: it is larger, or no file of its own.
        OSError: it is missing or cannot be read.
    """
    try:
        descriptor = os.open(file_path(uri), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            refuse_other_kinds(uri)
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            refuse_other_kinds(uri)
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise Wrong(f"has more than {most_bytes} bytes")
    return data


def parse_json(text: bytes) -> Any:
    """A JSON document, without NaN and infinity.

    Raises:
        Wrong: it is none.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise Wrong("its JSON is nested too deeply") from error
    except ValueError as error:
        raise Wrong(f"no JSON: {error}") from error


def _no_number(text: str) -> None:
    raise Wrong(f"it says {text}, which is no number")


def member(document: Any, name: str) -> Any:
    """One value of a JSON object.

    Raises:
        Wrong: it is no object, or has no such value.
    """
    if not isinstance(document, dict) or name not in document:
        raise Wrong(f"it has no {name}")
    return document[name]


def members(document: Any, name: str) -> list:
    """One value of a JSON object that is a list."""
    value = member(document, name)
    if not isinstance(value, list):
        raise Wrong(f"its {name} is no list")
    return value


def whole(name: str, value: Any, least: int = 0, most: int = INT64) -> int:
    """A whole number in a range, both ends included."""
    if type(value) is not int or not least <= value <= most:
        raise Wrong(f"its {name} is {shown(value)}, not a whole number from {least} to {most}")
    return value


def wholes(name: str, values: list, least: int = 0, most: int = INT64) -> np.ndarray:
    """(n,) int64: as many whole numbers."""
    if not set(map(type, values)) <= {int} or (values and not least <= min(values) <= max(values) <= most):
        for value in values:
            whole(name, value, least, most)
    return np.array(values, np.int64)


def names(values: list) -> tuple[str, ...]:
    """As many plain file names, all different; of 33,000 in ten milliseconds."""
    if not set(map(type, values)) <= {str} or not _are_names(values):
        for value in values:
            if not isinstance(value, str) or not re.fullmatch(NAME, value):
                raise Wrong(f"it names a file {shown(value)}, which no file of an archive is called")
    if len(set(values)) < len(values):
        raise Wrong("it names a file twice")
    return tuple(values)


def _are_names(values: list[str]) -> bool:
    lengths, firsts = set(map(len, values)), "".join({value[:1] for value in values})
    others = "".join(values).encode("ascii", "replace").translate(None, _NAME_BYTES)
    return not values or (not others and 0 < min(lengths) <= max(lengths) <= MOST_NAME and firsts.isalnum())


def finite(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A number in a range."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise Wrong(f"its {name} is {shown(value)}, not a number from {least} to {most}")
    return float(value)


def text(name: str, value: Any, pattern: str = LINE) -> str:
    """A short text in one line, or what fits another pattern."""
    is_it = isinstance(value, str) and len(value) <= MOST_TEXT and is_text(value) and re.fullmatch(pattern, value)
    if not is_it:
        raise Wrong(f"its {name} is {shown(value)}, not what vidx writes there")
    return value


def check_texts(name: str, column: pa.ChunkedArray, pattern: str) -> None:
    """Nothing, where every text of a column fits a pattern; what is null does."""
    found = pc.match_substring_regex(column, f"^(?:{pattern})$")
    if pc.all(found).as_py() is False:
        raise Wrong(f"its {name} is {shown(column.filter(pc.invert(found))[0].as_py())}, not what vidx writes there")


def check_range(name: str, column: pa.ChunkedArray, least: float, most: float) -> None:
    """Nothing, where every number of a column is finite and in a range; what is null is."""
    found = pc.and_(pc.greater_equal(column, least), pc.less_equal(column, most))
    if pc.all(found).as_py() is False:  # NaN is neither
        raise Wrong(f"its {name} is {shown(column.filter(pc.invert(found))[0].as_py())}, not from {least} to {most}")


def check_values(name: str, column: pa.ChunkedArray, values: Iterable[Any]) -> None:
    """Nothing, where every value of a column is one of these; what is null is."""
    for value in set(column.unique().to_pylist()) - {None, *values}:
        raise Wrong(f"its {name} is {shown(value)}, which this vidx does not know")


def shown(value: Any) -> str:
    """A value in one short line of ASCII."""
    found = ascii(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
