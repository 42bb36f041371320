"""What ops/fuzz and ops/fuzz_archive do to files: bytes changed at random, and values that nobody should believe."""

from typing import Any

import numpy as np

NUMBERS = (-1, 0, 1, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 10**30)
ODD_VALUES = (None, True, 0.5, 1e300, float("nan"), float("inf"), "", "x", "0", [], [1], {}, {"a": 1}, "1" * 5000)
DEEP = "[" * 100_000


def damage_bytes(source: np.random.Generator, content: bytes) -> bytes:
    """A file with one to six things wrong with it, most of them near its beginning, where the structure is."""
    data = bytearray(content)
    for _ in range(source.integers(1, 7)):
        near = source.random() < 0.5
        place = int(source.integers(min(len(data), 1500) if near else len(data)))
        length = int(2 ** source.uniform(0, 10))
        stretch = data[place : place + length]
        match source.integers(7):
            case 0 | 1:
                data[place] ^= 1 << source.integers(8)
            case 2:
                data[place : place + 4] = source.bytes(4)
            case 3:
                data[place : place + length] = source.bytes(len(stretch))
            case 4:
                data[place : place + length] = b""
            case 5:
                data[place:place] = stretch
            case 6:
                data[place:] = b"" if source.random() < 0.3 else data[place:][::-1][:length] + data[place + length :]
        if len(data) < 16:
            return bytes(data)
    return bytes(data)


def damage_number(source: np.random.Generator, content: bytes) -> bytes:
    """A binary file in which one number, most likely one of its head or its end, is another."""
    data = bytearray(content)
    width = int(source.choice([4, 8]))
    if len(data) < width:
        return bytes(data)
    last = len(data) - width
    place = int(source.choice([source.integers(min(last, 200) + 1), last - source.integers(min(last, 200) + 1)]))
    number = int(NUMBERS[source.integers(len(NUMBERS))]) % 2 ** (8 * width)
    data[place : place + width] = number.to_bytes(width, "little")
    return bytes(data)


def hostile_names(outside: str, relative: str) -> tuple[str, ...]:
    """Names that mean something outside an archive, or nothing at all.

    Args:
        outside: absolute path of a file that is nobody's business.
        relative: the same, from a folder of the archive.
    """
    encoded = relative.replace("/", "%2F").replace(".", "%2e")
    return (
        outside,
        f"file://{outside}",
        relative,
        relative.replace("..", "%2e%2e"),
        encoded,
        f"./{relative}",
        "..",
        ".",
        "/",
        "a/b",
        "a\\b",
        "nul\0byte",
        "line\nbreak",
        "\x1b]0;title\x07",
        "n" * 300,
        "n" * 70_000,
        "/dev/zero",
        "\ud800",
    )


def damage_value(source: np.random.Generator, document: Any, names: tuple[str, ...]) -> Any:
    """A JSON document in which one value is missing, doubled, or something else."""
    places = [*_places(document)]
    if not places:
        return names[source.integers(len(names))]
    holder, key = places[source.integers(len(places))]
    match source.integers(8):
        case 0 | 1 | 2:
            holder[key] = names[source.integers(len(names))]
        case 3 | 4:
            holder[key] = NUMBERS[source.integers(len(NUMBERS))]
        case 5 | 6:
            holder[key] = ODD_VALUES[source.integers(len(ODD_VALUES))]
        case 7 if isinstance(holder, dict):
            del holder[key]
        case 7:
            holder.append(holder[key])
    return document


def _places(document: Any) -> Any:
    """Every holder and key of a value in a document."""
    items = document if isinstance(document, dict) else dict(enumerate(document if isinstance(document, list) else ()))
    for key, value in list(items.items()):
        yield document, key
        yield from _places(value)
