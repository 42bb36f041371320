"""Search keys as they are stored, float16, in FAISS files that are mapped and scanned: search is exact.

ID.faiss: FAISS IDMap over SQfp16, row id = video number << 32 | frame index, keys in the order of their parts.
"""

from collections.abc import Iterable, Iterator, Sequence

import faiss
import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import read_times
from storage.errors import DamagedError
from storage.files import NewFile, join, source_text
from storage.parts.read import part_keys
from storage.vectors.contents import (
    MANIFEST,
    MOST_WIDTH,
    Covered,
    Damaged,
    KeyFile,
    check_whole,
    map_checked,
    path_of,
    write_file,
)

MAX_EXACT = 1 << 17  # what an update holds in memory: 200 MB of keys of width 768
MAX_WIDTH = 1 << 16
_WIDTH, _COUNT = slice(4, 8), slice(8, 16)  # of a FAISS index's header: its dimensions, and its vectors
_INNER_COUNT = slice(45, 53)  # the same of the index within IDMap


class ExactKeys:
    """Keys of some parts, in memory or mapped.

    Attributes:
        covered: whose keys, in their order.
    """

    def __init__(self, index: faiss.IndexIDMap, covered: Covered):
        self._index = index
        self._keys = faiss.downcast_index(index.index)  # by place, so that a selector can be a bitmap
        self.covered = covered
        self.row_ids = faiss.vector_to_array(index.id_map)
        if len(self.row_ids) != covered.key_count or index.ntotal != covered.key_count:
            raise Damaged(f"{index.ntotal} keys of {covered.key_count}")

    @property
    def width(self) -> int:
        """E."""
        return self._index.d

    def search(self, query: np.ndarray, k: int, mask: np.ndarray | None) -> list[tuple[float, int]]:
        """(score, row id) of the best keys, of those that the mask, (keys,) bool, lets through."""
        parameters = None
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        scores, places = self._keys.search(query[None], min(k, self._index.ntotal), params=parameters)
        found = zip(scores[0].tolist(), places[0].tolist(), strict=True)
        return [(score, int(self.row_ids[place])) for score, place in found if place >= 0]  # FAISS pads with -1

    def passing(self, parts: Iterable[tuple[int, np.ndarray | None]]) -> np.ndarray:
        """(keys,) bool: those of some parts, given by their order and the rows in each, None for all of them."""
        mask = np.zeros(self.covered.key_count, bool)
        for part, rows in parts:
            start, end = self.covered.starts[part : part + 2]
            mask[slice(start, end) if rows is None else start + rows] = True
        return mask

    def keys(self, part: int) -> np.ndarray:
        """(T, E) float16: the keys of one of the parts."""
        start, count = int(self.covered.starts[part]), int(self.covered.key_counts[part])
        return self._keys.reconstruct_n(start, count).astype(np.float16)


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
    """(T, E) float16: the search keys of a part, None where it keeps none.

    Args:
        archive: whose part.
        path: the part.
        row_count: as the log says it.
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


def build_exact(archive: Archive, parts: Sequence[tuple[str, int, int]]) -> tuple[faiss.IndexIDMap | None, Covered]:
    """The keys of parts, given by path, video number and row count; no index where they keep none.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    index, covered = None, []
    for path, number, row_count in parts:
        keys = keys_of(archive, path, row_count, None if index is None else index.d)
        covered.append((path, number, 0 if keys is None else len(keys)))
        if keys is None:
            continue
        if index is None:
            index = _empty(keys.shape[1])
        # The codes of QT_fp16 are the float16 keys themselves; FAISS's own encoder takes 20 times as long.
        index.add_sa_codes(keys.view(np.uint8), part_row_ids(archive, path, number))
    return index, Covered.of(covered)


def _empty(width: int) -> faiss.IndexIDMap:
    scalar = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexIDMap(scalar)
    index.referenced_objects = [scalar]
    return index


def write_exact(archive: Archive, parts: Sequence[tuple[str, int, int]]) -> KeyFile:
    """The same as a file of the index.

    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    index, covered = build_exact(archive, parts)
    if index is None:
        return KeyFile((), covered)
    data = faiss.serialize_index(index)

    def write(new: NewFile) -> int:
        new.file.write(data)
        return len(data)  # all of it is its head: a search reads all of it anyway

    return KeyFile((write_file(archive, ".faiss", write),), covered)


def open_exact(archive: Archive, file: KeyFile) -> ExactKeys:
    """A file of exact keys, mapped.

    Raises:
        Damaged: it is not what was written.
    """
    (written,) = file.files
    try:
        _check_layout(map_checked(archive, written), file.covered.key_count)
        return ExactKeys(faiss.read_index(path_of(archive, written), faiss.IO_FLAG_MMAP_IFC), file.covered)
    except (OSError, ValueError, RuntimeError) as error:
        raise Damaged(f"{written.name}: {error}") from error


def _check_layout(data: np.ndarray, count: int) -> None:
    """Compares all that FAISS goes by, when it reads a file, with what it writes for so many keys.

    FAISS believes what a file says of its sizes, and looks for memory or for bytes that are not there.

    Raises:
        ValueError: the file is not laid out so.
    """
    width = int.from_bytes(data[_WIDTH].tobytes(), "little")
    if not 0 < width <= MOST_WIDTH:
        raise ValueError(f"keys of width {width}")
    head = bytearray(faiss.serialize_index(_empty(width)).tobytes()[:-16])  # both lengths, of no keys and no ids
    head[_COUNT] = head[_INNER_COUNT] = count.to_bytes(8, "little")
    head += (2 * width * count).to_bytes(8, "little")
    ids = len(head) + 2 * width * count
    lengths = data[ids : ids + 8].tobytes(), len(data)
    if data[: len(head)].tobytes() != head or lengths != (count.to_bytes(8, "little"), ids + 8 + 8 * count):
        raise ValueError(f"not laid out as {count} keys of width {width}")


def exact_faults(archive: Archive, file: KeyFile, is_live: Sequence[bool]) -> Iterator[tuple[str, str]]:
    """Name and what is wrong with a file, by itself and against the parts that are live.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    try:
        for written in file.files:
            check_whole(archive, written)
        opened = open_exact(archive, file) if file.files else None
    except Damaged as error:
        yield file.files[0].name, f"damaged: {error}"
        return
    for place, (path, number, count) in enumerate(file.covered.parts()):
        if not is_live[place]:
            continue
        stored = part_keys(archive.frames_uri, path)
        if stored is None or count == 0 or opened is None:
            is_right = stored is None and count == 0
        else:
            row_ids = opened.row_ids[opened.covered.starts[place] : opened.covered.starts[place + 1]]
            is_right = np.array_equal(opened.keys(place), stored)
            is_right = is_right and np.array_equal(row_ids, part_row_ids(archive, path, number))
        if not is_right:
            yield file.files[0].name if file.files else MANIFEST, f"its keys of {path} are not those that are stored"


def in_groups(parts: Sequence[tuple[str, int, int]], most: int) -> Iterator[list[tuple[str, int, int]]]:
    """The parts of one file each, of parts given by path, video number and row count."""
    group: list[tuple[str, int, int]] = []
    count = 0
    for path, number, row_count in parts:
        if group and count + row_count > most:
            yield group
            group, count = [], 0
        group.append((path, number, row_count))
        count += row_count
    if group:
        yield group
