"""filter: the part of an archive that a query looks at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import Rows
from storage.errors import UsageError
from storage.files import normalize_text
from storage.records import FrameRef, VideoRow

Span = tuple[float | None, float | None]  # positions in seconds, half-open; None is no limit
_Range = tuple[list[int] | None, float | None, float | None, np.ndarray | None]  # videos, span, frame indexes


@dataclass(frozen=True)
class Filter:
    """Conditions on frames; None and empty values are no condition.

    Attributes:
        video: only this video.
        start_seconds, end_seconds: positions that a player shows, half-open; the span of a frame must meet this range.
        after, before: times of recording, half-open. A frame was recorded at the capture time of its video plus its
            position; a video without a capture time is in no such range.
        tags: the allowed values by key; the video must have one of the values of each key.
        where: an SQL condition on columns of the views `videos` and `frames`.
    """

    video: VideoRow | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    after: datetime | None = None
    before: datetime | None = None
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: str = ""

    def __post_init__(self):
        position: tuple[str, Any, Any] = ("position", self.start_seconds, self.end_seconds)
        for name, low, high in (position, ("time of recording", self.after, self.before)):
            if low is not None and high is not None and high <= low:
                raise UsageError(f"{name} from {low} to {high}: the range must end after it starts")
        for instant in (self.after, self.before):
            if instant is not None and instant.tzinfo is None:
                raise UsageError(f"time of recording {instant}: it must have a time zone")

    @property
    def is_everything(self) -> bool:
        """Whether there is no condition."""
        return self == Filter()

    def frames(self, archive: Archive) -> list[FrameRef]:
        """The stored frames that pass, in order of video and time.

        Raises:
            UsageError: the SQL condition is wrong.
            ArchiveError: a part is missing or damaged.
        """
        frames = [frame for chosen in self._ranges(archive) for frame in archive.frames.find(*chosen)]
        return sorted(frames, key=lambda frame: (frame.video_number, frame.ticks))

    def rows(self, archive: Archive) -> Rows:
        """The rows of these frames in their parts; a part is not opened if all its frames pass."""
        found: dict[str, np.ndarray | None] = {}
        for chosen in self._ranges(archive):
            found |= archive.frames.rows(*chosen)
        return found

    def videos(self, archive: Archive) -> list[VideoRow]:
        """The videos that pass, in order of URI, with frames or without; positions are ignored.

        A video passes an SQL condition on frames if one of its frames does. Deleted videos pass too, unless there is an
        SQL condition.

        Raises:
            UsageError: the SQL condition is wrong.
            ArchiveError: a part is missing or damaged.
        """
        chosen = None
        if self.where:
            from storage.sql import select_videos  # with DuckDB

            chosen = select_videos(archive, self.where)
        extents = _extents(archive, self.video)
        recorded = replace(self, start_seconds=None, end_seconds=None)
        found = []
        for row in self._candidates(archive):
            length = row.probe.duration_seconds if row.probe else None
            extent = extents.get(row.video_number or 0, (0.0, max(length or 0.0, 1e-6)))
            is_chosen = chosen is None or row.uri in chosen
            if is_chosen and self._passes(row) and recorded._span(row, *extent) is not None:
                found.append(row)
        return found

    def unfinished(self, archive: Archive) -> list[VideoRow]:
        """The videos that pass and are not completely indexed yet."""
        rows = archive.videos.unfinished()
        passing = [numbers for numbers, *_ in self._ranges(archive)] if rows else []
        return [row for row in rows if any(numbers is None or row.video_number in numbers for numbers in passing)]

    def _ranges(self, archive: Archive) -> Iterator[_Range]:
        """The frames that pass, as groups of videos with the same span; each video is in one group."""
        if self.is_everything:
            yield None, None, None, None
            return
        selected = None
        if self.where:
            from storage.sql import select_frames  # with DuckDB, which few filters need

            selected = select_frames(archive, self.where)
        extents = _extents(archive, self.video)
        by_span: dict[Span, list[int]] = {}
        for row in self._candidates(archive):
            number = row.video_number
            if number in extents and self._passes(row) and (selected is None or number in selected):
                span = self._span(row, *extents[number])
                if span is None:
                    continue
                if selected is None or selected[number] is None:
                    by_span.setdefault(span, []).append(number)
                else:
                    yield [number], *span, selected[number]
        for span, numbers in by_span.items():
            yield numbers, *span, None

    def _candidates(self, archive: Archive) -> list[VideoRow]:
        """The videos that may pass; those that lack a capture time or a tag that is asked for are left out."""
        if self.video is not None:
            return [self.video]
        rows = archive.videos.stored()
        may_pass = np.ones(len(rows), bool)
        if self.after is not None or self.before is not None:
            may_pass &= rows.column("captured_at").is_valid().to_numpy()
        if self.tags:
            each = (dict(pairs or ()) for pairs in rows.column("tags").to_pylist())
            may_pass &= np.fromiter((has_tags(own, self.tags) for own in each), bool, len(rows))
        return archive.videos.at(np.flatnonzero(may_pass))

    def _passes(self, row: VideoRow) -> bool:
        """Whether frames of a video can pass if positions and times are ignored."""
        is_dated = row.captured_at is not None or (self.after is None and self.before is None)
        return is_dated and has_tags(row.tags, self.tags)

    def _span(self, row: VideoRow, first_seconds: float, end_seconds: float) -> Span | None:
        """The span of a video that passes, if its frames lie between these positions; None if nothing passes.

        A limit that excludes nothing becomes None, so that many videos have the same span.
        """
        start, end = self.start_seconds, self.end_seconds
        if self.after is not None and row.captured_at is not None:
            begins = (self.after - row.captured_at).total_seconds()
            if begins >= end_seconds:
                return None
            if begins > first_seconds:
                start = begins if start is None else max(start, begins)
        if self.before is not None and row.captured_at is not None:
            ends = (self.before - row.captured_at).total_seconds()
            if ends <= first_seconds:
                return None
            if ends < end_seconds:
                end = ends if end is None else min(end, ends)
        return None if start is not None and end is not None and end <= start else (start, end)


def has_tags(own: Mapping[str, str], tags: Mapping[str, Sequence[str]]) -> bool:
    """Whether a video's own tags have one of the values of each key; different Unicode forms of a text are equal."""
    if not tags:
        return True
    own = {normalize_text(key): normalize_text(value) for key, value in own.items()}
    pairs = ((own.get(normalize_text(key)), values) for key, values in tags.items())
    return all(any(value == normalize_text(wanted) for wanted in values) for value, values in pairs)


def _extents(archive: Archive, video: VideoRow | None) -> dict[int, tuple[float, float]]:
    """By video number, the start of the first frame and an upper bound of the end of the last one, in seconds.

    Args:
        archive: whose videos.
        video: that must be among them; None for all.
    """
    bounds = archive.parts.bounds(None if video is None else [video.video_number or 0])
    numbers, places = np.unique(bounds.video_number, return_inverse=True)
    first, end = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
    np.minimum.at(first, places, bounds.first_seconds)
    np.maximum.at(end, places, bounds.last_seconds + bounds.longest_seconds)
    return dict(zip(numbers.tolist(), zip(first.tolist(), end.tolist(), strict=True), strict=True))
