"""Reads points in time in ISO 8601."""

import re
from datetime import UTC, datetime

# ISO 8601 in its extended and its basic form; RFC 3339 allows a space instead of the T.
_ISO = re.compile(
    r"(\d{4}-(\d\d-\d\d|W\d\d(-\d)?)([T ]\d\d(:\d\d(:\d\d([.,]\d+)?)?)?(Z|[+-]\d\d(:?\d\d)?)?)?"
    r"|\d{4}(\d{4}|W\d\d\d?)(T\d\d(\d\d(\d\d([.,]\d+)?)?)?(Z|[+-]\d\d(:?\d\d)?)?)?)",
    re.ASCII | re.IGNORECASE,
)


def iso_instant(text: object) -> datetime | None:
    """The point in time that a text in ISO 8601 means, in UTC; without a zone it is UTC. None for anything else.

    Python's own parser accepts any letter between date and time, and so most numbers of thirteen digits.
    """
    if not isinstance(text, str) or not _ISO.fullmatch(text.strip()):
        return None
    try:
        instant = datetime.fromisoformat(text.strip().upper())
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
