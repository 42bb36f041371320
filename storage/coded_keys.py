"""Search keys of large archives as codes: FAISS inverted lists of RaBitQ (arXiv 2405.12497, 2409.09913), ranked again.

    ID.coarse   E as int64, rotation (E, E) float32, centroids (L, E) float16, of all files of codes together
    ID.codes    FAISS IVFRaBitQ without its centroids; an id is a place in the order of the parts' keys
    ID.rows     for each place the row id, where the key and its CRC32C stand in the part's file, and a CRC32C of these

A search looks into the lists whose centroids lie nearest to the query, ranks their codes, and ranks the best of them
again by the keys that the parts store. New keys go into a file of their own by the same centroids; files are joined
list by list, without a look at the keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import google_crc32c
import numpy as np

from storage.archive import Archive
from storage.cells import key_offsets, part_keys, read_keys_at
from storage.errors import ArchiveError
from storage.exact_keys import part_row_ids
from storage.files import NewFile, source_text
from storage.index_manifest import (
    Covered,
    Damaged,
    KeyFile,
    Written,
    check_whole,
    map_checked,
    path_of,
    write_file,
)

BITS = 4  # of a code for each dimension
SAMPLE_PER_LIST = 50  # keys that centroids are trained on
ITERATIONS = 12
MAX_CODES = 1 << 24  # of a file: 7 GB of width 768 in memory, and as much again while files are joined
CHUNK_KEYS = 1 << 16
ROUTER_LISTS = 4096  # more centroids than that are found through an index of their own when keys are assigned
PROBES = 128  # lists that a search looks into
QUERY_BITS = 8  # of each dimension of a query that is compared with codes; without, it takes ten times as long
CANDIDATES = 200  # codes that it ranks again at least

_ROW = np.dtype([("row_id", "<i8"), ("key", "<i8"), ("checksum", "<i8"), ("crc", "<u4")])


class Coarse:
    """The lists that keys are sorted into.

    Attributes:
        rotation: (E, E) float32, orthogonal: RaBitQ wants dimensions that are alike.
        centroids: (L, E) float16, rotated.
    """

    def __init__(self, rotation: np.ndarray, centroids: np.ndarray):
        self.rotation = rotation
        self.centroids = centroids
        count, width = centroids.shape
        self.quantizer = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.quantizer.add_sa_codes(centroids.view(np.uint8).reshape(count, 2 * width))

    @classmethod
    def train(cls, keys: np.ndarray, list_count: int) -> "Coarse":
        """About so many centroids of (S, E) float32 keys; many of them in two steps, groups and then their parts."""
        width = keys.shape[1]
        rotation = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))[0].astype(np.float32)
        rotated = keys @ rotation.T
        if list_count < ROUTER_LISTS:
            centroids = _cluster(rotated, list_count).centroids
        else:
            groups = _cluster(rotated, 1 << (list_count.bit_length() - 1) // 2)
            group_of = groups.index.search(rotated, 1)[1][:, 0]
            members = [rotated[group_of == group] for group in np.unique(group_of)]
            counts = [max(1, round(len(keys) / len(rotated) * list_count)) for keys in members]
            pieces = [_cluster(keys, count).centroids for keys, count in zip(members, counts, strict=True)]
            centroids = np.concatenate(pieces)
        return cls(rotation, np.ascontiguousarray(centroids, np.float16))

    @property
    def list_count(self) -> int:
        """L."""
        return len(self.centroids)

    def rotate(self, keys: np.ndarray) -> np.ndarray:
        """(T, E) float32."""
        return np.ascontiguousarray(keys.astype(np.float32, copy=False) @ self.rotation.T)

    def assign(self, rotated: np.ndarray) -> np.ndarray:
        """(T,) int64: the list of each rotated key, that of its nearest centroid."""
        return np.ascontiguousarray(self._router.search(rotated, 1)[1][:, 0])

    def probe(self, rotated: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(1, count) float32 products with the best centroids for a rotated query (E,), and (1, count) their lists."""
        return self.quantizer.search(rotated[None], min(count, self.list_count))

    @cached_property
    def _router(self) -> faiss.Index:
        centroids, width = self.centroids.astype(np.float32), self.centroids.shape[1]
        flat = faiss.IndexFlatL2(width)
        if faiss.get_num_gpus() or self.list_count < ROUTER_LISTS:
            flat.add(centroids)
            return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() else flat
        groups = 1 << (self.list_count.bit_length() - 1) // 2
        router = faiss.IndexIVFFlat(flat, width, groups)
        router.cp.niter, router.cp.min_points_per_centroid = 10, 1
        router.train(centroids)
        router.add(centroids)
        router.nprobe = 8
        router.referenced_objects = [flat]
        return router


