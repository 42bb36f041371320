"""Delta tables: opening, guarded commits, and small tables that are read whole and changed by copy on write."""

import contextlib
import io
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from storage.checks import InvalidValue, check_kind, check_names, file_uri, parse_json, read_small
from storage.errors import ArchiveError, DamagedError
from storage.files import (
    exists,
    file_path,
    join,
    list_names,
    name_with_checksum,
    remove,
    source_text,
    sync_file,
    write_bytes,
    write_errors,
)
from storage.parts.layout import read_columns, read_errors, with_columns
from storage.records import Part

LOG = "_delta_log"
MOST_LOG_BYTES = 1 << 30  # of one file of a log
_COMMIT = re.compile(r"([0-9]{20})\.json")
_VERSION = re.compile(r"([0-9]{20})\.")
_LAST_CHECKPOINT = "_last_checkpoint"
ATTEMPTS = 50  # of a commit that loses races; each waits a little longer
_GUARD = "rows"  # the application id of every change of a RowTable


class Conflict(Exception):
    """Another process has committed first, and its commit has a guard of this commit; read again and retry."""


def create_table(uri: str, schema: pa.Schema) -> None:
    """Creates an empty Delta table that any Delta reader understands; an existing table stays as it is.

    Raises:
        ArchiveError: the place cannot be written.
    """
    if any(name.endswith((".json", ".parquet")) for name in list_names(join(uri, LOG))):
        return
    with _delta_errors(uri), contextlib.suppress(CommitFailedError):  # another process has created it
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
    with _delta_errors(uri):
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
    with _delta_errors(table.table_uri):
        table.update_incremental()


def live_files(table: DeltaTable) -> pa.Table:
    """One row per data file of this version: path, size_bytes, num_records and bounds as min.x and max.x.

    Raises:
        ArchiveError: the log has a name that no file of an archive can have, or names a file twice.
    """
    with _delta_errors(table.table_uri):
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
    with _delta_errors(uri):
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
    with _delta_errors(table.table_uri):
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


