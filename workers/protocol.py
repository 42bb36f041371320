"""Messages between a child process and its owner: a JSON header, then raw bytes.

The child reads hostile files. So nothing that comes from it is unpickled or executed, and every size is checked.
"""

import json
import socket
import struct
from datetime import datetime
from fractions import Fraction
from typing import Any

from storage.records import Probe

_HEADER = struct.Struct("<II")
MAX_HEADER_BYTES = 64 << 20  # room for the cuts of a very long video
MAX_BODY_BYTES = 16 << 20


class Closed(Exception):
    """The other process has ended, or sent something that is no message."""


def send(connection: socket.socket, header: dict, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
    """Sends one message, and open files with it.

    Raises:
        Closed: the other process has ended.
    """
    text = json.dumps(header).encode()
    lengths = _HEADER.pack(len(text), len(body))
    try:
        if descriptors:
            socket.send_fds(connection, [lengths], list(descriptors))
            connection.sendall(text + body)
        else:
            connection.sendall(b"".join((lengths, text, body)))
    except (BrokenPipeError, ConnectionError) as error:
        raise Closed from error


def receive(connection: socket.socket, with_descriptor: bool = False) -> tuple[dict, bytearray, int | None]:
    """The next message: header, body, and the descriptor of an open file if one is expected and was sent.

    Raises:
        Closed: the other process has ended, or sent something that is no message.
        TimeoutError: no byte came within the socket's timeout.
    """
    start, descriptor = b"", None
    try:
        if with_descriptor:
            start, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
            descriptor = descriptors[0] if descriptors else None
            if not start:
                raise Closed
        header_bytes, body_bytes = _HEADER.unpack(start + _receive_exactly(connection, _HEADER.size - len(start)))
        if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise Closed
        header = json.loads(_receive_exactly(connection, header_bytes))
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
            raise Closed
        return header, _receive_exactly(connection, body_bytes), descriptor
    except (ConnectionError, ValueError) as error:
        raise Closed from error


def _receive_exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        part = connection.recv_into(view[got:])
        if part == 0:
            raise Closed
        got += part
    return data


def probe_to_json(probe: Probe) -> dict[str, Any]:
    """A Probe as values that JSON can hold."""
    created = None if probe.created_at is None else probe.created_at.isoformat()
    base = [probe.time_base.numerator, probe.time_base.denominator]
    return vars(probe) | {"time_base": base, "cuts": list(probe.cuts), "created_at": created}


def probe_from_json(values: dict) -> Probe:
    """The Probe from such values; it checks itself."""
    cuts = tuple((int(ticks), int(rank)) for ticks, rank in values["cuts"])
    created = None if values["created_at"] is None else datetime.fromisoformat(values["created_at"])
    return Probe(**values | {"time_base": Fraction(*values["time_base"]), "cuts": cuts, "created_at": created})
