"""Joins the small parts of videos into larger ones, while the archive is in use.

Parts are joined within a video, in the order of their segments. A joined part is an ordinary part: its segment reaches
from the start of the first to the end of the last. Readers at work continue with the old files, which `clean` removes
when they are old enough.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import groupby
from typing import TypeVar

from storage.archive.archive import Archive
from storage.archive.claims import Job
from storage.errors import ArchiveError
from storage.parts.layout import read_part_columns
from storage.parts.read import has_column, read_compressor_out, read_keys, read_patches, read_thumbnails, read_tokens
from storage.parts.write import FrameColumns, PartWriter
from storage.records import FrameRef, Part, Status, TokenBatch, joined_key, segment_range
from storage.vectors.vector_index import improve_index, update_index

T = TypeVar("T")
TARGET_BYTES = 128 << 20  # parts are joined up to this
BATCH_PARTS = 256  # the most that are joined in one commit, after which the index is updated
CHUNK_ROWS = 64  # read at a time
_VIDEO = ("video_id", "video_number", "model_id", "sampling")
_PART_COLUMNS = (*_VIDEO, "segment", "time_base_num", "time_base_den", "dtype")
_FRAME_COLUMNS = tuple(field.name for field in fields(FrameColumns))


@dataclass(frozen=True)
class Compacted:
    """The number of videos and parts that were joined; `problems` has one line for each part that cannot be read."""

    videos: int
    parts_joined: int
    parts_written: int
    problems: tuple[str, ...] = ()


def compact(
    archive: Archive, target_bytes: int = TARGET_BYTES, report: Callable[[int, int], None] = lambda done, total: None
) -> Compacted:
    """Joins the parts of each whole video, and updates the index.

    What was joined before an interrupt stays joined. Parts that cannot be read stay as they are.

    Args:
        archive: the archive.
        target_bytes: the largest size of a joined part.
        report: called after each commit with the number of parts done and of all.
    Raises:
        ArchiveError: the archive or its index cannot be written.
    """
    archive.refresh()
    videos, joined, written, done, problems = set(), 0, 0, 0, []
    with Job(archive.uri):  # so that `clean` leaves alone what is written here
        runs = list(_runs(archive, target_bytes))
        total = sum(len(paths) for _, paths in runs)
        for batch in _grouped(runs, lambda run: len(run[1]), BATCH_PARTS):
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
    """The parts to join: the number of a video and the paths, in order."""
    bounds = archive.parts.bounds()
    counts = bounds.frame_counts()
    rows = archive.videos.arrow(("video_number", "status", "frame_count")).to_pydict()
    whole = {
        number
        for number, status, count in zip(*rows.values(), strict=True)
        if status == Status.INDEXED and count == counts[number]
    }
    places: dict[int, list[int]] = {}
    for place, number in enumerate(bounds.video_number.tolist()):
        if number in whole:
            places.setdefault(number, []).append(place)
    for number, own in sorted(places.items()):
        own.sort(key=lambda place: segment_range(str(bounds.segment[place]))[0])
        for run in _grouped(own, lambda place: int(bounds.size_bytes[place]), target_bytes):
            paths = bounds.path[run].tolist() if len(run) > 1 else []
            for _, alike in groupby(paths, key=lambda path: _dtype(archive, path)):
                if len(chosen := list(alike)) > 1:
                    yield number, chosen


def _grouped(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Splits items into groups, in order, each of them no larger than `most` or a single item."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def _dtype(archive: Archive, path: str) -> str:
    """The dtype of a part; empty if it cannot be read, which is reported when it is joined."""
    try:
        return _constants(archive, path)["dtype"]
    except ArchiveError:
        return ""


def _constants(archive: Archive, path: str) -> dict:
    """The columns that are the same in all rows of a part."""
    return read_part_columns(archive.frames_uri, path, _PART_COLUMNS).slice(0, 1).to_pylist()[0]


def _join(archive: Archive, paths: Sequence[str]) -> Part:
    """Writes the rows of several parts as one part; each cell is checked against its checksum."""
    constants = [_constants(archive, path) for path in paths]
    first = constants[0]
    writer = PartWriter(
        archive.frames_uri,
        **{name: first[name] for name in (*_VIDEO, "dtype")},
        segment_key=joined_key([each["segment"] for each in constants]),
        time_base=Fraction(first["time_base_num"], first["time_base_den"]),
        folder=archive.parts.folder_of(first["video_number"]),
    )
    try:
        for path in paths:
            table = read_part_columns(archive.frames_uri, path, _FRAME_COLUMNS)
            for start in range(0, table.num_rows, CHUNK_ROWS):
                piece = table.slice(start, CHUNK_ROWS)
                columns = FrameColumns(*(piece.column(name).to_numpy() for name in _FRAME_COLUMNS))
                times = piece.drop_columns("pts_seconds").to_pylist()
                video = {"video_id": first["video_id"], "video_number": first["video_number"]}
                refs = [FrameRef(**video, **each, part=path, row=row) for row, each in enumerate(times, start)]
                writer.append(columns, _tokens(archive, refs), read_thumbnails(archive.frames_uri, refs))
        part = writer.close()
        assert part is not None  # the parts had rows
        return part
    except BaseException:
        writer.abort()
        raise


def _tokens(archive: Archive, refs: Sequence[FrameRef]) -> TokenBatch:
    uri = archive.frames_uri
    return TokenBatch(
        read_tokens(uri, refs),
        read_compressor_out(uri, refs),
        read_keys(uri, refs) if has_column(uri, "search_key", refs) else None,
        read_patches(uri, refs) if has_column(uri, "patches", refs) else None,
    )
