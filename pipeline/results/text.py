"""Values as text for people: one line each, without control characters."""

from datetime import UTC, datetime
from typing import Any


def encodable(text: str) -> str:
    """Text that every encoder takes, whatever the bytes of a file name were."""
    return text.encode("utf-8", "backslashreplace").decode()


def minute(instant: datetime | None) -> str:
    """A point in time as people read it, in UTC."""
    return "" if instant is None else f"{instant.astimezone(UTC):%Y-%m-%d %H:%M}"


def printable(cell: Any) -> str:
    """A cell as one line of text without control characters."""
    if cell is None:
        return ""
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell).hex()
    if isinstance(cell, float):
        cell = f"{cell:.3f}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(cell))


def size(size_bytes: int) -> str:
    """Bytes with a unit."""
    amount, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """As "1 frame", "2 frames"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_sentence(text: str) -> str:
    """A text cut down to go into a line, its full stop taken off."""
    return printable(text.strip().split(". ")[0].removesuffix("."))
