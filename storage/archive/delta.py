"""Delta tables: opening, live files, guarded commits, and damage of their logs."""

import contextlib
import io
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from storage.checks import check_kind, check_names, parse_json, read_small
from storage.errors import ArchiveError, DamagedError
from storage.files import (
    exists,
    file_path,
    join,
    list_names,
    source_text,
    sync_file,
)
from storage.parts.layout import read_errors
from storage.records import Part

LOG = "_delta_log"
MOST_LOG_BYTES = 1 << 30  # of one file of a log
_COMMIT = re.compile(r"([0-9]{20})\.json")
_VERSION = re.compile(r"([0-9]{20})\.")
_LAST_CHECKPOINT = "_last_checkpoint"
ATTEMPTS = 50  # of a commit that loses races; each waits a little longer


class Conflict(Exception):
    """Another process has committed first, and its commit has a guard of this commit; read again and retry."""


def create_table(uri: str, schema: pa.Schema) -> None:
    """Creates an empty Delta table that any Delta reader understands; an existing table stays as it is.

    Raises:
        ArchiveError: the place cannot be written.
    """
    if any(name.endswith((".json", ".parquet")) for name in list_names(join(uri, LOG))):
        return
    with delta_errors(uri), contextlib.suppress(CommitFailedError):  # another process has created it
        DeltaTable.create(uri, schema, mode="ignore")


def open_table(uri: str) -> DeltaTable:
    """The newest version of a table.

    Raises:
        ArchiveError: it is missing or damaged; the message names the damaged file of its log.
    """
    for folder in (uri, join(uri, LOG)):
        with read_errors(folder):
            check_kind(folder, "folder")
    check_no_links(join(uri, LOG))  # reading a pipe would wait for ever
    if not exists(join(uri, LOG)):
        raise DamagedError(f"{source_text(uri)}: damaged archive: the table is missing")
    with delta_errors(uri):
        table = DeltaTable(uri)
    for name in _commits_since_checkpoint(uri):
        place = join(uri, LOG, name)
        if not _read_log_file(place).strip():  # after a power cut; Delta reads an empty file as a commit of nothing
            raise DamagedError(f"{source_text(place)}: damaged archive: this commit is empty")
    return table


def newest_version(uri: str) -> int:
    """The newest version of a table, by the names of its log alone; -1 if there is no log."""
    versions = (_VERSION.match(name) for name in list_names(join(uri, LOG)))
    return max((int(match[1]) for match in versions if match), default=-1)


def refresh(table: DeltaTable) -> None:
    """Moves to the newest version."""
    with delta_errors(table.table_uri):
        table.update_incremental()


def live_files(table: DeltaTable) -> pa.Table:
    """One row per data file of this version: path, size_bytes, num_records and bounds as min.x and max.x.

    Raises:
        ArchiveError: the log has a name that no file of an archive can have, or names a file twice.
    """
    with delta_errors(table.table_uri):
        files = pa.table(table.get_add_actions(flatten=True))
    if files.num_rows:
        with read_errors(join(table.table_uri, LOG)):
            check_names(files.column("path").to_pylist())
    return files


def file_sizes(table: DeltaTable) -> dict[str, int]:
    """The size in bytes of each data file of this version, by path."""
    files = live_files(table)
    if files.num_rows == 0:
        return {}
    return dict(zip(files.column("path").to_pylist(), files.column("size_bytes").to_pylist(), strict=True))


def unnamed_files(uri: str, hours: int) -> list[str]:
    """Files in a table's folder, older than so many hours, that no version of these hours names.

    They are only listed here. deltalake's own vacuum would add two versions to the log, follow links, and trust the
    file names in the log.

    Raises:
        ArchiveError: the table is missing or damaged, or there is a link in its folder.
    """
    table = open_table(uri)
    check_no_links(uri)
    with delta_errors(uri):
        found = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
    names = set(list_names(uri))
    return [path for path in found if path in names]


def commit(
    table: DeltaTable,
    parts: Sequence[Part],
    removed: Sequence[tuple[str, int]],
    guards: dict[str, int],
    schema: pa.Schema | None = None,
) -> None:
    """Adds and removes files in one new version, or changes nothing.

    Args:
        table: the version on which the change is based; afterwards the newest one.
        parts: written files, relative to the table.
        removed: (path, bytes) of the files to remove.
        guards: application id -> version. A commit since `table`'s version with the same id is a conflict.
        schema: new columns; then the parts replace all files. None: the columns stay.
    Raises:
        Conflict: another commit was faster.
        ArchiveError: the log cannot be written or read; `may_be_committed` tells whether the change was committed.
    """
    now, version = int(time.time() * 1000), table.version()
    actions: list[AddAction | RemoveAction] = []
    actions += [AddAction(part.path, part.size_bytes, {}, now, True, part.stats_json) for part in parts]
    if schema is None:
        actions += [RemoveAction(path, True, now, size=size) for path, size in removed]
    properties = CommitProperties(app_transactions=[Transaction(*guard, now) for guard in guards.items()])
    with delta_errors(table.table_uri):
        try:
            mode: Literal["append", "overwrite"] = "append" if schema is None else "overwrite"
            table.create_write_transaction(actions, mode, schema or table.schema(), commit_properties=properties)
        except CommitFailedError as error:
            raise Conflict(str(error)) from error
        table.update_incremental()
        _sync_log(table.table_uri, range(version + 1, table.version() + 1))


