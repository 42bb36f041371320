"""`vidx ask`, and how `ask` and `chat` answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.empty_filter import why_nothing
from pipeline.cli.models import hint_of
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
from pipeline.cli.print import note, print_json, print_moments
from pipeline.results.json_values import moment_json
from pipeline.text import counted
from storage.errors import UsageError
from storage.files import source_text

if TYPE_CHECKING:
    from pipeline.ask.answer import Asked, Asker
    from pipeline.cluster.remote import RemoteAsker
    from storage.archive.archive import Archive
    from storage.records import Answer
    from workers.llm.model_options import ModelOptions
    from workers.models.bundle import Bundle

# The options of `ask` and `chat` that say how to answer.
ask_options = grouped(
    click.option(
        "--frames",
        type=click.IntRange(1, 100_000),
        show_default="32",
        help="Maximum number of frames that the model is shown. If the chosen part of the archive has no more frames, "
        "all are shown without a search.",
    ),
    click.option(
        "--fuse",
        type=click.Choice(["exact", "patches", "tokens"]),
        show_default="the best available",
        help="What the question is fused with: the frames' patches, decoded again; the stored patch rows; or only the "
        "compressed tokens.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1, 4096),
        default=128,
        show_default=True,
        help="Maximum length of the answer in tokens.",
    ),
    click.option("--max-words", type=click.IntRange(1), metavar="N", help="Maximum length of the answer in words."),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 10),
        default=0.0,
        show_default=True,
        help="0 gives the most likely answer. Above 0, each token is drawn at random; higher values vary more.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the random draws."
    ),
    click.option(
        "--quantize",
        type=click.Choice(["8bit", "4bit"]),
        show_default="as they are",
        help="Keep the LLM's matrices in 8 or 4 bits (bitsandbytes), in a half or a quarter of the memory.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["transformers", "vllm"]),
        default="transformers",
        show_default=True,
        help="Library that runs the LLM. vLLM (extra `vllm`) is for a GPU that answers many questions.",
    ),
    click.option(
        "--address",
        metavar="ADDRESS",
        show_default="this machine",
        help="A running Ray cluster that loads the model, reads the videos and answers.",
    ),
)


def asked_of(options: Mapping[str, Any]) -> Asked:
    """The settings of an answer, from `ask_options` and the options that only `ask` has."""
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
    """The settings of the model, and the model; None for a model on a cluster.

    This runs before Ray and torch are imported, which takes many seconds.

    Raises:
        UsageError: there is no such model or cluster, or a library is missing.
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
    """The asker, here or on a cluster, and the archive's model.

    Args:
        how, bundle: the result of `checked_model`.
        keeps: whether to keep what is computed for a question, for the next ones.
    """
    from pipeline.ask.answer import CACHE_BYTES, Asker

    cache_bytes = CACHE_BYTES if keeps else 0
    if bundle is not None:
        return Asker(archive, bundle, how, cache_bytes), bundle
    from pipeline.cluster.remote import RemoteAsker

    model, tower = options["model"], options["tower"]
    remote = RemoteAsker(archive, model, options["address"], how, cache_bytes, announce=note, tower=tower)
    return remote, remote.bundle


@click.command()
@click.argument("question")
@archive_option
@filter_options
@click.option(
    "--all", "take_all", is_flag=True, help="Show the model every frame of the chosen part, without a search."
)
@click.option(
    "--over",
    type=click.Choice(["retrieve", "stride", "windows"]),
    show_default="refuse",
    help="What to do if the model's context cannot hold all frames: show the best ones, or evenly spaced ones, or ask "
    "about one window of frames after another and then about these answers.",
)
@click.option("--anyway", is_flag=True, help="Answer from the best frames even if none fits the question.")
@ask_options
@sheet_option
@model_option
@model_options
@json_option
def ask(question: str, archive_dir: str, as_json: bool, **options: Any) -> None:
    """Answer a question from the frames that fit it best, and cite their moments.

    If --video, --from, --to or another filter chooses no more than --frames frames, all of them are shown to the model.
    With --all, the default of --fuse is the best that the archive stores.

    \b
    vidx ask "When does the white van leave?"
    vidx ask "What is on the table?" --video bottles.mp4 --from 12 --to 0:00:30
    vidx ask "What happens?" --video bottles.mp4 --all --fuse tokens --json
    vidx ask "Is there ever a dog?" --all --over windows

    Exit code 4: no frame fits the question.
    """
    from pipeline.ask.query import check_text
    from storage.archive.archive import open_archive

    if options["take_all"] and options["frames"] is not None:
        raise UsageError("--all --frames: --all takes every frame; leave out one of them")
    check_sheet(options)
    check_text("question", question, "ask something")
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
            "not found in this archive: no frame fits the question; --anyway answers from the best frames, --all from "
            "all frames that --video, --from, --to and the other filters choose"
        )
        sys.exit(4)
    write_sheet(options, question, archive, answer.moments)
    if answer.fuse_note:
        note(answer.fuse_note)
    if hint := hint_of(bundle, answer):
        note(hint)


def answer_json(question: str, answer: Answer | None, model_id: str, bundle: Bundle | None) -> dict[str, Any]:
    """The JSON of `ask` and `chat`; the answer is None if nothing was found, the bundle if no model was asked."""
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
