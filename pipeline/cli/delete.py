"""`vidx delete` and `vidx expire`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pipeline.care.age import AGE_SOURCES, age_of, expired_videos, instant_before, key_of
from pipeline.cli.empty_filter import why_no_video
from pipeline.cli.options import archive_option, archive_uri, complete_files, json_option, parse_tags, tag_option
from pipeline.cli.print import note, print_json, print_table
from pipeline.results.json_values import source_json
from pipeline.text import counted, minute
from storage.errors import UsageError
from storage.files import source_text

if TYPE_CHECKING:
    from pipeline.care.age import Age
    from storage.archive.archive import Archive
    from storage.records import VideoRow

dry_run_option = click.option("--dry-run", is_flag=True, help="List what would be deleted, and change nothing.")


@click.command()
@click.argument("videos", nargs=-1, metavar="[VIDEO]...", shell_complete=complete_files)
@archive_option
@tag_option
@click.option(
    "--where", metavar="SQL", default="", help="Only videos for which this condition on columns of `videos` is true."
)
@dry_run_option
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
def delete(
    videos: tuple[str, ...],
    archive_dir: str,
    tags: tuple[str, ...],
    where: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Take videos out of an archive, so that no query finds them any more.

    VIDEO is a path, a URI, a file name, or six or more digits of an id. Without it, --tag and --where choose the
    videos, and vidx asks for confirmation if it runs on a terminal. The exit code is 0 after either answer.

    The video files are not touched. Later runs of `vidx index` skip deleted videos, unless --restore-deleted is given.
    `vidx clean --older-than 0` removes the frames from the disk. Until then, --restore-deleted restores them without
    decoding.

    \b
    vidx delete party.mp4
    vidx delete 1f0c22 /videos/door.mkv && vidx clean --older-than 0
    vidx delete --tag camera=north --where "captured_at < '2024-05-01'" --dry-run
    """
    from pipeline.ask.filter import Filter
    from storage.archive.archive import open_archive

    is_chosen = bool(tags or where)
    if bool(videos) == is_chosen:
        if videos:
            raise UsageError(
                "VIDEO with --tag or --where: give videos, or choose them with --tag and --where, not both"
            )
        raise UsageError("no VIDEO is given: name the videos to delete, or choose them with --tag, --where or both")
    archive = open_archive(archive_uri(archive_dir))
    if videos:
        rows = list({row.uri: row for row in map(archive.videos.find, videos)}.values())  # before any is deleted
    else:
        rows = _chosen(archive, tags, where)
    if is_chosen and not rows:
        note(why_no_video(archive, Filter(tags=parse_tags(tags), where=where)))
    can_ask = sys.stdin.isatty() and sys.stderr.isatty()
    if is_chosen and rows and not (dry_run or yes) and can_ask and not _is_confirmed(rows):
        note("nothing was deleted: the answer was no")
        if as_json:
            print_json(_summary([], dry_run, []))
        return
    done = rows if dry_run else archive.videos.delete(rows)
    if as_json:
        print_json(_summary(done, dry_run, [_json(row) for row in done]))
        return
    if done:
        print_table(("video", "frames", "source"), _cells(done), right=("frames",))
    _tell(done, dry_run)


def _chosen(archive: Archive, tags: Sequence[str], where: str) -> list[VideoRow]:
    from pipeline.ask.filter import Filter
    from storage.records import Status
    from storage.sql import select_videos

    rows = [row for row in Filter(tags=parse_tags(tags)).videos(archive) if row.status is not Status.DELETED]
    if where:  # not `frames`: a condition that is true for a few frames must not delete a video
        uris = select_videos(archive, where, of_frames=False)
        rows = [row for row in rows if row.uri in uris]
    return rows


def _is_confirmed(rows: Sequence[VideoRow]) -> bool:
    """Asks on the terminal whether to delete these videos."""
    print_table(("video", "frames", "source"), _cells(rows), right=("frames",), err=True)
    frames = counted(sum(row.frame_count for row in rows), "frame")
    return click.confirm(f"Delete {counted(len(rows), 'video')} with {frames}?", err=True)


@click.command()
@click.option("--older-than", required=True, metavar="AGE", help="An age such as 90d, 12h, 8w or 2y.")
@archive_option
@dry_run_option
@json_option
def expire(older_than: str, archive_dir: str, dry_run: bool, as_json: bool) -> None:
    """Take out the videos that are older than an age, as `vidx delete` does.

    A video's age counts from its capture time. If that is unknown, it counts from the last change of the file; if that
    is unknown too, from the time of indexing. The list says which. With --dry-run, it also shows the videos that stay.

    \b
    vidx expire --older-than 90d
    vidx expire --older-than 12h --dry-run
    """
    from storage.archive.archive import open_archive
    from storage.records import Status

    now = datetime.now(UTC)
    oldest = instant_before("--older-than", older_than, now)
    archive = open_archive(archive_uri(archive_dir))
    rows = [row for row in archive.videos.all() if row.status is not Status.DELETED]
    ages = {key_of(row): age for row in rows if (age := age_of(row, now)) is not None}
    expired = expired_videos(rows, oldest, now)
    kept = [row for row in rows if key_of(row) in ages and ages[key_of(row)].since >= oldest]
    done = expired if dry_run else archive.videos.delete(expired)
    if as_json:
        told, told_kept = ([_json(row) | ages[key_of(row)].json() for row in group] for group in (done, kept))
        print_json(_summary(done, dry_run, told) | ({"videos_kept": told_kept} if dry_run else {}))
    else:
        _print_ages({"deleted": done, "kept": kept if dry_run else []}, ages, dry_run)
        _tell(done, dry_run)
    for row in rows:
        if key_of(row) not in ages:
            note(f"{source_text(row.uri)} stays: its age is unknown")


def _print_ages(rows: Mapping[str, Sequence[VideoRow]], ages: Mapping[str, Age], dry_run: bool) -> None:
    """Prints videos with their ages, grouped by what happens to them, the oldest first."""
    cells = []
    for fate, group in rows.items():
        for row in sorted(group, key=lambda row: ages[key_of(row)].since):
            age, (video, frames, source) = ages[key_of(row)], _cells([row])[0]
            by = AGE_SOURCES[age.source] + (" given by the file" if age.is_by_file else "")
            told = (video, frames, str(age), minute(age.since), by, source)
            cells.append((fate, *told) if dry_run else told)
    columns = ("video", "frames", "age", "since (UTC)", "age counts from", "source")
    if cells:
        print_table(("would be", *columns) if dry_run else columns, cells, right=("frames", "age"))


def _summary(rows: Sequence[VideoRow], dry_run: bool, videos: list[dict[str, Any]]) -> dict[str, Any]:
    frames = sum(row.frame_count for row in rows)
    return {"dry_run": dry_run, "videos_deleted": len(rows), "frames_deleted": frames, "videos": videos}


def _tell(rows: Sequence[VideoRow], dry_run: bool) -> None:
    frames = counted(sum(row.frame_count for row in rows), "frame")
    click.echo(f"{counted(len(rows), 'video')} with {frames} {'would be deleted' if dry_run else 'deleted'}")
    if rows and not dry_run:
        whose = "its" if len(rows) == 1 else "their"
        click.echo(f"`vidx clean --older-than 0` removes {whose} frames from the disk")


def _json(row: VideoRow) -> dict[str, Any]:
    return {"video_id": row.video_id} | source_json(row.uri)


def _cells(rows: Sequence[VideoRow]) -> list[tuple[str, int, str]]:
    return [((row.video_id or "")[:8], row.frame_count, source_text(row.uri)) for row in rows]
