"""`vidx index`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.models import limits_of
from pipeline.cli.options import (
    archive_option,
    archive_uri,
    complete_files,
    json_option,
    model_choice,
    model_options,
    tower_choice,
)
from pipeline.cli.print import note, print_json, print_table
from pipeline.results.json_values import source_json
from pipeline.text import counted, printable
from storage.files import source_text

if TYPE_CHECKING:
    from pipeline.index.job import IndexResult
    from pipeline.index.plan import IndexPlan, Update
    from pipeline.index.scan import Scan
    from storage.records import VideoRow

UPDATES_TOLD = 20  # videos whose tags or capture times changed
KINDS_TOLD = 12  # suffixes of files that are no videos


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", shell_complete=complete_files)
@archive_option
@model_choice("A built-in name, a directory or a hub id; see `vidx models`.", show_default="nano")
@tower_choice("The CLIP to use instead of the one that the model names.")
@click.option(
    "--sample",
    type=click.Choice(["rate", "keyframes", "scenes"]),
    show_default="rate",
    help="Frames to index: at the rate of --fps; or only keyframes, or the first frame of each scene, at no more than "
    "this rate.",
)
@click.option("--fps", metavar="N", show_default="1", help="Frames per second to index, e.g. 1, 0.5 or 30000/1001.")
@click.option(
    "--patches",
    type=int,
    metavar="N",
    show_default="1/9 of the model's patches",
    help="Patch rows to store per picture; 0 stores none.",
)
@click.option("--address", metavar="ADDRESS", show_default="a new one here", help="A running Ray cluster to use.")
@click.option(
    "--workers", type=int, metavar="N", show_default="one per GPU, or per 8 cores", help="Copies of the model."
)
@click.option("--gpus-per-worker", type=float, metavar="N", show_default="1", help="Share of a GPU for a model copy.")
@click.option(
    "--wait-for-resources",
    type=float,
    metavar="SECONDS",
    show_default="no limit",
    help="Give up with exit code 75 if no model copy could start on the cluster within this time.",
)
@model_options
@click.option("--batch", type=int, metavar="N", show_default="32", help="Frames per forward pass.")
@click.option(
    "--max-pixels", type=int, metavar="N", show_default="100000000", help="Refuse videos whose frames have more pixels."
)
@click.option(
    "--decoder",
    type=click.Choice(["pyav", "decord"]),
    show_default="pyav",
    help="Library that decodes. decord reads only short MP4 and Matroska files, PyAV reads the others.",
)
@click.option(
    "--thumbnails/--no-thumbnails",
    default=None,
    show_default="thumbnails",
    help="Store a JPEG of each frame, 160 pixels wide.",
)
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=complete_files,
    help="A preset (embedded, one_gpu, cluster) or a TOML file. Other options override it.",
)
@click.option(
    "--rehash",
    is_flag=True,
    default=None,
    help="Read also files whose place, size and time of change the archive knows.",
)
@click.option("--retry-failed", is_flag=True, default=None, help="Try failed and partial videos again.")
@click.option("--restore-deleted", is_flag=True, default=None, help="Index videos again that `vidx delete` took out.")
@click.option(
    "--strict-sandbox",
    is_flag=True,
    default=None,
    help="Refuse to index where the system cannot limit the decoders' access to files, network and memory.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done with each source, and change nothing.")
@json_option
def index(
    sources: tuple[str, ...], archive_dir: str, config: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Index videos into an archive.

    SOURCE is a video, a folder (searched recursively), a glob, or a manifest. A manifest is a CSV file with a header
    or a JSONL file. It has the column `source`, optionally `captured_at` (ISO 8601); all other columns are tags.

    Videos that the archive already holds are skipped. It knows them by their content; a file with the same place, size
    and time of change as before is not read, unless --rehash is given. Videos that failed in an earlier
    run are skipped too (`vidx status --failed` lists them), unless the failure may be temporary.

    \b
    vidx index ~/videos
    vidx index 'cam*/2024-05-*.mp4' cameras.csv --archive /data/archive --fps 0.5

    Exit codes: 0 success, 3 some videos of this run failed or are partial, 2 wrong usage, 5 the archive cannot be
    written, 6 Ray died or ran out of memory, 75 the cluster was lost or lacks resources, 130 interrupted.
    """
    from pipeline.cli.progress_bar import show_progress
    from pipeline.index.config import load_config
    from pipeline.index.job import IndexResult, check_machine, plan_index, run_index, sampling_of
    from pipeline.index.scan import Scan
    from storage.archive.archive import archive_exists, create_archive, open_archive
    from workers.models.bundle import find_bundle

    settings = load_config(config, options)
    if settings.address is None and not dry_run:
        check_machine(settings)
    found = Scan(sources)
    bundle = find_bundle(settings.model, settings.tower)
    if bundle.card.states_limits:
        note(limits_of(bundle))
    sampling = sampling_of(settings, bundle)
    place = archive_uri(archive_dir)
    if settings.address is not None and not found.is_empty and not dry_run:
        from pipeline.cluster.address import check_address

        check_address(settings.address)
    archive = None
    if not dry_run and (archive_exists(place) or not found.is_empty):  # for nothing, no archive is made
        tower = bundle.tower_name
        archive = create_archive(place, model_id=bundle.model_id, model_name=bundle.name, model_tower=tower)
    elif archive_exists(place):
        archive = open_archive(place)
        archive.check_model(bundle.model_id, bundle.name)
    plan = plan_index(found.videos(), archive, bundle, sampling, settings)
    _tell_left_out(found)
    if dry_run:
        _print_plan(plan, found, as_json)
        return
    result = IndexResult()
    if archive is not None:
        with show_progress() as report:
            result = run_index(plan, archive, bundle, settings, report, note)
    if as_json:
        print_json({**_result_json(result, bundle.model_id), "left_out": found.left_out})
    elif found.is_empty:
        click.echo(_nothing_in(found.without_video))
    else:
        _print_result(result, archive_dir)
    if result.cache_problem:
        note(
            f"file hashes are not kept for the next run ({result.cache_problem}); set VIDX_CACHE to a folder that can "
            "be written"
        )
    if result.sandbox_missing:
        from workers.sandbox import told

        note(
            f"the decoders were not kept from {told(result.sandbox_missing)}: the kernel or the container does not "
            "allow it; --strict-sandbox refuses to index on such a machine"
        )
    if result.index_is_behind:
        note("the search index has outgrown its training; searches find less until `vidx maintain` trains it again")
    if result.interrupted:
        note("vidx: interrupted; finished work is committed, run the same command again to continue")
        sys.exit(130)
    sys.exit(3 if result.failures else 0)


