"""Removes what nothing needs any more: what killed jobs left behind, and what was replaced."""

import contextlib
import math
import os
import time
from dataclasses import dataclass

import numpy as np

from storage.archive.archive import Archive
from storage.archive.claims import Job, oldest_job_start
from storage.archive.delta import unnamed_files
from storage.archive.settings import TABLES
from storage.files import file_path, join, list_names, remove
from storage.vectors.index_manifest import TRAINING, locked
from storage.vectors.vector_index import improve_index, named_files, update_index

UNNAMED_KEPT_SECONDS = 7 * 24 * 3600  # longer than any job or reader works with what it has opened

MARGIN_SECONDS = 5.0  # clocks and file times are not that exact; files of the last seconds are left alone


@dataclass(frozen=True)
class Cleaned:
    """What was removed: frames that no row showed, and files that nothing named."""

    frames: int
    files: int


def clean(archive: Archive, older_than_seconds: int) -> Cleaned:
    """Drops frames that no row shows and that were written so long ago, then sweeps.

    Until then a job that was killed goes on from such frames, and `vidx index` with the settings that they were made
    with shows them again. Frames of a video that a job has taken stay.

    Raises:
        ArchiveError: a table or a part cannot be read, or the archive cannot be written.
    """
    started = _oldest_start(archive)
    newest = time.time() if started is None else min(time.time(), started)
    frames = _drop_hidden(archive, min(newest - MARGIN_SECONDS, time.time() - older_than_seconds))
    update_index(archive, max_retired=0)
    improve_index(archive)
    return Cleaned(frames, remove_unnamed_files(archive, older_than_seconds))


def remove_unnamed_files(archive: Archive, older_than_seconds: int = UNNAMED_KEPT_SECONDS) -> int:
    """Removes unnamed files that were written, or have been unnamed, for so long; says how many.

    Every version of a table that became an old one less than that ago can still be read. What was written since the
    oldest running job began is left alone: it may be about to be committed.

    Raises:
        ArchiveError: a table cannot be read.
    """
    now, started = time.time(), _oldest_start(archive)  # before the listing: a job may end while that goes on
    newest = (now if started is None else min(now, started)) - MARGIN_SECONDS
    found = []
    for name in TABLES:
        table_uri = join(archive.uri, name)
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


def _drop_hidden(archive: Archive, written_before: float) -> int:
    """Takes out frames that no row shows, of videos that no job has taken; says how many."""
    archive.refresh()
    bounds, hidden = archive.parts.bounds(), archive.unpublished_numbers()
    written = dict.fromkeys(hidden, -math.inf)
    for number, path in zip(bounds.video_number.tolist(), bounds.path.tolist(), strict=True):
        if number in hidden:
            written[number] = max(written[number], _modified(join(archive.frames_uri, path)))
    old = [number for number in hidden if written[number] < written_before]
    if not old:
        return 0
    with Job(archive.uri) as job:
        alone = job.is_alone()  # which matters where claims cannot be made
        taken = [number for number in old if job.take(number, lease_seconds=math.inf) and (alone or job.holds(number))]
        archive.refresh()  # whoever had one of them before may have published it
        bounds = archive.parts.bounds()
        chosen = np.isin(bounds.video_number, [*archive.unpublished_numbers() & set(taken)])
        archive.parts.drop(bounds.path[chosen].tolist())
        archive.videos.recount()  # a row may have come while this process slept: the next job completes it
        return int(bounds.row_count[chosen].sum())


def remove_stale_claims(archive: Archive) -> None:
    """Removes claims that jobs which are gone have left, but for those of videos that they have begun.

    Before a job, since one that was killed may have left the claim of a video whose row this job replaces.
    """
    _oldest_start(archive)


def _oldest_start(archive: Archive) -> float | None:
    """When the oldest running job began; the claims of what other ones have begun stay."""

    def hidden() -> set[int]:
        archive.refresh()  # a job that is gone has committed what it has before it was found to be gone
        return archive.unpublished_numbers()

    return oldest_job_start(archive.uri, hidden)


def _modified(uri: str) -> float:
    try:
        return os.lstat(file_path(uri)).st_mtime
    except FileNotFoundError:  # a running job tidies up
        return math.inf
