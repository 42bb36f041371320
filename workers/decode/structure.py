"""What a file's bytes show without decoding: that it is no video, or that its end is missing.

FFmpeg reads a cut file up to its last whole packet and reports no error. So the sizes that the container states are
compared with the file's: boxes of MP4, the segment of Matroska, chunks of AVI, pages of Ogg, packets of MPEG-TS, tags
of FLV, the header of ASF.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from itertools import takewhile

from storage.errors import VideoProblem
from storage.records import Reason
from workers.decode.transport import packet_layout
from workers.sources.video_file import VideoFile

HEAD_BYTES = 4096
_UNKNOWN_SIZE = 0xFFFFFFFF
_JPEG_HEAD_BYTES = 3 << 16  # its first segments, of at most 64 KB each
_KEPT_ZEROS = 1024  # zeros at the end that may belong to the last packet

# Text that refers to other files or addresses; always refused.
_REFUSED = (
    (rb"#EXTM3U", "an HLS playlist"),
    (rb"ffconcat version", "an ffconcat script"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<([a-z0-9]+:)?MPD[\s>]", "a DASH manifest"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<SmoothStreamingMedia", "a Smooth Streaming manifest"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(smil|playlist|asx)[\s>]", "a playlist"),
    (rb"\[playlist\]|\[Reference\]|#EXTINF", "a playlist"),
    (rb"v=0\r?\n[a-z]=", "a session description (SDP)"),
    (rb"(file|ffconcat|inpoint|outpoint)\s+['\"]?[^\n]+\n", "a list of files"),
    (rb"rtsptext", "a stream reference"),
)
_PICTURES = (
    (rb"\x89PNG\r\n", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"GIF8[79]a", "a GIF picture"),
    (rb"RIFF....WEBP", "a WebP picture"),
    (rb"BM....\x00\x00\x00\x00", "a BMP picture"),
    (rb"II\*\x00|MM\x00\*", "a TIFF picture"),
    (rb"....ftyp(heic|heix|heim|heis|mif1|avif)", "a HEIF picture"),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "a JPEG XL picture"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"8BPS", "a Photoshop picture"),
    (rb"Paint Shop Pro Image", "a Paint Shop Pro picture"),
    (rb"P[1-7]\s", "a PNM picture"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg|<svg)", "an SVG picture"),
)
_OTHER = (
    (rb"PK\x03\x04|PK\x05\x06", "a ZIP archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive"),
    (rb"%PDF", "a PDF document"),
    (rb"\x7fELF|MZ", "a program"),
    (rb".{1060,1080}(M[.!]K[.!]|FLT[48]|[1-9]CHN|[1-3]\dCH)", "tracker music"),  # after a title of 20 bytes
    (rb"L\x00R\x00F\x00\x00\x00", "an e-book"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!DOCTYPE\s+html|html)", "an HTML page"),
)

_CONTROLS = {*range(32), 127} - set(b"\t\n\v\f\r\x1b")  # bytes that do not occur in text


def refuse_others(file: VideoFile) -> None:
    """Raises VideoProblem if the file is empty, text that refers to other files, or a picture that FFmpeg would play.

    FFmpeg would play HEIF pictures, and JPEG pictures that contain others (a preview, or a map for HDR) in the
    Multi-Picture Format of CIPA DC-007.
    """
    head = file.read_at(0, HEAD_BYTES)
    if not head:
        raise VideoProblem(Reason.NOT_A_VIDEO, "the file is empty")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    kind = _match(_REFUSED, text)
    if kind is not None:
        raise VideoProblem(Reason.REFUSED_FORMAT, f"this is {kind}, which refers to other files; index those instead")
    if head[4:8] == b"ftyp" and _is_heif_picture(file):
        raise VideoProblem(Reason.NOT_A_VIDEO, "this is a HEIF picture, not a video")
    if begins_as_jpeg(file) and re.search(rb"\xff\xe2..MPF\0", file.read_at(0, _JPEG_HEAD_BYTES), re.DOTALL):
        raise VideoProblem(Reason.NOT_A_VIDEO, "this is a JPEG picture, not a video")


def name_content(file: VideoFile) -> str | None:
    """The kind of a file that is certainly no video, such as "a PNG picture"; else None."""
    head = file.read_at(0, HEAD_BYTES)
    kind = foreign_content(head)
    if kind is None and len(head) < 16:
        return f"a file of {len(head)} byte{'s' if len(head) != 1 else ''}"
    if kind is None and not head.strip(b"\0"):
        return "a file that begins with zeros"
    return kind


def foreign_content(head: bytes) -> str | None:
    """The kind of a file that is no video, by its first bytes; None if they do not show it."""
    kind = _match(_PICTURES, head) or _match(_OTHER, head.removeprefix(b"\xef\xbb\xbf").lstrip())
    return "text" if kind is None and _is_text(head) else kind


def is_picture(file: VideoFile) -> str | None:
    """The kind of picture, if the file is one."""
    return _match(_PICTURES, file.read_at(0, HEAD_BYTES))


def begins_as_jpeg(file: VideoFile) -> bool:
    """Whether the first bytes are a JPEG picture's."""
    return file.read_at(0, 3) == b"\xff\xd8\xff"