def may_be_committed(table: DeltaTable, path: str) -> bool:
    """Whether the newest version names a file, after a commit that failed; True if that cannot be told.

    A commit can fail after it has taken effect, for instance when the checkpoint that follows finds the disk full. A
    file that the log names must never be removed; a superfluous file only takes up space.
    """
    try:
        refresh(table)
        return path in live_files(table).column("path").to_pylist()
    except (ArchiveError, DeltaError, OSError):
        return True


def attempts() -> Iterator[int]:
    """Counts the attempts of a commit, with a growing random pause between them.

    Raises:
        ArchiveError: too many lost races.
    """
    for attempt in range(ATTEMPTS):
        yield attempt
        time.sleep(random.uniform(0, min(0.5, 0.01 * 1.5**attempt)))
    raise ArchiveError("the archive is too busy: other jobs committed first 50 times; run again when they are done")


@contextlib.contextmanager
def delta_errors(uri: str) -> Iterator[None]:
    """Turns errors of deltalake into one line for the user.

    Raises:
        ArchiveError: the table is damaged, or cannot be read or written.
    """
    try:
        yield
    except CommitFailedError:
        raise
    except TableNotFoundError as error:
        raise DamagedError(f"{source_text(uri)}: damaged archive: {_causes(error)}") from error
    except OSError as error:
        raise ArchiveError(f"{source_text(uri)}: cannot be read or written: {_causes(error)}") from error
    except DeltaError as error:
        files = (join(uri, LOG, name) for name in list_names(join(uri, LOG)))
        place = next((file for file in files if not _is_readable(file)), uri)
        raise DamagedError(f"{source_text(place)}: damaged archive: {_causes(error)}") from error


def _causes(error: Exception) -> str:
    """The causes of an error of deltalake in one line; its message is a coloured tree with a back trace."""
    lines = [line.replace("\x1b[31m↳\x1b[0m", "").strip() for line in str(error).splitlines()]
    causes = []
    for line in lines:
        if line.startswith("0:"):  # the back trace
            break
        if line:
            causes.append(line)
    return ": ".join(causes)[:300]


def check_no_links(uri: str) -> None:
    """Refuses a folder that holds anything else than files and folders.

    Raises:
        DamagedError: a link or a pipe is in it.
    """
    path = file_path(uri)
    if not os.path.isdir(path):
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
                place = source_text(join(uri, os.fsdecode(entry.name)))
                raise DamagedError(f"{place}: damaged archive: a link or a pipe, and an archive holds none; remove it")


def _read_log_file(uri: str) -> bytes:
    with read_errors(uri):
        return read_small(uri, MOST_LOG_BYTES)


def _commits_since_checkpoint(uri: str) -> list[str]:
    names = list_names(join(uri, LOG))
    newest = max((name for name in names if ".checkpoint" in name and _VERSION.match(name)), default="")
    return [name for name in names if _COMMIT.fullmatch(name) and name[:20] > newest[:20]]


def cut_short_commit(uri: str) -> str | None:
    """The file name of a table's newest commit, if it is empty or ends within a line; else None."""
    newest = max(_commits_since_checkpoint(uri), default=None)
    if newest is None:
        return None
    data = _read_log_file(join(uri, LOG, newest))
    try:
        [parse_json(line) for line in data.splitlines()]
    except ValueError:
        return newest
    return None if data.strip() else newest


def damaged_checkpoints(uri: str) -> list[str]:
    """Damaged summaries of a table's log that are not needed, because all commits that they summarize exist."""
    names = list_names(join(uri, LOG))
    summaries = [name for name in names if ".checkpoint" in name or name == _LAST_CHECKPOINT]
    damaged = [name for name in summaries if not _is_readable(join(uri, LOG, name))]
    versions = [_VERSION.match(name) for name in summaries if name not in damaged]
    sound = max((int(match[1]) for match in versions if match), default=-1)
    commits = {int(match[1]) for name in names if (match := _COMMIT.fullmatch(name))}
    wanted = max(commits, default=0) - sound
    if not damaged or len([version for version in commits if version > sound]) < wanted:
        return []
    return sorted({*damaged, _LAST_CHECKPOINT} & set(names))


def _is_readable(uri: str) -> bool:
    """Whether a file of a log can be read and parsed."""
    try:
        data = _read_log_file(uri)
        if uri.endswith(".parquet"):
            pq.read_metadata(io.BytesIO(data))
        elif uri.endswith((".json", _LAST_CHECKPOINT)):
            [parse_json(line) for line in data.splitlines()]
            return bool(data.strip())
    except (ValueError, pa.ArrowException, OSError, DamagedError):
        return False
    return True


def _sync_log(uri: str, versions: Iterable[int]) -> None:
    """Makes commits survive a power cut; deltalake leaves them to the page cache."""
    folder = join(uri, LOG)
    names = [f"{version:020}{suffix}" for version in versions for suffix in (".json", ".checkpoint.parquet")]
    for name in (*names, _LAST_CHECKPOINT):
        with contextlib.suppress(FileNotFoundError):
            sync_file(join(folder, name))
    sync_file(folder)
