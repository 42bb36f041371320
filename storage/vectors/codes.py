"""The main structure of a large index: FAISS inverted lists of RaBitQ codes (arXiv 2405.12497, 2409.09913).

    ID.codes    FAISS IVFRaBitQ without its centroids; an id is the number of a run (storage/vectors/near_duplicates.py)
    ID.runs     (R + 1,) int64: the place of each run's first key in the order of the parts' keys, then the key count
    ID.rows     for each key the row id, where the key and its CRC32C stand in the part's file, and a CRC32C of these

A search looks into the lists of the centroids (storage/vectors/centroids.py) that are nearest to the query, ranks their
codes, and then ranks the frames of the best runs by the keys that the parts store. New keys are added list by list: the
old codes are copied, and the keys behind them are not read again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import faiss
import google_crc32c
import numpy as np

from storage.archive.archive import Archive
from storage.parts.read import key_offsets, read_keys_at
from storage.vectors.centroids import Centroids, multiply
from storage.vectors.exact_keys import keys_of, part_row_ids
from storage.vectors.index_manifest import (
    Covered,
    Damaged,
    KeyFile,
    PartKeys,
    map_sized,
    map_whole,
    path_of,
    write_covered,
    write_file,
)
from storage.vectors.near_duplicates import LONGEST, run_means, run_starts

BITS = 2  # of a code for each dimension; 4 bits find the same and take three times as long for far queries
CHUNK_RUNS = 1 << 16  # that are added to FAISS at once
PROBES = 192  # lists that a search looks into
QUERY_BITS = 4  # for each dimension of the query; with float32 a search takes ten times as long
CANDIDATES = 32  # the fewest runs whose frames are ranked by their keys

_COUNT = slice(8, 16)  # where the header of a FAISS index says how many vectors it holds
_ROW = np.dtype([("row_id", "<i8"), ("key", "<i8"), ("checksum", "<i8"), ("crc", "<u4")])


@dataclass(frozen=True, eq=False)
class Passing:
    """The coded keys that may be found.

    Attributes:
        keys: (N,) bool.
        runs: (R,) bool, the runs with such a key.
        count: of such keys.
    """

    keys: np.ndarray
    runs: np.ndarray
    count: int


@dataclass(frozen=True, eq=False)
class CodedKeys:
    """Codes of keys, in memory or mapped.

    Attributes:
        centroids: of the lists.
        index: the codes; their ids are numbers of runs.
        runs: (R + 1,) int64, the place of each run's first key, then the count of all keys.
        rows: (N,) _ROW.
        covered: the parts that the keys belong to.
    """

    centroids: Centroids
    index: faiss.IndexIVFRaBitQ
    runs: np.ndarray
    rows: np.ndarray
    covered: Covered

    @property
    def width(self) -> int:
        """Width of the keys, E."""
        return self.index.d

    def holds(self, archive: Archive, path: str) -> bool:
        """Whether the rows of a part tell where its keys stand.

        Raises:
            ArchiveError: the part is missing or damaged.
        """
        place = self.covered.order[path]
        rows = self.rows[slice(*self.covered.starts[place : place + 2])]
        return np.array_equal(rows, _rows_of(archive, path, int(self.covered.video_numbers[place])))

    def passing(self, parts: Iterable[tuple[int, np.ndarray | None]]) -> Passing:
        """The keys of some parts, given by their position and the rows in each, None for all rows."""
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

    def passing_parts(self, kept: np.ndarray) -> Passing:
        """All keys of the parts that are chosen by kept, (P,) bool."""
        keys = self.covered.keys_of(kept)
        return Passing(keys, np.repeat(kept, np.diff(self._part_runs)), int(keys.sum()))

    @cached_property
    def _part_runs(self) -> np.ndarray:
        """(P + 1,) int64: the first run of each part, and the count of all."""
        found = np.searchsorted(self.runs, self.covered.starts)
        if (np.diff(found) < 0).any() or not np.array_equal(self.runs[found], self.covered.starts):
            raise Damaged("the runs are not those of the parts")
        return found

    def search_lists(
        self, query: np.ndarray, k: int, products: np.ndarray, lists: np.ndarray, passing: Passing | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimated scores and numbers, (K,) each with K <= k, of the best runs in some lists, best first.

        Args:
            query: (1, E) float32, rotated.
            k: at most so many.
            products, lists: as Centroids.probe gives them.
            passing: the keys that may be found; None for all.
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
        """The places of all keys of some runs, and the position in `runs` that each belongs to, (T,) int64 each.

        Raises:
            Damaged: a run lies outside the keys.
        """
        starts, lengths = self.runs[runs], self.runs[runs + 1] - self.runs[runs]
        ends = starts + lengths
        if (starts < 0).any() or (lengths < 1).any() or (lengths > LONGEST).any() or (ends > len(self.rows)).any():
            raise Damaged("a run lies outside the keys")
        owners = np.repeat(np.arange(len(runs)), lengths)
        return np.arange(len(owners)) + (starts - np.cumsum(lengths) + lengths)[owners], owners


def best_keys(
    archive: Archive,
    coded: CodedKeys,
    query: np.ndarray,
    k: int,
    passing: Passing | None,
    probes: int | None = None,
    candidates: int = CANDIDATES,
) -> list[tuple[float, int]]:
    """(score, row id) of about the k best keys, best first. The scores are exact.

    Args:
        archive: whose keys.
        coded: the codes.
        query: (E,) float32.
        k: at most so many.
        passing: the keys that may be found, or None for all.
        probes: lists to look into; None for the usual count.
        candidates: the fewest runs to rank by their keys.
    Raises:
        Damaged: the index is damaged.
        ArchiveError: a part is missing or damaged.
    """
    count = len(coded.rows) if passing is None else passing.count
    if not count:
        return []
    rotated = multiply(coded.centroids.rotation, query)[None]
    products, lists = coded.centroids.probe(rotated[0], probes or probe_count(count / len(coded.rows)))
    most = min(max(candidates, 2 * k), len(coded.runs) - 1)
    _, runs = coded.search_lists(rotated, most, products, lists, passing)
    places, owners = coded.places(runs)
    kept = np.ones(len(places), bool) if passing is None else passing.keys[places]
    enough = np.flatnonzero(np.cumsum(np.bincount(owners, kept, len(runs))) >= 2 * k)  # runs with 2 k keys
    run_count = max(candidates, int(enough[0]) + 1 if len(enough) else len(runs))
    hits = _rank(archive, coded, np.sort(places[kept & (owners < run_count)]), query)
    return sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]


def probe_count(share: float) -> int:
    """How many lists to look into where a filter leaves this share of the keys."""
    return round(PROBES / np.sqrt(share))


def _rank(archive: Archive, file: CodedKeys, places: np.ndarray, query: np.ndarray) -> list[tuple[float, int]]:
    """(score, row id) of the keys at some ascending places, by the keys that the parts store."""
    if not len(places):
        return []
    rows = file.rows[places]
    if not np.array_equal(_crc(rows), rows["crc"]):
        raise Damaged("a row does not match its checksum")
    parts = np.searchsorted(file.covered.starts, places, "right") - 1
    ends = np.flatnonzero(np.diff(parts, append=-1)) + 1
    keys, start = [], 0
    for end in ends.tolist():
        path = file.covered.path(parts[start])
        piece, in_part = rows[start:end], places[start:end] - file.covered.starts[parts[start]]
        keys.append(read_keys_at(archive.frames_uri, path, in_part, piece["key"], piece["checksum"], file.width))
        start = end
    scores = multiply(np.concatenate(keys).astype(np.float32), query)
    return list(zip(scores.tolist(), rows["row_id"].tolist(), strict=True))


def build_codes(archive: Archive, centroids: Centroids, parts: Sequence[PartKeys]) -> CodedKeys:
    """Codes, in memory, of the keys of parts, given by path, video number and row count.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    index, covered, rows, starts = _empty(centroids), [], [np.empty(0, _ROW)], []
    waiting: list[np.ndarray] = []
    key_count = run_count = 0

    def add() -> None:
        nonlocal run_count
        rotated = centroids.rotate(np.concatenate(waiting))
        numbers = np.arange(run_count, run_count + len(rotated))
        arrays = (rotated, numbers, centroids.assign(rotated))
        index.add_core(len(rotated), *(faiss.swig_ptr(array) for array in arrays))
        run_count += len(rotated)
        waiting.clear()

    for path, number, row_count in parts:
        stored = keys_of(archive, path, row_count, centroids.quantizer.d)
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
    return CodedKeys(centroids, index, runs, np.concatenate(rows), Covered.of(covered))


