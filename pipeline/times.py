"""Times as people write them: positions in a video, moments of one, and points in time."""

import os
import re
from datetime import UTC, datetime

from storage.errors import UsageError
from storage.iso_time import iso_instant

_EPOCH_END = 10**10  # seconds since 1970 below it lie before the year 2287


def parse_time(option: str, text: str) -> float:
    """Seconds from `83.5` or `0:01:23.5`.

    Raises:
        UsageError: neither.
    """
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d*)?)", text.strip())
    if not match:
        raise UsageError(f"{option} {text}: not a time; give seconds (83.5) or h:mm:ss.s (0:01:23.5)")
    hours, minutes, seconds = match.groups()
    if (minutes is not None and float(seconds) >= 60) or (hours is not None and int(minutes) >= 60):
        raise UsageError(f"{option} {text}: minutes and seconds go up to 59")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


def parse_instant(option: str, text: str) -> datetime:
    """A point in time from ISO 8601, in UTC; without a zone it is UTC.

    Raises:
        UsageError: it is none.
    """
    instant = iso_instant(text)
    if instant is None:
        hint = epoch_hint(text)
        raise UsageError(f"{option} {text}: not a time; give ISO 8601, e.g. 2024-05-01 or 2024-05-01T12:00Z{hint}")
    return instant


def epoch_hint(value: object) -> str:
    """What a number may have meant, to be added to the error about it: seconds since 1970, or parts of them."""
    text = str(value).strip()
    if not re.fullmatch(r"\d{9,20}(\.\d*)?", text, re.ASCII):
        return ""
    for unit, per_second in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
        seconds = int(text.partition(".")[0]) // per_second
        if seconds < _EPOCH_END:
            return f"; {unit} since 1970 would be {datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return ""


def parse_moment(video: str) -> tuple[str, float | None, float | None]:
    """A video's name and the range after its `@`, if one is there: VIDEO@START or VIDEO@START-END.

    A file whose own name holds an `@` is taken as that file.
    """
    if os.path.lexists(video) or "@" not in video:
        return video, None, None
    name, _, times = video.rpartition("@")
    if not re.fullmatch(r"[\d:.]+(-[\d:.]+)?", times):
        return video, None, None
    start, _, end = times.partition("-")
    start_seconds = parse_time(f"{name}@", start)
    if not end:
        return name, start_seconds, None
    end_seconds = parse_time(f"{name}@", end)
    if end_seconds <= start_seconds:
        raise UsageError(f"{video}: the moment ends before it starts")
    return name, start_seconds, end_seconds


def clock(seconds: float) -> str:
    """h:mm:ss.s of a position."""
    tenths = round(seconds * 10)
    sign, tenths = ("-", -tenths) if tenths < 0 else ("", tenths)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours}:{minutes:02d}:{tenths // 10:02d}.{tenths % 10}"


def clock_seconds(seconds: float) -> str:
    """h:mm:ss of a length of time, to whole seconds."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
