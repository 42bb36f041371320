"""`vidx models`, and what the other commands say of a model's limits."""

import contextlib
from typing import Any

import click

from pipeline.cli_options import archive_option, archive_uri, json_option

ANOTHER = (
    "to use another model, index into another archive with --model DIR|HUB-ID, "
    "for instance ICTNLP/llava-mini-llama-3.1-8b"
)


@click.command()
@archive_option
@json_option
def models(archive_dir: str, as_json: bool) -> None:
    """List the models at hand: built in, and published ones in the local hub cache.

    The model that an existing archive was made with is marked.

    \b
    vidx models
    vidx models --json
    """
    from pipeline.cli_print import first_sentence, print_json, print_table
    from storage.archive import archive_exists, open_archive
    from storage.errors import ArchiveError
    from workers.bundle import list_bundles

    uri = archive_uri(archive_dir)
    used = None
    with contextlib.suppress(ArchiveError):  # a damaged archive has nothing to say of models; others have
        used = open_archive(uri).model_id if archive_exists(uri) else None
    bundles = list_bundles()
    if as_json:
        print_json(
            [
                {
                    "name": bundle.name,
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


def _print_details(bundle: Any) -> None:
    """What a model's files say besides, and nothing where they say nothing."""
    from pipeline.cli_print import print_table
    from workers.bundle import NOT_STATED

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
    from pipeline.cli_print import first_sentence

    return f"model {bundle.name} {_knows(bundle)}does not know {first_sentence(bundle.card.does_not_know)}; {ANOTHER}"


def hint_of(bundle: Any, answer: Any) -> str:
    """One line for an answer that says that the model does not know: why, what it knows, how to name another one.

    The same where that is the answer of some windows, and of one window. Nothing for any other answer.
    """
    from pipeline.cli_print import first_sentence

    unknown = [window for window in getattr(answer, "windows", ()) if window.unknown]
    if answer.unknown:
        what, why = "this", answer.unknown
    elif unknown:
        what, why = f"this in {len(unknown)} of the {len(answer.windows)} windows", unknown[0].unknown
    else:
        return ""
    return f"model {bundle.name} {_knows(bundle)}does not know {what}: {first_sentence(why)}; {ANOTHER}"


def _knows(bundle: Any) -> str:
    from pipeline.cli_print import first_sentence
    from workers.bundle import NOT_STATED

    return "" if bundle.card.knows == NOT_STATED else f"knows {first_sentence(bundle.card.knows)}; it "