def _rows_of(archive: Archive, path: str, number: int) -> np.ndarray:
    """(T,) _ROW: where the keys of a part stand."""
    row_ids = part_row_ids(archive, path, number)
    rows = np.empty(len(row_ids), _ROW)
    rows["row_id"] = row_ids
    rows["key"], rows["checksum"] = key_offsets(archive.frames_uri, path)
    rows["crc"] = _crc(rows)
    return rows


def _crc(rows: np.ndarray) -> np.ndarray:
    """(T,) uint32: the checksum of each row's other fields."""
    assert _ROW.fields is not None
    data, width, end = rows.tobytes(), _ROW.itemsize, _ROW.fields["crc"][1]
    return np.array([google_crc32c.value(data[at : at + end]) for at in range(0, len(data), width)], np.uint32)


def write_codes(archive: Archive, pieces: Sequence[tuple[CodedKeys, np.ndarray]]) -> KeyFile:
    """Several groups of codes with the same centroids as files of the index, each with (P,) bool: the parts that stay.

    Raises:
        ArchiveError: the index cannot be written.
    """
    groups = [group for group, _ in pieces]
    covered = Covered.join([(group.covered, kept) for group, kept in pieces])
    if not covered.key_count:
        return KeyFile((), write_covered(archive, covered), covered)
    kept_keys = [group.covered.keys_of(kept) for group, kept in pieces]
    kept_runs = [keys[group.runs[:-1]] for group, keys in zip(groups, kept_keys, strict=True)]  # a run is of one part
    lengths = np.concatenate([np.diff(group.runs)[runs] for group, runs in zip(groups, kept_runs, strict=True)])
    runs = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    rows = (group.rows[keys].tobytes() for group, keys in zip(groups, kept_keys, strict=True))
    return KeyFile(
        (
            write_file(archive, "codes", _faiss_file(groups, kept_runs)),
            write_file(archive, "runs", [runs.tobytes()]),
            write_file(archive, "rows", rows),
        ),
        write_covered(archive, covered),
        covered,
    )


