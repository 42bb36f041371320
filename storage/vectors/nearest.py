"""The frames whose search keys are nearest to a query: an opened vector index of one version of an archive.

Keys that no file of the index holds yet are searched exactly beside it. Keys of frames that are not published any more,
and of parts that others have replaced, are never found, whatever the files hold.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import LivePart, Rows
from storage.errors import ArchiveError, DamagedError
from storage.files import source_text
from storage.parts.read import part_keys
from storage.records import Hit
from storage.vectors.centroids import multiply
from storage.vectors.codes import CANDIDATES, CodedKeys, Passing, best_keys
from storage.vectors.exact_keys import ExactKeys, build_exact, part_row_ids
from storage.vectors.index_manifest import Covered, Damaged

NARROW_ROWS = 4096  # a filter that leaves no more frames: each of them is compared
RECALL_QUERIES = 24


class Index:
    """An opened index.

    Attributes:
        rebuilt: it was missing or damaged, and was built again just now.
    """

    def __init__(
        self, archive: Archive, exact: ExactKeys | None = None, coded: CodedKeys | None = None, rebuilt: bool = False
    ):
        self._archive = archive
        self._coded = coded
        self._live = live_parts(archive)
        held = self._held([keys.covered for keys in (exact, coded) if keys is not None])
        new = build_exact(archive, [part for path, part in self._live.items() if path not in held])
        self._exact = [keys for keys in (exact, new) if keys is not None and len(keys.keys)]
        self.rebuilt = rebuilt

    def _held(self, files: Iterable[Covered]) -> set[str]:
        """Parts whose keys are in some files.

        Raises:
            Damaged: a part is in two files, or its count of keys differs from the table's log.
        """
        held: set[str] = set()
        for covered in files:
            for path, _, count in covered.parts():
                if path in self._live and (path in held or count not in (0, self._live[path][2])):
                    raise Damaged(f"{count} keys of {path}")
                held.add(path)
        return held

    @cached_property
    def _files(self) -> list[ExactKeys | CodedKeys]:
        return [*self._exact, *([] if self._coded is None else [self._coded])]

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Count of keys of each published part that has keys."""
        every = (part for keys in self._files for part in keys.covered.parts())
        return {path: count for path, _, count in every if count and path in self._live}

    def covers(self, part: str) -> bool:
        """Whether the frames of a part can be found."""
        return part in self._counts

    @cached_property
    def frame_count(self) -> int:
        """How many published frames a search compares."""
        return sum(self._counts.values())

    @cached_property
    def pending_count(self) -> int:
        """How many published frames no search finds, since their model gives no search keys."""
        return sum(count for path, (_, _, count) in self._live.items() if not self.covers(path))

    def count(self, rows: Rows) -> int:
        """How many of these frames a search compares."""
        return sum(
            self._counts[path] if chosen is None else len(chosen)
            for path, chosen in rows.items()
            if path in self._counts
        )

    def search(self, query: np.ndarray, k: int, rows: Rows | None = None) -> list[Hit]:
        """The k frames whose keys have the greatest inner product with the query, best first.

        The scores are exact. In a large archive a few of the best frames may be missing, unless `rows` are few.

        Args:
            query: (E,) float32, L2-normalised.
            k: at most so many.
            rows: only these frames; None: all.
        Raises:
            ArchiveError: a part is missing or damaged, or the width of the keys differs from the query's.
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
        """(score, row id) of the best keys of each file."""
        if self._coded is None:
            return self._find_exact(query, k, rows)
        if rows is not None and self._is_narrow(rows):
            return self._compare(query, rows)
        return self._find_exact(query, k, rows) + best_keys(
            self._archive, self._coded, query, k, self._passing_codes(self._coded, rows)
        )

    def _find_exact(self, query: np.ndarray, k: int, rows: Rows | None) -> list[tuple[float, int]]:
        found = []
        for keys in self._exact:
            passing = None if rows is None and self._is_live(keys.covered) else keys.passing(self._chosen(keys, rows))
            found += keys.search(query, k, passing)
        return found

    def _passing_codes(self, coded: CodedKeys, rows: Rows | None) -> Passing | None:
        return self._live_codes if rows is None else coded.passing(self._chosen(coded, rows))

    @cached_property
    def _live_codes(self) -> Passing | None:
        """The coded keys that are published; None for all."""
        coded = self._coded
        return None if coded is None or self._is_live(coded.covered) else coded.passing(self._chosen(coded, None))

    def _is_live(self, covered: Covered) -> bool:
        return all(path in self._live for path in covered.paths)

    def _chosen(self, keys: ExactKeys | CodedKeys, rows: Rows | None) -> Iterator[tuple[int, np.ndarray | None]]:
        """Position of each published part in a file, and the rows that may be found in it, None for all."""
        order = keys.covered.order
        for path, chosen in (dict.fromkeys(keys.covered.paths) if rows is None else rows).items():
            if path in order and path in self._counts:
                yield order[path], chosen

    def method(self, rows: Rows | None = None) -> str:
        """How `search` compares frames, for people."""
        if self._coded is None:
            return "each frame was compared"
        if rows is not None and self._is_narrow(rows):
            return "each frame of the filter was compared"
        return f"through codes in {self._coded.centroids.list_count} lists"

    def _is_narrow(self, rows: Rows) -> bool:
        return self.count(rows) <= NARROW_ROWS

    def recall(self) -> float:
        """Share of the best ten coded keys that a usual search finds, against a search of all lists and more runs.

        Each query lies between the keys of two frames.
        """
        coded = self._coded
        assert coded is not None
        passing, random = self._live_codes, np.random.default_rng(0)
        paths, first = sorted(path for path in coded.covered.paths if path in self._counts), np.zeros(1, np.int64)
        if not paths:
            return 1.0
        shares = []
        for _ in range(RECALL_QUERIES):
            one, other = (self._keys_of(paths[place], first)[0] for place in random.integers(len(paths), size=2))
            query = one.astype(np.float32) + other.astype(np.float32)
            found = best_keys(self._archive, coded, query, 10, passing)
            lists = coded.centroids.list_count
            true = best_keys(self._archive, coded, query, 10, passing, lists, 10 * CANDIDATES)
            shares.append(len(set(found) & set(true)) / len(true))
        return float(np.mean(shares))

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
        """The stored keys of a part that the index has keys of."""
        keys = part_keys(self._archive.frames_uri, path, rows)
        if keys is None:
            raise Damaged(f"{path}: keeps no search keys")
        return keys


def live_parts(archive: Archive) -> dict[str, LivePart]:
    """The parts of published videos, by path."""
    return {part.path: part for part in archive.frames.parts()}
