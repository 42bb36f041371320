"""`vidx evaluate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import archive_option, archive_uri, complete_files, json_option, model_option

if TYPE_CHECKING:
    from pipeline.evaluate.retrieval import Judged, Scores


@click.group()
def evaluate() -> None:
    """Measure how well an archive answers what is known.

    \b
    vidx evaluate retrieval QUERIES.csv
    """


@evaluate.command()
@click.argument("queries", metavar="FILE", shell_complete=complete_files)
@archive_option
@click.option("--within-video", is_flag=True, help="Search each text in its own video alone, not in the whole archive.")
@click.option(
    "--min-score",
    type=click.FloatRange(-1, 1),
    default=None,
    help="Least score of a hit; without it what the model or the archive says.",
)
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
    """Search for texts whose moments are known, and score what is found.

    FILE is CSV with the columns file, start_seconds, end_seconds and text, an empty file meaning that the archive shows
    nothing of the kind; or annotations of QVHighlights (JSON lines) or Charades-STA (lines ID START END##text). Videos
    are named by path, file name, or file name without its suffix. A text is one query, and wherever the file says it is
    true is right; with --within-video it is one for each video that it is said of.

    R@k is the share of the texts of which one of the first k moments overlaps a true one by an IoU of at least that
    much; MRR the mean of 1 / rank of the first such one (IoU 0.5), of ten; F1 that of telling what is there from what
    is not.

    \b
    vidx evaluate retrieval QUERIES.csv
    vidx evaluate retrieval charades_sta_test.txt --within-video --json
    """
    from pipeline.ask.filter import Filter
    from pipeline.ask.query import Query, Term
    from pipeline.ask.search import Searcher, SearchLimits, bundle_of
    from pipeline.cli.print import note, print_json
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
        if sys.stderr.isatty():
            click.echo(f"\r{number}/{len(annotated)} queries", err=True, nl=number == len(annotated))
    scores = score(judged)
    if found.frames_pending:
        note(f"{found.frames_pending} frames have no search keys, and count as not found")
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
    from pipeline.cli.print import print_table
    from pipeline.evaluate.retrieval import MRR_OVERLAP, OVERLAPS, RANKS

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    rows = [(f"{least}", *(percent(scores.recall[rank, least]) for rank in RANKS)) for least in OVERLAPS]
    print_table(("IoU", *(f"R@{rank}" for rank in RANKS)), rows, right=[f"R@{rank}" for rank in RANKS])
    if scores.there:
        mrr, f1 = f"{scores.reciprocal_rank:.3f}", f"{scores.found_f1:.3f}"
        click.echo(f"MRR {mrr}, F1 of found {f1}; {scores.there} texts of what is there, {scores.found} of them found")
    if scores.absent:
        click.echo(f"{scores.absent} texts of what is not there, {scores.found_wrongly} of them found something")
    missed = [one.text for one in judged if one.is_there and one.ranks[MRR_OVERLAP] is None]
    if missed:
        print_table(("not among the first ten",), [(text,) for text in missed])
