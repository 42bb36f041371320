"""`vidx delete` and `vidx expire`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from pipeline.cli_options import archive_option, archive_uri, json_option

if TYPE_CHECKING:
    from storage.archive import Archive
    from storage.records import VideoRow

_DAYS = {"h": 1 / 24, "d": 1, "w": 7, "y": 365}

dry_run_option = click.option("--dry-run", is_flag=True, help="List what would be deleted, and change nothing.")


@click.command()
@click.argument("videos", nargs=-1, required=True, metavar="VIDEO...")
@archive_option
@dry_run_option
@json_option
def delete(videos: tuple[str, ...], archive_dir: str, dry_run: bool, as_json: bool) -> None:
    """Take videos out of an archive: no query finds them any more, from this moment on.

    VIDEO is a path, a URI, a file name, or six or more digits of an id. The next `vidx index` leaves deleted content
    out, but for --restore-deleted. The video files themselves are not touched. `vidx clean --older-than 0` removes the
    frames from the disk; until they are cleaned, --restore-deleted brings them back without decoding.

    \b
    vidx delete party.mp4
    vidx delete 1f0c22 /videos/door.mkv && vidx clean --older-than 0
    """
    from storage.archive import open_archive

    archive = open_archive(archive_uri(archive_dir))
    rows = {row.uri: row for row in map(archive.find_video, videos)}  # all of them, before any is deleted
    _delete(archive, list(rows.values()), dry_run, as_json)


@click.command()
@click.option("--older-than", required=True, metavar="AGE", help="Such as 90d, 12h, 8w or 2y.")
@archive_option
@dry_run_option
@json_option
def expire(older_than: str, archive_dir: str, dry_run: bool, as_json: bool) -> None:
    """Take out the videos that were recorded longer ago than an age.

    A video's age counts from its capture time; where that is not known, from when its file was last changed. What is
    taken out is as deleted as by `vidx delete`.

    \b
    vidx expire --older-than 90d
    vidx expire --older-than 12h --dry-run
    """
    from storage.archive import open_archive

    oldest = _instant_before(older_than)
    archive = open_archive(archive_uri(archive_dir))
    _delete(archive, [row for row in archive.videos() if _recorded_before(row, oldest)], dry_run, as_json)


def _instant_before(text: str) -> datetime:
    """Now less an age."""
    from storage.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwy])", text.strip())
    try:
        if match:
            return datetime.now(UTC) - timedelta(days=float(match[1]) * _DAYS[match[2]])
    except OverflowError:
        pass
    raise UsageError(f"--older-than {text}: not an age; give a number with h, d, w or y, e.g. 90d")


def _recorded_before(row: VideoRow, instant: datetime) -> bool:
    from storage.records import Status

    if row.status is Status.DELETED:
        return False
    if row.captured_at is not None:
        return row.captured_at < instant
    return row.mtime_ns is not None and row.mtime_ns / 1e9 < instant.timestamp()


def _delete(archive: Archive, rows: Sequence[VideoRow], dry_run: bool, as_json: bool) -> None:
    from pipeline.cli_print import counted, print_json, print_table
    from storage.files import source_text

    if not dry_run:
        rows = archive.delete(rows)
    frames = sum(row.frame_count for row in rows)
    if as_json:
        listed = [{"video_id": row.video_id, "source": source_text(row.uri), "source_uri": row.uri} for row in rows]
        print_json({"dry_run": dry_run, "videos_deleted": len(rows), "frames_deleted": frames, "videos": listed})
        return
    if rows:
        print_table(("video", "frames", "source"), _cells(rows), right=("frames",))
    done = "would be deleted" if dry_run else "deleted"
    click.echo(f"{counted(len(rows), 'video')} with {counted(frames, 'frame')} {done}")
    if rows and not dry_run:
        click.echo("their frames leave the disk with `vidx clean --older-than 0`")


def _cells(rows: Sequence[VideoRow]) -> list[tuple[str, int, str]]:
    from storage.files import source_text

    return [((row.video_id or "")[:8], row.frame_count, source_text(row.uri)) for row in rows]
