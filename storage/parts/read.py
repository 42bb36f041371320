"""Reads single cells of parts: positions from the footer, bytes from the mapped file, each checked by its checksum."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq

from storage.checks import InvalidValue, check_text, file_uri, get_value, parse_json
from storage.errors import ArchiveError, DamagedError
from storage.files import file_path, file_size, join, map_file, source_text
from storage.parts.layout import (
    CELLS_KEY,
    PROBLEM_KEY,
    SHAPES_KEY,
    cell_widths,
    open_parquet,
    read_errors,
    read_part_columns,
    shapes_of,
    unpack_patches,
)
from storage.records import FrameRef, PatchRows, Problem, Reason

CHECKSUM_BYTES = 4  # of one cell of a row
NEAR_BYTES = 256  # the most between the checksums of two rows that are read together
LENGTH_BYTES = 4  # Parquet's plain BYTE_ARRAY has the length before each value
MAX_PAGE_HEADER_BYTES = 1024
PARTS_KEPT_OPEN = 256  # each holds a file descriptor


@dataclass(frozen=True, repr=False)
class _PartFile:
    """An open part: the first row of each row group, and the positions of the cells.

    Attributes:
        content: (bytes,) uint8, the mapped file.
        group_starts: (G + 1,) int64, first row of each row group; the last entry is the row count.
        widths: width of each binary column in file order; None if its cells differ in length.
        bases: (G,) int64 for each column that can be read in place: position of the length of its first value.
        problem: why it does not hold its whole segment, or None.
    """

    uri: str
    content: np.ndarray
    group_starts: np.ndarray
    widths: dict[str, int | None]
    shapes: dict[str, list[int]]
    bases: dict[str, np.ndarray]
    problem: Problem | None


def read_cells(frames_uri: str, column: str, refs: Sequence[FrameRef]) -> np.ndarray:
    """(T, width) uint8: one binary column of the given frames, copied; each cell is checked against its CRC32C.

    Raises:
        ArchiveError: a part is missing or damaged (the message names file and row), or has no such column.
        ValueError: the frames' cells are not equally long.
    """
    cells = None
    for part_name, places, rows in _by_part(refs):
        part = _open_part(frames_uri, part_name)
        found = _checked_rows(part, column, rows)
        width = part.widths[column]
        if width is None:
            raise ValueError(f"{column}: cells of different lengths; use read_thumbnails")
        if len(rows) == len(refs):  # all from one part, so they are in order
            return np.ascontiguousarray(found)
        if cells is None:
            cells = np.empty((len(refs), width), np.uint8)
        if width != cells.shape[1]:
            raise ValueError(f"{column}: cells of {width} and of {cells.shape[1]} bytes in one read")
        cells[places] = found
    return np.empty((0, 0), np.uint8) if cells is None else cells


def read_tokens(frames_uri: str, refs: Sequence[FrameRef], token_shape: tuple[int, int] | None = None) -> np.ndarray:
    """(T, C*C, H) float16: the vision tokens after pre-fusion.

    Args:
        frames_uri: the archive's frames table.
        refs: the frames, in the order wanted.
        token_shape: (C*C, H) that the model expects; None: any.
    Raises:
        ArchiveError: a part is missing or damaged, or holds tokens of another shape.
    """
    return _read_floats(frames_uri, "token", refs, token_shape)


def read_compressor_out(
    frames_uri: str, refs: Sequence[FrameRef], token_shape: tuple[int, int] | None = None
) -> np.ndarray:
    """(T, C*C, D) float16: the compressor's output before the projector; arguments and errors as read_tokens."""
    return _read_floats(frames_uri, "compressor_out", refs, token_shape)


def read_keys(frames_uri: str, refs: Sequence[FrameRef]) -> np.ndarray:
    """(T, E) float16: the search keys."""
    return _read_floats(frames_uri, "search_key", refs, None)


def read_patches(frames_uri: str, refs: Sequence[FrameRef], width: int | None = None) -> PatchRows:
    """The patch rows of the frames.

    Args:
        frames_uri: the archive's frames table.
        refs: the frames, in the order wanted.
        width: D that the model expects; None: any.
    Raises:
        ArchiveError: a part is missing or damaged, has no patches (see `has_column`), or patches of another width.
        ValueError: the frames do not have the same number of patch rows (see `cell_shape`).
    """
    if not refs:
        raise ValueError("no frames to read patches of")
    cells = read_cells(frames_uri, "patches", refs)
    part = _open_part(frames_uri, refs[0].part)
    rows, stored = part.shapes["patches"]
    if width not in (None, stored):
        raise ArchiveError(f"{source_text(part.uri)}: patches of width {stored}, where the model has {width}")
    return unpack_patches(cells, rows, stored)


