"""The vector index: search keys of all frames, by which FAISS finds the frames nearest to a query.

    index/index.json    what the index holds; swapped atomically (contents.py)
    index/*             its files: keys as stored (exact_keys.py), or codes of them (codes.py)

Archives of up to EXACT_KEYS keys are searched exactly, larger ones through codes. A file is never changed. Additions
go to a new one, which takes in those that are not larger than itself, so that an addition costs what it adds and the
files' number grows with the logarithm of the keys. What is not published any more, and parts that others have
replaced, are left out at search, whatever the files hold; parts that no file holds yet are searched exactly beside
them. The index is derived: a missing or damaged one is built again from the parts.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import overload

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import Rows
from storage.checked import Wrong, place_of, read_small, refuse_other_kinds
from storage.errors import ArchiveError, DamagedError
from storage.files import exists, join, remove, source_text, writing
from storage.parts.read import part_keys
from storage.records import Hit
from storage.vectors.centroids import Coarse, list_count_for, multiply, open_coarse, write_coarse
from storage.vectors.codes import (
    CANDIDATES,
    MAX_KEYS,
    CodedKeys,
    Passing,
    best_keys,
    build_codes,
    check_runs,
    code_faults,
    join_codes,
    open_codes,
    write_codes,
)
from storage.vectors.contents import (
    FLOORS,
    LOCK,
    MANIFEST,
    MOST_JSON_BYTES,
    TRAINING,
    Covered,
    Damaged,
    KeyFile,
    Manifest,
    check_sizes,
    check_whole,
    locked,
    read_json,
    read_manifest,
    write_manifest,
)
from storage.vectors.exact_keys import (
    MAX_EXACT,
    ExactKeys,
    build_exact,
    exact_faults,
    in_groups,
    open_exact,
    part_row_ids,
    write_exact,
)
from storage.vectors.near_duplicates import sample_runs

EXACT_KEYS = 1 << 15  # more of them, and codes are faster (ops/bench/index.py)
GROWTH = 4  # times as many keys as the lists were made for, and they are made anew
LEAST_RECALL = 0.95  # of the best ten keys
RECALL_QUERIES = 24
NARROW_ROWS = 4096  # so many frames to choose from are compared one by one
SAMPLE_PER_LIST = 50  # runs that a centroid is trained on
FIRST_SAMPLE = 1 << 14  # frames that tell how many runs there are
MAX_RETIRED = 0.25  # share of a file's keys, before it is written again without them
UPDATE_ROUNDS = 5
OPEN_ROUNDS = 3

_KEPT = {MANIFEST, LOCK, TRAINING, FLOORS}
_Part = tuple[str, int, int]  # path, video number, row count by the log
_LiveParts = Mapping[str, _Part]  # of published videos, by path


class Index:
    """An opened index of one version of an archive.

    Attributes:
        rebuilt: it was missing or damaged, and was built again from the parts just now.
    """

    def __init__(
        self,
        archive: Archive,
        exact: Sequence[ExactKeys] = (),
        coarse: Coarse | None = None,
        coded: Sequence[CodedKeys] = (),
        without_keys: Iterable[str] = (),
        rebuilt: bool = False,
    ):
        self._archive = archive
        self._coarse = coarse
        self._coded = coded
        self._live = _live_parts(archive)
        empty = set(without_keys)
        held = self._held((*exact, *coded))
        new = [part for path, part in self._live.items() if path not in held and path not in empty]
        self._exact = [*exact, *_build_all(archive, new)]
        self._files: list[ExactKeys | CodedKeys] = [*self._exact, *coded]
        self.rebuilt = rebuilt

    def _held(self, files: Iterable[ExactKeys | CodedKeys]) -> set[str]:
        """Parts whose keys are in some files.

        Raises:
            Damaged: a file says another count of a part's keys than the log does of its rows.
        """
        held: set[str] = set()
        for keys in files:
            for path, _, count in keys.covered.parts():
                if path in self._live and (path in held or count not in (0, self._live[path][2])):
                    raise Damaged(f"{count} keys of {path}")
                held.add(path)
        return held

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Keys of each published part."""
        every = (part for keys in self._files for part in keys.covered.parts())
        return {path: count for path, _, count in every if count and path in self._live}

    def covers(self, part: str) -> bool:
        """Whether the frames of a part can be found."""
        return part in self._counts

    @cached_property
    def frame_count(self) -> int:
        """Published frames that a search compares."""
        return sum(self._counts.values())

    @cached_property
    def pending_count(self) -> int:
        """Published frames that no search finds, as the model gives no search keys."""
        return sum(count for path, (_, _, count) in self._live.items() if not self.covers(path))

    def count(self, rows: Rows) -> int:
        """How many of some frames a search compares."""
        return sum(
            self._counts[path] if chosen is None else len(chosen)
            for path, chosen in rows.items()
            if path in self._counts
        )

    def search(self, query: np.ndarray, k: int, rows: Rows | None = None) -> list[Hit]:
        """The k frames whose keys have the greatest inner product with the query, best first.

        Exact where the keys are not coded, and among few frames; else about the best, with exact scores.

        Args:
            query: (E,) float32, L2-normalised.
            k: at most so many.
            rows: only these frames; None: all.
        Raises:
            ArchiveError: a part is missing or damaged, or the keys are not as wide as the query.
        """
        query = np.ascontiguousarray(query, np.float32)
        for keys in self._files:
            self._check_width(query, keys.width)
        try:
            found = self._find(query, k, rows)
        except Damaged as error:
            place = source_text(self._archive.index_uri)
            raise ArchiveError(f"{place}: damaged; `vidx repair` makes the index anew ({error})") from error
        found.sort(key=lambda hit: (-hit[0], hit[1]))  # equal scores in order of video and time
        return [Hit(row_id >> 32, row_id & 0xFFFFFFFF, score) for score, row_id in found[:k]]

    def _check_width(self, query: np.ndarray, width: int) -> None:
        if query.shape != (width,):
            place = source_text(self._archive.uri)
            raise DamagedError(f"{place}: damaged archive: a query is {query.shape}, and keys of it are ({width},)")

    def _find(self, query: np.ndarray, k: int, rows: Rows | None) -> list[tuple[float, int]]:
        """(score, row id) of the best keys of each file, and perhaps more."""
        if self._coarse is not None and rows is not None and self._is_narrow(rows):
            return self._compare(query, rows)
        found = []
        for keys in self._exact:
            found += keys.search(query, k, self._passing(keys, rows))
        if self._coarse is not None:
            passing = [self._passing(coded, rows) for coded in self._coded]
            found += best_keys(self._archive, self._coarse, self._coded, query, k, passing)
        return found

    def method(self, rows: Rows | None = None) -> str:
        """How `search` compares frames, for people."""
        if self._coarse is None:
            return "each frame was compared"
        if rows is not None and self._is_narrow(rows):
            return "each frame of the filter was compared"
        return f"through codes in {self._coarse.list_count} lists"

    def _is_narrow(self, rows: Rows) -> bool:
        return self.count(rows) <= NARROW_ROWS

    def recall(self) -> float:
        """Share of the ten that all lists and many more runs give; each query lies between the keys of two frames."""
        random, paths = np.random.default_rng(0), sorted(self._counts)
        first = np.zeros(1, np.int64)
        passing = [self._passing(keys, None) for keys in self._coded]
        shares, coarse = [], self._coarse
        assert coarse is not None  # there are codes
        for _ in range(RECALL_QUERIES):
            one, other = (self._keys_of(paths[place], first)[0] for place in random.integers(len(paths), size=2))
            query = one.astype(np.float32) + other.astype(np.float32)
            found, true = (
                best_keys(self._archive, coarse, self._coded, query, 10, passing, probes, candidates)
                for probes, candidates in ((None, CANDIDATES), (coarse.list_count, 10 * CANDIDATES))
            )
            shares.append(len(set(found) & set(true)) / len(true))
        return float(np.mean(shares))

    @overload
    def _passing(self, keys: ExactKeys, rows: Rows | None) -> np.ndarray | None: ...
    @overload
    def _passing(self, keys: CodedKeys, rows: Rows | None) -> Passing | None: ...
    def _passing(self, keys: ExactKeys | CodedKeys, rows: Rows | None) -> np.ndarray | Passing | None:
        """Which keys of a file may be found, as it takes them; None for all."""
        return self._live_keys[id(keys)] if rows is None else keys.passing(self._chosen(keys.covered, rows))

    @cached_property
    def _live_keys(self) -> dict[int, np.ndarray | Passing | None]:
        """The same where nothing is filtered, by the file's id."""
        return {
            id(keys): None
            if all(path in self._live for path in keys.covered.paths)
            else keys.passing(self._chosen(keys.covered, None))
            for keys in self._files
        }

    def _chosen(self, covered: Covered, rows: Rows | None) -> Iterator[tuple[int, np.ndarray | None]]:
        """Published parts of a file, by their order, and the rows that may be found in each, None for all of them."""
        for path, chosen in (dict.fromkeys(covered.paths) if rows is None else rows).items():
            if path in covered.order and path in self._counts:
                yield covered.order[path], chosen

    def _compare(self, query: np.ndarray, rows: Rows) -> list[tuple[float, int]]:
        """(score, row id) of some frames, by the keys that the parts store."""
        found: list[tuple[float, int]] = []
        for path, chosen in rows.items():
            if path in self._counts:
                keys = self._keys_of(path, chosen)
                self._check_width(query, keys.shape[1])
                scores = multiply(keys.astype(np.float32), query)
                row_ids = part_row_ids(self._archive, path, self._live[path][1])
                row_ids = row_ids if chosen is None else row_ids[chosen]
                found += zip(scores.tolist(), row_ids.tolist(), strict=True)
        return found

    def _keys_of(self, path: str, rows: np.ndarray | None) -> np.ndarray:
        """The keys that a part stores, of one that the index has keys of."""
        keys = part_keys(self._archive.frames_uri, path, rows)
        if keys is None:
            raise Damaged(f"{path}: keeps no search keys")
        return keys


