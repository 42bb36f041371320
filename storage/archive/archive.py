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

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from storage.archive import delta, video_rows
from storage.archive.claims import claimed_numbers
from storage.archive.frames import FrameTable
from storage.archive.part_table import PartTable
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
from storage.archive.video_table import VideoTable
from storage.errors import UsageError
from storage.files import (
    join,
    make_folder,
    remove,
    source_text,
    tree_size,
    write_bytes,
    write_errors,
)
from storage.parts.layout import COLUMNS
from storage.parts.read import part_identity
from storage.records import (
    Sampling,
    Status,
)


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
        with write_errors(uri):
            for name in (*TABLES, "index"):
                make_folder(join(uri, name))
        frames = pa.schema([_optional(field) for field in COLUMNS])
        for name, schema in (("frames", frames), ("videos", video_rows.SCHEMA), ("numbers", NUMBERS)):
            delta.create_table(join(uri, name), schema)
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
            with write_errors(join(uri, name)):
                write_bytes(probe, b"vidx")
                remove(probe)
    return archive


class Archive:
    """One archive at one version; moves on with `refresh` and with every change made through it.

    Attributes:
        uri: of its folder.
        model_id, model_name, model_tower: of the one model whose frames it holds, as in its settings.
        settings: what archive.json says.
        parts, videos, numbers: its tables.
        frames: the frames of published videos.
    """

    def __init__(self, uri: str, settings: Settings):
        self.uri = uri
        self.settings = settings
        self.model_id = settings.model_id
        self.model_name = settings.model_name
        self.model_tower = settings.model_tower
        self.frames_uri = join(uri, "frames")
        self.index_uri = join(uri, "index")
        self.parts = PartTable(self.frames_uri)
        self.videos = VideoTable(uri, self.parts)
        self.frames = FrameTable(self.parts, self.videos)
        self.numbers = NumberTable(join(uri, "numbers"), self.model_id)
        self.videos.open()  # before the parts, so that all that the rows show is there
        self.parts.open()

    def __repr__(self) -> str:
        return f"Archive({self.uri!r}, version={self.version})"

    @property
    def is_empty(self) -> bool:
        """Whether no job has committed anything, or reserved a number for what it will commit."""
        return not (self.videos.arrow().num_rows or self.numbers.all_given() or len(self.parts.bounds()))

    @property
    def version(self) -> int:
        """The version of the videos table, which counts publications."""
        return self.videos.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self.videos.refresh()
        self.parts.refresh()

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

    def reserve(self, keys: Sequence[tuple[str, Sampling]]) -> dict[tuple[str, str], int]:
        """The number of each (video id, sampling): the one it has had from its first reservation on.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        # A number that the table has lost, and no repair has brought back yet, is not given to another video.
        in_use = {*self.parts.bounds().video_number.tolist(), *self.videos.numbers()}
        return self.numbers.reserve([(video_id, str(sampling)) for video_id, sampling in keys], in_use)

    def restore_numbers(self) -> None:
        """Gives their numbers back to the videos that have frames or rows, where the table of numbers lost them.

        Raises:
            ArchiveError: a part is missing or damaged, or the archive cannot be written.
        """
        bounds, known = self.parts.bounds(), self.numbers.all_given()
        firsts = dict(zip(bounds.video_number.tolist(), bounds.path.tolist()))
        has_number = {None, *known, *firsts}
        found = [part_identity(self.frames_uri, path) for number, path in firsts.items() if number not in known]
        found += [
            {name: getattr(row, name) for name in NUMBERS.names}
            for row in self.videos.all()
            if row.video_number not in has_number
        ]
        self.numbers.restore(found)

    def begun(self) -> dict[int, int]:
        """Frames by number, of videos that a job has begun and not finished, where no row shows them yet.

        Their claims tell them from those that were replaced. What was deleted is not among them.
        """
        hidden = self.unpublished_numbers() & claimed_numbers(self.uri)
        counts = self.parts.bounds().frame_counts()
        return {number: counts[number] for number in hidden - (self.deleted_numbers() if hidden else set())}

    def unpublished_numbers(self) -> set[int]:
        """Numbers whose frames are committed and that no row shows: not published yet, or replaced."""
        return set(self.parts.bounds().video_number.tolist()) - self.videos.numbers()

    def deleted_numbers(self) -> set[int]:
        """Numbers of deleted content whose frames may still be there."""
        ids = {row.video_id for row in self.videos.all() if row.status is Status.DELETED}
        return {number for (video_id, _), number in self.numbers.known().items() if video_id in ids}

    def status(self) -> ArchiveStatus:
        """Counts, from the rows of videos and the log of the frames."""
        rows, begun = self.videos.arrow(), self.begun()
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
            frames=self.videos.frame_count(),
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


def _optional(field: pa.Field) -> pa.Field:
    """As the table declares it: a part may lack the columns that its settings do not keep."""
    return field.with_nullable(True) if field.name in ("search_key", "patches") else field
