"""`vidx verify`, `vidx repair`, `vidx clean`, `vidx compact` and `vidx maintain`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from pipeline.cli.options import archive_option, archive_uri, json_option
from pipeline.cli.print import note, print_json, print_table, show_count
from pipeline.text import counted, size
from pipeline.times import clock
from storage.files import source_text

if TYPE_CHECKING:
    from pipeline.care.check_pictures import PictureCheck
    from storage.care.clean import Cleaned
    from storage.care.compact import Compacted
    from storage.care.verify import Fault
    from storage.records import VideoRow

F = TypeVar("F", bound=Callable[..., Any])
PICTURES = "For videos that decord decoded, also compare the stored pictures with those that PyAV decodes."

_target_option = click.option(
    "--target-mib",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="MIB",
    help="Maximum size of a joined file. Larger files stay as they are.",
)


def _unused_option(name: str) -> Callable[[F], F]:
    """The option of what is cleaned, under a command's own name for it."""
    return click.option(
        name,
        type=click.FloatRange(min=0),
        default=168.0,
        show_default=True,
        metavar="HOURS",
        help="Keep younger files; a killed job continues from them.",
    )


@click.command()
@archive_option
@click.option("--pictures", is_flag=True, help=PICTURES)
@json_option
def verify(archive_dir: str, pictures: bool, as_json: bool) -> None:
    """Read a whole archive and check that it holds what was written.

    Every byte of the frames, the rows and the index is checked against the checksum of its file. The tables are
    compared with each other, and the index with the stored keys. The logs of the tables have no checksums; they are
    read, and compared with the files that they name. Each damaged file is listed, with the videos whose frames it
    holds.

    --pictures opens the videos again. Archives from before PyAV was the default decoder can hold wrong pictures;
    `vidx sql "SELECT source FROM videos WHERE decoder = 'decord'"` lists the videos in question.

    \b
    vidx verify
    vidx verify --pictures
    vidx verify --archive /data/archive --json

    Exit codes: 0 nothing is wrong, 5 something is wrong, 3 the pictures of some videos cannot be compared.
    """
    from storage.archive.archive import open_archive
    from storage.care.verify import BEYOND_REPAIR
    from storage.care.verify import verify as verify_archive

    found = verify_archive(archive_uri(archive_dir), show_count)
    checks: list[PictureCheck] = []
    if pictures and not found.faults:
        from pipeline.care.check_pictures import check_pictures

        checks = check_pictures(open_archive(archive_uri(archive_dir)), show_count)
    unchecked = [(check.row, check.problem) for check in checks if check.problem is not None]
    if pictures and found.faults:
        note("pictures were not compared: repair the damaged files first")
    if as_json:
        print_json(
            {
                "ok": not found.faults and not any(check.wrong or check.problem for check in checks),
                "files": found.files,
                "size_bytes": found.size_bytes,
                "frames": found.frames,
                "faults": [_fault_json(fault) for fault in found.faults],
                **({"pictures": [_pictures_json(check) for check in checks]} if pictures else {}),
            }
        )
    elif found.faults:
        _print_faults(found.faults)
        mendable = all(fault.is_mendable for fault in found.faults)
        advice = "`vidx repair` takes out damaged frames and indexes them again" if mendable else BEYOND_REPAIR
        click.echo(f"{counted(len(found.faults), 'fault')}; {advice}")
    else:
        files, frames = counted(found.files, "file"), counted(found.frames, "frame")
        click.echo(f"{files}, {size(found.size_bytes)}, {frames}: nothing is wrong")
    if pictures and not as_json and not found.faults:
        _print_pictures(checks)
        if any(check.wrong for check in checks):
            click.echo("`vidx repair --pictures` indexes these videos again")
    for row, problem in unchecked:
        note(f"{source_text(row.uri)}: its pictures cannot be compared: {problem.detail}")
    sys.exit(5 if found.faults or any(check.wrong for check in checks) else 3 if unchecked else 0)