def update_index(archive: Archive, max_retired: float = MAX_RETIRED) -> int:
    """Brings the index up to the archive's newest version; says how many keys were added.

    Args:
        archive: whose frames.
        max_retired: a file of which more keys than this share are not live is written again without them.
    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    added = 0
    for _ in range(UPDATE_ROUNDS):  # another job may have published more meanwhile
        archive.refresh()
        count = _bring_up(archive, max_retired)
        if count is None:
            break
        added += count
    return added


def open_index(archive: Archive) -> Index:
    """The index of an archive; a missing or damaged one is built again, in place where that can be written.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    if not exists(join(archive.index_uri, MANIFEST)) and not archive.frames.parts():
        return Index(archive)
    seen = None
    for _ in range(OPEN_ROUNDS):  # a job that swaps the index meanwhile removes the files of the old one
        seen = _bytes_of(join(archive.index_uri, MANIFEST))
        with contextlib.suppress(Damaged):
            return _open(archive, read_manifest(archive), False)
    try:
        with locked(archive):
            if _bytes_of(join(archive.index_uri, MANIFEST)) == seen:  # no other process has made another meanwhile
                drop_index(archive)
        update_index(archive)
        improve_index(archive)
        return _open(archive, read_manifest(archive), True)
    except (ArchiveError, OSError, Damaged) as error:  # read-only: in memory, for this process alone
        if sum(part.row_count for part in archive.frames.parts()) > MAX_EXACT:
            raise ArchiveError(
                f"{source_text(archive.index_uri)}: missing or damaged, and too large to do without; make the archive "
                f"writable and run `vidx repair` ({' '.join(str(error).split())})"
            ) from error
        return Index(archive, rebuilt=True)