def read_thumbnails(frames_uri: str, refs: Sequence[FrameRef]) -> list[bytes]:
    """Small JPEG files of the frames."""
    found = [b""] * len(refs)
    for part_name, places, rows in _by_part(refs):
        part = _open_part(frames_uri, part_name)
        for place, cell in zip(places, _checked_rows(part, "thumbnail", rows), strict=True):
            found[place] = cell
    return found


def has_column(frames_uri: str, column: str, refs: Sequence[FrameRef]) -> bool:
    """Whether all the frames have a cell in this column; opens the footer of each part once."""
    names = {ref.part for ref in refs}
    return all(column in _open_part(frames_uri, name).widths for name in names)


def cell_shape(frames_uri: str, column: str, ref: FrameRef) -> tuple[int, ...] | None:
    """The shape of a frame's cell, (K, D) for patches; None if its part has no such column."""
    shape = _open_part(frames_uri, ref.part).shapes.get(column)
    return None if shape is None else tuple(shape)


def part_problem(frames_uri: str, part_name: str) -> Problem | None:
    """Why a part does not hold its whole segment; None if it does."""
    return _open_part(frames_uri, part_name).problem


def part_identity(frames_uri: str, part_name: str) -> dict[str, str | int]:
    """The video_id, model_id, sampling and video_number of a part's frames."""
    names = ("video_id", "model_id", "sampling", "video_number")
    return read_part_columns(frames_uri, part_name, names).slice(0, 1).to_pylist()[0]


def part_keys(frames_uri: str, part_name: str, rows: np.ndarray | None = None) -> np.ndarray | None:
    """Search keys of a part, (T, E) float16; None if it has none.

    Args:
        frames_uri: the archive's frames table.
        part_name: the part.
        rows: (T,) int64, the rows to read; None for all.
    Raises:
        ArchiveError: the part is missing or damaged.
    """
    part = _open_part(frames_uri, part_name)
    if "search_key" not in part.widths:
        return None
    rows = np.arange(int(part.group_starts[-1])) if rows is None else rows
    return np.ascontiguousarray(_checked_rows(part, "search_key", rows)).view("<f2")


def key_offsets(frames_uri: str, part_name: str) -> tuple[np.ndarray, np.ndarray]:
    """The position in the file of each search key of a part and of its CRC32C, (T,) int64 each; -1 if unknown."""
    part = _open_part(frames_uri, part_name)
    rows = np.arange(int(part.group_starts[-1]))
    if not {"search_key", "checksums"} <= part.bases.keys():
        return np.full(len(rows), -1), np.full(len(rows), -1)
    place = 4 * list(part.widths).index("search_key")
    keys, checksums = (_offsets(part, name, rows) + LENGTH_BYTES for name in ("search_key", "checksums"))
    return keys, checksums + place


