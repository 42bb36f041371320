"""Videos that no file is behind: rows that a benchmark makes, stored as a job does, a frame a second."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from storage.archive.archive import Archive
from storage.parts.write import FrameColumns, PartWriter
from storage.records import Part, Receipt, Sampling, Segment, Status, TokenBatch, VideoRow


@dataclass(frozen=True)
class MadeVideo:
    """A video as it is to be stored.

    Attributes:
        number: what its id is made of.
        uri: where it is said to be.
        segments: the rows of each segment, in order of time; read once.
        tags: its tags.
    """

    number: int
    uri: str
    segments: Iterable[TokenBatch]
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def video_id(self) -> str:
        """64 hexadecimal digits."""
        return f"{self.number:064x}"


def add_videos(archive: Archive, made: Sequence[MadeVideo], patches: int = 0) -> None:
    """Writes, commits and publishes videos, all at once; `patches` is how many rows of them each frame has."""
    sampling = Sampling(Fraction(1), patches)
    numbers = archive.reserve([(video.video_id, sampling) for video in made])
    receipts, rows = [], []
    for video in made:
        number, start = numbers[video.video_id, str(sampling)], 0
        for tokens in video.segments:
            count = len(tokens.token)
            segment = Segment(video.video_id, start, start + count, start)
            part = _write_part(archive, segment, number, sampling, tokens)
            receipts.append(Receipt(segment, number, part, None, "pyav", count, 0.0, 0.0, 0.0))
            start += count
        rows.append(
            VideoRow(
                video_id=video.video_id,
                video_number=number,
                uri=video.uri,
                status=Status.INDEXED,
                problem=None,
                model_id=archive.model_id,
                sampling=str(sampling),
                frame_count=start,
                size_bytes=1,
                mtime_ns=1,
                probe=None,
                captured_at=None,
                tags=dict(video.tags),
                attempts=1,
            )
        )
    archive.parts.commit(receipts)
    archive.videos.publish(rows)


def _write_part(archive: Archive, segment: Segment, number: int, sampling: Sampling, tokens: TokenBatch) -> Part:
    writer = PartWriter(
        archive.frames_uri,
        video_id=segment.video_id,
        video_number=number,
        segment_key=segment.key,
        time_base=Fraction(1),
        model_id=archive.model_id,
        sampling=str(sampling),
        dtype="float32",
    )
    ticks = np.arange(segment.start_ticks, segment.end_ticks)
    seconds = ticks.astype(np.float64)
    columns = FrameColumns(ticks, ticks, seconds, seconds, np.ones(len(ticks)))
    writer.append(columns, tokens, [b""] * len(ticks))
    return writer.close()
