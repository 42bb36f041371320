"""Search keys as they are stored, float16, of which a search compares each.

ID.keys     frame indexes (N,) uint32, then keys (N, E) float16, both in the order of the parts
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import read_times
from storage.errors import DamagedError
from storage.files import join, source_text
from storage.parts.read import part_keys
from storage.vectors.index_manifest import (
    MOST_WIDTH,
    Covered,
    Damaged,
    KeyFile,
    PartKeys,
    map_whole,
    write_covered,
    write_file,
)


@dataclass(frozen=True, eq=False)
class ExactKeys:
    """Keys of some parts, in memory or mapped.

    Attributes:
        frame_indexes: (N,) uint32.
        keys: (N, E) float16.
        covered: the parts that they belong to.
    """

    frame_indexes: np.ndarray
    keys: np.ndarray
    covered: Covered

    @property
    def width(self) -> int:
        """E."""
        return self.keys.shape[1]

    @cached_property
    def row_ids(self) -> np.ndarray:
        """(N,) int64: video number and frame index of each key."""
        return row_ids_of(np.repeat(self.covered.video_numbers, self.covered.key_counts), self.frame_indexes)

    @cached_property
    def _index(self) -> faiss.IndexScalarQuantizer:
        return scalar_index(self.keys)

    def search(self, query: np.ndarray, k: int, passing: np.ndarray | None) -> list[tuple[float, int]]:
        """(score, row id) of the best keys.

        Args:
            query: (E,) float32.
            k: at most so many.
            passing: (N,) bool, the keys that may be found; None for all.
        """
        parameters = None
        if passing is not None:
            bits = np.packbits(passing, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        scores, places = self._index.search(query[None], min(k, len(self.keys)), params=parameters)
        found = zip(scores[0].tolist(), places[0].tolist(), strict=True)
        return [(score, int(self.row_ids[place])) for score, place in found if place >= 0]  # FAISS pads with -1

    def holds(self, archive: Archive, path: str) -> bool:
        """Whether the keys of a part are those that it stores.

        Raises:
            ArchiveError: the part is missing or damaged.
        """
        place, stored = self.covered.order[path], part_keys(archive.frames_uri, path)
        rows = slice(*self.covered.starts[place : place + 2])
        if stored is None or not self.covered.key_counts[place]:
            return stored is None and not self.covered.key_counts[place]
        row_ids = part_row_ids(archive, path, int(self.covered.video_numbers[place]))
        return np.array_equal(self.keys[rows], stored) and np.array_equal(self.row_ids[rows], row_ids)

    def passing(self, parts: Iterable[tuple[int, np.ndarray | None]]) -> np.ndarray:
        """(N,) bool: the keys of some parts, given by their position and the rows in each, None for all rows."""
        mask = np.zeros(len(self.keys), bool)
        for part, rows in parts:
            start, end = self.covered.starts[part : part + 2]
            mask[slice(start, end) if rows is None else start + rows] = True
        return mask


def scalar_index(keys: np.ndarray) -> faiss.IndexScalarQuantizer:
    """A FAISS index of (N, E) float16 keys by inner product."""
    count, width = keys.shape
    index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    # The codes of QT_fp16 are the float16 keys themselves; FAISS's own encoder takes 20 times as long.
    index.add_sa_codes(np.ascontiguousarray(keys).view(np.uint8).reshape(count, 2 * width))
    return index


def row_ids_of(video_number: np.ndarray | int, frame_index: np.ndarray) -> np.ndarray:
    """Video number (31 bits) and frame index (32 bits) in one int64."""
    return (np.asarray(video_number, np.int64) << 32) | frame_index


def part_row_ids(archive: Archive, path: str, video_number: int) -> np.ndarray:
    """(T,) int64: the row ids of a part's frames.

    Raises:
        ArchiveError: the part is missing or damaged.
    """
    return row_ids_of(video_number, read_times(archive.frames_uri, path).frame_index)


def keys_of(archive: Archive, path: str, row_count: int, width: int | None) -> np.ndarray | None:
    """(T, E) float16: the search keys of a part, None where it has none.

    Args:
        archive: the archive of the part.
        path: the part.
        row_count: its count of rows in the table's log.
        width: E of the keys that these will stand beside; None for any.
    Raises:
        ArchiveError: the part is missing or damaged, or has other keys.
    """
    keys = part_keys(archive.frames_uri, path)
    if keys is None or (len(keys) == row_count and width in (None, keys.shape[1])):
        return keys
    place = source_text(join(archive.frames_uri, path))
    wanted = f"{row_count} by the log" if len(keys) != row_count else f"others of width {width}"
    raise DamagedError(f"{place}: damaged: it has {len(keys)} rows with keys of width {keys.shape[1]}, and {wanted}")


def build_exact(archive: Archive, parts: Sequence[PartKeys]) -> ExactKeys:
    """The keys of parts, given by path, video number and row count.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    indexes, covered = [np.empty(0, np.uint32)], []
    keys: list[np.ndarray] = []
    for path, number, row_count in parts:
        stored = keys_of(archive, path, row_count, keys[0].shape[1] if keys else None)
        covered.append((path, number, 0 if stored is None else len(stored)))
        if stored is not None:
            indexes.append(read_times(archive.frames_uri, path).frame_index.astype(np.uint32))
            keys.append(stored)
    return ExactKeys(np.concatenate(indexes), _joined(keys), Covered.of(covered))


def join_exact(pieces: Sequence[tuple[ExactKeys, np.ndarray]]) -> ExactKeys:
    """Several groups of keys as one, each with (P,) bool that chooses the parts that stay.

    Raises:
        Damaged: their keys are not of one width.
    """
    kept = [(file, file.covered.keys_of(parts)) for file, parts in pieces]
    keys = [file.keys[keep] for file, keep in kept if keep.any()]
    if len({piece.shape[1] for piece in keys}) > 1:
        raise Damaged("keys of several widths")
    indexes = np.concatenate([file.frame_indexes[keep] for file, keep in kept])
    return ExactKeys(indexes, _joined(keys), Covered.join([(file.covered, parts) for file, parts in pieces]))


def _joined(keys: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(keys) if keys else np.empty((0, 0), np.float16)


def write_exact(archive: Archive, exact: ExactKeys) -> KeyFile:
    """Keys as a file of the index.

    Raises:
        ArchiveError: the index cannot be written.
    """
    pieces = exact.frame_indexes.astype("<u4").tobytes(), exact.keys.astype("<f2").tobytes()
    files = (write_file(archive, "keys", pieces),) if len(exact.keys) else ()
    return KeyFile(files, write_covered(archive, exact.covered), exact.covered)


def open_exact(archive: Archive, file: KeyFile) -> ExactKeys:
    """The exact keys of the index, every byte checked: a search reads them all anyway.

    Raises:
        Damaged: the file differs from what was written.
    """
    if not file.files:
        return ExactKeys(np.empty(0, np.uint32), _joined([]), file.covered)
    data, count = map_whole(archive, file.files[0]), file.covered.key_count
    width, rest = divmod(len(data) - 4 * count, 2 * count)
    if rest or not 0 < width <= MOST_WIDTH:
        raise Damaged(f"{file.files[0].name}: {len(data)} bytes for {count} keys")
    return ExactKeys(data[: 4 * count].view("<u4"), data[4 * count :].view("<f2").reshape(count, width), file.covered)
