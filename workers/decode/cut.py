"""Cuts a moment out of a video by copying packets, without decoding or encoding; runs in the decoder process."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from storage.errors import VideoProblem
from storage.records import Probe, Reason
from workers.decode.open_video import VideoInput, open_container

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HIDES_LEAD = {"mp4", "mov"}  # formats with edit lists, by which a player skips what comes before a time
BACK_SECONDS = (0, 2, 10, 60, 600)  # seconds before the moment at which a keyframe is searched, in turn
MARGIN_SECONDS = 1.0  # how far sound may be stored after its picture


@dataclass(frozen=True)
class Cut:
    """The result of a cut; positions in the source.

    Attributes:
        start_seconds: where a player of the new file begins.
        end_seconds: where its last frame ends.
        stream_count: of video and audio streams.
    """

    start_seconds: float
    end_seconds: float
    stream_count: int


class CutFile(io.RawIOBase):
    """A seekable file that passes everything written to it on to a function.

    Args:
        write: called with an offset and the bytes.
    """

    def __init__(self, write: Callable[[int, bytes], None]):
        self._write = write
        self._place = self._size = 0

    def writable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True; some formats complete their headers at the end."""
        return True

    def write(self, data: "ReadableBuffer") -> int:
        """Writes at the current position; returns the number of bytes."""
        data = bytes(data)
        self._write(self._place, data)
        self._place += len(data)
        self._size = max(self._size, self._place)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place


def cut(source: VideoInput, probe: Probe, start_seconds: float, end_seconds: float, kind: str, new: CutFile) -> Cut:
    """Copies a range of a video with its sound; the copy begins at the keyframe before the range.

    Args:
        start_seconds, end_seconds: positions as a player shows them, half-open.
        kind: FFmpeg's name of the new file's format.
    Raises:
        VideoProblem: the source cannot be read, has no picture in the range, or cannot be copied to this format.
    """
    with av.logging.Capture(local=False) as lines, open_container(source, lines) as container:
        start, end = (seconds + probe.clock_offset_seconds for seconds in (start_seconds, end_seconds))
        video = container.streams[probe.stream_index]
        assert isinstance(video, av.VideoStream)  # as when it was probed
        streams = [video, *(stream for stream in container.streams if stream.type == "audio")]
        opened = _Opened(container, video, source.alive)
        first = _seek(opened, start)
        if first is None:
            raise _no_picture(start_seconds, end_seconds)
        lines.clear()
        begins = first
        if kind in HIDES_LEAD:  # the cut begins with a whole frame, because players skip one that began earlier
            begins = _on_screen(opened, first, start)
            _seek(opened, start)
        try:
            with av.open(new, "w", format=kind, buffer_size=1 << 20) as out:
                copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in streams}
                last = -math.inf  # when the last copied frame ends
                for packet in _ended(_moment(opened, streams, first, begins, end), video, end):
                    if packet.stream is video:
                        last = max(last, _shown(packet) + _length(packet))
                    ticks = round(Fraction(begins) / packet.time_base)
                    assert packet.dts is not None  # set by _with_decode_times
                    packet.dts -= ticks
                    if packet.pts is not None:
                        packet.pts -= ticks
                    packet.stream = copies[packet.stream.index]
                    out.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            reason = "; ".join(dict.fromkeys(text.strip() for _, _, text in lines)) or str(error)
            raise VideoProblem(Reason.UNSUPPORTED_CODEC, f"cannot be copied into this format: {reason}") from error
    if last <= start:
        raise _no_picture(start_seconds, end_seconds)
    return Cut(begins - probe.clock_offset_seconds, last - probe.clock_offset_seconds, len(streams))


def _no_picture(start_seconds: float, end_seconds: float) -> VideoProblem:
    return VideoProblem(Reason.NO_FRAMES, f"there is no picture from {start_seconds:g} to {end_seconds:g} seconds")


@dataclass(frozen=True)
class _Opened:
    """The source, opened; alive is called at every packet."""

    container: av.container.InputContainer
    video: av.VideoStream
    alive: Callable[[], None]


def _seek(opened: _Opened, start: float) -> float | None:
    """Moves to the last keyframe before a time, by the file's index; returns the keyframe's time."""
    for back in BACK_SECONDS:
        found = _keyframe_after(opened, max(0.0, start - back))
        if found is not None and (found <= start or start - back <= 0):
            break
    else:
        found = _keyframe_after(opened, 0.0)
    if found is not None:
        _go_to(opened, max(0.0, start - back))
    return found


def _keyframe_after(opened: _Opened, seconds: float) -> float | None:
    _go_to(opened, seconds)
    for packet in opened.container.demux(opened.video):
        opened.alive()
        if packet.is_keyframe and (packet.pts is not None or packet.dts is not None):
            return _shown(packet)
    return None


def _go_to(opened: _Opened, seconds: float) -> None:
    assert opened.video.time_base is not None  # FFmpeg sets it for every stream
    opened.container.seek(int(seconds / opened.video.time_base), stream=opened.video, backward=True)


def _moment(opened: _Opened, streams: list, first: float, begins: float, end: float) -> Iterator[av.Packet]:
    """The packets to copy: frames from the keyframe at `first` on, and sound from where a player begins."""
    has_begun, early = False, []
    for packet in _with_decode_times(opened.container.demux(streams)):
        opened.alive()
        shown = _shown(packet)
        decoded = _decoded(packet)
        if packet.stream is not opened.video:
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
        elif decoded < end and shown >= first:  # leading frames of the keyframe need packets that are not copied
            yield packet


def _on_screen(opened: _Opened, first: float, start: float) -> float:
    """When the frame that is shown at `start` begins, or the time of the keyframe if that is later."""
    found = first
    for packet in _with_decode_times(opened.container.demux(opened.video)):
        opened.alive()
        if _decoded(packet) > start:
            break
        if found < _shown(packet) <= start:
            found = _shown(packet)
    return found


def _ended(packets: Iterator[av.Packet], video: av.VideoStream, end: float) -> Iterator[av.Packet]:
    """The packets, with durations changed so that no frame is shown after `end`.

    Frames that are shown later but needed by earlier ones are shown for one tick each.
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
    """The packets, all with ascending decoding times.

    In Matroska the first packets of a stream with reordered frames have none. They get the ticks just before the first
    known time.
    """
    waiting: dict[int, list[av.Packet]] = {}
    last: dict[int, int] = {}
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV 18 raises it at the end if a stream appeared midway
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
    """When a packet is shown, in seconds of the file's clock."""
    return _decoded(packet) if packet.pts is None else float(packet.pts * packet.time_base)


def _decoded(packet: av.Packet) -> float:
    """When a packet is decoded, in seconds of the file's clock; it must state that."""
    assert packet.dts is not None
    return float(packet.dts * packet.time_base)


def _length(packet: av.Packet) -> float:
    """How long a packet is shown, in seconds; 0 if the file does not say."""
    return float((packet.duration or 0) * packet.time_base)