def _faiss_file(groups: Sequence[CodedKeys], kept_runs: Sequence[np.ndarray]) -> Iterator[bytes]:
    """A FAISS file of the codes of some runs of each group; the lists of all groups are joined one by one."""
    centroids, counts = groups[0].centroids, [len(runs) for runs in kept_runs]
    numbers = np.split(np.cumsum(np.concatenate(kept_runs)) - 1, np.cumsum(counts)[:-1])  # of each kept run from now on
    lists = np.concatenate([_lists_of(group)[runs] for group, runs in zip(groups, kept_runs, strict=True)])
    yield _head(centroids, len(lists))
    yield np.array([centroids.list_count, *np.bincount(lists, minlength=centroids.list_count)], "<u8").tobytes()
    for number in range(centroids.list_count):
        ids = []
        for group, runs, new_numbers in zip(groups, kept_runs, numbers, strict=True):
            codes, old = _list_of(group, number)
            yield codes[runs[old]].tobytes()
            ids.append(new_numbers[old[runs[old]]])
        yield np.concatenate(ids).astype("<i8").tobytes()


def open_codes(archive: Archive, centroids: Centroids | None, file: KeyFile) -> CodedKeys | None:
    """The codes of the index, mapped; None where it has none.

    Raises:
        Damaged: a file differs from what was written.
    """
    if not file.files or centroids is None:
        return None
    codes, runs, rows = file.files
    data, starts, places = map_sized(archive, codes), map_whole(archive, runs), map_sized(archive, rows)
    if len(starts) % 8 or len(starts) < 16 or len(places) % _ROW.itemsize:
        raise Damaged(f"{runs.name}, {rows.name}: {len(starts)} and {len(places)} bytes")
    starts, places = starts.view("<i8"), places.view(_ROW)
    if not len(places) == starts[-1] == file.covered.key_count:
        raise Damaged(f"{rows.name}: {len(places)} keys of {file.covered.key_count}")
    _check_layout(data, centroids, len(starts) - 1, codes.name)
    try:
        index = faiss.read_index(path_of(archive, codes), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise Damaged(f"{codes.name}: {error}") from error
    _use(index, centroids)
    return CodedKeys(centroids, index, starts, places, file.covered)


def check_codes(coded: CodedKeys) -> None:
    """Reads all runs, and the run of each code.

    Raises:
        Damaged: they are not those of the parts.
    """
    lengths = np.diff(coded.runs)
    if coded.runs[0] != 0 or (lengths < 1).any() or (lengths > LONGEST).any():
        raise Damaged("the runs do not follow one another")
    if not np.isin(coded.covered.starts, coded.runs).all():
        raise Damaged("the runs are not those of the parts")
    if (_lists_of(coded) < 0).any():
        raise Damaged("a run has no code")


def _head(centroids: Centroids, run_count: int) -> bytes:
    """What a FAISS file of so many codes begins with, up to the lengths of the lists."""
    empty = _empty(centroids)
    empty.quantizer = faiss.IndexFlatIP(centroids.quantizer.d)  # the centroids have a file of their own
    head = bytearray(faiss.serialize_index(empty).tobytes()[: -len(b"sprs") - 8])  # FAISS's other layout, of no lists
    head[_COUNT] = run_count.to_bytes(8, "little")
    return bytes(head + b"full")


def _check_layout(data: np.ndarray, centroids: Centroids, run_count: int, name: str) -> None:
    """Compares the head of a file of codes with what `write_codes` writes: FAISS believes all that it says.

    Raises:
        Damaged: they differ.
    """
    head, lists = _head(centroids, run_count), centroids.list_count
    end = len(head) + 8 + 8 * lists
    sizes = data[len(head) : end].view("<u8") if end <= len(data) else np.zeros(1, "<u8")
    is_right = data[: len(head)].tobytes() == head and sizes[0] == lists and sizes[1:].sum(dtype=float) == run_count
    if not is_right or len(data) - end != run_count * (_empty(centroids).code_size + 8):
        raise Damaged(f"{name}: not laid out as {run_count} runs in {lists} lists")


def _empty(centroids: Centroids) -> faiss.IndexIVFRaBitQ:
    width, lists = centroids.quantizer.d, centroids.list_count
    index = faiss.IndexIVFRaBitQ(centroids.quantizer, width, lists, faiss.METRIC_INNER_PRODUCT, True, BITS)
    index.is_trained = True
    _use(index, centroids)
    return index


def _use(index: faiss.IndexIVFRaBitQ, centroids: Centroids) -> None:
    index.own_fields = False
    index.quantizer = centroids.quantizer
    index.referenced_objects = [centroids]


def _lists_of(coded: CodedKeys) -> np.ndarray:
    """(R,) int64: the list of each run's code, -1 where it has none.

    Raises:
        Damaged: a code is of no run.
    """
    found = np.full(len(coded.runs) - 1, -1, np.int64)
    for number in range(coded.index.nlist):
        _, ids = _list_of(coded, number)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(found):
            raise Damaged("a code is of no run")
        found[ids] = number
    return found


def _list_of(file: CodedKeys, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, bytes) uint8 and (n,) int64: the codes of one list and the numbers of their runs."""
    lists = file.index.invlists
    count, width = lists.list_size(number), file.index.code_size
    if not count:
        return np.empty((0, width), np.uint8), np.empty(0, np.int64)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), count * width).reshape(count, width)
    return codes, faiss.rev_swig_ptr(lists.get_ids(number), count)
