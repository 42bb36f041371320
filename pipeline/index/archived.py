"""archived: the videos of an archive as a plan sees them; rows are read when they are asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from storage.archive.row_table import Rows
from storage.archive.video_rows import SCHEMA, to_rows
from storage.records import Content, Sampling, Status, VideoRow


@dataclass(frozen=True)
class WantedRows:
    """The rows that a job wants for every source: of this model, with these settings.

    Attributes:
        retry_failed: try all failed and partial videos again.
        restore_deleted: index deleted videos again.
    """

    model_id: str
    sampling: Sampling
    max_pixels: int
    retry_failed: bool = False
    restore_deleted: bool = False

    def is_of(self, row: VideoRow) -> bool:
        """Whether a row was made with this model and these settings."""
        return (row.model_id, row.sampling) == (self.model_id, str(self.sampling))


@dataclass(frozen=True)
class ArchivedVideos:
    """The videos of an archive at one version, with the changes of a plan.

    Attributes:
        stored: the rows of that version.
        read: makes VideoRows of stored ones.
        unchanged: (n,) places, ascending, of the stored rows whose files are sources, and are known to be as they were.
        changes: the rows that the plan changes, by video id.
    """

    stored: Rows = field(default_factory=lambda: Rows.of(SCHEMA.empty_table()))
    read: Callable[[pa.Table], list[VideoRow]] = to_rows
    unchanged: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    changes: Mapping[str, VideoRow] = field(default_factory=dict)

    @cached_property
    def _changes_by_uri(self) -> dict[str, VideoRow]:
        return {row.uri: row for row in self.changes.values()}

    def of_ids(self, video_ids: Iterable[str]) -> dict[str, VideoRow]:
        """The rows of the videos with these ids that are in the archive, by id; those of deleted videos too."""
        rows = self.read(self.stored.take(self.stored.find("video_id", video_ids)))
        return {row.known_id: self.changes.get(row.known_id, row) for row in rows}

    def of_uris(self, uris: Iterable[str]) -> dict[str, VideoRow]:
        """The rows of the videos at these places, by URI, without those of deleted videos."""
        wanted = set(uris)
        rows = self.read(self.stored.take(self.stored.find("uri", wanted)))
        stay = [row for row in rows if row.status is not Status.DELETED and row.video_id not in self.changes]
        arrived = {uri: self._changes_by_uri[uri] for uri in wanted & self._changes_by_uri.keys()}
        return {row.uri: row for row in stay} | arrived

    def of_content(self, content: Content | None) -> VideoRow | None:
        """The row of the video with this content; None if there is none, or the content is not known."""
        return None if content is None else self.of_ids([content.video_id]).get(content.video_id)

    def of_uri(self, uri: str) -> VideoRow | None:
        """The row of the video at this place, unless it was deleted."""
        return self.of_uris([uri]).get(uri)

    def is_unchanged(self, row: VideoRow) -> bool:
        """Whether the file of a row is a source, and is known to be as it was."""
        places = self.stored.find("uri", [row.uri])
        first, last = (np.searchsorted(self.unchanged, places, side) for side in ("left", "right"))
        return bool((first < last).any())

    def unchanged_uris(self) -> Iterator[str]:
        """The sources that are known to be as they were."""
        yield from self.stored.take(self.unchanged, ["uri"]).column(0).to_pylist()
