"""The table of videos: one row per video; publishing it makes the video's frames visible.

A row of status `indexing` is written once, when the first frames of a long video are shown. When the row is read, the
number of frames committed since then is added from the log of the frames.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.archive import video_rows
from storage.archive.delta import RowTable
from storage.archive.part_table import PartTable
from storage.archive.video_rows import to_arrow, to_rows
from storage.errors import UsageError
from storage.files import join, normalize_uri, source_text, to_uri
from storage.records import Problem, Reason, Status, VideoRow

MIN_ID_DIGITS = 6


class VideoTable:
    """One row per video, at one version."""

    def __init__(self, archive_uri: str, parts: PartTable):
        """The table of an archive; `open` reads it.

        Args:
            archive_uri: the archive's folder.
            parts: the archive's parts; they tell how many frames of an unfinished video are committed.
        """
        self._archive_uri = archive_uri
        self._table = RowTable(join(archive_uri, "videos"), video_rows.SCHEMA, video_rows.check)
        self._parts = parts
        self._published: tuple[int, dict[int, str]] | None = None
        self._current: tuple[tuple[int, int], pa.Table] | None = None

    def open(self) -> None:
        """Reads the newest version, unless a version is open already."""
        self._table.rows()

    @property
    def version(self) -> int:
        """The table's version; each publication increases it."""
        return self._table.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._table.refresh()

    def arrow(self) -> pa.Table:
        """All rows (video_rows.SCHEMA); those of unfinished videos count the frames committed so far."""
        versions = self._table.version, self._parts.version
        if self._current is None or self._current[0] != versions:
            self._current = versions, _with_stored_frames(self._table.rows(), self._parts)
        return self._current[1]

    def all(self) -> list[VideoRow]:
        """All rows, by uri, including those of deleted videos."""
        return sorted(to_rows(self.arrow()), key=lambda row: row.uri)

    def unfinished(self) -> list[VideoRow]:
        """The rows of videos that can be searched in part: a job is indexing the rest, or was interrupted."""
        rows = self.arrow()
        growing = rows.filter(pc.equal(rows.column("status"), str(Status.INDEXING)))
        return sorted(to_rows(growing), key=lambda row: row.uri)

    def row_of(self, video_id: str) -> VideoRow | None:
        """The row of the video with this id, or None."""
        rows = to_rows(self.arrow().filter(pc.equal(self.arrow().column("video_id"), video_id)))
        return rows[0] if rows else None

    def find(self, name: str) -> VideoRow:
        """The video that a person means by a path, a URI, a file name, or the first digits (six or more) of its id.

        If no video has exactly this name, a name that looks the same is taken (NFC and NFD of Unicode).

        Raises:
            UsageError: there is no such video, or more than one, or it was deleted.
        """
        rows = self.arrow()
        is_deleted = pc.equal(rows.column("status"), str(Status.DELETED))
        present = rows.filter(pc.invert(is_deleted))
        places = _places_of(present, name)
        if len(places) == 1:
            return _row_at(present, places[0])
        if places:
            uris, ids = (present.column(column).to_pylist() for column in ("uri", "video_id"))
            candidates = ", ".join(sorted(f"{ids[place]} ({source_text(uris[place])})" for place in places)[:5])
            raise UsageError(f"{name}: matches more than one video; name one by its path or id: {candidates}")
        archive = source_text(self._archive_uri)
        if _places_of(rows.filter(is_deleted), name):
            raise UsageError(
                f"{name}: this video was deleted from {archive}; `vidx index` with --restore-deleted restores it"
            )
        raise UsageError(
            f"{name}: no such video in {archive}; name one by its path, its URI or at least {MIN_ID_DIGITS} digits of "
            "its id (`vidx list` shows them)"
        )

    def published(self) -> dict[int, str]:
        """The ids of all videos that have visible frames, by number."""
        version = self._table.version
        if self._published is None or self._published[0] != version:
            columns = (
                self._table.rows().column(name).to_pylist() for name in ("video_number", "video_id", "frame_count")
            )
            ids = {number: video_id for number, video_id, count in zip(*columns, strict=True) if count and number}
            self._published = (version, ids)
        return self._published[1]

    def numbers(self) -> set[int]:
        """The numbers of all rows that have one."""
        return set(self._table.rows().column("video_number").drop_null().to_pylist())

    def uris(self, video_numbers: Iterable[int] | None = None) -> dict[int, str]:
        """The uri of each of these numbers that a row has; None: of each number."""
        wanted = self.numbers() if video_numbers is None else set(video_numbers)
        columns = (self.arrow().column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: uri for number, uri in zip(*columns, strict=True) if number in wanted}

    def frame_count(self) -> int:
        """The number of published frames."""
        return sum(self.arrow().column("frame_count").to_pylist())

    def publish(self, rows: Sequence[VideoRow], restored: Collection[str] = ()) -> set[str]:
        """Makes videos and their frames visible, all in one commit; each row replaces older ones (see _plan_publish).

        Returns:
            The ids of the videos whose rows are published.
        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        added: set[str] = set()

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            keep, new = _plan_publish(table, rows, restored)
            added.clear()
            added.update(new.column("video_id").drop_null().to_pylist())
            return keep, new

        self._table.change(plan)
        self._parts.refresh()
        return added

    def update(self, rows: Sequence[VideoRow]) -> None:
        """Publishes rows whose place, times or tags have changed, unless another job has indexed the video again.

        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        self._table.change(lambda table: _plan_publish(table, _still_current(table, rows)))

    def delete(self, rows: Sequence[VideoRow]) -> list[VideoRow]:
        """Hides videos from every answer at once; `clean` removes their frames later. Returns the deleted rows.

        Raises:
            ArchiveError: the archive cannot be written; nothing is deleted.
        """
        ids = {row.video_id for row in rows if row.video_id is not None}
        unread = {row.uri for row in rows if row.video_id is None}
        deleted: list[VideoRow] = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
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
            return ~np.array(is_wanted, bool), to_arrow(left)

        self._table.change(plan)
        return sorted(deleted, key=lambda row: row.uri)

    def recount(self) -> list[VideoRow]:
        """Corrects rows that say more frames than are stored, and returns them; they are partial or failed now.

        A row that says fewer frames is left alone: its job has not published the last frames yet.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        changed: list[VideoRow] = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            self._parts.refresh()  # after the rows: the frames that they show were committed before them
            columns = (table.column(name).to_pylist() for name in ("video_number", "frame_count"))
            stored = self._parts.bounds().frame_counts()
            right = np.array([not number or count <= stored[number] for number, count in zip(*columns)], bool)
            changed[:] = [self._without_damage(row) for row in to_rows(table.filter(pa.array(~right)))]
            return right, to_arrow(changed)

        self._table.change(plan)
        return changed

    def _without_damage(self, row: VideoRow) -> VideoRow:
        count = self._parts.frame_count(row.known_number)
        lost_count = row.frame_count - count
        was = "was" if lost_count == 1 else "were"
        problem = Problem(Reason.DAMAGED, f"{lost_count} of its frames {was} damaged and removed")
        status = Status.PARTIAL if count else Status.FAILED
        return replace(row, status=status, problem=problem, frame_count=count, attempts=0)


def _places_of(rows: pa.Table, name: str) -> list[int]:
    """The places of the rows that a name may mean; one if it is clear, see VideoTable.find."""
    uris, ids = (rows.column(column).to_pylist() for column in ("uri", "video_id"))
    uri = to_uri(name)
    if uri in uris:
        return [uris.index(uri)]
    for spelled in (str, normalize_uri):
        wanted = spelled(uri)
        same_place = [place for place, other in enumerate(map(spelled, uris)) if other == wanted]
        file = wanted.rsplit("/", 1)[-1]
        same_name = [place for place, other in enumerate(map(spelled, uris)) if other.rsplit("/", 1)[-1] == file]
        for same in (same_place, [] if "/" in name else same_name):
            if len(same) == 1:
                return same
    digits = name.lower()
    is_prefix = len(digits) >= MIN_ID_DIGITS and set(digits) <= set("0123456789abcdef")
    found = [place for place, video_id in enumerate(ids) if is_prefix and video_id and video_id.startswith(digits)]
    return found or same_place or ([] if "/" in name else same_name)


def _plan_publish(
    table: pa.Table, rows: Sequence[VideoRow], restored: Collection[str] = ()
) -> tuple[np.ndarray, pa.Table]:
    """Which rows of the table to keep, and which to add.

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
    known = list(zip(*(table.column(name).to_pylist() for name in names)))
    known += [tuple(getattr(row, name) for name in names) for row in rows]
    alive = np.arange(len(known)) < table.num_rows
    by_content: dict[tuple, int] = {}
    by_uri: dict[tuple, int] = {}
    for place, (model_id, video_id, uri, _, status, _) in enumerate(known):
        same_content = None if video_id is None else by_content.get((model_id, video_id))
        same_uri = by_uri.get((model_id, uri))
        if place >= table.num_rows:
            rivals = [rival for rival in (same_content, same_uri) if rival is not None and alive[rival]]
            if any(_stays(known[rival], known[place], restored) for rival in rivals):
                continue
            alive[rivals] = False
            alive[place] = True
        if status != Status.DELETED:
            by_uri[model_id, uri] = place
        if video_id is not None:
            by_content[model_id, video_id] = place
    added = [row for row, is_alive in zip(rows, alive[table.num_rows :], strict=True) if is_alive]
    return alive[: table.num_rows], to_arrow(added)


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


def _still_current(table: pa.Table, rows: Sequence[VideoRow]) -> list[VideoRow]:
    """The rows whose video still has a row with the same number of frames; of an unfinished video, with any number."""
    names = ("model_id", "video_id", "video_number", "status", "attempts", "frame_count")
    current = {_without_growth(*values) for values in zip(*(table.column(name).to_pylist() for name in names))}
    return [row for row in rows if _without_growth(*(getattr(row, name) for name in names)) in current]


def _without_growth(*values: object) -> tuple:
    *others, status, attempts, frame_count = values
    return *others, status, attempts, None if status == Status.INDEXING else frame_count


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


def _row_at(rows: pa.Table, place: int) -> VideoRow:
    return to_rows(rows.slice(place, 1))[0]
