"""Delta tables: opening, committing with a guard, and small tables that are rewritten a little at each change."""

import contextlib
import io
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

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
_OF_VERSION = re.compile(r"([0-9]{20})\.")
_LAST_CHECKPOINT = "_last_checkpoint"
_Mode = Literal["append", "overwrite"]
ATTEMPTS = 50  # of a commit that loses races; each waits a little longer
_GUARD = "rows"  # the application id under which every change of a RowTable is numbered


class Conflict(Exception):
    """Another process committed first what this commit was guarded against; look again, then try again."""


def create_table(uri: str, schema: pa.Schema) -> None:
    """An empty Delta table that any Delta reader understands; an existing one stays as it is.

    Raises:
        ArchiveError: the place cannot be written.
    """
    if any(name.endswith((".json", ".parquet")) for name in list_names(join(uri, LOG))):
        return
    with _plain_errors(uri), contextlib.suppress(CommitFailedError):  # lost the race to another creator
        DeltaTable.create(uri, schema, mode="ignore")


def open_table(uri: str) -> DeltaTable:
    """The newest version of a table.

    Raises:
        ArchiveError: it is missing or damaged; the message names the damaged file of its log.
    """
    _refuse_linked_log(uri)
    if not exists(join(uri, LOG)):
        raise DamagedError(f"{source_text(uri)}: damaged archive: the table is missing")
    with _plain_errors(uri):
        table = DeltaTable(uri)
    _refuse_empty_log_files(uri)
    return table


def refresh(table: DeltaTable) -> None:
    """Moves to the newest version."""
    with _plain_errors(table.table_uri):
        table.update_incremental()


def live_files(table: DeltaTable) -> pa.Table:
    """One row per data file of this version: path, size_bytes, num_records and bounds as min.x and max.x.

    Raises:
        ArchiveError: the log names what no file of an archive is called, or names a file twice.
    """
    with _plain_errors(table.table_uri):
        files = pa.table(table.get_add_actions(flatten=True))
    if files.num_rows:
        with read_errors(join(table.table_uri, LOG)):
            check_names(files.column("path").to_pylist())
    return files


def file_sizes(table: DeltaTable) -> dict[str, int]:
    """The data files of this version, each with its bytes."""
    files = live_files(table)
    if files.num_rows == 0:
        return {}
    return dict(zip(files.column("path").to_pylist(), files.column("size_bytes").to_pylist(), strict=True))


def unnamed_files(uri: str, hours: int) -> list[str]:
    """Files of a table's folder, older than so many hours, that no version younger than that names.

    Only asked for, not done by deltalake, whose vacuum adds two versions to the log. It goes through links, and takes
    for a file's name what the log says of one that was removed.

    Raises:
        ArchiveError: the table is missing or damaged, or there is a link in its folder.
    """
    table = open_table(uri)
    check_no_links(uri)
    with _plain_errors(uri):
        found = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
    there = set(list_names(uri))
    return [path for path in found if path in there]


def commit(
    table: DeltaTable, parts: Sequence[Part], removed: Sequence[tuple[str, int]], guards: dict[str, int]
) -> None:
    """One new version: files added and taken away, and the guards' application transactions, or nothing.

    Args:
        table: the version that the change was worked out from; afterwards the newest one.
        parts: written files, relative to the table.
        removed: (path, bytes) of files that this version holds no more.
        guards: application id -> version. A commit since `table`'s version under the same id is a conflict.
    Raises:
        Conflict: another commit was faster.
        ArchiveError: the log cannot be written or read; whether the change is in, `may_be_committed` tells.
    """
    removals = [RemoveAction(path, True, _now(), size=size) for path, size in removed]
    _commit(table, [*map(_add, parts), *removals], "append", table.schema(), guards)


def commit_instead(table: DeltaTable, parts: Sequence[Part], schema: pa.Schema, guards: dict[str, int]) -> None:
    """One new version that holds these files alone, with these columns, or nothing; otherwise as `commit`."""
    _commit(table, [*map(_add, parts)], "overwrite", schema, guards)


def _add(part: Part) -> AddAction:
    return AddAction(part.path, part.size_bytes, {}, _now(), True, part.stats_json)


def _now() -> int:
    return int(time.time() * 1000)


def _commit(
    table: DeltaTable, actions: list[AddAction | RemoveAction], mode: _Mode, schema: Any, guards: dict[str, int]
) -> None:
    properties = CommitProperties(app_transactions=[Transaction(*guard, _now()) for guard in guards.items()])
    version = table.version()
    with _plain_errors(table.table_uri):
        try:
            table.create_write_transaction(actions, mode, schema, commit_properties=properties)
        except CommitFailedError as error:
            raise Conflict(str(error)) from error
        table.update_incremental()
        _sync_log(table.table_uri, range(version + 1, table.version() + 1))