def _open(archive: Archive, manifest: Manifest, rebuilt: bool) -> Index:
    exact = [open_exact(archive, file) for file in manifest.exact if file.files]
    coded_files = [file for file in manifest.coded if file.files]
    coarse = open_coarse(archive, manifest.coarse) if coded_files and manifest.coarse else None
    coded = [] if coarse is None else [open_codes(archive, coarse, file) for file in coded_files]
    empty = [path for file in manifest.key_files if not file.files for path in file.covered.paths]
    return Index(archive, exact, coarse, coded, empty, rebuilt)


def _live_parts(archive: Archive) -> _LiveParts:
    return {part.path: part for part in archive.frames.parts()}


def _build_all(archive: Archive, parts: Sequence[_Part]) -> list[ExactKeys]:
    built = [build_exact(archive, group) for group in in_groups(parts, MAX_EXACT)]
    return [ExactKeys(index, covered) for index, covered in built if index is not None]


def _bring_up(archive: Archive, max_retired: float) -> int | None:
    """Writes what the files lack, and the manifest; the count of keys added, None where all is there already."""
    if _whole_manifest(archive) is None and sum(part.row_count for part in archive.frames.parts()) > EXACT_KEYS:
        keys = _train(archive, wait=True)  # lost: no exact files, which would only be replaced
        if keys:
            return keys
    with locked(archive):
        archive.refresh()
        live = _live_parts(archive)
        found = _whole_manifest(archive)
        before, coarse = found or (Manifest(), None)
        covered = {path for file in before.key_files for path in file.covered.paths}
        new = [part for path, part in live.items() if path not in covered]
        kept, folded = _choose_files(before, live, sum(count for _, _, count in new), max_retired)
        if found and not new and not folded:
            return None
        if coarse is None:
            again = [live[path] for file in folded for path in file.covered.paths if path in live]
            written = [write_exact(archive, group) for group in in_groups([*again, *new], MAX_EXACT)]
            write_manifest(archive, Manifest((*kept, *written)))
        else:
            written = _write_codes(archive, coarse, folded, new, live)
            write_manifest(archive, replace(before, coded=(*kept, *written)))
    new_paths = {path for path, _, _ in new}
    return sum(count for file in written for path, _, count in file.covered.parts() if path in new_paths)


