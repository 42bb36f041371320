"""`vidx delete` and `vidx expire`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli_options import archive_option, archive_uri, complete_files, json_option, parse_tags, tag_option

if TYPE_CHECKING:
    from storage.archive import Archive
    from storage.records import VideoRow

_DAYS = {"h": 1 / 24, "d": 1, "w": 7, "y": 365}

dry_run_option = click.option("--dry-run", is_flag=True, help="List what would be deleted, and change nothing.")


@click.command()
@click.argument("videos", nargs=-1, metavar="[VIDEO]...", shell_complete=complete_files)
@archive_option
@tag_option
@click.option(
    "--where", metavar="SQL", default="", help="Only videos of which this condition on columns of `videos` is true."
)
@dry_run_option
@click.option("--yes", is_flag=True, help="Do not ask, on a terminal, before --tag or --where delete.")
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
    """Take videos out of an archive: no query finds them any more, from this moment on.

    VIDEO is a path, a URI, a file name, or six or more digits of an id. Without it, --tag and --where choose the
    videos; on a terminal, vidx then asks before it deletes. The next `vidx index` leaves deleted content out, but for
    --restore-deleted. The video files themselves are not touched. `vidx clean --older-than 0` removes the frames from
    the disk; until they are cleaned, --restore-deleted brings them back without decoding.

    \b
    vidx delete party.mp4
    vidx delete 1f0c22 /videos/door.mkv && vidx clean --older-than 0
    vidx delete --tag camera=north --where "captured_at < '2024-05-01'" --dry-run
    """
    from storage.archive import open_archive
    from storage.errors import UsageError

    is_chosen = bool(tags or where)
    if bool(videos) == is_chosen:
        given = "VIDEO with --tag or --where" if videos else "nothing"
        raise UsageError(f"{given}: name videos, or choose them by --tag, --where or both")
    archive = open_archive(archive_uri(archive_dir))
    if videos:
        rows = list({row.uri: row for row in map(archive.find_video, videos)}.values())  # before any is deleted
    else:
        rows = _chosen(archive, tags, where)
    if is_chosen and rows and not (dry_run or yes) and sys.stdin.isatty() and sys.stderr.isatty():
        _ask(rows)
    _delete(archive, rows, dry_run, as_json)


def _chosen(archive: Archive, tags: Sequence[str], where: str) -> list[VideoRow]:
    from pipeline.filter import Filter
    from storage.catalog import select_videos
    from storage.records import Status

    rows = [row for row in Filter(tags=parse_tags(tags)).videos(archive) if row.status is not Status.DELETED]
    if where:  # of videos alone: what is true of a few frames deletes no whole video
        uris = select_videos(archive, where, of_frames=False)
        rows = [row for row in rows if row.uri in uris]
    return rows


def _ask(rows: Sequence[VideoRow]) -> None:
    """Ends the command unless the user says yes."""
    from pipeline.cli_print import counted, print_table

    print_table(("video", "frames", "source"), _cells(rows), right=("frames",), err=True)
    frames = counted(sum(row.frame_count for row in rows), "frame")
    click.confirm(f"Delete {counted(len(rows), 'video')} with {frames}?", abort=True, err=True)


@click.command()
@click.option("--older-than", required=True, metavar="AGE", help="Such as 90d, 12h, 8w or 2y.")
@archive_option
@dry_run_option
@json_option
def expire(older_than: str, archive_dir: str, dry_run: bool, as_json: bool) -> None:
    """Take out the videos that were recorded longer ago than an age.

    A video's age counts from its capture time; where that is not known, from when its file was last changed; where that
    is not known either, from when it was indexed. The list says which. What is taken out is as deleted as by `vidx
    delete`.

    \b
    vidx expire --older-than 90d
    vidx expire --older-than 12h --dry-run
    """
    from pipeline.cli_print import counted, note
    from storage.archive import open_archive
    from storage.files import source_text
    from storage.records import Status

    now = datetime.now(UTC)
    oldest = _instant_before(older_than, now)
    archive = open_archive(archive_uri(archive_dir))
    rows = [row for row in archive.videos() if row.status is not Status.DELETED]
    ages = {_key(row): age for row in rows if (age := _age_of(row, now)) is not None}
    expired = [row for row in rows if _key(row) in ages and ages[_key(row)].since < oldest]
    _delete(archive, expired, dry_run, as_json, ages)
    stay = sorted((age for age in ages.values() if age.since >= oldest), key=lambda age: age.since)
    if stay:
        note(f"{counted(len(stay), 'video')} stay{'s' if len(stay) == 1 else ''}; the oldest is {stay[0]} old")
    for row in rows:
        if _key(row) not in ages:
            note(f"{source_text(row.uri)} stays: nothing says how old it is")


@dataclass(frozen=True)
class _Age:
    """How long ago a video was recorded, as far as is known.

    Attributes:
        since: when.
        source: the column that says so: captured_at, file_changed_at or indexed_at.
        seconds: from then till now.
    """

    since: datetime
    source: str
    seconds: float

    def __str__(self) -> str:
        hours = self.seconds / 3600
        return f"{hours:.1f}h" if abs(hours) < 48 else f"{hours / 24:.1f}d"


_AGE_SOURCES = {
    "captured_at": "capture time",
    "file_changed_at": "last change of the file",
    "indexed_at": "time of indexing",
}


def _key(row: VideoRow) -> str:
    """What stays the same though the file moves."""
    return row.video_id or row.uri


def _age_of(row: VideoRow, now: datetime) -> _Age | None:
    changed = None if row.mtime_ns is None else datetime.fromtimestamp(row.mtime_ns / 1e9, UTC)
    known = {"captured_at": row.captured_at, "file_changed_at": changed, "indexed_at": row.indexed_at}
    for source, since in known.items():
        if since is not None:
            return _Age(since, source, (now - since).total_seconds())
    return None


def _instant_before(text: str, now: datetime) -> datetime:
    """Now less an age."""
    from storage.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwy])", text.strip())
    try:
        if match:
            return now - timedelta(days=float(match[1]) * _DAYS[match[2]])
    except OverflowError:
        pass
    raise UsageError(f"--older-than {text}: not an age; give a number with h, d, w or y, e.g. 90d")


def _delete(
    archive: Archive, rows: Sequence[VideoRow], dry_run: bool, as_json: bool, ages: Mapping[str, _Age] | None = None
) -> None:
    """Deletes videos and tells which; with their ages, by _key, where these chose them."""
    from pipeline.cli_print import counted, minute, print_json, print_table

    if not dry_run:
        rows = archive.delete(rows)
    frames = sum(row.frame_count for row in rows)
    if as_json:
        listed = [_json(row, ages) for row in rows]
        print_json({"dry_run": dry_run, "videos_deleted": len(rows), "frames_deleted": frames, "videos": listed})
        return
    if rows and ages is None:
        print_table(("video", "frames", "source"), _cells(rows), right=("frames",))
    elif rows:
        told = [ages[_key(row)] for row in rows]
        columns = ("video", "frames", "age", "since (UTC)", "by the", "source")
        extra = [(str(age), minute(age.since), _AGE_SOURCES[age.source]) for age in told]
        cells = [(*cell[:2], *more, cell[2]) for cell, more in zip(_cells(rows), extra, strict=True)]
        print_table(columns, cells, right=("frames", "age"))
    done = "would be deleted" if dry_run else "deleted"
    click.echo(f"{counted(len(rows), 'video')} with {counted(frames, 'frame')} {done}")
    if rows and not dry_run:
        click.echo("their frames leave the disk with `vidx clean --older-than 0`")


def _json(row: VideoRow, ages: Mapping[str, _Age] | None) -> dict[str, Any]:
    from storage.files import source_text

    told = {"video_id": row.video_id, "source": source_text(row.uri), "source_uri": row.uri}
    if ages is not None:
        age = ages[_key(row)]
        told |= {"age_seconds": round(age.seconds), "age_from": age.source, "since": age.since}
    return told


def _cells(rows: Sequence[VideoRow]) -> list[tuple[str, int, str]]:
    from storage.files import source_text

    return [((row.video_id or "")[:8], row.frame_count, source_text(row.uri)) for row in rows]
