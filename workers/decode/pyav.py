"""Decoding through PyAV: all supported formats, with exact times; all damage is reported."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter

from storage.errors import VideoProblem
from storage.records import Choice, Reason
from workers.decode.clock import BestEffortClock, OneClock, TimedFrame
from workers.decode.damage import Damage, DamageWatch, damage_message
from workers.decode.encryption import ENCRYPTED_DETAIL, is_encrypted
from workers.decode.open_video import DecodeTask, OpenVideo, check_pixels, check_refused_size, out_of_memory
from workers.decode.packets import PacketTable, can_cut, is_header, scan_packets
from workers.decode.picture import Orientation, StoredPicture, store_form
from workers.decode.sample import Grid, KeptFrame, Spaced, Tally, sample
from workers.decode.verdict import look_for_losses, problem_of_segment

_MATRIX_BYTES = 9 * 4


def read_frames(
    video: OpenVideo,
    damage: Damage,
    start_ticks: int | None = None,
    packets: Iterator[av.Packet] | None = None,
) -> Iterator[TimedFrame]:
    """All frames in the decoder's order, from start_ticks or a little earlier; pictures are PyAV's VideoFrame.

    An error in a packet is added to `damage`, and decoding continues with the next packet, as in a player.

    Args:
        video: at its beginning, or after `seek`.
        damage: filled while frames are read.
        start_ticks: damage before this time is not noted. Frames before it may lack their references after a seek.
        packets: what to decode; None: all packets from the file's position on.
    Raises:
        VideoProblem: a frame has more than max_pixels or does not fit into memory, or the video is encrypted.
    """
    clock = BestEffortClock()
    has_pts = video.format_name != "avi"  # FFmpeg 8 invents them for AVI, in decoding order
    watch = DamageWatch(damage, start_ticks, video.format_name == "mpegts")
    end_ticks: int | None = None  # of the frame before
    locked = None
    for packet in itertools.chain(packets or video.packets(damage), [None]):  # None drains the decoder
        if packet is not None and is_encrypted(packet):
            locked, packet = packet, None
        frames, trouble = _decode(video, packet)
        watch.packet(packet, _shown_ticks(packet), trouble)
        for frame in frames:
            check_pixels(frame.width, frame.height, video.max_pixels)
            shown_ticks = clock.ticks(frame.pts if has_pts else None, frame.dts)
            if shown_ticks is None:  # among the last frames of a file without presentation times
                shown_ticks = (video.stream.start_time or 0) if end_ticks is None else end_ticks
            duration = _duration(video, frame)
            watch.frame(frame.pts, shown_ticks, frame.is_corrupt)
            end_ticks = shown_ticks + duration
            yield TimedFrame(shown_ticks, duration, frame)
        if locked is not None:
            raise _encrypted_from(video, _shown_ticks(locked), end_ticks)


def _shown_ticks(packet: av.Packet | None) -> int | None:
    if packet is None:
        return None
    return packet.dts if packet.pts is None else packet.pts


def _decode(video: OpenVideo, packet: av.Packet | None) -> tuple[list[av.VideoFrame], str | None]:
    """The frames that a packet completes, and what FFmpeg says of its damage, if anything.

    Raises:
        VideoProblem: a frame has more than max_pixels or does not fit into memory.
    """
    video.lines.clear()
    context = video.stream.codec_context
    try:
        return context.decode(packet), damage_message(video.lines)
    except EOFError:
        return [], None
    except av.error.MemoryError as error:
        raise out_of_memory() from error
    except av.FFmpegError as error:
        check_refused_size(video.lines, video.max_pixels)
        if packet is not None and is_header(context.codec.canonical_name, packet):
            return [], None
        words = [line[2].strip() for line in video.lines]
        return [], words[0] if words else f"a packet cannot be decoded: {error.strerror}"


def _encrypted_from(video: OpenVideo, ticks: int | None, end_ticks: int | None) -> VideoProblem:
    if end_ticks is None:
        return VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
    at = float((end_ticks if ticks is None else ticks) * video.time_base)
    return VideoProblem(Reason.ENCRYPTED, f"the video is encrypted from {at:.1f} s on, and vidx has no key for it")


def _duration(video: OpenVideo, frame: av.VideoFrame) -> int:
    """The duration that the frame states, else that of one frame at the stream's rate."""
    if frame.duration:
        return frame.duration
    rate = video.stream.average_rate or video.stream.guessed_rate
    return int(1 / (rate * video.time_base)) if rate else 1


