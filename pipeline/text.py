"""Values as text for people."""

from datetime import UTC, datetime
from typing import Any


def encodable(text: str) -> str:
    """The text with escapes for bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def minute(instant: datetime | None) -> str:
    """A time to the minute, in UTC."""
    return "" if instant is None else f"{instant.astimezone(UTC):%Y-%m-%d %H:%M}"


def printable(cell: Any) -> str:
    """A value as one line of text, with control characters escaped."""
    if cell is None:
        return ""
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell).hex()
    if isinstance(cell, float):
        cell = f"{cell:.3f}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(cell))


def size(size_bytes: int) -> str:
    """A size with a unit, such as 1.5 GB."""
    amount, units = float(size_bytes), ["TB", "GB", "MB", "kB", "B"]
    while amount >= 1000 and len(units) > 1:
        amount, _ = amount / 1000, units.pop()
    return f"{amount:.0f} B" if units[-1] == "B" else f"{amount:.1f} {units[-1]}"


def counted(count: int, noun: str) -> str:
    """A count with its noun, as in "1 frame" or "2 frames"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_sentence(text: str) -> str:
    """The first sentence of a text, in one line and without its full stop."""
    return printable(text.strip().split(". ")[0].removesuffix("."))
