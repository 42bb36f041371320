"""`vidx index`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    archive_option,
    archive_uri,
    complete_files,
    complete_folders,
    json_option,
    model_options,
)

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
@click.option(
    "--model",
    metavar="NAME|DIR|HUB-ID",
    default=None,
    shell_complete=complete_folders,
    help="A built-in name, a directory or a hub id; see `vidx models`.",
)
@click.option(
    "--tower",
    metavar="ID|DIR",
    default=None,
    shell_complete=complete_folders,
    help="The CLIP to take instead of the one that the model names.",
)
@click.option(
    "--sample",
    type=click.Choice(["rate", "keyframes", "scenes"]),
    default=None,
    help="Frames to index: --fps a second, or at most so many of keyframes or of the first frames of scenes; rate.",
)
@click.option("--fps", metavar="N", default=None, help="Frames per second to index, e.g. 1, 0.5 or 30000/1001; 1.")
@click.option(
    "--patches",
    type=int,
    metavar="N",
    default=None,
    help="Patch rows stored per picture, 0 for none; 1/9 of the model's.",
)
@click.option(
    "--address",
    metavar="ADDRESS",
    default=None,
    help="A running Ray cluster; without it one is started on this machine.",
)
@click.option("--workers", type=int, metavar="N", default=None, help="Model copies; one per GPU, or one per 8 cores.")
@model_options
@click.option("--batch", type=int, metavar="N", default=None, help="Frames per forward pass; 32.")
@click.option("--max-pixels", type=int, metavar="N", default=None, help="Refuse videos with larger frames; 100000000.")
@click.option(
    "--decoder",
    type=click.Choice(["pyav", "decord"]),
    default=None,
    help="Library that decodes. decord reads short MP4 and Matroska files whole, PyAV the others; pyav.",
)
@click.option(
    "--thumbnails/--no-thumbnails", default=None, help="Keep a small JPEG of each frame, 160 pixels wide; it does."
)
@click.option(
    "--config",
    metavar="FILE",
    default=None,
    shell_complete=complete_files,
    help="A preset (embedded, one_gpu, cluster) or a TOML file; options win over it.",
)
@click.option("--retry-failed", is_flag=True, default=None, help="Try again what failed or is partial.")
@click.option("--restore-deleted", is_flag=True, default=None, help="Index again what `vidx delete` has taken out.")
@click.option(
    "--strict-sandbox",
    is_flag=True,
    default=None,
    help="Refuse to index where decoders cannot be kept from files, the network and taking memory without end.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done with each source, and change nothing.")
@json_option
def index(
    sources: tuple[str, ...], archive_dir: str, config: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Index videos into an archive.

    SOURCE is a video, a folder (searched recursively), a glob, or a manifest: CSV with a header or JSONL, with the
    column `source`, optionally `captured_at` (ISO 8601), and every other column a tag. What the archive already
    holds is recognised by content and skipped; so is what failed in an earlier run (`vidx status --failed` lists it),
    but for failures that lay with the machine or the moment.

    \b
    vidx index ~/videos
    vidx index 'cam*/2024-05-*.mp4' cameras.csv --archive /data/archive --fps 0.5

    Exit codes: 0 well, 3 some of the videos tried failed or are partial, 2 wrong usage, 5 the archive cannot be
    written, 6 Ray died, does not answer or ran out of memory, 130 interrupted.
    """
    from pipeline.cli.models import limits_of
    from pipeline.cli.print import note, print_json
    from pipeline.cli.progress_bar import show_progress
    from pipeline.index.config import load_config
    from pipeline.index.job import check_machine, plan_index, run_index, sampling_of
    from pipeline.index.scan import scan
    from pipeline.results.text import printable
    from storage.archive.archive import archive_exists, create_archive, open_archive
    from workers.models.bundle import find_bundle

    settings = load_config(config, options)
    if settings.address is None and not dry_run:
        check_machine(settings)
    found = scan(sources)
    if found.left_out:
        note(f"left out: {_left_out(found.left_out)}")
    for place, why in found.unscanned:
        note(f"{printable(place)}: {why}")
    for source in found.without_video if found.assets else ():
        note(f"{printable(source)}: no video in this folder")
    bundle = find_bundle(settings.model, settings.tower)
    if bundle.card.states_limits:
        note(limits_of(bundle))
    sampling = sampling_of(settings, bundle)
    place = archive_uri(archive_dir)
    if dry_run:
        archive = open_archive(place) if archive_exists(place) else None
        if archive is not None:
            archive.check_model(bundle.model_id, bundle.name)
        _print_plan(plan_index(found.assets, archive, bundle, sampling, settings), found, as_json)
        return
    if settings.address is not None and found.assets:
        from pipeline.cluster.address import check_address

        check_address(settings.address)
    archive = create_archive(place, model_id=bundle.model_id, model_name=bundle.name, model_tower=bundle.tower_name)
    with show_progress() as report:
        result = run_index(found.assets, archive, bundle, sampling, settings, report)
    if as_json:
        print_json({**_result_json(result, bundle.model_id), "left_out": found.left_out})
    elif not found.assets:
        click.echo(_nothing_in(found.without_video))
    else:
        _print_result(result, archive_dir)
    if result.cache_problem:
        note(f"hashes of files are not remembered ({result.cache_problem}); VIDX_CACHE names another folder for them")
    if result.sandbox_missing:
        from workers.sandbox import told

        note(
            f"the decoders were not kept from {told(result.sandbox_missing)}: a kernel or container does not allow it; "
            "--strict-sandbox refuses to index there"
        )
    if result.interrupted:
        note("vidx: interrupted; what was finished is committed, run the same command again to go on")
        sys.exit(130)
    sys.exit(3 if result.failures else 0)


