"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pipeline.cli.print import note
from pipeline.results.json_values import source_json
from pipeline.results.output import check_output
from pipeline.text import counted, printable
from pipeline.times import parse_instant, parse_moment, parse_time
from storage.errors import UsageError
from storage.files import source_text, to_uri

if TYPE_CHECKING:
    from pipeline.ask.filter import Filter
    from storage.archive.archive import Archive
    from storage.records import Moment, VideoRow

UNFINISHED_NAMED = 3  # videos that are named when several are not completely indexed


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete file names."""
    return [CompletionItem(incomplete, type="file")]


def complete_folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete folder names."""
    return [CompletionItem(incomplete, type="dir")]


archive_option = click.option(
    "--archive",
    "archive_dir",
    envvar="VIDX_ARCHIVE",
    default="./vidx-archive",
    show_default=True,
    metavar="DIR",
    shell_complete=complete_folders,
    help="The archive. The environment variable VIDX_ARCHIVE sets it too.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def grouped(*options: Callable) -> Callable:
    """One decorator for several options, which the help lists in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _one_video(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> str | None:
    """The name given; click alone would take the last of several without a word."""
    if len(names) > 1:
        given = " ".join(f"--video {name}" for name in names)
        raise UsageError(f"{given}: give one video; choose several with --tag or --where \"source LIKE '%...'\"")
    return names[0] if names else None


_video_option = click.option(
    "--video",
    metavar="VIDEO",
    multiple=True,
    callback=_one_video,
    shell_complete=complete_files,
    help="Only this video: its path, its URI, or six or more digits of its id; or VIDEO@START-END.",
)
_position_options = grouped(
    click.option("--from", "from_text", metavar="TIME", help="Only from this position on: seconds or h:mm:ss.s."),
    click.option("--to", "to_text", metavar="TIME", help="Only up to this position, which is not included."),
)
_recorded_options = grouped(
    click.option("--after", metavar="TIME", help="Only what was recorded at this time or later."),
    click.option(
        "--before", metavar="TIME", help="Only what was recorded before this time: ISO 8601, in UTC if it has no zone."
    ),
)
tag_option = click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    help="Only videos with this tag. Of several values for one key, any is enough.",
)

# The options that choose a part of an archive.
filter_options = grouped(
    _video_option,
    _position_options,
    _recorded_options,
    tag_option,
    click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only frames for which this condition is true. It uses columns of `videos` and `frames`; see `vidx sql`.",
    ),
)

# The options that choose videos of an archive.
video_filter_options = grouped(
    _video_option,
    _recorded_options,
    tag_option,
    click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only videos for which this condition on columns of `videos` is true, or one on columns of `frames` is "
        "true for at least one frame.",
    ),
)


def tower_choice(text: str) -> Callable:
    """The option --tower with this help."""
    return click.option("--tower", metavar="ID|DIR", shell_complete=complete_folders, help=text)


def model_choice(text: str, show_default: str | bool = False) -> Callable:
    """The option --model with this help."""
    return click.option(
        "--model", metavar="NAME|DIR|HUB-ID", shell_complete=complete_folders, show_default=show_default, help=text
    )


model_option = grouped(
    model_choice("Where the archive's model is, if it was moved."),
    tower_choice("Where the CLIP of this model is, if it was moved."),
)
min_score_option = click.option(
    "--min-score",
    "--floor",
    "min_score",
    type=click.FloatRange(-1, 1),
    show_default="stated by the model, or measured in the archive",
    help="Lowest score of a hit.",
)

# The options that show moments as pictures.
sheet_option = grouped(
    click.option("--show", is_flag=True, help="Draw thumbnails of the moments in this terminal."),
    click.option(
        "--contact-sheet",
        metavar="FILE",
        shell_complete=complete_files,
        help="Write thumbnails of the moments, with times and scores, to a .html or .png file.",
    ),
)

# The options of commands that load a model.
model_options = grouped(
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), show_default="auto", help="Where the model computes."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        show_default="auto",
        help="Precision of the model.",
    ),
)


def parse_tags(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values given by --tag, by key.

    Raises:
        UsageError: one is not KEY=VALUE.
    """
    tags: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"--tag {pair}: give KEY=VALUE, e.g. --tag camera=north")
        tags[key] = (*tags.get(key, ()), value)
    return tags


