"""A pass over a stream's packets without decoding: which frames there are, and where decoding can begin."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import av
import numpy as np

from workers.decode.clock import RESTART_SECONDS
from workers.decode.damage import Damage
from workers.decode.open_video import OpenVideo

# Containers whose seeking lands where their index says, and codecs whose keyframes need nothing before them.
CUT_FORMATS = ("mov,", "matroska,")
_CUT_CODECS = {"h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores"}


def can_cut(container: str, codec: str) -> bool:
    """Whether decoding can begin at the keyframes of a packet table."""
    return container.startswith(CUT_FORMATS) and codec in _CUT_CODECS


@dataclass
class PacketTable:
    """What a pass over the packets says, without decoding.

    Attributes:
        ticks: presentation times of the packets that show a frame, ascending.
        keyframes: those of packets that the container calls keyframes.
        entries: those among them at which decoding can begin.
        end_ticks: where the last of those frames ends.
        plain: whether every such packet has a time of its own, on one clock, and was read whole.
    """

    ticks: list[int] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    end_ticks: int = 0
    plain: bool = True

    def keyframe_ranks(self) -> list[int]:
        """Ranks of the keyframes in presentation order."""
        return np.searchsorted(self.ticks, self.keyframes).tolist()


def scan_packets(
    video: OpenVideo, alive: Callable[[], None], start_ticks: int | None = None, end_ticks: int | None = None
) -> PacketTable:
    """A pass over the packets of the stream, from where it stands.

    Args:
        video: at its beginning, or at a keyframe at or before start_ticks.
        alive: called at every packet.
        start_ticks, end_ticks: leave out frames before and from these times; None: none.
    """
    table, context = PacketTable(), video.stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata or b""
    seen: set[int] = set()
    damage = Damage()
    last = (-(1 << 63), 0)
    restart_ticks = RESTART_SECONDS / video.time_base
    for packet in video.packets(damage, alive):
        if end_ticks is not None and packet.dts is not None and packet.dts >= end_ticks:
            break  # no frame is shown before it is decoded
        if packet.is_discard or not _shows_frame(codec, packet):
            continue
        begins_anew = packet.is_keyframe and packet.pts is not None and packet.pts < last[0] - restart_ticks
        if packet.pts is None or packet.pts in seen or packet.is_corrupt or begins_anew:
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


def _shows_frame(codec: str, packet: av.Packet) -> bool:
    """False for VP8's and VP9's packets that only prepare a reference ("alt-ref"). Source: RFC 6386, 9.1."""
    if codec == "vp8":
        return bool(memoryview(packet)[0] & 0x10)
    return True


def is_header(codec: str, packet: av.Packet) -> bool:
    """True for Theora's headers, which stand among the pictures where streams were chained. Source: Theora, 6.1."""
    return codec == "theora" and bool(memoryview(packet)[0] & 0x80)


def is_entry(codec: str, extradata: bytes, data: bytes) -> bool:
    """Whether decoding can begin at this keyframe and give exact frames from its time on.

    A keyframe flag alone may mean a recovery point in H.264; of HEVC any random access point will do, for the
    pictures that it leads in with are shown before it. Source: ITU-T H.264, 7.4.1.2.4; H.265, 8.1.3; VP9, 6.2.
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
    """The first byte of each NAL unit, with lengths in front (MP4, Matroska) or start codes."""
    if len(extradata) <= length_at or extradata[0] != 1:
        return [match[1][0] for match in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL)]
    width, place, headers = (extradata[length_at] & 3) + 1, 0, []
    while place + width < len(data):
        headers.append(data[place + width])
        place += width + int.from_bytes(data[place : place + width], "big")
    return headers