def _left_out(counts: Mapping[str, int]) -> str:
    """As `12 .jpg, 2 .txt, 1 without a suffix`, the most frequent first."""
    from pipeline.index.scan import APPLE_DOUBLE, SHARED_SUFFIXES
    from pipeline.results.text import printable

    words = {"": "without a suffix", APPLE_DOUBLE: f"{APPLE_DOUBLE} (of macOS, no videos)"}
    words |= {suffix.decode(): f"{suffix.decode()} (no videos)" for suffix in SHARED_SUFFIXES}
    kinds = list(counts.items())
    told = [f"{count} {words.get(kind) or printable(kind)}" for kind, count in kinds[:KINDS_TOLD]]
    others = kinds[KINDS_TOLD:]
    rest = [f"{sum(count for _, count in others)} with {len(others)} more suffixes"] if others else []
    return ", ".join(told + rest)


def _nothing_in(sources: Sequence[str]) -> str:
    from pipeline.results.text import printable

    where = printable(sources[0]) if len(sources) == 1 else f"any of the {len(sources)} folders"
    return f"Nothing to index: there is no video in {where}."


def _result_json(result: IndexResult, model_id: str) -> dict[str, Any]:
    from storage.files import source_text

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
        "model_id": model_id,
        "seconds": round(result.seconds, 3),
        "decode_seconds": round(result.decode_seconds, 3),
        "encode_seconds": round(result.encode_seconds, 3),
        "store_seconds": round(result.store_seconds, 3),
        "interrupted": result.interrupted,
        "sandbox_missing": sorted(result.sandbox_missing),
        "failures": [_row_json(row) for row in result.failures],
        "notes": [_row_json(row) for row in result.notes],
        "updates": [
            {"source": source_text(update.after.uri), "source_uri": update.after.uri, "changes": update.changes}
            for update in result.updates
        ],
    }


def _row_json(row: VideoRow) -> dict[str, Any]:
    from storage.files import source_text

    return {
        "source": source_text(row.uri),
        "source_uri": row.uri,
        "status": row.status,
        "reason": row.known_problem.reason,
        "detail": row.known_problem.detail,
    }


def _print_result(result: IndexResult, archive_dir: str) -> None:
    from pipeline.cli.print import note, print_table
    from pipeline.results.text import counted
    from storage.files import source_text

    if result.failed_before:
        click.echo(
            f"{result.failed_before} of the skipped failed or are partial since an earlier run; `vidx status --failed` "
            "lists them, --retry-failed tries them again"
        )
    if result.deleted_before:
        click.echo(f"{result.deleted_before} of the skipped were deleted; --restore-deleted indexes them again")
    if result.updates:
        click.echo(f"other tags or capture times than before: {counted(len(result.updates), 'video')}")
        rows = [(_changes(update), source_text(update.after.uri)) for update in result.updates[:UPDATES_TOLD]]
        print_table(("changed", "source"), rows)
        if len(result.updates) > UPDATES_TOLD:
            click.echo(f"and {len(result.updates) - UPDATES_TOLD} more; --json tells all")
    tried = result.indexed + result.partial + result.failed
    if tried == 0 and not result.interrupted:
        all_of_them = counted(result.skipped, "video")
        click.echo(f"Nothing to index: {archive_dir} knows all of the {all_of_them}; `vidx status` shows it.")
        return
    counts = f"{result.indexed} indexed, {result.partial} partial, {result.failed} failed, {result.skipped} skipped"
    there = f" ({result.frames_resumed:,} were there already)" if result.frames_resumed else ""
    frames = f"{counted(result.frame_count, 'frame')}{there}"
    click.echo(f"{counts}; {frames} in {result.seconds:.1f} s; archive: {archive_dir}")
    if result.failures:
        failures = [(row, row.known_problem) for row in result.failures]
        cells = [(row.status, why.reason, source_text(row.uri), why.detail) for row, why in failures]
        print_table(("status", "reason", "source", "detail"), cells)
    for row in result.notes:
        note(f"{source_text(row.uri)}: {row.known_problem.detail}")


def _changes(update: Update) -> str:
    """As `camera: north -> south, captured_at: 2024-05-01 12:00 -> 2024-05-01 10:00`."""
    return ", ".join(f"{name}: {_told(old)} -> {_told(new)}" for name, (old, new) in update.changes.items())


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _print_plan(plan: IndexPlan, found: Scan, as_json: bool) -> None:
    from pipeline.cli.print import print_json, print_table
    from pipeline.index.plan import Decision
    from pipeline.results.text import counted
    from storage.files import source_text

    if as_json:
        counts = {str(decision).replace(" ", "_"): plan.count(decision) for decision in Decision}
        listed = [
            {"source": source_text(asset.uri), "source_uri": asset.uri, "plan": decision, **_why(plan, asset.uri)}
            for asset, decision in plan.decisions
        ]
        print_json({"dry_run": True, "counts": counts, "sources": listed, "left_out": found.left_out})
        return
    if not plan.decisions:
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
    total = counted(len(plan.decisions), "video")
    click.echo(f"{len(plan.todo)} of {total} would be tried{of_them}; nothing was changed")


def _why(plan: IndexPlan, uri: str) -> dict[str, Any]:
    """What is wrong with a source or failed before, and what it says differently of a video that the archive holds."""
    problem, update = plan.problems.get(uri), plan.updates.get(uri)
    told = {} if problem is None else {"reason": problem.reason, "detail": problem.detail}
    return told if update is None else {**told, "changes": update.changes}


def _why_line(plan: IndexPlan, uri: str) -> str:
    problem, update = plan.problems.get(uri), plan.updates.get(uri)
    pieces = [] if problem is None else [f"{problem.reason}: {problem.detail}"]
    return "; ".join(pieces if update is None else [*pieces, _changes(update)])
