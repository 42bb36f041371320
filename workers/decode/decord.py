"""Reading frames through decord, on request, from MP4 and Matroska files on which it gives the same frames as PyAV.

decord gives frames by rank, without times. So the times come from a pass over the packets. decord does not report
damage reliably. So any error, and any line that FFmpeg writes to stderr, ends its part, and PyAV takes over.

Frames are read in order from the file's first one, without seeking: decord2 3.4 lands one keyframe late in files whose
first presentation time is above their first decoding time, also where `skip_frames` crosses a keyframe.

decord takes no file object. It reads the open file as descriptor 0, through FFmpeg's `fd:`.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import decord
import numpy as np

from workers.decode.clock import TimedFrame
from workers.decode.open_video import DecodeTask, OpenVideo, VideoInput
from workers.decode.packets import PacketTable, scan_packets
from workers.decode.picture import model_pixels

PIXEL_FORMATS = ("yuv420p", "yuvj420p")  # on other formats its RGB differs from PyAV's
MAX_PIXELS = 3840 * 2160  # it holds several RGB copies of a frame
MAX_BYTES = 128 << 20  # it reads the whole file into memory
MAX_FRAMES = 9000  # every segment is read from the file's first frame on
FRAME_SECONDS = 0.002  # by which its times, float32 seconds from the first frame, may differ
# At this level FFmpeg reports damage that it conceals; decord itself ignores it.
decord.logging.set_level(decord.logging.INFO)
# Lines that FFmpeg writes about undamaged files: a frame states colours that the container does not state.
_HARMLESS = re.compile(
    r"Changing video frame properties on the fly|deprecated pixel format used"
    r"|filter context - w: (\d+) h: (\d+) fmt: (\d+) .*incoming frame - w: \1 h: \2 fmt: \3 "
)
_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration, AssertionError)


class Unreliable(Exception):
    """decord failed, or reported something; PyAV has to decode the segment."""


class Reader:
    """decord on an open file; gives all frames in order. A context manager.

    Raises:
        Unreliable: decord raises, or FFmpeg inside it writes to stderr.
    """

    def __init__(self, source: VideoInput):
        self._reported_bytes = os.fstat(2).st_size  # stderr is a file, which the owner reads after a crash
        self._stdin = os.dup(0)
        os.dup2(source.file.descriptor, 0)
        os.lseek(0, 0, os.SEEK_SET)
        try:
            self._reader = self._guarded(decord.VideoReader, "fd:", decord.cpu(0), -1, -1, source.threads)
        except Unreliable:
            self.__exit__()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader = None
        os.dup2(self._stdin, 0)
        os.close(self._stdin)

    def agrees(self, table: PacketTable, time_base: float) -> bool:
        """Whether decord lists the same frames, times and keyframes as a pass over the packets."""
        if len(self._reader) != len(table.ticks):
            return False
        # In open groups of pictures decord counts keyframes by their place in the file, not in presentation order.
        if self._reader.get_key_indices() != np.searchsorted(table.ticks, table.keyframes).tolist():
            return False
        found = self._reader.get_frame_timestamp(np.arange(len(table.ticks)))[:, 0].astype(np.float64)
        seconds = (np.array(table.ticks) - table.ticks[0]) * time_base
        return bool(np.all(np.abs(found - found[0] - seconds) <= FRAME_SECONDS + seconds * 2.0**-22))

    def read(self) -> np.ndarray:
        """The next frame, (height, width, 3) uint8 RGB."""
        frame = self._guarded(self._reader.next).asnumpy()
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise Unreliable(f"a frame of shape {frame.shape}")
        return frame

    def check_end(self) -> None:
        """Raises Unreliable if there are more frames."""
        try:
            self.read()
        except Unreliable as error:
            if isinstance(error.__cause__, (StopIteration, decord.DECORDLimitReachedError)):
                return
            raise
        raise Unreliable("there are more frames than packets")

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = call(*arguments)
        except _ERRORS as error:
            raise Unreliable(str(error)) from error
        size = os.fstat(2).st_size
        reported = os.pread(2, min(size - self._reported_bytes, 1 << 16), self._reported_bytes)
        self._reported_bytes = size
        for line in reported.decode("utf-8", "replace").splitlines():
            if line and not _HARMLESS.search(line):
                raise Unreliable(line)
        return result


def reads_right(source: VideoInput, facts: dict, pixel_format: str, table: PacketTable, expected: np.ndarray) -> bool:
    """Whether decord gives the same frames as PyAV, by its list of frames and by its first frame.

    Args:
        facts: of the probe: width, height, time_base.
        pixel_format: of the frames, by FFmpeg's name.
        expected: (336, 336, 3) uint8, the first frame as PyAV gives it.
    """
    size = facts["height"], facts["width"]
    is_large = size[0] * size[1] > MAX_PIXELS or source.file.size > MAX_BYTES or len(table.ticks) > MAX_FRAMES
    if is_large or pixel_format not in PIXEL_FORMATS:
        return False
    try:
        with Reader(source) as reader:
            if not reader.agrees(table, float(facts["time_base"])):
                return False
            first = reader.read()
    except Unreliable:
        return False
    return first.shape[:2] == size and np.array_equal(model_pixels(first), expected)


def read_frames(task: DecodeTask) -> Iterator[TimedFrame]:
    """All frames of the file, in presentation order; pictures are (height, width, 3) uint8 RGB.

    Raises:
        Unreliable: PyAV must decode the segment; the frames before are right.
    """
    with OpenVideo(task.source) as video:
        table = scan_packets(video)
    start = task.segment.start_ticks
    if not table.plain or not table.ticks or (start is not None and start not in table.ticks):
        raise Unreliable("the packets are not those of the probe")
    with Reader(task.source) as reader:
        if not reader.agrees(table, float(task.probe.time_base)):
            raise Unreliable("its list of frames is not that of the packets")
        for ticks, end_ticks in zip(table.ticks, [*table.ticks[1:], table.end_ticks], strict=True):
            task.source.alive()
            yield TimedFrame(ticks, end_ticks - ticks, reader.read())
        reader.check_end()
