"""filter: the part of an archive that a query is narrowed to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from storage.archive import Archive
from storage.catalog import select_frames
from storage.records import FrameRef, VideoRow

Span = tuple[float | None, float | None]  # positions in seconds, half-open; None leaves a side open


@dataclass(frozen=True)
class Filter:
    """What frames have to be; None and empty values leave that side open.

    Attributes:
        video: this one alone.
        start_seconds, end_seconds: positions that a player shows, half-open; a frame counts where its span meets them.
        after, before: when it was recorded, half-open: the capture time of the video plus the frame's position. A video
            without a capture time is in no such range.
        tags: by key, the values of which the video has one.
        where: an SQL condition on columns of the views `videos` and `frames`.
    """

    video: VideoRow | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    after: datetime | None = None
    before: datetime | None = None
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: str = ""

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Filter()

    def frames(self, archive: Archive) -> list[FrameRef]:
        """The stored frames that pass, in order of video and time; a failed video has none.

        Raises:
            UsageError: the SQL condition is wrong.
            ArchiveError: a part is missing or damaged.
        """
        if self.is_everything:
            return archive.frames()
        selected = select_frames(archive, self.where) if self.where else None
        by_span: dict[Span, list[int]] = {}
        for row in archive.videos() if self.video is None else [self.video]:
            span = self._span(row)
            if span is not None and (selected is None or row.video_number in selected):
                by_span.setdefault(span, []).append(row.video_number)
        frames = [frame for span, numbers in by_span.items() for frame in archive.frames(numbers, *span)]
        if selected is not None:
            frames = _among(frames, selected)
        return sorted(frames, key=lambda frame: (frame.video_number, frame.ticks))

    def _span(self, row: VideoRow) -> Span | None:
        """The part of a video that passes; None for no part."""
        if not row.frame_count or any(row.tags.get(key) not in values for key, values in self.tags.items()):
            return None
        start, end = self.start_seconds, self.end_seconds
        if self.after is None and self.before is None:
            return start, end
        if row.captured_at is None:
            return None
        duration = row.probe.duration_seconds if row.probe else None
        if self.after is not None:
            begins = (self.after - row.captured_at).total_seconds()
            if begins > 0:
                start = begins if start is None else max(start, begins)
        if self.before is not None:
            ends = (self.before - row.captured_at).total_seconds()
            if ends < (math.inf if duration is None else duration):  # videos that are in it whole share one span
                end = ends if end is None else min(end, ends)
        return None if start is not None and end is not None and end <= start else (start, end)


def _among(frames: list[FrameRef], selected: Mapping[int, np.ndarray | None]) -> list[FrameRef]:
    wanted = {number: None if indexes is None else set(indexes.tolist()) for number, indexes in selected.items()}
    return [
        frame
        for frame in frames
        if wanted[frame.video_number] is None or frame.frame_index in wanted[frame.video_number]
    ]
