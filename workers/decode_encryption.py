"""Whether a video is encrypted: pictures that nobody without the key can decode are no damage, and no pictures."""

import struct
from collections.abc import Iterator

import av
import numpy as np

from workers.transport import packet_layout
from workers.video_file import VideoFile

ENCRYPTED_DETAIL = "the video is encrypted (DRM), and vidx has no key for it; index a copy without encryption"
_MP4_ENCRYPTED = {b"encv", b"drmi"}  # sample entries: Common Encryption, and FairPlay
_MP4_PATH = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
_ASF_GUIDS = (  # objects of an encrypted file's header: Content Encryption, Extended Content Encryption
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)
_LOOKED_AT_BYTES = 4 << 20
_SCRAMBLED_SHARE = 0.5  # of the packets of a transport stream that carry a payload


def is_encrypted(packet: av.Packet) -> bool:
    """Whether a packet's container says that (part of) it is encrypted, as Common Encryption in MP4 does."""
    if not packet.has_sidedata("encryption_info"):
        return False
    return _has_protected_bytes(bytes(packet.get_sidedata("encryption_info")))


def _has_protected_bytes(info: bytes) -> bool:
    """False for a clear sample among encrypted ones. Source: FFmpeg, libavutil/encryption_info.c, serialized layout."""
    if len(info) < 24:
        return True
    key_bytes, iv_bytes, subsamples = struct.unpack(">12xIII", info[:24])
    place = 24 + key_bytes + iv_bytes
    if subsamples == 0:  # the whole sample
        return True
    if len(info) < place + 8 * subsamples:
        return True
    return any(struct.unpack(">I", info[place + 8 * i + 4 : place + 8 * i + 8])[0] for i in range(subsamples))


def names_key(stream: av.VideoStream) -> bool:
    """Whether the container names a key for a whole stream, as Matroska and WebM do."""
    return "enc_key_id" in stream.metadata


def looks_encrypted(file: VideoFile) -> bool:
    """Whether a file's own structure says that its video is encrypted; asked where no whole picture comes out.

    Source: ISO/IEC 23001-7 (MP4); ISO/IEC 13818-1, 2.4.3.3 and 2.4.3.7 (transport and program streams); ASF 3.14.
    """
    head = file.read_at(0, 64)
    if head[4:8] in (b"ftyp", b"moov", b"styp", b"moof", b"free", b"skip", b"wide", b"mdat", b"sidx", b"pssh"):
        return any(kind in _MP4_ENCRYPTED for kind in _mp4_sample_entries(file))
    if head.startswith(bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")):
        header = file.read_at(0, 1 << 20)
        return any(guid in header for guid in _ASF_GUIDS)
    return _is_scrambled_ts(file) or _is_scrambled_ps(file.read_at(0, _LOOKED_AT_BYTES))


def _mp4_sample_entries(file: VideoFile) -> Iterator[bytes]:
    """The kind of each first sample entry of each track."""
    for kind, start, _ in _mp4_boxes(file, 0, file.size):
        if kind == b"stsd":
            yield file.read_at(start + 12, 4)


def _mp4_boxes(file: VideoFile, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Boxes in file order, with those inside of the ones on the way to the sample entries: kind, start, end of body."""
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", file.read_at(start, 8))
        body = start + 8
        if size == 1:
            size, body = int.from_bytes(file.read_at(start + 8, 8), "big"), start + 16
        if size == 0:
            size = end - start
        if size < body - start:
            return
        box_end = min(end, start + size)
        yield kind, body, box_end
        if kind in _MP4_PATH:
            yield from _mp4_boxes(file, body, box_end)
        start += size


def _is_scrambled_ts(file: VideoFile) -> bool:
    layout = packet_layout(file)
    if layout is None:
        return False
    size, first = layout
    count = min(_LOOKED_AT_BYTES, file.size) // size
    packets = np.frombuffer(file.read_at(0, count * size), np.uint8).reshape(count, size)[:, first:]
    pid = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
    payload = (packets[:, 3] & 0x10 != 0) & (pid > 31) & (pid != 0x1FFF)
    scrambled = packets[:, 3] & 0xC0 != 0
    return bool(payload.any() and scrambled[payload].mean() > _SCRAMBLED_SHARE)


def _is_scrambled_ps(data: bytes) -> bool:
    """Whether most video packets of a program stream (VOB) are scrambled."""
    if not data.startswith(b"\x00\x00\x01\xba"):
        return False
    marks, place = [], data.find(b"\x00\x00\x01\xe0")
    while 0 <= place < len(data) - 7:
        flags = data[place + 6]
        if flags & 0xC0 == 0x80:
            marks.append(bool(flags & 0x30))
        place = data.find(b"\x00\x00\x01\xe0", place + 4)
    return bool(marks) and sum(marks) > _SCRAMBLED_SHARE * len(marks)