def seek(video: OpenVideo, ticks: int) -> None:
    """Moves to a keyframe at or before a presentation time.

    Some formats seek by decoding time and land too late. Then an earlier place is tried, down to the file's beginning.
    """
    container, stream = video.container, video.stream
    back = 0
    while ticks - back > (stream.start_time or 0):
        try:
            container.seek(ticks - back, stream=stream, backward=True)
            landed = next((packet for packet in container.demux(stream) if packet.size), None)
        except av.FFmpegError:
            landed = None
        if landed is not None and landed.is_keyframe and landed.pts is not None and landed.pts <= ticks:
            container.seek(ticks - back, stream=stream, backward=True)
            return
        back = max(2 * back, int(1 / video.time_base))
    container.seek(min(0, stream.start_time or 0), stream=stream, backward=True)


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """A frame as (height, width, 3) uint8 RGB, turned upright; a view."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = rgb.planes[0]
    shape, strides = (rgb.height, rgb.width, 3), (plane.line_size, 3, 1)  # rows may be padded
    pixels = np.ndarray(shape, np.uint8, memoryview(plane), strides=strides)
    return orientation(frame).apply(pixels)


def orientation(frame: av.VideoFrame) -> Orientation:
    """How a frame's pixels are turned to be shown."""
    for data in cast("Iterable[SideData]", frame.side_data):
        if data.type.name == "DISPLAYMATRIX" and len(bytes(data)) >= _MATRIX_BYTES:
            return Orientation.of_display_matrix(tuple(np.frombuffer(bytes(data), np.int32).tolist()))
    return Orientation()


class FrameStorer:
    """Converts PyAV's frames to the stored form; keeps its colour converter from frame to frame."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> StoredPicture:
        """Pixels for the model, and a thumbnail."""
        return store_form(to_rgb(frame, self._reformatter))


def decode(task: DecodeTask) -> Iterator[KeptFrame]:
    """The chosen frames of a segment, in order; pictures are StoredPicture.

    Raises:
        VideoProblem: the segment is not whole; raised after its last good frame.
    """
    start, end = task.segment.start_ticks, task.segment.end_ticks
    if task.choice is Choice.KEYFRAMES and can_cut(task.probe.container, task.probe.codec):
        with OpenVideo(task.source) as video:
            if start is not None:
                seek(video, start)
            table = scan_packets(video, start, end)
        if table.plain and table.entries == table.keyframes and table.ticks[:1] == table.entries[:1]:
            yield from _decode_keyframes(task, table)
            return
    damage, tally = Damage(), Tally()
    clock = OneClock(task.probe.time_base, task.probe.container)
    with OpenVideo(task.source) as video:
        if start is not None:
            seek(video, start)
        frames = clock.place(_until_problem(read_frames(video, damage, start), damage))
        yield from kept_frames(task, frames, FrameStorer(), tally)
        if video.format_name == "mpegts" and not damage.marks:
            look_for_losses(video, damage)
    problem = problem_of_segment(task, damage, tally, clock.restarts)
    if problem is not None:
        raise problem


def kept_frames(
    task: DecodeTask, frames: Iterable[TimedFrame], convert: Callable[[Any], StoredPicture], tally: Tally
) -> Iterator[KeptFrame]:
    """The frames that a task's fps and choice keep; all arguments as `sample` takes them."""
    step, end = 1 / (task.fps * task.probe.time_base), task.segment.end_ticks
    takes: Callable[[TimedFrame, int], bool]
    if task.choice is Choice.KEYFRAMES:
        takes = Spaced(step, end, lambda frame: bool(frame.picture.key_frame)).takes
    elif task.choice is Choice.SCENES:
        from workers.decode.scenes import SceneStarts  # needs the extra `scenes`

        takes = Spaced(step, end, SceneStarts(), may_be_late=True).takes
    else:
        takes = Grid.of(task.probe, task.fps).takes
    return sample(frames, takes, task.segment, convert, tally)


def _decode_keyframes(task: DecodeTask, table: PacketTable) -> Iterator[KeptFrame]:
    """The segment's keyframes, without decoding the frames between them; damage there is not found."""
    start, end = task.segment.start_ticks, task.segment.end_ticks
    spaced = Spaced(1 / (task.fps * task.probe.time_base), None, lambda frame: True)
    wanted = [at for at in sorted(table.entries) if spaced.takes(TimedFrame(at, 0, None))]
    ends = dict(zip(wanted, [*wanted[1:], table.end_ticks if end is None else end], strict=True))
    damage, store = Damage(), FrameStorer()
    with OpenVideo(task.source) as video:
        video.stream.codec_context.skip_frame = "NONKEY"
        if start is not None:
            seek(video, start)
        for frame in _until_problem(read_frames(video, damage, start), damage):
            if frame.ticks in ends:
                rank = task.segment.first_index + bisect.bisect_left(table.ticks, frame.ticks)
                yield KeptFrame(frame.ticks, ends.pop(frame.ticks), rank, store(frame.picture))
            if not ends:
                break
    if damage.end is None and ends:
        damage.note(None, f"{len(ends)} of {len(wanted)} keyframes cannot be decoded")
    problem = problem_of_segment(task, damage, None)
    if problem is not None:
        raise problem


def _until_problem(frames: Iterator[TimedFrame], damage: Damage) -> Iterator[TimedFrame]:
    """The frames before a problem; the problem is kept in `damage`, so that the last frames are still given."""
    try:
        yield from frames
    except VideoProblem as problem:
        damage.end = problem
