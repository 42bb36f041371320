"""SQL over the archive: DuckDB views `videos` and `frames` of what is published; a statement can reach nothing else."""

import contextlib
import decimal
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from storage.archive.archive import Archive
from storage.archive.delta import check_no_links
from storage.archive.frames import LivePart
from storage.errors import ArchiveError, DamagedError, UsageError
from storage.files import file_path, is_text, join, source_text
from storage.parts.layout import BINARY, COLUMNS
from storage.processes import anonymous_bytes, usable_memory
from storage.records import Status

# Times are TIMESTAMPs in UTC without a zone (_create_views): a cast here would use the session's time zone.
_VIDEOS_VIEW = """
CREATE VIEW videos AS SELECT
    video_id, video_number, source, uri AS source_uri, status, reason, detail, decoder, container, codec, width, height,
    rotation_degrees, duration_seconds, clock_offset_seconds, frame_count AS frames, size_bytes,
    captured_at, CASE WHEN captured_at IS NOT NULL THEN coalesce(captured_from, 'manifest') END AS captured_from, tags,
    model_id, sampling, attempts, indexed_at, sandbox_missing
FROM stored_videos
"""
_FRAMES_VIEW = "CREATE VIEW frames AS SELECT {columns} FROM stored_frames"
_JOINED = "frames JOIN videos USING (video_number, video_id, model_id, sampling)"
BATCH_ROWS = 1024
CHECK_SECONDS = 0.05
GRACE_SECONDS = 5.0  # for a statement beyond its limits to stop
# Texts in the errors of reading parts.
_PART_ERRORS = ("registered as 'stored_frames' failed", "get_next failed", "arrow_scan")
_NO_TABLE = r"Catalog Error: Table with name (\S+) does not exist"
_READING = ("SELECT", "EXPLAIN", "RELATION", "LOGICAL_PLAN")  # DuckDB's names of the statements that only read