def read_keys_at(
    frames_uri: str, part_name: str, rows: np.ndarray, keys: np.ndarray, checksums: np.ndarray, width: int
) -> np.ndarray:
    """(T, E) float16: search keys of a part, by known positions; the footer is not read.

    Args:
        frames_uri: the archive's frames table.
        part_name: the part.
        rows: (T,) int64, the rows to read.
        keys, checksums: (T,) int64, their positions from key_offsets.
        width: E.
    Raises:
        ArchiveError: the part is missing or damaged.
    """
    uri = join(frames_uri, part_name)
    if (keys < 0).any():
        stored = part_keys(frames_uri, part_name, rows)
        if stored is None:
            raise DamagedError(f"{source_text(uri)}: damaged: it has no search keys, and the index has some of it")
        return stored
    found, stride = np.empty((len(rows), 2 * width), np.uint8), 2 * width + LENGTH_BYTES
    with read_errors(uri):
        file_uri(frames_uri, part_name)
        file = os.open(file_path(uri), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            if keys.max() > size - 2 * width or not 0 <= checksums.min() <= checksums.max() <= size - CHECKSUM_BYTES:
                raise DamagedError(f"{source_text(uri)}: it or its index is damaged: a search key lies beyond its end")
            for start, end in _spans(keys, checksums, stride):
                first, last = int(checksums[start]), int(checksums[end - 1])
                cells = os.pread(file, (end - start) * stride, int(keys[start]))  # the last 4 bytes are not used
                sums = os.pread(file, last + CHECKSUM_BYTES - first, first)
                for row, at in enumerate((checksums[start:end] - first).tolist()):
                    cell = cells[row * stride : row * stride + 2 * width]
                    if google_crc32c.value(cell) != int.from_bytes(sums[at : at + CHECKSUM_BYTES], "little"):
                        raise DamagedError(
                            f"{source_text(uri)}: damaged: search_key of row {rows[start + row]} does not match its "
                            "checksum"
                        )
                found[start:end] = np.frombuffer(cells, np.uint8).reshape(-1, stride)[:, : 2 * width]
        finally:
            os.close(file)
    return found.view("<f2")


def _spans(keys: np.ndarray, checksums: np.ndarray, stride: int) -> Iterable[tuple[int, int]]:
    """Ranges of keys that follow one another in the file, and whose checksums are near each other."""
    steps = np.diff(checksums)
    cuts = (np.diff(keys) != stride) | (steps <= 0) | (steps > NEAR_BYTES)
    return pairwise([0, *(np.flatnonzero(cuts) + 1).tolist(), len(keys)])


def _read_floats(frames_uri: str, column: str, refs: Sequence[FrameRef], wanted: tuple[int, ...] | None) -> np.ndarray:
    cells = read_cells(frames_uri, column, refs)
    if not len(refs):
        return np.empty((0, *(wanted or (0, 0))), np.float16)
    part = _open_part(frames_uri, refs[0].part)
    shape = tuple(part.shapes.get(column) or wanted or ())
    if (wanted is not None and shape != tuple(wanted)) or 2 * math.prod(shape) != cells.shape[1]:
        raise ArchiveError(
            f"{source_text(part.uri)}: {column} of shape {shape}, {cells.shape[1]} bytes, where the model has {wanted}"
        )
    return cells.view("<f2").astype(np.float16, copy=False).reshape(len(refs), *shape)


def _by_part(refs: Sequence[FrameRef]) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(part, places in refs, rows in the part) for each part that the frames lie in."""
    names = [ref.part for ref in refs]
    rows = np.fromiter((ref.row for ref in refs), np.int64, len(refs))
    if len(set(names)) == 1:
        yield names[0], np.arange(len(refs)), rows
        return
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    for name, found in places.items():
        yield name, np.array(found), rows[found]


@lru_cache(maxsize=PARTS_KEPT_OPEN)
def _open_part(frames_uri: str, name: str) -> _PartFile:
    """An open part; parts never change once they are committed."""
    uri = join(frames_uri, name)
    with read_errors(uri):
        mapping = map_file(file_uri(frames_uri, name))
        with open_parquet(uri) as file:
            footer = file.metadata
        metadata = footer.metadata or {}
        if CELLS_KEY not in metadata:
            raise InvalidValue(f"not written by vidx (no {CELLS_KEY.decode()} in its metadata)")
        shapes = shapes_of(parse_json(metadata.get(SHAPES_KEY, b"")))
        widths = cell_widths(shapes)
        if parse_json(metadata[CELLS_KEY]) != widths or list(parse_json(metadata[CELLS_KEY])) != list(widths):
            raise InvalidValue("its cells do not have the width of their shapes")
        problem = _problem(parse_json(metadata.get(PROBLEM_KEY, b"null")))
    group_rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(group_rows)]).astype(np.int64)
    content = np.frombuffer(mapping, np.uint8)
    return _PartFile(uri, content, starts, widths, shapes, _bases(footer, widths, file_size(uri)), problem)


def _problem(document: Any) -> Problem | None:
    if document is None:
        return None
    detail = check_text("detail", get_value(document, "detail"), ".*")
    return Problem(Reason(check_text("reason", get_value(document, "reason"))), detail)


def _bases(footer: pq.FileMetaData, widths: dict[str, int | None], size: int) -> dict[str, np.ndarray]:
    """The position of the first value in each row group, for each column that can be read in place."""
    bases = {}
    for number in range(footer.num_columns):
        column = footer.schema.column(number)
        width = widths.get(column.path)
        if width is None or column.max_definition_level or column.physical_type != "BYTE_ARRAY":
            continue
        starts = [_chunk_base(footer.row_group(group), number, width) for group in range(footer.num_row_groups)]
        if all(start is not None and 0 <= start <= size for start in starts):
            bases[column.path] = np.array(starts, np.int64)
    return bases


def _chunk_base(group: pq.RowGroupMetaData, number: int, width: int) -> int | None:
    chunk = group.column(number)
    values = group.num_rows * (width + LENGTH_BYTES)
    header = chunk.total_compressed_size - values
    plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page and "PLAIN" in chunk.encodings
    if not plain or not 0 < header <= MAX_PAGE_HEADER_BYTES:
        return None
    return chunk.data_page_offset + header


def _checked_rows(part: _PartFile, column: str, rows: np.ndarray) -> np.ndarray | list[bytes]:
    """Cells of one column, each checked against its checksum: (T, width) uint8, or a list if lengths differ."""
    if column not in part.widths:
        raise ArchiveError(f"{source_text(part.uri)}: has no {column}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < part.group_starts[-1]:
        raise DamagedError(
            f"{source_text(part.uri)}: damaged: row {rows.max()} of {part.group_starts[-1]} is asked for"
        )
    cells = _rows(part, column, rows)
    if column == "checksums":
        return cells
    place = list(part.widths).index(column)
    wanted = np.ascontiguousarray(_rows(part, "checksums", rows)).view("<u4")[:, place].tolist()
    for row, cell, checksum in zip(rows, cells, wanted, strict=True):
        if google_crc32c.value(cell) != checksum:
            raise DamagedError(f"{source_text(part.uri)}: damaged: {column} of row {row} does not match its checksum")
    return cells


def _rows(part: _PartFile, column: str, rows: np.ndarray) -> np.ndarray | list[bytes]:
    with read_errors(part.uri):
        if column in part.bases:
            cells = _rows_in_place(part, column, rows)
            if cells is not None:
                return cells
        return _rows_through_pyarrow(part, column, rows)


def _rows_in_place(part: _PartFile, column: str, rows: np.ndarray) -> np.ndarray | None:
    """(T, width) uint8, or None if the lengths before the values show that they lie elsewhere."""
    width = part.widths[column]
    assert width is not None  # as of all that are read in place
    stride = width + LENGTH_BYTES
    offsets = _offsets(part, column, rows)
    if len(rows) and (offsets.min() < 0 or offsets.max() > len(part.content) - stride):
        return None
    lengths = _gather(part.content, offsets, LENGTH_BYTES).view("<u4")
    if (lengths != width).any():
        return None
    return _gather(part.content, offsets + LENGTH_BYTES, width)


def _offsets(part: _PartFile, column: str, rows: np.ndarray) -> np.ndarray:
    """(T,) int64: the positions of the lengths before the values."""
    width = part.widths[column]
    assert width is not None  # as of all that are read in place
    groups = np.searchsorted(part.group_starts, rows, "right") - 1
    return part.bases[column][groups] + (rows - part.group_starts[groups]) * (width + LENGTH_BYTES)


def _gather(content: np.ndarray, offsets: np.ndarray, width: int) -> np.ndarray:
    """(T, width) uint8: width bytes from each offset, copied with one memcpy each."""
    windows = np.ndarray((len(content) - width + 1,), f"V{width}", content, 0, (1,))
    return windows[offsets].view(np.uint8).reshape(len(offsets), width)


def _rows_through_pyarrow(part: _PartFile, column: str, rows: np.ndarray) -> np.ndarray | list[bytes]:
    """The same for a file with another layout, and for cells of different lengths; reads whole row groups."""
    groups = np.searchsorted(part.group_starts, rows, "right") - 1
    cells: list[bytes] = [b""] * len(rows)
    with open_parquet(part.uri) as file:
        for group in np.unique(groups).tolist():
            values = file.read_row_group(group, columns=[column]).column(column)
            if values.null_count or len(values) != part.group_starts[group + 1] - part.group_starts[group]:
                raise InvalidValue(f"a {column} is missing")
            for place in np.flatnonzero(groups == group).tolist():
                cells[place] = values[int(rows[place] - part.group_starts[group])].as_py()
    width = part.widths[column]
    if width is None:
        return cells
    if any(len(cell) != width for cell in cells):
        raise DamagedError(f"{source_text(part.uri)}: damaged: a {column} is not {width} bytes long")
    return np.frombuffer(b"".join(cells), np.uint8).reshape(len(rows), width)
