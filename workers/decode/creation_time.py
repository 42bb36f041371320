"""When a video was made, by what its file says; many files say nothing, or the zero of some clock."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from storage.iso_time import iso_instant

# Apple's comes first: it is when the camera recorded, with its zone, and stays when the other is set at an export.
_KEYS = ("com.apple.quicktime.creationdate", "creation_time")
_DAY = timedelta(days=1)
# What clocks that were never set count from: QuickTime's, Unix's and FAT's.
_ZEROS = tuple(datetime(year, 1, 1, tzinfo=UTC) for year in (1904, 1970, 1980))


def creation_time(metadata: Iterable[Mapping[str, str]], now: datetime) -> datetime | None:
    """The time of creation in the metadata of a container or its streams, the first that can be one; in UTC.

    Args:
        metadata: as FFmpeg names it; of the container, then of its streams.
        now: later times are none.
    """
    tables = [{key.lower(): value for key, value in each.items()} for each in metadata]
    for key in _KEYS:
        for table in tables:
            time = iso_instant(table.get(key))
            if time is not None and _is_plausible(time, now):
                return time
    return None


def _is_plausible(time: datetime, now: datetime) -> bool:
    """Cameras give their local time as UTC, so a day either way means nothing."""
    return _ZEROS[0] < time < now + _DAY and all(abs(time - zero) > _DAY for zero in _ZEROS)
