"""Search keys of large archives as codes: FAISS inverted lists of RaBitQ (arXiv 2405.12497, 2409.09913), ranked again.

    ID.codes    FAISS IVFRaBitQ without its centroids; an id is the number of a run (storage/vectors/near_duplicates.py)
    ID.runs     (R + 1,) int64: the place of each run's first key in the order of the parts' keys, and the count of all
    ID.rows     for each place the row id, where the key and its CRC32C stand in the part's file, and a CRC32C of these

A search looks into the lists whose centroids (storage/vectors/centroids.py) lie nearest to the query, ranks their
codes, and ranks the frames of the best runs by the keys that the parts store. New keys go into a file of their own by
the same centroids; files are joined list by list, without a look at the keys.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import google_crc32c
import numpy as np

from storage.archive.archive import Archive
from storage.files import NewFile
from storage.parts.read import key_offsets, read_keys_at
from storage.vectors.centroids import Coarse, multiply
from storage.vectors.contents import (
    Covered,
    Damaged,
    KeyFile,
    check_whole,
    map_checked,
    path_of,
    write_file,
)
from storage.vectors.exact_keys import keys_of, part_row_ids
from storage.vectors.near_duplicates import LONGEST, run_means, run_starts

BITS = 2  # of a code for each dimension; four find the same, and take three times as long for far queries
MAX_KEYS = 1 << 24  # of a file: 4 GB of width 768 in memory where no frames are alike, and as much again when joined
CHUNK_RUNS = 1 << 16
PROBES = 192  # lists that a search looks into
QUERY_BITS = 4  # of each dimension of a query that is compared with codes; without, it takes ten times as long
CANDIDATES = 32  # runs whose frames it ranks by their keys, at least

_COUNT = slice(8, 16)  # where the header of a FAISS index says how many vectors it holds
_ROW = np.dtype([("row_id", "<i8"), ("key", "<i8"), ("checksum", "<i8"), ("crc", "<u4")])


@dataclass(frozen=True, eq=False)
class Passing:
    """Which keys of a file may be found.

    Attributes:
        keys: (keys,) bool.
        runs: (R,) bool, those with such a key.
        count: of such keys.
    """

    keys: np.ndarray
    runs: np.ndarray
    count: int


@dataclass(frozen=True, eq=False)
class CodedKeys:
    """One file of codes, opened or about to be written.

    Attributes:
        index: the codes; their ids are numbers of runs.
        runs: (R + 1,) int64, the place of each run's first key, and the count of all keys.
        rows: (keys,) _ROW.
        covered: whose keys, in their order.
    """

    index: faiss.IndexIVFRaBitQ
    runs: np.ndarray
    rows: np.ndarray
    covered: Covered
    is_mapped: bool = False

    @property
    def width(self) -> int:
        """E."""
        return self.index.d

    def passing(self, parts: Iterable[tuple[int, np.ndarray | None]]) -> Passing:
        """Keys of some parts, given by their order in `covered` and the rows in each, None for all of them."""
        keys, runs, count = np.zeros(len(self.rows), bool), np.zeros(len(self.runs) - 1, bool), 0
        for part, rows in parts:
            start, end = self.covered.starts[part : part + 2]
            if rows is None:
                keys[start:end] = True
                runs[self._part_runs[part] : self._part_runs[part + 1]] = True
                count += int(end - start)
            else:
                keys[start + rows] = True
                own = self.runs[self._part_runs[part] : self._part_runs[part + 1]]
                runs[self._part_runs[part] + np.searchsorted(own, start + rows, "right") - 1] = True
                count += len(rows)
        return Passing(keys, runs, count)

    @cached_property
    def _part_runs(self) -> np.ndarray:
        """(P + 1,) int64: the first run of each part, and the count of all."""
        found = np.searchsorted(self.runs, self.covered.starts)
        if (np.diff(found) < 0).any() or not np.array_equal(self.runs[found], self.covered.starts):
            raise Damaged("the runs are not those of the parts")
        return found

    def search(
        self, query: np.ndarray, k: int, products: np.ndarray, lists: np.ndarray, passing: Passing | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimated scores and numbers, (K,) each with K <= k, of the best runs in some lists.

        Args:
            query: (1, E) float32, rotated.
            k: at most so many.
            products, lists: as Coarse.probe gives them.
            passing: only these; None for all.
        """
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.nprobe = lists.shape[1]
        parameters.qb = QUERY_BITS
        if passing is not None:
            bits = np.packbits(passing.runs, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
            parameters.sel = selector
        scores, runs = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (query, lists, products, scores, runs)]
        self.index.search_preassigned_c(1, pointers[0], k, *pointers[1:], False, parameters, None)
        found = (runs[0] >= 0) & (runs[0] < len(self.runs) - 1)  # FAISS pads with -1
        return scores[0][found], runs[0][found]

    def places(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the keys of some runs, and which of them each is of, (T,) int64 each.

        Raises:
            Damaged: the runs are not what was written.
        """
        starts, lengths = self.runs[runs], self.runs[runs + 1] - self.runs[runs]
        ends = starts + lengths
        if (starts < 0).any() or (lengths < 1).any() or (lengths > LONGEST).any() or (ends > len(self.rows)).any():
            raise Damaged("a run does not lie among the keys")
        owners = np.repeat(np.arange(len(runs)), lengths)
        return np.arange(len(owners)) + (starts - np.cumsum(lengths) + lengths)[owners], owners


def best_keys(
    archive: Archive,
    coarse: Coarse,
    files: Sequence[CodedKeys],
    query: np.ndarray,
    k: int,
    passing: Sequence[Passing | None],
    probes: int | None = None,
    candidates: int = CANDIDATES,
) -> list[tuple[float, int]]:
    """(score, row id) of about the k best keys, the scores exact.

    Args:
        archive: whose keys.
        coarse: the lists.
        files: all files of codes.
        query: (E,) float32.
        k: at most so many.
        passing: for each file, which keys may be found, or None for all.
        probes: lists to look into; None for as many as usual.
        candidates: runs to rank by their keys at least.
    Raises:
        Damaged: the index is.
        ArchiveError: a part is missing or damaged.
    """
    total = sum(len(file.rows) for file in files)
    count = sum(len(file.rows) if each is None else each.count for file, each in zip(files, passing, strict=True))
    if not count:
        return []
    rotated = multiply(coarse.rotation, query)[None]
    products, lists = coarse.probe(rotated[0], probes or probe_count(count / total))
    most = max(candidates, 2 * k)
    found = [
        file.search(rotated, min(most, len(file.runs) - 1), products, lists, each)
        for file, each in zip(files, passing, strict=True)
    ]
    least = _least_score(files, found, passing, k, candidates)
    hits = []
    for file, each, (scores, runs) in zip(files, passing, found, strict=True):
        places, _ = file.places(np.sort(runs[scores >= least]))
        hits += _rank(archive, file, places if each is None else places[each.keys[places]], query)
    return sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]


def _least_score(
    files: Sequence[CodedKeys],
    found: Sequence[tuple[np.ndarray, np.ndarray]],
    passing: Sequence[Passing | None],
    k: int,
    candidates: int,
) -> float:
    """The estimated score down to which runs are looked at: so many runs at least, with twice the keys wanted."""
    estimates, counts = [], []
    for file, each, (scores, runs) in zip(files, passing, found, strict=True):
        places, owners = file.places(runs)
        passes = None if each is None else each.keys[places]
        estimates.append(scores)
        counts.append(np.bincount(owners, passes, len(runs)))
    scores = np.concatenate(estimates)
    order = np.argsort(-scores, kind="stable")
    enough = np.flatnonzero(np.cumsum(np.concatenate(counts)[order]) >= 2 * k)
    last = max(candidates - 1, int(enough[0]) if len(enough) else len(order))
    return float(scores[order[last]]) if last < len(order) else -np.inf


def probe_count(share: float) -> int:
    """Lists to look into where only a share of the keys may be found."""
    return round(PROBES / np.sqrt(share))


def _rank(archive: Archive, file: CodedKeys, places: np.ndarray, query: np.ndarray) -> list[tuple[float, int]]:
    """(score, row id) of the keys at some places, ascending, by what the parts store."""
    if not len(places):
        return []
    rows = file.rows[places]
    if not np.array_equal(_crc(rows), rows["crc"]):
        raise Damaged("a row does not match its checksum")
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


def build_codes(archive: Archive, coarse: Coarse, parts: Sequence[tuple[str, int, int]]) -> CodedKeys:
    """The keys of parts, given by path, video number and row count, as codes in memory.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    index, covered, rows, starts = _empty(coarse), [], [], []
    waiting: list[np.ndarray] = []
    key_count = run_count = 0

    def add() -> None:
        nonlocal run_count
        rotated = coarse.rotate(np.concatenate(waiting))
        numbers = np.arange(run_count, run_count + len(rotated))
        arrays = (rotated, numbers, coarse.assign(rotated))
        index.add_core(len(rotated), *(faiss.swig_ptr(array) for array in arrays))
        run_count += len(rotated)
        waiting.clear()

    for path, number, row_count in parts:
        stored = keys_of(archive, path, row_count, coarse.quantizer.d)
        covered.append((path, number, 0 if stored is None else len(stored)))
        if stored is None or not len(stored):
            continue
        rows.append(_rows_of(archive, path, number))
        keys = stored.astype(np.float32)
        begins = run_starts(keys)
        waiting.append(run_means(keys, begins))
        starts.append(begins + key_count)
        key_count += len(keys)
        if sum(len(means) for means in waiting) >= CHUNK_RUNS:
            add()
    if waiting:
        add()
    runs = np.concatenate([*starts, np.array([key_count])])
    return CodedKeys(index, runs, np.concatenate([np.empty(0, _ROW), *rows]), Covered.of(covered))


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
    assert _ROW.fields is not None
    data, width, end = rows.tobytes(), _ROW.itemsize, _ROW.fields["crc"][1]
    return np.array([google_crc32c.value(data[at : at + end]) for at in range(0, len(data), width)], np.uint32)


def join_codes(coarse: Coarse, files: Sequence[CodedKeys], live: Sequence[Sequence[bool]]) -> CodedKeys:
    """Several files of the same lists as one in memory, without the parts that are not live."""
    index, rows, lengths, covered, moved, total = _empty(coarse), [], [], [], [], 0
    for file, is_live in zip(files, live, strict=True):
        kept_keys = np.repeat(np.array(is_live, bool), file.covered.key_counts)
        kept = kept_keys[file.runs[:-1]]  # a run is of one part
        numbers = np.full(len(kept), -1, np.int64)
        numbers[kept] = np.arange(total, total + int(kept.sum()))
        moved.append(numbers)
        lengths.append(np.diff(file.runs)[kept])
        rows.append(file.rows[kept_keys])
        covered += [part for part, keeps in zip(file.covered.parts(), is_live, strict=True) if keeps]
        total += int(kept.sum())
    for number in range(coarse.list_count):
        for file, numbers in zip(files, moved, strict=True):
            codes, ids = _list_of(file, number)
            ids = numbers[ids]
            kept = ids >= 0
            if kept.any():
                ids, codes = np.ascontiguousarray(ids[kept]), np.ascontiguousarray(codes[kept])
                index.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    index.ntotal = total
    runs = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))])
    return CodedKeys(index, runs, np.concatenate([np.empty(0, _ROW), *rows]), Covered.of(covered))


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
        return new.file.tell() - coded.index.ntotal * (coded.index.code_size + 8)  # what is before the lists

    def write_runs(new: NewFile) -> int:
        return new.file.write(coded.runs.astype("<i8").tobytes())

    def write_rows(new: NewFile) -> int:
        new.file.write(coded.rows.tobytes())
        return 0

    try:
        codes = write_file(archive, ".codes", write)
    finally:
        coded.index.quantizer = quantizer
    rest = (write_file(archive, suffix, each) for suffix, each in ((".runs", write_runs), (".rows", write_rows)))
    return KeyFile((codes, *rest), coded.covered)


