"""What people and programs see: JSON, tables, times, and one-line notes."""

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import click

from pipeline.times import clock
from storage.files import source_text
from storage.records import Moment


def print_json(value: Any) -> None:
    """One JSON document on standard output: binary values in hex, times in ISO 8601, no NaN."""
    click.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False))


def json_line(value: Any) -> str:
    """The same document in one line."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int():
            return value
        case str():
            return encodable(value)
        case float() | Decimal():
            return float(value) if math.isfinite(value) else None
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case date():
            return value.isoformat()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def encodable(text: str) -> str:
    """Text that every encoder takes, whatever the bytes of a file name were."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = (), err: bool = False
) -> None:
    """A plain table; control characters in cells are shown escaped, so that a file name cannot write the terminal.

    Args:
        columns: headings.
        rows: cells; None is shown as nothing.
        right: the headings of right-aligned columns.
        err: to standard error.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(columns))
    for name in columns:
        numeric = name in right
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    width = None if (sys.stderr if err else sys.stdout).isatty() else 100_000  # in a pipe or a file: one line
    Console(width=width, highlight=False, stderr=err).print(table)


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows by the names of columns as CSV on standard output, with a header; maps and lists in cells are JSON."""
    writer = csv.writer(click.get_text_stream("stdout"), lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (_plain(row[name]) for name in columns)
        writer.writerow(
            [json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell for cell in cells]
        )


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


def note(message: str) -> None:
    """One line for people, beside the results."""
    click.echo(message, err=True)


def first_sentence(text: str) -> str:
    """A text cut down to go into a line, its full stop taken off."""
    return printable(text.strip().split(". ")[0].removesuffix("."))


def moment_json(moment: Moment) -> dict[str, Any]:
    """A moment as `search --json` and `ask --json` give it."""
    return {
        "video_id": moment.video_id,
        "source": source_text(moment.uri),
        "start_seconds": round(moment.start_seconds, 6),
        "end_seconds": round(moment.end_seconds, 6),
        "best_seconds": round(moment.best_seconds, 6),
        "score": None if moment.score is None else round(moment.score, 6),
    }


def print_moments(moments: Sequence[Moment], err: bool = False) -> None:
    """Moments as a table, best first."""
    print_table(
        ("score", "start", "end", "best", "video", "source"),
        (
            (
                "" if m.score is None else f"{m.score:.3f}",
                clock(m.start_seconds),
                clock(m.end_seconds),
                clock(m.best_seconds),
                m.video_id[:8],
                source_text(m.uri),
            )
            for m in moments
        ),
        right=("score", "start", "end", "best"),
        err=err,
    )
