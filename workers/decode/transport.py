"""Missing packets of an MPEG transport stream, found by their counters, and places where recordings were joined.

Source: ISO/IEC 13818-1, 2.4.3 (packets, continuity_counter) and 2.4.4 (tables).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workers.sources.video_file import VideoFile

# (bytes of a packet, place of its sync byte): plain, with a time stamp before it, with error correction after it.
LAYOUTS = ((188, 0), (192, 4), (204, 0))
SYNC_BYTE = 0x47
_CHUNK_PACKETS = 1 << 15
_LAST_TABLE_PID, _NULL_PID = 31, 0x1FFF
_TABLE_PIDS = {0, 17}  # program association and service description; those of program maps are added


@dataclass(frozen=True)
class Losses:
    """Missing packets of one stream.

    Attributes:
        count: places where packets are missing or damaged.
        first_byte: the first of these places, or None.
        joins: places where another recording begins.
    """

    count: int
    first_byte: int | None
    joins: int


def packet_layout(file: VideoFile) -> tuple[int, int] | None:
    """Bytes of a packet and the place of its sync byte; None if the file is no transport stream."""
    head = file.read_at(0, 204 * 4)
    for size, first in LAYOUTS:
        if len(head) > 3 * size + first and all(head[first + i * size] == SYNC_BYTE for i in range(4)):
            return size, first
    return None


def find_losses(file: VideoFile, pid: int, size_bytes: int) -> Losses:
    """Missing packets of a stream, by jumps of its packet counter.

    FFmpeg calls a packet incomplete after any jump. But a jump where another recording begins loses nothing: there a
    new frame begins, and the counters of the tables jump too.

    Args:
        size_bytes: how much of the file is read.
    """
    layout = packet_layout(file)
    if layout is None:
        return Losses(0, None, 0)
    counters = {number: _Counter() for number in _TABLE_PIDS | {pid}}
    for start, packets in _packets(file, *layout, size_bytes):
        for table in _map_pids(packets) - counters.keys():
            counters[table] = _Counter()
        for number, counter in counters.items():
            counter.take(packets, start, number)
    lost, joined = [], 0
    own = counters.pop(pid)
    table_jumps = np.sort(np.concatenate([np.asarray(counter.jumps, np.int64) for counter in counters.values()]))
    for place, before, begins_picture in zip(own.jumps, own.before, own.begins):
        between = np.searchsorted(table_jumps, place) - np.searchsorted(table_jumps, before)
        if begins_picture and between > 0:
            joined += 1
        else:
            lost.append(place)
    lost = sorted(lost + own.damaged)
    return Losses(len(lost), lost[0] * layout[0] if lost else None, joined)


def scrambled_share(file: VideoFile, size_bytes: int) -> float:
    """The share of scrambled packets among those with a payload, in the first size_bytes of a file; 0 if none has."""
    layout = packet_layout(file)
    payload_count = scrambled_count = 0
    for _, packets in _packets(file, *layout, size_bytes) if layout else ():
        pids = _pids(packets)
        has_payload = (packets[:, 3] & 0x10 != 0) & (pids > _LAST_TABLE_PID) & (pids != _NULL_PID)
        payload_count += int(has_payload.sum())
        scrambled_count += int((packets[has_payload, 3] & 0xC0 != 0).sum())
    return scrambled_count / payload_count if payload_count else 0.0


class _Counter:
    """Follows the continuity counter of one PID.

    Attributes:
        jumps: numbers, in the file, of packets whose counter does not follow that of the packet before.
        before: for each jump, the number of the PID's packet before it.
        begins: for each jump, whether its packet begins a frame or table.
        damaged: numbers of packets that the receiver marked as damaged.
    """

    def __init__(self):
        self._last: tuple[int, int] | None = None  # counter and number of the packet before
        self.jumps: list[int] = []
        self.before: list[int] = []
        self.begins: list[bool] = []
        self.damaged: list[int] = []

    def take(self, packets: np.ndarray, start: int, pid: int) -> None:
        """Reads the next packets of the file: (N, 188) uint8, the first of them number `start`."""
        places = np.flatnonzero(_pids(packets) == pid)
        if not len(places):
            return
        own = packets[places]
        numbers = places + start
        counter, has_payload = own[:, 3] & 0x0F, own[:, 3] & 0x10 != 0
        may_jump = (own[:, 3] & 0x20 != 0) & (own[:, 4] > 0) & (own[:, 5] & 0x80 != 0)  # discontinuity_indicator
        last_counter, last_number = self._last or (-1, -1)
        before = np.concatenate([[last_counter], counter[:-1].astype(int)])
        before_number = np.concatenate([[last_number], numbers[:-1]])
        expected = np.where(has_payload, (before + 1) & 0x0F, before)
        jumps = np.flatnonzero((counter != expected) & ~may_jump & (before >= 0))
        self.jumps += numbers[jumps].tolist()
        self.before += before_number[jumps].tolist()
        self.begins += (own[jumps, 1] & 0x40 != 0).tolist()
        self.damaged += numbers[own[:, 1] & 0x80 != 0].tolist()
        self._last = int(counter[-1]), int(numbers[-1])


def _packets(file: VideoFile, size: int, first: int, size_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """The packets of a file in chunks: number of the first one, and (N, 188) uint8."""
    number, end = 0, size_bytes // size
    while number < end:
        data = file.read_at(number * size, size * min(_CHUNK_PACKETS, end - number))
        count = len(data) // size
        if not count:
            return
        yield number, np.frombuffer(data, np.uint8, count * size).reshape(count, size)[:, first : first + 188]
        number += count


def _pids(packets: np.ndarray) -> np.ndarray:
    """(N,) int, the PID of each packet; -1 if it has no sync byte."""
    pids = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
    return np.where(packets[:, 0] == SYNC_BYTE, pids, -1)


def _map_pids(packets: np.ndarray) -> set[int]:
    """PIDs of the program maps that the first association table names."""
    tables = packets[(_pids(packets) == 0) & (packets[:, 1] & 0x40 != 0) & (packets[:, 3] & 0x30 == 0x10)]
    if not len(tables):
        return set()
    section = tables[0, 5 + int(tables[0, 4]) :].tobytes()
    end = min(len(section), 3 + (int.from_bytes(section[1:3], "big") & 0x0FFF) - 4)
    return {int.from_bytes(section[place + 2 : place + 4], "big") & 0x1FFF for place in range(8, end, 4)}
