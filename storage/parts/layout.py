"""What a part looks like: its columns, and how the wide cells are packed.

A part is ordinary Parquet. Its wide columns are written so that a cell can also be reached by arithmetic: not null,
plain, uncompressed, every cell of a column equally long, one data page per row group. write.py writes, read.py reads.

Columns, in the order of `COLUMNS`; `search_key` and `patches` are absent where the archive keeps none. Cells:
    token, compressor_out, search_key: little-endian float16, row-major.
    patches: scales (K float32), positions (K uint16), values (K x D int8), one after the other.
    thumbnail: a JPEG file, of any length.
    checksums: one CRC32C (uint32, little-endian) for each binary cell before it in the file, in their order, so that
        a read of one column in place can be checked by itself.
    checksum: CRC32C over those binary cells joined.
The key-value metadata under `vidx.cells` names the binary columns in order with the width of each (null: any length),
and `vidx.shapes` the shapes behind them, as JSON. `vidx.problem` says why the part does not hold the whole of its
segment, where that is so.
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
ROW_GROUP_BYTES = 32 << 20  # what a writer holds at most; wide rows come in smaller groups
CELLS_KEY = b"vidx.cells"
SHAPES_KEY = b"vidx.shapes"
PROBLEM_KEY = b"vidx.problem"
BINARY = ("token", "compressor_out", "search_key", "patches", "thumbnail", "checksums")
MOST_SIDE, MOST_CELL_BYTES = 1 << 24, 1 << 30  # of a cell's shape, and of a cell
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
_RANKS = {"token": 2, "compressor_out": 2, "search_key": 1, "patches": 2}  # sides of the shape of a cell

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


class read_errors:
    """Turns what pyarrow and the system say about a broken file into one line that names it."""

    def __init__(self, uri: str):
        self._uri = uri

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, FileNotFoundError):
            raise DamagedError(f"{source_text(self._uri)}: missing, though the archive names it") from error
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's of broken files carry none
            raise ArchiveError(f"{source_text(self._uri)}: cannot be read: {error.strerror}") from error
        if isinstance(error, (OSError, ValueError, pa.ArrowException, KeyError)):
            reason = " ".join(str(error).split())
            raise DamagedError(f"{source_text(self._uri)}: damaged or unreadable: {reason}") from error


@contextlib.contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read, every page against its checksum.

    Arrow opens a local file by itself: of a Python file its threads let go some time after a read has returned, and a
    process that ends in between is aborted (apache/arrow issue 33975).
    """
    size = file_size(uri)
    with pa.OSFile(file_path(uri)) as file:
        footer = pq.read_metadata(file)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        if any(group.num_rows < 0 for group in groups) or sum(group.num_rows for group in groups) != footer.num_rows:
            raise InvalidValue("its row groups are not as long as it says")
        if footer.num_rows > size or sum(group.total_byte_size for group in groups) > most_bytes(size):
            raise InvalidValue(f"{size} bytes cannot hold {footer.num_rows} rows, or what it says of them")
        columns = [footer.schema.column(number) for number in range(footer.num_columns)]
        texts = [column.path for column in columns if column.logical_type.type == "STRING" and "." not in column.path]
        yield pq.ParquetFile(file, metadata=footer, read_dictionary=texts, page_checksum_verification=True)


def most_bytes(size: int) -> int:
    """What a Parquet file of so many bytes may grow to in memory, which is far more than one of vidx does."""
    return 64 * size + (1 << 20)


def read_columns(uri: str, schema: pa.Schema) -> pa.Table:
    """Columns of a Parquet file.

    A text that all rows share stands in a file once: texts are laid out for each row only when they are known to fit.
    """
    with open_parquet(uri) as file:
        table = file.read(columns=schema.names)
    texts = [column for column in table.columns if pa.types.is_dictionary(column.type)]
    if sum(map(_text_bytes, texts)) > most_bytes(file_size(uri)):
        raise InvalidValue("its texts are too long for its size")
    return with_columns(table, schema)


