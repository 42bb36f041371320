"""Cutting a moment out of a video by copying packets, in the decoder process: nothing is decoded, nothing encoded."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from storage.errors import VideoProblem
from storage.records import Probe, Reason
from workers.decode.open_video import open_container
from workers.sources.video_file import VideoFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HIDES_LEAD = {"mp4", "mov"}  # formats whose edit lists have a player skip what comes before a time
BACK_SECONDS = (0, 2, 10, 60, 600)  # to seek before the moment, until a keyframe before it is found
MARGIN_SECONDS = 1.0  # of sound that is stored away from its picture


@dataclass(frozen=True)
class Cut:
    """What came out: positions in the source, in seconds.

    Attributes:
        start_seconds: where a player of the new file begins.
        end_seconds: where its last picture ends.
        stream_count: video and audio streams copied.
    """

    start_seconds: float
    end_seconds: float
    stream_count: int


class CutFile(io.RawIOBase):
    """A file that somebody else writes: each stretch of bytes is handed on with its place.

    Args:
        write: is given an offset and bytes.
    """

    def __init__(self, write: Callable[[int, bytes], None]):
        self._write = write
        self._place = self._size = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: some formats fill in their headers at the end."""
        return True

    def write(self, data: "ReadableBuffer") -> int:
        """At the current position."""
        data = bytes(data)
        self._write(self._place, data)
        self._place += len(data)
        self._size = max(self._size, self._place)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """The current position."""
        return self._place


def cut(
    file: VideoFile,
    probe: Probe,
    start_seconds: float,
    end_seconds: float,
    kind: str,
    max_pixels: int,
    new: CutFile,
    alive: Callable[[], None],
) -> Cut:
    """Copies a stretch of a video and its sound, from the keyframe before it on.

    Args:
        file, probe: the source.
        start_seconds, end_seconds: positions that a player shows, half-open.
        kind: FFmpeg's name of the new file's format.
        max_pixels: of a frame; larger ones are refused.
        new: the file to write.
        alive: called now and then.
    Raises:
        VideoProblem: the source cannot be read or has no picture there, or the format cannot hold its streams.
    """
    with av.logging.Capture(local=False) as lines, open_container(file, max_pixels, lines) as container:
        start, end = (seconds + probe.clock_offset_seconds for seconds in (start_seconds, end_seconds))
        video = container.streams[probe.stream_index]
        assert isinstance(video, av.VideoStream)  # as it was when it was probed
        streams = [video, *(stream for stream in container.streams if stream.type == "audio")]
        first = _seek(container, video, start, alive)
        if first is None:
            raise _no_picture(start_seconds, end_seconds)
        lines.clear()
        begins = first
        if kind in HIDES_LEAD:  # a player would skip a picture that began before
            begins = _on_screen(container, video, first, start, alive)
            _seek(container, video, start, alive)
        try:
            with av.open(new, "w", format=kind, buffer_size=1 << 20) as out:
                copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in streams}
                last = first
                for packet in _ended(_moment(container, streams, first, begins, end, alive), video, end):
                    if packet.stream is video:
                        last = max(last, _shown(packet) + _length(packet))
                    _shift(packet, begins)
                    packet.stream = copies[packet.stream.index]
                    out.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            words = "; ".join(dict.fromkeys(line.strip() for _, _, line in lines)) or str(error)
            raise VideoProblem(Reason.UNSUPPORTED_CODEC, f"cannot be copied into this format: {words}") from error
    if last <= start:
        raise _no_picture(start_seconds, end_seconds)
    return Cut(begins - probe.clock_offset_seconds, last - probe.clock_offset_seconds, len(streams))


def _no_picture(start_seconds: float, end_seconds: float) -> VideoProblem:
    return VideoProblem(Reason.NO_FRAMES, f"there is no picture from {start_seconds:g} to {end_seconds:g} seconds")


def _seek(
    container: av.container.InputContainer, video: av.VideoStream, start: float, alive: Callable[[], None]
) -> float | None:
    """Stands the file at the last keyframe before a time, as far as its index tells; that keyframe's time."""
    for back in BACK_SECONDS:
        found = _keyframe_after(container, video, max(0.0, start - back), alive)
        if found is not None and (found <= start or start - back <= 0):
            break
    else:
        found = _keyframe_after(container, video, 0.0, alive)
    if found is not None:
        _go_to(container, video, max(0.0, start - back))
    return found