def _whole_manifest(archive: Archive) -> tuple[Manifest, Coarse | None] | None:
    """What the index consists of, with its centroids; None where any of it is missing or visibly damaged."""
    try:
        manifest = read_manifest(archive)
        check_sizes(archive, manifest)
        return manifest, None if manifest.coarse is None else open_coarse(archive, manifest.coarse)
    except Damaged:
        return None


def improve_index(archive: Archive) -> None:
    """Goes over from exact search to codes, makes the lists anew where they fit no more, or goes back.

    Lists fit no more when there are GROWTH times as many keys as they were made for, or when a sample of searches finds
    less than LEAST_RECALL of what all lists would give; that is looked at each time that the keys have grown by a
    quarter. The old index serves until the new one is in place.

    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    try:
        manifest = read_manifest(archive)
        if manifest.key_count <= EXACT_KEYS // 2 and manifest.coarse is not None:
            _uncode(archive)
        elif manifest.key_count > max(EXACT_KEYS, GROWTH * manifest.trained_count):
            _train(archive)
        elif manifest.coarse is None or manifest.key_count < 1.25 * manifest.checked_count:
            return
        elif _open(archive, manifest, False).recall() < LEAST_RECALL:
            _train(archive)
        else:
            with locked(archive):
                write_manifest(archive, replace(read_manifest(archive), checked_count=manifest.key_count))
            return
    except Damaged:
        return  # another job has swapped or dropped it just now; whoever is next looks again
    update_index(archive)


def _train(archive: Archive, wait: bool = False) -> int:
    """Makes an index of codes from all parts, and says how many keys it has.

    None, and no index, where there are no keys, or where another process makes one or, with wait, has made one.
    """
    with locked(archive, TRAINING, wait) as is_alone:
        if not is_alone or (wait and _whole_manifest(archive) is not None):
            return 0
        parts = list(_live_parts(archive).values())
        coarse = _make_lists(archive, parts)
        if coarse is None:
            return 0
        files = _write_codes(archive, coarse, [], parts, {})
        keys = sum(file.covered.key_count for file in files)
        made = Manifest((), tuple(files), write_coarse(archive, coarse), keys, keys)
        with locked(archive):
            try:
                check_sizes(archive, made)
            except Damaged:
                return 0  # somebody has tidied the folder meanwhile; the next job makes it
            write_manifest(archive, made)
        return keys


def _make_lists(archive: Archive, parts: Sequence[_Part]) -> Coarse | None:
    """Lists for the runs of some parts, as far as a sample tells; None where there are no keys."""
    key_count = sum(count for _, _, count in parts)
    _, runs_per_key = sample_runs(archive, parts, FIRST_SAMPLE)
    if not runs_per_key:
        return None
    list_count = list_count_for(max(1.0, key_count * runs_per_key))
    sample, _ = sample_runs(archive, parts, round(list_count * SAMPLE_PER_LIST / runs_per_key))
    return Coarse.train(sample, min(list_count, len(sample)))


def _uncode(archive: Archive) -> None:
    """Makes an index of exact keys, for an archive that has become small."""
    with locked(archive):
        archive.refresh()
        parts = list(_live_parts(archive).values())
        write_manifest(archive, Manifest(tuple(write_exact(archive, group) for group in in_groups(parts, MAX_EXACT))))


def _write_codes(
    archive: Archive, coarse: Coarse, folded: Iterable[KeyFile], new: Sequence[_Part], live: _LiveParts
) -> list[KeyFile]:
    """Files of codes of new parts and of what is live in those that are written again."""
    parts, opened = list(new), []
    for file in folded:
        try:
            if not file.files:  # parts without keys
                raise Damaged("nothing to join")
            for written in file.files:
                check_whole(archive, written)  # so that no damage is written again as if it were right
            found = open_codes(archive, coarse, file)
            check_runs(found)
            opened.append(found)
        except Damaged:
            parts += [live[path] for path in file.covered.paths if path in live]
    built = (build_codes(archive, coarse, group) for group in in_groups(parts, MAX_KEYS))
    files: list[KeyFile] = []
    waiting: list[CodedKeys] = []
    for codes in itertools.chain(opened, built):
        if waiting and sum(len(file.rows) for file in (*waiting, codes)) > MAX_KEYS:
            files.append(_write_joined(archive, coarse, waiting, live))
            waiting = []
        waiting.append(codes)
    return [*files, _write_joined(archive, coarse, waiting, live)] if waiting else files


def _write_joined(archive: Archive, coarse: Coarse, files: Sequence[CodedKeys], live: _LiveParts) -> KeyFile:
    if len(files) == 1 and not files[0].is_mapped:
        return write_codes(archive, files[0])
    is_live = [[not file.is_mapped or path in live for path in file.covered.paths] for file in files]
    return write_codes(archive, join_codes(coarse, files, is_live))


def _choose_files(
    manifest: Manifest, live: _LiveParts, new_count: int, max_retired: float
) -> tuple[list[KeyFile], list[KeyFile]]:
    """Files that stay, and files that are written again together with the new keys."""
    is_coded = manifest.coarse is not None
    kept: list[KeyFile] = []
    folded: list[KeyFile] = []
    for file in manifest.coded if is_coded else manifest.exact:
        retired = sum(count for path, _, count in file.covered.parts() if path not in live)
        (folded if retired > max_retired * file.covered.key_count else kept).append(file)
    count, most = new_count, MAX_KEYS if is_coded else MAX_EXACT
    for file in sorted(kept, key=lambda file: file.covered.key_count) if new_count else ():
        key_count = file.covered.key_count
        if key_count > count or key_count + count > most:
            break
        kept.remove(file)
        folded.append(file)
        count += key_count
    return kept, folded


def named_files(archive: Archive) -> set[str]:
    """Names of the files that the index consists of; those that the manifest names are left out where it is damaged."""
    try:
        return _KEPT | read_manifest(archive).names()
    except Damaged:
        return _KEPT


def index_faults(archive: Archive) -> Iterator[tuple[str, str]]:
    """URI and what is wrong, of every file of the index that is not as it was written or differs from the parts.

    A missing index is none: it is built again.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    manifest = join(archive.index_uri, MANIFEST)
    try:
        refuse_other_kinds(manifest)
    except Wrong as error:
        yield manifest, f"damaged: {error}"
        return
    while (before := _bytes_of(manifest)) is not None:
        found = [*_faults_by_manifest(archive, manifest)]
        if _bytes_of(manifest) in (None, before):
            yield from found
            return
        archive.refresh()  # a job has written another index meanwhile, and removed files of this one