def _is_heif_picture(file: VideoFile) -> bool:
    """True if there are picture items and no movie box. Source: ISO/IEC 23008-12, 6 and 10."""
    has_items = False
    for kind, body, _ in _top_boxes(file):
        if kind == b"moov":
            return False
        has_items |= kind == b"meta" and b"pict" in file.read_at(body, 56)
    return has_items


def end_of_recording(file: VideoFile) -> int:
    """Where a transport stream or Ogg file ends, without trailing zeros, which FFmpeg would report as damage."""
    if packet_layout(file) is None and file.read_at(0, 4) != b"OggS":
        return file.size
    return min(file.size, _end_of_content(file) + _KEPT_ZEROS)


def cut_short(file: VideoFile) -> str | None:
    """How a file shows that its end is missing; None if it does not."""
    now = os.fstat(file.descriptor).st_size
    if now < file.size:
        return f"it shrank from {file.size} to {now} bytes while it was read"
    head = file.read_at(0, 64)
    for pattern, check in _CHECKS:
        if re.match(pattern, head, re.DOTALL):
            return check(file)
    return None


def _match(table: tuple[tuple[bytes, str], ...], head: bytes) -> str | None:
    return next((kind for pattern, kind in table if re.match(pattern, head, re.DOTALL | re.IGNORECASE)), None)


def _is_text(head: bytes) -> bool:
    """Whether the bytes are text, in UTF-8, UTF-16 with a byte order mark, or an encoding of one byte a letter."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head[: len(head) // 2 * 2].decode("utf-16", "ignore")
        return all(character.isprintable() or character.isspace() for character in text)
    return bool(head) and not _CONTROLS & set(head)


def _missing(file: VideoFile, end: int, what: str) -> str | None:
    if end <= file.size:
        return None
    return f"{what} ends at byte {end}, the file at {file.size}"


def _mp4_cut(file: VideoFile) -> str | None:
    """Compares the ends of the top-level boxes with the file's size."""
    seen = set()
    for kind, _, end in _top_boxes(file):
        missing = _missing(file, end, f"box '{kind.decode('ascii')}'")
        if missing:
            return missing
        seen.add(kind)
    if b"mdat" in seen and b"moov" not in seen:
        return "its index (moov) is missing, as after an interrupted recording or upload"
    return None


def _top_boxes(file: VideoFile) -> Iterator[tuple[bytes, int, int]]:
    """The top-level boxes, as mp4_boxes, up to padding or junk after the last one."""
    return takewhile(lambda box: box[0].replace(b" ", b"").isalnum(), mp4_boxes(file, 0, file.size))


