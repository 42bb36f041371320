"""repair: takes out of an archive what is damaged, so that the rest is whole and the gaps can be indexed again."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from storage.archive import Archive, open_archive
from storage.errors import ArchiveError
from storage.files import join, local_path, source_text
from storage.records import VideoRow
from storage.settings import TABLES
from storage.tables import LOG, RowTable, cut_short_commit, damaged_checkpoints
from storage.vectors import drop_index, improve_index, update_index
from storage.verify import BEYOND_REPAIR, Fault, Verification, verify


@dataclass(frozen=True)
class Repair:
    """What was done.

    Attributes:
        found: what was wrong before.
        to_index: rows of videos that lost frames; they are partial until they are indexed again.
        notes: what else was lost or set aside, one line each.
        rows_lost: how many videos have frames and no row any more.
        left: what is still wrong.
    """

    found: Verification
    to_index: tuple[VideoRow, ...]
    notes: tuple[str, ...]
    rows_lost: int = 0
    left: tuple[Fault, ...] = ()


def repair(uri: str) -> Repair:
    """Makes an archive whole again, as far as what it still holds allows.

    Raises:
        UsageError: there is no archive.
        ArchiveError: it cannot be written, or its log is damaged beyond its newest commit.
    """
    notes = [*_roll_back(uri)]
    found = verify(uri)
    for fault in found.faults:
        if fault.table is None:
            raise ArchiveError(f"{fault.path}: {fault.detail}; {BEYOND_REPAIR}")
    dropped = [*_drop_row_files(uri, found)]
    notes += dropped
    archive = open_archive(uri, write=True)
    _drop_frames(archive, found)
    archive.restore_numbers()
    if dropped:  # damage to the tables of rows hides other kinds
        _drop_frames(archive, verify(uri))
    rows = archive.recount()
    lost = len(archive.hidden_numbers() - archive.deleted_numbers()) if notes else 0
    if lost:
        notes.append(
            f"the rows of {lost} videos are lost, with their sources, tags and capture times, and whether they were "
            "deleted. Their frames are not: `vidx index` on their sources, with the manifest that gave the tags, shows "
            "them again without decoding them, unless `vidx clean` has removed them before. Do not give it what was "
            "deleted, or delete it again"
        )
    if not found.faults:
        return Repair(found, tuple(rows), tuple(notes), lost)
    drop_index(archive)
    update_index(archive)
    improve_index(archive)
    return Repair(found, tuple(rows), tuple(notes), lost, verify(uri).faults)


def _drop_frames(archive: Archive, found: Verification) -> None:
    """Takes out damaged parts, and all parts of a video that has frames twice: nobody can say which are right."""
    bounds = archive.part_bounds()
    damaged = {fault.file for fault in found.faults if fault.table == "frames" and fault.file}
    doubled = {fault.video_number for fault in found.faults if fault.video_number is not None}
    archive.drop_parts(damaged | {path for number in doubled for path in bounds.path[bounds.of(number)].tolist()})


def _roll_back(uri: str) -> Iterator[str]:
    """Sets aside what a power cut left empty or cut short: the newest commit of a table, and summaries of its log."""
    for name in TABLES:
        table_uri = join(uri, name)
        for summary in damaged_checkpoints(table_uri):
            yield _set_aside(join(table_uri, LOG, summary), "this summary of the log is damaged")
        commit = cut_short_commit(table_uri)
        if commit is not None:
            yield _set_aside(join(table_uri, LOG, commit), "this commit was cut short")


def _set_aside(uri: str, what: str) -> str:
    place = local_path(uri)
    os.replace(place, place + b".damaged")
    return f"{source_text(uri)}: {what} and is set aside"


def _drop_row_files(uri: str, found: Verification) -> Iterator[str]:
    for fault in found.faults:
        if fault.table in ("videos", "numbers") and fault.file:
            RowTable(join(uri, fault.table)).drop_file(fault.file)
            yield f"{fault.path}: damaged, taken out of the archive"