def with_columns(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema; those that rows of another vidx lack are null, where they may be.

    Raises:
        InvalidValue: a column is missing that may not be.
    """
    for field in schema:
        if field.name not in rows.column_names:
            if not field.nullable:
                raise InvalidValue(f"it has no column {field.name}")
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(schema.names).cast(schema)


def read_part_columns(frames_uri: str, path: str, names: Sequence[str]) -> pa.Table:
    """Columns of a part, by the path that the archive has for it.

    Raises:
        DamagedError: it is missing, or not what a part has to be.
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


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Of the texts of a column with a dictionary, row by row."""
    lengths = [pc.sum(pc.take(pc.binary_length(piece.dictionary), piece.indices)).as_py() for piece in column.chunks]
    return sum(length or 0 for length in lengths)


def cell_shapes(tokens: TokenBatch) -> dict[str, list[int]]:
    """The shape behind one cell of each binary column that the tokens fill."""
    shapes = {"token": list(tokens.token.shape[1:]), "compressor_out": list(tokens.compressor_out.shape[1:])}
    if tokens.search_key is not None:
        shapes["search_key"] = list(tokens.search_key.shape[1:])
    if tokens.patches is not None:
        shapes["patches"] = list(tokens.patches.values.shape[1:])
    return shapes


def shapes_of(document: Any) -> dict[str, list[int]]:
    """The shapes that a part's metadata says, as cell_shapes gives them.

    Raises:
        InvalidValue: none that vidx writes.
    """
    shapes = {}
    for name, ranks in _RANKS.items():
        if name in ("search_key", "patches") and isinstance(document, dict) and name not in document:
            continue
        sides = get_value(document, name)
        if not isinstance(sides, list) or len(sides) != ranks:
            raise InvalidValue(f"the shape of its {name} has not {ranks} sides")
        shapes[name] = [check_integer(f"{name}'s shape", side, 0, MOST_SIDE) for side in sides]
    if len(shapes) != len(document) or any((width or 0) > MOST_CELL_BYTES for width in cell_widths(shapes).values()):
        raise InvalidValue("its cells are none that vidx writes")
    return shapes


def cell_widths(shapes: dict[str, list[int]]) -> dict[str, int | None]:
    """Bytes of each binary cell, in file order; None where they differ from row to row."""
    widths: dict[str, int | None] = {name: 2 * math.prod(shape) for name, shape in shapes.items() if name != "patches"}
    if "patches" in shapes:
        rows, width = shapes["patches"]
        widths["patches"] = rows * (4 + 2 + width)
    widths["thumbnail"] = None
    widths["checksums"] = 4 * len(widths)
    return widths


def row_group_rows(shapes: dict[str, list[int]]) -> int:
    """Rows of one row group: constant for a shape, so that a file's bytes depend on its rows alone."""
    return max(
        1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, sum(width or 0 for width in cell_widths(shapes).values())))
    )


def part_schema(shapes: dict[str, list[int]]) -> pa.Schema:
    """The columns of a part that keeps cells of these shapes."""
    widths = cell_widths(shapes)
    kept = [field for field in COLUMNS if field.name not in BINARY or field.name in widths]
    metadata = {CELLS_KEY: json.dumps(widths), SHAPES_KEY: json.dumps(shapes)}
    return pa.schema(kept, metadata=metadata)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """(T, width) uint8: a little-endian copy of each row's bytes."""
    count = len(array)
    cells = np.array(array, array.dtype.newbyteorder("<"), order="C", copy=True)
    return cells.reshape(count, -1).view(np.uint8)


def pack_patches(patches: PatchRows) -> np.ndarray:
    """(T, width) uint8: each frame's patch tier as one cell."""
    pieces = (patches.scales.astype("<f4"), patches.positions.astype("<u2"), patches.values)
    return np.concatenate([as_bytes(piece) for piece in pieces], axis=1)


def unpack_patches(cells: np.ndarray, rows: int, width: int) -> PatchRows:
    """The patch tier of T frames from their cells.

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
