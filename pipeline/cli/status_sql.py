"""`vidx status` and `vidx sql`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from pipeline.cli.options import archive_option, archive_uri, json_option
from pipeline.cli.print import note, print_csv, print_json, print_json_list, print_long_table, print_table
from pipeline.results.json_values import source_json
from pipeline.results.text import counted, size
from pipeline.sizes import parse_size
from storage.errors import UsageError
from storage.files import source_text

if TYPE_CHECKING:
    from storage.records import VideoRow

_BESIDES_BYTES, _THREAD_BYTES = 1 << 30, 32 << 20  # memory that DuckDB does not count, per process and per thread


@click.command()
@archive_option
@click.option("--failed", is_flag=True, help="List failed and partial videos, with the reason.")
@click.option("--deleted", is_flag=True, help="List deleted videos; `vidx index --restore-deleted` restores them.")
@json_option
def status(archive_dir: str, failed: bool, deleted: bool, as_json: bool) -> None:
    """Show what an archive holds, and how much of it can be searched.

    \b
    vidx status
    vidx status --failed
    vidx status --archive /data/archive --json
    """
    from storage.archive.archive import open_archive
    from storage.records import Status
    from storage.vectors.vector_index import open_index

    archive = open_archive(archive_uri(archive_dir))
    if failed:
        _print_failed([row for row in archive.videos.all() if row.status in (Status.PARTIAL, Status.FAILED)], as_json)
        return
    if deleted:
        _print_deleted([row for row in archive.videos.all() if row.status is Status.DELETED], as_json)
        return
    found = archive.status()
    pending = open_index(archive).pending_count
    if as_json:
        print_json(
            {
                "videos": {
                    "indexed": found.videos_indexed,
                    "partial": found.videos_partial,
                    "failed": found.videos_failed,
                    "deleted": found.videos_deleted,
                },
                "frames": found.frames,
                "frames_searchable": found.frames - pending,
                "frames_pending": pending,
                "videos_in_progress": found.videos_in_progress,
                "frames_in_progress": found.frames_in_progress,
                "frames_in_progress_searchable": found.frames_in_progress_shown,
                "model_ids": list(found.model_ids),
                "size_bytes": found.size_bytes,
                "version": found.version,
                "format_version": found.format_version,
                "videos_unconfined": found.videos_unconfined,
                "sandbox_missing": list(found.sandbox_missing),
            }
        )
        return
    counts = f"{found.videos_indexed} indexed, {found.videos_partial} partial, {found.videos_failed} failed"
    counts += f", {found.videos_deleted} deleted" if found.videos_deleted else ""
    rows = [
        ("archive", archive_dir),
        ("videos", counts),
        ("frames", f"{found.frames}, of which {found.frames - pending} can be searched"),
    ]
    if found.videos_in_progress:
        frames = "frame" if found.frames_in_progress == 1 else "frames"
        begun = f"{found.frames_in_progress:,} {frames} of {counted(found.videos_in_progress, 'video')}"
        rows.append(("in progress", f"{begun}, of which {found.frames_in_progress_shown:,} can be searched"))
    rows += [
        ("model", f"{archive.model_name} ({', '.join(found.model_ids) or archive.model_id})"),
        ("size", size(found.size_bytes)),
        ("version", f"{found.version}, format {found.format_version}"),
    ]
    if found.videos_unconfined:
        from workers.sandbox import told

        videos = counted(found.videos_unconfined, "video")
        rows.append(("sandbox", f"{videos} decoded without being kept from {told(found.sandbox_missing)}"))
    print_table(("", ""), rows)


def _print_failed(rows: Sequence[VideoRow], as_json: bool) -> None:
    columns = ("status", "reason", "source", "detail", "attempts")
    failed = [(row, row.known_problem) for row in rows]
    cells = [(row.status, why.reason, source_text(row.uri), why.detail, row.attempts) for row, why in failed]
    if as_json:
        print_json([dict(zip(columns, cell)) | source_json(row.uri) for cell, row in zip(cells, rows)])
    elif cells:
        print_table(columns, cells, right=("attempts",))
    else:
        click.echo("no video is failed or partial")


def _print_deleted(rows: Sequence[VideoRow], as_json: bool) -> None:
    if as_json:
        print_json([{"video_id": row.video_id} | source_json(row.uri) for row in rows])
    elif rows:
        print_table(("video", "source"), [(row.known_id[:8], source_text(row.uri)) for row in rows])
    else:
        click.echo("no video is deleted")


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
