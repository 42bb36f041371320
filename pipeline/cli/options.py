"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from storage.errors import UsageError

if TYPE_CHECKING:
    from pipeline.ask.filter import Filter
    from storage.archive.archive import Archive
    from storage.records import Moment, VideoRow

UNFINISHED_NAMED = 3  # of the videos that are not whole yet


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell complete names of files."""
    return [CompletionItem(incomplete, type="file")]


def complete_folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Has the shell complete names of folders."""
    return [CompletionItem(incomplete, type="dir")]


archive_option = click.option(
    "--archive",
    "archive_dir",
    envvar="VIDX_ARCHIVE",
    default="./vidx-archive",
    show_default=True,
    metavar="DIR",
    shell_complete=complete_folders,
    help="The archive; the environment variable VIDX_ARCHIVE sets it too.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def grouped(*options: Callable) -> Callable:
    """Options that commands share, as one decorator, in the order of their help."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _one_video(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> str | None:
    """Refuses a second one, which would otherwise silently take the place of the first."""
    if len(names) > 1:
        given = " ".join(f"--video {name}" for name in names)
        raise UsageError(f"{given}: name one; several can be chosen by --tag, or by --where \"source LIKE '%...'\"")
    return names[0] if names else None


_video_option = click.option(
    "--video",
    metavar="VIDEO",
    multiple=True,
    callback=_one_video,
    shell_complete=complete_files,
    help="Only this video: its path, URI, or six or more digits of its id; or VIDEO@START-END.",
)
_position_options = grouped(
    click.option("--from", "from_text", metavar="TIME", help="From this position: seconds or h:mm:ss.s."),
    click.option("--to", "to_text", metavar="TIME", help="Up to this position, not included."),
)
_recorded_options = grouped(
    click.option("--after", metavar="TIME", help="Recorded at this time or later."),
    click.option("--before", metavar="TIME", help="Recorded before this time, ISO 8601; UTC without a zone."),
)
tag_option = click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    help="Only videos with this tag; of several with one key, any.",
)

# Which part of an archive.
filter_options = grouped(
    _video_option,
    _position_options,
    _recorded_options,
    tag_option,
    click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only frames of which this condition on columns of `videos` and `frames` is true; see `vidx sql`.",
    ),
)

# Which videos of an archive.
video_filter_options = grouped(
    _video_option,
    _recorded_options,
    tag_option,
    click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only videos of which this condition on columns of `videos` is true, or one on `frames` of any frame.",
    ),
)

model_option = grouped(
    click.option(
        "--model",
        metavar="NAME|DIR|HUB-ID",
        default=None,
        shell_complete=complete_folders,
        help="Where the archive's model lies now; the one that made it.",
    ),
    click.option(
        "--tower",
        metavar="ID|DIR",
        default=None,
        shell_complete=complete_folders,
        help="Where its CLIP lies now; the one that made it.",
    ),
)

# How moments are seen.
sheet_option = grouped(
    click.option("--show", is_flag=True, help="Draw the moments' thumbnails in this terminal."),
    click.option(
        "--contact-sheet",
        metavar="FILE",
        default=None,
        shell_complete=complete_files,
        help="Write the moments' thumbnails with times and scores to a file, .html or .png.",
    ),
)

# Of commands that load a model.
model_options = grouped(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default=None, help="Where to compute; auto."),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default=None, help="Precision; auto."
    ),
)


def parse_tags(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values asked for, by key.

    Raises:
        UsageError: not KEY=VALUE.
    """
    tags: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"--tag {pair}: give KEY=VALUE, e.g. --tag camera=north")
        tags[key] = (*tags.get(key, ()), value)
    return tags


def archive_uri(archive_dir: str) -> str:
    """The archive's URI from what the user typed.

    Raises:
        UsageError: it begins with ~ and no home folder is known.
    """
    from storage.files import to_uri

    try:
        return archive_dir if "://" in archive_dir else to_uri(Path(archive_dir).expanduser().as_posix())
    except RuntimeError:
        raise UsageError(f"--archive {archive_dir}: no home folder is known; set HOME or name the whole path") from None


