"""Which frames are kept, each once, with the span it stands for: those at even instants, or where something begins."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from storage.records import Probe
from workers.decode.clock import TimedFrame


@dataclass(frozen=True)
class KeptFrame:
    """A frame that is stored, standing for [ticks, end_ticks); picture is what `convert` made of it."""

    ticks: int
    end_ticks: int
    frame_index: int
    picture: Any


@dataclass(frozen=True)
class Grid:
    """The instants first_ticks + k * step, k = 0, 1, 2 ..., in ticks, exactly."""

    first_ticks: int
    step: Fraction

    @classmethod
    def of(cls, probe: Probe, fps: Fraction) -> "Grid":
        """Instants at fps per second from the video's first frame on."""
        return cls(probe.first_ticks, 1 / (fps * probe.time_base))

    def takes(self, frame: TimedFrame, end_ticks: int) -> bool:
        """Whether an instant lies in [frame.ticks, end_ticks); never counts through the instants before."""
        step = self.step.numerator, self.step.denominator
        # The first k with first + k * step >= frame.ticks, by ceiling division in integers.
        k = max(0, -((self.first_ticks - frame.ticks) * step[1] // step[0]))
        return k * step[0] < (end_ticks - self.first_ticks) * step[1]


@dataclass
class Spaced:
    """Frames with which something begins, at least a step apart; for one segment.

    A segment's first frame is always one, and so is the next segment's.

    Attributes:
        step: ticks.
        end_ticks: of the segment; None: the video's end.
        begins: whether something begins with a frame.
        may_be_late: whether a beginning too soon after the last kept frame is kept as soon as the step has passed.
    """

    step: Fraction
    end_ticks: int | None
    begins: Callable[[TimedFrame], bool]
    may_be_late: bool = False
    _last: int | None = None
    _late: bool = False

    def takes(self, frame: TimedFrame, _end_ticks: int = 0) -> bool:
        """Whether a frame is kept; asked of every frame in order."""
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
    """What `sample` saw on its way.

    Attributes:
        frame_count: frames of the segment, kept or not.
        jump_ticks: the largest step back of the clock, and where it happened; frames before the clock's
            highest mark have no place on it and are not kept.
    """

    frame_count: int = 0
    jump_ticks: int = 0
    jump_at_ticks: int = 0


def sample(
    frames: Iterable[TimedFrame],
    takes: Callable[[TimedFrame, int], bool],
    start_ticks: int | None,
    end_ticks: int | None,
    first_index: int,
    convert: Callable[[Any], Any],
    tally: Tally,
) -> Iterator[KeptFrame]:
    """The segment's frames that are kept, in order.

    Reads on past end_ticks until it is known where the last kept frame's span ends; of the video's last
    frame that is its own end.

    Args:
        frames: all frames from start_ticks or earlier on, in presentation order.
        takes: whether a frame is kept, asked once of each together with the time at which the next is shown.
        start_ticks, end_ticks: the segment; None is open.
        first_index: rank of the segment's first frame.
        convert: called once for each kept frame, as soon as it is known to be kept.
        tally: filled in on the way.
    """
    waiting: KeptFrame | None = None  # kept, but the end of its span is not known yet
    shown: TimedFrame | None = None  # its own end is not known before the next frame
    shown_index = first_index
    low_mark: int | None = None  # the time before that of `shown`
    index = first_index - 1

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
            # A step back. Of two frames at one time the later one is shown; a single frame with a time far
            # ahead was wrong by itself; otherwise this frame has no place.
            _note_jump(tally, shown.ticks, frame.ticks)
            if low_mark is None or frame.ticks > low_mark:
                shown, shown_index = frame, index
            continue
        if shown is not None:
            kept = keep(shown, frame.ticks)
            if kept is not None:
                if waiting is not None:
                    yield _ending(waiting, kept.ticks)
                waiting = kept
            low_mark = shown.ticks
            if end_ticks is not None and shown.ticks >= end_ticks and (waiting is None or waiting.ticks >= end_ticks):
                return
        shown, shown_index = frame, index
    if shown is None:
        return
    end = shown.ticks + max(shown.duration_ticks, 1)
    kept = keep(shown, end)
    if kept is not None:
        if waiting is not None:
            yield _ending(waiting, kept.ticks)
        waiting = kept
    if waiting is not None and (end_ticks is None or waiting.ticks < end_ticks):
        yield _ending(waiting, end)


def _ending(frame: KeptFrame, end_ticks: int) -> KeptFrame:
    return KeptFrame(frame.ticks, end_ticks, frame.frame_index, frame.picture)


def _note_jump(tally: Tally, high_ticks: int, ticks: int) -> None:
    if high_ticks - ticks > tally.jump_ticks:
        tally.jump_ticks, tally.jump_at_ticks = high_ticks - ticks, high_ticks
