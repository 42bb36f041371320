"""`vidx list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.empty_filter import why_no_video
from pipeline.cli.options import archive_option, archive_uri, filter_of, json_option, video_filter_options
from pipeline.cli.print import note, print_csv, print_json, print_table
from pipeline.text import minute
from pipeline.times import clock
from storage.errors import UsageError
from storage.files import source_text

if TYPE_CHECKING:
    from storage.records import VideoRow

STATUSES = ("indexing", "indexed", "partial", "failed", "deleted")


@click.command("list")
@archive_option
@video_filter_options
@click.option(
    "--status",
    "statuses",
    type=click.Choice(STATUSES),
    multiple=True,
    show_default="all but deleted",
    help="Only videos with this status. It can be given several times.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@json_option
def list_videos(archive_dir: str, statuses: tuple[str, ...], as_csv: bool, as_json: bool, **options: Any) -> None:
    """List the videos of an archive, one per line.

    Times of recording and indexing are in UTC. --json and --csv give more columns, and full ids.

    \b
    vidx list
    vidx list --tag camera=north --after 2024-05-01
    vidx list --status failed --status partial --json
    vidx list --where "duration_seconds > 3600" --csv
    """
    from pipeline.results.listing import COLUMNS, listed
    from storage.archive.archive import open_archive

    if as_csv and as_json:
        raise UsageError("--csv --json: choose one of the two")
    if options["where"] and "deleted" in statuses:
        raise UsageError("--status deleted --where: SQL does not find deleted videos; leave out one of the two")
    archive = open_archive(archive_uri(archive_dir))
    wanted = statuses or tuple(status for status in STATUSES if status != "deleted")
    within = filter_of(archive, options)
    rows = [row for row in within.videos(archive) if row.status in wanted]
    if as_json:
        print_json([listed(row) for row in rows])
    elif as_csv:
        print_csv(COLUMNS, map(listed, rows))
    elif rows:
        _print_videos(rows)
    else:
        note(why_no_video(archive, within))


def _print_videos(rows: Sequence[VideoRow]) -> None:
    cells = [
        (
            (row.video_id or "")[:8],
            row.status,
            row.frame_count,
            clock(row.probe.duration_seconds) if row.probe and row.probe.duration_seconds is not None else "",
            minute(row.captured_at),
            minute(row.indexed_at),
            " ".join(f"{key}={value}" for key, value in row.tags.items()),
            source_text(row.uri),
        )
        for row in rows
    ]
    columns = ("video", "status", "frames", "duration", "captured", "indexed", "tags", "source")
    print_table(columns, cells, right=("frames", "duration"))
