"""Cutting a moment out of a video by copying packets: nothing is decoded, nothing encoded."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from storage.errors import UsageError, VideoProblem
from storage.records import Probe, Reason
from workers.content import open_source
from workers.decode_open import open_container
from workers.video_file import VideoFile

FORMATS = {  # FFmpeg's names, by suffix
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".ts": "mpegts",
    ".mts": "mpegts",
    ".m2ts": "mpegts",
}
PADDING_PIXELS = 128  # FFmpeg pads each side of a picture (800 to 832, say) before it compares with its limit
HIDES_LEAD = {"mp4", "mov"}  # formats whose edit lists have a player skip what comes before a time


@dataclass(frozen=True)
class Cut:
    """What came out: positions in the source, in seconds.

    Attributes:
        start_seconds: where a player of the new file begins.
        end_seconds: where its last picture ends, a little later than asked for where pictures are stored out of order.
        stream_count: video and audio streams copied.
    """

    start_seconds: float
    end_seconds: float
    stream_count: int


def cut(path: str | bytes, probe: Probe, start_seconds: float, end_seconds: float, out: str) -> Cut:
    """Copies a stretch of a video and its sound to a new file, from the keyframe before it on.

    Args:
        path: of the source.
        probe: of the source.
        start_seconds, end_seconds: positions that a player shows, half-open.
        out: the file to write, whose suffix names the format.
    Raises:
        VideoProblem: the source cannot be read, or has no picture there.
        UsageError: the format cannot hold the streams, or the file cannot be written.
    """
    pixels = (probe.width + PADDING_PIXELS) * (probe.height + PADDING_PIXELS)
    partial = f"{out}.{os.getpid()}.part"
    with open(open_source(path), "rb", buffering=0) as source, av.logging.Capture(local=False) as lines:
        container = open_container(VideoFile(source.fileno()), pixels, lines)
        with container:
            try:
                done = _copy(container, probe, start_seconds, end_seconds, partial, FORMATS[Path(out).suffix.lower()])
                os.replace(partial, out)
            except (av.FFmpegError, ValueError) as error:
                words = "; ".join(dict.fromkeys(line.strip() for _, _, line in lines)) or str(error)
                raise UsageError(
                    f"{out}: the streams cannot be copied into it: {words}; name a file that ends in .mkv, which "
                    "holds most codecs"
                ) from error
            except OSError as error:
                raise UsageError(f"{out}: cannot be written: {error.strerror}") from error
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
    return done


def _copy(
    container: av.container.InputContainer, probe: Probe, start_seconds: float, end_seconds: float, out: str, kind: str
) -> Cut:
    start, end = (seconds + probe.clock_offset_seconds for seconds in (start_seconds, end_seconds))  # on its own clock
    video = container.streams[probe.stream_index]
    streams = [video, *(stream for stream in container.streams if stream.type == "audio")]
    container.seek(int(start / video.time_base), stream=video, backward=True)
    with av.open(out, "w", format=kind) as new:
        copies = {stream.index: new.add_stream_from_template(stream, opaque=True) for stream in streams}
        first, last, finished = None, None, set()
        for packet in _with_decode_times(container.demux(streams)):
            if packet.stream.index in finished:
                continue
            time = float((packet.pts if packet.pts is not None else packet.dts) * packet.time_base)
            if float(packet.dts * packet.time_base) >= end:
                finished.add(packet.stream.index)
                if len(finished) == len(streams):
                    break
                continue
            if packet.stream is video:
                if first is None and not packet.is_keyframe:
                    continue
                first = time if first is None else min(first, time)
                last = max(last or time, time + float((packet.duration or 0) * packet.time_base))
            elif first is None or time < start - 1.0:
                continue  # sound from before the moment's own
            _shift(packet, start if kind in HIDES_LEAD else first)
            packet.stream = copies[packet.stream.index]
            new.mux(packet)
    if first is None or last is None or last <= start:
        raise VideoProblem(Reason.NO_FRAMES, f"there is no picture from {start_seconds:g} to {end_seconds:g} seconds")
    begins = max(first, start) if kind in HIDES_LEAD else first
    return Cut(begins - probe.clock_offset_seconds, last - probe.clock_offset_seconds, len(streams))


def _with_decode_times(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets that all say when they are decoded, in rising order.

    Matroska leaves the first ones of a stream with reordered frames without: they get the ticks before the first that
    is known.
    """
    waiting: dict[int, list[av.Packet]] = {}
    last: dict[int, int] = {}
    for packet in packets:
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


def _shift(packet: av.Packet, seconds: float) -> None:
    """Makes a time of the source the new file's zero."""
    ticks = round(Fraction(seconds) / packet.time_base)
    packet.dts -= ticks
    if packet.pts is not None:
        packet.pts -= ticks
