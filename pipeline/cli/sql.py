"""`vidx sql`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

import click

from pipeline.cli.options import archive_option, archive_uri, json_option
from pipeline.cli.print import note, print_csv, print_json_list, print_long_table
from pipeline.sizes import parse_size
from storage.errors import UsageError

if TYPE_CHECKING:
    pass

_BESIDES_BYTES, _THREAD_BYTES = 1 << 30, 32 << 20  # memory that DuckDB does not count, per process and per thread


@click.command()
@click.argument("statement")
@archive_option
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop a statement that takes longer.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    show_default="half of the machine's, at most 4GB",
    help="Stop a statement that needs more memory, e.g. 512MB.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@json_option
def sql(
    statement: str, archive_dir: str, timeout_seconds: float, memory: str | None, as_csv: bool, as_json: bool
) -> None:
    """Query the archive's metadata with SQL (DuckDB).

    There are two views, `videos` and `frames`. `SELECT *` leaves out columns that hold tokens or pictures; name them to
    get them. A statement cannot access files, the network or DuckDB's settings. Rows are printed as they are found.

    \b
    vidx sql "SELECT source, status, duration_seconds FROM videos"
    vidx sql "SELECT count(*) AS n FROM frames WHERE time_seconds < 60" --json
    vidx sql "SELECT * FROM frames" --csv --timeout 3600 > frames.csv
    """
    if as_csv and as_json:
        raise UsageError("--csv --json: choose one of the two")
    memory_bytes = None if memory is None else parse_size("--memory", memory)
    from storage.archive.archive import open_archive
    from storage.processes import limited_memory
    from storage.sql import SqlLimits, stream_sql

    limits = SqlLimits(timeout_seconds, memory_bytes or SqlLimits().memory_bytes)
    archive = open_archive(archive_uri(archive_dir))
    more_bytes = limits.memory_bytes + _BESIDES_BYTES + _THREAD_BYTES * (os.cpu_count() or 1)
    with limited_memory(more_bytes), stream_sql(archive, statement, limits, _give_up) as result:
        if as_json:
            print_json_list(dict(zip(result.columns, row, strict=True)) for row in result.rows())
        elif as_csv:
            print_csv(result.columns, (dict(zip(result.columns, row, strict=True)) for row in result.rows()))
        else:
            print_long_table(result.columns, result.rows())


def _give_up(word: str) -> NoReturn:
    """Ends this process at once, even while DuckDB works."""
    note(f"vidx: {word}")
    os._exit(UsageError.exit_code)
