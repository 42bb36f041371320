"""Finds stored frames by video, time or index: parts are skipped by the bounds in Delta's log, the rest are read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from storage.checked import INT32, Wrong, check_texts
from storage.errors import ArchiveError, DamagedError
from storage.files import join, source_text
from storage.parts.layout import MOST_SECONDS, read_errors, read_part_columns
from storage.records import SEGMENT_KEY, FrameRef, Hit

_BOUNDS = (
    "min.video_number",
    "max.video_number",
    "num_records",
    "min.frame_index",
    "max.frame_index",
    "min.time_seconds",
    "max.time_seconds",
    "max.duration_seconds",
)


Rows = Mapping[str, np.ndarray | None]  # rows of parts by path, ascending; None for all rows of one


class LivePart(NamedTuple):
    """A committed part; all its rows belong to one video.

    A tuple, since there is one for each part: opening an archive of ten million frames makes 33,000 of them, which took
    60 ms longer as dataclasses.
    """

    path: str
    video_number: int
    row_count: int


@dataclass(frozen=True, repr=False)
class PartBounds:
    """What Delta's log says of each of P committed parts: all arrays (P,), in no particular order."""

    path: np.ndarray
    segment: np.ndarray
    size_bytes: np.ndarray
    video_number: np.ndarray
    row_count: np.ndarray
    first_index: np.ndarray
    last_index: np.ndarray
    first_seconds: np.ndarray
    last_seconds: np.ndarray
    longest_seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    def __repr__(self) -> str:
        return f"PartBounds({len(self)} parts)"

    def frame_counts(self) -> Counter[int]:
        """How many frames each video has, by its number."""
        counts: Counter[int] = Counter()
        for number, count in zip(self.video_number.tolist(), self.row_count.tolist(), strict=True):
            counts[number] += count
        return counts

    def of(self, video_number: int) -> np.ndarray:
        """Places of one video's parts."""
        return np.flatnonzero(self.video_number == video_number)


@dataclass(frozen=True, repr=False)
class Times:
    """When each row of a part is shown, in file order, (T,) each."""

    ticks: np.ndarray
    frame_index: np.ndarray
    time_seconds: np.ndarray
    duration_seconds: np.ndarray


def part_bounds(frames_uri: str, files: pa.Table) -> PartBounds:
    """Columns of Delta's log as arrays.

    Raises:
        ArchiveError: a part carries no bounds, so another program wrote it.
    """
    if files.num_rows == 0:
        empty = np.empty(0, np.int64)
        return PartBounds(empty.astype(object), empty.astype(object), *[empty] * 8)
    place = source_text(frames_uri)
    missing = [name for name in (*_BOUNDS, "min.segment") if name not in files.column_names]
    if missing or any(files.column(name).null_count for name in (*_BOUNDS, "min.segment")):
        raise ArchiveError(f"{place}: damaged archive: a part was committed without bounds; vidx did not write it")
    number, last_number, *others = (files.column(name).to_numpy() for name in _BOUNDS)
    if not np.array_equal(number, last_number):
        raise ArchiveError(f"{place}: damaged archive: a part holds several videos; vidx did not write it")
    found = PartBounds(
        np.array(files.column("path").to_pylist(), object),
        np.array(files.column("min.segment").to_pylist(), object),
        files.column("size_bytes").to_numpy(),
        number.astype(np.int64),
        *others,
    )
    with read_errors(frames_uri):
        check_texts("segment", files.column("min.segment"), SEGMENT_KEY)
        _check_bounds(found)
    return found


def _check_bounds(bounds: PartBounds) -> None:
    """Raises Wrong where the log says something of a part that cannot be."""
    fit = (
        (bounds.size_bytes > 0)
        & (bounds.video_number >= 1)
        & (bounds.video_number <= INT32)
        & (bounds.row_count >= 1)
        & (bounds.row_count <= bounds.size_bytes)
        & (bounds.first_index >= 0)
        & (bounds.row_count - 1 <= bounds.last_index - bounds.first_index)
        & (bounds.last_index < 1 << 32)
        & (bounds.first_seconds >= -MOST_SECONDS)
        & (bounds.first_seconds <= bounds.last_seconds)
        & (bounds.last_seconds <= MOST_SECONDS)
        & (bounds.longest_seconds >= 0)
        & (bounds.longest_seconds <= MOST_SECONDS)
    )
    if not fit.all():  # NaN is in no range
        raise Wrong(f"the log's bounds of {bounds.path[~fit][0]} cannot be those of a part")


