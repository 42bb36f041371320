"""The table of parts: committing the frames of segments, each once, and taking parts out."""

import contextlib
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

import numpy as np
from deltalake import DeltaTable

from storage.archive import delta
from storage.archive.delta import Conflict
from storage.archive.frames import PartBounds, part_bounds
from storage.errors import ArchiveError
from storage.files import exists, join, source_text
from storage.parts.read import part_problem
from storage.parts.write import PartWriter
from storage.records import Part, Problem, Receipt, is_damaged, is_whole, lies_within


class PartTable:
    """Committed parts, whether their videos are published or not, at one version."""

    def __init__(self, uri: str):
        self.uri = uri
        self._bounds: tuple[int, PartBounds] | None = None

    @cached_property
    def _table(self) -> DeltaTable:
        return delta.open_table(self.uri)

    def open(self) -> None:
        """Reads the newest version, where none has been read."""
        _ = self._table

    @property
    def version(self) -> int:
        """Of the table: it grows with each commit of parts."""
        return self._table.version()

    def refresh(self) -> None:
        """Moves to the newest version."""
        delta.refresh(self._table)

    def bounds(self) -> PartBounds:
        """All parts."""
        if self._bounds is None or self._bounds[0] != self.version:
            self._bounds = (self.version, part_bounds(self.uri, delta.live_files(self._table)))
        return self._bounds[1]

    def problems_by_segment(self, video_number: int) -> dict[str, Problem | None]:
        """What is wrong with each segment of a number, as its part says; opens each one's footer.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds = self.bounds()
        places = bounds.of(video_number).tolist()
        return {bounds.segment[place]: part_problem(self.uri, bounds.path[place]) for place in places}

    def committed(self, video_number: int, segment_keys: Iterable[str], *, whole_only: bool = False) -> set[str]:
        """Those of the segments whose rows are in, for good: not those that another try may make whole.

        Args:
            video_number: of the video, with a model and settings.
            segment_keys: its segments.
            whole_only: leave out all that are not whole, not only those whose problem may pass by itself.
        Raises:
            ArchiveError: a part of the video is missing or damaged.
        """
        for_good = [
            key
            for key, problem in self.problems_by_segment(video_number).items()
            if not is_damaged(problem) or not (whole_only or problem.reason.is_temporary)
        ]
        return _pieces(segment_keys, for_good)

    def holds(self, video_number: int, segment_keys: Collection[str]) -> bool:
        """Whether segments of a number are committed, whole or not."""
        bounds = self.bounds()
        there = bounds.segment[bounds.of(video_number)].tolist()
        return len(_pieces(segment_keys, there)) == len(segment_keys)

    def frame_count(self, video_number: int, segment_keys: Iterable[str] | None = None) -> int:
        """Frames committed under a number, published or not; segment_keys: in these segments alone."""
        bounds = self.bounds()
        places = bounds.of(video_number)
        if segment_keys is not None:
            keys = set(segment_keys)
            held = (key in keys or any(lies_within(other, key) for other in keys) for key in bounds.segment[places])
            places = places[np.fromiter(held, bool, len(places))]
        return int(bounds.row_count[places].sum())

    def problems(self, video_number: int) -> list[Problem]:
        """What the parts of a number's committed segments say of them; opens each one's footer."""
        return [problem for problem in self.problems_by_segment(video_number).values() if problem is not None]

    def commit(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Commits the parts of a group of segments at once; says of each whether it landed.

        A segment whose rows are in already, also by a process that commits at this very moment, does not land, and
        its part is removed. So each (video, segment, model, sampling) is in at most once. Rows that are not whole
        make way, in the same commit, for whole ones or for more, and those of a problem that may pass for those of
        one that does not. A receipt without a part has nothing to land; one whose very part is in has landed, however
        often it is committed.

        Raises:
            ArchiveError: the archive cannot be written, or a part to be replaced not be read. The group is in, whole,
                or not at all, and no part is removed; committing it again tells.
        """
        landed: set[str] = set()
        for _ in delta.attempts():
            self.refresh()
            waiting, replaced = self._not_committed(receipts)
            if not waiting:
                break
            guards = {_segment_id(receipt.video_number, receipt.segment.key): 1 for receipt in waiting}
            for guard in guards.keys() & replaced.keys():
                guards[guard] = (self._table.transaction_version(guard) or 0) + 1
            parts = [receipt.part for receipt in waiting if receipt.part is not None]
            self._check_written(parts)
            try:
                delta.commit(self._table, parts, list(replaced.values()), guards)
            except Conflict:
                continue
            landed = {part.path for part in parts}
            break
        landed |= set(self.bounds().path)  # also what was in before, or landed in a try that seemed to fail
        written = [receipt.part for receipt in receipts if receipt.part is not None]
        for part in written:
            if part.path not in landed:
                with contextlib.suppress(OSError):
                    PartWriter.discard(self.uri, part)
        return [receipt.part is not None and receipt.part.path in landed for receipt in receipts]

    def _check_written(self, parts: Sequence[Part]) -> None:
        for part in parts:
            uri = join(self.uri, part.path)
            if not exists(uri):
                raise ArchiveError(
                    f"{source_text(uri)}: was removed before it was committed, as by `vidx clean` beside a job that "
                    "paused; run the same command again"
                )

    def drop(self, paths: Iterable[str]) -> None:
        """Takes parts out.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        wanted = set(paths)
        for _ in delta.attempts():
            self.refresh()
            bounds = self.bounds()
            places = [place for place, path in enumerate(bounds.path) if path in wanted]
            if not places:
                return
            guards = [_segment_id(int(bounds.video_number[place]), bounds.segment[place]) for place in places]
            versions = {guard: (self._table.transaction_version(guard) or 0) + 1 for guard in guards}
            removed = [(bounds.path[place], int(bounds.size_bytes[place])) for place in places]
            with contextlib.suppress(Conflict):
                delta.commit(self._table, [], removed, versions)

    def join(self, joined: Sequence[tuple[Part, Sequence[str]]]) -> list[bool]:
        """Puts each of several written parts in the place of those whose rows it holds, at once; says which landed.

        One of whose rows another process has taken out or replaced meanwhile does not land, and is removed.

        Args:
            joined: new parts, each with the paths of the old ones.
        Raises:
            ArchiveError: the archive cannot be written. The group is in, whole, or not at all; no part is removed.
        """
        landed: set[str] = set()
        for _ in delta.attempts():
            self.refresh()
            bounds = self.bounds()
            places = {path: place for place, path in enumerate(bounds.path.tolist())}
            waiting = [(part, paths) for part, paths in joined if places.keys() >= set(paths)]
            if not waiting:
                break
            self._check_written([part for part, _ in waiting])
            old = [places[path] for _, paths in waiting for path in paths]
            guards = {_segment_id(int(bounds.video_number[place]), bounds.segment[place]) for place in old}
            versions = {guard: (self._table.transaction_version(guard) or 0) + 1 for guard in guards}
            removed = [(bounds.path[place], int(bounds.size_bytes[place])) for place in old]
            try:
                delta.commit(self._table, [part for part, _ in waiting], removed, versions)
            except Conflict:
                continue
            landed = {part.path for part, _ in waiting}
            break
        there = landed | set(self.bounds().path)  # also what landed in a try that seemed to fail
        for part, _ in joined:
            if part.path not in there:
                with contextlib.suppress(OSError):
                    PartWriter.discard(self.uri, part)
        return [part.path in there for part, _ in joined]

    def _not_committed(self, receipts: Sequence[Receipt]) -> tuple[list[Receipt], dict[str, tuple[str, int]]]:
        """The receipts to commit, and by segment the path and size of each part that makes way for one of them."""
        bounds = self.bounds()
        places = {
            (number, bounds.segment[place]): place
            for number in {receipt.video_number for receipt in receipts}
            for place in bounds.of(number).tolist()
        }
        waiting, replaced, seen = [], {}, set()
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
                replaced[_segment_id(receipt.video_number, receipt.segment.key)] = (path, int(bounds.size_bytes[place]))
            seen.add(key)
            waiting.append(receipt)
        return waiting, replaced

    def _is_joined(self, receipt: Receipt) -> bool:
        """Whether a segment's rows are in a part of several segments, which holds all that there is of each."""
        bounds = self.bounds()
        places = bounds.of(receipt.video_number).tolist()
        around = (place for place in places if lies_within(receipt.segment.key, bounds.segment[place]))
        return any(is_whole(part_problem(self.uri, bounds.path[place])) for place in around)

    def _is_better(self, new_count: int, problem: Problem | None, path: str, row_count: int) -> bool:
        """Whether a segment's rows are to take the place of those that are in."""
        there = part_problem(self.uri, path)
        if not is_damaged(there):
            return False
        if not is_damaged(problem) or new_count > row_count:
            return True
        return there.reason.is_temporary and not problem.reason.is_temporary


def _segment_id(video_number: int, segment_key: str) -> str:
    """The guard of a segment: a number stands for (video, model, sampling)."""
    return f"segment:{video_number}:{segment_key}"


def _pieces(keys: Iterable[str], of: Collection[str]) -> set[str]:
    """Those of the segments that are, or lie within, one of the others."""
    known = set(of)
    return {key for key in keys if key in known or any(lies_within(key, other) for other in of)}
