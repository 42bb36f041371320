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


def filter_options(command: Callable) -> Callable:
    """--video, --from, --to, --after, --before, --tag and --where."""
    where = click.option(
        "--where",
        metavar="SQL",
        default="",
        help="Only frames of which this condition on columns of `videos` and `frames` is true; see `vidx sql`.",
    )
    tags = click.option(
        "--tag",
        "tags",
        metavar="KEY=VALUE",
        multiple=True,
        help="Only videos with this tag; of several with one key, any.",
    )
    before = click.option("--before", metavar="TIME", help="Recorded before this time, ISO 8601; UTC without a zone.")
    after = click.option("--after", metavar="TIME", help="Recorded at this time or later.")
    to = click.option("--to", "to_text", metavar="TIME", help="Up to this position, not included.")
    start = click.option("--from", "from_text", metavar="TIME", help="From this position: seconds or h:mm:ss.s.")
    video = click.option(
        "--video",
        metavar="VIDEO",
        help="Only this video: its path, URI, or six or more digits of its id; or VIDEO@START-END.",
    )
    return video(start(to(after(before(tags(where(command)))))))


def model_options(command: Callable) -> Callable:
    """--model, --device and --dtype of commands that load a model."""
    dtype = click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default=None, help="Precision; auto."
    )
    device = click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default=None, help="Where to compute; auto."
    )
    return device(dtype(command))


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
