"""Removes what is not needed any more: what killed jobs left behind, and what was replaced."""

import contextlib
import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from storage.archive.archive import Archive
from storage.archive.claims import Job, remove_ended_jobs
from storage.archive.delta import unnamed_files
from storage.archive.part_table import table_folders
from storage.files import file_path, join, list_names, remove
from storage.vectors.index_manifest import TRAINING, locked
from storage.vectors.vector_index import improve_index, named_files, update_index

UNNAMED_KEPT_SECONDS = 7 * 24 * 3600  # longer than any job or reader uses the files that it has opened

MARGIN_SECONDS = 5.0  # clocks and file times are not more exact; files of the last seconds are kept


@dataclass(frozen=True)
class Cleaned:
    """The number of removed frames, which no row showed, and of removed files, which no table or index named."""

    frames: int
    files: int


def clean(archive: Archive, older_than_seconds: int) -> Cleaned:
    """Removes frames that no row shows, if they were written so long ago, and files that nothing names.

    Until then, a killed job continues from such frames, and `vidx index` with the settings of the frames shows them
    again. Frames of a video that a job has taken stay.

    Raises:
        ArchiveError: a table or a part cannot be read, or the archive cannot be written.
    """
    frames = _drop_unpublished(archive, min(_newest_removable(archive), time.time() - older_than_seconds))
    update_index(archive, max_retired=0)
    improve_index(archive)
    return Cleaned(frames, remove_unnamed_files(archive, older_than_seconds))


def remove_unnamed_files(
    archive: Archive, older_than_seconds: int = UNNAMED_KEPT_SECONDS, *, in_opened: bool = False
) -> int:
    """Removes files that were written, or have been unnamed, for so long; returns their number.

    Each version of a table stays readable for so long after the next version was made. What was written since the
    oldest running job began stays: it may be about to be committed.

    Args:
        archive: whose files.
        older_than_seconds: how long they are kept.
        in_opened: only in the shards that the archive has opened; a job does so for what it has changed.
    Raises:
        ArchiveError: a table cannot be read.
    """
    now, newest = time.time(), _newest_removable(archive)  # before the listing: a job may end during it
    found = []
    opened = archive.parts.opened
    for name, folder in table_folders(archive.uri):
        if in_opened and name == "frames" and folder not in opened:
            continue
        table_uri = join(archive.uri, name, folder)
        unnamed = unnamed_files(table_uri, math.ceil(older_than_seconds / 3600))
        found += [uri for uri in (join(table_uri, path) for path in unnamed) if _modified(uri) < newest]
    newest = min(newest, now - older_than_seconds)
    with locked(archive, TRAINING, wait=False) as is_alone, locked(archive):  # nobody is writing files of the index
        kept = named_files(archive)
        for name in list_names(archive.index_uri) if is_alone else ():
            uri = join(archive.index_uri, name)
            if name not in kept and _modified(uri) < newest:
                found.append(uri)
        removed = 0
        for uri in found:
            with contextlib.suppress(OSError):
                remove(uri)
                removed += 1
    return removed


def _newest_removable(archive: Archive) -> float:
    """The time before which a file must have been written to be removed."""
    started = remove_stale_claims(archive)
    return (time.time() if started is None else min(time.time(), started)) - MARGIN_SECONDS


def remove_stale_claims(archive: Archive) -> float | None:
    """Removes claims of jobs that have ended, except those of videos with frames that no row shows yet.

    A job calls this when it begins: a killed job may have left the claim of a video whose row the new job replaces.

    Returns:
        When the oldest running job began, or None.
    """

    def unpublished(numbers: Collection[int]) -> set[int]:
        archive.refresh()  # a job that has ended committed everything before its end was noticed
        return archive.unpublished_numbers(numbers)

    return remove_ended_jobs(archive.uri, unpublished)


def _drop_unpublished(archive: Archive, written_before: float) -> int:
    """Takes out frames that no row shows, of videos that no job has taken; returns their number."""
    archive.refresh()
    bounds, unpublished = archive.parts.bounds(), archive.unpublished_numbers()
    written = dict.fromkeys(unpublished, -math.inf)
    for number, path in zip(bounds.video_number.tolist(), bounds.path.tolist(), strict=True):
        if number in unpublished:
            written[number] = max(written[number], _modified(join(archive.frames_uri, path)))
    old = [number for number in unpublished if written[number] < written_before]
    if not old:
        return 0
    with Job(archive.uri) as job:
        alone = job.is_alone()  # matters on file systems where claims cannot be made
        taken = [number for number in old if job.take(number, lease_seconds=math.inf) and (alone or job.holds(number))]
        archive.refresh()  # a job that had taken one of them may have published it
        bounds = archive.parts.bounds()
        chosen = np.isin(bounds.video_number, [*archive.unpublished_numbers() & set(taken)])
        archive.parts.drop(bounds.path[chosen].tolist())
        archive.videos.recount()  # a row may have been published while this process slept: the next job completes it
        return int(bounds.row_count[chosen].sum())


def _modified(uri: str) -> float:
    try:
        return os.lstat(file_path(uri)).st_mtime
    except FileNotFoundError:  # a running job has removed it
        return math.inf
