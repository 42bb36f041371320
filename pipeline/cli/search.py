"""`vidx search` and `vidx export`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.empty_filter import why_nothing
from pipeline.cli.models import limits_of
from pipeline.cli.options import (
    archive_option,
    archive_uri,
    check_sheet,
    complete_files,
    filter_of,
    filter_options,
    grouped,
    json_option,
    min_score_option,
    model_option,
    sheet_option,
    tell_unfinished,
    unfinished_json,
    write_sheet,
)
from pipeline.cli.print import note, print_json, print_moments
from pipeline.results.json_values import moment_json
from pipeline.text import counted, printable

if TYPE_CHECKING:
    from pipeline.ask.filter import Filter
    from pipeline.ask.query import Query
    from pipeline.ask.search import SearchResult
    from storage.archive.archive import Archive
    from storage.records import VideoRow
    from workers.models.bundle import Bundle

NEAR_MISSES = 3

# The options of `search` and `export`.
search_options = grouped(
    archive_option,
    click.option(
        "--image",
        "images",
        metavar="FILE",
        multiple=True,
        shell_complete=complete_files,
        help="Find moments that look like this picture.",
    ),
    click.option(
        "--like",
        "likes",
        metavar="VIDEO@TIME",
        multiple=True,
        shell_complete=complete_files,
        help="Find other moments that look like this one.",
    ),
    click.option("--not", "without", metavar="TEXT", multiple=True, help="Exclude frames that show this."),
    filter_options,
    click.option(
        "--top",
        "--limit",
        "limit",
        type=click.IntRange(1, 1000),
        default=10,
        show_default=True,
        help="Maximum number of moments.",
    ),
    click.option("--per-video", type=click.IntRange(1), metavar="N", help="Maximum number of moments of one video."),
    min_score_option,
    model_option,
)


@click.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@search_options
@click.option(
    "--explain", is_flag=True, help="Say where the lowest score comes from, and list the best moments below it."
)
@sheet_option
@json_option
def search(texts: tuple[str, ...], archive_dir: str, as_json: bool, **options: Any) -> None:
    """Find the moments that texts describe, or that look like pictures, best first.

    The score is the mean cosine between the search key of the text or picture and those of the moment's frames. For
    several texts or pictures, it is the mean of their scores. A text or picture that ends in ^2 counts twice.

    \b
    vidx search "a white van"
    vidx search "a red car" --video cars.mp4 --from 0:10:00 --top 3 --json
    vidx search "a bus^2" "rain" --not "at night" --tag camera=north --after 2024-05-01
    vidx search --like cars.mp4@0:12:31
    vidx search "in the snow" --image bus.jpg^2 --explain

    Exit code 4: nothing found.
    """
    check_sheet(options)
    found = _search(texts, archive_dir, options)
    if as_json:
        print_json(
            {
                "query": str(found.query),
                "terms": [
                    {"text": term.text, "weight": term.weight, "kind": str(term.kind)} for term in found.query.terms
                ],
                "without": list(found.query.without),
                "floor": found.result.threshold.score,
                "model_id": found.bundle.model_id,
                "moments": [moment_json(moment) for moment in found.result.moments],
                "frames_searched": found.result.frames_searched,
                "frames_pending": found.result.frames_pending,
                "videos_unfinished": unfinished_json(found.unfinished),
            }
            | (_explained(found.result) if options["explain"] else {})
        )
    elif found.result.moments:
        print_moments(found.result.moments)
    if options["explain"] and not as_json:
        _explain(found.result)
    write_sheet(options, str(found.query), found.archive, found.result.moments)
    _end_search(found)


@click.command()
@click.argument("file", metavar="FILE", shell_complete=complete_files)
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@search_options
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["csv", "json", "vtt", "otio", "edl"]),
    show_default="FILE's suffix",
    help="Format to write.",
)
def export(file: str, texts: tuple[str, ...], archive_dir: str, format_name: str | None, **options: Any) -> None:
    """Write the moments that texts describe to a file for other programs.

    FILE is - for standard output, together with --format, or ends in one of these:

    \b
    .csv, .json  one row per moment
    .vtt         WebVTT chapters of one video, in order of time
    .otio        OpenTimelineIO edit list for video editors; needs the extra `otio`
    .edl         CMX 3600 edit list; all videos must have the same frame rate

    \b
    vidx export vans.csv "a white van" --top 100
    vidx export cars.vtt "a red car" --video cars.mp4
    vidx export vans.otio "a white van" --per-video 1
    vidx export - "a white van" --format csv

    Exit code 4: nothing was found or written.
    """
    from pipeline.results.export import STDOUT, check_place
    from pipeline.results.export import export as write

    name = check_place(file, format_name)
    found = _search(texts, archive_dir, options)
    if found.result.moments:
        write(file, name, str(found.query), found.archive, found.result.moments)
        place = "standard output" if file == STDOUT else printable(file)
        note(f"{counted(len(found.result.moments), 'moment')}: {place}")
    _end_search(found)


@dataclass(frozen=True)
class _FoundMoments:
    archive: Archive
    bundle: Bundle
    query: Query
    within: Filter
    result: SearchResult
    unfinished: list[VideoRow]


def _search(texts: Sequence[str], archive_dir: str, options: Mapping[str, Any]) -> _FoundMoments:
    from pipeline.ask.query import query_of
    from pipeline.ask.search import SearchLimits, bundle_of
    from pipeline.ask.search import search as run_search
    from storage.archive.archive import open_archive

    archive = open_archive(archive_uri(archive_dir))
    bundle = bundle_of(archive, options["model"], options["tower"])
    query = query_of(texts, options["without"], options["images"], options["likes"])
    near = NEAR_MISSES if options.get("explain") else 0
    wanted = SearchLimits(options["limit"], options["min_score"], options["per_video"], near)
    within = filter_of(archive, options)
    unfinished = tell_unfinished(archive, within)
    return _FoundMoments(archive, bundle, query, within, run_search(archive, bundle, query, within, wanted), unfinished)


def _explained(result: SearchResult) -> dict[str, Any]:
    return {
        "floor_source": result.threshold.source,
        "method": result.method,
        "frames_left_out": result.frames_left_out,
        "near_misses": [moment_json(moment) for moment in result.near_misses],
    }


def _explain(result: SearchResult) -> None:
    note(f"{counted(result.frames_searched, 'frame')}; {result.method or 'nothing was compared'}")
    note(f"a hit scores at least {result.threshold.score:g} ({result.threshold.source}; --min-score)")
    if result.near_misses:
        note("best moments below this score:")
        print_moments(result.near_misses, err=True)


def _end_search(found: _FoundMoments) -> None:
    """Notes what the search left out; exits with code 4 if it found nothing."""
    result = found.result
    if result.frames_pending:
        note(f"{counted(result.frames_pending, 'frame')} of the archive cannot be found: they have no search keys")
    if not result.moments:
        searched = result.frames_searched
        why = (
            f"none of {counted(searched, 'frame')} reaches the score {result.threshold.score:g} (--min-score)"
            if searched
            else why_nothing(found.archive, found.within)
        )
        limits = f"; {limits_of(found.bundle)}" if searched and found.bundle.card.states_limits else ""
        left_out = f", except {result.frames_left_out} excluded by --not" if result.frames_left_out else ""
        note(f"nothing found: {why}{left_out}{limits}")
        sys.exit(4)
