"""SQL over the archive: DuckDB views `videos` and `frames` of what is published, and nothing else to be reached."""

import contextlib
import decimal
import re
from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from storage.archive import Archive
from storage.errors import ArchiveError, DamagedError, UsageError
from storage.files import is_text, local_path, source_text
from storage.layout import BINARY, COLUMNS
from storage.records import Status
from storage.tables import refuse_links

# Times come as plain TIMESTAMPs in UTC (_offer_views): a cast here would take the session's time zone.
_VIDEOS_VIEW = """
CREATE VIEW videos AS SELECT
    video_id, video_number, source, uri AS source_uri, status, reason, detail, decoder, container, codec, width, height,
    rotation_degrees, duration_seconds, clock_offset_seconds, frame_count AS frames, size_bytes,
    captured_at, CASE WHEN captured_at IS NOT NULL THEN coalesce(captured_from, 'manifest') END AS captured_from, tags,
    model_id, sampling, attempts, indexed_at
FROM stored_videos
"""
_FRAMES_VIEW = "CREATE VIEW frames AS SELECT {columns} FROM stored_frames"
_JOINED = "frames JOIN videos USING (video_number, video_id, model_id, sampling)"
_READING = ("SELECT", "EXPLAIN", "RELATION", "LOGICAL_PLAN")  # DuckDB's names of statements that change nothing


def run_sql(archive: Archive, statement: str) -> tuple[list[str], list[tuple]]:
    """Column names and rows of one SELECT over the views `videos` and `frames`.

    Cells are Python values: times are UTC without a zone, tags and other maps dicts, binary cells bytes. The binary
    columns of `frames` (token, compressor_out, search_key, patches, thumbnail, checksums) are there only when the
    statement names them.

    Column names are unique: repeated ones are numbered, as DuckDB does in a subquery.

    Raises:
        UsageError: the statement is wrong, is not one reading statement, or reaches for files or settings.
        ArchiveError: a part is missing or damaged.
    """
    with _running(archive, statement) as relation:
        if relation is None:
            return [], []
        return _unique(relation.columns), _rows(relation)


def select_frames(archive: Archive, condition: str) -> dict[int, np.ndarray | None]:
    """The frames that an SQL condition on columns of `videos` and `frames` is true of.

    A column that both views have is the video's, unless the condition names columns of frames alone too: then it has to
    be written `videos.name` or `frames.name`.

    Returns:
        By video number: the frames' indexes, ascending, or None for all frames of the video.
    Raises:
        UsageError: the condition is wrong, or reaches for files or settings.
        ArchiveError: a part is missing or damaged.
    """
    try:
        _, rows = run_sql(archive, f"SELECT DISTINCT video_number FROM videos WHERE (\n{condition}\n)")
        return {number: None for (number,) in rows if number is not None}
    except UsageError as error:
        if not isinstance(error.__cause__, duckdb.BinderException):
            raise
    statement = f"SELECT video_number, frame_index FROM {_JOINED} WHERE (\n{condition}\n) ORDER BY ALL"
    with _running(archive, statement) as relation:
        table = relation.to_arrow_table()
        numbers, indexes = (table.column(name).to_numpy() for name in ("video_number", "frame_index"))
        unique, starts = np.unique(numbers, return_index=True)
        ends = [*starts[1:], len(indexes)]
        return {number: indexes[start:end] for number, start, end in zip(unique.tolist(), starts, ends[: len(unique)])}


