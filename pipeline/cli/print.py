"""What the commands print: JSON, CSV, tables, and one-line notes."""

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
from pipeline.results.text import printable
from pipeline.times import clock
from storage.files import source_text
from storage.records import Moment

if TYPE_CHECKING:
    from rich.console import Console

GAP = 3  # cells between columns
LEAST_WIDTH = 16  # of a column of text that is folded
LONG_ROWS = 1000  # of a table whose columns' widths are worked out together


def print_json(value: Any) -> None:
    """One JSON document on standard output: binary values in hex, times in ISO 8601, no NaN."""
    click.echo(json.dumps(json_value(value), ensure_ascii=not _is_utf(sys.stdout), indent=2, allow_nan=False))


def print_json_list(values: Iterable[Any]) -> None:
    """The same of a list, an entry when it comes; where one cannot be had, the document breaks off."""
    before = "\n"
    sys.stdout.write("[")
    for value in values:
        text = json.dumps(json_value(value), ensure_ascii=not _is_utf(sys.stdout), indent=2, allow_nan=False)
        sys.stdout.write(before + textwrap.indent(text, "  "))
        before = ",\n"
    sys.stdout.write("]\n" if before == "\n" else "\n]\n")


def json_line(value: Any) -> str:
    """The same document in one line."""
    return json.dumps(json_value(value), ensure_ascii=not _is_utf(sys.stdout), allow_nan=False)


def _is_utf(stream: TextIO) -> bool:
    """Whether everything can be written there; elsewhere what cannot is escaped."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def print_long_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A plain table, of which the rows after the first LONG_ROWS are printed as they come, under the same columns."""
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
    """A plain table; control characters in cells are shown escaped, so that a file name cannot write the terminal.

    Where the terminal is too narrow for the columns, each row is told in lines of `name: value`.

    Args:
        columns: headings.
        rows: cells; None is shown as nothing.
        right: the headings of right-aligned columns.
        err: to standard error.
        least_widths: of the columns, in characters.
        has_head: print the headings.
    """
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else 100_000  # in a pipe or a file: one line
    console = Console(width=width, highlight=False, stderr=err)
    encoding = stream.encoding or "utf-8"
    cells = [[printable(cell).encode(encoding, "backslashreplace").decode(encoding) for cell in row] for row in rows]
    if not cells or _fits(columns, cells, right, console.width):
        line = "─" if _is_utf(stream) else "-"
        text = _table_text(console, columns, cells, right, line, least_widths, has_head and any(columns))
    elif any(columns):
        text = "\n".join("".join(f"{name}: {cell}\n" for name, cell in zip(columns, row)) for row in cells)
    else:
        text = "".join(f"{row[0]}: {', '.join(row[1:])}\n" for row in cells)
    click.echo(text, nl=False, err=err)


def _fits(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[str], width: int) -> bool:
    """Whether every column can be shown whole: numbers in one line, texts folded into lines of a readable width."""
    from rich.cells import cell_len

    needed = GAP * (len(columns) - 1)
    for name, column in zip(columns, zip(*cells) if cells else [()] * len(columns)):
        widest = max(map(cell_len, (name, *column)))
        needed += widest if name in right else min(widest, LEAST_WIDTH)
    return needed <= width


def _table_text(
    console: Console,
    columns: Sequence[str],
    cells: Iterable[Sequence[str]],
    right: Sequence[str],
    line: str,
    least_widths: Sequence[int],
    has_head: bool,
) -> str:
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    below_head = Box(f"    \n    \n {line * 2} \n    \n    \n    \n    \n    \n", ascii=line.isascii())
    table = Table(box=below_head, pad_edge=False, show_edge=False, show_header=has_head)
    for name, least in itertools.zip_longest(columns, least_widths):
        numeric = name in right
        side: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(name, justify=side, no_wrap=numeric, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*map(Text, row))
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows by the names of columns as CSV on standard output, with a header; maps and lists in cells are JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (json_value(row[name]) for name in columns)
        writer.writerow(
            [json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell for cell in cells]
        )
    sys.stdout.flush()


def note(message: str) -> None:
    """One line for people, beside the results; names in it cannot write the terminal."""
    click.echo(printable(message), err=True)


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
