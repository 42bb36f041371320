"""The table of videos: one row per video; publishing it makes the video's frames visible.

A row of status `indexing` is written once, when the first frames of a long video are shown. When the row is read, the
number of frames committed since then is added from the log of the frames.
"""

from collections.abc import Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.archive import video_rows
from storage.archive.part_table import PartTable
from storage.archive.row_table import NONE, Rows, RowTable
from storage.archive.video_rows import to_arrow, to_rows
from storage.errors import UsageError
from storage.files import join, normalize_uri, source_text, to_uri
from storage.records import Problem, Reason, Status, VideoRow

MIN_ID_DIGITS = 6
_PUBLISHED = ("video_number", "video_id", "frame_count")
_CHANGING = ("uri", "mtime_ns", "is_settled", "captured_at", "captured_from", "tags")  # without indexing again


class PublishedVideos(Mapping[int, str]):
    """The ids of all videos that have visible frames, by number, looked up when they are asked for."""

    def __init__(self, rows: Rows):
        self._rows = rows

    @cached_property
    def numbers(self) -> np.ndarray:
        """(n,) int64: their numbers, ascending."""
        rows = self._rows.table(("video_number", "frame_count"))
        has_frames = pc.and_(pc.greater(rows.column("frame_count"), 0), pc.is_valid(rows.column("video_number")))
        return np.sort(rows.column("video_number").filter(has_frames).to_numpy().astype(np.int64))

    def ids_of(self, numbers: Iterable[int]) -> dict[int, str]:
        """The ids of those of these videos that have visible frames."""
        rows = self._rows.take(self._rows.find("video_number", numbers), _PUBLISHED)
        columns = (rows.column(name).to_pylist() for name in _PUBLISHED)
        return {number: video_id for number, video_id, count in zip(*columns, strict=True) if count}

    def __getitem__(self, number: int) -> str:
        return self.ids_of([number])[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers.tolist())

    def __len__(self) -> int:
        return len(self.numbers)

    def items(self) -> ItemsView[int, str]:
        """All of them, read at once."""
        columns = (self._rows.column(name).to_pylist() for name in _PUBLISHED)
        ids = {number: video_id for number, video_id, count in zip(*columns, strict=True) if count and number}
        return ids.items()


