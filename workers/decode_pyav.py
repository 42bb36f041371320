"""Decoding through PyAV: every format on the list, with exact timestamps, and no damage unnoticed."""

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from storage.errors import VideoProblem
from storage.records import Choice, Probe, Reason
from workers.decode_open import Damage, DecodeTask, OpenVideo, check_pixels, check_refused_size, out_of_memory
from workers.packets import PacketTable, can_cut, scan_packets
from workers.picture import Orientation, StoredPicture, model_pixels, store_form
from workers.sample import Grid, KeptFrame, Spaced, Tally, TimedFrame, sample
from workers.structure import cut_short
from workers.video_file import VideoFile

# FFmpeg's own words for picture data that could not be read; other error lines (references that a cut left
# dangling, clocks) appear in files that play from end to end.
_DAMAGE = re.compile(
    r"error while decoding|concealing|damaged|corrupt|invalid mb|invalid nal|illegal|overread|ended prematurely"
    r"|missing picture|splitting the input|could not find ref|partial file|truncat|not all references|bytestream"
    r"|exceed.* (?:packet|data)|invalid (?:data|slice|start|block|as first byte)|slice mismatch",
    re.IGNORECASE,
)
JUMP_SECONDS = 1  # by which a clock may step back without being called damaged


def read_frames(
    video: OpenVideo, damage: Damage, alive: Callable[[], None], start_ticks: int | None = None
) -> Iterator[TimedFrame]:
    """All frames in the decoder's order, from start_ticks or a little earlier on.

    A frame's picture is PyAV's VideoFrame. Errors in single packets end up in `damage`, and decoding goes on
    behind them, as a player would.

    Args:
        video: at its beginning, or after `seek`.
        damage: filled in on the way.
        alive: called at every packet.
        start_ticks: damage before this time is not noted: the frames that a seek drops may lack their references.
    Raises:
        VideoProblem: a frame is larger than max_pixels or than memory allows.
    """
    context = video.stream.codec_context
    clock = _BestEffortClock()
    has_pts = video.format_name != "avi"  # FFmpeg 8 makes some up there, in decoding order; 5 did not
    after: int | None = None
    quiet = True  # until a first whole frame: a recording may begin in the middle of a group of pictures
    for packet in itertools.chain(video.packets(damage, alive), [None]):  # None drains the decoder
        ticks = None if packet is None else packet.dts if packet.pts is None else packet.pts
        video.lines.clear()
        try:
            frames = context.decode(packet)
        except EOFError:
            frames = []
        except av.error.MemoryError as error:
            raise out_of_memory() from error
        except av.FFmpegError as error:
            frames = []
            check_refused_size(video.lines, video.max_pixels)
            damage.refused = damage.refused or _describe(error, video.lines)
            if not quiet and not _before(ticks, start_ticks) and not (packet is not None and packet.is_discard):
                damage.note(ticks, _describe(error, video.lines))
        else:
            words = next((words for _, _, words in video.lines if _DAMAGE.search(words)), None)
            if words is not None and not quiet and not _before(ticks, start_ticks):
                damage.note(ticks, words.strip())
        if packet is not None and packet.is_corrupt and not _before(ticks, start_ticks):
            damage.note(ticks, "a packet is incomplete")
        for frame in frames:
            check_pixels(frame.width, frame.height, video.max_pixels)
            shown_ticks = clock.ticks(frame.pts if has_pts else None, frame.dts)
            if shown_ticks is None:  # the last frames of a file without presentation times
                shown_ticks = (video.stream.start_time or 0) if after is None else after
            duration = _duration(video, frame)
            after = shown_ticks + duration
            if frame.is_corrupt and not quiet and not _before(shown_ticks, start_ticks):
                damage.note(shown_ticks, "a picture is damaged")
            quiet = quiet and frame.is_corrupt
            yield TimedFrame(shown_ticks, duration, frame)


def _describe(error: av.FFmpegError, lines: list) -> str:
    words = [line[2].strip() for line in lines]
    return words[0] if words else f"a packet cannot be decoded: {error.strerror}"


def _before(ticks: int | None, start_ticks: int | None) -> bool:
    return ticks is not None and start_ticks is not None and ticks < start_ticks


