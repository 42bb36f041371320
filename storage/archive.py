"""The archive: what is committed, and the commits that change it.

    archive.json    format version, model; written last, so that a folder with it is a whole archive
    frames/         Delta table of parts (storage/layout.py), one row per frame
    videos/         Delta table, one row per video; its rows make frames visible
    numbers/        Delta table: the number of each (video, model, sampling), given once
    index/          search keys (storage/vectors.py); may be deleted at any time

Frames are committed first, then the videos row that shows them: frames of a number that no row names are not there
for any reader. `deltalake` does not survive a fork: processes that use an archive must be spawned.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage import tables, videos
from storage.cells import part_identity, part_problem
from storage.errors import ArchiveError, UsageError
from storage.files import (
    exists,
    join,
    make_folder,
    remove,
    source_text,
    to_uri,
    tree_size,
    write_bytes,
    writing,
)
from storage.frames import LivePart, PartBounds, find_frames, find_hits, part_bounds
from storage.layout import COLUMNS
from storage.parts import PartWriter
from storage.records import FrameRef, Hit, Part, Problem, Reason, Receipt, Sampling, Status, VideoRow
from storage.settings import (
    FORMAT_VERSION,
    TABLES,
    Settings,
    archive_uri,
    is_archive,
    read_settings,
    refuse_foreign_folder,
    write_settings,
)
from storage.tables import Conflict, RowTable

NUMBERS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("video_number", pa.int32(), nullable=False),
    ]
)
MIN_ID_DIGITS = 6


@dataclass(frozen=True)
class ArchiveStatus:
    """Counts of published videos and frames, and what the archive occupies."""

    videos_indexed: int
    videos_partial: int
    videos_failed: int
    frames: int
    model_ids: tuple[str, ...]
    size_bytes: int
    version: int
    format_version: int


def archive_exists(uri: str) -> bool:
    """Whether there is a whole archive at a path or URI.

    Raises:
        UsageError: no archive can be there.
    """
    return is_archive(archive_uri(uri))


def create_archive(uri: str, *, model_id: str, model_name: str) -> "Archive":
    """A new archive for one model, or the one that is there if it is of the same model or still empty.

    Raises:
        UsageError: the folder belongs to something else, or holds an archive of another model.
        ArchiveError: the place cannot be written.
    """
    uri = archive_uri(uri)
    if not archive_exists(uri):
        refuse_foreign_folder(uri)
        with writing(uri):
            for name in (*TABLES, "index"):
                make_folder(join(uri, name))
        frames = pa.schema([_optional(field) for field in COLUMNS])
        for name, schema in (("frames", frames), ("videos", videos.SCHEMA), ("numbers", NUMBERS)):
            tables.create_table(join(uri, name), schema)
        if not archive_exists(uri):
            write_settings(uri, Settings(FORMAT_VERSION, model_id, model_name))
    archive = open_archive(uri, write=True)
    if archive.model_id != model_id and archive.is_empty:  # left by a job that could not load its model
        write_settings(uri, Settings(FORMAT_VERSION, model_id, model_name))
        return open_archive(uri)
    archive.check_model(model_id, model_name)
    return archive


def open_archive(uri: str, *, write: bool = False) -> "Archive":
    """The archive at a path or URI, at its newest version.

    Args:
        uri: where it is.
        write: try at once whether it can be written.
    Raises:
        UsageError: there is no archive.
        ArchiveError: it is damaged, of a newer format, or cannot be read (or written, if that is asked for).
    """
    uri = archive_uri(uri)
    if not archive_exists(uri):
        raise UsageError(f"no archive at {source_text(uri)}: run `vidx index` first, or name another with --archive")
    archive = Archive(uri, read_settings(uri))
    if write:
        for name in TABLES:
            probe = join(uri, name, "write_test.tmp")
            with writing(join(uri, name)):
                write_bytes(probe, b"vidx")
                remove(probe)
    return archive


class Archive:
    """One archive at one version; moves on with `refresh` and with every change made through it.

    Attributes:
        uri: of its folder.
        model_id, model_name: of the one model whose frames it holds.
        settings: what archive.json says.
    """

    def __init__(self, uri: str, settings: Settings):
        self.uri = uri
        self.settings = settings
        self.model_id = settings.model_id
        self.model_name = settings.model_name
        self.frames_uri = join(uri, "frames")
        self.index_uri = join(uri, "index")
        self._videos = RowTable(join(uri, "videos"))  # before the frames, so that all that they show is there
        self._videos.rows()
        self._frames = tables.open_table(self.frames_uri)
        self._bounds: tuple[int, PartBounds] | None = None

    def __repr__(self) -> str:
        return f"Archive({self.uri!r}, version={self.version})"

    @property
    def is_empty(self) -> bool:
        """Whether no job has committed anything, or reserved a number for what it will commit."""
        tables_empty = self._videos.rows().num_rows == 0 and self._numbers.rows().num_rows == 0
        return tables_empty and len(self.part_bounds()) == 0

    @property
    def version(self) -> int:
        """The version of the videos table, which counts publications."""
        return self._videos.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._videos.refresh()
        tables.refresh(self._frames)

    def check_model(self, model_id: str, model_name: str) -> None:
        """Refuses rows of another model.

        Raises:
            UsageError: the archive is of another one, and not empty.
        """
        if self.model_id != model_id and not self.is_empty:
            raise UsageError(
                f"{source_text(self.uri)}: this archive is of the model {self.model_name} ({self.model_id[:12]}), not "
                f"of {model_name} ({model_id[:12]}); name that model or choose another --archive"
            )

    # Numbers

    @cached_property
    def _numbers(self) -> RowTable:
        return RowTable(join(self.uri, "numbers"))

    def reserve(self, keys: Sequence[tuple[str, Sampling]]) -> dict[tuple[str, str], int]:
        """The number of each (video id, sampling): the one it has had from its first reservation on.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        wanted = list(dict.fromkeys((video_id, str(sampling)) for video_id, sampling in keys))
        # A number that the table has lost, and no repair has brought back yet, is not given to another video.
        in_use = {*self.part_bounds().video_number.tolist(), *self._numbers_of_rows()}
        given = {}

        def plan(rows: pa.Table) -> tuple[np.ndarray, pa.Table]:
            given.clear()
            given.update(self._known_numbers(rows))
            first = max([0, *rows.column("video_number").to_pylist(), *in_use]) + 1
            new = [key for key in wanted if key not in given]
            given.update(zip(new, range(first, first + len(new))))
            added = [
                {"video_id": key[0], "model_id": self.model_id, "sampling": key[1], "video_number": given[key]}
                for key in new
            ]
            return np.ones(rows.num_rows, bool), pa.Table.from_pylist(added, NUMBERS)

        self._numbers.change(plan)
        return {key: given[key] for key in wanted}

    def numbers(self) -> dict[tuple[str, str], int]:
        """Every number that was given, by video id and sampling."""
        return self._known_numbers(self._numbers.rows())

    def restore_numbers(self) -> None:
        """Gives their numbers back to the videos that have frames or rows, where the table of numbers lost them.

        Raises:
            ArchiveError: a part is missing or damaged, or the archive cannot be written.
        """
        bounds = self.part_bounds()
        firsts = dict(zip(bounds.video_number.tolist(), bounds.path.tolist()))

        def plan(rows: pa.Table) -> tuple[np.ndarray, pa.Table]:
            known = set(rows.column("video_number").to_pylist())
            found = [part_identity(self.frames_uri, path) for number, path in firsts.items() if number not in known]
            known.update(firsts)
            found += [
                {name: getattr(row, name) for name in NUMBERS.names}
                for row in self.videos()
                if row.video_number is not None and row.video_number not in known
            ]
            return np.ones(rows.num_rows, bool), pa.Table.from_pylist(found, NUMBERS)

        self._numbers.change(plan)

    def hidden_numbers(self) -> set[int]:
        """Numbers whose frames are committed and that no row shows: not published yet, or replaced."""
        return set(self.part_bounds().video_number.tolist()) - self._numbers_of_rows()

    def _numbers_of_rows(self) -> set[int]:
        return set(self._videos.rows().column("video_number").drop_null().to_pylist())

    def _known_numbers(self, rows: pa.Table) -> dict[tuple[str, str], int]:
        columns = (rows.column(name).to_pylist() for name in NUMBERS.names)
        return {
            (video_id, sampling): number
            for video_id, model_id, sampling, number in zip(*columns, strict=True)
            if model_id == self.model_id
        }

    # Frames

    def committed(
        self, video_id: str, sampling: Sampling, segment_keys: Iterable[str], *, whole_only: bool = False
    ) -> set[str]:
        """Those of the segments whose rows are in, for good: not those that another try may make whole.

        Args:
            video_id, sampling: of the video.
            segment_keys: its segments.
            whole_only: leave out all that are not whole, not only those whose problem may pass by itself.
        Raises:
            ArchiveError: a part of the video is missing or damaged.
        """
        number = self.numbers().get((video_id, str(sampling)))
        if number is None:
            return set()
        tables.refresh(self._frames)
        bounds = self.part_bounds()
        wanted = set(segment_keys)
        places = [place for place in bounds.of(number).tolist() if bounds.segment[place] in wanted]
        problems = {bounds.segment[place]: part_problem(self.frames_uri, bounds.path[place]) for place in places}
        return {
            key for key, problem in problems.items() if problem is None or not (whole_only or problem.reason.may_pass)
        }

    def committed_frame_count(self, video_number: int) -> int:
        """Frames committed under a number, published or not."""
        bounds = self.part_bounds()
        return int(bounds.row_count[bounds.of(video_number)].sum())

    def problems(self, video_number: int) -> list[Problem]:
        """What is wrong with the committed segments of a number, as their parts say; opens each one's footer."""
        bounds = self.part_bounds()
        found = (part_problem(self.frames_uri, path) for path in bounds.path[bounds.of(video_number)])
        return [problem for problem in found if problem is not None]

    def commit_frames(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Commits the parts of a group of segments at once; says of each whether it landed.

        A segment whose rows are in already, also by a process that commits at this very moment, does not land, and
        its part is removed. So each (video, segment, model, sampling) is in at most once. Rows that are not whole
        make way, in the same commit, for whole ones or for more, and those of a problem that may pass for those of
        one that does not. A receipt without a
        part has nothing to land; one whose very part is in has landed, however often it is committed.

        Raises:
            ArchiveError: the archive cannot be written, or a part to be replaced not be read. The group is in, whole,
                or not at all, and no part is removed; committing it again tells.
        """
        landed: set[str] = set()
        for _ in tables.attempts():
            tables.refresh(self._frames)
            waiting, replaced = self._not_committed(receipts)
            if not waiting:
                break
            guards = {_segment_id(receipt.video_number, receipt.segment.key): 1 for receipt in waiting}
            for guard in guards.keys() & replaced.keys():
                guards[guard] = (self._frames.transaction_version(guard) or 0) + 1
            parts = [receipt.part for receipt in waiting]
            self._check_written(parts)
            try:
                tables.commit(self._frames, parts, list(replaced.values()), guards)
            except Conflict:
                continue
            landed = {part.path for part in parts}
            break
        landed |= set(self.part_bounds().path)  # also what was in before, or landed in a try that seemed to fail
        written = [receipt.part for receipt in receipts if receipt.part is not None]
        for part in written:
            if part.path not in landed:
                with contextlib.suppress(OSError):
                    PartWriter.discard(self.frames_uri, part)
        return [receipt.part is not None and receipt.part.path in landed for receipt in receipts]

    def _check_written(self, parts: Sequence[Part]) -> None:
        for part in parts:
            uri = join(self.frames_uri, part.path)
            if not exists(uri):
                raise ArchiveError(
                    f"{source_text(uri)}: was removed before it was committed, as by `vidx clean` beside a job that "
                    "paused; run the same command again"
                )

    def drop_parts(self, paths: Iterable[str]) -> None:
        """Takes parts out of the archive; where rows show them, `recount` then makes the rows agree.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        wanted = set(paths)
        for _ in tables.attempts():
            tables.refresh(self._frames)
            bounds = self.part_bounds()
            places = [place for place, path in enumerate(bounds.path) if path in wanted]
            if not places:
                return
            guards = [_segment_id(int(bounds.video_number[place]), bounds.segment[place]) for place in places]
            versions = {guard: (self._frames.transaction_version(guard) or 0) + 1 for guard in guards}
            removed = [(bounds.path[place], int(bounds.size_bytes[place])) for place in places]
            with contextlib.suppress(Conflict):
                tables.commit(self._frames, [], removed, versions)

    def recount(self) -> list[VideoRow]:
        """Rows that said more frames than are stored: partial or failed now, with what is left, as they are returned.

        Of one that says fewer, a job has not published the last frames yet.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        tables.refresh(self._frames)
        changed = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            columns = (table.column(name).to_pylist() for name in ("video_number", "frame_count"))
            stored = self.part_bounds().frame_counts()
            right = [not number or count <= stored[number] for number, count in zip(*columns)]
            wrong = videos.to_rows(table.filter(pa.array([not is_right for is_right in right], pa.bool_())))
            changed[:] = [self._without_damage(row) for row in wrong]
            return np.array(right, bool), videos.to_arrow(changed)

        self._videos.change(plan)
        return changed

    def _without_damage(self, row: VideoRow) -> VideoRow:
        count = self.committed_frame_count(row.video_number)
        problem = Problem(Reason.DAMAGED, f"{row.frame_count - count} of its frames were damaged and taken out")
        status = Status.PARTIAL if count else Status.FAILED
        return replace(row, status=status, problem=problem, frame_count=count, attempts=0)

    def _not_committed(self, receipts: Sequence[Receipt]) -> tuple[list[Receipt], dict[str, tuple[str, int]]]:
        """The receipts to commit, and by segment the path and size of each part that makes way for one of them."""
        bounds = self.part_bounds()
        places = {
            (number, bounds.segment[place]): place
            for number in {receipt.video_number for receipt in receipts}
            for place in bounds.of(number).tolist()
        }
        waiting, replaced, seen = [], {}, set()
        for receipt in receipts:
            key = (receipt.video_number, receipt.segment.key)
            if receipt.part is None or key in seen:
                continue
            place = places.get(key)
            if place is not None:
                path, row_count = bounds.path[place], int(bounds.row_count[place])
                if path == receipt.part.path or not self._is_better(receipt, path, row_count):
                    continue
                replaced[_segment_id(receipt.video_number, receipt.segment.key)] = (path, int(bounds.size_bytes[place]))
            seen.add(key)
            waiting.append(receipt)
        return waiting, replaced

    def _is_better(self, receipt: Receipt, path: str, row_count: int) -> bool:
        """Whether a segment's rows are to take the place of those that are in."""
        there = part_problem(self.frames_uri, path)
        if there is None:
            return False
        if receipt.problem is None or receipt.part.row_count > row_count:
            return True
        return there.reason.may_pass and not receipt.problem.reason.may_pass

    def part_bounds(self) -> PartBounds:
        """All committed parts, whether their videos are published or not."""
        version = self._frames.version()
        if self._bounds is None or self._bounds[0] != version:
            self._bounds = (version, part_bounds(self.frames_uri, tables.live_files(self._frames)))
        return self._bounds[1]

    def parts(self) -> list[LivePart]:
        """The parts of published videos."""
        bounds = self.part_bounds()
        shown = np.isin(bounds.video_number, np.fromiter(self.published(), np.int64))
        columns = (bounds.path, bounds.video_number, bounds.row_count)
        return [LivePart(*values) for values in zip(*(column[shown].tolist() for column in columns), strict=True)]

    def frames(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> list[FrameRef]:
        """Published frames, by (video_number, ticks).

        Args:
            video_numbers: one video, several, or None for all.
            start_seconds, end_seconds: half-open range of positions; a frame is in it if its span
                [time, time + duration) meets it. None: open.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        ids = self.published()
        if video_numbers is not None:
            chosen = [video_numbers] if isinstance(video_numbers, int) else list(video_numbers)
            ids = {number: ids[number] for number in chosen if number in ids}
        return find_frames(self.frames_uri, self.part_bounds(), ids, start_seconds, end_seconds, None)

    def hit_frames(self, hits: Sequence[Hit]) -> list[FrameRef]:
        """The frames that a search found, in the order of the hits."""
        return find_hits(self.frames_uri, self.part_bounds(), self.published(), hits)

    # Videos

    def publish(self, rows: Sequence[VideoRow]) -> None:
        """Makes videos and their frames visible, all at once, instead of the rows that they renew.

        videos.plan_publish says which those are.

        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        self._videos.change(lambda table: videos.plan_publish(table, rows))
        tables.refresh(self._frames)

    def published(self) -> dict[int, str]:
        """Video id by number, of every video that shows frames."""
        rows = self._videos.rows()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "video_id", "frame_count"))
        return {number: video_id for number, video_id, count in zip(*columns, strict=True) if count and number}

    def videos(self) -> list[VideoRow]:
        """All rows, by uri."""
        return sorted(videos.to_rows(self._videos.rows()), key=lambda row: row.uri)

    def videos_arrow(self) -> pa.Table:
        """All rows as stored (videos.SCHEMA)."""
        return self._videos.rows()

    def sources(self) -> dict[int, str]:
        """Where each numbered video came from, as people read it."""
        rows = self._videos.rows()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: source_text(uri) for number, uri in zip(*columns, strict=True) if number is not None}

    def uris(self, video_numbers: Iterable[int]) -> dict[int, str]:
        """The uri of each published number."""
        wanted = set(video_numbers)
        rows = self._videos.rows()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: uri for number, uri in zip(*columns, strict=True) if number in wanted}

    def row_of(self, video_id: str) -> VideoRow | None:
        """The row of a content, or None."""
        places = np.flatnonzero(pc.equal(self._videos.rows().column("video_id"), video_id).fill_null(False).to_numpy())
        return self._row_at(int(places[0])) if len(places) else None

    def _row_at(self, place: int) -> VideoRow:
        return videos.to_rows(self._videos.rows().slice(place, 1))[0]

    def find_video(self, name: str) -> VideoRow:
        """The video that a person means by a path, a URI, a file name, or the first digits (six or more) of its id.

        Raises:
            UsageError: there is none, or more than one.
        """
        rows = self._videos.rows()
        uris, ids = rows.column("uri").to_pylist(), rows.column("video_id").to_pylist()
        uri = to_uri(name)
        if uri in uris:
            return self._row_at(uris.index(uri))
        same_name = [place for place, other in enumerate(uris) if other.rsplit("/", 1)[-1] == uri.rsplit("/", 1)[-1]]
        if "/" not in name and len(same_name) == 1:
            return self._row_at(same_name[0])
        digits = name.lower()
        is_prefix = len(digits) >= MIN_ID_DIGITS and set(digits) <= set("0123456789abcdef")
        found = [place for place, video_id in enumerate(ids) if is_prefix and video_id and video_id.startswith(digits)]
        if len(found) == 1:
            return self._row_at(found[0])
        if found:
            candidates = ", ".join(sorted(f"{ids[place]} ({source_text(uris[place])})" for place in found)[:5])
            raise UsageError(f"{name}: more than one video begins so; add digits: {candidates}")
        raise UsageError(
            f"{name}: no such video in {source_text(self.uri)}; name one by its path, its URI or at least "
            f'{MIN_ID_DIGITS} digits of its id (`vidx sql "SELECT video_id, source FROM videos"` lists them)'
        )

    # Counts

    def frame_count(self) -> int:
        """Published frames."""
        return sum(self._videos.rows().column("frame_count").to_pylist())

    def status(self) -> ArchiveStatus:
        """Counts, from the videos table alone."""
        rows = self._videos.rows()
        states = rows.column("status").to_pylist()
        return ArchiveStatus(
            videos_indexed=states.count(Status.INDEXED),
            videos_partial=states.count(Status.PARTIAL),
            videos_failed=states.count(Status.FAILED),
            frames=self.frame_count(),
            model_ids=tuple(sorted(set(rows.column("model_id").to_pylist()))) or (self.model_id,),
            size_bytes=tree_size(self.uri),
            version=self.version,
            format_version=self.settings.format_version,
        )


def _segment_id(video_number: int, segment_key: str) -> str:
    """The guard of a segment: a number stands for (video, model, sampling)."""
    return f"segment:{video_number}:{segment_key}"


def _optional(field: pa.Field) -> pa.Field:
    """As the table declares it: a part may lack the columns that its settings do not keep."""
    return field.with_nullable(True) if field.name in ("search_key", "patches") else field
