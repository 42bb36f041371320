"""The frames of published videos, by video, time or index; parts are skipped by their bounds, the others are read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from storage.archive.part_table import PartTable
from storage.archive.shard import PartBounds
from storage.archive.video_table import VideoTable
from storage.errors import DamagedError
from storage.files import join, source_text
from storage.parts.layout import read_part_columns
from storage.records import FrameRef, Hit

Rows = Mapping[str, np.ndarray | None]  # row numbers of parts, ascending, by the part's path; None: all rows


class LivePart(NamedTuple):
    """A part of a published video; all its rows belong to this video.

    A named tuple, because an archive of ten million frames has 33,000 parts: dataclasses took 60 ms longer.
    """

    path: str
    video_number: int
    row_count: int


@dataclass(frozen=True, repr=False)
class Times:
    """When each row of a part is shown, in file order, (T,) each."""

    ticks: np.ndarray
    frame_index: np.ndarray
    time_seconds: np.ndarray
    duration_seconds: np.ndarray


class FrameTable:
    """The frames of published videos."""

    def __init__(self, parts: PartTable, videos: VideoTable):
        self._parts = parts
        self._videos = videos

    def parts(self) -> list[LivePart]:
        """The parts of published videos."""
        return self.parts_in(self._parts.bounds())

    def parts_in(self, bounds: PartBounds) -> list[LivePart]:
        """Those of some parts that are of published videos."""
        is_live = np.isin(bounds.video_number, self._videos.published().numbers)
        columns = (bounds.path, bounds.video_number, bounds.row_count)
        return [*map(LivePart._make, zip(*(column[is_live].tolist() for column in columns), strict=True))]

    def find(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> list[FrameRef]:
        """The published frames that match, ordered by (video_number, ticks).

        Args:
            video_numbers: one video, several, or None for all.
            start_seconds, end_seconds: half-open range of positions; a frame is in it if [time, time + duration)
                overlaps it. None: no limit.
            frame_indexes: only frames with these ranks, ascending; None: all.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds, matching = self._matching(video_numbers, start_seconds, end_seconds, frame_indexes)
        matches = list(matching)
        ids = self._ids_of(bounds, [place for place, _ in matches])
        found = [ref for place, rows in matches for ref in self._refs(ids, bounds, place, rows)]
        return sorted(found, key=lambda ref: (ref.video_number, ref.ticks))

    def rows(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> Rows:
        """The rows of the same frames, by part; arguments and errors as in `find`."""
        bounds, matching = self._matching(video_numbers, start_seconds, end_seconds, frame_indexes)
        return {bounds.path[place]: rows for place, rows in matching}

    def refs_of(self, rows: Rows) -> Iterator[list[FrameRef]]:
        """The frames in rows of published parts, one list per part, ordered by video and time.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds = self._parts.bounds()
        order = np.lexsort((bounds.first_seconds, bounds.video_number)).tolist()
        places = [place for place in order if bounds.path[place] in rows]
        ids = self._ids_of(bounds, places)
        for place in places:
            yield self._refs(ids, bounds, place, rows[bounds.path[place]])

    def at(self, video_number: int, seconds: float) -> FrameRef | None:
        """The frame that is shown at a position, or None if no published frame is.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        return next(reversed(self.find(video_number, seconds, seconds + 1e-6)), None)

    def of_hits(self, hits: Sequence[Hit]) -> list[FrameRef]:
        """The frames of a search's hits, in the order of the hits.

        Raises:
            ArchiveError: a hit's frame is not stored.
        """
        by_video: dict[int, list[int]] = {}
        for hit in hits:
            by_video.setdefault(hit.video_number, []).append(hit.frame_index)
        found = {}
        for number, indexes in by_video.items():
            for ref in self.find(number, frame_indexes=np.unique(np.array(indexes, np.int64))):
                found[number, ref.frame_index] = ref
        missing = [hit for hit in hits if (hit.video_number, hit.frame_index) not in found]
        if missing:
            place = source_text(self._parts.uri)
            raise DamagedError(f"{place}: damaged archive: {missing[0]} is in the index but not among the frames")
        return [found[hit.video_number, hit.frame_index] for hit in hits]

    def _matching(
        self,
        video_numbers: int | Iterable[int] | None,
        start_seconds: float | None,
        end_seconds: float | None,
        frame_indexes: np.ndarray | None,
    ) -> tuple[PartBounds, Iterator[tuple[int, np.ndarray | None]]]:
        """Bounds of parts, and the places of those that match, each with its rows, ascending, or None for all rows."""
        published = self._videos.published()
        if video_numbers is None:
            bounds, chosen = self._parts.bounds(), published.numbers
        else:
            wanted = [video_numbers] if isinstance(video_numbers, int) else video_numbers
            found = published.ids_of(wanted)
            bounds, chosen = self._parts.bounds(found), np.fromiter(found, np.int64)
        return bounds, self._matching_in(bounds, chosen, start_seconds, end_seconds, frame_indexes)

    def _matching_in(
        self,
        bounds: PartBounds,
        chosen: np.ndarray,
        start_seconds: float | None,
        end_seconds: float | None,
        frame_indexes: np.ndarray | None,
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        """As _matching, for chosen videos; only parts that reach beyond an end of the range are opened."""
        wanted = np.isin(bounds.video_number, chosen)
        whole = wanted.copy()
        if start_seconds is not None:
            wanted &= bounds.last_seconds + bounds.longest_seconds >= start_seconds
            whole &= bounds.first_seconds >= start_seconds
        if end_seconds is not None:
            wanted &= bounds.first_seconds < end_seconds
            whole &= bounds.last_seconds < end_seconds
        if frame_indexes is not None:
            first = np.searchsorted(frame_indexes, bounds.first_index)
            wanted &= first < np.searchsorted(frame_indexes, bounds.last_index, "right")
            whole[:] = False
        for place in np.flatnonzero(wanted).tolist():
            if whole[place]:
                yield place, None
                continue
            times = self._times(bounds, place)
            rows = np.ones(len(times.ticks), bool)
            if start_seconds is not None:
                ends = times.time_seconds + times.duration_seconds
                rows &= (ends > start_seconds) | (times.time_seconds >= start_seconds)
            if end_seconds is not None:
                rows &= times.time_seconds < end_seconds
            if frame_indexes is not None:
                rows &= np.isin(times.frame_index, frame_indexes)
            if rows.any():
                yield place, np.flatnonzero(rows)

    def _ids_of(self, bounds: PartBounds, places: Sequence[int]) -> dict[int, str]:
        """The ids of the videos of some parts, by number."""
        return self._videos.published().ids_of(np.unique(bounds.video_number[places]).tolist())

    def _refs(self, ids: Mapping[int, str], bounds: PartBounds, place: int, rows: np.ndarray | None) -> list[FrameRef]:
        """The frames in some rows of one part, or in all of them, in file order."""
        times = self._times(bounds, place)
        path, number = bounds.path[place], int(bounds.video_number[place])
        video_id = ids[number]
        rows = np.arange(len(times.ticks)) if rows is None else rows
        columns = (times.frame_index, times.ticks, times.time_seconds, times.duration_seconds)
        return [
            FrameRef(video_id, number, frame_index, ticks, time_seconds, duration_seconds, path, row)
            for row, frame_index, ticks, time_seconds, duration_seconds in zip(
                rows.tolist(), *(column[rows].tolist() for column in columns), strict=True
            )
        ]

    def _times(self, bounds: PartBounds, place: int) -> Times:
        """The times of a part's rows; the part must have as many rows as the log says."""
        uri = self._parts.uri
        times, count = read_times(uri, bounds.path[place]), int(bounds.row_count[place])
        if len(times.ticks) != count:
            part = source_text(join(uri, bounds.path[place]))
            raise DamagedError(f"{part}: damaged: it has {len(times.ticks)} rows, and {count} by the log")
        return times


@lru_cache(maxsize=1024)
def read_times(frames_uri: str, path: str) -> Times:
    """The times of a part's rows.

    Raises:
        ArchiveError: the part is missing or damaged.
    """
    names = ("ticks", "frame_index", "time_seconds", "duration_seconds")
    table = read_part_columns(frames_uri, path, names)
    return Times(*(table.column(name).to_numpy() for name in names))