@dataclass(frozen=True)
class SqlLimits:
    """The limits of a statement.

    Attributes:
        seconds: from its start until its last row is fetched.
        memory_bytes: in addition to the memory that the process had before.
    """

    seconds: float = 300.0
    memory_bytes: int = min(4_000_000_000, usable_memory() // 2)


class SqlResult:
    """The rows of a statement, computed while they are fetched.

    Attributes:
        columns: the column names; repeated names are numbered, as DuckDB does in a subquery.
    """

    def __init__(self, relation: duckdb.DuckDBPyRelation | None, calls: Callable[[], AbstractContextManager]):
        self.columns = [] if relation is None else _unique(relation.columns)
        self._relation = relation
        self._calls = calls

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as Arrow batches of BATCH_ROWS.

        Raises:
            UsageError: a cell cannot be computed, or a limit is reached.
            ArchiveError: a part is missing or damaged.
        """
        if self._relation is None:
            return
        with self._calls():
            reader = self._relation.to_arrow_reader(BATCH_ROWS)
        while True:
            with self._calls():
                batch = next(reader, None)
            if batch is None:
                return
            yield batch

    def rows(self) -> Iterator[tuple]:
        """The rows as Python values; see run_sql."""
        types = [] if self._relation is None else self._relation.types
        for batch in self.batches():
            yield from _rows(batch, types)


def run_sql(archive: Archive, statement: str, limits: SqlLimits | None = None) -> tuple[list[str], list[tuple]]:
    """Column names and rows of one SELECT over the views `videos` and `frames`.

    Cells are Python values: times are UTC without a zone, tags and other maps are dicts, binary cells are bytes. The
    binary columns of `frames` (token, compressor_out, search_key, patches, thumbnail, checksums) exist only when the
    statement names them. Repeated column names are numbered, as DuckDB does in a subquery.

    Args:
        archive: the archive.
        statement: in DuckDB's SQL.
        limits: None for the defaults.
    Raises:
        UsageError: the statement is wrong, is not one reading statement, uses files or settings, or exceeds its limits.
        ArchiveError: a part is missing or damaged.
    """
    with stream_sql(archive, statement, limits) as result:
        return result.columns, list(result.rows())


@contextlib.contextmanager
def stream_sql(
    archive: Archive,
    statement: str,
    limits: SqlLimits | None = None,
    give_up: Callable[[str], NoReturn] | None = None,
) -> Iterator[SqlResult]:
    """The same as run_sql, with no more than one batch of the result in memory.

    Args:
        archive, statement, limits: as in run_sql.
        give_up: ends the process with a message if a statement beyond its limits does not stop, for instance during a
            single call of a function that takes minutes; None: such a call runs to its end.
    """
    if not is_text(statement):
        raise UsageError("the SQL statement holds bytes that are no UTF-8; type it as text")
    limits = limits or SqlLimits()
    connection = duckdb.connect(":memory:")
    watch = _Watch(connection, limits, give_up)
    calls = partial(_duckdb_errors, archive, watch)
    try:
        with calls():
            connection.execute("SET TimeZone = 'UTC'")  # else now(), casts and dates use the machine's
            connection.execute(f"SET memory_limit = '{limits.memory_bytes}B'")
            connection.execute("SET temp_directory = ''")  # what does not fit in memory is refused, not written to disk
            _create_views(connection, archive, statement)
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            _refuse_other_statements(connection, statement)
            relation = connection.sql(statement)
        yield SqlResult(relation, calls)
    finally:
        watch.end()
        connection.close()


class _Watch:
    """Interrupts a connection when its statement exceeds a limit.

    Attributes:
        why: the limit that was exceeded, for people; empty before.
        limits: the statement's.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, limits: SqlLimits, give_up: Callable | None):
        self.why = ""
        self._connection = connection
        self.limits = limits
        self._give_up = give_up
        self._before = anonymous_bytes()
        self._begun, self._over_since = time.monotonic(), 0.0
        self._is_working = False
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._check, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Marks the time during which the connection works.

        Raises:
            UsageError: a limit was exceeded before.
        """
        with self._changing:
            if self.why:
                raise UsageError(self.why)
            self._is_working = True
        try:
            yield
        finally:
            with self._changing:
                self._is_working = False

    def end(self) -> None:
        """Ends the checks, and waits for their thread.

        A thread that still held the connection when Python exits would keep DuckDB's objects alive, and DuckDB would
        report each of them as leaked.
        """
        self._ended.set()
        if self._thread is not threading.current_thread():  # garbage collection can close a result in any thread
            self._thread.join()

    def _check(self) -> None:
        while not self._ended.wait(CHECK_SECONDS):
            with self._changing:
                self.why = self.why or self._exceeded()
                if not self.why or not self._is_working:
                    self._over_since = 0.0
                    continue
                self._over_since = self._over_since or time.monotonic()
                self._connection.interrupt()  # repeated, because an interrupt before a call begins is lost
            if self._give_up is not None and time.monotonic() - self._over_since > GRACE_SECONDS:
                self._give_up(self.why)

    def _exceeded(self) -> str:
        if time.monotonic() - self._begun > self.limits.seconds:
            return f"SQL: not done after {self.limits.seconds:g} s; allow more with --timeout, or ask for less"
        if anonymous_bytes() - self._before > self.limits.memory_bytes:
            return _too_much_memory(self.limits)
        return ""


def _too_much_memory(limits: SqlLimits) -> str:
    allowed = f"{limits.memory_bytes / 1e6:,.0f} MB"
    return f"SQL: takes more than {allowed} of memory; allow more with --memory, or ask for less"


@contextlib.contextmanager
def _duckdb_errors(archive: Archive, watch: _Watch) -> Iterator[None]:
    """Turns errors of a call to DuckDB into one line for the user."""
    try:
        with watch.working():
            yield
    except (duckdb.Error, OSError, MemoryError) as error:  # Arrow's reader turns DuckDB's errors into OSErrors
        raise _plain_error(archive, watch, error) from error


def select_frames(archive: Archive, condition: str) -> dict[int, np.ndarray | None]:
    """The frames for which an SQL condition on columns of `videos` and `frames` is true.

    A column that both views have is the video's. If the condition also names columns that only frames have, it must be
    written `videos.name` or `frames.name`.

    Returns:
        The indexes of the frames, ascending, by video number; None for all frames of the video.
    Raises:
        UsageError: the condition is wrong, or uses files or settings.
        ArchiveError: a part is missing or damaged.
    """
    try:
        _, rows = run_sql(archive, f"SELECT DISTINCT video_number FROM videos WHERE (\n{condition}\n)")
        return {number: None for (number,) in rows if number is not None}
    except UsageError as error:
        if not isinstance(error.__cause__, duckdb.BinderException):
            raise
    columns = "video_number, list(frame_index ORDER BY frame_index)"
    statement = f"SELECT {columns} FROM {_JOINED} WHERE (\n{condition}\n) GROUP BY video_number ORDER BY video_number"
    with stream_sql(archive, statement) as result:
        pairs = (pair for batch in result.batches() for pair in zip(*batch.columns, strict=True))
        return {number.as_py(): indexes.values.to_numpy() for number, indexes in pairs}


def select_videos(archive: Archive, condition: str, *, of_frames: bool = True) -> set[str]:
    """The URIs of the videos for which an SQL condition is true; deleted videos are left out.

    Args:
        archive: the archive.
        condition: on columns of `videos`. If it also names columns of `frames`, it is true for a video if it is true
            for one of its frames.
        of_frames: whether it may name columns of `frames`.
    Raises:
        UsageError: the condition is wrong, or uses files or settings.
        ArchiveError: a part is missing or damaged.
    """
    try:
        _, rows = run_sql(archive, f"SELECT source_uri FROM videos WHERE (\n{condition}\n)")
    except UsageError as error:
        if not (of_frames and isinstance(error.__cause__, duckdb.BinderException)):
            raise
        statement = f"SELECT DISTINCT source_uri FROM {_JOINED} WHERE (\n{condition}\n)"
        _, rows = run_sql(archive, statement)
    return {uri for (uri,) in rows}


def _create_views(connection: duckdb.DuckDBPyConnection, archive: Archive, statement: str) -> None:
    rows = archive.videos.arrow()
    rows = rows.filter(pc.not_equal(rows.column("status"), str(Status.DELETED)))
    source = pa.array([source_text(uri) for uri in rows.column("uri").to_pylist()], pa.string())
    for name in ("captured_at", "indexed_at"):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, name, rows.column(place).cast(pa.timestamp("us")))  # UTC without a zone
    connection.register("stored_videos", rows.append_column("source", source))
    connection.execute(_VIDEOS_VIEW)
    words = set(re.findall(r"\w+", statement.lower()))
    named = [field for field in COLUMNS if field.name not in BINARY or field.name in words]
    parts = archive.frames.parts() if any("frames" in word for word in words) else ()  # a million take a while
    connection.register("stored_frames", _frames_dataset(archive, pa.schema(named), parts))
    connection.execute(_FRAMES_VIEW.format(columns=", ".join(field.name for field in named)))


def _frames_dataset(archive: Archive, schema: pa.Schema, parts: Sequence[LivePart]) -> ds.Dataset:
    """Parts of published videos, each read when the statement needs it."""
    for folder in {"", *(posixpath.dirname(part.path) for part in parts)}:
        check_no_links(join(archive.frames_uri, folder))
    schema = pa.schema([field.with_nullable(True) for field in schema])
    place = file_path(archive.frames_uri).decode()
    checked = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    ids = dict(archive.videos.published().items())
    number, video_id = ds.field("video_number"), ds.field("video_id")
    fragments = [
        checked.make_fragment(
            f"{place}/{part.path}",
            fs.LocalFileSystem(),
            # true for all rows of the part, so a statement about one video opens only its parts
            (number == pa.scalar(part.video_number, pa.int32())) & (video_id == ids[part.video_number]),
        )
        for part in parts
    ]
    return ds.FileSystemDataset(fragments, schema, checked, fs.LocalFileSystem())


def _refuse_other_statements(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        raise UsageError(f"one SQL statement at a time, not {len(statements)}")
    kind = statements[0].type.name
    if kind not in _READING:
        raise UsageError(f"{kind} is not allowed: the archive is only read; write a SELECT on videos and frames")


def _unique(names: list[str]) -> list[str]:
    """Numbers repeated names, ignoring case, as DuckDB does for the columns of a subquery."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        new = name
        while new.lower() in counts:
            new = f"{name}_{counts[name.lower()]}"
            counts[name.lower()] += 1
        counts[new.lower()] = 1
        unique.append(new)
    return unique


def _rows(batch: pa.RecordBatch, kinds: Sequence) -> Iterator[tuple]:
    """Rows as Python values; duckdb's own fetchmany needs pytz for times with a zone."""
    columns = []
    for column, kind in zip(batch.columns, kinds, strict=True):
        values = column.to_pylist(maps_as_pydicts="strict")
        if str(kind) in ("HUGEINT", "UHUGEINT"):  # the type of sum(); a decimal in Arrow
            values = [int(value) if isinstance(value, (decimal.Decimal, float)) else value for value in values]
        columns.append(values)
    return zip(*columns, strict=True)


def _plain_error(archive: Archive, watch: _Watch, error: Exception) -> UsageError | ArchiveError:
    text = _one_line(error)
    if watch.why:
        return UsageError(watch.why)
    if isinstance(error, (MemoryError, duckdb.OutOfMemoryException)) or text.startswith("Out of Memory Error"):
        return UsageError(_too_much_memory(watch.limits))
    if isinstance(error, duckdb.PermissionException) or "configuration has been locked" in text:
        return UsageError(f"SQL can read the views videos and frames, and nothing else: {text}")
    if isinstance(error, duckdb.IOException) or any(mark in text for mark in _PART_ERRORS):
        return DamagedError(f"{source_text(archive.uri)}: damaged archive: {text}")
    if isinstance(error, duckdb.CatalogException) and (match := re.match(_NO_TABLE, text)):
        return UsageError(f"SQL: there is no table {match[1]}; the views are videos and frames")
    return UsageError(f"SQL: {text}")


def _one_line(error: Exception) -> str:
    """DuckDB's message, without the copy of the statement below it."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
