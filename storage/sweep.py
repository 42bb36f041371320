"""Removes what nothing needs any more: what killed jobs left behind, and what was replaced long ago."""

import contextlib
import math
import os
import time
from dataclasses import dataclass

import numpy as np

from storage.archive import Archive
from storage.files import join, list_names, local_path, remove
from storage.jobs import GONE_SECONDS, Job, oldest_start
from storage.settings import TABLES
from storage.tables import unnamed_files
from storage.vectors import MANIFEST, named_files, update_index

SWEEP_AGE_SECONDS = 7 * 24 * 3600  # longer than any job or reader works with what it has opened

MARGIN_SECONDS = 5.0  # clocks and file times are not that exact; files of the last seconds are left alone


@dataclass(frozen=True)
class Swept:
    """What was removed: frames that no row showed, and files that nothing named."""

    frames: int
    files: int


def sweep(archive: Archive, older_than_seconds: int = SWEEP_AGE_SECONDS) -> Swept:
    """Drops frames that no row shows and that were written so long ago, then removes files unnamed for so long.

    Every version of a table that became an old one less than that ago can still be read. What was written since the
    oldest running job began is left alone: it may be about to be committed.

    Raises:
        ArchiveError: a table cannot be read, or the archive cannot be written.
    """
    now, started = time.time(), oldest_start(archive.uri)  # before the listing: a job may end while that goes on
    newest = (now if started is None else min(now, started)) - MARGIN_SECONDS
    long_ago = min(newest, now - older_than_seconds)
    frames = _drop_hidden(archive, long_ago, alone=started is None)
    if frames:
        update_index(archive, max_retired=0)
    found = []
    for name in TABLES:
        table_uri = join(archive.uri, name)
        unnamed = unnamed_files(table_uri, math.ceil(older_than_seconds / 3600))
        found += [uri for uri in (join(table_uri, path) for path in unnamed) if _modified(uri) < newest]
    kept = {MANIFEST, *named_files(archive)}
    for name in list_names(archive.index_uri):
        uri = join(archive.index_uri, name)
        if name not in kept and _modified(uri) < long_ago:
            found.append(uri)
    removed = 0
    for uri in found:
        with contextlib.suppress(OSError):
            remove(uri)
            removed += 1
    return Swept(frames, removed)


def _drop_hidden(archive: Archive, written_before: float, alone: bool) -> int:
    """Takes out frames that no row shows, of videos that no job has taken; says how many.

    Until they are that old they stay: a job that was killed goes on from them, and going back to former settings
    finds them again.
    """
    bounds, hidden = archive.part_bounds(), archive.hidden_numbers()
    written = dict.fromkeys(hidden, -math.inf)
    for number, path in zip(bounds.video_number.tolist(), bounds.path.tolist(), strict=True):
        if number in hidden:
            written[number] = max(written[number], _modified(join(archive.frames_uri, path)))
    old = [number for number in hidden if written[number] < written_before]
    if not old:
        return 0
    with Job(archive.uri) as job:
        taken = [number for number in old if job.take(number, GONE_SECONDS) and (alone or job.holds(number))]
        archive.refresh()  # whoever had one of them before may have published it
        bounds = archive.part_bounds()
        chosen = np.isin(bounds.video_number, [*archive.hidden_numbers() & set(taken)])
        archive.drop_parts(bounds.path[chosen].tolist())
        return int(bounds.row_count[chosen].sum())


def _modified(uri: str) -> float:
    try:
        return os.stat(local_path(uri)).st_mtime
    except FileNotFoundError:  # a running job tidies up
        return math.inf
