"""Published frames: where they lie, by video, time or index."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from storage.archive.frames import LivePart, Rows, find_frames, find_hits, find_rows, refs_of_part
from storage.archive.part_table import PartTable
from storage.archive.video_table import VideoTable
from storage.records import FrameRef, Hit


class FrameTable:
    """The frames of published videos."""

    def __init__(self, parts: PartTable, videos: VideoTable):
        self._parts = parts
        self._videos = videos

    def parts(self) -> list[LivePart]:
        """The parts of published videos."""
        bounds = self._parts.bounds()
        shown = np.isin(bounds.video_number, np.fromiter(self._videos.published(), np.int64))
        columns = (bounds.path, bounds.video_number, bounds.row_count)
        return [*map(LivePart._make, zip(*(column[shown].tolist() for column in columns), strict=True))]

    def find(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> list[FrameRef]:
        """Published frames, by (video_number, ticks).

        Args:
            video_numbers: one video, several, or None for all.
            start_seconds, end_seconds: half-open range of positions; a frame is in it if its span
                [time, time + duration) meets it. None: open.
            frame_indexes: only these ranks, ascending; None: all.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        ids = self._published_among(video_numbers)
        return find_frames(self._parts.uri, self._parts.bounds(), ids, start_seconds, end_seconds, frame_indexes)

    def rows(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> Rows:
        """Where the same frames lie; as `find` otherwise."""
        ids, bounds = self._published_among(video_numbers), self._parts.bounds()
        found = find_rows(self._parts.uri, bounds, ids, start_seconds, end_seconds, frame_indexes)
        return {bounds.path[place]: rows for place, rows in found}

    def refs_of(self, rows: Rows) -> Iterator[list[FrameRef]]:
        """The frames of rows of published parts, part after part, by video and time.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds, ids = self._parts.bounds(), self._videos.published()
        for place in np.lexsort((bounds.first_seconds, bounds.video_number)).tolist():
            if bounds.path[place] in rows:
                yield refs_of_part(self._parts.uri, bounds, place, ids, rows[bounds.path[place]])

    def at(self, video_number: int, seconds: float) -> FrameRef | None:
        """The frame that is shown at a position; None where no published frame is.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        return next(reversed(self.find(video_number, seconds, seconds + 1e-6)), None)

    def of_hits(self, hits: Sequence[Hit]) -> list[FrameRef]:
        """The frames that a search found, in the order of the hits."""
        return find_hits(self._parts.uri, self._parts.bounds(), self._videos.published(), hits)

    def _published_among(self, video_numbers: int | Iterable[int] | None) -> dict[int, str]:
        ids = self._videos.published()
        if video_numbers is None:
            return ids
        chosen = [video_numbers] if isinstance(video_numbers, int) else list(video_numbers)
        return {number: ids[number] for number in chosen if number in ids}
