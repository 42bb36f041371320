"""`vidx models`, and the notes of other commands on what a model does not know."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import archive_option, archive_uri, json_option, tower_choice
from pipeline.cli.print import note, print_json, print_table
from pipeline.text import first_sentence, size
from storage.errors import ArchiveError

if TYPE_CHECKING:
    from storage.records import Answer, WindowAnswer
    from workers.models.bundle import Bundle
    from workers.models.fetch import Fetching

LINE_SECONDS = 5.0  # between two progress lines
ANOTHER = (
    "to use another model, index into another archive with --model DIR|HUB-ID, "
    "for instance ICTNLP/llava-mini-llama-3.1-8b"
)


@click.command()
@archive_option
@click.option("--fetch", metavar="ID", help="Download a model or a CLIP into the local hub cache.")
@tower_choice("The CLIP to use instead of the one that a model names.")
@json_option
def models(archive_dir: str, fetch: str | None, tower: str | None, as_json: bool) -> None:
    """List the available models: the built-in ones, and published ones in the local hub cache.

    The model of the archive is marked. --fetch downloads a model from the hub, with the CLIP that it names. Pickled
    weights are converted once, in a process that can open no other files.

    \b
    vidx models
    vidx models --json
    vidx models --fetch ICTNLP/llava-mini-llama-3.1-8b
    """
    if fetch is not None:
        _fetch(fetch, tower, as_json)
        return
    from storage.archive.archive import archive_exists, open_archive
    from workers.models.bundle import list_bundles

    uri = archive_uri(archive_dir)
    used = None
    with contextlib.suppress(ArchiveError):  # a damaged archive does not stop the list
        used = open_archive(uri).model_id if archive_exists(uri) else None
    bundles = list_bundles(tower)
    if as_json:
        print_json(
            [
                {
                    "name": bundle.name,
                    "tower": bundle.tower_name or bundle.config.tower,
                    "model_id": bundle.model_id,
                    **asdict(bundle.card),
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
        click.echo(f"* is the model of the archive {archive_dir}")
    for bundle in bundles:
        _print_details(bundle)


def _fetch(name: str, tower: str | None, as_json: bool) -> None:
    from workers.models.bundle import find_bundle
    from workers.models.fetch import fetch

    with _fetch_progress() as report:
        fetched = fetch(name, tower, report)
    for one in fetched:
        if one.kept:
            note(
                f"{one.name}: this system could not keep {' and '.join(sorted(one.kept))} from the process that read "
                "its pickled weights; the only protection was torch's loader, which accepts nothing but tensors"
            )
    if fetched[0].tower:
        find_bundle(name, tower)  # raises now if the model cannot be used
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
        came = f"{size(one.downloaded_bytes)} downloaded" if one.downloaded_bytes else "already complete"
        came += ", converted from pickled weights" if one.is_converted else ""
        click.echo(f"{one.name}: {came}; {one.directory}")
    use = f"--model {name}" if fetched[0].tower else f"--tower {name}"
    note(f"`vidx index ... {use}` uses it")


@contextlib.contextmanager
def _fetch_progress() -> Iterator[Callable[[Fetching], None]]:
    """A callback that shows a download: a bar on a terminal, progress lines elsewhere."""
    if not sys.stderr.isatty():
        told, told_at = ("", ""), 0.0

        def tell(now: Fetching) -> None:
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
        task = bar.add_task("contacting the hub", total=None)

        def show(now: Fetching) -> None:
            description = f"{now.step} {now.name}: {now.file}"
            bar.update(task, description=description, completed=now.done_bytes, total=now.total_bytes)

        yield show


def _print_details(bundle: Bundle) -> None:
    """Prints what a model's card states besides the table."""
    from workers.models.bundle import NOT_STATED

    card = bundle.card
    stated = [
        (what, text)
        for what, text in (("knows", card.knows), ("does not know", card.does_not_know), ("trained", card.trained))
        if text != NOT_STATED
    ]
    if card.most_frames is not None:
        stated.append(("frames", f"at most {card.most_frames} per answer"))
    if stated or card.accuracy:
        click.echo(f"\n{bundle.name}")
    if stated:
        print_table(("", ""), stated)
    if card.accuracy:
        click.echo()
        kinds = dict.fromkeys(kind for kinds in card.accuracy.values() for kind in kinds)  # in order, each once
        rows = [
            (kind, *(f"{kinds[kind]:.1f}" if kind in kinds else "" for kinds in card.accuracy.values()))
            for kind in kinds
        ]
        print_table(("% right", *card.accuracy), rows, right=tuple(card.accuracy))


def limits_of(bundle: Bundle) -> str:
    """One line that says what a model knows and does not know, and how to use another one."""
    return f"model {bundle.name} {_knows(bundle)}does not know {first_sentence(bundle.card.does_not_know)}; {ANOTHER}"


def hint_of(bundle: Bundle, answer: Answer | WindowAnswer) -> str:
    """One line for an answer that means "I do not know", or for one with such windows; empty for other answers.

    The line says why, what the model knows, and how to use another one.
    """
    windows = getattr(answer, "windows", ())
    unknown = [window for window in windows if window.unknown]
    if answer.unknown:
        what, why = "this", answer.unknown
    elif unknown:
        what, why = f"this in {len(unknown)} of the {len(windows)} windows", unknown[0].unknown
    else:
        return ""
    return f"model {bundle.name} {_knows(bundle)}does not know {what}: {first_sentence(why)}; {ANOTHER}"


def _knows(bundle: Bundle) -> str:
    from workers.models.bundle import NOT_STATED

    return "" if bundle.card.knows == NOT_STATED else f"knows {first_sentence(bundle.card.knows)}; it "
