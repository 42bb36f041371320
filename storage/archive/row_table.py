"""Delta tables of rows that are changed by copy on write; the columns of a version are read when they are asked for."""

import contextlib
import io
import json
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.archive import delta
from storage.archive.column_index import ColumnIndex
from storage.checks import InvalidValue, file_uri
from storage.files import file_size, join, name_with_checksum, remove, write_bytes, write_errors
from storage.parts.layout import check_text_bytes, open_parquet, read_errors, text_bytes, with_columns
from storage.records import Part

MOST_ROWS = 1 << 16  # of a file; a change of one row writes its whole file again
NONE = np.empty(0, np.int64)  # the places of no rows
_GUARD = "rows"  # the application id of every change of a RowTable


@dataclass(frozen=True)
class Check:
    """A property of all rows that vidx writes.

    Attributes:
        columns: the columns that it is about.
        run: raises InvalidValue for a table, with at least these columns, that does not have it.
    """

    columns: tuple[str, ...]
    run: Callable[[pa.Table], None]


class Rows:
    """The rows of a RowTable at one version. They stay readable when newer versions replace their files."""

    def __init__(self, files: "Sequence[_MemoryRows]", schema: pa.Schema):
        self.schema = schema
        self._files = files
        self._starts = [0, *accumulate(file.row_count for file in files)]  # of each file's rows, and the end

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        """Rows in memory."""
        columns = dict(zip(table.column_names, table.columns, strict=True))
        return cls([_MemoryRows("", table.num_rows, table.schema, columns)], table.schema)

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows)"

    def table(self, names: Sequence[str] | None = None) -> pa.Table:
        """Columns of all rows; None: all columns.

        Raises:
            ArchiveError: a file is damaged, or vidx cannot have written it.
        """
        names = self.schema.names if names is None else names
        empty = pa.schema([self.schema.field(name) for name in names]).empty_table()
        return pa.concat_tables([empty, *(file.columns(names) for file in self._files)])

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows; errors as in `table`."""
        return self.table([name]).column(0)

    def find(self, name: str, values: Iterable[str | int | None]) -> np.ndarray:
        """The places, ascending, of the rows that have one of these values in a column; errors as in `table`.

        The first time makes an index of the column; after that it costs the same for a thousand rows and for a million.
        """
        kind = self.schema.field(name).type
        if pa.types.is_integer(kind):  # others can be in no row
            least, most = np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max
            values = (value for value in values if value is not None and least <= int(value) <= most)
        wanted = pa.array({*values} - {None}, kind)
        found = [NONE]
        if len(wanted):
            found += [file.find(name, wanted) + start for file, start in zip(self._files, self._starts)]
        return np.concatenate(found)

    def take(self, places: np.ndarray, names: Sequence[str] | None = None) -> pa.Table:
        """Columns of the rows at these places, which must ascend; None: all columns. Errors as in `table`."""
        names = self.schema.names if names is None else names
        pieces = [pa.schema([self.schema.field(name) for name in names]).empty_table()]
        for file, inside in self.by_file(places):
            pieces.append(file.columns(names).take(pa.array(inside)))
        return pa.concat_tables(pieces)

    def by_file(self, places: np.ndarray) -> "Iterator[tuple[_MemoryRows, np.ndarray]]":
        """The files that hold the rows at these places, which must ascend, each with the places in it."""
        ends = np.searchsorted(places, self._starts)
        for file, start, first, last in zip(self._files, self._starts, ends[:-1], ends[1:]):
            if first < last:
                yield file, places[first:last] - start


class RowTable:
    """A Delta table of rows.

    A change writes the files with changed rows again, together with the files that are not larger than the new one, as
    long as a file of at most MOST_ROWS rows results. So the cost of a change does not grow with the table, and the
    number of small files grows with the logarithm of the rows. Changes never run in parallel.
    """

    def __init__(self, uri: str, columns: Iterable[pa.Field] = (), checks: Sequence[Check] = ()):
        """Opens the table at its newest version.

        Args:
            uri: the table's.
            columns: the columns of its rows. Columns that a table of an older vidx lacks are null, and the first change
                adds them to the table; columns of a newer vidx stay.
            checks: run on the columns that are read, as soon as all columns of a check are.
        Raises:
            ArchiveError: the table is missing or damaged.
        """
        self.uri = uri
        self._columns = tuple(columns)
        self._table = delta.open_table(uri)
        self._checks = checks
        self._files: dict[str, _RowFile] = {}  # files never change, so each column is read once
        self._rows: tuple[int, Rows] | None = None

    @property
    def version(self) -> int:
        """The version of the rows that were read last."""
        return self._table.version()

    def refresh(self) -> None:
        """Moves to the newest version."""
        delta.refresh(self._table)

    def rows(self) -> Rows:
        """All rows of the current version; their files are opened here, and read when needed.

        Raises:
            ArchiveError: a file is missing, or is no Parquet file.
        """
        if self._rows is None or self._rows[0] != self.version:
            self._rows = (self.version, Rows([*self._load().values()], self._schema()))
        return self._rows[1]

    def change(self, plan: Callable[[Rows], tuple[np.ndarray, pa.Table]]) -> None:
        """Commits a change; it is planned again whenever another process was faster.

        Args:
            plan: all rows -> (the places of the rows to drop, ascending; rows to add).
        Raises:
            ArchiveError: the table cannot be written.
        """
        for _ in delta.attempts():
            self.refresh()
            dropped, added = plan(self.rows())
            if not len(dropped) and not added.num_rows:
                return
            is_wider = len(self._schema()) > len(self._table_schema())
            parts: list[Part] = []
            guard = {_GUARD: self.version + 1}
            try:
                removed = self._rewrite(dropped, with_columns(added, self._schema()), parts, of_all=is_wider)
                delta.commit(self._table, parts, removed, guard, self._schema() if is_wider else None)
                return
            except Exception as error:  # after an interrupt nothing is removed: the change may be committed
                if parts and delta.may_be_committed(self._table, parts[0].path):
                    if isinstance(error, delta.Conflict):
                        return
                else:
                    with contextlib.suppress(OSError):
                        for part in parts:
                            remove(join(self.uri, part.path))
                if not isinstance(error, delta.Conflict):
                    raise

    def _table_schema(self) -> pa.Schema:
        with delta.delta_errors(self.uri), read_errors(self.uri):
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

    def _load(self) -> "dict[str, _RowFile]":
        paths, schema = sorted(delta.live_files(self._table).column("path").to_pylist()), self._schema()
        known = self._files
        self._files = {path: known.get(path) or _RowFile(self.uri, path, schema, self._checks) for path in paths}
        return self._files

    def _rewrite(
        self, dropped: np.ndarray, added: pa.Table, parts: list[Part], *, of_all: bool
    ) -> list[tuple[str, int]]:
        """Writes the new files and adds them to `parts`; returns (path, bytes) of the files that they replace."""
        rows, schema = self.rows(), self._schema()
        changed = {file.path: places for file, places in rows.by_file(dropped)}
        replaced, pieces, others = [], [added], []
        for path, file in self._load().items():
            if path in changed or of_all:
                keep = np.ones(file.row_count, bool)
                keep[changed.get(path, [])] = False
                replaced.append(path)
                pieces.append(file.columns(schema.names).filter(pa.array(keep)))
            else:
                others.append(file)
        count = sum(piece.num_rows for piece in pieces)
        for file in sorted(others, key=lambda file: file.row_count):
            if file.row_count > count or count + file.row_count > MOST_ROWS:
                break
            replaced.append(file.path)
            pieces.append(file.columns(schema.names))
            count += file.row_count
        sizes, whole = delta.file_sizes(self._table), pa.concat_tables(pieces)
        for start in range(0, count, MOST_ROWS):
            parts.append(_write_rows(self.uri, whole.slice(start, MOST_ROWS)))
        return [(path, sizes[path]) for path in replaced]


class _MemoryRows:
    """Some rows, in memory. Several threads may use them.

    Attributes:
        path: of their file, relative to the table; empty if there is none.
        row_count: the number of rows.
    """

    def __init__(self, path: str, row_count: int, schema: pa.Schema, columns: Mapping[str, pa.ChunkedArray]):
        self.path = path
        self.row_count = row_count
        self._schema = schema
        self._columns = columns
        self._indexes: dict[str, ColumnIndex] = {}
        self._lock = threading.RLock()

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns, checked; see Rows.table."""
        fields = [self._schema.field(name) for name in names]
        return pa.table([self._columns[name] for name in names], pa.schema(fields))

    def find(self, name: str, values: pa.Array) -> np.ndarray:
        """The places of the rows with one of these values, ascending."""
        with self._lock:
            if name not in self._indexes:
                self._indexes[name] = ColumnIndex(self.columns([name]).column(0))
        places = self._indexes[name].candidates(values)
        if not len(places):
            return places
        is_equal = pc.is_in(self._columns[name].take(pa.array(places)), values)
        return places[is_equal.to_numpy()]