def _bytes_of(uri: str) -> bytes | None:
    """A file's content, or None where it is gone or none that can be read."""
    try:
        return read_small(uri, MOST_JSON_BYTES)
    except (OSError, Wrong):
        return None


def _faults_by_manifest(archive: Archive, uri: str) -> Iterator[tuple[str, str]]:
    try:
        manifest = read_manifest(archive)
    except Damaged as error:
        yield uri, f"damaged: {error}"
        return
    floors = join(archive.index_uri, FLOORS)
    if exists(floors):
        try:
            read_json(floors)
        except Damaged as error:
            yield floors, f"damaged: {error}"
    live = _live_parts(archive)
    for file in manifest.exact:
        for name, detail in exact_faults(archive, file, [path in live for path in file.covered.paths]):
            yield join(archive.index_uri, name), detail
    coarse = None
    if manifest.coarse is not None:
        try:
            check_whole(archive, manifest.coarse)
            coarse = open_coarse(archive, manifest.coarse)
        except Damaged as error:
            yield join(archive.index_uri, manifest.coarse.name), f"damaged: {error}"
    for file in manifest.coded:
        for name, detail in code_faults(archive, coarse, file, [path in live for path in file.covered.paths]):
            yield join(archive.index_uri, name), detail


def drop_index(archive: Archive) -> None:
    """Forgets the index, so that the next update builds it from the parts.

    Raises:
        ArchiveError: the index cannot be written.
    """
    names: set[str] = set()
    with contextlib.suppress(Damaged):
        names = read_manifest(archive).names()
    with writing(archive.index_uri):
        remove(join(archive.index_uri, MANIFEST))
        for name in names:
            with contextlib.suppress(Wrong):
                remove(place_of(archive.index_uri, name))
        try:
            read_json(join(archive.index_uri, FLOORS))
        except Damaged:
            remove(join(archive.index_uri, FLOORS))
