"""edl: moments -> an edit decision list in the format CMX 3600, which most video editors read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.text import encodable, printable
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Moment

MOST_EVENTS = 999  # an event's number has three digits
RECORD_START_HOURS = 1  # the usual start of the first event in the programme
SAME_RATE = 5e-4  # relative difference below which rates are equal; that of 24 and 23.976, or 30 and 29.97, is twice it


@dataclass(frozen=True)
class Timebase:
    """A rule for counting frames as hours, minutes, seconds and frames (SMPTE 12M).

    Attributes:
        rate: frames per second.
        nominal: frames per second of the count.
        dropped: numbers that are skipped each minute, except each tenth, so that the count agrees with the clock at
            29.97 and 59.94 frames per second; otherwise 0.
    """

    rate: Fraction
    nominal: int
    dropped: int

    def timecode(self, frame: int) -> str:
        """The timecode of a frame, counted from 0; it has a `;` before the frames if numbers are skipped."""
        tens, rest = divmod(frame, 600 * self.nominal - 9 * self.dropped)
        minutes = max(0, rest - 60 * self.nominal) // (60 * self.nominal - self.dropped)
        left_out = 9 * tens + minutes + (rest >= 60 * self.nominal)
        seconds, frames = divmod(frame + self.dropped * left_out, self.nominal)
        mark = ";" if self.dropped else ":"
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{mark}{frames:02d}"

    def frame_at(self, seconds: float) -> int:
        """The frame whose start is nearest to a position."""
        return max(0, math.floor(seconds * float(self.rate) + 0.5))


TIMEBASES = (
    Timebase(Fraction(24000, 1001), 24, 0),
    Timebase(Fraction(24), 24, 0),
    Timebase(Fraction(25), 25, 0),
    Timebase(Fraction(30000, 1001), 30, 2),
    Timebase(Fraction(30), 30, 0),
    Timebase(Fraction(50), 50, 0),
    Timebase(Fraction(60000, 1001), 60, 4),
    Timebase(Fraction(60), 60, 0),
)
_ANY = Timebase(Fraction(30), 30, 0)  # for rates that are not a multiple or a fraction of a usual rate


def timebase_of(rate: float) -> Timebase:
    """The timebase for a video's rate: the nearest usual rate that is a multiple or a fraction of it."""

    def steps(base: Timebase) -> float:
        return max(rate / base.rate, base.rate / rate)

    in_step = [base for base in TIMEBASES if abs(steps(base) / round(steps(base)) - 1) < SAME_RATE]
    return min(in_step, key=steps, default=_ANY)


def edl(title: str, moments: Sequence[Moment], rates: Sequence[float]) -> str:
    """An edit decision list with one event per moment, one after the other.

    The frames of a file are counted from 0. The reel is AX, as usual for files; comments name the file of each event.

    Args:
        rates: frames per second of each moment's video.
    Raises:
        UsageError: there are too many moments or several frame rates, or a time is above 24 hours.
    """
    if len(moments) > MOST_EVENTS:
        raise UsageError(f"{len(moments)} moments: an EDL can hold {MOST_EVENTS}; use --top {MOST_EVENTS}")
    bases = {timebase_of(rate) for rate in rates}
    if len(bases) > 1:
        of = " and ".join(f"{float(base.rate):.5g}" for base in sorted(bases, key=lambda base: base.rate))
        raise UsageError(
            f"an EDL has one frame rate, but these videos have {of} frames per second; choose videos of one rate with "
            "--video or --where, or write .otio, which can hold several"
        )
    (base,) = bases
    lines = [f"TITLE: {_one_line(title)[:70]}", f"FCM: {'DROP FRAME' if base.dropped else 'NON-DROP FRAME'}", ""]
    record = base.frame_at(RECORD_START_HOURS * 3600)
    for number, moment in enumerate(moments, start=1):
        start = base.frame_at(moment.start_seconds)
        end = max(start + 1, base.frame_at(moment.end_seconds))
        cut = (start, end, record, record + end - start)
        record = cut[-1]
        times = [base.timecode(frame) for frame in cut]
        if max(times) >= "24":
            raise UsageError(f"{source_text(moment.uri)}: an EDL ends at 24 hours; write .otio, which has no limit")
        source = _one_line(source_text(moment.uri))
        lines.append(f"{number:03d}  AX       V     C        {' '.join(times)}")
        lines += [f"* FROM CLIP NAME: {source.rsplit('/', 1)[-1]}", f"* SOURCE FILE: {source}", ""]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return printable(encodable(text))
