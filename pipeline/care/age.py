"""The age of a video, by which it expires."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from storage.errors import UsageError
from storage.records import CapturedFrom, Status, VideoRow

_DAYS = {"h": 1 / 24, "d": 1, "w": 7, "y": 365}


@dataclass(frozen=True)
class Age:
    """The age of a video.

    Attributes:
        since: the time from which it counts.
        source: where this time is from: captured_at, file_changed_at or indexed_at.
        seconds: the age.
        is_by_file: whether captured_at was read from the file.
    """

    since: datetime
    source: str
    seconds: float
    is_by_file: bool

    def json(self) -> dict[str, Any]:
        """The keys of --json."""
        told = {"age_seconds": round(self.seconds), "age_from": self.source, "since": self.since}
        is_captured = self.source == "captured_at"
        return told | ({"captured_from": "file" if self.is_by_file else "manifest"} if is_captured else {})

    def __str__(self) -> str:
        hours = self.seconds / 3600
        return f"{hours:.1f}h" if abs(hours) < 48 else f"{hours / 24:.1f}d"


AGE_SOURCES = {
    "captured_at": "capture time",
    "file_changed_at": "last change of the file",
    "indexed_at": "time of indexing",
}


def key_of(row: VideoRow) -> str:
    """What identifies a video, even if its file moves."""
    return row.video_id or row.uri


def age_of(row: VideoRow, now: datetime) -> Age | None:
    """The age of a video; None if nothing is known that it counts from."""
    changed = None if row.mtime_ns is None else datetime.fromtimestamp(row.mtime_ns / 1e9, UTC)
    known = {"captured_at": row.captured_at, "file_changed_at": changed, "indexed_at": row.indexed_at}
    for source, since in known.items():
        if since is not None:
            is_by_file = source == "captured_at" and row.captured_from is CapturedFrom.FILE
            return Age(since, source, (now - since).total_seconds(), is_by_file)
    return None


def instant_before(option: str, text: str, now: datetime) -> datetime:
    """The time at which a video would have this age now.

    Raises:
        UsageError: the option's text is no age.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwy])", text.strip())
    try:
        if match:
            return now - timedelta(days=float(match[1]) * _DAYS[match[2]])
    except OverflowError:
        pass
    raise UsageError(f"{option} {text}: not an age; give a number with h, d, w or y, e.g. 90d")


def expired_videos(rows: Iterable[VideoRow], oldest: datetime, now: datetime) -> list[VideoRow]:
    """The videos, deleted ones left out, whose age counts from a time before `oldest`."""
    present = (row for row in rows if row.status is not Status.DELETED)
    return [row for row in present if (age := age_of(row, now)) is not None and age.since < oldest]