def may_be_committed(table: DeltaTable, path: str) -> bool:
    """Whether the newest version names a file, after a commit of it failed; True where that cannot be told.

    A commit can fail after it has landed, as when the checkpoint that follows finds the disk full. A file that the
    log names must never be removed; one too many only takes up space.
    """
    try:
        refresh(table)
        return path in live_files(table).column("path").to_pylist()
    except (ArchiveError, DeltaError, OSError):
        return True


def attempts() -> Iterator[int]:
    """Numbers the tries of a commit, with a growing random pause between them.

    Raises:
        ArchiveError: too many lost races.
    """
    for attempt in range(ATTEMPTS):
        yield attempt
        time.sleep(random.uniform(0, min(0.5, 0.01 * 1.5**attempt)))
    raise ArchiveError("the archive is too busy: other jobs committed first 50 times; run again when they are done")


class RowTable:
    """A small Delta table that is read whole and changed by copy on write.

    A change rewrites the files that hold changed rows and folds in files smaller than what it writes, so that
    their number grows with the logarithm of the rows. Changes are strictly one after the other.
    """

    def __init__(
        self, uri: str, columns: Iterable[pa.Field] = (), check: Callable[[pa.Table], None] = lambda rows: None
    ):
        """Opens it at its newest version.

        Args:
            uri: of the table.
            columns: what its rows have. Those that a table of an older vidx lacks are null, and the first change of
                the table adds them; those of a newer one stay.
            check: raises InvalidValue where rows of a file are none that vidx writes.
        Raises:
            ArchiveError: the table is missing or damaged.
        """
        self.uri = uri
        self._columns = tuple(columns)
        self._table = open_table(uri)
        self._check = check
        self._files: dict[str, pa.Table] = {}  # they never change, so each is read once
        self._rows: tuple[int, pa.Table] | None = None

    @property
    def version(self) -> int:
        """Of the rows last read."""
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
        """Commits a change that is worked out again whenever another process was faster.

        Args:
            plan: all rows -> (which to keep, bool of their number; rows to add).
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
                if is_wider:
                    commit_instead(self._table, parts, self._schema(), guard)
                else:
                    commit(self._table, parts, removed, guard)
            except Conflict:
                if part is not None and may_be_committed(self._table, part.path):
                    return
                self._remove(part)
                continue
            except Exception:
                if part is not None and not may_be_committed(self._table, part.path):
                    self._remove(part)
                raise  # after an interrupt nothing is removed: it may have come when the commit was in
            return

    def _table_schema(self) -> pa.Schema:
        with _plain_errors(self.uri), read_errors(self.uri):
            there = pa.schema(self._table.schema().to_arrow())
            for field in self._columns:
                if field.name in there.names and there.field(field.name).type != field.type:
                    raise InvalidValue(f"its column {field.name} is {there.field(field.name).type}, not {field.type}")
                if field.name not in there.names and not field.nullable:
                    raise InvalidValue(f"it has no column {field.name}")
        return there

    def _schema(self) -> pa.Schema:
        """The columns of the table, and then those that it lacks."""
        there = self._table_schema()
        known = {field.name: field for field in self._columns}
        lacked = (field for field in self._columns if field.name not in there.names)
        return pa.schema([*(known.get(field.name, field) for field in there), *lacked])

    def _load(self) -> dict[str, pa.Table]:
        paths = sorted(live_files(self._table).column("path").to_pylist())
        schema = self._schema()
        self._files = {path: self._files.get(path) or self._read(path, schema) for path in paths}
        return self._files

    def _read(self, path: str, schema: pa.Schema) -> pa.Table:
        with read_errors(join(self.uri, path)):
            rows = read_columns(file_uri(self.uri, path), schema)
            rows.validate(full=True)  # text that is none, among others
            self._check(rows)
        return rows

    def _rewrite(
        self, keep: np.ndarray, added: pa.Table, *, of_all: bool = False
    ) -> tuple[Part | None, list[tuple[str, int]]]:
        """Writes the new file, of all rows where that is asked for; says which files it replaces, with their sizes."""
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

    def _remove(self, part: Part | None) -> None:
        if part is not None:
            with contextlib.suppress(OSError):
                remove(join(self.uri, part.path))


def drop_file(uri: str, path: str) -> None:
    """Takes a damaged file out of a RowTable, with the rows in it.

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
def _plain_errors(uri: str) -> Iterator[None]:
    """Turns what deltalake says into one line for people."""
    try:
        yield
    except CommitFailedError:
        raise
    except TableNotFoundError as error:
        raise DamagedError(f"{source_text(uri)}: damaged archive: {_first_lines(error)}") from error
    except OSError as error:
        raise ArchiveError(f"{source_text(uri)}: cannot be read or written: {_first_lines(error)}") from error
    except DeltaError as error:
        damaged = _damaged_log_file(uri)
        place = uri if damaged is None else join(uri, LOG, damaged)
        raise DamagedError(f"{source_text(place)}: damaged archive: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
    """Deltalake's messages are trees with colours and back traces: the causes in one line."""
    lines = [line.replace("\x1b[31m↳\x1b[0m", "").strip() for line in str(error).splitlines()]
    causes = []
    for line in lines:
        if line.startswith("0:"):  # the back trace
            break
        if line:
            causes.append(line)
    return ": ".join(causes)[:300]


def _refuse_linked_log(uri: str) -> None:
    """A table, its log and the files of that lie in the archive's own folder; whatever reads a pipe waits for ever.

    Raises:
        DamagedError: one is a link, or of another kind.
    """
    log = join(uri, LOG)
    for folder in (uri, log):
        with read_errors(folder):
            check_kind(folder, "folder")
    check_no_links(log)


def check_no_links(uri: str) -> None:
    """Nothing, where a folder holds files and folders of its own alone.

    Raises:
        DamagedError: a link or a pipe lies in it.
    """
    path = file_path(uri)
    if not os.path.isdir(path):
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
                place = source_text(join(uri, os.fsdecode(entry.name)))
                raise DamagedError(f"{place}: damaged archive: a link or a pipe, and an archive holds none; remove it")


def _refuse_empty_log_files(uri: str) -> None:
    """A power cut can leave the newest commit empty, and Delta takes that for a commit of nothing."""
    for name in _commits_since_checkpoint(uri):
        place = join(uri, LOG, name)
        if not _read_log_file(place).strip():
            raise DamagedError(f"{source_text(place)}: damaged archive: this commit is empty")


def _read_log_file(uri: str) -> bytes:
    with read_errors(uri):
        return read_small(uri, MOST_LOG_BYTES)


def _commits_since_checkpoint(uri: str) -> list[str]:
    names = list_names(join(uri, LOG))
    newest = max((name for name in names if ".checkpoint" in name and _OF_VERSION.match(name)), default="")
    return [name for name in names if _COMMIT.fullmatch(name) and name[:20] > newest[:20]]


def cut_short_commit(uri: str) -> str | None:
    """The newest commit of a table, where it is not whole: empty, or ending within a line."""
    names = _commits_since_checkpoint(uri)
    newest = max(names, default=None)
    if newest is None:
        return None
    try:
        lines = _read_log_file(join(uri, LOG, newest)).splitlines()
        [parse_json(line) for line in lines]
        return None if any(line.strip() for line in lines) else newest
    except ValueError:
        return newest


def damaged_checkpoints(uri: str) -> list[str]:
    """Damaged summaries of a table's log that can be done without: every commit that they stand for is there."""
    names = list_names(join(uri, LOG))
    summaries = [name for name in names if ".checkpoint" in name or name == _LAST_CHECKPOINT]
    damaged = [name for name in summaries if not _is_readable(join(uri, LOG, name))]
    versions = [_OF_VERSION.match(name) for name in summaries if name not in damaged]
    sound = max((int(match[1]) for match in versions if match), default=-1)
    commits = {int(match[1]) for name in names if (match := _COMMIT.fullmatch(name))}
    wanted = max(commits, default=0) - sound
    if not damaged or len([version for version in commits if version > sound]) < wanted:
        return []
    return sorted({*damaged, _LAST_CHECKPOINT} & set(names))


def _is_readable(uri: str) -> bool:
    """Whether a file of a log can be understood."""
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


def _damaged_log_file(uri: str) -> str | None:
    return next((name for name in list_names(join(uri, LOG)) if not _is_readable(join(uri, LOG, name))), None)


def _sync_log(uri: str, versions: Iterable[int]) -> None:
    """Deltalake leaves a commit to the page cache; what we call committed shall survive a power cut."""
    folder = join(uri, LOG)
    names = [f"{version:020}{suffix}" for version in versions for suffix in (".json", ".checkpoint.parquet")]
    for name in (*names, _LAST_CHECKPOINT):
        with contextlib.suppress(FileNotFoundError):
            sync_file(join(folder, name))
    sync_file(folder)