def select_videos(archive: Archive, condition: str, *, of_frames: bool = True) -> set[str]:
    """The URIs of the videos that an SQL condition is true of.

    Args:
        archive: whose videos; deleted ones are not looked at.
        condition: on columns of `videos`. One that names columns of `frames` too is true of a video where it is true of
            any of its frames.
        of_frames: whether it may name columns of `frames`.
    Raises:
        UsageError: the condition is wrong, or reaches for files or settings.
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


@contextlib.contextmanager
def _running(archive: Archive, statement: str) -> Iterator[duckdb.DuckDBPyRelation | None]:
    """The result of a statement over the views; what goes wrong while it is read is told in plain words."""
    if not is_text(statement):
        raise UsageError("the SQL statement holds bytes that are no UTF-8; type it as text")
    connection = duckdb.connect(":memory:")
    try:
        connection.execute("SET TimeZone = 'UTC'")  # else the machine's, for now(), casts and dates in a statement
        _offer_views(connection, archive, statement)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        _refuse_other_statements(connection, statement)
        yield connection.sql(statement)
    except duckdb.Error as error:
        raise _plain_error(archive, error) from error
    except OSError as error:
        raise DamagedError(f"{source_text(archive.uri)}: damaged archive: {_one_line(error)}") from error
    finally:
        connection.close()


def _offer_views(connection: duckdb.DuckDBPyConnection, archive: Archive, statement: str) -> None:
    rows = archive.videos_arrow()
    rows = rows.filter(pc.not_equal(rows.column("status"), str(Status.DELETED)))
    source = pa.array([source_text(uri) for uri in rows.column("uri").to_pylist()], pa.string())
    for name in ("captured_at", "indexed_at"):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, name, rows.column(place).cast(pa.timestamp("us")))  # UTC, without its zone
    connection.register("stored_videos", rows.append_column("source", source))
    connection.execute(_VIDEOS_VIEW)
    words = set(re.findall(r"\w+", statement.lower()))
    named = [field for field in COLUMNS if field.name not in BINARY or field.name in words]
    connection.register("stored_frames", _frames_dataset(archive, pa.schema(named)))
    connection.execute(_FRAMES_VIEW.format(columns=", ".join(field.name for field in named)))


def _frames_dataset(archive: Archive, schema: pa.Schema) -> ds.Dataset:
    """Parts of published videos, opened and read as the statement streams through them."""
    refuse_links(archive.frames_uri)
    schema = pa.schema([field.with_nullable(True) for field in schema])
    file_system, place = _arrow_file_system(archive.frames_uri)
    checked = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    )
    ids = archive.published()
    number, video_id = ds.field("video_number"), ds.field("video_id")
    fragments = [
        checked.make_fragment(
            f"{place}/{part.path}",
            file_system,
            # what all rows of the part have in common: a statement about one video opens no other's parts
            (number == pa.scalar(part.video_number, pa.int32())) & (video_id == ids[part.video_number]),
        )
        for part in archive.parts()
    ]
    return ds.FileSystemDataset(fragments, schema, checked, file_system)


def _arrow_file_system(uri: str) -> tuple[fs.FileSystem, str]:
    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), path.decode()
    import fsspec

    remote, place = fsspec.core.url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(remote)), place


def _refuse_other_statements(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        raise UsageError(f"one SQL statement at a time, not {len(statements)}")
    kind = statements[0].type.name
    if kind not in _READING:
        raise UsageError(f"{kind} is not possible here: the archive is only read; write a SELECT on videos and frames")


def _unique(names: list[str]) -> list[str]:
    """Numbers repeated names, whatever their case, as DuckDB does for the columns of a subquery."""
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


def _rows(relation: duckdb.DuckDBPyRelation) -> list[tuple]:
    table = relation.to_arrow_table()  # duckdb's own fetchall wants pytz for times with a zone
    columns = []
    for column, kind in zip(table.columns, relation.types, strict=True):
        values = column.to_pylist(maps_as_pydicts="strict")
        if str(kind) in ("HUGEINT", "UHUGEINT"):  # what sum() gives; Arrow knows it as a decimal
            values = [int(value) if isinstance(value, (decimal.Decimal, float)) else value for value in values]
        columns.append(values)
    return list(zip(*columns, strict=True))


def _plain_error(archive: Archive, error: duckdb.Error) -> UsageError | ArchiveError:
    text = _one_line(error)
    if isinstance(error, duckdb.PermissionException) or "configuration has been locked" in text:
        return UsageError(f"SQL reads the views videos and frames, and nothing else: {text}")
    if isinstance(error, duckdb.IOException) or "registered as 'stored_frames' failed" in text:
        return DamagedError(f"{source_text(archive.uri)}: damaged archive: {text}")
    return UsageError(f"SQL: {text}")


def _one_line(error: Exception) -> str:
    """DuckDB's message without the copy of the statement that it draws below."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