def _cluster(keys: np.ndarray, count: int) -> faiss.Kmeans:
    on_gpu = {"gpu": True} if faiss.get_num_gpus() else {}
    means = faiss.Kmeans(keys.shape[1], count, niter=ITERATIONS, min_points_per_centroid=1, **on_gpu)
    means.train(keys)
    return means


@dataclass(frozen=True, eq=False)
class CodedKeys:
    """One opened file of codes."""

    index: faiss.IndexIVFRaBitQ
    rows: np.ndarray
    covered: Covered
    is_mapped: bool = False

    @property
    def width(self) -> int:
        """E."""
        return self.index.d

    def search(
        self, query: np.ndarray, k: int, products: np.ndarray, lists: np.ndarray, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimated scores and places, (K,) each with K <= k, of the best codes in some lists.

        Args:
            query: (1, E) float32, rotated.
            k: at most so many.
            products, lists: as Coarse.probe gives them.
            mask: (keys,) bool, which places may be found; None for all.
        """
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.nprobe = lists.shape[1]
        parameters.qb = QUERY_BITS
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
            parameters.sel = selector
        scores, places = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (query, lists, products, scores, places)]
        self.index.search_preassigned_c(1, pointers[0], k, *pointers[1:], False, parameters, None)
        found = (places[0] >= 0) & (places[0] < len(self.rows))  # FAISS pads with -1
        return scores[0][found], places[0][found]


def list_count_for(key_count: int) -> int:
    """How many lists: the power of two next to four times the root of the keys."""
    return 1 << round(np.log2(4 * np.sqrt(key_count)))


def best_keys(
    archive: Archive,
    coarse: Coarse,
    files: Sequence[CodedKeys],
    query: np.ndarray,
    k: int,
    masks: Sequence[np.ndarray | None],
    probes: int | None = None,
) -> list[tuple[float, int]]:
    """(score, row id) of about the k best keys, the scores exact.

    Args:
        archive: whose keys.
        coarse: the lists.
        files: all files of codes.
        query: (E,) float32.
        k: at most so many.
        masks: for each file, (keys,) bool, which places may be found, or None for all.
        probes: lists to look into; None for as many as usual.
    Raises:
        ArchiveError: a part is missing or damaged.
    """
    total = sum(len(file.rows) for file in files)
    passing = sum(len(file.rows) if mask is None else int(mask.sum()) for file, mask in zip(files, masks, strict=True))
    if not passing:
        return []
    rotated = multiply(coarse.rotation, query)[None]
    products, lists = coarse.probe(rotated[0], probes or probe_count(passing / total))
    candidates = max(CANDIDATES, 2 * k)
    found = [
        file.search(rotated, min(candidates, len(file.rows)), products, lists, mask)
        for file, mask in zip(files, masks, strict=True)
    ]
    scores = np.concatenate([scores for scores, _ in found])
    owners = np.repeat(np.arange(len(files)), [len(places) for _, places in found])
    places = np.concatenate([places for _, places in found])
    best = np.argsort(-scores, kind="stable")[:candidates]
    hits = []
    for number in np.unique(owners[best]).tolist():
        hits += _rank_again(archive, files[number], np.unique(places[best[owners[best] == number]]), query)
    return sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]


def probe_count(share: float) -> int:
    """Lists to look into where only a share of the keys may be found."""
    return round(PROBES / np.sqrt(share))


def _rank_again(archive: Archive, file: CodedKeys, places: np.ndarray, query: np.ndarray) -> list[tuple[float, int]]:
    """(score, row id) of the keys at some places, ascending, by what the parts store."""
    rows = file.rows[places]
    if not np.array_equal(_crc(rows), rows["crc"]):
        raise ArchiveError(f"{source_text(archive.index_uri)}: damaged; `vidx repair` makes the index anew")
    parts = np.searchsorted(file.covered.starts, places, "right") - 1
    ends = np.flatnonzero(np.diff(parts, append=-1)) + 1
    keys, start = [], 0
    for end in ends.tolist():
        path = file.covered.paths[parts[start]]
        piece, in_part = rows[start:end], places[start:end] - file.covered.starts[parts[start]]
        keys.append(read_keys_at(archive.frames_uri, path, in_part, piece["key"], piece["checksum"], file.width))
        start = end
    scores = multiply(np.concatenate(keys).astype(np.float32), query)
    return list(zip(scores.tolist(), rows["row_id"].tolist(), strict=True))


def multiply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Their product, in this thread: NumPy's own wakes others, which are in the way of FAISS's for milliseconds."""
    return np.einsum("ij,j->i", matrix, vector, optimize=False)


def sample_keys(archive: Archive, parts: Sequence[tuple[str, int, int]], count: int) -> np.ndarray:
    """(S, E) float32: keys of parts, given with their row counts, about so many and evenly spread.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    total = sum(row_count for _, _, row_count in parts)
    step = max(1, total // count)
    found, skip = [], 0
    for path, _, row_count in parts:
        if skip < row_count:
            stored = part_keys(archive.frames_uri, path, np.arange(skip, row_count, step))
            if stored is not None:
                found.append(stored.astype(np.float32))
        skip = (skip - row_count) % step
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def build_codes(archive: Archive, coarse: Coarse, parts: Sequence[tuple[str, int]]) -> CodedKeys:
    """The keys of parts, given by path and video number, as codes in memory.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    index, covered, rows, waiting, total = _empty(coarse), [], [], [], 0

    def add() -> None:
        nonlocal total
        rotated = coarse.rotate(np.concatenate(waiting))
        places = np.arange(total, total + len(rotated))
        arrays = (rotated, places, coarse.assign(rotated))
        index.add_core(len(rotated), *(faiss.swig_ptr(array) for array in arrays))
        total += len(rotated)
        waiting.clear()

    for path, number in parts:
        keys = part_keys(archive.frames_uri, path)
        covered.append((path, number, 0 if keys is None else len(keys)))
        if keys is None:
            continue
        rows.append(_rows_of(archive, path, number))
        waiting.append(keys)
        if sum(len(keys) for keys in waiting) >= CHUNK_KEYS:
            add()
    if waiting:
        add()
    return CodedKeys(index, np.concatenate([np.empty(0, _ROW), *rows]), Covered.of(covered))


def _rows_of(archive: Archive, path: str, number: int) -> np.ndarray:
    """(T,) _ROW: where the keys of a part are."""
    row_ids = part_row_ids(archive, path, number)
    rows = np.empty(len(row_ids), _ROW)
    rows["row_id"] = row_ids
    rows["key"], rows["checksum"] = key_offsets(archive.frames_uri, path)
    rows["crc"] = _crc(rows)
    return rows


def _crc(rows: np.ndarray) -> np.ndarray:
    """(T,) uint32: the checksum of each row before its own."""
    data, width, end = rows.tobytes(), _ROW.itemsize, _ROW.fields["crc"][1]
    return np.array([google_crc32c.value(data[at : at + end]) for at in range(0, len(data), width)], np.uint32)


def join_codes(coarse: Coarse, files: Sequence[CodedKeys], live: Sequence[Sequence[bool]]) -> CodedKeys:
    """Several files of the same lists as one in memory, without the parts that are not live."""
    index, rows, covered, moved, total = _empty(coarse), [], [], [], 0
    for file, is_live in zip(files, live, strict=True):
        kept = np.repeat(np.array(is_live, bool), file.covered.key_counts)
        places = np.full(len(kept), -1, np.int64)
        places[kept] = np.arange(total, total + int(kept.sum()))
        moved.append(places)
        rows.append(file.rows[kept])
        covered += [part for part, keeps in zip(file.covered.parts(), is_live, strict=True) if keeps]
        total += int(kept.sum())
    for number in range(coarse.list_count):
        for file, places in zip(files, moved, strict=True):
            codes, ids = _list_of(file, number)
            ids = places[ids]
            kept = ids >= 0
            if kept.any():
                ids, codes = np.ascontiguousarray(ids[kept]), np.ascontiguousarray(codes[kept])
                index.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    index.ntotal = total
    return CodedKeys(index, np.concatenate([np.empty(0, _ROW), *rows]), Covered.of(covered))


def write_codes(archive: Archive, coded: CodedKeys) -> KeyFile:
    """Codes in memory as files of the index.

    Raises:
        ArchiveError: the index cannot be written.
    """
    if not len(coded.rows):
        return KeyFile((), coded.covered)
    quantizer = coded.index.quantizer
    coded.index.quantizer = faiss.IndexFlatIP(coded.width)  # the centroids have a file of their own

    def write(new: NewFile) -> int:
        faiss.write_index(coded.index, faiss.PyCallbackIOWriter(new.file.write, 1 << 22))
        return new.file.tell() - len(coded.rows) * (coded.index.code_size + 8)  # what is before the lists

    def write_rows(new: NewFile) -> int:
        new.file.write(coded.rows.tobytes())
        return 0

    try:
        codes = write_file(archive, ".codes", write)
    finally:
        coded.index.quantizer = quantizer
    return KeyFile((codes, write_file(archive, ".rows", write_rows)), coded.covered)


def open_codes(archive: Archive, coarse: Coarse, file: KeyFile) -> CodedKeys:
    """A file of codes, mapped.

    Raises:
        Damaged: it is not what was written.
    """
    codes, rows = file.files
    map_checked(archive, codes)
    places = map_checked(archive, rows).view(_ROW)
    try:
        index = faiss.read_index(path_of(archive, codes), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise Damaged(f"{codes.name}: {error}") from error
    if (index.ntotal, len(places), index.d) != (file.covered.key_count,) * 2 + (coarse.quantizer.d,):
        raise Damaged(f"{codes.name}: {index.ntotal} keys of {file.covered.key_count}")
    _use(index, coarse)
    return CodedKeys(index, places, file.covered, is_mapped=True)


def code_faults(
    archive: Archive, coarse: Coarse | None, file: KeyFile, is_live: Sequence[bool]
) -> Iterator[tuple[str, str]]:
    """Name and what is wrong with each file of some codes, by itself and against the parts that are live.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    is_whole = True
    for written in file.files:
        try:
            check_whole(archive, written)
        except Damaged as error:
            is_whole = False
            yield written.name, f"damaged: {error}"
    if not is_whole or not file.files or coarse is None:
        return
    codes, rows = file.files
    try:
        opened = open_codes(archive, coarse, file)
    except Damaged as error:
        yield codes.name, f"damaged: {error}"
        return
    starts = opened.covered.starts
    for place, (path, number, _) in enumerate(opened.covered.parts()):
        if is_live[place]:
            found = opened.rows[starts[place] : starts[place + 1]]
            if not np.array_equal(found, _rows_of(archive, path, number)):
                yield rows.name, f"its rows of {path} are not those that are stored"


def write_coarse(archive: Archive, coarse: Coarse) -> Written:
    """Centroids as a file of the index.

    Raises:
        ArchiveError: the index cannot be written.
    """
    width = np.array([len(coarse.rotation)], "<i8")
    pieces = (width, coarse.rotation.astype("<f4"), coarse.centroids.astype("<f2"))
    return write_file(archive, ".coarse", lambda new: sum(new.file.write(piece.tobytes()) for piece in pieces))


def open_coarse(archive: Archive, file: Written) -> Coarse:
    """The rotation and centroids.

    Raises:
        Damaged: they are not what was written.
    """
    data = map_checked(archive, file)
    try:
        width = int(data[:8].view("<i8")[0])
        end = 8 + 4 * width * width
        rotation = data[8:end].view("<f4").reshape(width, width)
        return Coarse(rotation, data[end:].view("<f2").reshape(-1, width))
    except (ValueError, IndexError) as error:
        raise Damaged(f"{file.name}: {error}") from error


def _empty(coarse: Coarse) -> faiss.IndexIVFRaBitQ:
    width = coarse.quantizer.d
    index = faiss.IndexIVFRaBitQ(coarse.quantizer, width, coarse.list_count, faiss.METRIC_INNER_PRODUCT, True, BITS)
    index.is_trained = True
    _use(index, coarse)
    return index


def _use(index: faiss.IndexIVFRaBitQ, coarse: Coarse) -> None:
    index.own_fields = False
    index.quantizer = coarse.quantizer
    index.parallel_mode = 1  # one query, its lists among the threads
    index.referenced_objects = [coarse]


def _list_of(file: CodedKeys, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, bytes) uint8 and (n,) int64: the codes and places of one list."""
    lists = file.index.invlists
    count, width = lists.list_size(number), file.index.code_size
    if not count:
        return np.empty((0, width), np.uint8), np.empty(0, np.int64)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), count * width).reshape(count, width)
    return codes, faiss.rev_swig_ptr(lists.get_ids(number), count)
