"""Probe: a video's stream, its clock, and the places where it can be cut; runs in the decoder process."""

import itertools
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from storage.errors import VideoProblem
from storage.records import Probe, Reason
from workers.decode.clock import TimedFrame
from workers.decode.creation_time import creation_time
from workers.decode.damage import Damage
from workers.decode.encryption import ENCRYPTED_DETAIL, looks_encrypted
from workers.decode.open_video import OpenVideo, VideoInput
from workers.decode.packets import CUT_FORMATS, PacketTable, can_cut, scan_packets
from workers.decode.picture import Orientation
from workers.decode.pyav import FrameStorer, orientation, read_frames
from workers.decode.structure import cut_short, refuse_others

HEAD_FRAMES = 24  # decoded to check that packets and frames agree
HEAD_PIXELS = 60_000_000  # fewer large frames are decoded, because they take long
CUT_SECONDS = 1  # least distance of cuts; a file of keyframes alone would list every frame
# Containers whose clock does not start at 0: a player shows the container's start as 0.
_FREE_CLOCKS = {"mpegts", "mpeg", "ogg"}


def probe(source: VideoInput, library: str = "pyav") -> Probe:
    """Size, codec, clock and possible cuts of a file's video stream.

    Args:
        library: "decord" to choose it for files on which it gives the same frames as PyAV.
    Raises:
        VideoProblem: the file is no video, has no video stream, or has no whole frame that can be decoded.
    """
    refuse_others(source.file)
    with OpenVideo(source) as video:
        head = _read_head(video)
        first = head[0].picture
        turn = orientation(first)
        offset = _clock_offset(video, head[0].ticks)
        stream, context = video.stream, video.stream.codec_context
        upright = (first.height, first.width) if turn.transpose else (first.width, first.height)
        facts: dict[str, Any] = {
            "container": video.format_name,
            "codec": context.codec.canonical_name,
            "stream_index": stream.index,
            "width": upright[0],
            "height": upright[1],
            "rotation_degrees": turn.rotation_degrees,
            "time_base": video.time_base,
            "first_ticks": head[0].ticks,
            "clock_offset_seconds": offset,
            "duration_seconds": _duration(video, offset),
            "created_at": creation_time((video.container.metadata, stream.metadata), datetime.now(UTC)),
        }
        head_ticks = [frame.ticks for frame in head]
        for_decord = library == "decord" and turn == Orientation() and facts["container"].startswith(CUT_FORMATS)
        pixel_format, picture = first.format.name, FrameStorer()(first).pixels if for_decord else None
        head.clear()
        del first
    with OpenVideo(source) as video:
        table = scan_packets(video)
    whole = table.plain and table.ticks[: len(head_ticks)] == head_ticks and cut_short(source.file) is None
    cuts = _space_out(table, facts["time_base"]) if whole and can_cut(facts["container"], facts["codec"]) else ()
    decoder = "pyav"
    if whole and picture is not None:
        from workers.decode.decord import reads_right  # loads the library, which most jobs do not need

        decoder = "decord" if reads_right(source, facts, pixel_format, table, picture) else "pyav"
    return Probe(decoder=decoder, cuts=cuts, **facts)


def _read_head(video: OpenVideo) -> list[TimedFrame]:
    """The first frames; if none of them is whole, reading continues up to one that is.

    Raises:
        VideoProblem: no frame is whole.
    """
    damage = Damage()
    frames = read_frames(video, damage)
    first = next(frames, None)
    if first is None:
        raise _no_frames(video, damage)
    pixels = max(1, first.picture.width * first.picture.height)
    head = [first, *itertools.islice(frames, max(2, min(HEAD_FRAMES, HEAD_PIXELS // pixels)) - 1)]
    has_whole_picture = damage.has_whole_picture or any(damage.has_whole_picture for _ in frames)
    if damage.first_detail is not None and looks_encrypted(video.file):  # encrypted data can decode to noise
        raise VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
    if not has_whole_picture:
        detail = f"every frame is damaged; the first damage: {damage.first_detail}"
        raise VideoProblem(Reason.CORRUPT, detail)
    return head


def _no_frames(video: OpenVideo, damage: Damage) -> VideoProblem:
    missing = cut_short(video.file)
    if missing is not None:
        return VideoProblem(Reason.TRUNCATED, f"the file is cut short before its first frame: {missing}")
    if looks_encrypted(video.file):
        return VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
    if damage.first_detail is None:
        return VideoProblem(Reason.NO_FRAMES, "the video stream has no frames")
    return VideoProblem(Reason.CORRUPT, f"no frame can be decoded: {damage.first_detail}")


def _clock_offset(video: OpenVideo, first_ticks: int) -> float:
    if video.format_name not in _FREE_CLOCKS:
        return 0.0
    start = video.container.start_time  # microseconds
    return start / 1e6 if start is not None else float(first_ticks * video.time_base)


def _duration(video: OpenVideo, offset: float) -> float | None:
    """The end of the video on a player's clock; FFmpeg 8 counts an MP4's duration from its first frame, not from 0."""
    container, stream = video.container, video.stream
    if container.duration is not None:
        return ((container.start_time or 0) + container.duration) / 1e6 - offset
    return None if stream.duration is None else float(stream.duration * video.time_base)


def _space_out(table: PacketTable, time_base: Fraction) -> tuple[tuple[int, int], ...]:
    """Entries at least CUT_SECONDS apart, as (ticks, rank); without the first frame."""
    ranks = {ticks: rank for rank, ticks in enumerate(table.ticks)}
    cuts, last = [], table.ticks[0]
    for ticks in sorted(table.entries):
        if (ticks - last) * time_base >= CUT_SECONDS:
            cuts.append((ticks, ranks[ticks]))
            last = ticks
    return tuple(cuts)
