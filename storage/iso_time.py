"""Points in time as text: ISO 8601 and nothing else."""

import re
from datetime import UTC, datetime

# ISO 8601 in its extended and its basic form; RFC 3339 has a space for the T.
_ISO = re.compile(
    r"(\d{4}-(\d\d-\d\d|W\d\d(-\d)?)([T ]\d\d(:\d\d(:\d\d([.,]\d+)?)?)?(Z|[+-]\d\d(:?\d\d)?)?)?"
    r"|\d{4}(\d{4}|W\d\d\d?)(T\d\d(\d\d(\d\d([.,]\d+)?)?)?(Z|[+-]\d\d(:?\d\d)?)?)?)",
    re.ASCII | re.IGNORECASE,
)


def iso_instant(text: object) -> datetime | None:
    """A point in time from ISO 8601, in UTC; without a zone it is UTC. None of everything else.

    Python's reader takes any letter between date and time, so that it finds a time in most numbers of thirteen digits.
    """
    if not isinstance(text, str) or not _ISO.fullmatch(text.strip()):
        return None
    try:
        instant = datetime.fromisoformat(text.strip().upper())
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
