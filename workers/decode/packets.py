"""A pass over a stream's packets, without decoding: the times of its frames, and where decoding can begin."""

import re
from dataclasses import dataclass, field

import av

from workers.decode.clock import RESTART_SECONDS
from workers.decode.damage import Damage
from workers.decode.open_video import OpenVideo

# Containers in which seeking is exact, and codecs whose keyframes can be told from recovery points.
CUT_FORMATS = ("mov,", "matroska,")
_CUT_CODECS = {"h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores"}


def can_cut(container: str, codec: str) -> bool:
    """Whether decoding can begin at the keyframes of a packet table."""
    return container.startswith(CUT_FORMATS) and codec in _CUT_CODECS


@dataclass
class PacketTable:
    """The frames of a stream, by its packets.

    Attributes:
        ticks: presentation times of the frames, ascending.
        keyframes: times of the frames that the container marks as keyframes.
        entries: times of the keyframes at which decoding can begin.
        end_ticks: where the last frame ends.
        plain: whether every frame has a time of its own, on one clock, and its packet is whole.
    """

    ticks: list[int] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    end_ticks: int = 0
    plain: bool = True


def scan_packets(video: OpenVideo, start_ticks: int | None = None, end_ticks: int | None = None) -> PacketTable:
    """The frames of a stream from its current position on, by its packets.

    Args:
        video: at its beginning, or at a keyframe at or before start_ticks.
        start_ticks, end_ticks: only frames in this half-open range; None is open.
    """
    table, context = PacketTable(), video.stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata or b""
    seen: set[int] = set()
    damage = Damage()
    last = (-(1 << 63), 0)
    restart_ticks = RESTART_SECONDS / video.time_base
    for packet in video.packets(damage):
        if end_ticks is not None and packet.dts is not None and packet.dts >= end_ticks:
            break  # later packets are shown later still
        is_alt_ref = codec == "vp8" and not memoryview(packet)[0] & 0x10  # only a reference. Source: RFC 6386, 9.1
        if packet.is_discard or is_alt_ref:
            continue
        restarts = packet.is_keyframe and packet.pts is not None and packet.pts < last[0] - restart_ticks
        if packet.pts is None or packet.pts in seen or packet.is_corrupt or restarts:
            table.plain = False
            break
        is_early = start_ticks is not None and packet.pts < start_ticks
        if is_early or (end_ticks is not None and packet.pts >= end_ticks):
            continue
        seen.add(packet.pts)
        last = max(last, (packet.pts, packet.duration or 0))
        if packet.is_keyframe:
            table.keyframes.append(packet.pts)
            if is_entry(codec, extradata, bytes(packet)):
                table.entries.append(packet.pts)
    table.plain = table.plain and damage.count == 0
    table.ticks, table.end_ticks = sorted(seen), last[0] + max(last[1], 1)
    return table


def is_header(codec: str, packet: av.Packet) -> bool:
    """True for a Theora header, found among the frames of chained streams. Source: Theora specification, 6.1."""
    return codec == "theora" and bool(memoryview(packet)[0] & 0x80)


def is_entry(codec: str, extradata: bytes, data: bytes) -> bool:
    """Whether decoding can begin at this keyframe and give exact frames from its time on.

    In H.264 a keyframe may be only a recovery point, so an IDR picture is required. In HEVC every random access point
    is an entry: its leading pictures are shown before it. Source: ITU-T H.264, 7.4.1.2.4; H.265, 8.1.3; VP9, 6.2.
    """
    if codec == "h264":
        return 5 in {nal & 0x1F for nal in _nal_headers(data, extradata, length_at=4)}
    if codec == "hevc":
        return any(16 <= nal >> 1 & 0x3F <= 21 for nal in _nal_headers(data, extradata, length_at=21))
    if codec == "vp8":
        return not data[0] & 1
    if codec == "vp9":
        return not data[0] & 0x0C
    return True


def _nal_headers(data: bytes, extradata: bytes, length_at: int) -> list[int]:
    """The first byte of each NAL unit; units have lengths in front (MP4, Matroska) or start codes."""
    if len(extradata) <= length_at or extradata[0] != 1:
        return [match[1][0] for match in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL)]
    width, place, headers = (extradata[length_at] & 3) + 1, 0, []
    while place + width < len(data):
        headers.append(data[place + width])
        place += width + int.from_bytes(data[place : place + width], "big")
    return headers
