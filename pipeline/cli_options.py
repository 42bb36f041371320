"""Options and arguments that several commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from storage.errors import UsageError

archive_option = click.option(
    "--archive",
    "archive_dir",
    envvar="VIDX_ARCHIVE",
    default="./vidx-archive",
    show_default=True,
    metavar="DIR",
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


# Which part of an archive.
filter_options = grouped(
    click.option(
        "--video",
        metavar="VIDEO",
        multiple=True,
        callback=_one_video,
        help="Only this video: its path, URI, or six or more digits of its id; or VIDEO@START-END.",
    ),
    click.option("--from", "from_text", metavar="TIME", help="From this position: seconds or h:mm:ss.s."),
    click.option("--to", "to_text", metavar="TIME", help="Up to this position, not included."),
    click.option("--after", metavar="TIME", help="Recorded at this time or later."),
    click.option("--before", metavar="TIME", help="Recorded before this time, ISO 8601; UTC without a zone."),
    click.option(
        "--tag",
        "tags",
        metavar="KEY=VALUE",
        multiple=True,
        help="Only videos with this tag; of several with one key, any.",
    ),
    click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only frames of which this condition on columns of `videos` and `frames` is true; see `vidx sql`.",
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
    """The archive's URI from what the user typed."""
    from storage.files import to_uri

    return archive_dir if "://" in archive_dir else to_uri(Path(archive_dir).expanduser().as_posix())
