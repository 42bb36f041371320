"""Whether a segment is whole, and the reason where it is not: from what was noticed while it was read."""

from collections.abc import Sequence

from storage.errors import VideoProblem
from storage.records import Reason
from workers.decode.clock import RESTART_SECONDS
from workers.decode.damage import Damage
from workers.decode.open_video import DecodeTask, OpenVideo
from workers.decode.sample import Tally
from workers.decode.structure import cut_short
from workers.decode.transport import find_losses

_PROBED_BYTES = 8 << 20  # more than the 5 MB that FFmpeg reads to find the streams


def problem_of_segment(
    task: DecodeTask, damage: Damage, tally: Tally | None, restarts: Sequence[int] = ()
) -> VideoProblem | None:
    """The problem of a segment that was read; tally is None if not every frame was decoded."""
    problem = _damage_of(task, damage, tally)
    if not restarts:
        return problem
    shown = ", ".join(f"{float(task.probe.time_seconds(ticks)):.1f} s" for ticks in restarts[:3])
    more = f" and {len(restarts) - 3} more times" if len(restarts) > 3 else ""
    restarted = f"its clock restarts at {shown}{more}; the frames after a restart follow those before it without a gap"
    if problem is None:
        return VideoProblem(Reason.CLOCK_RESTARTED, restarted)
    return VideoProblem(problem.reason, f"{problem.detail}; {restarted}")


def look_for_losses(video: OpenVideo, damage: Damage) -> None:
    """Notes missing packets of a transport stream; FFmpeg also calls packets incomplete that are whole."""
    # Where FFmpeg looks for the streams, at the file's start, it does not report every incomplete packet.
    losses = find_losses(video.file, video.stream.id, video.file.size if damage.suspect_count else _PROBED_BYTES)
    if losses.count:
        damage.note(None, f"packets are missing at byte {losses.first_byte}")
    elif damage.suspect_count > losses.joins:
        damage.note(None, "a packet is incomplete")


def _damage_of(task: DecodeTask, damage: Damage, tally: Tally | None) -> VideoProblem | None:
    probe, segment = task.probe, task.segment
    if damage.end is not None:
        return damage.end
    missing = cut_short(task.source.file) if segment.end_ticks is None else None
    if missing is not None:
        return VideoProblem(Reason.TRUNCATED, f"the file is cut short: {missing}")
    details = damage.before(segment.end_ticks)
    if details:
        return VideoProblem(Reason.CORRUPT, f"damaged in {len(details)} places, first: {details[0]}")
    if tally is None:
        return None
    if tally.jump_ticks * probe.time_base > RESTART_SECONDS:
        back, at = float(tally.jump_ticks * probe.time_base), float(probe.time_seconds(tally.jump_at_ticks))
        detail = f"frame times go back by {back:.1f} s at {at:.1f} s; frames with such times are left out"
        return VideoProblem(Reason.CORRUPT, detail)
    expected = None if segment.end_ticks is None else dict(probe.cuts).get(segment.end_ticks)
    if expected is not None and tally.frame_count != expected - segment.first_index:
        wanted = expected - segment.first_index
        return VideoProblem(Reason.CORRUPT, f"only {tally.frame_count} of {wanted} frames can be decoded")
    return None
