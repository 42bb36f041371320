"""`vidx maintain`."""

from __future__ import annotations

import sys

import click

from pipeline.cli.options import archive_option, archive_uri, json_option
from pipeline.cli.print import note, print_json, show_count
from pipeline.text import counted


@click.command()
@archive_option
@click.option("--expire", "expire_age", metavar="AGE", help="Delete videos that are older than this, such as 90d.")
@click.option(
    "--target-mib",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="MIB",
    help="Maximum size of a joined file, as in vidx compact.",
)
@click.option(
    "--clean-older-than",
    type=click.FloatRange(min=0),
    default=168.0,
    show_default=True,
    metavar="HOURS",
    help="Keep younger files that nothing needs, as in vidx clean.",
)
@json_option
def maintain(archive_dir: str, expire_age: str | None, target_mib: int, clean_older_than: float, as_json: bool) -> None:
    """Do all that an archive needs from time to time: expire, compact, train the search index, clean.

    Run it as a scheduled job of its own, for instance once a week. Jobs may add videos meanwhile, and queries see the
    archive as it was or as it is. `vidx index` adds to the search index; above a million frames it leaves it to this
    command to train the index again as the archive grows. The command may be stopped at any time; the next run
    continues.

    \b
    vidx maintain
    vidx maintain --expire 90d --json

    Exit code 5: some files are damaged. Their videos stay as they are; `vidx repair` repairs them.
    """
    from pipeline.care.maintain import maintain as maintain_archive
    from storage.archive.archive import open_archive

    done = maintain_archive(
        open_archive(archive_uri(archive_dir), write=True),
        expire_age=expire_age,
        target_bytes=target_mib << 20,
        unused_seconds=round(clean_older_than * 3600),
        report=lambda step, count, total: show_count(count, total),
    )
    expired, compacted, cleaned = done.expired, done.compacted, done.cleaned
    if as_json:
        print_json(
            {
                "videos_expired": len(expired),
                "files_joined": compacted.parts_joined,
                "files_written": compacted.parts_written,
                "index_frames": done.index_frames,
                "files_removed": cleaned.files,
                "frames_removed": cleaned.frames,
                "problems": list(compacted.problems),
            }
        )
    else:
        if expire_age is not None:
            click.echo(f"{counted(len(expired), 'video')} expired")
        click.echo(f"{counted(compacted.parts_joined, 'file')} joined into {compacted.parts_written}")
        click.echo(f"the search index finds {counted(done.index_frames, 'frame')}")
        click.echo(f"{counted(cleaned.files, 'file')} and {counted(cleaned.frames, 'frame')} removed")
    for problem in compacted.problems:
        note(problem)
    sys.exit(5 if compacted.problems else 0)
