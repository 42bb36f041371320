"""A shard: one Delta table with the parts of some videos. What is committed, by Delta's log; commits; removal of parts.

Each commit costs time that grows with the files of its table. So the parts of many videos are kept in many tables
(part_table.py).
"""

import contextlib
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from storage.archive import delta
from storage.checks import INT32, InvalidValue, check_column_text
from storage.errors import ArchiveError
from storage.files import exists, join, source_text
from storage.parts.layout import MOST_SECONDS, read_errors
from storage.parts.read import part_problem
from storage.parts.write import PartWriter
from storage.records import SEGMENT_KEY, Part, Problem, Receipt, is_damaged, is_whole, lies_within

_BOUNDS = (
    "min.video_number",
    "max.video_number",
    "num_records",
    "min.frame_index",
    "max.frame_index",
    "min.time_seconds",
    "max.time_seconds",
    "max.duration_seconds",
)


@dataclass(frozen=True, repr=False)
class PartBounds:
    """What Delta's log says of each of P committed parts: all arrays (P,), in no particular order."""

    path: np.ndarray
    segment: np.ndarray
    size_bytes: np.ndarray
    video_number: np.ndarray
    row_count: np.ndarray
    first_index: np.ndarray
    last_index: np.ndarray
    first_seconds: np.ndarray
    last_seconds: np.ndarray
    longest_seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    def __repr__(self) -> str:
        return f"PartBounds({len(self)} parts)"

    @classmethod
    def join(cls, pieces: Sequence["PartBounds"]) -> "PartBounds":
        """The parts of several shards."""
        if not pieces:
            empty = np.empty(0, np.int64)
            return cls(empty.astype(object), empty.astype(object), *[empty] * (len(fields(cls)) - 2))
        columns = ([getattr(piece, field.name) for piece in pieces] for field in fields(cls))
        return pieces[0] if len(pieces) == 1 else cls(*map(np.concatenate, columns))

    def frame_counts(self) -> Counter[int]:
        """The number of frames of each video, by its number."""
        counts: Counter[int] = Counter()
        for number, count in zip(self.video_number.tolist(), self.row_count.tolist(), strict=True):
            counts[number] += count
        return counts

    def of(self, video_number: int) -> np.ndarray:
        """The places of one video's parts in these arrays."""
        return np.flatnonzero(self.video_number == video_number)


class Shard:
    """The committed parts of some videos at one version, whether the videos are published or not."""

    def __init__(self, frames_uri: str, folder: str):
        """Opens a shard at its newest version.

        Args:
            frames_uri: the archive's folder of frames; the paths of parts are relative to it.
            folder: the shard's folder in it; empty for the first shard, which is the folder of frames itself.
        Raises:
            ArchiveError: its log is missing or damaged.
        """
        self._frames_uri = frames_uri
        self._folder = folder
        self._bounds: tuple[int, PartBounds] | None = None
        self._table = delta.open_table(join(frames_uri, folder))

    @property
    def version(self) -> int:
        """The table's version; each commit of parts increases it."""
        return self._table.version()

    def refresh(self) -> None:
        """Moves to the newest version."""
        delta.refresh(self._table)

    def bounds(self) -> PartBounds:
        """The bounds of all parts."""
        if self._bounds is None or self._bounds[0] != self.version:
            self._bounds = (self.version, _log_bounds(self._frames_uri, self._folder, delta.live_files(self._table)))
        return self._bounds[1]

    def commit(self, receipts: Sequence[Receipt]) -> list[bool]:
        """As PartTable.commit, in one commit: if it fails, either the whole group is committed or nothing is."""

        def plan() -> tuple[list[Part], list[int], set[str]]:
            waiting, replaced = self._not_committed(receipts)
            ids = {_segment_id(receipt.video_number, receipt.segment.key) for receipt in waiting}
            return [receipt.part for receipt in waiting if receipt.part is not None], replaced, ids

        return self._replace([receipt.part for receipt in receipts], plan)

    def drop(self, paths: Iterable[str]) -> None:
        """As PartTable.drop, in one commit."""
        wanted = set(paths)
        self._replace([], lambda: ([], [*np.flatnonzero([path in wanted for path in self.bounds().path])], set()))

    def join(self, joined: Sequence[tuple[Part, Sequence[str]]]) -> list[bool]:
        """As PartTable.join, in one commit."""

        def plan() -> tuple[list[Part], list[int], set[str]]:
            places = {path: place for place, path in enumerate(self.bounds().path.tolist())}
            waiting = [(part, paths) for part, paths in joined if places.keys() >= set(paths)]
            return [part for part, _ in waiting], [places[path] for _, paths in waiting for path in paths], set()

        return self._replace([part for part, _ in joined], plan)

    def _replace(
        self, parts: Sequence[Part | None], plan: Callable[[], tuple[list[Part], list[int], set[str]]]
    ) -> list[bool]:
        """Commits a change, planned again after each lost race; tells which of the parts are committed afterwards.

        Files of parts that are not are removed.

        Args:
            parts: all that might be committed.
            plan: gives the parts to add, the places in `bounds()` of the parts to remove, and the ids of the segments
                that are added.
        """
        committed: set[str] = set()
        for _ in delta.attempts():
            self.refresh()
            added, places, ids = plan()
            if not added and not places:
                break
            self._check_exist(added)
            bounds = self.bounds()
            removed = [(self._name(bounds.path[place]), int(bounds.size_bytes[place])) for place in places]
            guards = dict.fromkeys(ids, 1)
            for place in places:
                guard = _segment_id(int(bounds.video_number[place]), bounds.segment[place])
                guards[guard] = (self._table.transaction_version(guard) or 0) + 1
            try:
                own = [replace(part, path=self._name(part.path)) for part in added]
                delta.commit(self._table, own, removed, guards)
            except delta.Conflict:
                continue
            committed = {part.path for part in added}
            break
        committed |= set(self.bounds().path)  # also parts of an earlier try that was committed though it raised
        for part in parts:
            if part is not None and part.path not in committed:
                with contextlib.suppress(OSError):
                    PartWriter.discard(self._frames_uri, part)
        return [part is not None and part.path in committed for part in parts]

    def _name(self, path: str) -> str:
        """A part's name in its own table."""
        return path.removeprefix(f"{self._folder}/")

    def _check_exist(self, parts: Sequence[Part]) -> None:
        for part in parts:
            uri = join(self._frames_uri, part.path)
            if not exists(uri):
                raise ArchiveError(
                    f"{source_text(uri)}: was removed before it was committed, probably by `vidx clean` while the job "
                    "was suspended; run the same command again"
                )

    def _not_committed(self, receipts: Sequence[Receipt]) -> tuple[list[Receipt], list[int]]:
        """The receipts to commit, and the places of the parts that they replace."""
        bounds = self.bounds()
        places = {
            (number, bounds.segment[place]): place
            for number in {receipt.video_number for receipt in receipts}
            for place in bounds.of(number).tolist()
        }
        waiting, replaced, seen = [], [], set()
        for receipt in receipts:
            part, key = receipt.part, (receipt.video_number, receipt.segment.key)
            if part is None or key in seen:
                continue
            place = places.get(key)
            if place is None and self._is_joined(receipt):
                continue
            if place is not None:
                path, row_count = bounds.path[place], int(bounds.row_count[place])
                if path == part.path or not self._is_better(part.row_count, receipt.problem, path, row_count):
                    continue
                replaced.append(place)
            seen.add(key)
            waiting.append(receipt)
        return waiting, replaced

    def _is_joined(self, receipt: Receipt) -> bool:
        """Whether a joined part holds the segment's rows; only whole parts are joined."""
        bounds = self.bounds()
        places = bounds.of(receipt.video_number).tolist()
        around = (place for place in places if lies_within(receipt.segment.key, bounds.segment[place]))
        return any(is_whole(part_problem(self._frames_uri, bounds.path[place])) for place in around)

    def _is_better(self, new_count: int, problem: Problem | None, path: str, row_count: int) -> bool:
        """Whether a segment's new rows replace the committed ones."""
        committed = part_problem(self._frames_uri, path)
        if not is_damaged(committed):
            return False
        if not is_damaged(problem) or new_count > row_count:
            return True
        return committed.reason.is_temporary and not problem.reason.is_temporary


