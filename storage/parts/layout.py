"""The layout of a part: its columns, and how the wide cells are packed.

A part is ordinary Parquet. Its wide columns are written so that the position of a cell in the file can be computed: not
null, plain, uncompressed, every cell of a column equally long, one data page per row group. write.py writes parts,
read.py reads them.

Columns, in the order of `COLUMNS`; `search_key` and `patches` are absent where the archive keeps none. Cells:
    token, compressor_out, search_key: little-endian float16, row-major.
    patches: scales (K float32), positions (K uint16), values (K x D int8), one after the other.
    thumbnail: a JPEG file, of any length.
    checksums: one CRC32C (uint32, little-endian) for each binary cell before it in the row, in their order, so that a
        cell can be checked without the others.
    checksum: CRC32C over those binary cells joined.
The key-value metadata `vidx.cells` has the width of each binary column, in order (null: any length), and `vidx.shapes`
the shapes of their cells, both as JSON. `vidx.problem` says why the part does not hold its whole segment, if so.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.checks import (
    INT32,
    INT64,
    LINE,
    VIDEO_ID,
    InvalidValue,
    check_column_range,
    check_column_text,
    check_integer,
    file_uri,
    get_value,
)
from storage.errors import ArchiveError, DamagedError
from storage.files import file_path, file_size, join, source_text
from storage.records import SEGMENT_KEY, PatchRows, Sampling, TokenBatch

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 32 << 20  # the most that a writer holds; groups of wide rows have fewer rows
CELLS_KEY = b"vidx.cells"
SHAPES_KEY = b"vidx.shapes"
PROBLEM_KEY = b"vidx.problem"
BINARY = ("token", "compressor_out", "search_key", "patches", "thumbnail", "checksums")
MOST_SIDE, MOST_CELL_BYTES = 1 << 24, 1 << 30  # limits of a cell's shape and size
MOST_SECONDS = 1e12
_RANGES = {
    "video_number": (1, INT32),
    "time_base_num": (1, INT64),
    "time_base_den": (1, INT64),
    "frame_index": (0, 2**32 - 1),
    "pts_seconds": (-MOST_SECONDS, MOST_SECONDS),
    "time_seconds": (-MOST_SECONDS, MOST_SECONDS),
    "duration_seconds": (0, MOST_SECONDS),
}
_PATTERNS = {"video_id": VIDEO_ID, "segment": SEGMENT_KEY, "model_id": LINE, "dtype": LINE}
_RANKS = {"token": 2, "compressor_out": 2, "search_key": 1, "patches": 2}  # dimensions of a cell's shape

COLUMNS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("video_number", pa.int32(), nullable=False),
        pa.field("segment", pa.string(), nullable=False),
        pa.field("ticks", pa.int64(), nullable=False),
        pa.field("time_base_num", pa.int64(), nullable=False),
        pa.field("time_base_den", pa.int64(), nullable=False),
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64(), nullable=False),
        pa.field("time_seconds", pa.float64(), nullable=False),
        pa.field("duration_seconds", pa.float64(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("stand_in_ticks", pa.int64()),  # null: the frame stands for itself
        pa.field("row", pa.int32(), nullable=False),
        pa.field("token", pa.binary(), nullable=False),
        pa.field("compressor_out", pa.binary(), nullable=False),
        pa.field("search_key", pa.binary(), nullable=False),
        pa.field("patches", pa.binary(), nullable=False),
        pa.field("thumbnail", pa.binary(), nullable=False),
        pa.field("checksums", pa.binary(), nullable=False),
        pa.field("checksum", pa.int64(), nullable=False),
    ]
)


@contextlib.contextmanager
def read_errors(uri: str) -> Iterator[None]:
    """Turns an error of the block, which reads the file at uri, into one line for the user.

    Raises:
        ArchiveError: the system cannot read the file.
        DamagedError: it is missing or damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{source_text(uri)}: missing, though the archive names it") from error
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's errors of broken files have none
            raise ArchiveError(f"{source_text(uri)}: cannot be read: {error.strerror}") from error
        raise DamagedError(f"{source_text(uri)}: damaged or unreadable: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read; the checksum of every page is checked.

    Arrow opens the file itself. Its threads keep a Python file for some time after a read has returned, and a process
    that ends in this time is aborted (apache/arrow issue 33975).
    """
    size = file_size(uri)
    with pa.OSFile(file_path(uri)) as file:
        footer = pq.read_metadata(file)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        if any(group.num_rows < 0 for group in groups) or sum(group.num_rows for group in groups) != footer.num_rows:
            raise InvalidValue("its row groups do not have as many rows as it says")
        if footer.num_rows > size or sum(group.total_byte_size for group in groups) > most_bytes(size):
            raise InvalidValue(f"{size} bytes cannot hold {footer.num_rows} rows, or as many bytes as it says")
        columns = [footer.schema.column(number) for number in range(footer.num_columns)]
        texts = [column.path for column in columns if column.logical_type.type == "STRING" and "." not in column.path]
        yield pq.ParquetFile(file, metadata=footer, read_dictionary=texts, page_checksum_verification=True)


def most_bytes(size: int) -> int:
    """The memory that a Parquet file of this size may need; files that vidx has written need far less."""
    return 64 * size + (1 << 20)


def read_columns(uri: str, schema: pa.Schema) -> pa.Table:
    """Columns of a Parquet file.

    A file holds a text that all rows share once. Texts are copied for each row only after a check that they fit.
    """
    with open_parquet(uri) as file:
        table = file.read(columns=schema.names)
    check_text_bytes(text_bytes(table), file_size(uri))
    return with_columns(table, schema)


def with_columns(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of a schema; a missing column becomes null.

    Raises:
        InvalidValue: a missing column must not be null.
    """
    for field in schema:
        if field.name not in rows.column_names:
            if not field.nullable:
                raise InvalidValue(f"it has no column {field.name}")
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(schema.names).cast(schema)


def read_part_columns(frames_uri: str, path: str, names: Sequence[str]) -> pa.Table:
    """Columns of a part, checked.

    Raises:
        DamagedError: it is missing, or vidx cannot have written it.
    """
    with read_errors(join(frames_uri, path)):
        table = read_columns(file_uri(frames_uri, path), pa.schema([COLUMNS.field(name) for name in names]))
        for name in names:
            if name in _RANGES:
                check_column_range(name, table.column(name), *_RANGES[name])
            if name in _PATTERNS:
                check_column_text(name, table.column(name), _PATTERNS[name])
        for sampling in table.column("sampling").unique().to_pylist() if "sampling" in names else ():
            Sampling.from_text(sampling)
        if not table.num_rows:
            raise InvalidValue("it has no rows")
        table.validate(full=True)
        return table


def text_bytes(table: pa.Table) -> int:
    """The bytes that the texts of a table, as open_parquet reads it, need when they are copied for each row."""
    pieces = [piece for column in table.columns if pa.types.is_dictionary(column.type) for piece in column.chunks]
    return sum(pc.sum(pc.take(pc.binary_length(piece.dictionary), piece.indices)).as_py() or 0 for piece in pieces)


def check_text_bytes(count: int, size: int) -> None:
    """Refuses texts that need so many bytes, of a file of this size.

    Raises:
        InvalidValue: vidx cannot have written them.
    """
    if count > most_bytes(size):
        raise InvalidValue("its texts are too long for its size")


def cell_shapes(tokens: TokenBatch) -> dict[str, list[int]]:
    """The shape of one cell of each binary column that the tokens fill."""
    values = None if tokens.patches is None else tokens.patches.values
    arrays = (tokens.token, tokens.compressor_out, tokens.search_key, values)
    return {name: list(array.shape[1:]) for name, array in zip(_RANKS, arrays, strict=True) if array is not None}


def shapes_of(document: Any) -> dict[str, list[int]]:
    """The shapes in a part's metadata, as cell_shapes gives them.

    Raises:
        InvalidValue: vidx cannot have written them.
    """
    shapes = {}
    for name, ranks in _RANKS.items():
        if name in ("search_key", "patches") and isinstance(document, dict) and name not in document:
            continue
        sides = get_value(document, name)
        if not isinstance(sides, list) or len(sides) != ranks:
            raise InvalidValue(f"the shape of its {name} does not have {ranks} dimensions")
        shapes[name] = [check_integer(f"{name}'s shape", side, 0, MOST_SIDE) for side in sides]
    if len(shapes) != len(document) or any((width or 0) > MOST_CELL_BYTES for width in cell_widths(shapes).values()):
        raise InvalidValue("vidx does not write such cells")
    return shapes


def cell_widths(shapes: dict[str, list[int]]) -> dict[str, int | None]:
    """The width in bytes of each binary column, in file order; None if it differs from row to row."""
    widths: dict[str, int | None] = {name: 2 * math.prod(shape) for name, shape in shapes.items() if name != "patches"}
    if "patches" in shapes:
        rows, width = shapes["patches"]
        widths["patches"] = rows * (4 + 2 + width)
    widths["thumbnail"] = None
    widths["checksums"] = 4 * len(widths)
    return widths


def row_group_rows(shapes: dict[str, list[int]]) -> int:
    """The number of rows in a row group; it depends on the shapes only, so a file's bytes depend on its rows only."""
    row_bytes = sum(width or 0 for width in cell_widths(shapes).values())
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, row_bytes)))


