"""The table of videos: its rows, and the changes that make frames visible or take them out of every answer."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.archive import videos
from storage.archive.delta import RowTable
from storage.archive.part_table import PartTable
from storage.errors import UsageError
from storage.files import join, normalize_uri, source_text, to_uri
from storage.records import Problem, Reason, Status, VideoRow

MIN_ID_DIGITS = 6


class VideoTable:
    """One row per video, at one version."""

    def __init__(self, archive_uri: str, parts: PartTable):
        """The table of an archive; `open` reads it.

        Args:
            archive_uri: of the archive's folder.
            parts: the archive's; they tell how far a video has come that is being indexed.
        """
        self._archive_uri = archive_uri
        self._table = RowTable(join(archive_uri, "videos"), videos.SCHEMA, videos.check)
        self._parts = parts
        self._published: tuple[int, dict[int, str]] | None = None
        self._grown: tuple[tuple[int, int], pa.Table] | None = None

    def open(self) -> None:
        """Reads the newest version, where none has been read."""
        self._table.rows()

    @property
    def version(self) -> int:
        """Counts publications."""
        return self._table.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._table.refresh()

    def arrow(self) -> pa.Table:
        """All rows (videos.SCHEMA), those of videos that are being indexed with the frames that they show by now."""
        versions = self._table.version, self._parts.version
        if self._grown is None or self._grown[0] != versions:
            self._grown = versions, videos.with_stored_frames(self._table.rows(), self._parts.bounds())
        return self._grown[1]

    def all(self) -> list[VideoRow]:
        """All rows, by uri, those of deleted videos too."""
        return sorted(videos.to_rows(self.arrow()), key=lambda row: row.uri)

    def unfinished(self) -> list[VideoRow]:
        """Rows of videos that can be searched in part: a job is at the rest, or was interrupted."""
        rows = self.arrow()
        growing = rows.filter(pc.equal(rows.column("status"), str(Status.INDEXING)))
        return sorted(videos.to_rows(growing), key=lambda row: row.uri)

    def row_of(self, video_id: str) -> VideoRow | None:
        """The row of a content, or None."""
        places = np.flatnonzero(pc.equal(self.arrow().column("video_id"), video_id).fill_null(False).to_numpy())
        return _row_at(self.arrow(), int(places[0])) if len(places) else None

    def find(self, name: str) -> VideoRow:
        """The video that a person means by a path, a URI, a file name, or the first digits (six or more) of its id.

        A name that no video has in these very bytes means the one whose name looks the same (NFC and NFD of Unicode).

        Raises:
            UsageError: there is none, or more than one.
        """
        rows = self.arrow()
        rows = rows.filter(pc.not_equal(rows.column("status"), str(Status.DELETED)))
        uris, ids = rows.column("uri").to_pylist(), rows.column("video_id").to_pylist()
        uri = to_uri(name)
        if uri in uris:
            return _row_at(rows, uris.index(uri))
        for spelled in (str, normalize_uri):
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
            f"{name}: no such video in {source_text(self._archive_uri)}; name one by its path, its URI or at least "
            f"{MIN_ID_DIGITS} digits of its id (`vidx list` shows them)"
        )

    def published(self) -> dict[int, str]:
        """Video id by number, of every video that shows frames."""
        version = self._table.version
        if self._published is None or self._published[0] != version:
            rows = self._table.rows()
            columns = (rows.column(name).to_pylist() for name in ("video_number", "video_id", "frame_count"))
            shown = {number: video_id for number, video_id, count in zip(*columns, strict=True) if count and number}
            self._published = (version, shown)
        return self._published[1]

    def numbers(self) -> set[int]:
        """The numbers that rows have."""
        return set(self._table.rows().column("video_number").drop_null().to_pylist())

    def sources(self) -> dict[int, str]:
        """Where each numbered video came from, as people read it."""
        rows = self.arrow()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: source_text(uri) for number, uri in zip(*columns, strict=True) if number is not None}

    def uris(self, video_numbers: Iterable[int]) -> dict[int, str]:
        """The uri of each published number."""
        wanted = set(video_numbers)
        rows = self.arrow()
        columns = (rows.column(name).to_pylist() for name in ("video_number", "uri"))
        return {number: uri for number, uri in zip(*columns, strict=True) if number in wanted}

    def frame_count(self) -> int:
        """Published frames."""
        return sum(self.arrow().column("frame_count").to_pylist())

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

        self._table.change(plan)
        self._parts.refresh()
        return added

    def update(self, rows: Sequence[VideoRow]) -> None:
        """Publishes rows whose place, times or tags have changed, of those that nobody has indexed again meanwhile.

        Raises:
            ArchiveError: the archive cannot be written; nothing is published.
        """
        self._table.change(lambda table: videos.plan_publish(table, videos.still_current(table, rows)))

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
            shown = videos.with_stored_frames(table.filter(pa.array(found, pa.bool_())), self._parts.bounds())
            gone[:] = videos.to_rows(shown)
            return videos.plan_delete(table, np.array(found, bool))

        self._table.change(plan)
        return sorted(gone, key=lambda row: row.uri)

    def recount(self) -> list[VideoRow]:
        """Rows that said more frames than are stored: partial or failed now, with what is left, as they are returned.

        Of one that says fewer, a job has not published the last frames yet.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        changed: list[VideoRow] = []

        def plan(table: pa.Table) -> tuple[np.ndarray, pa.Table]:
            self._parts.refresh()  # after the rows: what they show was in before they came
            columns = (table.column(name).to_pylist() for name in ("video_number", "frame_count"))
            stored = self._parts.bounds().frame_counts()
            right = [not number or count <= stored[number] for number, count in zip(*columns)]
            wrong = videos.to_rows(table.filter(pa.array([not is_right for is_right in right], pa.bool_())))
            changed[:] = [self._without_damage(row) for row in wrong]
            return np.array(right, bool), videos.to_arrow(changed)

        self._table.change(plan)
        return changed

    def _without_damage(self, row: VideoRow) -> VideoRow:
        count = self._parts.frame_count(row.known_number)
        problem = Problem(Reason.DAMAGED, f"{row.frame_count - count} of its frames were damaged and taken out")
        status = Status.PARTIAL if count else Status.FAILED
        return replace(row, status=status, problem=problem, frame_count=count, attempts=0)


def _row_at(rows: pa.Table, place: int) -> VideoRow:
    return videos.to_rows(rows.slice(place, 1))[0]
