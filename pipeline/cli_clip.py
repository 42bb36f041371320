"""`vidx clip`."""

from pathlib import Path

import click

from pipeline.cli_options import archive_option, archive_uri, json_option


@click.command()
@click.argument("moment", metavar="VIDEO@START-END")
@click.argument("file", metavar="[FILE]", required=False)
@archive_option
@json_option
def clip(moment: str, file: str | None, archive_dir: str, as_json: bool) -> None:
    """Cut a moment out of its video, sound included, without encoding anything again.

    FILE is what to write, its suffix the format; without it VIDEO_START-END with the video's own suffix, in this
    folder. A copy can only begin at a keyframe: .mp4 and .mov begin there too but have players skip to START, other
    formats show the time from the keyframe on.

    \b
    vidx clip cars.mp4@0:12:31-0:12:40
    vidx clip 1f0c22@83-95.5 van.mkv
    """
    from pipeline.cli_print import clock, note, print_json, printable
    from pipeline.output import check_output
    from pipeline.times import parse_moment
    from storage.archive import open_archive
    from storage.errors import UsageError, VideoProblem
    from storage.files import local_path, source_text
    from workers.content import check_still_there, in_video
    from workers.cut import FORMATS, cut

    name, start, end = parse_moment(moment)
    if start is None or end is None:
        raise UsageError(f"{moment}: give a moment as VIDEO@START-END, e.g. cars.mp4@0:12:31-0:12:40")
    row = open_archive(archive_uri(archive_dir)).find_video(name)
    if row.probe is None:
        raise UsageError(f"{name}: could not be read when it was indexed, so nothing can be cut out of it")
    source = Path(source_text(row.uri))
    times = f"{clock(start)}-{clock(end)}".replace(":", ".")
    out = file or f"{source.stem}_{times}{source.suffix}"
    check_output(out, FORMATS)
    if Path(out).exists() and Path(out).samefile(source):
        raise UsageError(f"{out}: is the video itself; name another file")
    try:
        check_still_there(row)
        done = cut(local_path(row.uri), row.probe, start, end, out)
    except VideoProblem as problem:
        source_named = str(source) in problem.detail
        raise UsageError(problem.detail if source_named else in_video(row, problem).detail) from problem
    if as_json:
        print_json(
            {
                "file": out,
                "source": source_text(row.uri),
                "video_id": row.video_id,
                "start_seconds": done.start_seconds,
                "end_seconds": done.end_seconds,
                "streams": done.stream_count,
            }
        )
        return
    click.echo(printable(out))
    if done.start_seconds < start - 0.05:
        note(f"begins at {clock(done.start_seconds)}, the keyframe before; an .mp4 would begin at {clock(start)}")
