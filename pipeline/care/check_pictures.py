"""check pictures: whether the stored pictures of a video are those that PyAV decodes at their times.

In archives from before PyAV was the default decoder, some videos were decoded by decord (`decoder = 'decord'`). After a
seek in an MP4 or MOV file whose first frame is shown later than it is decoded, decord gave pictures of a later
keyframe.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from storage.archive.archive import Archive
from storage.errors import VideoProblem
from storage.files import file_path
from storage.parts.read import read_thumbnails
from storage.records import Problem, Reason, Sampling, Segment, VideoRow
from storage.vectors.vector_index import drop_index
from workers.decode.client import Decoder, allowed_pixels
from workers.sources.identity import check_still_there

BATCH = 64  # frames compared at once
ANOTHER_PICTURE = 2.0  # mean difference of thumbnails, of 255; for one picture by two JPEG libraries it is below 1
_TOLD_WHEN_INDEXED = (Reason.CLOCK_RESTARTED, Reason.CORRUPT, Reason.TRUNCATED)  # raised after the last good frame


@dataclass(frozen=True)
class PictureCheck:
    """The result for one video.

    Attributes:
        row: of the video.
        checked: number of compared frames.
        wrong: number of frames with another picture, or that the file does not show.
        first_wrong_seconds: position of the first wrong frame, or None.
        problem: why the video, or the rest of it, could not be compared; or None.
    """

    row: VideoRow
    checked: int
    wrong: int
    first_wrong_seconds: float | None
    problem: Problem | None


def check_pictures(archive: Archive, report: Callable[[int, int], None]) -> list[PictureCheck]:
    """Decodes the videos of decord again with PyAV, and compares the pictures with the stored thumbnails.

    Args:
        report: gets the number of checked videos and of all, after each video.
    Raises:
        ArchiveError: a part is missing or damaged.
    """
    rows = [row for row in archive.videos.having("decoder", "decord") if row.frame_count]
    checks = []
    for row in rows:
        checks.append(_check(archive, row))
        report(len(checks), len(rows))
    return checks


def drop_wrong_videos(archive: Archive, checks: Sequence[PictureCheck]) -> list[VideoRow]:
    """Takes videos with wrong pictures out of an archive; returns their rows, to index them again.

    Raises:
        ArchiveError: the archive cannot be written.
    """
    numbers = {check.row.known_number for check in checks if check.wrong}
    if not numbers:
        return []
    drop_index(archive)
    archive.parts.drop([part.path for part in archive.frames.parts() if part.video_number in numbers])
    archive.videos.recount()
    return [*archive.videos.of_numbers(numbers).values()]


def _check(archive: Archive, row: VideoRow) -> PictureCheck:
    waiting = {ref.ticks: ref for ref in archive.frames.find(row.video_number)}
    count, wrong, problem = len(waiting), [], None
    try:
        for shown in _thumbnails_shown(row):
            refs = [waiting.pop(ticks) for ticks in shown if ticks in waiting]
            for ref, stored in zip(refs, read_thumbnails(archive.frames_uri, refs), strict=True):
                if not stored:
                    raise VideoProblem(Reason.UNKNOWN, "its frames have no thumbnails (--no-thumbnails)")
                if not _is_same(stored, shown[ref.ticks]):
                    wrong.append(ref.time_seconds)
        wrong += [ref.time_seconds for ref in waiting.values()]  # the file shows no frame at these times
        waiting = {}
    except VideoProblem as error:
        problem = Problem(error.reason, error.detail)
    return PictureCheck(row, count - len(waiting), len(wrong), min(wrong, default=None), problem)


def _thumbnails_shown(row: VideoRow) -> Iterator[dict[int, bytes]]:
    """Thumbnails by ticks, in batches, of the frames that the video's settings choose.

    Raises:
        VideoProblem: the file is gone or changed, or cannot be read to its end.
    """
    check_still_there(row)
    sampling = Sampling.from_text(row.sampling)
    path = file_path(row.uri)
    with Decoder(max_pixels=allowed_pixels(row.known_probe), choice=sampling.choice) as decoder:
        probe = decoder.probe(path)
        whole = Segment(row.known_id, None, None, 0)
        try:
            for frames in decoder.decode(path, probe, whole, sampling.fps, BATCH, sampling.choice):
                yield dict(zip(frames.ticks.tolist(), frames.thumbnails, strict=True))
        except VideoProblem as problem:
            if problem.reason not in _TOLD_WHEN_INDEXED:
                raise


def _is_same(one: bytes, other: bytes) -> bool:
    if one == other:
        return True
    pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (one, other)]
    same_size = pictures[0].shape == pictures[1].shape
    return same_size and float(np.abs(pictures[0] - pictures[1]).mean()) < ANOTHER_PICTURE