def part_schema(shapes: dict[str, list[int]]) -> pa.Schema:
    """The columns of a part with cells of these shapes."""
    widths = cell_widths(shapes)
    kept = [field for field in COLUMNS if field.name not in BINARY or field.name in widths]
    metadata = {CELLS_KEY: json.dumps(widths), SHAPES_KEY: json.dumps(shapes)}
    return pa.schema(kept, metadata=metadata)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """(T, width) uint8: the bytes of each row, little-endian, copied."""
    count = len(array)
    cells = np.array(array, array.dtype.newbyteorder("<"), order="C", copy=True)
    return cells.reshape(count, -1).view(np.uint8)


def pack_patches(patches: PatchRows) -> np.ndarray:
    """(T, width) uint8: the patch rows of each frame as one cell."""
    pieces = (patches.scales.astype("<f4"), patches.positions.astype("<u2"), patches.values)
    return np.concatenate([as_bytes(piece) for piece in pieces], axis=1)


def unpack_patches(cells: np.ndarray, rows: int, width: int) -> PatchRows:
    """The patch rows of T frames from their cells.

    Args:
        cells: (T, K * (6 + D)) uint8.
        rows: K.
        width: D.
    """
    count = len(cells)
    scales, positions, values = np.split(cells, (4 * rows, 6 * rows), axis=1)
    return PatchRows(
        values=values.copy().view(np.int8).reshape(count, rows, width),
        scales=scales.copy().view("<f4").astype(np.float32, copy=False),
        positions=positions.copy().view("<u2").astype(np.uint16, copy=False),
    )
