"""repair: takes out of an archive what is damaged, so that the rest is whole and the gaps can be indexed again."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from storage.archive import open_archive
from storage.errors import ArchiveError
from storage.files import join, local_path, source_text
from storage.records import VideoRow
from storage.settings import TABLES
from storage.tables import LOG, RowTable, cut_short_commit
from storage.vectors import drop_index, update_index
from storage.verify import Verification, verify


@dataclass(frozen=True)
class Repair:
    """What was done.

    Attributes:
        found: what was wrong before.
        to_index: rows of videos that lost frames; they are partial until they are indexed again.
        notes: what else was lost or set aside, one line each.
    """

    found: Verification
    to_index: tuple[VideoRow, ...]
    notes: tuple[str, ...]


def repair(uri: str) -> Repair:
    """Makes an archive whole again, as far as what it still holds allows.

    Raises:
        UsageError: there is no archive.
        ArchiveError: it cannot be written, or its log is damaged beyond its newest commit.
    """
    notes = [*_roll_back(uri)]
    found = verify(uri)
    if any(fault.table is None for fault in found.faults):
        (fault, *_) = [fault for fault in found.faults if fault.table is None]
        raise ArchiveError(
            f"{fault.path}: {fault.detail}; this cannot be repaired: restore the archive from a copy, or index the "
            "videos again into a new --archive"
        )
    rest = found
    if any(fault.table in ("videos", "numbers") and fault.file for fault in found.faults):
        notes += [*_drop_row_files(uri, found)]
        rest = verify(uri)
    if not found.faults:
        return Repair(found, (), tuple(notes))
    archive = open_archive(uri, write=True)
    archive.drop_parts(fault.file for fault in rest.faults if fault.table == "frames" and fault.file)
    rows = archive.recount()
    drop_index(archive)
    update_index(archive)
    return Repair(found, tuple(rows), tuple(notes))


def _roll_back(uri: str) -> Iterator[str]:
    """Sets aside the newest commit of a table where a power cut left it empty or cut short."""
    for name in TABLES:
        table_uri = join(uri, name)
        commit = cut_short_commit(table_uri)
        if commit is not None:
            place = local_path(join(table_uri, LOG, commit))
            os.replace(place, place + b".damaged")
            yield f"{source_text(join(table_uri, LOG, commit))}: this commit was cut short and is set aside"


def _drop_row_files(uri: str, found: Verification) -> Iterator[str]:
    for fault in found.faults:
        if fault.table in ("videos", "numbers") and fault.file:
            RowTable(join(uri, fault.table)).drop_file(fault.file)
            yield f"{fault.path}: damaged, taken out of the archive"
    archive = open_archive(uri, write=True)
    archive.restore_numbers()
    lost = archive.count_without_row()
    if lost:
        yield (
            f"the rows of {lost} videos are lost, their frames are not: `vidx index` on their sources shows them again "
            "without decoding them"
        )
