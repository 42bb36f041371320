"""Presentation times of decoded frames, on one clock from a video's first frame to its last."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

RESTART_SECONDS = 1  # a clock that goes back by more has restarted; by less, only single times are wrong
LEAP_SECONDS = 10  # least jump forward of a wrapped clock that has restarted; the ffmpeg command's threshold
# MPEG clocks have 33 bits. FFmpeg adds 2**33 to times far below the first one. So a clock that restarts there seems
# to jump forward. Source: ISO/IEC 13818-1, 2.4.3.7; libavformat's update_wrap_reference.
_WRAP_TICKS = {"mpegts": 1 << 33, "mpeg": 1 << 33}


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame: presentation time and duration in ticks, and the picture as the decoder gives it."""

    ticks: int
    duration_ticks: int
    picture: Any

    @property
    def end_ticks(self) -> int:
        """The end of the frame, by its own duration."""
        return self.ticks + max(self.duration_ticks, 1)


class BestEffortClock:
    """Presentation times as ffprobe's best_effort_timestamp, which PyAV does not give.

    Source: FFmpeg, libavcodec/decode.c, guess_correct_pts: of pts and dts, the one that went back less often.
    """

    def __init__(self):
        self._last_pts = self._last_dts = -(1 << 63)
        self._faulty_pts = self._faulty_dts = 0

    def ticks(self, pts: int | None, dts: int | None) -> int | None:
        """The time of the decoder's next frame; None if it has none."""
        if dts is not None:
            self._faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        elif pts is not None:
            self._last_dts = pts
        if pts is not None:
            self._faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        elif dts is not None:
            self._last_pts = dts
        if pts is not None and (self._faulty_pts <= self._faulty_dts or dts is None):
            return pts
        return dts


class OneClock:
    """Shifts the times after a restart of a file's clock, so that the frames follow those before it, as in a player.

    The clock restarts where recordings were joined, or where a device was switched off and on. A single frame with a
    wrong time is no restart; the next frame decides.

    Args:
        time_base: seconds per tick.
        container: FFmpeg's name of the format.

    Attributes:
        restarts: times of the restarts, in ticks of the shifted clock; the first thousand.
    """

    def __init__(self, time_base: Fraction, container: str):
        self._back = RESTART_SECONDS / time_base
        self._leap = LEAP_SECONDS / time_base
        self._wrap = _WRAP_TICKS.get(container)
        self.restarts: list[int] = []

    def place(self, frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        """The frames, with shifted times after each restart."""
        offset = 0
        before: TimedFrame | None = None  # the frame before `last`
        last: TimedFrame | None = None
        doubtful: TimedFrame | None = None  # either the clock restarts here, or only this time is wrong

        for frame in frames:
            if doubtful is not None and last is not None:
                # Is the frame's time closer to the end of the doubtful frame than to the end of the last good one?
                if abs(frame.ticks - doubtful.end_ticks) <= abs(frame.ticks - last.end_ticks):
                    offset += self._restart(last, doubtful, offset)
                    yield _later(doubtful, offset)
                    before, last = None, doubtful
                else:
                    yield _later(doubtful, offset)
                doubtful = None
            if last is not None and self._is_doubtful(before, last, frame):
                doubtful = frame
                continue
            yield _later(frame, offset)
            if last is None or frame.ticks > last.ticks:
                before = last
            last = frame
        if doubtful is not None and last is not None:
            offset += self._restart(last, doubtful, offset)
            yield _later(doubtful, offset)

    def _is_doubtful(self, before: TimedFrame | None, last: TimedFrame, frame: TimedFrame) -> bool:
        if frame.ticks < last.ticks - self._back:
            # If the frame fits after the one before `last`, only the time of `last` was wrong.
            return before is None or frame.ticks <= before.ticks
        if self._wrap is None or frame.ticks - last.end_ticks < self._leap:
            return False
        return frame.ticks % self._wrap < last.ticks % self._wrap

    def _restart(self, last: TimedFrame, first: TimedFrame, offset: int) -> int:
        """Notes a restart; returns the further shift of the frames from `first` on."""
        if len(self.restarts) < 1000:
            self.restarts.append(last.end_ticks + offset)
        return last.end_ticks - first.ticks


def _later(frame: TimedFrame, ticks: int) -> TimedFrame:
    return replace(frame, ticks=frame.ticks + ticks) if ticks else frame
