"""The table of parts: which files of frames are committed, in shards of so many videos each.

    frames/          Delta table of the parts of the first videos, by number
    frames/_000001/  of the next ones, and so on

A commit costs time that grows with the files of its table, so a table holds the parts of VIDEOS_PER_SHARD videos. A
shard is opened when something of its videos is needed. Foreign tools that clean a Delta table leave folders alone whose
name begins with "_".
"""

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa

from storage.archive import delta
from storage.archive.settings import TABLES
from storage.archive.shard import PartBounds, Shard
from storage.files import join, list_names
from storage.parts.layout import COLUMNS
from storage.parts.read import part_problem
from storage.records import Part, Problem, Receipt, is_damaged, lies_within

VIDEOS_PER_SHARD = 4096  # so that opening or committing takes tens of milliseconds (ops/bench/million.py)
_FOLDER = re.compile(r"_[0-9]{6}")


class PartTable:
    """All committed parts, whether their videos are published or not.

    A shard is seen at the version that was the newest when it was opened or refreshed.
    """

    def __init__(self, uri: str, videos_per_shard: int | None):
        """The table of an archive; `open` reads it.

        Args:
            uri: the archive's folder of frames.
            videos_per_shard: None for an archive of an older vidx, which has one shard.
        """
        self.uri = uri
        self._per_shard = videos_per_shard
        self._folders: set[str] = set()  # of the shards after the first one
        self._unopened: dict[str, int] = {}  # versions
        self._shards: dict[str, Shard] = {}

    def open(self) -> None:
        """Reads which shards there are, unless that is known already.

        Raises:
            ArchiveError: the first one is missing or damaged.
        """
        if not self._shards:
            self._folders = set(shard_folders(self.uri))
            self._shard("")

    @property
    def version(self) -> int:
        """Grows with each commit of parts that is seen, and with each shard that is opened."""
        return sum(shard.version + 1 for shard in self._shards.values())

    def refresh(self) -> None:
        """Moves to the newest version."""
        self.open()
        self._folders = set(shard_folders(self.uri))
        self._unopened.clear()
        for shard in self._shards.values():
            shard.refresh()

    def folder_of(self, video_number: int) -> str:
        """The folder of a video's parts in the folder of frames; empty for that folder itself."""
        place = 0 if self._per_shard is None else video_number // self._per_shard
        return f"_{place:06}" if place else ""

    def folders_of(self, video_numbers: np.ndarray) -> set[str]:
        """The folders of the parts of some videos, (N,) int64."""
        if self._per_shard is None:
            return {""} if len(video_numbers) else set()
        firsts = np.unique(video_numbers // self._per_shard) * self._per_shard
        return {self.folder_of(number) for number in firsts.tolist()}

    def are_in(self, video_numbers: np.ndarray, folders: Collection[str]) -> np.ndarray:
        """(N,) bool: which of some videos, (N,) int64, have their parts in one of these shards."""
        if self._per_shard is None:
            return np.full(len(video_numbers), "" in folders)
        places = [int(folder[1:] or 0) for folder in folders]
        return np.isin(video_numbers // self._per_shard, places)

    def make_shards(self, video_numbers: Iterable[int]) -> None:
        """Makes the shards of these videos where they are missing, before parts are written to them.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        for folder in {self.folder_of(number) for number in video_numbers} - self._folders - {""}:
            create_shard(join(self.uri, folder))
            self._folders.add(folder)

    @property
    def opened(self) -> set[str]:
        """The folders of the shards that were opened."""
        return set(self._shards)

    def versions(self) -> dict[str, int]:
        """The version of each shard, by folder; no shard is opened for it."""
        for folder in {"", *self._folders} - self._unopened.keys() - self._shards.keys():
            self._unopened[folder] = delta.newest_version(join(self.uri, folder))
        return self._unopened | {folder: shard.version for folder, shard in self._shards.items()}

    def bounds(self, video_numbers: Iterable[int] | None = None) -> PartBounds:
        """The bounds of all parts; with video_numbers, of those in the shards of these videos.

        Raises:
            ArchiveError: a shard is damaged.
        """
        return self.bounds_in(
            {"", *self._folders} if video_numbers is None else {self.folder_of(number) for number in video_numbers}
        )

    def bounds_in(self, folders: Iterable[str]) -> PartBounds:
        """The bounds of the parts of some shards, by folder; of shards that do not exist there are none.

        Raises:
            ArchiveError: a shard is damaged.
        """
        return PartBounds.join([self._shard(folder).bounds() for folder in sorted({"", *self._folders} & set(folders))])

    def newest_numbers(self, from_number: int) -> set[int]:
        """The numbers of videos with parts, in the shard of a number and in all later ones."""
        first = self.folder_of(from_number)
        folders = [folder for folder in {"", *self._folders} if folder >= first]
        return {number for folder in folders for number in self._shard(folder).bounds().video_number.tolist()}

    def problems_by_segment(self, video_number: int) -> dict[str, Problem | None]:
        """The problem that the part of each committed segment of a video states; opens the footer of each part.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds = self.bounds([video_number])
        places = bounds.of(video_number).tolist()
        return {bounds.segment[place]: part_problem(self.uri, bounds.path[place]) for place in places}

    def problems(self, video_number: int) -> list[Problem]:
        """The problems of a video's committed segments; opens the footer of each part."""
        return [problem for problem in self.problems_by_segment(video_number).values() if problem is not None]

    def committed(self, video_number: int, segment_keys: Iterable[str], *, whole_only: bool = False) -> set[str]:
        """The segments whose rows are committed and need no second try.

        Args:
            video_number: the number of the video with its model and settings.
            segment_keys: the keys of its segments.
            whole_only: leave out every damaged segment; else only those with a temporary problem.
        Raises:
            ArchiveError: a part of the video is missing or damaged.
        """
        final = [
            key
            for key, problem in self.problems_by_segment(video_number).items()
            if not is_damaged(problem) or not (whole_only or problem.reason.is_temporary)
        ]
        return _covered(segment_keys, final)

    def holds(self, video_number: int, segment_keys: Collection[str]) -> bool:
        """Whether all these segments of a video are committed, damaged or not."""
        bounds = self.bounds([video_number])
        committed = bounds.segment[bounds.of(video_number)].tolist()
        return len(_covered(segment_keys, committed)) == len(segment_keys)

    def frame_count(self, video_number: int, segment_keys: Iterable[str] | None = None) -> int:
        """The number of frames committed for a video, published or not; with segment_keys, in these segments only."""
        bounds = self.bounds([video_number])
        places = bounds.of(video_number)
        if segment_keys is not None:
            keys = set(segment_keys)
            held = (key in keys or any(lies_within(other, key) for other in keys) for key in bounds.segment[places])
            places = places[np.fromiter(held, bool, len(places))]
        return int(bounds.row_count[places].sum())

    def commit(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Commits the parts of a group of segments, each shard's in one commit; tells for each whether it is committed.

        Each (video, segment, model, sampling) is committed at most once. If its rows are committed already, also by
        another process at the same moment, the new part is not committed and its file is removed. There are two
        exceptions, in which the new part replaces the old one in the same commit: the old rows are damaged and the new
        ones are whole or more; or the old problem is temporary and the new one is not. Committing the same receipt
        again changes nothing and gives the same result. A receipt without a part gives False.

        Raises:
            ArchiveError: the archive cannot be written, or a part to be replaced cannot be read. No file is removed;
                commit the group again to learn which parts are committed.
        """
        self.make_shards(receipt.video_number for receipt in receipts)
        return self._in_shards([self.folder_of(receipt.video_number) for receipt in receipts], receipts, Shard.commit)

    def drop(self, paths: Iterable[str]) -> None:
        """Takes parts out of the table.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        by_folder: dict[str, list[str]] = {}
        for path in paths:
            by_folder.setdefault(posixpath.dirname(path), []).append(path)
        for folder, own in by_folder.items():
            self._shard(folder).drop(own)

    def join(self, joined: Sequence[tuple[Part, Sequence[str]]]) -> list[bool]:
        """Replaces parts by joined ones with the same rows, each shard's in one commit; tells which are committed.

        If another process has removed or replaced one of the old parts meanwhile, the joined part is not committed, and
        its file is removed.

        Args:
            joined: new parts, each with the paths of the old ones; all are of one video.
        Raises:
            ArchiveError: the archive cannot be written; no file is removed.
        """
        return self._in_shards([posixpath.dirname(part.path) for part, _ in joined], joined, Shard.join)

    def _in_shards(self, folders: Sequence[str], items: Sequence, change: Callable) -> list[bool]:
        """What a change of several shards gives for each item."""
        done = [False] * len(items)
        for folder in sorted(set(folders)):
            places = [place for place, other in enumerate(folders) if other == folder]
            landed = change(self._shard(folder), [items[place] for place in places])
            for place, has_landed in zip(places, landed, strict=True):
                done[place] = has_landed
        return done

    def _shard(self, folder: str) -> Shard:
        if folder not in self._shards:
            self._shards[folder] = Shard(self.uri, folder)
        return self._shards[folder]


def shard_folders(frames_uri: str) -> list[str]:
    """The folders of the shards after the first one, in a folder of frames."""
    return [name for name in list_names(frames_uri) if _FOLDER.fullmatch(name)]


def table_folders(archive_uri: str) -> list[tuple[str, str]]:
    """The Delta tables of an archive: the name of each, and the folder of a shard in it, empty for the table itself."""
    shards = [("frames", folder) for folder in shard_folders(join(archive_uri, "frames"))]
    return [*((name, "") for name in TABLES), *shards]


def create_shard(uri: str) -> None:
    """Makes an empty shard; an existing one stays as it is.

    Raises:
        ArchiveError: the place cannot be written.
    """
    optional = ("search_key", "patches")  # parts may lack them
    schema = pa.schema([field.with_nullable(field.nullable or field.name in optional) for field in COLUMNS])
    delta.create_table(uri, schema)


def _covered(keys: Iterable[str], others: Collection[str]) -> set[str]:
    """The keys of segments that are one of the others, or lie within one."""
    known = set(others)
    return {key for key in keys if key in known or any(lies_within(key, other) for other in others)}
