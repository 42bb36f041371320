"""Sampling: which frames of a segment are kept, and how long each one stands for the video."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from storage.records import Probe, Segment
from workers.decode.clock import TimedFrame


@dataclass(frozen=True)
class KeptFrame:
    """A frame that is stored, for the time [ticks, end_ticks); picture is the result of `convert`."""

    ticks: int
    end_ticks: int
    frame_index: int
    picture: Any


@dataclass(frozen=True)
class Grid:
    """The times first_ticks + k * step for k = 0, 1, 2 ..., in ticks, exact."""

    first_ticks: int
    step: Fraction

    @classmethod
    def of(cls, probe: Probe, fps: Fraction) -> "Grid":
        """A grid of fps times per second that begins at the video's first frame."""
        return cls(probe.first_ticks, 1 / (fps * probe.time_base))

    def takes(self, frame: TimedFrame, end_ticks: int) -> bool:
        """Whether one of the times is in [frame.ticks, end_ticks)."""
        step = self.step.numerator, self.step.denominator
        # The first k with first + k * step >= frame.ticks, by ceiling division in integers.
        k = max(0, -((self.first_ticks - frame.ticks) * step[1] // step[0]))
        return k * step[0] < (end_ticks - self.first_ticks) * step[1]


@dataclass
class Spaced:
    """Keyframes or first frames of scenes, at least a step apart; for one segment.

    The first frame of a segment is always kept.

    Attributes:
        step: ticks.
        end_ticks: of the segment; None: the video's end.
        begins: whether a frame is a keyframe or the first of a scene.
        may_be_late: if a scene begins too soon after the last kept frame, keep a frame of it once the step has passed.
    """

    step: Fraction
    end_ticks: int | None
    begins: Callable[[TimedFrame], bool]
    may_be_late: bool = False
    _last: int | None = None
    _late: bool = False

    def takes(self, frame: TimedFrame, _end_ticks: int = 0) -> bool:
        """Whether a frame is kept; must be called for every frame, in order."""
        if self.end_ticks is not None and frame.ticks >= self.end_ticks:
            return True
        begins = self.begins(frame) or self._late
        far = self._last is None or frame.ticks - self._last >= self.step
        self._late = self.may_be_late and begins and not far
        if self._last is None or (begins and far):
            self._last = frame.ticks
            return True
        return False


@dataclass
class Tally:
    """Counts of what `sample` has read.

    Attributes:
        frame_count: frames of the segment, kept or not.
        jump_ticks, jump_at_ticks: the largest step back of the frames' times, and the time at which it happened.
    """

    frame_count: int = 0
    jump_ticks: int = 0
    jump_at_ticks: int = 0


def sample(
    frames: Iterable[TimedFrame],
    takes: Callable[[TimedFrame, int], bool],
    segment: Segment,
    convert: Callable[[Any], Any],
    tally: Tally,
) -> Iterator[KeptFrame]:
    """The frames of a segment that are kept, in order.

    Frames behind the segment are read until the next kept frame is known, where the last kept one ends.

    Args:
        frames: all frames from the segment's start or earlier on, in presentation order.
        takes: whether a frame is kept; called once for each frame, with the time at which the next one is shown.
        segment: only its frames are kept.
        convert: called once for each kept frame.
        tally: filled while frames are read.
    """
    start_ticks, end_ticks = segment.start_ticks, segment.end_ticks
    waiting: KeptFrame | None = None  # kept, but its end is not known yet
    shown: TimedFrame | None = None  # its end is the time of the next frame
    shown_index = segment.first_index
    low_mark: int | None = None  # the time of the frame before `shown`
    index = segment.first_index - 1

    def keep(shown: TimedFrame, end: int) -> KeptFrame | None:
        if not takes(shown, end):
            return None
        inside = end_ticks is None or shown.ticks < end_ticks
        return KeptFrame(shown.ticks, end, shown_index, convert(shown.picture) if inside else None)

    for frame in frames:
        if start_ticks is not None and frame.ticks < start_ticks:
            continue
        index += 1
        tally.frame_count += end_ticks is None or frame.ticks < end_ticks
        if shown is not None and frame.ticks <= shown.ticks:
            # Times go back. If the new frame still comes after the frame before `shown`, it takes the place of
            # `shown`, whose time was wrong or the same. Else the new frame is left out.
            if shown.ticks - frame.ticks > tally.jump_ticks:
                tally.jump_ticks, tally.jump_at_ticks = shown.ticks - frame.ticks, shown.ticks
            if low_mark is None or frame.ticks > low_mark:
                shown, shown_index = frame, index
            continue
        if shown is not None:
            kept = keep(shown, frame.ticks)
            if kept is not None:
                if waiting is not None:
                    yield replace(waiting, end_ticks=kept.ticks)
                waiting = kept
            low_mark = shown.ticks
            if end_ticks is not None and shown.ticks >= end_ticks and (waiting is None or waiting.ticks >= end_ticks):
                return
        shown, shown_index = frame, index
    if shown is None:
        return
    kept = keep(shown, shown.end_ticks)
    if kept is not None:
        if waiting is not None:
            yield replace(waiting, end_ticks=kept.ticks)
        waiting = kept
    if waiting is not None and (end_ticks is None or waiting.ticks < end_ticks):
        yield replace(waiting, end_ticks=shown.end_ticks)