class _RowFile(_MemoryRows):
    """The rows of a file, of which a column is read when it is asked for.

    The file stays open as long as it is used, so it can be read after others have removed it.
    """

    def __init__(self, folder_uri: str, path: str, schema: pa.Schema, checks: Sequence[Check]):
        self._uri = join(folder_uri, path)
        self._checks = checks
        self._text_bytes = 0
        with read_errors(self._uri):
            uri = file_uri(folder_uri, path)
            self._size = file_size(uri)
            self._stack = ExitStack()
            self._file = self._stack.enter_context(open_parquet(uri))
            super().__init__(path, self._file.metadata.num_rows, schema, {})

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns, checked; see Rows.table."""
        with self._lock:  # a file of Parquet cannot be read by two threads at once
            missing = [name for name in names if name not in self._columns]
            if missing:
                with read_errors(self._uri):
                    self._read(missing)
        return super().columns(names)

    def _read(self, names: Sequence[str]) -> None:
        table = self._file.read(columns=names)
        self._text_bytes += text_bytes(table)
        check_text_bytes(self._text_bytes, self._size)
        rows = with_columns(table, pa.schema([self._schema.field(name) for name in names]))
        rows.validate(full=True)  # finds invalid UTF-8, among others
        known = {**self._columns, **dict(zip(names, rows.columns, strict=True))}
        whole = pa.table(known)
        for check in self._checks:
            if known.keys() >= set(check.columns) and not set(names).isdisjoint(check.columns):
                check.run(whole)
        self._columns = known


def drop_file(uri: str, path: str) -> None:
    """Takes a damaged file, and with it its rows, out of a RowTable.

    Raises:
        ArchiveError: the table cannot be written.
    """
    table = delta.open_table(uri)
    for _ in delta.attempts():
        delta.refresh(table)
        sizes = delta.file_sizes(table)
        if path not in sizes:
            return
        with contextlib.suppress(delta.Conflict):
            delta.commit(table, [], [(path, sizes[path])], {_GUARD: table.version() + 1})


def _write_rows(folder_uri: str, rows: pa.Table) -> Part:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="snappy", write_page_checksum=True)
    path = name_with_checksum(uuid.uuid4().hex, google_crc32c.value(buffer.getvalue()), ".parquet")
    uri = join(folder_uri, path)
    with write_errors(uri):
        write_bytes(uri, buffer.getbuffer())
    return Part(path, rows.num_rows, buffer.tell(), json.dumps({"numRecords": rows.num_rows}))