def _keyframe_after(
    container: av.container.InputContainer, video: av.VideoStream, seconds: float, alive: Callable[[], None]
) -> float | None:
    _go_to(container, video, seconds)
    for packet in container.demux(video):
        alive()
        if packet.is_keyframe and (packet.pts is not None or packet.dts is not None):
            return _shown(packet)
    return None


def _go_to(container: av.container.InputContainer, video: av.VideoStream, seconds: float) -> None:
    assert video.time_base is not None  # FFmpeg gives each stream one
    container.seek(int(seconds / video.time_base), stream=video, backward=True)


def _moment(
    container: av.container.InputContainer,
    streams: list,
    first: float,
    begins: float,
    end: float,
    alive: Callable[[], None],
) -> Iterator[av.Packet]:
    """The packets to copy: pictures from the keyframe at `first` on, and sound from where a player begins."""
    video, has_begun, early = streams[0], False, []
    for packet in _with_decode_times(container.demux(streams)):
        alive()
        shown = _shown(packet)
        decoded = _decoded(packet)
        if packet.stream is not video:
            if decoded < end and shown + _length(packet) > begins:
                early.append(packet)
                if has_begun:
                    yield from early
                    early = []
            continue
        if decoded >= end + (MARGIN_SECONDS if len(streams) > 1 else 0):
            return
        if not has_begun:
            if not packet.is_keyframe or shown < first - 1e-6:
                continue
            has_begun = True
            yield packet
            yield from early
            early = []
        elif decoded < end and shown >= first:  # pictures that lead the keyframe need what is not copied
            yield packet


def _on_screen(
    container: av.container.InputContainer, video: av.VideoStream, first: float, start: float, alive: Callable[[], None]
) -> float:
    """When the picture that is seen at a time began to be shown, or the keyframe where that comes later."""
    found = first
    for packet in _with_decode_times(container.demux(video)):
        alive()
        if _decoded(packet) > start:
            break
        if found < _shown(packet) <= start:
            found = _shown(packet)
    return found


def _ended(packets: Iterator[av.Packet], video: av.VideoStream, end: float) -> Iterator[av.Packet]:
    """Packets whose pictures are seen until a time and no longer.

    Pictures that come after it but are decoded before, as others need them, are seen for a tick each.
    """
    held, late = [], []
    for packet in packets:
        is_late = packet.stream is video and _shown(packet) >= end
        if packet.stream is video and not is_late and packet.duration:
            packet.duration = max(1, min(packet.duration, round((end - _shown(packet)) / packet.time_base)))
        if is_late:
            late.append(packet)
        if late:
            held.append(packet)
        else:
            yield packet
    for place, packet in enumerate(sorted(late, key=_shown)):
        packet.pts = math.ceil(Fraction(end) / packet.time_base) + place
        packet.duration = 1
    yield from held


def _with_decode_times(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets that all say when they are decoded, in rising order.

    Matroska leaves the first ones of a stream with reordered frames without: they get the ticks before the first that
    is known.
    """
    waiting: dict[int, list[av.Packet]] = {}
    last: dict[int, int] = {}
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV 18 ends so where a stream appeared midway
            packet = None
        if packet is None:
            return
        if not packet.size:
            continue
        stream = packet.stream.index
        if packet.dts is None:
            if stream not in last:
                waiting.setdefault(stream, []).append(packet)
                continue
            packet.dts = last[stream] + 1
        early = waiting.pop(stream, [])
        for place, held in enumerate(early):
            held.dts = packet.dts - len(early) + place
            yield held
        last[stream] = packet.dts
        yield packet


def _shown(packet: av.Packet) -> float:
    """When it is shown, in seconds of the file's clock."""
    return _decoded(packet) if packet.pts is None else float(packet.pts * packet.time_base)


def _decoded(packet: av.Packet) -> float:
    """When it is decoded, of a packet that says so."""
    assert packet.dts is not None
    return float(packet.dts * packet.time_base)


def _length(packet: av.Packet) -> float:
    """How long it is shown, in seconds; 0 where the file does not say."""
    return float((packet.duration or 0) * packet.time_base)


def _shift(packet: av.Packet, seconds: float) -> None:
    """Makes a time of the source the new file's zero."""
    ticks = round(Fraction(seconds) / packet.time_base)
    assert packet.dts is not None
    packet.dts -= ticks
    if packet.pts is not None:
        packet.pts -= ticks
