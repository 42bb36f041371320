"""Times as people write them: positions and moments in a video, and dates."""

import os
import re
from datetime import UTC, datetime

from storage.errors import UsageError
from storage.iso_time import iso_instant

_EPOCH_END = 10**10  # a number of seconds since 1970 below this is before the year 2287


def parse_time(option: str, text: str) -> float:
    """The seconds of a position written as `83.5` or `0:01:23.5`.

    Raises:
        UsageError: the text is neither.
    """
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:\.\d*)?)", text.strip())
    if not match:
        raise UsageError(f"{option} {text}: not a time; give seconds (83.5) or h:mm:ss.s (0:01:23.5)")
    hours, minutes, seconds = match.groups()
    if (minutes is not None and float(seconds) >= 60) or (hours is not None and int(minutes) >= 60):
        raise UsageError(f"{option} {text}: minutes and seconds must be below 60")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


def parse_instant(option: str, text: object) -> datetime:
    """The time written in ISO 8601, in UTC; a time without a zone is in UTC.

    Raises:
        UsageError: the text is not a time.
    """
    instant = iso_instant(text)
    if instant is None:
        hint = epoch_hint(text)
        raise UsageError(f"{option} {text}: not a time; give ISO 8601, e.g. 2024-05-01 or 2024-05-01T12:00Z{hint}")
    return instant


def epoch_hint(value: object) -> str:
    """A hint for an error message, if a number may mean (milli-, micro-, nano-)seconds since 1970; else empty."""
    text = str(value).strip()
    if not re.fullmatch(r"\d{9,20}(\.\d*)?", text, re.ASCII):
        return ""
    for unit, per_second in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
        seconds = int(text.partition(".")[0]) // per_second
        if seconds < _EPOCH_END:
            return f"; {unit} since 1970 would be {datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return ""


def parse_moment(video: str) -> tuple[str, float | None, float | None]:
    """The name of a video and the range after its `@`, if there is one: VIDEO@START or VIDEO@START-END.

    If there is a file with this very name, the `@` belongs to its name.
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
        raise UsageError(f"{video}: the moment must end after it starts")
    return name, start_seconds, end_seconds


def clock(seconds: float) -> str:
    """A position as h:mm:ss.s."""
    tenths = round(seconds * 10)
    sign, tenths = ("-", -tenths) if tenths < 0 else ("", tenths)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours}:{minutes:02d}:{tenths // 10:02d}.{tenths % 10}"


def clock_seconds(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
