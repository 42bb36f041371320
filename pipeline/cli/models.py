"""`vidx models`, and what the other commands say of a model's limits."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from pipeline.cli.options import archive_option, archive_uri, complete_folders, json_option

LINE_SECONDS = 5.0  # between two lines of progress
ANOTHER = (
    "to use another model, index into another archive with --model DIR|HUB-ID, "
    "for instance ICTNLP/llava-mini-llama-3.1-8b"
)


@click.command()
@archive_option
@click.option("--fetch", metavar="ID", default=None, help="Download a model, or a CLIP, into the local hub cache.")
@click.option(
    "--tower",
    metavar="ID|DIR",
    default=None,
    shell_complete=complete_folders,
    help="The CLIP to take instead of the one that a model names.",
)
@json_option
def models(archive_dir: str, fetch: str | None, tower: str | None, as_json: bool) -> None:
    """List the models at hand: built in, and published ones in the local hub cache.

    The model that an existing archive was made with is marked. --fetch downloads one of the hub, and the CLIP that it
    names; weights that are pickled are converted once, by a process that can open nothing else.

    \b
    vidx models
    vidx models --json
    vidx models --fetch ICTNLP/llava-mini-llama-3.1-8b
    """
    if fetch is not None:
        _fetch(fetch, tower, as_json)
        return
    from pipeline.cli.print import print_json, print_table
    from pipeline.results.text import first_sentence
    from storage.archive.archive import archive_exists, open_archive
    from storage.errors import ArchiveError
    from workers.models.bundle import list_bundles

    uri = archive_uri(archive_dir)
    used = None
    with contextlib.suppress(ArchiveError):  # a damaged archive has nothing to say of models; others have
        used = open_archive(uri).model_id if archive_exists(uri) else None
    bundles = list_bundles(tower)
    if as_json:
        print_json(
            [
                {
                    "name": bundle.name,
                    "tower": bundle.tower_name or bundle.config.tower,
                    "model_id": bundle.model_id,
                    "licence": bundle.card.licence,
                    "knows": bundle.card.knows,
                    "does_not_know": bundle.card.does_not_know,
                    "trained": bundle.card.trained,
                    "accuracy": bundle.card.accuracy,
                    "unknown_answers": bundle.card.unknown_answers,
                    "search_floor": bundle.card.search_floor,
                    "takes_history": bundle.card.takes_history,
                    "most_frames": bundle.card.most_frames,
                    "used_by_archive": bundle.model_id == used,
                }
                for bundle in bundles
            ]
        )
        return
    rows = [
        (
            bundle.name + (" *" if bundle.model_id == used else ""),
            bundle.model_id,
            bundle.card.licence,
            first_sentence(bundle.card.knows),
        )
        for bundle in bundles
    ]
    print_table(("name", "id", "licence", "knows"), rows)
    if used is not None:
        click.echo(f"* made the archive {archive_dir}")
    for bundle in bundles:
        _print_details(bundle)


def _fetch(name: str, tower: str | None, as_json: bool) -> None:
    from pipeline.cli.print import note, print_json
    from pipeline.results.text import size
    from workers.models.bundle import find_bundle
    from workers.models.fetch import fetch

    with _fetch_progress() as report:
        fetched = fetch(name, tower, report)
    for one in fetched:
        if one.kept:
            note(
                f"{one.name}: this system did not take {' and '.join(sorted(one.kept))} from the process that read its "
                "pickled weights; torch's loader of tensors alone was all that kept them in"
            )
    if fetched[0].tower:
        find_bundle(name, tower)  # so that what cannot be used is told now
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "directory": str(one.directory),
                    "model_type": one.model_type,
                    "downloaded_bytes": one.downloaded_bytes,
                    "converted": one.is_converted,
                }
                for one in fetched
            ]
        )
        return
    for one in fetched:
        came = f"{size(one.downloaded_bytes)} downloaded" if one.downloaded_bytes else "was there"
        came += ", converted from pickled weights" if one.is_converted else ""
        click.echo(f"{one.name}: {came}; {one.directory}")
    use = f"--model {name}" if fetched[0].tower else f"--tower {name}"
    note(f"`vidx index ... {use}` uses it")


@contextlib.contextmanager
def _fetch_progress() -> Iterator[Callable[[Any], None]]:
    """A callback for a fetch: a bar on a terminal, a line now and then elsewhere."""
    from pipeline.cli.print import note
    from pipeline.results.text import size

    if not sys.stderr.isatty():
        told, told_at = ("", ""), 0.0

        def tell(now: Any) -> None:
            nonlocal told, told_at
            if (now.step, now.name) != told or time.monotonic() - told_at >= LINE_SECONDS:
                told, told_at = (now.step, now.name), time.monotonic()
                done = f"{size(now.done_bytes)} of {size(now.total_bytes)}"
                note(f"{now.name}: {now.step} {now.file}, {done}")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking the hub", total=None)

        def show(now: Any) -> None:
            description = f"{now.step} {now.name}: {now.file}"
            bar.update(task, description=description, completed=now.done_bytes, total=now.total_bytes)

        yield show


def _print_details(bundle: Any) -> None:
    """What a model's files say besides, and nothing where they say nothing."""
    from pipeline.cli.print import print_table
    from workers.models.bundle import NOT_STATED

    card = bundle.card
    stated = [
        (what, text)
        for what, text in (("knows", card.knows), ("does not know", card.does_not_know), ("trained", card.trained))
        if text != NOT_STATED
    ]
    if card.most_frames is not None:
        stated.append(("frames", f"of one answer at most {card.most_frames}"))
    if stated or card.accuracy:
        click.echo(f"\n{bundle.name}")
    if stated:
        print_table(("", ""), stated)
    if card.accuracy:
        click.echo()
        kinds = dict.fromkeys(kind for kinds in card.accuracy.values() for kind in kinds)  # in order, each once
        rows = [(kind, *(_percent(kinds.get(kind)) for kinds in card.accuracy.values())) for kind in kinds]
        print_table(("% right", *card.accuracy), rows, right=tuple(card.accuracy))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def limits_of(bundle: Any) -> str:
    """One line: what a model knows and does not know, and how to name another one."""
    from pipeline.results.text import first_sentence

    return f"model {bundle.name} {_knows(bundle)}does not know {first_sentence(bundle.card.does_not_know)}; {ANOTHER}"


def hint_of(bundle: Any, answer: Any) -> str:
    """One line for an answer that says that the model does not know: why, what it knows, how to name another one.

    The same where that is the answer of some windows, and of one window. Nothing for any other answer.
    """
    from pipeline.results.text import first_sentence

    unknown = [window for window in getattr(answer, "windows", ()) if window.unknown]
    if answer.unknown:
        what, why = "this", answer.unknown
    elif unknown:
        what, why = f"this in {len(unknown)} of the {len(answer.windows)} windows", unknown[0].unknown
    else:
        return ""
    return f"model {bundle.name} {_knows(bundle)}does not know {what}: {first_sentence(why)}; {ANOTHER}"


def _knows(bundle: Any) -> str:
    from pipeline.results.text import first_sentence
    from workers.models.bundle import NOT_STATED

    return "" if bundle.card.knows == NOT_STATED else f"knows {first_sentence(bundle.card.knows)}; it "