def _tell_left_out(found: Scan) -> None:
    if found.left_out:
        note(f"left out: {_left_out(found.left_out)}")
    for place, why in found.unscanned:
        note(f"{printable(place)}: {why}")
    for source in () if found.is_empty else found.without_video:
        note(f"{printable(source)}: there is no video in this folder")


def _left_out(counts: Mapping[str, int]) -> str:
    """Files that are no videos, as in `12 .jpg, 2 .txt, 1 without a suffix`; the most frequent suffix comes first."""
    from pipeline.index.scan import APPLE_DOUBLE, SHARED_SUFFIXES

    words = {"": "without a suffix", APPLE_DOUBLE: f"{APPLE_DOUBLE} (macOS metadata, no videos)"}
    words |= {suffix.decode(): f"{suffix.decode()} (no videos)" for suffix in SHARED_SUFFIXES}
    kinds = list(counts.items())
    told = [f"{count} {words.get(kind) or printable(kind)}" for kind, count in kinds[:KINDS_TOLD]]
    if others := kinds[KINDS_TOLD:]:
        told.append(f"{sum(count for _, count in others)} with {len(others)} more suffixes")
    return ", ".join(told)


def _nothing_in(sources: Sequence[str]) -> str:
    where = printable(sources[0]) if len(sources) == 1 else f"any of the {len(sources)} folders"
    return f"Nothing to index: there is no video in {where}."


def _result_json(result: IndexResult, model_id: str) -> dict[str, Any]:
    return {
        "videos_indexed": result.indexed,
        "videos_partial": result.partial,
        "videos_failed": result.failed,
        "videos_skipped": result.skipped,
        "videos_failed_before": result.failed_before,
        "videos_deleted_before": result.deleted_before,
        "videos_updated": len(result.updates),
        "frames": result.frame_count,
        "frames_resumed": result.frames_resumed,
        "frames_by_node": result.frames_by_node,
        "model_id": model_id,
        "seconds": round(result.seconds, 3),
        "decode_seconds": round(result.decode_seconds, 3),
        "encode_seconds": round(result.encode_seconds, 3),
        "store_seconds": round(result.store_seconds, 3),
        "interrupted": result.interrupted,
        "sandbox_missing": sorted(result.sandbox_missing),
        "failures": [_row_json(row) for row in result.failures],
        "notes": [_row_json(row) for row in result.notes],
        "updates": [source_json(update.after.uri) | {"changes": update.changes} for update in result.updates],
    }


def _row_json(row: VideoRow) -> dict[str, Any]:
    problem = row.known_problem
    return source_json(row.uri) | {"status": row.status, "reason": problem.reason, "detail": problem.detail}


