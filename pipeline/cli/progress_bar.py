"""The progress of an index job: a bar and the current files on a terminal, progress lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.cli.print import note
from pipeline.index.progress import FileAtWork, Progress, Report
from pipeline.text import printable
from pipeline.times import clock_seconds
from storage.files import source_text

if TYPE_CHECKING:
    from rich.console import RenderableType

FILES_SHOWN = 6
VIDEO_LINE_SECONDS = 5.0  # between two lines if videos ended in between
LINE_SECONDS = 30.0  # between two lines otherwise


@contextmanager
def show_progress() -> Iterator[Report]:
    """A callback for the job that shows its progress on standard error."""
    if not sys.stderr.isatty():
        yield _LineProgress()
        return
    from rich.console import Console
    from rich.live import Live

    start = time.monotonic()
    with Live("starting workers", console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
        yield lambda progress: live.update(_drawn(progress, time.monotonic() - start))


def _drawn(progress: Progress, seconds: float) -> "RenderableType":
    """A bar, the counts below it, and one line per file."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    total, done = progress.total_seconds, progress.done_seconds
    bar = Table.grid(padding=(0, 1))
    bar.add_row(_videos(progress), ProgressBar(total, done, width=40, pulse=not total))
    files = Table.grid(padding=(0, 1))
    files.add_column(no_wrap=True, overflow="ellipsis")
    files.add_column(no_wrap=True)
    for file in progress.files[:FILES_SHOWN]:
        files.add_row(Text(_name(file)), Text(_position(file)))
    if len(progress.files) > FILES_SHOWN:
        files.add_row(Text(f"and {len(progress.files) - FILES_SHOWN} more"), Text(""))
    return Group(bar, Text(", ".join(_counts(progress, seconds))), files)


class _LineProgress:
    """Prints a line when videos have ended, and from time to time during long videos."""

    def __init__(self):
        self._start = self._last = time.monotonic()
        self._videos_done, self._done = -1, (0, 0.0)

    def __call__(self, progress: Progress) -> None:
        now, done = time.monotonic(), (progress.frames_done, progress.done_seconds)
        passed = now - self._last
        if progress.videos_done != self._videos_done:
            is_due = passed >= VIDEO_LINE_SECONDS or progress.videos_done == progress.video_count
        else:
            is_due = passed >= LINE_SECONDS and done != self._done
        if not is_due and self._videos_done >= 0:
            return
        self._last, self._videos_done, self._done = now, progress.videos_done, done
        files = [f"{_name(file)} {_position(file)}" for file in progress.files[:FILES_SHOWN]]
        if len(progress.files) > FILES_SHOWN:
            files.append(f"and {len(progress.files) - FILES_SHOWN} more")
        at_work = f"; {', '.join(files)}" if files else ""
        note(f"{', '.join((_videos(progress), *_counts(progress, now - self._start)))}{at_work}")


def _videos(progress: Progress) -> str:
    return f"{progress.videos_done}/{progress.video_count} videos"


def _counts(progress: Progress, seconds: float) -> Iterator[str]:
    """How much is done, how fast, and how long the rest takes; `seconds` is the time since the job began."""
    if progress.total_seconds:
        yield _of(progress.done_seconds, progress.total_seconds)
    frames = progress.frames_done + progress.frames_at_work
    yield f"{frames} frames"
    yield f"{frames / max(seconds, 1e-9):.1f} frames/s"
    if progress.frames_resumed:
        yield f"{progress.frames_resumed:,} frames from an earlier run"
    if progress.seconds_left is not None and progress.videos_done < progress.video_count:
        yield f"{clock_seconds(progress.seconds_left)} left"


def _name(file: FileAtWork) -> str:
    return printable(os.path.basename(source_text(file.uri)))


def _position(file: FileAtWork) -> str:
    if file.done_seconds is None:
        return "reading"
    if file.length_seconds is None:
        return clock_seconds(file.done_seconds)
    return _of(file.done_seconds, max(file.done_seconds, file.length_seconds))


def _of(done: float, total: float) -> str:
    return f"{clock_seconds(done)} of {clock_seconds(total)}"
