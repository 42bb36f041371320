"""Why the filter options match nothing in an archive, and which values would match."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.text import counted, printable
from pipeline.times import clock
from storage.files import normalize_text, source_text

if TYPE_CHECKING:
    from pipeline.ask.filter import Filter
    from storage.archive.archive import Archive
    from storage.records import VideoRow

NO_FRAMES = "the chosen part of the archive has no searchable frames"
NAMES_TOLD = 20


def why_nothing(archive: Archive, within: Filter) -> str:
    """One line that names the first part of a filter that leaves no frame."""
    rows = [row for row in archive.videos.all() if row.frame_count and row.video_number is not None]
    why = _first_to_blame(within, rows, lambda tried: tried.rows(archive))
    return f"{NO_FRAMES}: {why}" if why else f"{NO_FRAMES}; `vidx status` shows what the archive holds"


def why_no_video(archive: Archive, within: Filter) -> str:
    """One line that names the first part of a filter that leaves no video, with frames or without."""
    from storage.records import Status

    rows = [row for row in archive.videos.all() if row.status is not Status.DELETED]
    why = _first_to_blame(within, rows, lambda tried: tried.videos(archive))
    return why or "no video matches; `vidx status` shows what the archive holds"


def _first_to_blame(within: Filter, rows: Sequence[VideoRow], find: Callable[[Filter], Sized]) -> str:
    from pipeline.ask.filter import Filter

    if within.video is not None:
        rows = [row for row in rows if row.uri == within.video.uri]
    tried = Filter()
    for names, why in _PARTS if rows else ():
        tried = replace(tried, **{name: getattr(within, name) for name in names})
        if not find(tried):
            return why(within, rows)
    return ""


def _why_no_time(_: Filter, rows: Sequence[VideoRow]) -> str:
    times = sorted(row.captured_at for row in rows if row.captured_at is not None)
    if not times:
        return f"{_none_of(rows)} capture time, which --after and --before need; a manifest or the file can state it"
    have = f"{len(times)} of {counted(len(rows), 'video')} {'has' if len(times) == 1 else 'have'} a capture time"
    first, last = (f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in (times[0], times[-1]))
    return f"nothing was recorded in this time; {have}, {f'from {first} to {last}' if first != last else first}"


def _why_no_tag(within: Filter, rows: Sequence[VideoRow]) -> str:
    from pipeline.ask.filter import has_tags

    keys = {key for row in rows for key in row.tags}
    if not keys:
        return f"{_none_of(rows)} tag; a manifest can give tags"
    for key, values in within.tags.items():
        if any(has_tags(row.tags, {key: values}) for row in rows):
            continue
        same = normalize_text(key)
        there = {value for row in rows for own, value in row.tags.items() if normalize_text(own) == same}
        if not there:
            return f"{_none_of(rows)} tag {printable(key)}; the tags are {_listed(keys)}"
        asked = " or ".join(f"{key}={value}" for value in values)
        return f"{_none_of(rows)} tag {printable(asked)}; the values of {printable(key)} are {_listed(there)}"
    return "no video matches all of --tag and the other filters"


def _none_of(rows: Sequence[VideoRow]) -> str:
    return "the video has no" if len(rows) == 1 else f"none of {len(rows)} videos has a"


def _listed(names: Iterable[str]) -> str:
    told = sorted(names)
    more = f" and {len(told) - NAMES_TOLD} more" if len(told) > NAMES_TOLD else ""
    return ", ".join(map(printable, told[:NAMES_TOLD])) + more


def _why_no_position(_: Filter, rows: Sequence[VideoRow]) -> str:
    ends = [row.probe.duration_seconds for row in rows if row.probe and row.probe.duration_seconds]
    if not ends:
        return ""
    if len(rows) == 1:
        return f"no frame lies between --from and --to; {printable(source_text(rows[0].uri))} ends at {clock(ends[0])}"
    return f"no frame lies between --from and --to; the longest video ends at {clock(max(ends))}"


def _why_no_condition(within: Filter, rows: Sequence[VideoRow]) -> str:
    has_others = not replace(within, where="").is_everything
    return f"the condition of --where is true for nothing{' that the other options choose' if has_others else ''}"


# The parts of a filter in the order in which they are tried, and what is said if a part leaves nothing.
_PARTS: tuple[tuple[tuple[str, ...], Callable[[Filter, Sequence[VideoRow]], str]], ...] = (
    (("video",), lambda within, rows: ""),
    (("after", "before"), _why_no_time),
    (("tags",), _why_no_tag),
    (("start_seconds", "end_seconds"), _why_no_position),
    (("where",), _why_no_condition),
)
