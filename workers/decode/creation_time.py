"""The time of creation that a video file states; many files state none, or the zero of a clock that was not set."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from storage.iso_time import iso_instant

# Apple's key first: it is the time of recording, with its zone, and an export does not change it.
_KEYS = ("com.apple.quicktime.creationdate", "creation_time")
_DAY = timedelta(days=1)
# Zeros of clocks: QuickTime's, Unix's and FAT's.
_ZEROS = tuple(datetime(year, 1, 1, tzinfo=UTC) for year in (1904, 1970, 1980))


def creation_time(metadata: Iterable[Mapping[str, str]], now: datetime) -> datetime | None:
    """The first plausible time of creation in a file's metadata, in UTC; None if there is none.

    Args:
        metadata: of the container, then of its streams, with FFmpeg's keys.
        now: later times are not plausible.
    """
    tables = [{key.lower(): value for key, value in each.items()} for each in metadata]
    for key in _KEYS:
        for table in tables:
            time = iso_instant(table.get(key))
            if time is None:
                continue
            # Cameras write local times as UTC, so a day's difference is allowed.
            if _ZEROS[0] < time < now + _DAY and all(abs(time - zero) > _DAY for zero in _ZEROS):
                return time
    return None
