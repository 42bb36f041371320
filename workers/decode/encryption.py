"""Whether a video is encrypted, so that it is not reported as damaged and its noise is not indexed."""

import struct
from collections.abc import Iterator, Sequence

import av

from workers.decode.structure import mp4_boxes
from workers.decode.transport import scrambled_share
from workers.sources.video_file import VideoFile

ENCRYPTED_DETAIL = "the video is encrypted (DRM), and vidx has no key for it; index a copy without encryption"
_MP4_ENCRYPTED = {b"encv", b"drmi"}  # sample entries: Common Encryption, and FairPlay
_MP4_PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
_ASF_GUIDS = (  # objects of an encrypted file's header: Content Encryption, Extended Content Encryption
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)
_LOOKED_AT_BYTES = 4 << 20
_SCRAMBLED_SHARE = 0.5  # of the packets that carry a payload


def is_encrypted(packet: av.Packet) -> bool:
    """Whether a packet is encrypted, in whole or in part, by what its container says (Common Encryption in MP4)."""
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


def looks_encrypted(file: VideoFile) -> bool:
    """Whether a file's structure says that its video is encrypted; to be asked if no whole frame can be decoded.

    Source: ISO/IEC 23001-7 (MP4); ISO/IEC 13818-1, 2.4.3.3 and 2.4.3.7 (transport and program streams); ASF 3.14.
    """
    head = file.read_at(0, 64)
    if head[4:8] in (b"ftyp", b"moov", b"styp", b"moof", b"free", b"skip", b"wide", b"mdat", b"sidx", b"pssh"):
        return any(kind in _MP4_ENCRYPTED for kind in _mp4_sample_entries(file, 0, file.size))
    if head.startswith(bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")):
        header = file.read_at(0, 1 << 20)
        return any(guid in header for guid in _ASF_GUIDS)
    return scrambled_share(file, _LOOKED_AT_BYTES) > _SCRAMBLED_SHARE or _is_scrambled_ps(
        file.read_at(0, _LOOKED_AT_BYTES)
    )


def _mp4_sample_entries(file: VideoFile, start: int, end: int, path: Sequence[bytes] = _MP4_PATH) -> Iterator[bytes]:
    """The kind of the first sample entry of each track, found along a path of boxes."""
    for kind, body, box_end in mp4_boxes(file, start, end):
        if kind != path[0]:
            continue
        if len(path) == 1:
            yield file.read_at(body + 12, 4)
        else:
            yield from _mp4_sample_entries(file, body, min(end, box_end), path[1:])


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
