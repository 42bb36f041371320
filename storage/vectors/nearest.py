"""The frames whose search keys are nearest to a query: an opened vector index of one version of an archive.

Keys that no file of the index holds yet are searched exactly beside it. Keys of frames that are not published any more,
and of parts that others have replaced, are never found, whatever the files hold.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import Rows
from storage.errors import ArchiveError, DamagedError
from storage.files import source_text
from storage.parts.read import part_keys
from storage.records import Hit
from storage.vectors.centroids import multiply
from storage.vectors.codes import CANDIDATES, CodedKeys, Passing, best_keys
from storage.vectors.exact_keys import ExactKeys, build_exact, part_row_ids
from storage.vectors.index_manifest import Damaged
from storage.vectors.live_parts import LiveParts

NARROW_ROWS = 4096  # a filter that leaves no more frames: each of them is compared
RECALL_QUERIES = 24


class Index:
    """An opened index.

    Attributes:
        rebuilt: it was missing or damaged, and was built again just now.
    """

    def __init__(
        self,
        archive: Archive,
        live: LiveParts,
        exact: ExactKeys | None = None,
        coded: CodedKeys | None = None,
        rebuilt: bool = False,
    ):
        """An index of what is published.

        Args:
            archive: whose frames.
            live: its published parts, beside those of the files.
            exact, coded: the keys of the files; None where there are none.
            rebuilt: whether it was missing or damaged, and was built again just now.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        self._archive = archive
        self._coded = coded
        new = build_exact(archive, live.new)
        every = [(exact, live.kept_exact), (new, new.covered.every)]
        self._exact = [(keys, kept) for keys, kept in every if keys is not None and len(keys.keys)]
        self._kept_coded = live.kept_coded
        self.rebuilt = rebuilt

    @cached_property
    def _files(self) -> list[tuple[ExactKeys | CodedKeys, np.ndarray]]:
        """The keys of each file, with (P,) bool, which of its parts are published."""
        return [*self._exact, *([] if self._coded is None else [(self._coded, self._kept_coded)])]

    @cached_property
    def _places(self) -> Mapping[str, tuple[ExactKeys | CodedKeys, int]]:
        """The file of each published part that has keys, and its place in it."""
        found: dict[str, tuple[ExactKeys | CodedKeys, int]] = {}
        for keys, kept in self._files:
            places = np.flatnonzero(kept & (keys.covered.key_counts > 0))
            found |= {path: (keys, place) for path, place in zip(keys.covered.paths(places), places.tolist())}
        return found

    @cached_property
    def frame_count(self) -> int:
        """How many published frames a search compares."""
        return sum(int(keys.covered.key_counts[kept].sum()) for keys, kept in self._files)

    @cached_property
    def pending_count(self) -> int:
        """How many published frames no search finds, since their model gives no search keys."""
        return max(0, self._archive.videos.frame_count() - self.frame_count)

    def covers(self, part: str) -> bool:
        """Whether the frames of a part can be found."""
        return part in self._places

    def count(self, rows: Rows) -> int:
        """How many of these frames a search compares."""
        return sum(self._count(path) if chosen is None else len(chosen) for path, chosen in self._searched(rows))

    def _searched(self, rows: Rows) -> Iterator[tuple[str, np.ndarray | None]]:
        return ((path, chosen) for path, chosen in rows.items() if path in self._places)

    def _count(self, path: str) -> int:
        keys, place = self._places[path]
        return int(keys.covered.key_counts[place])

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
        for keys, _ in self._files:
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
        if self._coded is not None and rows is not None and self._is_narrow(rows):
            return self._compare(query, rows)
        found = []
        for keys, kept in self._exact:
            passing = None if kept.all() else keys.covered.keys_of(kept)
            found += keys.search(query, k, passing if rows is None else keys.passing(self._chosen(keys, rows)))
        if self._coded is None:
            return found
        passing_codes = self._live_codes if rows is None else self._coded.passing(self._chosen(self._coded, rows))
        return found + best_keys(self._archive, self._coded, query, k, passing_codes)

    @cached_property
    def _live_codes(self) -> Passing | None:
        """The coded keys that are published; None for all."""
        return None if self._coded is None or self._kept_coded.all() else self._coded.passing_parts(self._kept_coded)

    def _chosen(self, keys: ExactKeys | CodedKeys, rows: Rows) -> Iterator[tuple[int, np.ndarray | None]]:
        """The place of each published part in a file, and the rows that may be found in it, None for all."""
        for path, chosen in self._searched(rows):
            file, place = self._places[path]
            if file is keys:
                yield place, chosen

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
        places, first = np.flatnonzero(self._kept_coded & (coded.covered.key_counts > 0)), np.zeros(1, np.int64)
        if not len(places):
            return 1.0
        shares = []
        for _ in range(RECALL_QUERIES):
            chosen = (coded.covered.path(place) for place in random.choice(places, 2))
            one, other = (self._keys_of(path, first)[0] for path in chosen)
            query = one.astype(np.float32) + other.astype(np.float32)
            found = best_keys(self._archive, coded, query, 10, passing)
            lists = coded.centroids.list_count
            true = best_keys(self._archive, coded, query, 10, passing, lists, 10 * CANDIDATES)
            shares.append(len(set(found) & set(true)) / len(true))
        return float(np.mean(shares))

    def _compare(self, query: np.ndarray, rows: Rows) -> list[tuple[float, int]]:
        """(score, row id) of some frames, by the keys that the parts store."""
        found: list[tuple[float, int]] = []
        for path, chosen in self._searched(rows):
            keys = self._keys_of(path, chosen)
            self._check_width(query, keys.shape[1])
            scores = multiply(keys.astype(np.float32), query)
            file, place = self._places[path]
            row_ids = part_row_ids(self._archive, path, int(file.covered.video_numbers[place]))
            row_ids = row_ids if chosen is None else row_ids[chosen]
            found += zip(scores.tolist(), row_ids.tolist(), strict=True)
        return found

    def _keys_of(self, path: str, rows: np.ndarray | None) -> np.ndarray:
        """The stored keys of a part that the index has keys of."""
        keys = part_keys(self._archive.frames_uri, path, rows)
        if keys is None:
            raise Damaged(f"{path}: keeps no search keys")
        return keys