def archive_uri(archive_dir: str) -> str:
    """The URI of the archive that --archive names.

    Raises:
        UsageError: the path begins with ~, and the home folder is unknown.
    """
    try:
        return archive_dir if "://" in archive_dir else to_uri(Path(archive_dir).expanduser().as_posix())
    except RuntimeError:
        raise UsageError(f"--archive {archive_dir}: no home folder is known; set HOME or give the full path") from None


def filter_of(archive: Archive, options: Mapping[str, Any]) -> Filter:
    """The part of an archive that the options of `filter_options` choose."""
    from pipeline.ask.filter import Filter
    from storage.records import Status, is_whole

    video, from_text, to_text = options["video"], options.get("from_text"), options.get("to_text")
    name, start, end = parse_moment(video) if video is not None else (None, None, None)
    if start is not None and not (from_text is None and to_text is None):
        raise UsageError(f"--video {video} names a moment; leave out --from and --to, or the part after @")
    start = parse_time("--from", from_text) if from_text is not None else start
    end = parse_time("--to", to_text) if to_text is not None else end
    if start is not None and end is not None and end <= start:
        raise UsageError(f"--from {from_text} --to {to_text}: the range must end after it starts")
    row = archive.videos.find(name) if name is not None else None
    if row is not None and not is_whole(row.problem) and row.status is not Status.INDEXING:
        note(f"{source_text(row.uri)} is {row.status}: {row.known_problem.reason}: {row.known_problem.detail}")
    if start is not None and end is None and from_text is None:
        end = start + 1e-6  # VIDEO@TIME: the frame that is shown then
    after, before = (
        None if options[name] is None else parse_instant(f"--{name}", options[name]) for name in ("after", "before")
    )
    if after is not None and before is not None and before <= after:
        raise UsageError(f"--after {options['after']} --before {options['before']}: the range must end after it starts")
    return Filter(row, start, end, after, before, parse_tags(options["tags"]), options["where"])


def tell_unfinished(archive: Archive, within: Filter) -> list[VideoRow]:
    """The chosen videos that are not completely indexed yet; a note names the first of them."""
    rows = within.unfinished(archive)
    for row in rows[:UNFINISHED_NAMED]:
        note(f"not complete yet: {printable(source_text(row.uri))}: {row.known_problem.detail}")
    if len(rows) > UNFINISHED_NAMED:
        others = counted(len(rows) - UNFINISHED_NAMED, "more video")
        note(f"not complete yet: {others}; `vidx list --status indexing` lists them")
    return rows


def unfinished_json(rows: Sequence[VideoRow]) -> list[dict[str, str]]:
    """These videos, as `search --json` and `ask --json` give them."""
    return [source_json(row.uri) | {"detail": row.known_problem.detail} for row in rows]


def check_sheet(options: Mapping[str, Any]) -> None:
    """Checks the options of `sheet_option` before the search.

    Raises:
        UsageError: the file cannot be written, or this terminal cannot show pictures.
    """
    if options["contact_sheet"] is not None:
        from pipeline.results.contact_sheet import SUFFIXES

        check_output(options["contact_sheet"], SUFFIXES)
    if options["show"]:
        from pipeline.results.contact_sheet import check_show

        check_show()


def write_sheet(options: Mapping[str, Any], title: str, archive: Archive, moments: Sequence[Moment]) -> None:
    """Shows and writes thumbnails, as the options of `sheet_option` ask for."""
    if options["show"] and moments:
        from pipeline.results.contact_sheet import show_moments

        show_moments(archive, moments)
    if options["contact_sheet"] is not None and moments:
        from pipeline.results.contact_sheet import write_contact_sheet

        write_contact_sheet(options["contact_sheet"], title, archive, moments)
        note(f"contact sheet: {printable(options['contact_sheet'])}")
