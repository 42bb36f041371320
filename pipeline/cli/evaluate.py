"""`vidx evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    archive_option,
    archive_uri,
    complete_files,
    json_option,
    min_score_option,
    model_option,
)
from pipeline.cli.print import note, print_json, print_table, show_count
from pipeline.text import counted

if TYPE_CHECKING:
    from pipeline.evaluate.retrieval import Judged, Scores


@click.group()
def evaluate() -> None:
    """Measure how well search finds known moments.

    \b
    vidx evaluate retrieval QUERIES.csv
    """


@evaluate.command()
@click.argument("queries", metavar="FILE", shell_complete=complete_files)
@archive_option
@click.option("--within-video", is_flag=True, help="Search each text only in its own video.")
@min_score_option
@model_option
@json_option
def retrieval(
    queries: str,
    archive_dir: str,
    within_video: bool,
    min_score: float | None,
    model: str | None,
    tower: str | None,
    as_json: bool,
) -> None:
    """Search for texts whose moments are known, and score the results.

    FILE is CSV with the columns file, start_seconds, end_seconds and text, or annotations of QVHighlights (JSON lines)
    or Charades-STA (lines ID START END##text). In a CSV, an empty file says that the archive does not show the text.
    Videos are named by path, or by file name with or without suffix.

    Each text is one query, and all its moments are right answers. With --within-video, it is one query per video.

    R@k is the share of the texts for which one of the first k moments overlaps a known one by at least this IoU. MRR is
    the mean of 1 / rank of the first such moment among ten (IoU 0.5). F1 measures how well search tells what the
    archive shows from what it does not show.

    \b
    vidx evaluate retrieval QUERIES.csv
    vidx evaluate retrieval charades_sta_test.txt --within-video --json
    """
    from pipeline.ask.filter import Filter
    from pipeline.ask.query import Query, Term
    from pipeline.ask.search import Searcher, SearchLimits, bundle_of
    from pipeline.evaluate.retrieval import DEPTH, judge, read_annotations, score
    from storage.archive.archive import open_archive

    archive = open_archive(archive_uri(archive_dir))
    bundle = bundle_of(archive, model, tower)
    annotated = read_annotations(queries, archive, within_video)
    searcher = Searcher(archive, bundle)
    judged = []
    for number, one in enumerate(annotated, 1):
        found = searcher.search(Query((Term(one.text),)), Filter(video=one.video), SearchLimits(DEPTH, min_score))
        judged.append(judge(one, found.moments))
        show_count(number, len(annotated), "queries")
    scores = score(judged)
    if found.frames_pending:
        note(f"{counted(found.frames_pending, 'frame')} of the archive cannot be found: they have no search keys")
    if as_json:
        print_json(
            {**_scores_json(scores), "floor": found.threshold.score, "queries": [_judged_json(one) for one in judged]}
        )
    else:
        _print_scores(scores, judged)


def _scores_json(scores: Scores) -> dict[str, Any]:
    recall = {f"R@{rank} IoU={least}": share for (rank, least), share in scores.recall.items()}
    counts = {name: getattr(scores, name) for name in ("there", "absent", "found", "found_wrongly")}
    return {"recall": recall, "mrr": scores.reciprocal_rank, "found_f1": scores.found_f1, "counts": counts}


def _judged_json(judged: Judged) -> dict[str, Any]:
    ranks = {f"IoU={least}": rank for least, rank in judged.ranks.items()}
    return {"text": judged.text, "there": judged.is_there, "found": judged.is_found, "rank": ranks}


def _print_scores(scores: Scores, judged: list[Judged]) -> None:
    from pipeline.evaluate.retrieval import DEPTH, MRR_OVERLAP, OVERLAPS, RANKS

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    rows = [(f"{least}", *(percent(scores.recall[rank, least]) for rank in RANKS)) for least in OVERLAPS]
    print_table(("IoU", *(f"R@{rank}" for rank in RANKS)), rows, right=[f"R@{rank}" for rank in RANKS])
    if scores.there:
        mrr, f1 = f"{scores.reciprocal_rank:.3f}", f"{scores.found_f1:.3f}"
        click.echo(f"MRR {mrr}, F1 of found {f1}; {scores.there} texts with moments, {scores.found} of them found")
    if scores.absent:
        click.echo(f"{scores.absent} texts without moments, {scores.found_wrongly} of them found something")
    missed = [one.text for one in judged if one.is_there and one.ranks[MRR_OVERLAP] is None]
    if missed:
        print_table((f"not among the first {DEPTH}",), [(text,) for text in missed])
