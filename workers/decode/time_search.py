"""Binary search for a time in files without an index, which FFmpeg would read from their start.

From any byte on, the next place can be found where reading may begin, with its time.
"""

import re
from collections.abc import Callable, Iterator

from workers.sources.video_file import VideoFile

CHUNK_BYTES = 1 << 12  # the first read; each further one reads twice as much
HEAD_BYTES = 1 << 16
_FLV_TAG_BYTES = 11
# A cluster: its size in one to eight bytes, an optional checksum, its time. Source: RFC 9559, 5.1.3.
_CLUSTER = re.compile(
    rb"\x1f\x43\xb6\x75(?:[\x80-\xff]|[\x40-\x7f].|[\x20-\x3f]..|[\x10-\x1f].{3}|[\x08-\x0f].{4}|[\x04-\x07].{5}"
    rb"|[\x02\x03].{6}|\x01.{7})(?:\xbf\x84.{4})?\xe7([\x81-\x88])(.{8})",
    re.DOTALL,
)
_CLUSTER_BYTES = 4 + 8 + 6 + 2 + 8
_CUES = b"\x1c\x53\xbb\x6b"

Finder = Callable[[VideoFile, int, int], tuple[int, int] | None]


def find_tag(file: VideoFile, start: int, end: int) -> tuple[int, int] | None:
    """Offset and milliseconds of the first whole FLV tag in [start, end), or None.

    A tag is recognised by its length, which is written before and after it. Source: FLV specification 10.1, E.4.1.
    """
    for offset, count in _chunks(start, end):
        chunk = file.read_at(offset, count + _FLV_TAG_BYTES)
        for match in re.finditer(rb"(?=[\x08\x09\x12](...)(...)(.)\x00\x00\x00)", chunk, re.DOTALL):
            length = int.from_bytes(match[1], "big") + _FLV_TAG_BYTES
            place = offset + match.start()
            if place < end and int.from_bytes(file.read_at(place + length, 4), "big") == length:
                return place, int.from_bytes(match[3] + match[2], "big", signed=True)
    return None


def find_cluster(file: VideoFile, start: int, end: int) -> tuple[int, int] | None:
    """Offset and time, in the file's time unit, of the first Matroska cluster in [start, end), or None."""
    for offset, count in _chunks(start, end):
        chunk = file.read_at(offset, count + _CLUSTER_BYTES)
        match = _CLUSTER.search(chunk)
        if match is not None and offset + match.start() < end:
            return offset + match.start(), int.from_bytes(match[2][: match[1][0] & 0x7F], "big")
    return None


def has_cues(file: VideoFile) -> bool:
    """Whether a Matroska file announces an index before its first cluster."""
    head = file.read_at(0, HEAD_BYTES)
    match = _CLUSTER.search(head)
    return _CUES in head[: match.start() if match else None]


def place_before(file: VideoFile, find: Finder, ticks: int) -> int | None:
    """The offset of the last place at or before a time, to about CHUNK_BYTES; None if the first place is later.

    Args:
        file: with ascending times.
        find: gives the offset and time of the first place in a range of bytes.
    """
    low, high, found = 0, file.size, None
    while high - low > CHUNK_BYTES:
        middle = (low + high) // 2
        place = find(file, middle, high)
        if place is not None and place[1] <= ticks:
            low, found = place[0] + 1, place[0]
        else:
            high = middle
    if found is None:
        place = find(file, 0, high)
        found = place[0] if place is not None and place[1] <= ticks else None
    return found


def _chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Offset and length of chunks of [start, end), each twice as long as the one before."""
    count = CHUNK_BYTES
    while start < end:
        yield start, min(count, end - start)
        start, count = start + count, 2 * count
