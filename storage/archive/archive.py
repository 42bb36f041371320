"""The archive: what is committed, and the commits that change it.

    archive.json    format version, model; written last, so a folder that has it is a whole archive
    frames/         Delta tables of parts (storage/archive/part_table.py), one row per frame
    videos/         Delta table, one row per video; its rows make frames visible
    numbers/        Delta table: the number of each (video, model, sampling), given once
    index/          search keys (storage/vectors/vector_index.py); may be deleted at any time

Frames are committed first, then the row in `videos` that shows them. No reader sees frames whose number has no row. The
row of a long video comes with its first segments and has the status `indexing`. From then on each further segment is
visible with its own commit, until a final row replaces the first one.

`deltalake` does not survive a fork: processes that use an archive must be spawned.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from storage.archive import delta, video_rows
from storage.archive.claims import claimed_numbers
from storage.archive.frames import FrameTable
from storage.archive.part_table import VIDEOS_PER_SHARD, PartTable, create_shard
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
from storage.errors import NoArchiveError, UsageError
from storage.files import join, make_folder, remove, source_text, tree_size, write_bytes, write_errors
from storage.parts.read import part_identity
from storage.records import Sampling, Status


@dataclass(frozen=True)
class ArchiveStatus:
    """The number of published videos and frames in an archive, and its size.

    A video is in progress when a job has committed some of its frames, but not all. `frames` includes those of them
    that can be searched, which are frames_in_progress_shown. videos_unconfined counts the videos that were decoded by a
    process without the protections listed in sandbox_missing.
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
        UsageError: no archive can be at such a place.
    """
    return is_archive(archive_uri(uri))


def create_archive(uri: str, *, model_id: str, model_name: str, model_tower: str = "") -> "Archive":
    """A new archive for one model; an existing archive is opened if it has the same model or is still empty.

    Raises:
        UsageError: the folder holds other files, or an archive of another model.
        ArchiveError: the place cannot be written.
    """
    uri = archive_uri(uri)
    settings = Settings(FORMAT_VERSION, model_id, model_name, model_tower, VIDEOS_PER_SHARD)
    if not archive_exists(uri):
        refuse_foreign_folder(uri)
        with write_errors(uri):
            for name in (*TABLES, "index"):
                make_folder(join(uri, name))
        create_shard(join(uri, "frames"))
        for name, schema in (("videos", video_rows.SCHEMA), ("numbers", NUMBERS)):
            delta.create_table(join(uri, name), schema)
        if not archive_exists(uri):
            write_settings(uri, settings)
    archive = open_archive(uri, write=True)
    if archive.model_id != model_id and archive.is_empty:  # an earlier job could not load its model
        write_settings(uri, settings)
        return open_archive(uri)
    archive.check_model(model_id, model_name)
    return archive


def open_archive(uri: str, *, write: bool = False) -> "Archive":
    """The archive at a path or URI, at its newest version.

    Args:
        uri: where it is.
        write: also check that it can be written.
    Raises:
        NoArchiveError: there is none.
        ArchiveError: it is damaged, has another format, or cannot be read (or written, with write).
    """
    uri = archive_uri(uri)
    if not archive_exists(uri):
        raise NoArchiveError(f"no archive at {source_text(uri)}: run `vidx index` first")
    archive = Archive(uri, read_settings(uri))
    if write:
        for name in TABLES:
            probe = join(uri, name, "write_test.tmp")
            with write_errors(join(uri, name)):
                write_bytes(probe, b"vidx")
                remove(probe)
    return archive


class Archive:
    """One archive at one version; `refresh` and every change made through it move to the newest version.

    Attributes:
        uri: the archive's folder.
        model_id, model_name, model_tower: the model whose frames it holds, as in its settings.
        settings: the content of archive.json.
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
        self.parts = PartTable(self.frames_uri, settings.videos_per_shard)
        self.videos = VideoTable(uri, self.parts)
        self.frames = FrameTable(self.parts, self.videos)
        self.numbers = NumberTable(join(uri, "numbers"), self.model_id)
        self.videos.open()  # before the parts, so that all frames that the rows show are found
        self.parts.open()

    def __repr__(self) -> str:
        return f"Archive({self.uri!r}, version={self.version})"

    @property
    def is_empty(self) -> bool:
        """Whether no job has committed anything or reserved a number."""
        return not (len(self.videos) or len(self.numbers.all_given()) or len(self.parts.bounds()))

    @property
    def version(self) -> int:
        """The version of the videos table; each publication increases it."""
        return self.videos.version

    def refresh(self) -> None:
        """Moves to the newest version."""
        self.videos.refresh()
        self.parts.refresh()

    @property
    def model_text(self) -> str:
        """The name of its model, for people."""
        return self.model_name + (f" with --tower {self.model_tower}" if self.model_tower else "")

    def check_model(self, model_id: str, model_name: str) -> None:
        """Refuses another model than the archive's.

        Raises:
            UsageError: the model is another one, and the archive is not empty.
        """
        if self.model_id != model_id and not self.is_empty:
            raise UsageError(
                f"{source_text(self.uri)}: this archive is of the model {self.model_text} ({self.model_id[:12]}), not "
                f"of {model_name} ({model_id[:12]}); use the archive's model or choose another --archive"
            )

    def reserve(self, keys: Sequence[tuple[str, Sampling]]) -> dict[tuple[str, str], int]:
        """The number of each (video id, sampling); a new one gets a number that it keeps.

        Raises:
            ArchiveError: the archive cannot be written.
        """
        # The table may have lost numbers that no repair has restored yet; they are not given to other videos.
        in_use = (self.numbers.all_given(), self.videos.numbers())
        above = max(int(numbers.max(initial=0)) for numbers in in_use)
        above = max(above, *self.parts.newest_numbers(above), 0)
        given = self.numbers.reserve([(video_id, str(sampling)) for video_id, sampling in keys], above)
        self.parts.make_shards(given.values())
        return given

    def restore_numbers(self) -> None:
        """Gives their numbers back to videos that have frames or rows, after the table of numbers was damaged.

        Raises:
            ArchiveError: a part is missing or damaged, or the archive cannot be written.
        """
        bounds, known = self.parts.bounds(), self.numbers.all_given()
        numbers, places = np.unique(bounds.video_number, return_index=True)
        lost: list[Mapping[str, str | int]] = [
            part_identity(self.frames_uri, path) for path in bounds.path[places[~np.isin(numbers, known)]].tolist()
        ]
        missing = np.setdiff1d(self.videos.numbers(), np.concatenate([known, numbers]))
        rows = self.videos.of_numbers(missing.tolist()).values()
        lost += [{name: getattr(row, name) for name in NUMBERS.names} for row in rows]
        self.numbers.restore(lost)

    def unpublished_numbers(self, among: Collection[int] | None = None) -> set[int]:
        """The numbers of videos whose frames are committed and that have no row: not published yet, or replaced.

        Args:
            among: only these numbers; None: all.
        """
        found = set(np.setdiff1d(self.parts.bounds(among).video_number, self.videos.numbers()).tolist())
        return found if among is None else found & set(among)

    def deleted_numbers(self) -> set[int]:
        """The numbers of deleted videos; their frames may still be stored."""
        return self.numbers.of_ids(self.videos.ids_of(Status.DELETED))

    def status(self) -> ArchiveStatus:
        """The number of videos and frames, from the rows of videos and the log of the frames."""
        rows = self.videos.arrow(("status", "frame_count", "model_id", "sandbox_missing"))
        states: dict[str, int] = {
            each["values"]: each["counts"] for each in rows.column("status").value_counts().to_pylist()
        }
        is_growing = pc.equal(rows.column("status"), str(Status.INDEXING))
        growing = rows.column("frame_count").filter(is_growing).to_pylist()
        is_unconfined = pc.and_(
            pc.not_equal(rows.column("status"), str(Status.DELETED)), pc.not_equal(rows.column("sandbox_missing"), "")
        )
        unconfined = rows.column("sandbox_missing").filter(is_unconfined)  # leaves out nulls
        # Videos that a job has begun and no row shows yet; the claim tells them from replaced ones.
        begun = self.unpublished_numbers(claimed_numbers(self.uri))
        begun -= self.deleted_numbers() if begun else set()
        counts = self.parts.bounds(begun).frame_counts()
        return ArchiveStatus(
            videos_indexed=states.get(Status.INDEXED, 0),
            videos_partial=states.get(Status.PARTIAL, 0),
            videos_failed=states.get(Status.FAILED, 0),
            videos_deleted=states.get(Status.DELETED, 0),
            frames=pc.sum(rows.column("frame_count")).as_py() or 0,
            model_ids=tuple(sorted(rows.column("model_id").unique().to_pylist())) or (self.model_id,),
            size_bytes=tree_size(self.uri),
            version=self.version,
            format_version=self.settings.format_version,
            videos_in_progress=len(growing) + len(begun),
            frames_in_progress=sum(growing) + sum(counts[number] for number in begun),
            frames_in_progress_shown=sum(growing),
            videos_unconfined=len(unconfined),
            sandbox_missing=tuple(
                sorted({step for steps in unconfined.unique().to_pylist() for step in steps.split(",")})
            ),
        )
