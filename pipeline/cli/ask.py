"""`vidx ask`, and how `ask` and `chat` answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    archive_option,
    archive_uri,
    check_sheet,
    filter_of,
    filter_options,
    grouped,
    json_option,
    model_option,
    model_options,
    sheet_option,
    tell_unfinished,
    unfinished_json,
    write_sheet,
)

if TYPE_CHECKING:
    from pipeline.ask.answer import Asked, Asker
    from pipeline.cluster.remote import RemoteAsker
    from storage.archive.archive import Archive
    from storage.records import Answer
    from workers.llm.model_options import ModelOptions
    from workers.models.bundle import Bundle

# How `ask` and `chat` answer.
ask_options = grouped(
    click.option(
        "--frames",
        type=click.IntRange(1, 100_000),
        default=None,
        help="Show the model at most so many frames; 32. A chosen range of no more is shown whole, without a search.",
    ),
    click.option(
        "--fuse",
        type=click.Choice(["exact", "patches", "tokens"]),
        default=None,
        help="What the question is fused with: the frames' patches decoded again, the stored patch rows, or the "
        "compressed tokens alone. Without it the best at hand; with --all the best that is stored.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1, 4096),
        default=128,
        show_default=True,
        help="Length of the answer at most.",
    ),
    click.option("--max-words", type=click.IntRange(1), metavar="N", help="The same in words."),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 10),
        default=0.0,
        show_default=True,
        help="Above 0, draw the answer, the more freely the greater; 0 gives the likeliest.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the draws."),
    click.option(
        "--quantize",
        type=click.Choice(["8bit", "4bit"]),
        default=None,
        help="Keep the LLM's matrices in 8 or 4 bits (bitsandbytes): a half or a quarter of the memory; as they are.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="What runs the LLM; vLLM (extra vllm) for a GPU that answers many questions.",
    ),
    click.option(
        "--address",
        metavar="ADDRESS",
        default=None,
        help="Answer on this running Ray cluster: the model is loaded and videos are read there; without it, here.",
    ),
)


def asked_of(options: Mapping[str, Any]) -> Asked:
    """How a question is to be answered, by the options of `ask_options` and those of `ask` alone."""
    from pipeline.ask.answer import Asked, Over
    from pipeline.ask.search import FRAMES_SHOWN
    from workers.llm.model_options import SamplingParams

    over = options.get("over")
    return Asked(
        frame_limit=None if options.get("take_all") else options["frames"] or FRAMES_SHOWN,
        fuse=options["fuse"],
        over=None if over is None else Over(over),
        anyway=options.get("anyway", False),
        most_tokens=options["max_tokens"],
        most_words=options["max_words"],
        sampling=SamplingParams(options["temperature"], options["seed"]),
    )


def checked_model(archive: Archive, options: Mapping[str, Any]) -> tuple[ModelOptions, Bundle | None]:
    """How the model is to be held, and which it is, None where it lies on a cluster.

    Raises:
        UsageError: what can be told to be wrong with them before Ray and torch are imported, which takes many seconds.
    """
    from workers.llm.model_options import ModelOptions

    place = options["device"] or "auto", options["dtype"] or "auto"
    how = ModelOptions(*place, options["quantize"], options["engine"])
    if options["address"] is not None:
        from pipeline.cluster.address import check_address

        check_address(options["address"])
        return how, None
    from pipeline.ask.search import bundle_of

    how.check_installed()
    return how, bundle_of(archive, options["model"], options["tower"])


def asker_of(
    archive: Archive, options: Mapping[str, Any], how: ModelOptions, bundle: Bundle | None, keeps: bool
) -> tuple[Asker | RemoteAsker, Bundle]:
    """What answers, and the archive's model; how and bundle are of `checked_model`.

    Args:
        archive: what is asked.
        options: of the command.
        how, bundle: the model.
        keeps: for further questions what is computed for one.
    """
    from pipeline.ask.answer import CACHE_BYTES, Asker

    cache_bytes = CACHE_BYTES if keeps else 0
    if bundle is not None:
        return Asker(archive, bundle, how, cache_bytes), bundle
    from pipeline.cli.print import note
    from pipeline.cluster.remote import RemoteAsker

    model, tower = options["model"], options["tower"]
    remote = RemoteAsker(archive, model, options["address"], how, cache_bytes, announce=note, tower=tower)
    return remote, remote.bundle


@click.command()
@click.argument("question")
@archive_option
@filter_options
@click.option(
    "--all", "take_all", is_flag=True, help="Take every frame of the chosen range, however many, instead of searching."
)
@click.option(
    "--over",
    type=click.Choice(["retrieve", "stride", "windows"]),
    default=None,
    help="Of more frames than the model's context holds, show the best, or every so manyth, or ask of each stretch "
    "that fits and then of the answers.",
)
@click.option("--anyway", is_flag=True, help="Answer from the best frames even where none fits the question.")
@ask_options
@sheet_option
@model_option
@model_options
@json_option
def ask(question: str, archive_dir: str, as_json: bool, **options: Any) -> None:
    """Answer a question from the frames that fit it best, and cite their moments.

    What a filter leaves, as --video or --from and --to, is shown to the model whole, in order, where --frames allows.

    \b
    vidx ask "When does the white van leave?"
    vidx ask "What is on the table?" --video bottles.mp4 --from 12 --to 0:00:30
    vidx ask "What happens?" --video bottles.mp4 --all --fuse tokens --json
    vidx ask "Is there ever a dog?" --all --over windows

    Exit code 4: nothing found to answer from.
    """
    from pipeline.ask.query import check_text
    from pipeline.cli.empty_filter import why_nothing
    from pipeline.cli.models import hint_of
    from pipeline.cli.print import note, print_json, print_moments
    from pipeline.results.text import counted
    from storage.archive.archive import open_archive
    from storage.errors import UsageError

    if options["take_all"] and options["frames"] is not None:
        raise UsageError("--all takes every frame, --frames only so many: leave one of them out")
    check_sheet(options)
    check_text("question", question)
    archive = open_archive(archive_uri(archive_dir))
    where = filter_of(archive, options)
    how, bundle = checked_model(archive, options)
    unfinished = tell_unfinished(archive, where)
    unfinished_videos = {"videos_unfinished": unfinished_json(unfinished)}
    if not where.rows(archive):
        if as_json:
            print_json(answer_json(question, None, archive.model_id, bundle) | unfinished_videos)
        note(f"nothing found: {why_nothing(archive, where)}")
        sys.exit(4)
    asker, bundle = asker_of(archive, options, how, bundle, keeps=False)

    def stream(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    answer = asker.ask(question, where, asked_of(options), stream=stream, announce=note)
    if as_json:
        print_json(answer_json(question, answer, bundle.model_id, bundle) | unfinished_videos)
    elif answer is not None:
        click.echo()
        print_moments(answer.moments)
        click.echo(f"from {counted(answer.frame_count, 'frame')}, fused with {answer.fuse}")
    if answer is None:
        note(
            "not found in this archive: no frame fits the question; --anyway answers from the best ones, --all from "
            "every frame of --video, --from/--to and the other filters"
        )
        sys.exit(4)
    write_sheet(options, question, archive, answer.moments)
    if answer.fuse_note:
        note(answer.fuse_note)
    if hint := hint_of(bundle, answer):
        note(hint)


def answer_json(question: str, answer: Answer | None, model_id: str, bundle: Bundle | None) -> dict[str, Any]:
    """The JSON that `ask` and `chat` print of an answer.

    Args:
        question: as it was asked.
        answer: None where nothing was found.
        model_id: of the archive's model.
        bundle: the model; None where no answer was asked of it.
    """
    from pipeline.cli.models import hint_of
    from pipeline.results.json_values import moment_json
    from storage.files import source_text
    from storage.records import Answer

    told = answer or Answer(question, text="", moments=(), fuse="", fuse_note="", frame_count=0, video_bytes_read=0)
    return {
        "question": question,
        "answer": told.text,
        "answer_known": answer is not None and not answer.unknown,
        "hint": hint_of(bundle, told) if bundle else "",
        "found": answer is not None,
        "moments": [moment_json(moment) for moment in told.moments],
        "fuse": told.fuse or None,
        "fuse_note": told.fuse_note,
        "frames_used": told.frame_count,
        "over": told.over,
        "windows": [
            {
                "source": source_text(window.uri),
                "start_seconds": window.start_seconds,
                "end_seconds": window.end_seconds,
                "answer": window.text,
                "answer_known": not window.unknown,
                "hint": hint_of(bundle, window) if bundle else "",
            }
            for window in told.windows
        ],
        "memory_bytes": told.memory_bytes,
        "video_bytes_read": told.video_bytes_read,
        "model_id": model_id,
    }
