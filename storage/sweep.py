"""Removes files that nothing names any more: what killed jobs left behind, and what was replaced long ago."""

import contextlib
import math
import os
import time

from storage.archive import Archive
from storage.files import join, list_names, local_path, remove
from storage.jobs import oldest_start
from storage.settings import TABLES
from storage.tables import unnamed_files
from storage.vectors import MANIFEST, named_files

SWEEP_AGE_SECONDS = 7 * 24 * 3600  # longer than any job or reader works with what it has opened

MARGIN_SECONDS = 5.0  # clocks and file times are not that exact; files of the last seconds are left alone


def sweep(archive: Archive, older_than_seconds: int = SWEEP_AGE_SECONDS) -> int:
    """Removes unnamed files that were written, or have been unnamed, for so long; says how many.

    Every version of a table that became an old one less than that ago can still be read. What was written since the
    oldest running job began is left alone: it may be about to be committed.

    Raises:
        ArchiveError: a table cannot be read.
    """
    now, started = time.time(), oldest_start(archive.uri)  # before the listing: a job may end while that goes on
    newest = (now if started is None else min(now, started)) - MARGIN_SECONDS
    found = []
    for name in TABLES:
        table_uri = join(archive.uri, name)
        unnamed = unnamed_files(table_uri, math.ceil(older_than_seconds / 3600))
        found += [uri for uri in (join(table_uri, path) for path in unnamed) if _modified(uri) < newest]
    kept = {MANIFEST, *named_files(archive)}
    newest = min(newest, now - older_than_seconds)
    for name in list_names(archive.index_uri):
        uri = join(archive.index_uri, name)
        if name not in kept and _modified(uri) < newest:
            found.append(uri)
    removed = 0
    for uri in found:
        with contextlib.suppress(OSError):
            remove(uri)
            removed += 1
    return removed


def _modified(uri: str) -> float:
    try:
        return os.stat(local_path(uri)).st_mtime
    except FileNotFoundError:  # a running job tidies up
        return math.inf