def find_rows(
    frames_uri: str,
    bounds: PartBounds,
    video_numbers: Iterable[int],
    start_seconds: float | None,
    end_seconds: float | None,
    frame_indexes: np.ndarray | None = None,
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Places of parts in `bounds`, each with its rows, ascending, that are wanted, or None for all of its rows.

    Only parts that reach over an end of the range are opened.

    Args:
        frames_uri: the frames table.
        bounds: its parts.
        video_numbers: of these videos.
        start_seconds, end_seconds: half-open range of positions; a frame is in it if its span meets it. None: open.
        frame_indexes: only these ranks, ascending, or None for all.
    Raises:
        ArchiveError: a part is missing or damaged.
    """
    wanted = np.isin(bounds.video_number, np.fromiter(video_numbers, np.int64))
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
        times = _times(frames_uri, bounds, place)
        rows = np.ones(len(times.ticks), bool)
        if start_seconds is not None:
            rows &= (times.time_seconds + times.duration_seconds > start_seconds) | (
                times.time_seconds >= start_seconds
            )
        if end_seconds is not None:
            rows &= times.time_seconds < end_seconds
        if frame_indexes is not None:
            rows &= np.isin(times.frame_index, frame_indexes)
        if rows.any():
            yield place, np.flatnonzero(rows)


def find_frames(
    frames_uri: str,
    bounds: PartBounds,
    video_ids: Mapping[int, str],
    start_seconds: float | None,
    end_seconds: float | None,
    frame_indexes: np.ndarray | None = None,
) -> list[FrameRef]:
    """Frames of the given videos, by video number and time; arguments as find_rows.

    Args:
        video_ids: id of each video wanted, by number.
    """
    found = []
    for place, rows in find_rows(frames_uri, bounds, video_ids, start_seconds, end_seconds, frame_indexes):
        found += refs_of_part(frames_uri, bounds, place, video_ids, rows)
    return sorted(found, key=lambda ref: (ref.video_number, ref.ticks))


def find_hits(frames_uri: str, bounds: PartBounds, video_ids: Mapping[int, str], hits: Sequence[Hit]) -> list[FrameRef]:
    """The frames that a search found, in the same order.

    Raises:
        ArchiveError: a hit's frame is not stored.
    """
    by_video: dict[int, list[int]] = {}
    for hit in hits:
        by_video.setdefault(hit.video_number, []).append(hit.frame_index)
    found = {}
    for number, indexes in by_video.items():
        if number in video_ids:
            wanted = np.unique(np.array(indexes, np.int64))
            for ref in find_frames(frames_uri, bounds, {number: video_ids[number]}, None, None, wanted):
                found[number, ref.frame_index] = ref
    missing = [hit for hit in hits if (hit.video_number, hit.frame_index) not in found]
    if missing:
        place = source_text(frames_uri)
        raise DamagedError(f"{place}: damaged archive: {missing[0]} is in the index but not among the frames")
    return [found[hit.video_number, hit.frame_index] for hit in hits]


def _times(frames_uri: str, bounds: PartBounds, place: int) -> Times:
    """Of a part, which must have as many rows as the log says: what is reckoned by that goes through no part."""
    times, count = read_times(frames_uri, bounds.path[place]), int(bounds.row_count[place])
    if len(times.ticks) != count:
        uri = source_text(join(frames_uri, bounds.path[place]))
        raise DamagedError(f"{uri}: damaged: it has {len(times.ticks)} rows, and {count} by the log")
    return times


def rows_of(frames: Iterable[FrameRef]) -> Rows:
    """Where frames lie."""
    found: dict[str, list[int]] = {}
    for frame in frames:
        found.setdefault(frame.part, []).append(frame.row)
    return {path: np.unique(np.array(rows, np.int64)) for path, rows in found.items()}


def refs_of_part(
    frames_uri: str, bounds: PartBounds, place: int, video_ids: Mapping[int, str], rows: np.ndarray | None
) -> list[FrameRef]:
    """Frames of one part, in file order.

    Args:
        frames_uri: the frames table.
        bounds: its parts.
        place: of the part among them.
        video_ids: id of each video, by number.
        rows: which, or None for all.
    Raises:
        ArchiveError: the part is missing or damaged.
    """
    times, path, number = _times(frames_uri, bounds, place), bounds.path[place], int(bounds.video_number[place])
    video_id = video_ids[number]
    rows = np.arange(len(times.ticks)) if rows is None else rows
    columns = (times.frame_index, times.ticks, times.time_seconds, times.duration_seconds)
    return [
        FrameRef(video_id, number, frame_index, ticks, time_seconds, duration_seconds, path, row)
        for row, frame_index, ticks, time_seconds, duration_seconds in zip(
            rows.tolist(), *(column[rows].tolist() for column in columns), strict=True
        )
    ]


@lru_cache(maxsize=1024)
def read_times(frames_uri: str, path: str) -> Times:
    """The times of a part's rows.

    Raises:
        ArchiveError: the part is missing or damaged.
    """
    names = ("ticks", "frame_index", "time_seconds", "duration_seconds")
    table = read_part_columns(frames_uri, path, names)
    return Times(*(table.column(name).to_numpy() for name in names))
