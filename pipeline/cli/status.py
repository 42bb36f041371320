"""`vidx status`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import archive_option, archive_uri, json_option
from pipeline.cli.print import print_json, print_table
from pipeline.results.json_values import source_json
from pipeline.text import counted, size
from storage.files import source_text

if TYPE_CHECKING:
    from storage.records import VideoRow


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
        _print_failed(archive.videos.having("status", Status.PARTIAL, Status.FAILED), as_json)
        return
    if deleted:
        _print_deleted(archive.videos.having("status", Status.DELETED), as_json)
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