@click.command()
@archive_option
@click.option("--no-index", is_flag=True, help="Take out damaged frames, and do not index them again.")
@click.option("--pictures", is_flag=True, help=PICTURES + " Videos with wrong pictures are indexed again.")
@json_option
def repair(archive_dir: str, no_index: bool, pictures: bool, as_json: bool) -> None:
    """Take damaged frames out of an archive and index their videos again.

    Undamaged frames stay as they are, and the search index is built again.

    A video whose file is gone cannot be indexed again. If its damaged files can still be read in part, they stay; run
    repair again when the video is back. Otherwise the video becomes partial, or failed if nothing of it is left, and
    `vidx index` completes it when it is back.

    \b
    vidx repair
    vidx repair --no-index --json

    Exit codes: 0 the archive is undamaged, 3 some videos could not be completed, 5 the archive cannot be repaired.
    """
    from pipeline.index.job import index_again, why_not_again
    from storage.archive.archive import open_archive
    from storage.care.repair import repair as repair_archive

    uri = archive_uri(archive_dir)
    done = repair_archive(uri) if no_index else repair_archive(uri, why_not_again)
    for line in done.notes:
        note(line)
    if not as_json:
        _print_faults(done.found.faults)
    checks: list[PictureCheck] = []
    to_index = [*done.to_index]
    if pictures and not done.left:
        from pipeline.care.check_pictures import check_pictures, drop_wrong_videos

        checks = check_pictures(open_archive(uri), show_count)
        to_index += drop_wrong_videos(open_archive(uri, write=True), checks)
        if not as_json:
            _print_pictures(checks)
    incomplete: Sequence[VideoRow] = to_index
    if to_index and not no_index:
        incomplete = index_again(open_archive(uri), to_index, lambda progress: None)
    if as_json:
        print_json(
            {
                "faults": [_fault_json(fault) for fault in done.found.faults],
                "notes": list(done.notes),
                "videos_damaged": len(to_index) + len(done.spared),
                "videos_incomplete": [row.uri for row in (*incomplete, *done.spared)],
                "problems": [_problem_json(row) for row in (*incomplete, *done.spared)],
                "rows_lost": done.rows_lost,
                "faults_left": [_fault_json(fault) for fault in done.left],
                **({"pictures": [_pictures_json(check) for check in checks]} if pictures else {}),
            }
        )
    else:
        _print_faults(done.left)
        whole = len(to_index) - len(incomplete)
        not_whole = len(incomplete) + len(done.spared) + done.rows_lost
        if not no_index:
            for row in incomplete:
                why = row.known_problem
                mend = "; when that is solved, `vidx index` completes the video" if why.reason.is_temporary else ""
                note(f"{source_text(row.uri)}: not complete: {why.reason}: {why.detail}{mend}")
        for row in done.spared:
            why = row.known_problem
            note(
                f"{source_text(row.uri)}: its damaged files stay, because it cannot be indexed again: {why.reason}: "
                f"{why.detail}; when that is solved, `vidx repair` completes the video"
            )
        faults = counted(len(done.found.faults), "fault")
        if whole or not_whole:
            click.echo(f"{faults} found; {counted(whole, 'video')} complete again, {not_whole} not complete")
        else:
            click.echo(f"{faults} found" if done.found.faults else "nothing to repair: no fault was found")
        if done.left:
            click.echo(f"the last {counted(len(done.left), 'fault')} in the list cannot be repaired")
    sys.exit(5 if done.left else 3 if incomplete or done.spared or done.rows_lost else 0)


@click.command()
@archive_option
@_unused_option("--older-than")
@json_option
def clean(archive_dir: str, older_than: float, as_json: bool) -> None:
    """Remove files that an archive does not need any more: those of killed jobs, and frames that were replaced.

    A killed job leaves committed frames that the next job of these videos uses. Choose --older-than so that they stay
    until then.

    \b
    vidx clean
    vidx clean --older-than 24
    """
    from storage.archive.archive import open_archive
    from storage.care.clean import clean as clean_archive

    cleaned = clean_archive(open_archive(archive_uri(archive_dir)), round(older_than * 3600))
    if as_json:
        print_json(_cleaned_json(cleaned))
    else:
        click.echo(_cleaned_text(cleaned))


@click.command()
@archive_option
@_target_option
@json_option
def compact(archive_dir: str, target_mib: int, as_json: bool) -> None:
    """Join the small files of each video into larger ones.

    The archive can be searched and added to meanwhile. The frames stay the same; a moment may begin or end one frame
    earlier or later. The old files stay for processes that still read them; `vidx clean` removes them when they are a
    week old. The command may be stopped at any time; the next run continues.

    \b
    vidx compact
    vidx compact --target-mib 512 --json

    Exit code 5: some files are damaged. Their videos stay as they are; `vidx repair` repairs them.
    """
    from storage.archive.archive import open_archive
    from storage.care.compact import compact as compact_archive

    done = compact_archive(open_archive(archive_uri(archive_dir), write=True), target_mib << 20, show_count)
    if as_json:
        print_json({"videos": done.videos, **_compacted_json(done)})
    elif done.parts_joined:
        click.echo(f"{done.parts_joined} files of {counted(done.videos, 'video')} joined into {done.parts_written}")
    else:
        click.echo("nothing to join")
    _end_with(done.problems)


