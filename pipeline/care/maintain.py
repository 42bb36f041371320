"""What an archive needs from time to time: old videos expire, files are joined, the index is trained, waste goes."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.care.age import expired_videos, instant_before
from storage.archive.archive import Archive
from storage.care.clean import Cleaned, clean
from storage.care.compact import Compacted, compact
from storage.records import VideoRow
from storage.vectors.vector_index import open_index


@dataclass(frozen=True)
class Maintained:
    """What was done: the videos that expired, the files that were joined, the frames of the index, what was removed."""

    expired: tuple[VideoRow, ...]
    compacted: Compacted
    index_frames: int
    cleaned: Cleaned


def maintain(
    archive: Archive,
    *,
    expire_age: str | None = None,
    target_bytes: int,
    unused_seconds: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Maintained:
    """Takes care of an archive, step by step; jobs may index into it and queries may read it meanwhile.

    Args:
        archive: the archive.
        expire_age: delete the videos that are older, as `vidx expire` does; None: no video.
        target_bytes: the maximum size of a joined file.
        unused_seconds: how long files that nothing needs any more are kept.
        report: is told how many files are joined, and of how many.
    Raises:
        UsageError: expire_age is no age.
        ArchiveError: the archive cannot be written, or is damaged.
    """
    now, expired = datetime.now(UTC), list[VideoRow]()
    if expire_age is not None:
        oldest = instant_before("--expire", expire_age, now)
        expired = archive.videos.delete(expired_videos(archive.videos.all(), oldest, now))
    compacted = compact(archive, target_bytes, report)
    cleaned = clean(archive, unused_seconds)  # it also trains the index
    return Maintained(tuple(expired), compacted, open_index(archive).frame_count, cleaned)
