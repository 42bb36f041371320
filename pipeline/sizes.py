"""Sizes in bytes as people write them."""

import re

from storage.errors import UsageError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
MOST_BYTES = 1 << 50


def parse_size(option: str, text: str) -> int:
    """The bytes of a size written as `512MB`, `1.5 GiB` or `4096`.

    Raises:
        UsageError: the text is not such a size.
    """
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text.strip())
    size = round(float(match[1]) * _UNITS.get((match[2] or "B").upper(), 0)) if match else 0
    if not 1 <= size <= MOST_BYTES:
        raise UsageError(f"{option} {text}: not a size; give a number above 0 with a unit, such as 512MB or 4GiB")
    return size
