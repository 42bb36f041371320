"""The archive: what is committed, and the commits that change it.

    archive.json    format version, model; written last, so that a folder with it is a whole archive
    frames/         Delta table of parts (storage/parts/layout.py), one row per frame
    videos/         Delta table, one row per video; its rows make frames visible
    numbers/        Delta table: the number of each (video, model, sampling), given once
    index/          search keys (storage/vectors/vector_index.py); may be deleted at any time

Frames are committed first, then the videos row that shows them: frames of a number that no row names are not there
for any reader. A long video's row comes with its first segments and says `indexing`; then each further segment is there
from its own commit on, until the row that ends the video takes the first one's place.

`deltalake` does not survive a fork: processes that use an archive must be spawned.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.archive import delta as tables
from storage.archive import videos
from storage.archive.claims import claimed_numbers
from storage.archive.delta import RowTable
from storage.archive.frame_table import FrameTable
from storage.archive.frames import LivePart, PartBounds, Rows, find_frames, find_hits, find_rows, refs_of_part
from storage.archive.settings import (
    FORMAT_VERSION,
    TABLES,
    Settings,
    archive_uri,
    is_archive,
    read_settings,
    refuse_foreign_folder,
    write_settings,
)
from storage.archive.video_numbers import NUMBERS, NumberTable
from storage.errors import UsageError
from storage.files import (
    join,
    make_folder,
    remove,
    source_text,
    to_uri,
    tree_size,
    uri_spelling,
    write_bytes,
    writing,
)
from storage.parts.layout import COLUMNS
from storage.parts.read import part_identity
from storage.records import (
    FrameRef,
    Hit,
    Part,
    Problem,
    Reason,
    Receipt,
    Sampling,
    Status,
    VideoRow,
    lies_within,
)

MIN_ID_DIGITS = 6


@dataclass(frozen=True)
class ArchiveStatus:
    """Counts of published videos and frames, and what the archive occupies.

    Of videos in progress a job has committed frames, and not all; `frames` has those of them that can be searched.
    videos_unconfined counts those that were decoded by a process that was not kept from what sandbox_missing names.
    """

    videos_indexed: int
    videos_partial: int
    videos_failed: int
    videos_deleted: int
    frames: int
    model_ids: tuple[str, ...]
    size_bytes: int
    version: int
    format_version: int
    videos_in_progress: int
    frames_in_progress: int
    frames_in_progress_shown: int
    videos_unconfined: int
    sandbox_missing: tuple[str, ...]


def archive_exists(uri: str) -> bool:
    """Whether there is a whole archive at a path or URI.

    Raises:
        UsageError: no archive can be there.
    """
    return is_archive(archive_uri(uri))


def create_archive(uri: str, *, model_id: str, model_name: str, model_tower: str = "") -> "Archive":
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
            write_settings(uri, Settings(FORMAT_VERSION, model_id, model_name, model_tower))
    archive = open_archive(uri, write=True)
    if archive.model_id != model_id and archive.is_empty:  # left by a job that could not load its model
        write_settings(uri, Settings(FORMAT_VERSION, model_id, model_name, model_tower))
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
        model_id, model_name, model_tower: of the one model whose frames it holds, as in its settings.
        settings: what archive.json says.
    """

    def __init__(self, uri: str, settings: Settings):
        self.uri = uri
        self.settings = settings
        self.model_id = settings.model_id
        self.model_name = settings.model_name
        self.model_tower = settings.model_tower
        self.frames_uri = join(uri, "frames")
        self.index_uri = join(uri, "index")
        # Before the frames, so that all that they show is there.
        self._videos = RowTable(join(uri, "videos"), videos.SCHEMA, videos.check)
        self._videos.rows()
        self._frames = FrameTable(self.frames_uri)
        self._published: tuple[int, dict[int, str]] | None = None
        self._grown: tuple[tuple[int, int], pa.Table] | None = None

    def __repr__(self) -> str:
        return f"Archive({self.uri!r}, version={self.version})"

    @property
    def is_empty(self) -> bool:
        """Whether no job has committed anything, or reserved a number for what it will commit."""
        tables_empty = self._videos.rows().num_rows == 0 and not self._numbers.all_given()
        return tables_empty and len(self.part_bounds()) == 0

    @property
    def version(self) -> int:
        """The version of the videos table, which counts publications."""
        return self._videos.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._videos.refresh()
        self._frames.refresh()

    @property
    def model_text(self) -> str:
        """How its model is named."""
        return self.model_name + (f" with --tower {self.model_tower}" if self.model_tower else "")

    def check_model(self, model_id: str, model_name: str) -> None:
        """Refuses rows of another model.

        Raises:
            UsageError: the archive is of another one, and not empty.
        """
        if self.model_id != model_id and not self.is_empty:
            raise UsageError(
                f"{source_text(self.uri)}: this archive is of the model {self.model_text} ({self.model_id[:12]}), not "
                f"of {model_name} ({model_id[:12]}); name that model or choose another --archive"
            )

    # Numbers

    @cached_property
    def _numbers(self) -> NumberTable:
        return NumberTable(join(self.uri, "numbers"), self.model_id)

    def reserve(self, keys: Sequence[tuple[str, Sampling]]) -> dict[tuple[str, str], int]:
        """The number of each (video id, sampling): the one it has had from its first reservation on.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        # A number that the table has lost, and no repair has brought back yet, is not given to another video.
        in_use = {*self.part_bounds().video_number.tolist(), *self._numbers_of_rows()}
        return self._numbers.reserve([(video_id, str(sampling)) for video_id, sampling in keys], in_use)

    def numbers(self) -> dict[tuple[str, str], int]:
        """Every number that was given, by video id and sampling."""
        return self._numbers.known()

    def restore_numbers(self) -> None:
        """Gives their numbers back to the videos that have frames or rows, where the table of numbers lost them.

        Raises:
            ArchiveError: a part is missing or damaged, or the archive cannot be written.
        """
        bounds, known = self.part_bounds(), self._numbers.all_given()
        firsts = dict(zip(bounds.video_number.tolist(), bounds.path.tolist()))
        has_number = {None, *known, *firsts}
        found = [part_identity(self.frames_uri, path) for number, path in firsts.items() if number not in known]
        found += [
            {name: getattr(row, name) for name in NUMBERS.names}
            for row in self.videos()
            if row.video_number not in has_number
        ]
        self._numbers.restore(found)

    def begun(self) -> dict[int, int]:
        """Frames by number, of videos that a job has begun and not finished, where no row shows them yet.

        Their claims tell them from those that were replaced. What was deleted is not among them.
        """
        hidden = self.hidden_numbers() & claimed_numbers(self.uri)
        counts = self.part_bounds().frame_counts()
        return {number: counts[number] for number in hidden - (self.deleted_numbers() if hidden else set())}

    def hidden_numbers(self) -> set[int]:
        """Numbers whose frames are committed and that no row shows: not published yet, or replaced."""
        return set(self.part_bounds().video_number.tolist()) - self._numbers_of_rows()

    def _numbers_of_rows(self) -> set[int]:
        return set(self._videos.rows().column("video_number").drop_null().to_pylist())

    # Frames

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
            for key, problem in self._frames.problems(video_number).items()
            if problem is None or problem.reason.is_note or not (whole_only or problem.reason.may_pass)
        ]
        return _pieces(segment_keys, for_good)

    def holds(self, video_number: int, segment_keys: Collection[str]) -> bool:
        """Whether segments of a number are committed, whole or not."""
        bounds = self.part_bounds()
        there = bounds.segment[bounds.of(video_number)].tolist()
        return len(_pieces(segment_keys, there)) == len(segment_keys)

    def committed_frame_count(self, video_number: int, segment_keys: Iterable[str] | None = None) -> int:
        """Frames committed under a number, published or not; segment_keys: in these segments alone."""
        bounds = self.part_bounds()
        places = bounds.of(video_number)
        if segment_keys is not None:
            keys = set(segment_keys)
            held = (key in keys or any(lies_within(other, key) for other in keys) for key in bounds.segment[places])
            places = places[np.fromiter(held, bool, len(places))]
        return int(bounds.row_count[places].sum())

    def problems(self, video_number: int) -> list[Problem]:
        """What the parts of a number's committed segments say of them; opens each one's footer."""
        return [problem for problem in self._frames.problems(video_number).values() if problem is not None]

    def commit_frames(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Commits the parts of a group of segments, each segment at most once; says of each whether it landed.

        FrameTable.commit says more.
        """
        return self._frames.commit(receipts)

    def drop_parts(self, paths: Iterable[str]) -> None:
        """Takes parts out of the archive; where rows show them, `recount` then makes the rows agree.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        self._frames.drop(paths)

    def join_parts(self, joined: Sequence[tuple[Part, Sequence[str]]]) -> list[bool]:
        """Puts written parts in the place of those whose rows they hold; FrameTable.join says more."""
        return self._frames.join(joined)

    def recount(self) -> list[VideoRow]:
        """Rows that said more frames than are stored: partial or failed now, with what is left, as they are returned.

        Of one that says fewer, a job has not published the last frames yet.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        changed: list[VideoRow] = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            self._frames.refresh()  # after the rows: what they show was in before they came
            columns = (table.column(name).to_pylist() for name in ("video_number", "frame_count"))
            stored = self.part_bounds().frame_counts()
            right = [not number or count <= stored[number] for number, count in zip(*columns)]
            wrong = videos.to_rows(table.filter(pa.array([not is_right for is_right in right], pa.bool_())))
            changed[:] = [self._without_damage(row) for row in wrong]
            return np.array(right, bool), videos.to_arrow(changed)

        self._videos.change(plan)
        return changed

    def _without_damage(self, row: VideoRow) -> VideoRow:
        count = self.committed_frame_count(row.known_number)
        problem = Problem(Reason.DAMAGED, f"{row.frame_count - count} of its frames were damaged and taken out")
        status = Status.PARTIAL if count else Status.FAILED
        return replace(row, status=status, problem=problem, frame_count=count, attempts=0)

    def part_bounds(self) -> PartBounds:
        """All committed parts, whether their videos are published or not."""
        return self._frames.bounds()

    def parts(self) -> list[LivePart]:
        """The parts of published videos."""
        bounds = self.part_bounds()
        shown = np.isin(bounds.video_number, np.fromiter(self.published(), np.int64))
        columns = (bounds.path, bounds.video_number, bounds.row_count)
        return [*map(LivePart._make, zip(*(column[shown].tolist() for column in columns), strict=True))]

    def frames(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> list[FrameRef]:
        """Published frames, by (video_number, ticks).

        Args:
            video_numbers: one video, several, or None for all.
            start_seconds, end_seconds: half-open range of positions; a frame is in it if its span
                [time, time + duration) meets it. None: open.
            frame_indexes: only these ranks, ascending; None: all.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        ids = self._published_among(video_numbers)
        return find_frames(self.frames_uri, self.part_bounds(), ids, start_seconds, end_seconds, frame_indexes)

    def rows(
        self,
        video_numbers: int | Iterable[int] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        frame_indexes: np.ndarray | None = None,
    ) -> Rows:
        """Where the same frames lie; as `frames` otherwise."""
        ids, bounds = self._published_among(video_numbers), self.part_bounds()
        found = find_rows(self.frames_uri, bounds, ids, start_seconds, end_seconds, frame_indexes)
        return {bounds.path[place]: rows for place, rows in found}

    def refs_of(self, rows: Rows) -> Iterator[list[FrameRef]]:
        """The frames of rows of published parts, part after part, by video and time.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        bounds, ids = self.part_bounds(), self.published()
        for place in np.lexsort((bounds.first_seconds, bounds.video_number)).tolist():
            if bounds.path[place] in rows:
                yield refs_of_part(self.frames_uri, bounds, place, ids, rows[bounds.path[place]])

    def _published_among(self, video_numbers: int | Iterable[int] | None) -> dict[int, str]:
        ids = self.published()
        if video_numbers is None:
            return ids
        chosen = [video_numbers] if isinstance(video_numbers, int) else list(video_numbers)
        return {number: ids[number] for number in chosen if number in ids}

    def frame_at(self, video_number: int, seconds: float) -> FrameRef | None:
        """The frame that is shown at a position; None where no published frame is.

        Raises:
            ArchiveError: a part is missing or damaged.
        """
        return next(reversed(self.frames(video_number, seconds, seconds + 1e-6)), None)

    def hit_frames(self, hits: Sequence[Hit]) -> list[FrameRef]:
        """The frames that a search found, in the order of the hits."""
        return find_hits(self.frames_uri, self.part_bounds(), self.published(), hits)

    # Videos

    def publish(self, rows: Sequence[VideoRow], restored: Collection[str] = ()) -> set[str]:
        """Makes videos and their frames visible, all at once, instead of the rows that they renew.

        videos.plan_publish says which those are. Deleted content stays deleted, but for the ids that are restored.

        Returns:
            The ids of the videos whose rows are in now.
        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        added: set[str] = set()

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            keep, new = videos.plan_publish(table, rows, restored)
            added.clear()
            added.update(new.column("video_id").drop_null().to_pylist())
            return keep, new

        self._videos.change(plan)
        self._frames.refresh()
        return added

    def renew(self, rows: Sequence[VideoRow]) -> None:
        """Publishes rows whose place, times or tags have changed, of those that nobody has indexed again meanwhile.

        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        self._videos.change(lambda table: videos.plan_publish(table, videos.of_same_frames(table, rows)))

    def delete(self, rows: Sequence[VideoRow]) -> list[VideoRow]:
        """Takes videos out of every answer at once; `clean` removes their frames. Returns the rows that went.

        Raises:
            ArchiveError: the archive cannot be written; nothing is deleted.
        """
        ids = {row.video_id for row in rows if row.video_id is not None}
        unread = {row.uri for row in rows if row.video_id is None}
        gone: list[VideoRow] = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            columns = (table.column(name).to_pylist() for name in ("video_id", "uri", "status"))
            found = [
                status != Status.DELETED and (uri in unread if id_ is None else id_ in ids)
                for id_, uri, status in zip(*columns, strict=True)
            ]
            shown = videos.with_stored_frames(table.filter(pa.array(found, pa.bool_())), self.part_bounds())
            gone[:] = videos.to_rows(shown)
            return videos.plan_delete(table, np.array(found, bool))

        self._videos.change(plan)
        return sorted(gone, key=lambda row: row.uri)

    def published(self) -> dict[int, str]:
        """Video id by number, of every video that shows frames."""
        version = self._videos.version
        if self._published is None or self._published[0] != version:
            rows = self._videos.rows()
            columns = (rows.column(name).to_pylist() for name in ("video_number", "video_id", "frame_count"))
            shown = {number: video_id for number, video_id, count in zip(*columns, strict=True) if count and number}
            self._published = (version, shown)
        return self._published[1]

    def _rows(self) -> pa.Table:
        """All rows; those of videos that are being indexed with the frames that they show by now."""
        versions = self._videos.version, self._frames.version
        if self._grown is None or self._grown[0] != versions:
            self._grown = versions, videos.with_stored_frames(self._videos.rows(), self.part_bounds())
        return self._grown[1]

    def unfinished_videos(self) -> list[VideoRow]:
        """Rows of videos that can be searched in part: a job is at the rest, or was interrupted."""
        rows = self._rows()
        growing = rows.filter(pc.equal(rows.column("status"), str(Status.INDEXING)))
        return sorted(videos.to_rows(growing), key=lambda row: row.uri)

    def videos(self) -> list[VideoRow]:
        """All rows, by uri, those of deleted videos too."""
        return sorted(videos.to_rows(self._rows()), key=lambda row: row.uri)

    def videos_arrow(self) -> pa.Table:
        """All rows as stored (videos.SCHEMA)."""
        return self._rows()

    def sources(self) -> dict[int, str]:
        """Where each numbered video came from, as people read it."""
        rows = self._rows()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: source_text(uri) for number, uri in zip(*columns, strict=True) if number is not None}

    def uris(self, video_numbers: Iterable[int]) -> dict[int, str]:
        """The uri of each published number."""
        wanted = set(video_numbers)
        rows = self._rows()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: uri for number, uri in zip(*columns, strict=True) if number in wanted}

    def row_of(self, video_id: str) -> VideoRow | None:
        """The row of a content, or None."""
        places = np.flatnonzero(pc.equal(self._rows().column("video_id"), video_id).fill_null(False).to_numpy())
        return _row_at(self._rows(), int(places[0])) if len(places) else None

    def deleted_numbers(self) -> set[int]:
        """Numbers of deleted content whose frames may still be there."""
        ids = {row.video_id for row in self.videos() if row.status is Status.DELETED}
        return {number for (video_id, _), number in self._numbers.known().items() if video_id in ids}

    def find_video(self, name: str) -> VideoRow:
        """The video that a person means by a path, a URI, a file name, or the first digits (six or more) of its id.

        A name that no video has in these very bytes means the one whose name looks the same (NFC and NFD of Unicode).

        Raises:
            UsageError: there is none, or more than one.
        """
        rows = self._rows()
        rows = rows.filter(pc.not_equal(rows.column("status"), str(Status.DELETED)))
        uris, ids = rows.column("uri").to_pylist(), rows.column("video_id").to_pylist()
        uri = to_uri(name)
        if uri in uris:
            return _row_at(rows, uris.index(uri))
        for spelled in (str, uri_spelling):
            place = spelled(uri)
            same_place = [at for at, other in enumerate(map(spelled, uris)) if other == place]
            file = place.rsplit("/", 1)[-1]
            same_name = [at for at, other in enumerate(map(spelled, uris)) if other.rsplit("/", 1)[-1] == file]
            for same in (same_place, [] if "/" in name else same_name):
                if len(same) == 1:
                    return _row_at(rows, same[0])
        digits = name.lower()
        is_prefix = len(digits) >= MIN_ID_DIGITS and set(digits) <= set("0123456789abcdef")
        found = [place for place, video_id in enumerate(ids) if is_prefix and video_id and video_id.startswith(digits)]
        if len(found) == 1:
            return _row_at(rows, found[0])
        alike = found or same_place or ([] if "/" in name else same_name)
        if alike:
            candidates = ", ".join(sorted(f"{ids[place]} ({source_text(uris[place])})" for place in alike)[:5])
            raise UsageError(f"{name}: more than one video is called so; name one by its path or id: {candidates}")
        raise UsageError(
            f"{name}: no such video in {source_text(self.uri)}; name one by its path, its URI or at least "
            f"{MIN_ID_DIGITS} digits of its id (`vidx list` shows them)"
        )

    # Counts

    def frame_count(self) -> int:
        """Published frames."""
        return sum(self._rows().column("frame_count").to_pylist())

    def status(self) -> ArchiveStatus:
        """Counts, from the rows of videos and the log of the frames."""
        rows, begun = self._rows(), self.begun()
        counts = rows.filter(pc.equal(rows.column("status"), str(Status.INDEXING))).column("frame_count").to_pylist()
        states = rows.column("status").to_pylist()
        missing = [
            steps.split(",")
            for steps, state in zip(rows.column("sandbox_missing").to_pylist(), states, strict=True)
            if steps and state != Status.DELETED
        ]
        return ArchiveStatus(
            videos_indexed=states.count(Status.INDEXED),
            videos_partial=states.count(Status.PARTIAL),
            videos_failed=states.count(Status.FAILED),
            videos_deleted=states.count(Status.DELETED),
            frames=self.frame_count(),
            model_ids=tuple(sorted(set(rows.column("model_id").to_pylist()))) or (self.model_id,),
            size_bytes=tree_size(self.uri),
            version=self.version,
            format_version=self.settings.format_version,
            videos_in_progress=len(counts) + len(begun),
            frames_in_progress=sum(counts) + sum(begun.values()),
            frames_in_progress_shown=sum(counts),
            videos_unconfined=len(missing),
            sandbox_missing=tuple(sorted({step for steps in missing for step in steps})),
        )


def _pieces(keys: Iterable[str], of: Collection[str]) -> set[str]:
    """Those of the segments that are, or lie within, one of the others."""
    known = set(of)
    return {key for key in keys if key in known or any(lies_within(key, other) for other in of)}


def _row_at(rows: pa.Table, place: int) -> VideoRow:
    return videos.to_rows(rows.slice(place, 1))[0]


def _optional(field: pa.Field) -> pa.Field:
    """As the table declares it: a part may lack the columns that its settings do not keep."""
    return field.with_nullable(True) if field.name in ("search_key", "patches") else field
