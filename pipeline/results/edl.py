"""edl: moments as an edit decision list in the form of CMX 3600, which most video editors read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.results.text import encodable, printable
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Moment

MOST_EVENTS = 999  # an event's number has three digits
RECORD_START_HOURS = 1  # where the first event begins in the programme, by custom
_SAME = 5e-4  # of rates that are taken for the same: 24 and 23.976, or 30 and 29.97, lie twice as far apart


@dataclass(frozen=True)
class Timebase:
    """How frames are counted as hours, minutes, seconds and frames (SMPTE 12M).

    Attributes:
        rate: frames a second.
        nominal: frames that a second of the count has.
        dropped: numbers that each minute leaves out but every tenth, so that the count keeps up with the clock at 29.97
            and 59.94 frames a second; 0 elsewhere.
    """

    rate: Fraction
    nominal: int
    dropped: int

    def timecode(self, frame: int) -> str:
        """The count of a frame, the first one being 0; `;` before the frames where numbers are left out."""
        tens, rest = divmod(frame, 600 * self.nominal - 9 * self.dropped)
        minutes = max(0, rest - 60 * self.nominal) // (60 * self.nominal - self.dropped)
        left_out = 9 * tens + minutes + (rest >= 60 * self.nominal)
        seconds, frames = divmod(frame + self.dropped * left_out, self.nominal)
        mark = ";" if self.dropped else ":"
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{mark}{frames:02d}"

    def frame_at(self, seconds: float) -> int:
        """The frame that begins nearest to a position."""
        return max(0, math.floor(seconds * float(self.rate) + 0.5))


_TIMEBASES = (
    Timebase(Fraction(24000, 1001), 24, 0),
    Timebase(Fraction(24), 24, 0),
    Timebase(Fraction(25), 25, 0),
    Timebase(Fraction(30000, 1001), 30, 2),
    Timebase(Fraction(30), 30, 0),
    Timebase(Fraction(50), 50, 0),
    Timebase(Fraction(60000, 1001), 60, 4),
    Timebase(Fraction(60), 60, 0),
)
_ANY = Timebase(Fraction(30), 30, 0)  # for rates that are no usual one's part or multiple


def timebase_of(rate: float) -> Timebase:
    """What frames of a video are counted by: its own rate, else the nearest usual one that is in step with it."""

    def steps(base: Timebase) -> float:
        return max(rate / base.rate, base.rate / rate)

    in_step = [base for base in _TIMEBASES if abs(steps(base) / round(steps(base)) - 1) < _SAME]
    return min(in_step, key=steps, default=_ANY)


def edl(title: str, moments: Sequence[Moment], rates: Sequence[float]) -> str:
    """One event for each moment, best first and one after the other, cut from the files that they lie in.

    A file's frames are counted from 0. The reel is AX, as of files that have none; each event's comments name its file.

    Args:
        title: of the list.
        moments: at most MOST_EVENTS.
        rates: frames a second of each moment's video.
    Raises:
        UsageError: too many moments, videos of several rates, or a time that no such list can hold.
    """
    if len(moments) > MOST_EVENTS:
        raise UsageError(f"{len(moments)} moments: an EDL holds {MOST_EVENTS}; ask for fewer with --top {MOST_EVENTS}")
    bases = {timebase_of(rate) for rate in rates}
    if len(bases) > 1:
        of = " and ".join(f"{float(base.rate):.5g}" for base in sorted(bases, key=lambda base: base.rate))
        raise UsageError(
            f"an EDL has one frame rate, and the moments are of videos of {of} frames a second; choose videos of one "
            "rate with --video or --where, or write .otio, which holds several"
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
            raise UsageError(f"{source_text(moment.uri)}: an EDL ends at 24 hours; write .otio, which does not")
        source = _one_line(source_text(moment.uri))
        lines.append(f"{number:03d}  AX       V     C        {' '.join(times)}")
        lines += [f"* FROM CLIP NAME: {source.rsplit('/', 1)[-1]}", f"* SOURCE FILE: {source}", ""]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return printable(encodable(text))