def filter_of(archive: Archive, options: Mapping[str, Any]) -> Filter:
    """The part of an archive that the options of `filter_options` leave."""
    from pipeline.ask.filter import Filter
    from pipeline.cli.print import note
    from pipeline.times import parse_instant, parse_moment, parse_time
    from storage.files import source_text
    from storage.records import Status, is_whole

    video, from_text, to_text = options["video"], options.get("from_text"), options.get("to_text")
    name, start, end = parse_moment(video) if video is not None else (None, None, None)
    if start is not None and not (from_text is None and to_text is None):
        raise UsageError(f"--video {video} names a moment already; leave out --from and --to, or the part after @")
    start = parse_time("--from", from_text) if from_text is not None else start
    end = parse_time("--to", to_text) if to_text is not None else end
    if start is not None and end is not None and end <= start:
        raise UsageError(f"--from {from_text} --to {to_text}: the range must end after it starts")
    row = archive.videos.find(name) if name is not None else None
    if row is not None and not is_whole(row.problem) and row.status is not Status.INDEXING:
        note(f"{source_text(row.uri)} is {row.status}: {row.known_problem.reason}: {row.known_problem.detail}")
    if start is not None and end is None and video and from_text is None:
        end = start + 1e-6  # a moment of one instant: the frame shown then
    after, before = (
        None if options[name] is None else parse_instant(f"--{name}", options[name]) for name in ("after", "before")
    )
    if after is not None and before is not None and before <= after:
        raise UsageError(f"--after {options['after']} --before {options['before']}: the range must end after it starts")
    return Filter(row, start, end, after, before, parse_tags(options["tags"]), options["where"])


def tell_unfinished(archive: Archive, within: Filter) -> list[VideoRow]:
    """Says which of the videos that are looked at are not whole yet, and gives them."""
    from pipeline.cli.print import note
    from pipeline.results.text import counted, printable
    from storage.files import source_text

    rows = within.unfinished(archive)
    for row in rows[:UNFINISHED_NAMED]:
        note(f"not whole yet: {printable(source_text(row.uri))}: {row.known_problem.detail}")
    if len(rows) > UNFINISHED_NAMED:
        others = counted(len(rows) - UNFINISHED_NAMED, "more video")
        note(f"not whole yet: {others}; `vidx list --status indexing` lists them")
    return rows


def unfinished_json(rows: Sequence[VideoRow]) -> list[dict[str, str]]:
    """The same, as `search --json` and `ask --json` give it."""
    from storage.files import source_text

    return [{"source": source_text(row.uri), "source_uri": row.uri, "detail": row.known_problem.detail} for row in rows]


def check_sheet(options: Mapping[str, Any]) -> None:
    """Refuses what the options of `sheet_option` cannot have, before anything is searched for."""
    if options["contact_sheet"] is not None:
        from pipeline.results.contact_sheet import SUFFIXES
        from pipeline.results.output import check_output

        check_output(options["contact_sheet"], SUFFIXES)
    if options["show"]:
        from pipeline.results.contact_sheet import check_show

        check_show()


def write_sheet(options: Mapping[str, Any], title: str, archive: Archive, moments: Sequence[Moment]) -> None:
    """Shows and writes moments as the options of `sheet_option` say."""
    if options["show"] and moments:
        from pipeline.results.contact_sheet import show_moments

        show_moments(archive, moments)
    if options["contact_sheet"] is not None and moments:
        from pipeline.cli.print import note
        from pipeline.results.contact_sheet import write_contact_sheet
        from pipeline.results.text import printable

        write_contact_sheet(options["contact_sheet"], title, archive, moments)
        note(f"contact sheet: {printable(options['contact_sheet'])}")