def _duration(video: OpenVideo, frame: av.VideoFrame) -> int:
    """The frame's own duration, or one frame at the stream's rate."""
    if frame.duration:
        return frame.duration
    rate = video.stream.average_rate or video.stream.guessed_rate
    return int(1 / (rate * video.stream.time_base)) if rate else 1


class _BestEffortClock:
    """Presentation times as ffprobe's best_effort_timestamp gives them; PyAV hands on the raw ones.

    Source: FFmpeg, libavcodec/decode.c, guess_correct_pts: whichever of pts and dts went back less often.
    """

    def __init__(self):
        self._last_pts = self._last_dts = -(1 << 63)
        self._faulty_pts = self._faulty_dts = 0

    def ticks(self, pts: int | None, dts: int | None) -> int | None:
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


def seek(video: OpenVideo, ticks: int) -> None:
    """Moves to a keyframe at or before ticks, in presentation time.

    The format may look for decoding times, so the landing is checked on the first packet and the aim taken
    earlier until it fits; with no luck the file is read from its beginning.
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
        back = max(2 * back, int(1 / stream.time_base))
    container.seek(min(0, stream.start_time or 0), stream=stream, backward=True)


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(height, width, 3) uint8 RGB in one copy, upright; a view."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = rgb.planes[0]
    shape, strides = (rgb.height, rgb.width, 3), (plane.line_size, 3, 1)  # lines may be padded
    pixels = np.ndarray(shape, np.uint8, plane, strides=strides)
    return orientation(frame).apply(pixels)


def orientation(frame: av.VideoFrame) -> Orientation:
    """How the frame is turned to be shown."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return Orientation.of_display_matrix(tuple(np.frombuffer(data, np.int32).tolist()))
    return Orientation()


