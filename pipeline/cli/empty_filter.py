"""Why the filter options leave nothing of an archive, and what there is to ask for instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.ask.filter import Filter
    from storage.archive.archive import Archive
    from storage.records import VideoRow

NO_FRAMES = "there are no searchable frames in what was asked for"
NAMES_TOLD = 20

# The parts of a filter that are told apart, in the order in which they are tried.
_PARTS = (("video",), ("after", "before"), ("tags",), ("start_seconds", "end_seconds"), ("where",))


def why_nothing(archive: Archive, within: Filter) -> str:
    """One line on the first part of a filter with which no frame is left."""
    rows = [row for row in archive.videos.all() if row.frame_count and row.video_number is not None]
    why = _first_to_blame(within, rows, lambda tried: tried.rows(archive))
    return f"{NO_FRAMES}: {why}" if why else f"{NO_FRAMES}; `vidx status` shows what the archive holds"


def why_no_video(archive: Archive, within: Filter) -> str:
    """The same of a filter with which no video is left, whether it has frames or not."""
    from storage.records import Status

    rows = [row for row in archive.videos.all() if row.status is not Status.DELETED]
    why = _first_to_blame(within, rows, lambda tried: tried.videos(archive))
    return why or "no video is like that; `vidx status` shows what the archive holds"


def _first_to_blame(within: Filter, rows: Sequence[VideoRow], find: Callable[[Filter], Sized]) -> str:
    from pipeline.ask.filter import Filter

    if within.video is not None:
        rows = [row for row in rows if row.uri == within.video.uri]
    tried = Filter()
    for names in _PARTS if rows else ():
        tried = replace(tried, **{name: getattr(within, name) for name in names})
        if not find(tried):
            return _why(names, within, rows)
    return ""


def _why(names: Sequence[str], within: Filter, rows: Sequence[VideoRow]) -> str:
    """Of the part of the filter to blame, by the rows of the videos that it is about."""
    if names == ("after", "before"):
        return _why_no_time(rows)
    if names == ("tags",):
        return _why_no_tag(within, rows)
    if names == ("where",):
        return "the condition of --where is true of nothing that is left"
    if names == ("start_seconds", "end_seconds"):
        return _why_no_position(rows)
    return ""


def _why_no_time(rows: Sequence[VideoRow]) -> str:
    from pipeline.results.text import counted

    times = sorted(row.captured_at for row in rows if row.captured_at is not None)
    if not times:
        return f"{_none_of(rows)} capture time, so --after and --before find nothing; a manifest or the file gives it"
    have = f"{len(times)} of {counted(len(rows), 'video')} {'has' if len(times) == 1 else 'have'} a capture time"
    first, last = (f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in (times[0], times[-1]))
    return f"nothing was recorded then; {have}, {f'from {first} to {last}' if first != last else first}"


def _why_no_tag(within: Filter, rows: Sequence[VideoRow]) -> str:
    from pipeline.ask.filter import has_tags
    from pipeline.results.text import printable
    from storage.files import normalize_text

    keys = {key for row in rows for key in row.tags}
    if not keys:
        return f"{_none_of(rows)} tag; a manifest gives them"
    for key, values in within.tags.items():
        if any(has_tags(row, {key: values}) for row in rows):
            continue
        same = normalize_text(key)
        there = {value for row in rows for own, value in row.tags.items() if normalize_text(own) == same}
        if not there:
            return f"{_none_of(rows)} tag {printable(key)}; there are: {_listed(keys)}"
        asked = " or ".join(f"{key}={value}" for value in values)
        return f"{_none_of(rows)} tag {printable(asked)}; {printable(key)} is: {_listed(there)}"
    return "no video has all that --tag and the other filters ask for"


def _none_of(rows: Sequence[VideoRow]) -> str:
    return "the video has no" if len(rows) == 1 else f"none of {len(rows)} videos has a"


def _listed(names: Iterable[str]) -> str:
    from pipeline.results.text import printable

    told = sorted(names)
    more = f" and {len(told) - NAMES_TOLD} more" if len(told) > NAMES_TOLD else ""
    return ", ".join(map(printable, told[:NAMES_TOLD])) + more


def _why_no_position(rows: Sequence[VideoRow]) -> str:
    from pipeline.times import clock
    from storage.files import source_text

    ends = [row.probe.duration_seconds for row in rows if row.probe and row.probe.duration_seconds]
    if not ends:
        return ""
    if len(rows) == 1:
        from pipeline.results.text import printable

        return f"no frame lies between --from and --to; {printable(source_text(rows[0].uri))} ends at {clock(ends[0])}"
    return f"no frame lies between --from and --to; the longest video ends at {clock(max(ends))}"
