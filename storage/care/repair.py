"""repair: removes what is damaged from an archive, so that the rest can be used and the gaps can be indexed again."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.archive.archive import Archive, archive_exists, open_archive
from storage.archive.delta import LOG, cut_short_commit, damaged_checkpoints
from storage.archive.frames import read_times
from storage.archive.part_table import table_folders
from storage.archive.row_table import drop_file
from storage.archive.settings import archive_uri
from storage.care.verify import BEYOND_REPAIR, Fault, Verification, verify
from storage.errors import ArchiveError
from storage.files import file_path, join, source_text
from storage.parts.read import part_identity, part_keys
from storage.records import Problem, Reason, VideoRow
from storage.vectors.vector_index import drop_index, improve_index, update_index

WhyNot = Callable[[Archive, Sequence[VideoRow]], Mapping[str, Problem]]


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Attributes:
        found: the faults before the repair.
        to_index: rows of videos that lost frames; they are partial until they are indexed again.
        notes: what else was lost or set aside, one line each.
        rows_lost: the number of videos that have frames, but no row any more.
        spared: rows of videos that keep damaged parts, because they cannot be indexed again and their other frames can
            be read; the row's problem says why they cannot.
        left: the other faults that remain.
    """

    found: Verification
    to_index: tuple[VideoRow, ...]
    notes: tuple[str, ...]
    rows_lost: int = 0
    spared: tuple[VideoRow, ...] = ()
    left: tuple[Fault, ...] = ()


def repair(uri: str, why_not: WhyNot = lambda archive, rows: {}) -> Repair:
    """Removes damaged files, rows and frames, and builds the index again.

    Args:
        uri: the archive's.
        why_not: gives for videos, by video_id, why they cannot be indexed again; their readable frames are kept.
    Raises:
        UsageError: there is no archive.
        ArchiveError: it cannot be written, or more of its log is damaged than the newest commit.
    """
    if not archive_exists(uri):
        open_archive(uri)  # raises the error
    uri = archive_uri(uri)
    notes = [*_roll_back(uri)]
    found = verify(uri)
    for fault in found.faults:
        if fault.table is None:
            raise ArchiveError(f"{fault.path}: {fault.detail}; {BEYOND_REPAIR}")
    dropped = [*_drop_row_files(uri, found)]
    notes += dropped
    archive = open_archive(uri, write=True)
    spared = _drop_frames(archive, found, why_not)
    archive.restore_numbers()
    if dropped:  # damage to the tables of rows hides other damage
        spared = _drop_frames(archive, verify(uri), why_not)
    rows = archive.videos.recount()
    again = {row.video_id for row in rows}
    damaged = archive.videos.having("reason", Reason.DAMAGED)  # some lost frames in an earlier repair
    rows += [row for row in damaged if row.video_id not in again]
    lost = len(archive.unpublished_numbers() - archive.deleted_numbers()) if notes else 0
    if lost:
        notes.append(
            f"the rows of {lost} videos are lost, with their sources, tags and capture times. Their frames are not "
            "lost: run `vidx index` on their sources, with the manifest that gave the tags. It shows the frames again "
            "without decoding, unless `vidx clean` has removed them before. It is not known any more which of the "
            "videos were deleted: leave those out, or delete them again"
        )
    if not found.faults:
        return Repair(found, tuple(rows), tuple(notes), lost)
    drop_index(archive)
    update_index(archive)
    improve_index(archive)
    left = tuple(fault for fault in verify(uri).faults if fault.table != "frames" or fault.file not in spared)
    kept = {row.video_id: row for row in spared.values()}
    return Repair(found, tuple(rows), tuple(notes), lost, tuple(kept.values()), left)


def _drop_frames(archive: Archive, found: Verification, why_not: WhyNot) -> dict[str, VideoRow]:
    """Removes damaged parts, and all parts of a video that has frames twice, as it is unknown which are right.

    Returns:
        The damaged parts that stay, by path, with the rows of their videos.
    """
    bounds = archive.parts.bounds()
    damaged = {fault.file for fault in found.faults if fault.table == "frames" and fault.file}
    doubled = {fault.video_number for fault in found.faults if fault.video_number is not None}
    twice = {path for number in doubled for path in bounds.path[bounds.of(number)].tolist()}
    owners = dict(zip(bounds.path.tolist(), bounds.video_number.tolist(), strict=True))
    rows = archive.videos.of_numbers({owners[path] for path in damaged - twice if path in owners})
    why = why_not(archive, [*rows.values()]) if rows else {}
    spared = {
        path: replace(row, problem=why[row.known_id])
        for path in damaged - twice
        if (row := rows.get(owners.get(path, 0))) and row.video_id in why and _can_be_read(archive, path, row)
    }
    archive.parts.drop((damaged | twice) - set(spared))
    return spared


def _can_be_read(archive: Archive, path: str, row: VideoRow) -> bool:
    """Whether the times, the video and all search keys of a damaged part can still be read."""
    try:
        read_times(archive.frames_uri, path)
        part_keys(archive.frames_uri, path)
        return part_identity(archive.frames_uri, path)["video_number"] == row.video_number
    except ArchiveError:
        return False


def _roll_back(uri: str) -> Iterator[str]:
    """Sets aside files of a log that a power cut left empty or cut short: the newest commit, and summaries."""
    for name, folder in table_folders(uri):
        table_uri = join(uri, name, folder)
        for summary in damaged_checkpoints(table_uri):
            yield _set_aside(join(table_uri, LOG, summary), "this summary of the log is damaged")
        commit = cut_short_commit(table_uri)
        if commit is not None:
            yield _set_aside(join(table_uri, LOG, commit), "this commit was cut short")


def _set_aside(uri: str, what: str) -> str:
    place = file_path(uri)
    os.replace(place, place + b".damaged")
    return f"{source_text(uri)}: {what} and is set aside"


def _drop_row_files(uri: str, found: Verification) -> Iterator[str]:
    for fault in found.faults:
        if fault.table in ("videos", "numbers") and fault.file:
            drop_file(join(uri, fault.table), fault.file)
            yield f"{fault.path}: damaged, removed from the archive"