class FrameStorer:
    """Makes the stored form of PyAV's frames; holds the colour converter between them."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> StoredPicture:
        """Pixels for the model and a thumbnail."""
        return store_form(to_rgb(frame, self._reformatter))


def decode(task: DecodeTask) -> Iterator[KeptFrame]:
    """The segment's kept frames, in order; pictures are StoredPicture.

    Raises:
        VideoProblem: after the last good frame, where the segment is not whole.
    """
    start, end = task.segment.start_ticks, task.segment.end_ticks
    if task.choice is Choice.KEYFRAMES and can_cut(task.probe.container, task.probe.codec):
        with OpenVideo(task.file, task.max_pixels, task.threads) as video:
            if start is not None:
                seek(video, start)
            table = scan_packets(video, task.alive, start, end)
        if table.plain and table.entries == table.keyframes and table.ticks[:1] == table.entries[:1]:
            yield from _decode_keyframes(task, table)
            return
    damage, tally = Damage(), Tally()
    with OpenVideo(task.file, task.max_pixels, task.threads) as video:
        if start is not None:
            seek(video, start)
        frames = _until_problem(read_frames(video, damage, task.alive, start), damage)
        yield from sample(frames, _chooser(task), start, end, task.segment.first_index, FrameStorer(), tally)
    problem = _judge(task, damage, tally)
    if problem is not None:
        raise problem


def _chooser(task: DecodeTask) -> Callable[[TimedFrame, int], bool]:
    step, end = 1 / (task.fps * task.probe.time_base), task.segment.end_ticks
    if task.choice is Choice.KEYFRAMES:
        return Spaced(step, end, lambda frame: bool(frame.picture.key_frame)).takes
    if task.choice is Choice.SCENES:
        from workers.decode_scenes import SceneStarts  # of an extra

        return Spaced(step, end, SceneStarts(), may_be_late=True).takes
    return Grid.of(task.probe, task.fps).takes


def _decode_keyframes(task: DecodeTask, table: PacketTable) -> Iterator[KeptFrame]:
    """The segment's keyframes with nothing decoded between them, so that damage there does not show.

    Args:
        task: the segment.
        table: of the segment's packets.
    """
    start, end = task.segment.start_ticks, task.segment.end_ticks
    spaced = Spaced(1 / (task.fps * task.probe.time_base), None, lambda frame: True)
    wanted = [at for at in sorted(table.entries) if spaced.takes(TimedFrame(at, 0, None))]
    ends = dict(zip(wanted, [*wanted[1:], table.end_ticks if end is None else end], strict=True))
    damage, store = Damage(), FrameStorer()
    with OpenVideo(task.file, task.max_pixels, task.threads) as video:
        video.stream.codec_context.skip_frame = "NONKEY"
        if start is not None:
            seek(video, start)
        for frame in _until_problem(read_frames(video, damage, task.alive, start), damage):
            if frame.ticks in ends:
                rank = task.segment.first_index + bisect.bisect_left(table.ticks, frame.ticks)
                yield KeptFrame(frame.ticks, ends.pop(frame.ticks), rank, store(frame.picture))
            if not ends:
                break
    if damage.end is None and ends:
        damage.note(None, f"{len(ends)} of {len(wanted)} keyframes do not come out")
    problem = _judge(task, damage, None)
    if problem is not None:
        raise problem


def _until_problem(frames: Iterator[TimedFrame], damage: Damage) -> Iterator[TimedFrame]:
    """The frames before a problem, which is kept for later: the last of them must still come out."""
    try:
        yield from frames
    except VideoProblem as problem:
        damage.end = problem


def _judge(task: DecodeTask, damage: Damage, tally: Tally | None) -> VideoProblem | None:
    """What is wrong with a segment that was read; a tally of None: not every frame was."""
    probe, segment = task.probe, task.segment
    if damage.end is not None:
        return damage.end
    missing = cut_short(task.file) if segment.end_ticks is None else None
    if missing is not None:
        return VideoProblem(Reason.TRUNCATED, f"the file is cut short: {missing}")
    details = damage.before(segment.end_ticks)
    if details:
        return VideoProblem(Reason.CORRUPT, f"damaged in {len(details)} places, first: {details[0]}")
    if tally is None:
        return None
    if tally.jump_ticks * probe.time_base > JUMP_SECONDS:
        back, at = float(tally.jump_ticks * probe.time_base), float(tally.jump_at_ticks * probe.time_base)
        detail = f"its clock goes back by {back:.1f} s at {at:.1f} s; what follows is left out"
        return VideoProblem(Reason.CORRUPT, detail)
    expected = dict(probe.cuts).get(segment.end_ticks)
    if expected is not None and tally.frame_count != expected - segment.first_index:
        wanted = expected - segment.first_index
        return VideoProblem(Reason.CORRUPT, f"{tally.frame_count} frames come out of a stretch of {wanted}")
    return None


def model_pixels_at(file: VideoFile, probe: Probe, ticks: int, max_pixels: int) -> np.ndarray | None:
    """The one frame shown at a cut, (336, 336, 3) uint8; None where it does not come out."""
    try:
        return next(frames_at(file, probe, [ticks], 1, max_pixels, lambda: None))[1]
    except VideoProblem:
        return None


def frames_at(
    file: VideoFile,
    probe: Probe,
    ticks: Iterable[int],
    threads: int,
    max_pixels: int,
    alive: Callable[[], None],
) -> Iterator[tuple[int, np.ndarray]]:
    """The frames at these presentation times, ascending, each once: (ticks, (336, 336, 3) uint8).

    What lies between two of them is skipped from cut to cut, and decoded where no cut lies between.

    Raises:
        VideoProblem: no frame has one of these times.
    """
    reformatter, cuts = VideoReformatter(), [cut for cut, _ in probe.cuts]
    with OpenVideo(file, max_pixels, threads) as video:
        position, frames = None, None
        for wanted in sorted(set(ticks)):
            before = bisect.bisect_right(cuts, wanted)
            cut = cuts[before - 1] if before else None
            if frames is None or (cut is not None and cut > position):
                if cut is not None:
                    seek(video, cut)
                frames = read_frames(video, Damage(), alive, cut)
            found = next((frame for frame in frames if frame.ticks >= wanted), None)
            if found is None or found.ticks != wanted:
                at = float(wanted * probe.time_base)
                raise VideoProblem(Reason.CORRUPT, f"no frame comes out at {at:.3f} s of the file's clock")
            position = wanted
            yield wanted, model_pixels(to_rgb(found.picture, reformatter))
