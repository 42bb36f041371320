"""Decoding through decord, where a user asks for it: MP4 and Matroska files whose frames it numbers as PyAV does.

decord gives frames by rank alone: no times, no flags, and it follows its own idea of a broken file. So the times come
from a pass over the packets, and whatever it says on stderr, or raises, ends its part: PyAV takes over and judges.

decord never seeks here. In files whose first presentation time lies above their first decoding time it lands one
keyframe late, also where `skip_frames` crosses a keyframe (decord2 3.4). So every frame from the file's first on is
read in order, and the counts at the end must agree.

It takes no options and no file object; it is given the open file as descriptor 0, through FFmpeg's `fd:`.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import decord
import numpy as np

from workers.decode.clock import TimedFrame
from workers.decode.open_video import DecodeTask, OpenVideo
from workers.decode.packets import PacketTable, scan_packets
from workers.decode.picture import model_pixels, store_form
from workers.decode.sample import Grid, KeptFrame, Tally, sample
from workers.sources.video_file import VideoFile

PIXEL_FORMATS = ("yuv420p", "yuvj420p")  # of others its RGB is not PyAV's to the last bit
MAX_PIXELS = 3840 * 2160  # it holds several RGB copies of a frame
MAX_BYTES = 128 << 20  # it reads the whole file ahead, into memory
MAX_FRAMES = 9000  # every segment is read from the file's first frame on
FRAME_SECONDS = 0.002  # by which its times, float32 seconds from the first frame, may differ
# At this level FFmpeg says when it conceals what it could not read; decord itself passes over that.
decord.logging.set_level(decord.logging.INFO)
# What it says of any file: a frame tells its colours, which the container did not (its size is the same).
_HARMLESS = re.compile(
    r"Changing video frame properties on the fly|deprecated pixel format used"
    r"|filter context - w: (\d+) h: (\d+) fmt: (\d+) .*incoming frame - w: \1 h: \2 fmt: \3 "
)


class Unsure(Exception):
    """decord met something that it does not report in detail; PyAV has to look."""


class Reader:
    """decord on one open file, reading all frames in order; a context manager.

    Raises:
        Unsure: decord raises, or FFmpeg inside it has something to say.
    """

    def __init__(self, file: VideoFile, threads: int):
        self._heard = os.fstat(2).st_size  # stderr is a file: the owner of this process reads it after a crash
        self._stdin = os.dup(0)
        os.dup2(file.descriptor, 0)
        os.lseek(0, 0, os.SEEK_SET)
        try:
            self._reader = self._guarded(decord.VideoReader, "fd:", decord.cpu(0), -1, -1, threads)
        except Unsure:
            self._close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._reader = None
        os.dup2(self._stdin, 0)
        os.close(self._stdin)

    def __len__(self) -> int:
        return len(self._reader)

    def start_seconds(self) -> np.ndarray:
        """(N,) float: when each frame is shown, by decord's own table."""
        return self._reader.get_frame_timestamp(np.arange(len(self)))[:, 0].astype(np.float64)

    def keyframes(self) -> list[int]:
        """Where decord believes that decoding can begin, by rank."""
        return self._reader.get_key_indices()

    def read(self) -> np.ndarray:
        """The next frame, (height, width, 3) uint8 RGB."""
        frame = self._guarded(self._reader.next).asnumpy()
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise Unsure(f"a frame of shape {frame.shape}")
        return frame

    def check_end(self) -> None:
        """Raises Unsure where more frames come than the table has."""
        try:
            self.read()
        except Unsure as error:
            if isinstance(error.__cause__, (StopIteration, decord.DECORDLimitReachedError)):
                return
            raise
        raise Unsure("there are more frames than its table has")

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = call(*arguments)
        except (
            decord.DECORDError,
            decord.DECORDLimitReachedError,
            RuntimeError,
            StopIteration,
            AssertionError,
        ) as error:
            raise Unsure(str(error)) from error
        self._check()
        return result

    def _check(self) -> None:
        size = os.fstat(2).st_size
        if size == self._heard:
            return
        text = os.pread(2, min(size - self._heard, 1 << 16), self._heard).decode("utf-8", "replace")
        self._heard = size
        words = next((line for line in text.splitlines() if line and not _HARMLESS.search(line)), None)
        if words is not None:
            raise Unsure(words)


def reads_right(
    file: VideoFile, facts: dict, pixel_format: str, table: PacketTable, expected: np.ndarray, threads: int
) -> bool:
    """Whether decord's frame table is that of the packets, and its first frame PyAV's to the last bit.

    Args:
        file: the file.
        facts: of the probe: width, height, time_base, first_ticks.
        pixel_format: FFmpeg's name of the frames'.
        table: of the packets.
        expected: (336, 336, 3) uint8, the first frame as PyAV gives it.
        threads: of the decoder.
    """
    large = facts["width"] * facts["height"] > MAX_PIXELS or file.size > MAX_BYTES
    if large or len(table.ticks) > MAX_FRAMES or pixel_format not in PIXEL_FORMATS:
        return False
    try:
        with Reader(file, threads) as reader:
            if len(reader) != len(table.ticks):
                return False
            seconds = (np.array(table.ticks) - facts["first_ticks"]) * float(facts["time_base"])
            allowed = FRAME_SECONDS + seconds * 2.0**-22
            # Of an open group of pictures decord takes the place in the file for the rank.
            if reader.keyframes() != table.keyframe_ranks():
                return False
            if np.any(np.abs(reader.start_seconds() - reader.start_seconds()[0] - seconds) > allowed):
                return False
            frame = reader.read()
    except Unsure:
        return False
    right_size = frame.shape[:2] == (facts["height"], facts["width"])
    return right_size and np.array_equal(model_pixels(frame), expected)


def decode(task: DecodeTask) -> Iterator[KeptFrame]:
    """The segment's kept frames, in order; pictures are StoredPicture.

    Raises:
        Unsure: PyAV must decode the segment; what came before is right.
    """
    file, probe, segment = task.file, task.probe, task.segment
    with OpenVideo(file, task.max_pixels, task.threads) as video:
        table = scan_packets(video, task.alive)
    start, end = segment.start_ticks, segment.end_ticks
    ends = [*table.ticks[1:], table.end_ticks]
    if not table.plain or not table.ticks or (start is not None and start not in table.ticks):
        raise Unsure("the packets are not those of the probe")

    def frames(reader: Reader) -> Iterator[TimedFrame]:
        for ticks, end_ticks in zip(table.ticks, ends, strict=True):
            task.alive()
            yield TimedFrame(ticks, end_ticks - ticks, reader.read())

    with Reader(file, task.threads) as reader:
        if len(reader) != len(table.ticks):
            raise Unsure("its frame table is not that of the packets")
        takes = Grid.of(probe, task.fps).takes
        yield from sample(frames(reader), takes, start, end, segment.first_index, store_form, Tally())
        if end is None:
            reader.check_end()