def open_codes(archive: Archive, coarse: Coarse, file: KeyFile) -> CodedKeys:
    """A file of codes, mapped.

    Raises:
        Damaged: it is not what was written.
    """
    codes, runs, rows = file.files
    data = map_checked(archive, codes)
    starts, places = map_checked(archive, runs), map_checked(archive, rows)
    if len(starts) % 8 or len(starts) < 16 or len(places) % _ROW.itemsize:
        raise Damaged(f"{runs.name}, {rows.name}: {len(starts)} and {len(places)} bytes")
    starts, places = starts.view("<i8"), places.view(_ROW)
    if not len(places) == starts[-1] == file.covered.key_count:
        raise Damaged(f"{rows.name}: {len(places)} keys of {file.covered.key_count}")
    _check_layout(data, coarse, len(starts) - 1, codes.name)
    try:
        index = faiss.read_index(path_of(archive, codes), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise Damaged(f"{codes.name}: {error}") from error
    _use(index, coarse)
    return CodedKeys(index, starts, places, file.covered, is_mapped=True)


def _check_layout(data: np.ndarray, coarse: Coarse, run_count: int, name: str) -> None:
    """Compares all that FAISS goes by, when it reads a file, with what it writes for so many runs in these lists.

    Raises:
        Damaged: the file is not laid out so.
    """
    empty = _empty(coarse)
    empty.quantizer = faiss.IndexFlatIP(coarse.quantizer.d)
    head = bytearray(faiss.serialize_index(empty).tobytes()[: -len(b"sprs") - 8])  # how long the lists are comes next
    head[_COUNT] = run_count.to_bytes(8, "little")
    kind, rest = data[len(head) : len(head) + 4].tobytes(), data[len(head) + 4 :]
    number_count = int.from_bytes(rest[:8].tobytes(), "little")
    end = 8 + 8 * number_count
    numbers = rest[8:end].view("<u8") if end <= len(rest) else np.empty(0, "<u8")
    if kind == b"sprs":  # list and length, of those that are not empty
        lists, lengths = numbers[::2], numbers[1::2]
        are_lists = len(np.unique(lists)) == len(lists) and bool((lists < coarse.list_count).all())
        is_right = number_count % 2 == 0 and are_lists
    else:
        lengths, is_right = numbers, kind == b"full" and number_count == coarse.list_count
    held = len(rest) - end == run_count * (empty.code_size + 8) and lengths.sum(dtype=float) == run_count
    if data[: len(head)].tobytes() != head or not is_right or not held:
        raise Damaged(f"{name}: not laid out as {run_count} runs in {coarse.list_count} lists")


def check_runs(coded: CodedKeys) -> None:
    """Reads all runs of a file, and which run each code is of.

    Raises:
        Damaged: they are not those of the file's parts.
    """
    lengths = np.diff(coded.runs)
    if coded.runs[0] != 0 or (lengths < 1).any() or (lengths > LONGEST).any():
        raise Damaged("the runs do not follow one another")
    if not np.isin(coded.covered.starts, coded.runs).all():
        raise Damaged("the runs are not those of the parts")
    seen = np.zeros(len(lengths), bool)
    for number in range(coded.index.nlist):
        _, ids = _list_of(coded, number)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(seen):
            raise Damaged("a code is of no run")
        seen[ids] = True
    if not seen.all():
        raise Damaged("a run has no code")


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
    codes, _, rows = file.files
    try:
        opened = open_codes(archive, coarse, file)
        check_runs(opened)
    except Damaged as error:
        yield codes.name, f"damaged: {error}"
        return
    starts = opened.covered.starts
    for place, (path, number, _) in enumerate(opened.covered.parts()):
        if is_live[place]:
            found = opened.rows[starts[place] : starts[place + 1]]
            if not np.array_equal(found, _rows_of(archive, path, number)):
                yield rows.name, f"its rows of {path} are not those that are stored"


def _empty(coarse: Coarse) -> faiss.IndexIVFRaBitQ:
    width = coarse.quantizer.d
    index = faiss.IndexIVFRaBitQ(coarse.quantizer, width, coarse.list_count, faiss.METRIC_INNER_PRODUCT, True, BITS)
    index.is_trained = True
    _use(index, coarse)
    return index


def _use(index: faiss.IndexIVFRaBitQ, coarse: Coarse) -> None:
    index.own_fields = False
    index.quantizer = coarse.quantizer
    index.referenced_objects = [coarse]


def _list_of(file: CodedKeys, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, bytes) uint8 and (n,) int64: the codes and places of one list."""
    lists = file.index.invlists
    count, width = lists.list_size(number), file.index.code_size
    if not count:
        return np.empty((0, width), np.uint8), np.empty(0, np.int64)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), count * width).reshape(count, width)
    return codes, faiss.rev_swig_ptr(lists.get_ids(number), count)
