"""Hashes of files that were read before, so that unchanged files are recognised without reading them."""

import os
import re
import sqlite3
import threading
from pathlib import Path

from workers.cache_folder import cache_folder

# A file that changed shortly before it was read may change again within the resolution of its times.
SETTLED_SECONDS = 2.0
_TABLE = """
CREATE TABLE IF NOT EXISTS hashes (
    device INTEGER, inode INTEGER, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, video_id TEXT NOT NULL,
    PRIMARY KEY (device, inode)
) WITHOUT ROWID
"""


class HashCache:
    """SHA-256 of files by device, inode, size, modification and change time, in a file that a user's jobs share.

    A cache that cannot be read or written is empty and stays empty; that is no error.

    Attributes:
        problem: why it cannot be read or written; empty if it can.
    """

    def __init__(self, path: Path | None = None):
        self.problem = ""
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        try:
            place = self._path = path or cache_folder() / "hashes.sqlite"
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open(place)
            except sqlite3.OperationalError:  # no space, no permission, in use
                raise
            except sqlite3.DatabaseError:  # damaged
                place.unlink()
                self._open(place)
        except (OSError, sqlite3.DatabaseError) as error:
            self._give_up(error)

    def get(self, stat: os.stat_result) -> str | None:
        """The SHA-256 of a file in this state, or None where it is not known."""
        rows = self._run(
            "SELECT size_bytes, mtime_ns, ctime_ns, video_id FROM hashes WHERE device = ? AND inode = ?", _key(stat)
        )
        known = rows[0][3] if rows and rows[0][:3] == _state(stat) else None
        return known if isinstance(known, str) and re.fullmatch("[0-9a-f]{64}", known) else None

    def contradicts(self, stat: os.stat_result) -> bool:
        """Whether a file was read with this size and modification time, and has changed since all the same."""
        rows = self._run("SELECT size_bytes, mtime_ns, ctime_ns FROM hashes WHERE device = ? AND inode = ?", _key(stat))
        return bool(rows) and rows[0] != _state(stat) and rows[0][:2] == _state(stat)[:2]

    def put(self, stat: os.stat_result, video_id: str, read_ns: int) -> None:
        """Remembers the hash of a file.

        Args:
            stat: the file's state, the same before and after it was read.
            video_id: the SHA-256.
            read_ns: when reading began.
        """
        if is_settled(stat, read_ns):
            self._run("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?, ?)", (*_key(stat), *_state(stat), video_id))

    def _run(self, statement: str, values: tuple) -> list[tuple]:
        with self._lock:
            if self._connection is None:
                return []
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                self._give_up(error)
                return []

    def _open(self, place: Path) -> None:
        connection = sqlite3.connect(place, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_TABLE)
        self._connection = connection

    def _give_up(self, error: Exception) -> None:
        self._connection = None
        self.problem = (
            str(getattr(error, "strerror", None) or error) if self._path is None else f"{self._path}: {error}"
        )


def is_settled(stat: os.stat_result, read_ns: int) -> bool:
    """Whether a file in this state had not changed for a while when it was read; see SETTLED_SECONDS."""
    return read_ns - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_SECONDS * 1e9


def _key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino - (stat.st_ino >> 63 << 64)  # SQLite's integers are signed


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
