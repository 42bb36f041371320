"""`vidx clip`."""

from dataclasses import asdict

import click

from pipeline.cli.options import archive_option, archive_uri, complete_files, json_option


@click.command()
@click.argument("moment", metavar="VIDEO@START-END", shell_complete=complete_files)
@click.argument("file", metavar="[FILE]", required=False, shell_complete=complete_files)
@archive_option
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
def clip(moment: str, file: str | None, archive_dir: str, force: bool, as_json: bool) -> None:
    """Cut a moment out of its video, sound included, without encoding anything again.

    FILE is what to write, its suffix the format; without it VIDEO_START-END in this folder, with the video's own suffix
    or .mkv. A file that is there stays, but for --force. A copy can only begin at a keyframe: .mp4 and .mov begin there
    too but have players skip to what is seen at START, other formats show the time from the keyframe on.

    \b
    vidx clip cars.mp4@0:12:31-0:12:40
    vidx clip 1f0c22@83-95.5 van.mkv
    """
    from pipeline.cli.print import note, print_json
    from pipeline.results.cut import clip as cut
    from pipeline.results.text import printable
    from pipeline.times import clock, parse_moment
    from storage.archive.archive import open_archive
    from storage.errors import UsageError
    from storage.files import source_text

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
        note(f"begins at {clock(done.start_seconds)}, with the picture that is seen at {clock(start)}")
    elif done.start_seconds < start - 0.05:
        note(f"begins at {clock(done.start_seconds)}, the keyframe before; an .mp4 would begin at {clock(start)}")
