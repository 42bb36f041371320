"""The output of the commands: JSON, CSV, tables, and one-line notes."""

from __future__ import annotations

import csv
import itertools
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from pipeline.results.json_values import json_value
from pipeline.text import printable
from pipeline.times import clock
from storage.files import source_text

if TYPE_CHECKING:
    from storage.records import Moment

GAP = 3  # cells between columns
LEAST_WIDTH = 16  # of a column whose text is folded
LONG_ROWS = 1000  # rows that decide the widths of a long table's columns


def print_json(value: Any) -> None:
    """Prints one JSON document: binary values in hex, times in ISO 8601, null for NaN."""
    click.echo(json_text(value, indent=2))


def print_json_list(values: Iterable[Any]) -> None:
    """Prints a JSON list, each entry as soon as it is there; an error leaves the document incomplete."""
    before = "\n"
    sys.stdout.write("[")
    for value in values:
        sys.stdout.write(before + textwrap.indent(json_text(value, indent=2), "  "))
        before = ",\n"
    sys.stdout.write("]\n" if before == "\n" else "\n]\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A JSON document, in one line or indented."""
    return json.dumps(json_value(value), ensure_ascii=not _is_utf(sys.stdout), indent=indent, allow_nan=False)


def _is_utf(stream: TextIO) -> bool:
    """Whether the stream can encode all characters."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def print_long_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table whose rows need not all be there yet; the first LONG_ROWS rows decide the widths."""
    cells = iter(rows)
    pieces = iter(lambda: list(itertools.islice(cells, LONG_ROWS)), [])
    first = next(pieces, [])
    print_table(columns, first)
    widths = [max(len(printable(row[place])) for row in (columns, *first)) for place in range(len(columns))]
    for piece in pieces:
        print_table(columns, piece, least_widths=widths, has_head=False)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    right: Sequence[str] = (),
    err: bool = False,
    least_widths: Sequence[int] = (),
    has_head: bool = True,
) -> None:
    """Prints a plain table; on a terminal that is too narrow, each row becomes lines of `name: value`.

    Control characters in cells are escaped, so that a file name cannot control the terminal.

    Args:
        columns: headings.
        rows: cells; None is an empty cell.
        right: headings of right-aligned columns.
        err: print to standard error.
        least_widths: minimum widths of the columns, in characters.
        has_head: print the headings.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else 100_000  # in a pipe or a file: one line
    console = Console(width=width, highlight=False, stderr=err)
    encoding = stream.encoding or "utf-8"
    cells = [[printable(cell).encode(encoding, "backslashreplace").decode(encoding) for cell in row] for row in rows]
    if not cells or _fits(columns, cells, right, console.width):
        line = "─" if _is_utf(stream) else "-"
        below_head = Box(f"    \n    \n {line * 2} \n    \n    \n    \n    \n    \n", ascii=line.isascii())
        table = Table(box=below_head, pad_edge=False, show_edge=False, show_header=has_head and any(columns))
        for name, least in itertools.zip_longest(columns, least_widths):
            side: Literal["right", "left"] = "right" if name in right else "left"
            table.add_column(name, justify=side, no_wrap=name in right, overflow="fold", min_width=least)
        for row in cells:
            table.add_row(*map(Text, row))
        with console.capture() as captured:
            console.print(table)
        text = captured.get()
    elif any(columns):
        text = "\n".join("".join(f"{name}: {cell}\n" for name, cell in zip(columns, row)) for row in cells)
    else:
        text = "".join(f"{row[0]}: {', '.join(row[1:])}\n" for row in cells)
    click.echo(text, nl=False, err=err)


def _fits(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[str], width: int) -> bool:
    """Whether the columns fit: numbers in one line, texts folded at LEAST_WIDTH or more."""
    from rich.cells import cell_len

    needed = GAP * (len(columns) - 1)
    for name, column in zip(columns, zip(*cells) if cells else [()] * len(columns)):
        widest = max(map(cell_len, (name, *column)))
        needed += widest if name in right else min(widest, LEAST_WIDTH)
    return needed <= width


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints CSV with a header; maps and lists in cells are JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (json_value(row[name]) for name in columns)
        writer.writerow(
            [json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell for cell in cells]
        )
    sys.stdout.flush()


def note(message: str) -> None:
    """Prints one line on standard error, with control characters escaped."""
    click.echo(printable(message), err=True)


def show_count(done: int, total: int, noun: str = "files") -> None:
    """Shows on a terminal how much is done, in one line that is overwritten."""
    if sys.stderr.isatty():
        click.echo(f"\r{done}/{total} {noun}", err=True, nl=done == total)


def print_moments(moments: Sequence[Moment], err: bool = False) -> None:
    """Prints a table of moments."""
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