def mp4_boxes(file: VideoFile, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of one level of an MP4: kind, start and end of the body. Source: ISO/IEC 14496-12, 4.2.

    Args:
        start, end: the range of the level; the last box may state an end after it.
    """
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", file.read_at(start, 8))
        body = start + 8
        if size == 1:
            size, body = int.from_bytes(file.read_at(start + 8, 8), "big"), start + 16
        if size == 0:  # up to the end
            size = end - start
        if size < body - start:
            return
        yield kind, body, start + size
        start += size


def _matroska_cut(file: VideoFile) -> str | None:
    """Compares the segment's size with the file's. Source: RFC 8794, 4 and 6."""
    offset = 0
    for _ in range(16):
        element, id_length = _ebml_number(file.read_at(offset, 12), keep_marker=True)
        size, size_length = _ebml_number(file.read_at(offset + id_length, 12), keep_marker=False)
        if not id_length or not size_length:
            return None
        start = offset + id_length + size_length
        if size is None:  # unknown, as in a live recording
            return None
        if element == 0x18538067:
            return _missing(file, start + size, "the segment")
        offset = start + size
    return None


def _ebml_number(data: bytes, keep_marker: bool) -> tuple[int | None, int]:
    """An EBML variable-length integer and its length in bytes; None if all bits are one (unknown)."""
    if not data or data[0] == 0:
        return 0, 0
    length = 9 - data[0].bit_length()
    if len(data) < length:
        return 0, 0
    value = int.from_bytes(data[:length], "big")
    if keep_marker:
        return value, length
    value &= (1 << 7 * length) - 1
    return (None if value == (1 << 7 * length) - 1 else value), length


def _avi_cut(file: VideoFile) -> str | None:
    """Compares the ends of the RIFF chunks (one per gigabyte in OpenDML) with the file's size."""
    offset = 0
    while offset + 12 <= file.size:
        kind, size, form = struct.unpack("<4sI4s", file.read_at(offset, 12))
        if kind != b"RIFF" or size == _UNKNOWN_SIZE:  # a program that writes to a pipe cannot fill the size in
            return None
        if size == 0 and form in (b"AVI ", b"AVIX"):
            return "its header was never completed, as after an interrupted recording"
        missing = _missing(file, offset + 8 + size, "the RIFF chunk")
        if missing:
            return missing
        offset += 8 + size + size % 2
    return None


def _ogg_cut(file: VideoFile) -> str | None:
    """Checks that the last page is whole and that one of the last pages closes a stream. Source: RFC 3533, 6."""
    tail_start = max(0, file.size - 5 * 65307)  # five pages of the largest size
    tail = file.read_at(tail_start, file.size - tail_start)
    closed, last = False, None
    for match in re.finditer(rb"OggS\x00", tail):
        page = tail[match.start() :]
        if len(page) < 27 or len(page) < 27 + page[26]:
            return "its last page is cut"
        closed |= bool(page[5] & 4)
        last = match.start() + 27 + page[26] + sum(page[27 : 27 + page[26]])
    if last is None:
        return None
    if last > len(tail):
        return "its last page is cut"
    return None if closed else "its last page does not close the stream"


def _ts_cut(file: VideoFile) -> str | None:
    layout = packet_layout(file)
    if layout is None:
        return None
    rest = file.size % layout[0]
    is_padding = not file.read_at(file.size - rest, rest).strip(b"\0")
    return None if is_padding else f"its last packet has {rest} of {layout[0]} bytes"


def _flv_cut(file: VideoFile) -> str | None:
    """Compares the last four bytes with the length of the last tag; zeros may follow them, or be part of them."""
    content_end = _end_of_content(file)
    ends = (end for end in (content_end, content_end + 1, content_end + 2, content_end + 3) if end <= file.size)
    return None if any(_ends_with_flv_tag(file, end) for end in ends) else "its last tag is cut"


def _ends_with_flv_tag(file: VideoFile, end: int) -> bool:
    length = int.from_bytes(file.read_at(end - 4, 4), "big")
    tag = file.read_at(end - 4 - length, 4)
    return len(tag) == 4 and tag[0] & 0x1F in (8, 9, 18) and int.from_bytes(tag[1:4], "big") + 11 == length


def _end_of_content(file: VideoFile) -> int:
    """Where the zeros at the end of a file begin."""
    end = file.size
    while end > 0:
        start = max(0, end - (1 << 16))
        content = file.read_at(start, end - start).rstrip(b"\0")
        if content:
            return start + len(content)
        end = start
    return 0


def _asf_cut(file: VideoFile) -> str | None:
    """Compares the size in the file properties with the file's. Source: ASF specification 3.2."""
    header = file.read_at(0, 1 << 16)
    place = header.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if place < 0 or len(header) < place + 92:
        return None
    broadcast = header[place + 88] & 1
    size = int.from_bytes(header[place + 40 : place + 48], "little")
    return None if broadcast else _missing(file, size, "the data")


_CHECKS: tuple[tuple[bytes, Callable[[VideoFile], str | None]], ...] = (
    (rb"....(ftyp|moov|mdat|free|skip|wide|styp|moof|pnot)", _mp4_cut),
    (rb"\x1a\x45\xdf\xa3", _matroska_cut),
    (rb"RIFF....AVI ", _avi_cut),
    (rb"OggS", _ogg_cut),
    (rb"\x47|....\x47", _ts_cut),
    (rb"FLV\x01", _flv_cut),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _asf_cut),
)