def _print_result(result: IndexResult, archive_dir: str) -> None:
    if result.moved:
        have, places = ("has", "place") if result.moved == 1 else ("have", "places")
        click.echo(f"{counted(result.moved, 'video')} {have} moved; the archive has the new {places}")
    if result.failed_before:
        were, them = ("was", "it") if result.failed_before == 1 else ("were", "them")
        click.echo(
            f"{result.failed_before} of the skipped videos failed or {were} partial in an earlier run; `vidx status "
            f"--failed` lists {them}, --retry-failed tries {them} again"
        )
    if result.deleted_before:
        were, them = ("was", "it") if result.deleted_before == 1 else ("were", "them")
        deleted = f"{result.deleted_before} of the skipped videos {were} deleted"
        click.echo(f"{deleted}; --restore-deleted indexes {them} again")
    if result.updates:
        click.echo(f"{counted(len(result.updates), 'video')} with changed tags or capture times:")
        rows = [(_changes(update), source_text(update.after.uri)) for update in result.updates[:UPDATES_TOLD]]
        print_table(("changed", "source"), rows)
        if len(result.updates) > UPDATES_TOLD:
            click.echo(f"and {len(result.updates) - UPDATES_TOLD} more; --json lists all")
    tried = result.indexed + result.partial + result.failed
    if tried == 0 and not result.interrupted:
        all_videos = "the video" if result.skipped == 1 else f"all {result.skipped} videos"
        shows = "it" if result.skipped == 1 else "them"
        click.echo(f"Nothing to index: {archive_dir} already knows {all_videos}; `vidx status` shows {shows}.")
        return
    counts = f"{result.indexed} indexed, {result.partial} partial, {result.failed} failed, {result.skipped} skipped"
    there = f" ({result.frames_resumed:,} from an earlier run)" if result.frames_resumed else ""
    frames = f"{counted(result.frame_count, 'frame')}{there}"
    click.echo(f"{counts}; {frames} in {result.seconds:.1f} s; archive: {archive_dir}")
    if len(result.frames_by_node) > 1:
        click.echo("decoded by " + ", ".join(f"{name}: {count:,}" for name, count in result.frames_by_node.items()))
    if result.failures:
        failures = [(row, row.known_problem) for row in result.failures]
        cells = [(row.status, why.reason, source_text(row.uri), why.detail) for row, why in failures]
        print_table(("status", "reason", "source", "detail"), cells)
    for row in result.notes:
        note(f"{source_text(row.uri)}: {row.known_problem.detail}")


def _changes(update: Update) -> str:
    """What changed, as in `camera: north -> south, captured_at: 2024-05-01 12:00:00 -> none`."""

    def told(value: datetime | str | None) -> str:
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else value or "none"

    return ", ".join(f"{name}: {told(old)} -> {told(new)}" for name, (old, new) in update.changes.items())


def _print_plan(plan: IndexPlan, found: Scan, as_json: bool) -> None:
    from pipeline.index.plan import Decision

    if as_json:
        counts = {str(decision).replace(" ", "_"): plan.count(decision) for decision in Decision}
        listed = [source_json(uri) | {"plan": decision} | _why(plan, uri) for uri, decision in plan.all()]
        print_json({"dry_run": True, "counts": counts, "sources": listed, "left_out": found.left_out})
        return
    if not plan.source_count:
        click.echo(f"{_nothing_in(found.without_video)[:-1]}; nothing was changed.")
        return
    rows = [
        (decision, source_text(asset.uri), _why_line(plan, asset.uri))
        for asset, decision in plan.decisions
        if decision is not Decision.KNOWN
    ]
    if rows:
        print_table(("would be", "source", "why"), rows)
    away = plan.count(Decision.MISSING, Decision.UNREADABLE)
    of_them = f", {away} of them missing or unreadable" if away else ""
    total = counted(plan.source_count, "video")
    click.echo(f"{len(plan.todo)} of {total} would be tried{of_them}; nothing was changed")


def _why(plan: IndexPlan, uri: str) -> dict[str, Any]:
    """Why a source is planned so, and which settings, tags and times it changes of a video that the archive holds."""
    problem, update = plan.problems.get(uri), plan.updates.get(uri)
    told: dict[str, Any] = {} if problem is None else {"reason": problem.reason, "detail": problem.detail}
    if settings := plan.changed_settings(uri):
        told["settings"] = settings
    return told if update is None else {**told, "changes": update.changes}


def _why_line(plan: IndexPlan, uri: str) -> str:
    problem, update = plan.problems.get(uri), plan.updates.get(uri)
    pieces = [] if problem is None else [f"{problem.reason}: {problem.detail}"]
    pieces += [f"{name} {old} -> {new}" for name, (old, new) in plan.changed_settings(uri).items()]
    return "; ".join(pieces if update is None else [*pieces, _changes(update)])