@click.command()
@archive_option
@click.option("--expire", "expire_age", metavar="AGE", help="Delete videos that are older than this, such as 90d.")
@_target_option
@_unused_option("--clean-older-than")
@json_option
def maintain(archive_dir: str, expire_age: str | None, target_mib: int, clean_older_than: float, as_json: bool) -> None:
    """Do all that an archive needs from time to time: expire, compact, train the search index, clean.

    Run it as a scheduled job of its own, for instance once a week. Jobs may add videos meanwhile, and queries see the
    archive as it was or as it is. `vidx index` adds to the search index; above a million frames it leaves it to this
    command to train the index again as the archive grows. The command may be stopped at any time; the next run
    continues.

    \b
    vidx maintain
    vidx maintain --expire 90d --json

    Exit code 5: some files are damaged. Their videos stay as they are; `vidx repair` repairs them.
    """
    from pipeline.care.maintain import maintain as maintain_archive
    from storage.archive.archive import open_archive

    done = maintain_archive(
        open_archive(archive_uri(archive_dir), write=True),
        expire_age=expire_age,
        target_bytes=target_mib << 20,
        unused_seconds=round(clean_older_than * 3600),
        report=show_count,
    )
    expired, compacted, cleaned = done.expired, done.compacted, done.cleaned
    if as_json:
        counts = {"videos_expired": len(expired), "index_frames": done.index_frames}
        print_json({**counts, **_cleaned_json(cleaned), **_compacted_json(compacted)})
    else:
        if expire_age is not None:
            click.echo(f"{counted(len(expired), 'video')} expired")
        click.echo(f"{counted(compacted.parts_joined, 'file')} joined into {compacted.parts_written}")
        click.echo(f"the search index finds {counted(done.index_frames, 'frame')}")
        click.echo(_cleaned_text(cleaned))
    _end_with(compacted.problems)


def _end_with(problems: Sequence[str]) -> NoReturn:
    for problem in problems:
        note(problem)
    sys.exit(5 if problems else 0)


def _compacted_json(done: Compacted) -> dict:
    counts = {"files_joined": done.parts_joined, "files_written": done.parts_written}
    return {**counts, "problems": list(done.problems)}


def _cleaned_json(done: Cleaned) -> dict:
    return {"files_removed": done.files, "frames_removed": done.frames}


def _cleaned_text(done: Cleaned) -> str:
    return f"{counted(done.files, 'file')} and {counted(done.frames, 'frame')} removed"


def _problem_json(row: VideoRow) -> dict:
    problem = row.known_problem
    return {"source": source_text(row.uri), "reason": str(problem.reason), "detail": problem.detail}


def _fault_json(fault: Fault) -> dict:
    return {"path": fault.path, "detail": fault.detail, "sources": list(fault.sources)}


def _pictures_json(check: PictureCheck) -> dict:
    return {
        "source": source_text(check.row.uri),
        "checked": check.checked,
        "wrong": check.wrong,
        "first_wrong_seconds": check.first_wrong_seconds,
        "problem": None if check.problem is None else check.problem.detail,
    }


def _print_pictures(checks: Sequence[PictureCheck]) -> None:
    rows = [
        (source_text(check.row.uri), f"{check.wrong} of {check.checked}", clock(check.first_wrong_seconds))
        for check in checks
        if check.first_wrong_seconds is not None
    ]
    if rows:
        print_table(("video", "wrong pictures", "from"), rows, right=("wrong pictures", "from"))
    elif checks:
        frames = counted(sum(check.checked for check in checks), "picture")
        click.echo(f"{frames} of {counted(len(checks), 'video')} that decord decoded: all are right")
    else:
        click.echo("no picture was compared: decord decoded no video of this archive")


def _print_faults(faults: Sequence[Fault]) -> None:
    if faults:
        rows = [(fault.path, fault.detail, ", ".join(fault.sources)) for fault in faults]
        print_table(("file", "fault", "frames of"), rows)
