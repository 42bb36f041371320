"""An index of one column of a file: which rows may hold a value, without looking at all of them."""

import numpy as np
import pyarrow as pa

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class ColumnIndex:
    """The rows of a column by the hashes of their values, sorted. It takes 12 bytes a row."""

    def __init__(self, column: pa.ChunkedArray):
        hashes = np.concatenate([np.empty(0, np.uint64), *map(hashes_of, column.chunks)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], order.astype(np.int32)

    def candidates(self, values: pa.Array) -> np.ndarray:
        """The places, ascending, of all rows with one of these values; other values may have the same hash."""
        wanted = np.unique(hashes_of(values))
        starts = np.searchsorted(self._hashes, wanted, "left")
        counts = np.searchsorted(self._hashes, wanted, "right") - starts
        inside = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        return np.sort(self._places[inside]).astype(np.int64)


def hashes_of(values: pa.Array) -> np.ndarray:
    """(n,) uint64: a hash of each integer or text. Nulls may have any hash.

    Texts are mixed 8 bytes at a time, all of them together, beginning with their lengths.
    """
    if not pa.types.is_string(values.type):
        return values.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64) * _PRIME
    _, offsets_buffer, data_buffer = values.buffers()
    if not len(values) or data_buffer is None:
        return np.zeros(len(values), np.uint64)
    offsets = np.frombuffer(offsets_buffer, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    data = np.concatenate([np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]], np.zeros(8, np.uint8)])
    words = np.ndarray((len(data) - 7,), np.dtype("<u8"), data.data, strides=(1,))  # the 8 bytes from each byte on
    places, left = offsets[:-1] - offsets[0], np.diff(offsets)
    hashes, rows = left.astype(np.uint64) * _PRIME, np.arange(len(values))
    while len(rows):
        is_long = left > 0
        if not is_long.all():
            rows, places, left = rows[is_long], places[is_long], left[is_long]
        unused = (8 * np.clip(8 - left, 0, 8)).astype(np.uint64)  # bits of the word that belong to the next text
        word = words[places] << unused
        mixed = (hashes[rows] ^ word) * _PRIME
        hashes[rows] = mixed ^ (mixed >> _HALF)
        places, left = places + 8, left - 8
    return hashes
