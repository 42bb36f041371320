"""Parameters of the Python interface: their checks, and error messages that name them instead of options."""

import functools
import os
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from numbers import Integral, Real
from os import PathLike, fspath
from typing import ParamSpec, TypeVar

from pipeline.times import parse_instant, parse_time
from storage.errors import UsageError
from storage.files import to_uri

# The parameters of options that have another name here; all others have the same name, with underscores.
_NAMES = {
    "all": "frames=None",
    "floor": "min_score",
    "from": "start_seconds",
    "image": "images",
    "limit": "top",
    "no-thumbnails": "thumbnails=False",
    "not": "without",
    "tag": "tags",
    "timeout": "timeout_seconds",
    "to": "end_seconds",
}
# The values that messages recommend; any other word after an option belongs to the sentence.
_VALUES = "auto|cpu|cuda|float32|bfloat16|float16|transformers|vllm|retrieve|stride|windows"
_OPTION = r"(?<![^\s(])--([a-z]+(?:-[a-z]+)*)"
_OPTION_AND_VALUE = re.compile(rf"{_OPTION}(?: ({_VALUES})\b)?")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def naming_parameters(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function, with UsageErrors that name parameters instead of options."""

    @functools.wraps(function)
    def named(*arguments: _Parameters.args, **values: _Parameters.kwargs) -> _Result:
        try:
            return function(*arguments, **values)
        except UsageError as error:
            message = in_parameters(str(error))
            if message == str(error):
                raise
            raise UsageError(message) from error

    return named


def in_parameters(message: str) -> str:
    """The message of a command, for the caller of a function.

    `--from x: not a time` becomes `start_seconds='x': not a time`, and `use --device cpu` becomes `use device='cpu'`.
    """
    message = re.sub(rf"^{_OPTION} (.*?):(?= |$)", lambda match: f"{_name(match[1])}={match[2]!r}:", message)
    pieces = re.split("(`[^`]*`)", message)  # commands stay as they are
    pieces[::2] = [_OPTION_AND_VALUE.sub(_as_parameter, piece) for piece in pieces[::2]]
    return "".join(pieces)


def _as_parameter(match: re.Match) -> str:
    return _name(match[1]) if match[2] is None else f"{_name(match[1])}={match[2]!r}"


def _name(option: str) -> str:
    return _NAMES.get(option, option.replace("-", "_"))


def check(name: str, value: object, is_right: bool, allowed: str) -> None:
    """Raises a UsageError unless the value is right; `allowed` says what is."""
    if not is_right:
        raise UsageError(f"{name}={value!r}: {allowed}")


def check_count(name: str, value: object, *, or_none: str = "") -> None:
    """Raises a UsageError unless the value is a whole number from 1 on; or None, if `or_none` says what it means."""
    is_count = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
    _check_or_none(name, value, is_count, "a whole number, at least 1", or_none)


def check_number(name: str, value: object, least: float, most: float, *, or_none: str = "") -> None:
    """Raises a UsageError unless the value is a number from `least` to `most`; `or_none` as for check_count."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and not value < least and value <= most
    allowed = f"a number, {least} or more" if most > 1e9 else f"a number from {least} to {most}"
    _check_or_none(name, value, is_number, allowed, or_none)


def check_choice(name: str, value: object, choices: Iterable[str], *, or_none: str = "") -> None:
    """Raises a UsageError unless the value is one of the choices; `or_none` as for check_count."""
    choices = tuple(map(str, choices))
    _check_or_none(name, value, value in choices, f"one of {', '.join(choices)}", or_none)


def _check_or_none(name: str, value: object, is_right: bool, allowed: str, or_none: str) -> None:
    also = f", or None for {or_none}" if or_none else ""
    check(name, value, is_right or (value is None and bool(or_none)), f"must be {allowed}{also}")


def seconds_of(name: str, value: float | str | None) -> float | None:
    """The seconds of a position in a video, given in seconds or as `0:01:23.5`; None stays None.

    Raises:
        UsageError: the value is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return parse_time(f"--{name.replace('_', '-')}", value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    check(name, value, is_number and abs(value) < float("inf"), "must be seconds (83.5) or h:mm:ss.s ('0:01:23.5')")
    return float(value)


def instant_of(name: str, value: datetime | str | None) -> datetime | None:
    """The time in UTC, given as a datetime with a time zone or in ISO 8601 (UTC if it has no zone); None stays None.

    Raises:
        UsageError: the value is neither.
    """
    if value is None or isinstance(value, str):
        return None if value is None else parse_instant(f"--{name}", value)
    is_right = isinstance(value, datetime) and value.tzinfo is not None
    check(name, value, is_right, "must be a datetime with a time zone, or ISO 8601 (2024-05-01T12:00Z)")
    return value.astimezone(UTC)


def place_of(path: str | PathLike[str]) -> str:
    """The URI of a folder, given as a path or a URI."""
    text = fspath(path)
    return text if "://" in text else to_uri(os.path.expanduser(text))
