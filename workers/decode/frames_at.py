"""The frames at given times, each decoded from a keyframe shortly before it.

A frame must be the same as in a decoding from the file's start. An entry is a keyframe that needs nothing before it,
so decoding may begin there. Other keyframes may be followed by frames that need earlier ones, as in an open group of
pictures, or by wrong times. There decoding begins one keyframe earlier. The frame that is found is used if nothing
before it was damaged or missing, or if two different starts give the same frame. Else the file is decoded from its
start.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from storage.errors import VideoProblem
from storage.records import Probe, Reason
from workers.decode.clock import OneClock, TimedFrame
from workers.decode.damage import Damage
from workers.decode.open_video import OpenVideo, VideoInput
from workers.decode.packets import can_cut, is_entry
from workers.decode.picture import model_pixels
from workers.decode.pyav import read_frames, to_rgb
from workers.decode.time_search import find_cluster, find_tag, has_cues, place_before
from workers.sources.video_file import VideoFile

HELD_BYTES = 64 << 20  # most packets that are kept between a keyframe and the wanted frame
NEAR_SECONDS = 10  # an entry this close before a frame is used; no closer one is searched for
JUMPS = 3  # attempts for one frame, each from an earlier keyframe, before the file is decoded from its start
LATE_FRAMES = 32  # frames with later times after which a frame is given up
_DELAYED_CLOCKS = ("avi",)  # a frame gets its time from a packet a few frames later
_FULLY_INDEXED = ("mov,", "avi")
_INTRA = (PictureType.I, PictureType.NONE)  # NONE: some decoders do not state the type


def frames_at(
    source: VideoInput, probe: Probe, ticks: Iterable[int], times_rise: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """The frames at these presentation times, ascending, each once: (ticks, (336, 336, 3) uint8).

    Args:
        times_rise: the file's clock is known never to restart. If it is not known, it is checked first, because after
            a restart one time can mean two frames.
    Raises:
        VideoProblem: there is no frame at one of the times, or the video cannot be decoded up to it.
    """
    reformatter = VideoReformatter()
    with _Reader(source, probe, times_rise) as reader:
        for wanted in sorted(set(ticks)):
            found = reader.frame_at(wanted)
            if found is None:
                detail = f"there is no frame at {float(wanted * probe.time_base):.3f} s of the file's clock"
                raise reader.problem or VideoProblem(Reason.CORRUPT, detail)
            yield wanted, model_pixels(to_rgb(found.picture, reformatter))


@dataclass
class _Landing:
    """A keyframe where decoding may begin, with the packets that were read from it on.

    Attributes:
        ticks: the keyframe's time.
        is_entry: whether it needs nothing before it.
        damage_count: damage that was found before it.
        packets: up to the next landing.
        size_bytes: of the packets.
    """

    ticks: int
    is_entry: bool
    damage_count: int
    packets: list[av.Packet] = field(default_factory=list)
    size_bytes: int = 0


class _Reader:
    """Finds frames of a video in ascending order, by decoding on or by jumping to a keyframe; a context manager.

    Attributes:
        problem: why the last decoding ended before the file's end.
    """

    def __init__(self, source: VideoInput, probe: Probe, times_rise: bool):
        self.problem: VideoProblem | None = None
        self._source, self._probe, self._times_rise = source, probe, times_rise or bool(probe.cuts)
        self._file = source.file
        self._second = max(1, int(1 / probe.time_base))
        self._settle = 2 if probe.container in _DELAYED_CLOCKS else 1
        self._video: OpenVideo | None = None
        self._has_cues = has_cues(source.file)
        self._frames: Iterator[TimedFrame] = iter(())
        self._next: TimedFrame | None = None  # read, but not used yet
        self._position: int | None = None  # time of the last frame that was read
        self._damage = Damage()
        self._began: int | None = None  # the keyframe at which decoding began; None: the file's start
        self._settled = probe.first_ticks  # damage counts from this time on
        self._to_settle = 0  # intra-coded frames that must still be decoded before frames can be trusted
        self._stays = False  # do not jump any more
        self._wasted = 0  # ticks that were decoded without a result
        self._reach = 0  # the most ticks that a jump had to decode

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def _opened(self) -> OpenVideo:
        assert self._video is not None
        return self._video

    def frame_at(self, wanted: int) -> TimedFrame | None:
        """The frame at a time later than that of the last one, or None if there is none."""
        if self._decodes_on(wanted):
            found = self._read_to(wanted)
            if found is not None and self._is_right():
                return found
        unsure, before, reformatter = None, wanted, VideoReformatter()
        for _ in range(JUMPS):
            if self._wasted > wanted - self._probe.first_ticks:
                self._stays = True  # decoding everything would have been cheaper
            if self._stays or not self._jump(wanted, before):
                break
            assert self._began is not None  # set by _jump
            before = self._began - 1
            found = self._read_to(wanted)
            if found is not None and self._is_right():
                return found
            rgb = None if found is None else to_rgb(found.picture, reformatter)
            if rgb is not None and unsure is not None and np.array_equal(rgb, unsure):
                return found
            unsure = rgb
            self._wasted += wanted - self._began
        else:
            self._stays = True  # other frames may fail in the same way
        self._reach = max(self._reach, wanted - self._probe.first_ticks)
        self._begin()
        return self._read_to(wanted)

    def _decodes_on(self, wanted: int) -> bool:
        """Whether to decode on to a frame, without a jump."""
        if self._position is None or not self._is_right():
            return False
        return self._stays or wanted - self._position <= self._reach

    def _is_right(self) -> bool:
        """Whether the frames that are decoded now are certainly the same as in a decoding from the file's start."""
        return self._began is None or (self._damage.count == 0 and self._to_settle <= 0)

    def _read_to(self, wanted: int) -> TimedFrame | None:
        """Decodes up to a frame; of several frames at one time, the last one is taken, as when indexing."""
        found, late = None, 0
        while late < LATE_FRAMES:
            frame, self._next = self._next or next(self._frames, None), None
            if frame is None:
                break
            if found is not None and frame.ticks > wanted:
                self._next = frame
                break
            self._position = frame.ticks
            self._to_settle -= frame.picture.pict_type in _INTRA
            if frame.picture.is_corrupt and frame.ticks >= self._settled:
                self._damage.note(frame.ticks, "a frame is damaged")
            if frame.ticks == wanted:
                found = frame
            late += frame.ticks > wanted
        return found

    # --- going somewhere

    def _begin(self) -> None:
        """Opens the file again and decodes from its start."""
        self._open()
        self._began, self._damage = None, Damage()
        clock = OneClock(self._probe.time_base, self._probe.container)
        self._frames = clock.place(self._before_problem(read_frames(self._opened, self._damage)))

    def _jump(self, wanted: int, before: int) -> bool:
        """Moves to a keyframe and begins to decode there.

        Args:
            wanted: the frame's time.
            before: the latest time for the keyframe.
        Returns:
            False if decoding has to begin at the file's start.
        """
        if self._video is None:
            self._open()
            # A stream without a start time has packets without times.
            self._times_rise = self._times_rise or _have_rising_times(self._opened)
            self._stays = self._opened.stream.start_time is None or not self._times_rise
        if self._stays:
            return False
        back = 0
        while before - back > self._probe.first_ticks:
            landings = self._land(before - back, before)
            if landings:
                self._reach = max(self._reach, wanted - landings[0].ticks)
                self._decode(landings)
                return True
            back = max(2 * back, self._second)
        return False

    def _land(self, aim: int, before: int) -> list[_Landing]:
        """Seeks to the time `aim` and reads on to the last keyframes up to `before`; empty if there are too few."""
        try:
            if not self._seek(aim):
                return []
        except av.FFmpegError:
            return []
        video, damage = self._opened, Damage()
        landings: deque[_Landing] = deque(maxlen=self._settle + 1)
        for packet in video.packets(damage):
            ticks = packet.dts if packet.pts is None else packet.pts
            if packet.is_keyframe and ticks is not None and ticks <= before:
                landing = _Landing(ticks, self._is_entry(packet), damage.count)
                if landing.is_entry:
                    landings.clear()
                landings.append(landing)
            if landings:
                landings[-1].packets.append(packet)
                landings[-1].size_bytes += packet.size
            decoded = packet.pts if packet.dts is None else packet.dts
            if decoded is None or decoded > before:
                break  # later packets are shown later still
            if landings and landings[0].is_entry and before - landings[0].ticks <= NEAR_SECONDS * self._second:
                break
            if sum(landing.size_bytes for landing in landings) > HELD_BYTES:
                break
        if not landings or not (landings[0].is_entry or len(landings) == landings.maxlen):
            return []
        self._damage = Damage(count=damage.count - landings[0].damage_count)
        return list(landings)

    def _seek(self, ticks: int) -> bool:
        """Moves to a place at or before a time; False if none is found."""
        name = self._opened.format_name
        if name == "flv":
            place = place_before(self._file, find_tag, ticks)
            if place is not None:
                self._opened.container.seek(place, unsupported_byte_offset=True)
            return place is not None
        if name.startswith("matroska") and not self._has_cues:
            place, first = place_before(self._file, find_cluster, ticks), find_cluster(self._file, 0, self._file.size)
            if place is not None and first is not None:
                self._open(range(first[0], place))
            return place is not None
        self._opened.container.seek(ticks, stream=self._opened.stream, backward=True)
        return True

    def _decode(self, landings: list[_Landing]) -> None:
        """Decodes the packets that were read, and then those that follow."""
        video, first = self._opened, landings[0]
        held = chain.from_iterable(landing.packets for landing in landings)
        packets = chain(held, video.packets(self._damage))
        settled = first if first.is_entry else landings[1]
        self._settled = settled.ticks
        self._frames = self._before_problem(read_frames(video, self._damage, self._settled, packets))
        self._began, self._next, self._position = first.ticks, None, None
        self._to_settle = 0 if first.is_entry else 2

    def _before_problem(self, frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        self.problem = None
        try:
            yield from frames
        except VideoProblem as problem:
            self.problem = problem

    def _is_entry(self, packet: av.Packet) -> bool:
        probe = self._probe
        if not can_cut(probe.container, probe.codec):
            return False
        return is_entry(probe.codec, self._opened.stream.codec_context.extradata or b"", bytes(packet))

    def _open(self, hidden: range = range(0)) -> None:
        self._close()
        file = VideoFile(self._file.descriptor, hidden) if hidden else self._file
        self._video = OpenVideo(replace(self._source, file=file))

    def _close(self) -> None:
        self._frames, self._next, self._position = iter(()), None, None
        if self._video is not None:
            self._video.close()
            if self._video.file is not self._file:
                self._file.bytes_read += self._video.file.bytes_read
            self._video = None


def _have_rising_times(video: OpenVideo) -> bool:
    """Whether a video's clock never restarts; read from its index, or else from all its packets."""
    if video.format_name.startswith(_FULLY_INDEXED):
        times = (entry.timestamp for entry in video.stream.index_entries)
        return all(earlier < later for earlier, later in pairwise(times))
    clock = OneClock(video.time_base, video.format_name)
    packets = ((packet.pts if packet.dts is None else packet.dts, packet) for packet in video.packets(Damage()))
    timed = (TimedFrame(ticks, packet.duration or 0, None) for ticks, packet in packets if ticks is not None)
    return not any(clock.restarts for _ in clock.place(timed))
