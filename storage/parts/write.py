"""store: writes the rows of one segment as one Parquet file (layout: storage/parts/layout.py)."""

import json
import posixpath
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import NewFile, join, name_with_checksum, remove, write_errors
from storage.parts.layout import BINARY, PROBLEM_KEY, as_bytes, cell_shapes, pack_patches, part_schema, row_group_rows
from storage.records import Part, Problem, TokenBatch, check_array

# Columns whose bounds are in Delta's log, so that readers can skip a part without opening it.
_BOUNDED = ("video_id", "video_number", "segment", "ticks", "frame_index", "time_seconds", "duration_seconds")


@dataclass(frozen=True, repr=False)
class FrameColumns:
    """The times of T frames; seconds are float64, the others int64, all (T,)."""

    ticks: np.ndarray
    frame_index: np.ndarray
    pts_seconds: np.ndarray
    time_seconds: np.ndarray
    duration_seconds: np.ndarray

    def __post_init__(self):
        for field in fields(self):
            dtype = np.float64 if field.name.endswith("_seconds") else np.int64
            check_array(f"FrameColumns.{field.name}", getattr(self, field.name), dtype, (len(self.ticks),))

    def __len__(self) -> int:
        return len(self.ticks)

    def __repr__(self) -> str:
        return f"FrameColumns({len(self)} frames)"


class PartWriter:
    """Writes the rows of one segment to a new Parquet file, with one row group in memory.

    The file's bytes depend on the rows only, not on how they were appended. Its name is random, so two writers of one
    segment use different files, and contains the CRC32C of its bytes. Readers see it when the archive commits it.
    """

    def __init__(
        self,
        frames_uri: str,
        *,
        video_id: str,
        video_number: int,
        segment_key: str,
        time_base: Fraction,
        model_id: str,
        sampling: str,
        dtype: str,
        folder: str = "",
    ):
        """Begins a part; nothing is written yet.

        Args:
            frames_uri: the archive's folder of frames.
            video_id, video_number, segment_key, time_base, model_id, sampling, dtype: the same in all rows.
            folder: of the video's shard, in the folder of frames.
        """
        self._frames_uri = frames_uri
        self._stem = posixpath.join(folder, uuid.uuid4().hex)
        self._uri = join(frames_uri, f"{self._stem}.parquet")  # until its checksum is known
        self._constants = {
            "video_id": video_id,
            "video_number": video_number,
            "segment": segment_key,
            "time_base_num": time_base.numerator,
            "time_base_den": time_base.denominator,
            "model_id": model_id,
            "sampling": sampling,
            "dtype": dtype,
        }
        self._shapes: dict[str, list[int]] = {}  # of the first frames
        self._pending: list[dict[str, np.ndarray | list[bytes]]] = []
        self._pending_count = 0
        self._row_count = 0
        self._bounds = _Bounds(self._constants)
        self._new: NewFile | None = None
        self._writer: pq.ParquetWriter  # of `_new`

    def append(self, columns: FrameColumns, tokens: TokenBatch, thumbnails: Sequence[bytes]) -> None:
        """Adds T frames; the caller may change the arrays afterwards.

        Raises:
            ArchiveError: the file cannot be written.
            ValueError: counts differ, or shapes differ from the part's first frames.
        """
        if not len(columns) == len(tokens) == len(thumbnails):
            raise ValueError(f"{len(columns)} times, {len(tokens)} tokens and {len(thumbnails)} thumbnails")
        if len(columns) == 0:
            return
        shapes = cell_shapes(tokens)
        if not self._shapes:
            self._shapes = shapes
            self._group_rows = row_group_rows(shapes)
        if shapes != self._shapes:
            raise ValueError(f"frames of shapes {shapes} in a part of {self._shapes}")
        self._pending.append(_batch_columns(columns, tokens, thumbnails))
        self._pending_count += len(columns)
        while self._pending_count >= self._group_rows:
            self._write_group(self._group_rows)

    def close(self, problem: Problem | None = None) -> Part | None:
        """Finishes the file and returns it as a commit needs it; None, and no file, if nothing was appended.

        Args:
            problem: why the segment is not whole; it is stored in the file.
        Raises:
            ArchiveError: the file cannot be written.
        """
        if not self._shapes:
            return None
        if self._pending_count:
            self._write_group(self._pending_count)
        new = self._new
        assert new is not None  # since the first group was written
        with write_errors(self._uri):
            if problem is not None:
                self._writer.add_key_value_metadata({PROBLEM_KEY: json.dumps(asdict(problem))})
            self._writer.close()
            size_bytes = new.file.tell()
            path = name_with_checksum(self._stem, new.file.checksum, ".parquet")
            new.keep(join(self._frames_uri, path))
        self._new = None
        return Part(path, self._row_count, size_bytes, self._bounds.as_json(self._row_count))

    def abort(self) -> None:
        """Removes the file; call it instead of close, or after append or close failed."""
        if self._new is not None:
            self._writer.is_open = False  # else its destructor writes a footer into the closed file
            self._new.discard()
            self._new = None
        self._pending, self._shapes = [], {}

    @staticmethod
    def discard(frames_uri: str, part: Part) -> None:
        """Removes a finished part that is not committed."""
        remove(join(frames_uri, part.path))

    def _write_group(self, count: int) -> None:
        values = _take(self._pending, count)
        self._pending_count -= count
        table = self._group_table(values, count)
        self._bounds.widen(values)
        with write_errors(self._uri):
            if self._new is None:
                self._open(table.schema)
            self._writer.write_table(table, row_group_size=count)
        self._row_count += count

    def _open(self, schema: pa.Schema) -> None:
        self._new = NewFile(self._uri)
        binary = set(BINARY) & set(schema.names)
        narrow = [name for name in schema.names if name not in binary]
        self._writer = pq.ParquetWriter(
            self._new.file,
            schema,
            compression={name: "NONE" if name in binary else "SNAPPY" for name in schema.names},
            use_dictionary=[name for name in narrow if pa.types.is_string(schema.field(name).type)],
            column_encoding=dict.fromkeys(binary, "PLAIN"),
            write_statistics=narrow,  # bounds of wide columns would put whole cells into the footer
            data_page_version="1.0",
            data_page_size=1 << 30,  # one page per row group
            write_page_checksum=True,
        )

    def _group_table(self, values: dict, count: int) -> pa.Table:
        cells = {name: values[name] for name in BINARY if name in values}
        checksums, checksum = _checksums(cells, count)
        values |= {
            "checksums": checksums,
            "checksum": checksum,
            "row": np.arange(self._row_count, self._row_count + count, dtype=np.int32),
        }
        schema = part_schema(self._shapes)
        arrays = []
        for field in schema:
            if field.name in self._constants:
                arrays.append(pa.repeat(pa.scalar(self._constants[field.name], field.type), count))
            elif field.name == "stand_in_ticks":
                arrays.append(pa.nulls(count, field.type))
            elif isinstance(value := values[field.name], np.ndarray) and field.type == pa.binary():
                arrays.append(_fixed_cells(value))
            else:
                arrays.append(pa.array(value, field.type))
        return pa.Table.from_arrays(arrays, schema=schema)


