"""`vidx search` and `vidx ask`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli_options import (
    archive_option,
    archive_uri,
    filter_options,
    grouped,
    json_option,
    model_options,
    parse_tags,
)

if TYPE_CHECKING:
    from pipeline.answer import Asker
    from pipeline.remote import RemoteAsker
    from storage.archive import Archive
    from workers.bundle import Bundle

NEAR_MISSES = 3
NO_FRAMES = "there are no searchable frames in what was asked for; `vidx status` shows what the archive holds"

model_option = click.option(
    "--model", metavar="NAME|DIR|HUB-ID", default=None, help="Where the archive's model lies now; the one that made it."
)


# How moments are seen.
sheet_option = grouped(
    click.option("--show", is_flag=True, help="Draw the moments' thumbnails in this terminal."),
    click.option(
        "--contact-sheet",
        metavar="FILE",
        default=None,
        help="Write the moments' thumbnails with times and scores to a file, .html or .png.",
    ),
)

# What `search` and `export` look for, and where.
search_options = grouped(
    archive_option,
    click.option("--image", "images", metavar="FILE", multiple=True, help="Find what looks like this picture."),
    click.option(
        "--like", "likes", metavar="VIDEO@TIME", multiple=True, help="Find what looks like this moment, elsewhere."
    ),
    click.option("--not", "without", metavar="TEXT", multiple=True, help="Leave out frames that show this."),
    filter_options,
    click.option(
        "--top",
        "--limit",
        "limit",
        type=click.IntRange(1, 1000),
        default=10,
        show_default=True,
        help="Moments at most.",
    ),
    click.option("--per-video", type=click.IntRange(1), metavar="N", help="Of one video at most so many."),
    click.option(
        "--min-score",
        "--floor",
        "floor",
        type=click.FloatRange(-1, 1),
        default=None,
        help="Least score of a hit; without it what the model or the archive says.",
    ),
    model_option,
)


@click.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@search_options
@click.option("--explain", is_flag=True, help="Say where the least score comes from, and what comes closest below it.")
@sheet_option
@json_option
def search(texts: tuple[str, ...], archive_dir: str, as_json: bool, **options: Any) -> None:
    """Find the moments that texts describe, or that look like pictures, best first.

    The score is the cosine between the search keys of the text or picture and of the moment's frames, on average; of
    several texts or pictures, their mean. One that ends in ^2 counts twice.

    \b
    vidx search "a white van"
    vidx search "a red car" --video cars.mp4 --from 0:10:00 --top 3 --json
    vidx search "a bus^2" "rain" --not "at night" --tag camera=north --after 2024-05-01
    vidx search --like cars.mp4@0:12:31
    vidx search "in the snow" --image bus.jpg^2 --explain

    Exit code 4: nothing found.
    """
    from pipeline.cli_print import moment_json, print_json, print_moments

    _check_sheet(options)
    found = _search(texts, archive_dir, options)
    if as_json:
        print_json(
            {
                "query": str(found.query),
                "terms": [
                    {"text": term.text, "weight": term.weight, "kind": str(term.kind)} for term in found.query.terms
                ],
                "without": list(found.query.without),
                "floor": found.result.floor.score,
                "model_id": found.bundle.model_id,
                "moments": [moment_json(moment) for moment in found.result.moments],
                "frames_searched": found.result.frames_searched,
                "frames_pending": found.result.frames_pending,
            }
            | (_explained(found.result) if options["explain"] else {})
        )
    elif found.result.moments:
        print_moments(found.result.moments)
    if options["explain"] and not as_json:
        _explain(found.result)
    _write_sheet(options, str(found.query), found.archive, found.result.moments)
    _end_search(found)


@click.command()
@click.argument("file", metavar="FILE")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@search_options
def export(file: str, texts: tuple[str, ...], archive_dir: str, **options: Any) -> None:
    """Write the moments that texts describe to a file for other programs.

    FILE ends in .csv or .json (a row for each moment), .vtt (WebVTT chapters of one video, in order of time) or .otio
    (an OpenTimelineIO edit list, which video editors read; needs the extra `otio`).

    \b
    vidx export vans.csv "a white van" --top 100
    vidx export cars.vtt "a red car" --video cars.mp4
    vidx export vans.otio "a white van" --per-video 1

    Exit code 4: nothing found, and nothing written.
    """
    from pipeline.cli_print import counted, note, printable
    from pipeline.export import check_place
    from pipeline.export import export as write_file

    check_place(file)
    found = _search(texts, archive_dir, options)
    if found.result.moments:
        write_file(file, str(found.query), found.archive, found.result.moments)
        note(f"{counted(len(found.result.moments), 'moment')}: {printable(file)}")
    _end_search(found)


@dataclass(frozen=True)
class _Found:
    archive: Any
    bundle: Any
    query: Any
    result: Any


def _search(texts: Sequence[str], archive_dir: str, options: Mapping[str, Any]) -> _Found:
    from pipeline.query import query_of
    from pipeline.search import Wanted, bundle_of
    from pipeline.search import search as run_search
    from storage.archive import open_archive

    archive = open_archive(archive_uri(archive_dir))
    bundle = bundle_of(archive, options["model"])
    query = query_of(texts, options["without"], options["images"], options["likes"])
    near = NEAR_MISSES if options.get("explain") else 0
    wanted = Wanted(options["limit"], options["floor"], options["per_video"], near)
    return _Found(archive, bundle, query, run_search(archive, bundle, query, filter_of(archive, options), wanted))


def _explained(result: Any) -> dict[str, Any]:
    from pipeline.cli_print import moment_json

    return {
        "floor_source": result.floor.source,
        "method": result.method,
        "frames_left_out": result.frames_left_out,
        "near_misses": [moment_json(moment) for moment in result.near_misses],
    }


def _explain(result: Any) -> None:
    from pipeline.cli_print import note, print_moments

    note(f"{result.frames_searched} frames; {result.method or 'nothing was compared'}")
    note(f"a hit scores at least {result.floor.score:g} ({result.floor.source}; --min-score)")
    if result.near_misses:
        note("closest below that:")
        print_moments(result.near_misses, err=True)


def _end_search(found: _Found) -> None:
    """Says what a search could not look at, and ends with exit code 4 where nothing was found."""
    from pipeline.cli_models import limits_of
    from pipeline.cli_print import counted, note

    result = found.result
    if result.frames_pending:
        pending = counted(result.frames_pending, "frame")
        note(f"{pending} of the archive without search keys: no search finds them")
    if not result.moments:
        searched = result.frames_searched
        why = (
            f"none of {counted(searched, 'frame')} reaches a score of {result.floor.score:g} (--min-score)"
            if searched
            else NO_FRAMES
        )
        limits = f"; {limits_of(found.bundle)}" if searched and found.bundle.card.states_limits else ""
        shows = f", but for {result.frames_left_out} that show what --not names" if result.frames_left_out else ""
        note(f"nothing found: {why}{shows}{limits}")
        sys.exit(4)


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
        "--address",
        metavar="ADDRESS",
        default=None,
        help="Answer on this running Ray cluster: the model is loaded and videos are read there; without it, here.",
    ),
)


def asked_of(options: Mapping[str, Any]) -> Any:
    """How a question is to be answered, by the options of `ask_options` and those of `ask` alone."""
    from pipeline.answer import Asked, Over
    from pipeline.search import FRAMES_SHOWN
    from workers.shown_frames import SamplingParams

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


def asker_of(archive: Archive, options: Mapping[str, Any], cache_bytes: int) -> tuple[Asker | RemoteAsker, Bundle]:
    """What answers, by the options of `ask_options` and those of the model; and the archive's model."""
    model = options["model"]
    place = (options["device"] or "auto", options["dtype"] or "auto", cache_bytes, options["quantize"])
    if options["address"] is not None:
        from pipeline.address import check_address

        check_address(options["address"])
        from pipeline.cli_print import note
        from pipeline.remote import RemoteAsker

        remote = RemoteAsker(archive, model, options["address"], *place, announce=note)
        return remote, remote.bundle
    from pipeline.answer import Asker
    from pipeline.search import bundle_of

    bundle = bundle_of(archive, model)
    return Asker(archive, bundle, *place), bundle


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
    from pipeline.cli_models import hint_of
    from pipeline.cli_print import counted, note, print_json, print_moments
    from storage.archive import open_archive
    from storage.errors import UsageError

    if options["take_all"] and options["frames"] is not None:
        raise UsageError("--all takes every frame, --frames only so many: leave one of them out")
    _check_sheet(options)
    archive = open_archive(archive_uri(archive_dir))
    where = filter_of(archive, options)
    asker, bundle = asker_of(archive, options, cache_bytes=0)

    def stream(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    answer = asker.ask(question, where, asked_of(options), stream=stream, announce=note)
    found = answer is not None
    if as_json:
        print_json(answer_json(question, answer, bundle))
    elif found:
        click.echo()
        print_moments(answer.moments)
        click.echo(f"from {counted(answer.frame_count, 'frame')}, fused with {answer.fuse}")
    if not found and where.rows(archive):
        note(
            "not found in this archive: no frame fits the question; --anyway answers from the best ones, --all from "
            "every frame of --video, --from/--to and the other filters"
        )
        sys.exit(4)
    if not found:
        note(f"nothing found: {NO_FRAMES}")
        sys.exit(4)
    _write_sheet(options, question, archive, answer.moments)
    if answer.fuse_note:
        note(answer.fuse_note)
    if hint := hint_of(bundle, answer.text):
        note(hint)


def _check_sheet(options: Mapping[str, Any]) -> None:
    if options["contact_sheet"] is not None:
        from pipeline.contact_sheet import SUFFIXES
        from pipeline.output import check_output

        check_output(options["contact_sheet"], SUFFIXES)
    if options["show"]:
        from pipeline.contact_sheet import check_show

        check_show()


def _write_sheet(options: Mapping[str, Any], title: str, archive: Any, moments: Sequence[Any]) -> None:
    if options["show"] and moments:
        from pipeline.contact_sheet import show_moments

        show_moments(archive, moments)
    if options["contact_sheet"] is not None and moments:
        from pipeline.cli_print import note, printable
        from pipeline.contact_sheet import write_contact_sheet

        write_contact_sheet(options["contact_sheet"], title, archive, moments)
        note(f"contact sheet: {printable(options['contact_sheet'])}")


def filter_of(archive: Any, options: Mapping[str, Any]) -> Any:
    """The part of an archive that the options of `filter_options` leave."""
    from pipeline.filter import Filter
    from pipeline.times import parse_instant, parse_moment, parse_time
    from storage.errors import UsageError

    video, from_text, to_text = options["video"], options["from_text"], options["to_text"]
    name, start, end = parse_moment(video) if video is not None else (None, None, None)
    if start is not None and not (from_text is None and to_text is None):
        raise UsageError(f"--video {video} names a moment already; leave out --from and --to, or the part after @")
    start = parse_time("--from", from_text) if from_text is not None else start
    end = parse_time("--to", to_text) if to_text is not None else end
    if start is not None and end is not None and end <= start:
        raise UsageError(f"--from {from_text} --to {to_text}: the range must end after it starts")
    row = archive.find_video(name) if name is not None else None
    if start is not None and end is None and video and from_text is None:
        end = start + 1e-6  # a moment of one instant: the frame shown then
    after, before = (
        None if options[name] is None else parse_instant(f"--{name}", options[name]) for name in ("after", "before")
    )
    if after is not None and before is not None and before <= after:
        raise UsageError(f"--after {options['after']} --before {options['before']}: the range must end after it starts")
    return Filter(row, start, end, after, before, parse_tags(options["tags"]), options["where"])


def answer_json(question: str, answer: Any, bundle: Any) -> dict[str, Any]:
    """What `ask` and `chat` print of an answer, None where nothing was found."""
    from pipeline.cli_models import hint_of
    from pipeline.cli_print import moment_json

    found = answer is not None
    hint = hint_of(bundle, answer.text) if found else ""
    return {
        "question": question,
        "answer": answer.text if found else "",
        "answer_known": found and not hint,
        "hint": hint,
        "found": found,
        "moments": [moment_json(moment) for moment in answer.moments] if found else [],
        "fuse": answer.fuse if found else None,
        "fuse_note": answer.fuse_note if found else "",
        "frames_used": answer.frame_count if found else 0,
        "over": answer.over if found else "",
        "windows": [_window_json(window) for window in answer.windows] if found else [],
        "memory_bytes": answer.memory_bytes if found else 0,
        "video_bytes_read": answer.video_bytes_read if found else 0,
        "model_id": bundle.model_id,
    }


def _window_json(window: Any) -> dict[str, Any]:
    from storage.files import source_text

    return {
        "source": source_text(window.uri),
        "start_seconds": window.start_seconds,
        "end_seconds": window.end_seconds,
        "answer": window.text,
    }
