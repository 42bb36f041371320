"""`vidx status` and `vidx sql`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from pipeline.cli_options import archive_option, archive_uri, json_option

if TYPE_CHECKING:
    from storage.archive import ArchiveStatus
    from storage.records import VideoRow


@click.command()
@archive_option
@click.option("--failed", is_flag=True, help="List the videos that failed or are partial, and why.")
@click.option("--deleted", is_flag=True, help="List the videos that were deleted; --restore-deleted brings them back.")
@json_option
def status(archive_dir: str, failed: bool, deleted: bool, as_json: bool) -> None:
    """Show what an archive holds, and what of it can be searched.

    \b
    vidx status
    vidx status --failed
    vidx status --archive /data/archive --json
    """
    from pipeline.cli_print import print_json, print_table, size
    from storage.archive import open_archive
    from storage.records import Status
    from storage.vectors import open_index

    archive = open_archive(archive_uri(archive_dir))
    if failed:
        listed = (Status.PARTIAL, Status.FAILED)
        _print_failed([row for row in archive.videos() if row.status in listed], as_json)
        return
    if deleted:
        _print_deleted([row for row in archive.videos() if row.status is Status.DELETED], as_json)
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
            }
        )
        return
    counts = f"{found.videos_indexed} indexed, {found.videos_partial} partial, {found.videos_failed} failed"
    deleted = f", {found.videos_deleted} deleted" if found.videos_deleted else ""
    rows = (
        ("archive", archive_dir),
        ("videos", counts + deleted),
        ("frames", f"{found.frames}, of which {found.frames - pending} can be searched"),
        *_in_progress(found),
        ("model", f"{archive.model_name} ({', '.join(found.model_ids) or archive.model_id})"),
        ("size", size(found.size_bytes)),
        ("version", f"{found.version}, format {found.format_version}"),
    )
    print_table(("", ""), rows)


def _in_progress(found: ArchiveStatus) -> Iterator[tuple[str, str]]:
    """What is committed of videos that are not whole."""
    from pipeline.cli_print import counted

    if found.videos_in_progress:
        begun = f"{found.frames_in_progress:,} frames of {counted(found.videos_in_progress, 'video')}"
        yield "in progress", f"{begun}, of which {found.frames_in_progress_shown:,} can be searched"


def _print_failed(rows: Sequence[VideoRow], as_json: bool) -> None:
    from pipeline.cli_print import print_json, print_table
    from storage.files import source_text

    columns = ("status", "reason", "source", "detail", "attempts")
    cells = [(row.status, row.problem.reason, source_text(row.uri), row.problem.detail, row.attempts) for row in rows]
    if as_json:
        listed = [dict(zip(columns, row, strict=True)) for row in cells]
        print_json([{**entry, "source_uri": row.uri} for entry, row in zip(listed, rows, strict=True)])
    elif cells:
        print_table(columns, cells, right=("attempts",))
    else:
        click.echo("no video failed or is partial")


def _print_deleted(rows: Sequence[VideoRow], as_json: bool) -> None:
    from pipeline.cli_print import print_json, print_table
    from storage.files import source_text

    if as_json:
        print_json([{"video_id": row.video_id, "source": source_text(row.uri), "source_uri": row.uri} for row in rows])
    elif rows:
        print_table(("video", "source"), [(row.video_id[:8], source_text(row.uri)) for row in rows])
    else:
        click.echo("no video was deleted")


@click.command()
@click.argument("statement")
@archive_option
@json_option
def sql(statement: str, archive_dir: str, as_json: bool) -> None:
    """Query the archive's metadata with SQL (DuckDB).

    Views: `videos` and `frames`. Columns that hold tokens or pictures appear only when they are named. Statements
    cannot reach files, the network or the settings.

    \b
    vidx sql "SELECT source, status, duration_seconds FROM videos"
    vidx sql "SELECT count(*) AS n FROM frames WHERE time_seconds < 60" --json
    """
    from pipeline.cli_print import print_json, print_table
    from storage.archive import open_archive
    from storage.catalog import run_sql

    columns, rows = run_sql(open_archive(archive_uri(archive_dir)), statement)
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)