class RowTable:
    """A small Delta table that is read whole and changed by copy on write.

    A change rewrites the files with changed rows, together with all files smaller than the new one. So the number of
    files grows with the logarithm of the rows. Changes never run in parallel.
    """

    def __init__(
        self, uri: str, columns: Iterable[pa.Field] = (), check: Callable[[pa.Table], None] = lambda rows: None
    ):
        """Opens the table at its newest version.

        Args:
            uri: the table's.
            columns: the columns of its rows. Columns that a table of an older vidx lacks are null, and the first change
                adds them to the table; columns of a newer vidx stay.
            check: raises InvalidValue if vidx cannot have written the rows of a file.
        Raises:
            ArchiveError: the table is missing or damaged.
        """
        self.uri = uri
        self._columns = tuple(columns)
        self._table = open_table(uri)
        self._check = check
        self._files: dict[str, pa.Table] = {}  # files never change, so each is read once
        self._rows: tuple[int, pa.Table] | None = None

    @property
    def version(self) -> int:
        """The version of the rows that were read last."""
        return self._table.version()

    def refresh(self) -> None:
        """Moves to the newest version."""
        refresh(self._table)

    def rows(self) -> pa.Table:
        """All rows of the current version."""
        if self._rows is None or self._rows[0] != self.version:
            self._rows = (self.version, pa.concat_tables([self._schema().empty_table(), *self._load().values()]))
        return self._rows[1]

    def change(self, plan: Callable[[pa.Table], tuple[np.ndarray, pa.Table]]) -> None:
        """Commits a change; it is planned again whenever another process was faster.

        Args:
            plan: all rows -> (a bool for each row: whether to keep it; rows to add).
        Raises:
            ArchiveError: the table cannot be written.
        """
        for _ in attempts():
            self.refresh()
            keep, added = plan(self.rows())
            if keep.all() and not added.num_rows:
                return
            is_wider = len(self._schema()) > len(self._table_schema())
            part, removed = self._rewrite(keep, with_columns(added, self._schema()), of_all=is_wider)
            parts, guard = [part] if part else [], {_GUARD: self.version + 1}
            try:
                commit(self._table, parts, removed, guard, self._schema() if is_wider else None)
                return
            except Exception as error:  # after an interrupt nothing is removed: the change may be committed
                if part is not None and may_be_committed(self._table, part.path):
                    if isinstance(error, Conflict):
                        return
                elif part is not None:
                    with contextlib.suppress(OSError):
                        remove(join(self.uri, part.path))
                if not isinstance(error, Conflict):
                    raise

    def _table_schema(self) -> pa.Schema:
        with _delta_errors(self.uri), read_errors(self.uri):
            stored = pa.schema(self._table.schema().to_arrow())
            for field in self._columns:
                if field.name in stored.names and stored.field(field.name).type != field.type:
                    raise InvalidValue(f"its column {field.name} is {stored.field(field.name).type}, not {field.type}")
                if field.name not in stored.names and not field.nullable:
                    raise InvalidValue(f"it has no column {field.name}")
        return stored

    def _schema(self) -> pa.Schema:
        """The columns of the table, followed by those that it lacks."""
        stored = self._table_schema()
        known = {field.name: field for field in self._columns}
        missing = (field for field in self._columns if field.name not in stored.names)
        return pa.schema([*(known.get(field.name, field) for field in stored), *missing])

    def _load(self) -> dict[str, pa.Table]:
        paths = sorted(live_files(self._table).column("path").to_pylist())
        schema = self._schema()
        self._files = {path: self._files.get(path) or self._read(path, schema) for path in paths}
        return self._files

    def _read(self, path: str, schema: pa.Schema) -> pa.Table:
        with read_errors(join(self.uri, path)):
            rows = read_columns(file_uri(self.uri, path), schema)
            rows.validate(full=True)  # finds invalid UTF-8, among others
            self._check(rows)
        return rows

    def _rewrite(self, keep: np.ndarray, added: pa.Table, *, of_all: bool) -> tuple[Part | None, list[tuple[str, int]]]:
        """Writes the new file; returns it, and (path, bytes) of the files that it replaces."""
        replaced, pieces, others, start = [], [added], [], 0
        for path, rows in self._load().items():
            kept = keep[start : start + rows.num_rows]
            start += rows.num_rows
            if kept.all() and not of_all:
                others.append((path, rows))
            else:
                replaced.append(path)
                pieces.append(rows.filter(pa.array(kept)))
        count = sum(piece.num_rows for piece in pieces)
        for path, rows in sorted(others, key=lambda item: item[1].num_rows):
            if rows.num_rows > count:
                break
            replaced.append(path)
            pieces.append(rows)
            count += rows.num_rows
        sizes = file_sizes(self._table)
        part = _write_rows(self.uri, pa.concat_tables(pieces)) if count else None
        return part, [(path, sizes[path]) for path in replaced]


def drop_file(uri: str, path: str) -> None:
    """Takes a damaged file, and with it its rows, out of a RowTable.

    Raises:
        ArchiveError: the table cannot be written.
    """
    table = open_table(uri)
    for _ in attempts():
        refresh(table)
        sizes = file_sizes(table)
        if path not in sizes:
            return
        with contextlib.suppress(Conflict):
            commit(table, [], [(path, sizes[path])], {_GUARD: table.version() + 1})


def _write_rows(folder_uri: str, rows: pa.Table) -> Part:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="snappy", write_page_checksum=True)
    path = name_with_checksum(uuid.uuid4().hex, google_crc32c.value(buffer.getvalue()), ".parquet")
    uri = join(folder_uri, path)
    with write_errors(uri):
        write_bytes(uri, buffer.getbuffer())
    return Part(path, rows.num_rows, buffer.tell(), json.dumps({"numRecords": rows.num_rows}))


@contextlib.contextmanager
def _delta_errors(uri: str) -> Iterator[None]:
    """Turns errors of deltalake into one line for the user."""
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
