"""Joins the small parts of videos into larger ones while the archive is in use.

Parts are joined within a video, in the order of their segments, and stay ordinary parts: the segment of a joined one
reaches from the start of its first to the end of its last. Readers that are at work go on with the old files, which
`clean` removes when they are old enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import groupby

import numpy as np

from storage.archive.archive import Archive
from storage.archive.claims import Job
from storage.archive.part_table import PartBounds
from storage.errors import ArchiveError
from storage.parts.layout import read_part_columns
from storage.parts.read import has_column, read_compressor_out, read_keys, read_patches, read_thumbnails, read_tokens
from storage.parts.write import FrameColumns, PartWriter
from storage.records import FrameRef, Part, Status, TokenBatch, joined_key, segment_range
from storage.vectors.vector_index import improve_index, update_index

TARGET_BYTES = 128 << 20  # parts are joined up to this
BATCH_PARTS = 256  # that are joined before they are committed and the index follows
CHUNK_ROWS = 64  # read at once
_OF_PART = ("video_id", "video_number", "segment", "time_base_num", "time_base_den", "model_id", "sampling", "dtype")
_OF_FRAME = tuple(field.name for field in fields(FrameColumns))


@dataclass(frozen=True)
class Compacted:
    """What was done, in parts and videos; problems are of parts that could not be read, a line each."""

    videos: int
    parts_joined: int
    parts_written: int
    problems: tuple[str, ...] = ()


def compact(
    archive: Archive, target_bytes: int = TARGET_BYTES, report: Callable[[int, int], None] = lambda done, total: None
) -> Compacted:
    """Joins the parts of each whole video, and brings the index up to it.

    What was joined before an interrupt stays so. A video with a part that cannot be read is left as it is.

    Args:
        archive: which.
        target_bytes: how large parts may become; larger ones are left as they are.
        report: told after each commit how many of how many parts have been dealt with.
    Raises:
        ArchiveError: the archive cannot be written, or its index not be brought up.
    """
    archive.refresh()
    videos, joined, written, done, problems = set(), 0, 0, 0, []
    with Job(archive.uri):  # so that `clean` leaves alone what is written here
        runs = list(_runs(archive, target_bytes))
        total = sum(len(paths) for _, paths in runs)
        for batch in _batches(runs):
            waiting = []
            for number, paths in batch:
                try:
                    waiting.append((number, _join(archive, paths), paths))
                except ArchiveError as error:
                    problems.append(str(error))
            landed = archive.parts.join([(part, paths) for _, part, paths in waiting])
            for (number, _, paths), has_landed in zip(waiting, landed, strict=True):
                if has_landed:
                    videos.add(number)
                    joined, written = joined + len(paths), written + 1
            update_index(archive)
            done += sum(len(paths) for _, paths in batch)
            report(done, total)
    if joined:
        improve_index(archive)
    return Compacted(len(videos), joined, written, tuple(problems))


def _runs(archive: Archive, target_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """Number of a video and paths of parts to be joined, in order."""
    bounds = archive.parts.bounds()
    counts = bounds.frame_counts()
    whole = {
        row.video_number
        for row in archive.videos.all()
        if row.status is Status.INDEXED and row.frame_count == counts[row.known_number]
    }
    places: dict[int, list[int]] = {}
    for place, number in enumerate(bounds.video_number.tolist()):
        if number in whole:
            places.setdefault(number, []).append(place)
    for number, own in sorted(places.items()):
        own.sort(key=lambda place: segment_range(str(bounds.segment[place]))[0])
        for run in _by_size(bounds, own, target_bytes):
            if len(run) < 2:
                continue
            paths = bounds.path[run].tolist()
            for _, alike in groupby(paths, key=lambda path: _dtype(archive, path)):
                if len(chosen := list(alike)) > 1:
                    yield number, chosen


def _by_size(bounds: PartBounds, places: Sequence[int], target_bytes: int) -> Iterator[list[int]]:
    """Runs of one video's parts that together are no larger than the target."""
    run: list[int] = []
    size = 0
    for place in places:
        if run and size + bounds.size_bytes[place] > target_bytes:
            yield run
            run, size = [], 0
        run.append(place)
        size += int(bounds.size_bytes[place])
    yield run


def _batches(runs: Sequence[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    batch: list[tuple[int, list[str]]] = []
    for run in runs:
        batch.append(run)
        if sum(len(paths) for _, paths in batch) >= BATCH_PARTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _dtype(archive: Archive, path: str) -> str:
    """What the part was computed in; nothing for one that cannot be read, which joining says."""
    try:
        return _constants(archive, path)["dtype"]
    except ArchiveError:
        return ""


def _constants(archive: Archive, path: str) -> dict:
    """What all rows of a part have in common."""
    return read_part_columns(archive.frames_uri, path, _OF_PART).slice(0, 1).to_pylist()[0]


def _join(archive: Archive, paths: Sequence[str]) -> Part:
    """Writes the rows of several parts, each cell checked against its checksum, as one."""
    constants = [_constants(archive, path) for path in paths]
    first = constants[0]
    writer = PartWriter(
        archive.frames_uri,
        video_id=first["video_id"],
        video_number=first["video_number"],
        segment_key=joined_key([each["segment"] for each in constants]),
        time_base=Fraction(first["time_base_num"], first["time_base_den"]),
        model_id=first["model_id"],
        sampling=first["sampling"],
        dtype=first["dtype"],
    )
    try:
        for path in paths:
            table = read_part_columns(archive.frames_uri, path, _OF_FRAME)
            times = FrameColumns(*(table.column(name).to_numpy() for name in _OF_FRAME))
            for start in range(0, len(times), CHUNK_ROWS):
                rows = np.arange(start, min(start + CHUNK_ROWS, len(times)))
                columns = FrameColumns(*(getattr(times, name)[rows] for name in _OF_FRAME))
                refs = [_ref(first, columns, place, path, row) for place, row in enumerate(rows.tolist())]
                writer.append(columns, _tokens(archive, refs), read_thumbnails(archive.frames_uri, refs))
        part = writer.close()
        assert part is not None  # the parts had rows
        return part
    except BaseException:
        writer.abort()
        raise


def _ref(constants: dict, columns: FrameColumns, place: int, path: str, row: int) -> FrameRef:
    return FrameRef(
        constants["video_id"],
        constants["video_number"],
        int(columns.frame_index[place]),
        int(columns.ticks[place]),
        float(columns.time_seconds[place]),
        float(columns.duration_seconds[place]),
        path,
        row,
    )


def _tokens(archive: Archive, refs: Sequence[FrameRef]) -> TokenBatch:
    uri = archive.frames_uri
    return TokenBatch(
        read_tokens(uri, refs),
        read_compressor_out(uri, refs),
        read_keys(uri, refs) if has_column(uri, "search_key", refs) else None,
        read_patches(uri, refs) if has_column(uri, "patches", refs) else None,
    )