class VideoTable:
    """One row per video, at one version."""

    def __init__(self, archive_uri: str, parts: PartTable):
        """The table of an archive; `open` opens it.

        Args:
            archive_uri: the archive's folder.
            parts: the archive's parts; they tell how many frames of an unfinished video are committed.
        """
        self._archive_uri = archive_uri
        self._table = RowTable(join(archive_uri, "videos"), video_rows.SCHEMA, video_rows.CHECKS)
        self._parts = parts
        self._published: tuple[Rows, PublishedVideos] | None = None

    def open(self) -> None:
        """Opens the files of the newest version, unless a version is open already."""
        self._table.rows()

    def __len__(self) -> int:
        return len(self._table.rows())

    @property
    def version(self) -> int:
        """The table's version; each publication increases it."""
        return self._table.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._table.refresh()

    def stored(self) -> Rows:
        """The rows of this version as they are stored; those of unfinished videos do not count new frames."""
        return self._table.rows()

    def arrow(self, names: Sequence[str] | None = None) -> pa.Table:
        """All rows (video_rows.SCHEMA); those of unfinished videos count the frames committed so far.

        Args:
            names: the columns; None for all.
        """
        rows = self._table.rows()
        table = rows.table(names)
        growing = _places(pc.equal(rows.column("status"), str(Status.INDEXING)))
        if not len(growing):
            return table
        is_settled = np.ones(len(rows), bool)
        is_settled[growing] = False
        counted = _with_stored_frames(rows.take(growing), self._parts)
        return pa.concat_tables([table.filter(pa.array(is_settled)), counted.select(table.column_names)])

    def all(self) -> list[VideoRow]:
        """All rows, by uri, including those of deleted videos; an archive may have a million of them."""
        return sorted(to_rows(self.arrow()), key=lambda row: row.uri)

    def read(self, stored: pa.Table) -> list[VideoRow]:
        """The rows of a table from `stored`, in its order; those of unfinished videos count new frames too."""
        return to_rows(_with_stored_frames(stored, self._parts))

    def at(self, places: np.ndarray) -> list[VideoRow]:
        """The rows at these places in `stored`, by uri; those of unfinished videos count new frames too."""
        return sorted(self.read(self._table.rows().take(places)), key=lambda row: row.uri)

    def having(self, column: str, *values: str) -> list[VideoRow]:
        """The rows with one of these values in a column of texts, by uri."""
        wanted = pa.array([str(value) for value in values], pa.string())
        return self.at(_places(pc.is_in(self._table.rows().column(column), wanted)))

    def unfinished(self) -> list[VideoRow]:
        """The rows of videos that can be searched in part: a job is indexing the rest, or was interrupted."""
        return self.having("status", Status.INDEXING)

    def row_of(self, video_id: str) -> VideoRow | None:
        """The row of the video with this id, or None."""
        rows = self.at(self._table.rows().find("video_id", [video_id]))
        return rows[0] if rows else None

    def of_ids(self, video_ids: Iterable[str]) -> list[VideoRow]:
        """The rows of the videos with these ids, by uri."""
        return self.at(self._table.rows().find("video_id", video_ids))

    def of_numbers(self, video_numbers: Iterable[int]) -> dict[int, VideoRow]:
        """The rows of the videos with these numbers that have one, by number, ordered by uri."""
        return {row.known_number: row for row in self.at(self._table.rows().find("video_number", video_numbers))}

    def ids_of(self, status: Status) -> list[str]:
        """The ids of the videos with this status whose file could be read."""
        rows = self._table.rows().table(("status", "video_id"))
        return rows.filter(pc.equal(rows.column("status"), str(status))).column("video_id").drop_null().to_pylist()

    def find(self, name: str) -> VideoRow:
        """The video that a person means by a path, a URI, a file name, or the first digits (six or more) of its id.

        If no video has exactly this name, a name that looks the same is taken (NFC and NFD of Unicode).

        Raises:
            UsageError: there is no such video, or more than one, or it was deleted.
        """
        rows = self._table.rows()
        is_deleted = pc.equal(rows.column("status"), str(Status.DELETED)).to_numpy()
        places = _places_of(rows, name, ~is_deleted)
        if len(places) == 1:
            return self.at(places)[0]
        if len(places):
            found = rows.take(places, ("uri", "video_id")).to_pylist()
            candidates = ", ".join(sorted(f"{row['video_id']} ({source_text(row['uri'])})" for row in found)[:5])
            raise UsageError(f"{name}: matches more than one video; name one by its path or id: {candidates}")
        archive = source_text(self._archive_uri)
        if is_deleted.any() and len(_places_of(rows, name, is_deleted)):
            raise UsageError(
                f"{name}: this video was deleted from {archive}; `vidx index` with --restore-deleted restores it"
            )
        raise UsageError(
            f"{name}: no such video in {archive}; name one by its path, its URI or at least {MIN_ID_DIGITS} digits of "
            "its id (`vidx list` shows them)"
        )

    def published(self) -> PublishedVideos:
        """The ids of all videos that have visible frames, by number."""
        rows = self._table.rows()
        if self._published is None or self._published[0] is not rows:
            self._published = (rows, PublishedVideos(rows))
        return self._published[1]

    def numbers(self) -> np.ndarray:
        """(n,) int32: the numbers of all rows that have one."""
        return self._table.rows().column("video_number").drop_null().to_numpy()

    def uris(self, video_numbers: Iterable[int] | None = None) -> dict[int, str]:
        """The uri of each of these numbers that a row has; None: of each number."""
        rows, names = self._table.rows(), ("video_number", "uri")
        if video_numbers is None:
            table = rows.table(names)
            table = table.filter(pc.is_valid(table.column("video_number")))
        else:
            table = rows.take(rows.find("video_number", video_numbers), names)
        return dict(zip(*(table.column(name).to_pylist() for name in names), strict=True))

    def frame_count(self) -> int:
        """The number of published frames."""
        return pc.sum(self.arrow(("frame_count",)).column(0)).as_py() or 0

    def publish(self, rows: Sequence[VideoRow], restored: Collection[str] = ()) -> set[str]:
        """Makes videos and their frames visible, all in one commit; each row replaces older ones (see _plan_publish).

        Returns:
            The ids of the videos whose rows are published.
        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        added: set[str] = set()

        def plan(known: Rows) -> tuple[np.ndarray, pa.Table]:
            dropped, new = _plan_publish(known, rows, restored)
            added.clear()
            added.update(new.column("video_id").drop_null().to_pylist())
            return dropped, new

        self._table.change(plan)
        self._parts.refresh()
        return added

    def update(self, changes: Sequence[tuple[VideoRow, VideoRow]]) -> None:
        """Publishes changes of places, times or tags, unless another job has indexed the video again.

        Args:
            changes: each row before and after; what does not differ is left as it is now.
        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        self._table.change(lambda known: _plan_publish(known, _changed_now(known, changes)))

    def delete(self, rows: Sequence[VideoRow]) -> list[VideoRow]:
        """Hides videos from every answer at once; `clean` removes their frames later. Returns the deleted rows.

        Raises:
            ArchiveError: the archive cannot be written; nothing is deleted.
        """
        ids = {row.video_id for row in rows if row.video_id is not None}
        unread = {row.uri for row in rows if row.video_id is None}
        deleted: list[VideoRow] = []

        def plan(known: Rows) -> tuple[np.ndarray, pa.Table]:
            places = np.union1d(known.find("video_id", ids), known.find("uri", unread))
            table = known.take(places)
            columns = (table.column(name).to_pylist() for name in ("video_id", "uri", "status"))
            is_wanted = [
                status != Status.DELETED and (uri in unread if id_ is None else id_ in ids)
                for id_, uri, status in zip(*columns, strict=True)
            ]
            found = table.filter(pa.array(is_wanted, pa.bool_()))
            deleted[:] = to_rows(_with_stored_frames(found, self._parts))
            # A row of known content leaves one that says that it was deleted; of an unreadable file nothing is left.
            nothing: dict[str, Any] = {"video_number": None, "problem": None, "frame_count": 0, "attempts": 0}
            left = [replace(row, status=Status.DELETED, **nothing) for row in to_rows(found) if row.video_id]
            return places[np.array(is_wanted, bool)], to_arrow(left)

        self._table.change(plan)
        return sorted(deleted, key=lambda row: row.uri)

    def recount(self) -> list[VideoRow]:
        """Corrects rows that say more frames than are stored, and returns them; they are partial or failed now.

        A row that says fewer frames is left alone: its job has not published the last frames yet.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        changed: list[VideoRow] = []

        def plan(known: Rows) -> tuple[np.ndarray, pa.Table]:
            self._parts.refresh()  # after the rows: the frames that they show were committed before them
            bounds, table = self._parts.bounds(), known.table(("video_number", "frame_count"))
            numbers, places = np.unique(bounds.video_number, return_inverse=True)
            stored = np.bincount(places, bounds.row_count, len(numbers)).astype(np.int64)
            wanted = table.column("video_number").fill_null(0).to_numpy()
            at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
            found = np.where(numbers[at] == wanted, stored[at], 0) if len(numbers) else np.zeros(len(wanted), np.int64)
            wrong = np.flatnonzero((wanted > 0) & (table.column("frame_count").to_numpy() > found))
            changed[:] = [self._without_damage(row) for row in to_rows(known.take(wrong))]
            return wrong, to_arrow(changed)

        self._table.change(plan)
        return changed

    def _without_damage(self, row: VideoRow) -> VideoRow:
        count = self._parts.frame_count(row.known_number)
        lost_count = row.frame_count - count
        was = "was" if lost_count == 1 else "were"
        problem = Problem(Reason.DAMAGED, f"{lost_count} of its frames {was} damaged and removed")
        status = Status.PARTIAL if count else Status.FAILED
        return replace(row, status=status, problem=problem, frame_count=count, attempts=0)


def _places(is_chosen: pa.ChunkedArray) -> np.ndarray:
    """The places of the rows for which this is true, ascending."""
    return np.flatnonzero(is_chosen.fill_null(False).to_numpy())


def _places_of(rows: Rows, name: str, is_present: np.ndarray) -> np.ndarray:
    """The places of the rows, among those present, that a name may mean; one if it is clear, see VideoTable.find."""

    def present(places: np.ndarray) -> np.ndarray:
        return places[is_present[places]]

    uri = to_uri(name)
    same_place = present(rows.find("uri", [uri]))
    if len(same_place):
        return same_place[:1]
    file = uri.rsplit("/", 1)[-1]
    same_name = NONE if "/" in name else present(_places(pc.ends_with(rows.column("uri"), f"/{file}")))
    if len(same_name) == 1:
        return same_name
    same_place, same_name = map(present, _places_spelled_like(rows, normalize_uri(uri)))
    for same in (same_place, NONE if "/" in name else same_name):
        if len(same) == 1:
            return same
    digits, found = name.lower(), NONE
    if len(digits) >= MIN_ID_DIGITS and set(digits) <= set("0123456789abcdef"):
        found = present(_places(pc.starts_with(rows.column("video_id"), digits)))
    for each in (found, same_place):
        if len(each):
            return each
    return NONE if "/" in name else same_name


def _places_spelled_like(rows: Rows, wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """The places of the rows with this uri, and of those with its file name, each spelled as normalize_uri does."""
    uris, file = rows.column("uri"), wanted.rsplit("/", 1)[-1]
    has_escapes = pc.match_substring(uris, "%")  # the others are spelled so already
    escaped = _places(has_escapes)
    spelled = [normalize_uri(other) for other in uris.filter(has_escapes).to_pylist()]
    same_place = [place for place, other in zip(escaped.tolist(), spelled, strict=True) if other == wanted]
    same_name = [place for place, other in zip(escaped.tolist(), spelled, strict=True) if other.rsplit("/")[-1] == file]
    plain = pc.invert(has_escapes)
    return (
        np.union1d(same_place, _places(pc.and_(plain, pc.equal(uris, wanted)))).astype(np.int64),
        np.union1d(same_name, _places(pc.and_(plain, pc.ends_with(uris, f"/{file}")))).astype(np.int64),
    )


def _plan_publish(known: Rows, rows: Sequence[VideoRow], restored: Collection[str] = ()) -> tuple[np.ndarray, pa.Table]:
    """The places of the known rows to drop, and the rows to add.

    A new row replaces, within the rows of its model, the row with the same content (whatever its sampling or uri) and
    the row with the same uri (whatever its content). In these cases the old row stays and the new one is not added:

    - The new row is of a file that could not be read, and the row of the same uri has known content.
    - The new row has no frames, and the row of the same content has some.
    - The row of the same content is deleted, and its id is not among the restored ones. A deleted row does not keep its
      uri from other content.
    - The new row is of status `indexing`, and the old row has frames, unless it is the same video's row of status
      `indexing`.
    """
    names = ("model_id", "video_id", "uri", "frame_count", "status", "video_number")
    places = np.union1d(
        known.find("video_id", [row.video_id for row in rows]), known.find("uri", [row.uri for row in rows])
    )
    table = known.take(places, names)
    both = list(zip(*(table.column(name).to_pylist() for name in names)))
    old_count = len(both)
    both += [tuple(getattr(row, name) for name in names) for row in rows]
    alive = np.arange(len(both)) < old_count
    by_content: dict[tuple, int] = {}
    by_uri: dict[tuple, int] = {}
    for place, (model_id, video_id, uri, _, status, _) in enumerate(both):
        same_content = None if video_id is None else by_content.get((model_id, video_id))
        same_uri = by_uri.get((model_id, uri))
        if place >= old_count:
            rivals = [rival for rival in (same_content, same_uri) if rival is not None and alive[rival]]
            if any(_stays(both[rival], both[place], restored) for rival in rivals):
                continue
            alive[rivals] = False
            alive[place] = True
        if status != Status.DELETED:
            by_uri[model_id, uri] = place
        if video_id is not None:
            by_content[model_id, video_id] = place
    added = [row for row, is_alive in zip(rows, alive[old_count:], strict=True) if is_alive]
    return places[~alive[:old_count]], to_arrow(added)


def _stays(old: tuple, new: tuple, restored: Collection[str]) -> bool:
    """Whether an old row stays, though a new row has the same content or uri."""
    _, old_id, _, old_frames, old_status, old_number = old
    _, video_id, _, frame_count, status, number = new
    if video_id is None:
        return old_id is not None
    if old_status == Status.DELETED:
        return old_id == video_id and video_id not in restored
    if status == Status.INDEXING and old_frames > 0:
        return (old_status, old_number) != (Status.INDEXING, number)
    return old_id == video_id and frame_count == 0 and old_frames > 0


def _changed_now(known: Rows, changes: Sequence[tuple[VideoRow, VideoRow]]) -> list[VideoRow]:
    """The present rows after changes; rows of videos that have been indexed again or are gone are left out."""
    rows = to_rows(known.take(known.find("video_id", [before.video_id for before, _ in changes])))
    present = {_version(row): row for row in rows}
    changed = []
    for before, after in changes:
        if row := present.get(_version(before)):
            values = {name: getattr(after, name) for name in _CHANGING if getattr(after, name) != getattr(before, name)}
            changed.append(replace(row, **values))
    return changed


def _version(row: VideoRow) -> tuple:
    """What differs after a video has been indexed again; the frames of an unfinished video may grow."""
    frame_count = None if row.status is Status.INDEXING else row.frame_count
    return row.model_id, row.video_id, row.video_number, row.status, row.attempts, frame_count


def _with_stored_frames(table: pa.Table, parts: PartTable) -> pa.Table:
    """The rows; those of unfinished videos have the number of frames committed so far, and say how much that is."""
    is_growing = pc.equal(table.column("status"), str(Status.INDEXING))
    growing = table.filter(is_growing)
    if growing.num_rows == 0:
        return table
    rows = to_rows(growing)
    stored = [parts.frame_count(row.known_number) for row in rows]
    values = {
        "frame_count": [max(row.frame_count, count) for row, count in zip(rows, stored)],  # fewer if some are lost
        "reason": [str(Reason.UNFINISHED)] * len(rows),
        "detail": [f"{_progress(row, parts)}; if no job is indexing it, `vidx index` continues" for row in rows],
    }
    for name, column in values.items():
        field = table.schema.field(name)
        growing = growing.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type))
    return pa.concat_tables([table.filter(pc.invert(is_growing)), growing])


def _progress(row: VideoRow, parts: PartTable) -> str:
    """How much of a video is committed, for people."""
    if row.probe is None:
        return "a part of it is indexed"
    bounds = parts.bounds([row.known_number])
    places = bounds.of(row.known_number)
    end_seconds = float((bounds.last_seconds + bounds.longest_seconds)[places].max(initial=0.0))
    ranges = [row.probe.range_seconds(key) for key in set(bounds.segment[places])]
    done = sum(min(end, end_seconds) - start for start, end in ranges)
    of_all = f" of {_clock(row.probe.duration_seconds)}" if row.probe.duration_seconds else ""
    return f"{_clock(done)}{of_all} is indexed"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0.0)))) if abs(seconds) < 1e9 else "?"