class _Bounds:
    """The least and greatest values of the columns in _BOUNDED."""

    def __init__(self, constants: dict):
        self._least = {name: constants[name] for name in _BOUNDED if name in constants}
        self._greatest = dict(self._least)

    def widen(self, values: dict) -> None:
        for name in _BOUNDED:
            if name in values:
                least, greatest = values[name].min().item(), values[name].max().item()
                self._least[name] = min(least, self._least.get(name, least))
                self._greatest[name] = max(greatest, self._greatest.get(name, greatest))

    def as_json(self, row_count: int) -> str:
        nulls = dict.fromkeys(_BOUNDED, 0)
        return json.dumps(
            {"numRecords": row_count, "minValues": self._least, "maxValues": self._greatest, "nullCount": nulls}
        )


def _batch_columns(columns: FrameColumns, tokens: TokenBatch, thumbnails: Sequence[bytes]) -> dict:
    """The columns of T rows, copied; wide ones as (T, width) uint8."""
    batch = {field.name: getattr(columns, field.name).copy() for field in fields(columns)}
    batch["token"] = as_bytes(tokens.token)
    batch["compressor_out"] = as_bytes(tokens.compressor_out)
    if tokens.search_key is not None:
        batch["search_key"] = as_bytes(tokens.search_key)
    if tokens.patches is not None:
        batch["patches"] = pack_patches(tokens.patches)
    batch["thumbnail"] = list(thumbnails)
    return batch


def _take(pending: list[dict], count: int) -> dict:
    """Takes the first count rows out of pending."""
    taken, missing = [], count
    while missing:
        batch = pending.pop(0)
        have = len(batch["ticks"])
        if have > missing:
            pending.insert(0, {name: value[missing:] for name, value in batch.items()})
            batch = {name: value[:missing] for name, value in batch.items()}
        taken.append(batch)
        missing -= min(have, missing)
    joined = {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0] if name != "thumbnail"}
    return joined | {"thumbnail": [cell for batch in taken for cell in batch["thumbnail"]]}


def _checksums(cells: dict[str, np.ndarray | list[bytes]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The (T, 4 * columns) uint8 cells of `checksums`, and the (T,) int64 of `checksum`."""
    each = np.empty((count, len(cells)), "<u4")
    joined = np.zeros(count, np.int64)
    for place, column in enumerate(cells.values()):
        for row, cell in enumerate(column):
            cell = cell if isinstance(cell, bytes) else cell.tobytes()
            each[row, place] = google_crc32c.value(cell)
            joined[row] = google_crc32c.extend(int(joined[row]), cell)
    return each.view(np.uint8), joined


def _fixed_cells(cells: np.ndarray) -> pa.Array:
    """An Arrow binary array over (T, width) uint8, without a copy."""
    count, width = cells.shape
    offsets = np.arange(count + 1, dtype=np.int32) * width
    return pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(cells)])
