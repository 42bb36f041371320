"""`vidx clip`."""

from dataclasses import asdict

import click

from pipeline.cli.options import archive_option, archive_uri, complete_files, json_option
from pipeline.cli.print import note, print_json
from pipeline.text import printable
from pipeline.times import clock, parse_moment
from storage.errors import UsageError
from storage.files import source_text


@click.command()
@click.argument("moment", metavar="VIDEO@START-END", shell_complete=complete_files)
@click.argument("file", metavar="[FILE]", required=False, shell_complete=complete_files)
@archive_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def clip(moment: str, file: str | None, archive_dir: str, force: bool, as_json: bool) -> None:
    """Copy a moment of a video, with its sound, into a new file. Nothing is encoded again.

    The suffix of FILE is the format. Without FILE, the file is called VIDEO_START-END and has the video's suffix, or
    .mkv. An existing file is not overwritten without --force.

    A copy can only begin at a keyframe. Players of .mp4 and .mov files skip from there to START; in other formats, the
    clip begins earlier, at the keyframe.

    \b
    vidx clip cars.mp4@0:12:31-0:12:40
    vidx clip 1f0c22@83-95.5 van.mkv
    """
    from pipeline.results.clip import clip as cut
    from storage.archive.archive import open_archive

    name, start, end = parse_moment(moment)
    if start is None or end is None:
        raise UsageError(f"{moment}: give a moment as VIDEO@START-END, e.g. cars.mp4@0:12:31-0:12:40")
    row = open_archive(archive_uri(archive_dir)).videos.find(name)
    done = cut(row, start, end, file, overwrite=force)
    if as_json:
        print_json({**asdict(done), "source": source_text(row.uri), "video_id": row.video_id})
        return
    click.echo(printable(done.file))
    if done.start_seconds < start - 0.05 and done.file.endswith((".mp4", ".mov")):
        note(f"begins at {clock(done.start_seconds)}, with the picture that is shown at {clock(start)}")
    elif done.start_seconds < start - 0.05:
        note(f"begins at {clock(done.start_seconds)}, at a keyframe; an .mp4 file would begin at {clock(start)}")