def _segment_id(video_number: int, segment_key: str) -> str:
    """The application id that guards a segment; a number stands for (video, model, sampling)."""
    return f"segment:{video_number}:{segment_key}"


def _log_bounds(frames_uri: str, folder: str, files: pa.Table) -> PartBounds:
    """The bounds of all parts from the columns of Delta's log.

    Raises:
        ArchiveError: a part has no bounds or impossible ones, so another program wrote it.
    """
    if files.num_rows == 0:
        return PartBounds.join([])
    damaged = f"{source_text(frames_uri)}: damaged archive"
    missing = [name for name in (*_BOUNDS, "min.segment") if name not in files.column_names]
    if missing or any(files.column(name).null_count for name in (*_BOUNDS, "min.segment")):
        raise ArchiveError(f"{damaged}: a part was committed without bounds; vidx did not write it")
    number, last_number, *others = (files.column(name).to_numpy() for name in _BOUNDS)
    if not np.array_equal(number, last_number):
        raise ArchiveError(f"{damaged}: a part holds several videos; vidx did not write it")
    bounds = PartBounds(
        np.array([posixpath.join(folder, name) for name in files.column("path").to_pylist()], object),
        np.array(files.column("min.segment").to_pylist(), object),
        files.column("size_bytes").to_numpy(),
        number.astype(np.int64),
        *others,
    )
    possible = (
        (bounds.size_bytes > 0)
        & (bounds.video_number >= 1)
        & (bounds.video_number <= INT32)
        & (bounds.row_count >= 1)
        & (bounds.row_count <= bounds.size_bytes)
        & (bounds.first_index >= 0)
        & (bounds.row_count - 1 <= bounds.last_index - bounds.first_index)
        & (bounds.last_index < 1 << 32)
        & (bounds.first_seconds >= -MOST_SECONDS)
        & (bounds.first_seconds <= bounds.last_seconds)
        & (bounds.last_seconds <= MOST_SECONDS)
        & (bounds.longest_seconds >= 0)
        & (bounds.longest_seconds <= MOST_SECONDS)
    )  # NaN is in no range
    with read_errors(frames_uri):
        check_column_text("segment", files.column("min.segment"), SEGMENT_KEY)
        if not possible.all():
            raise InvalidValue(f"the log's bounds of {bounds.path[~possible][0]} cannot be those of a part")
    return bounds
