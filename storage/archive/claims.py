"""claims: which jobs work on an archive at this moment, and which videos each of them has taken.

    jobs/ID.job         one per job; the job touches it as long as it lives
    jobs/NUMBER.claim   the id of the job that indexes this video

An interrupted job leaves its claim of a video if it has committed frames of the video and no row shows them yet.

Both files are hints that save work; the guards of the commits make sure that every row appears once. What a job has
taken is free as soon as its process has ended, or its file has not been touched for LEASE_SECONDS. Its uncommitted
files are kept for longer, because a job that was suspended may continue.
"""

import contextlib
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from storage.checks import INT32, JOB_ID, check_integer, check_number, check_text, get_value, parse_json, read_small
from storage.files import NO_LINKS, file_path, join, make_folder, to_uri, write_errors
from storage.processes import process_start

BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0  # after so long without a touch, what a job has taken is free
GONE_SECONDS = 3600.0  # after so long without a touch, a job on another machine counts as ended, with all its files
_JOB, _CLAIM = ".job", ".claim"
_NUMBER = re.compile(r"[0-9]{1,10}")
MOST_BYTES = 1 << 16  # of one of these files


class Job:
    """A running job; a context manager. At its end, only claims of videos with committed frames stay.

    Attributes:
        id: the job's own, at random.
        uri: of its file, which whoever sees this archive can see.
    """

    def __init__(self, archive_uri: str):
        self.id = uuid.uuid4().hex
        self._uri = join(archive_uri, "jobs")
        self._folder = _folder(archive_uri)
        self._file = self._folder / f"{self.id}{_JOB}"
        self.uri = join(self._uri, self._file.name)
        self._taken: set[int] = set()
        self._begun: set[int] = set()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Job":
        with write_errors(self._uri):
            make_folder(self._uri)
            process = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}
            started = {"started": _now(self._folder), "process_started": process_start(os.getpid())}
            self._text = json.dumps(started | process)
            self._write()
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beating.join()
        for number in self._taken - self._begun:
            self.release(number)
        _remove(self._file)  # if the place cannot be written any more, the user has been told already

    def take(self, number: int, lease_seconds: float = LEASE_SECONDS) -> bool:
        """Takes a video, unless a living job has it; returns whether the video is this job's now.

        Args:
            number: the video's number.
            lease_seconds: a job that has not touched its file for so long has lost what it took.
        Raises:
            ArchiveError: the place cannot be written.
        """
        claim = self._claim(number)
        mine = self._folder / f"{uuid.uuid4().hex}.tmp"
        with write_errors(self._uri):
            try:
                mine.write_text(self.id, encoding="utf-8")
                if not self._set_aside(claim, lease_seconds):
                    return False
                os.link(mine, claim)  # fails if another job was faster
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return True  # work may be done twice, but it is committed once
            finally:
                mine.unlink(missing_ok=True)
        self._taken.add(number)
        return True

    def _set_aside(self, claim: Path, lease_seconds: float) -> bool:
        """Removes a claim unless it is a living job's; returns whether there is no claim now."""
        try:
            holder = _holder(claim)
        except FileNotFoundError:
            return True
        if holder not in (None, self.id):
            file = self._folder / f"{holder}{_JOB}"
            if _works(file, _now(self._folder), lease_seconds):
                return False
        aside = self._folder / f"{uuid.uuid4().hex}.tmp"
        try:
            claim.rename(aside)
        except FileNotFoundError:
            return True
        try:
            if _holder(aside) == holder:
                return True
            with contextlib.suppress(FileExistsError):
                os.link(aside, claim)  # it was a new claim: another job was faster
            return False
        finally:
            _remove(aside)

    def is_taken(self, number: int) -> bool:
        """Whether another living job has taken a video."""
        try:
            holder = _holder(self._claim(number))
        except OSError:
            return False
        if holder in (None, self.id):
            return False
        return _works(self._folder / f"{holder}{_JOB}", _now(self._folder), LEASE_SECONDS)

    def is_alone(self) -> bool:
        """Whether no other job exists."""
        now = _now(self._folder)
        return not any(_exists(file, now) for file in self._folder.glob(f"*{_JOB}") if file != self._file)

    def holds(self, number: int) -> bool:
        """Whether no other job can take a video; always False on a file system without hard links."""
        return number in self._taken

    def begin(self, number: int) -> None:
        """Keeps the claim of a video until it is released, even if this job ends: frames of it are committed."""
        self._begun.add(number)

    def release(self, number: int) -> None:
        """Gives up the claim of a video."""
        self._taken.discard(number)
        self._begun.discard(number)
        with contextlib.suppress(OSError):
            if _holder(self._claim(number)) == self.id:
                self._claim(number).unlink()

    def _claim(self, number: int) -> Path:
        return self._folder / f"{number}{_CLAIM}"

    def _write(self) -> None:
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(self._text, encoding="utf-8")
        unfinished.rename(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._file.exists():
                    os.utime(self._file)
                else:  # another job has removed it, as of a job that has ended
                    self._write()


def claimed_numbers(archive_uri: str) -> set[int]:
    """The numbers of videos that a job has taken and not released, whether the job lives or was interrupted."""
    claims = (file.stem for file in _folder(archive_uri).glob(f"*{_CLAIM}"))
    return {int(number) for number in claims if _NUMBER.fullmatch(number)}


def remove_ended_jobs(
    archive_uri: str, unpublished: Callable[[Collection[int]], Collection[int]] = lambda numbers: ()
) -> float | None:
    """Removes the files of jobs that have ended, and gives when the oldest of the others began; None if there is none.

    Args:
        archive_uri: the archive's.
        unpublished: gives those of some video numbers whose frames no row shows at present; their claims stay.
    Returns:
        Seconds by the clock of the file system.
    """
    folder = _folder(archive_uri)
    if not folder.is_dir():
        return None
    now = _now(folder)
    starts, living = [], set()
    for file in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if now - file.lstat().st_mtime > GONE_SECONDS:
                file.unlink()
    for file in folder.glob(f"*{_JOB}"):
        if _exists(file, now):
            living.add(file.stem)
            with contextlib.suppress(OSError, ValueError):
                starts.append(check_number("started", get_value(_content(file), "started"), 0))
        else:
            _remove(file)
    holders = {}
    for claim in folder.glob(f"*{_CLAIM}"):
        with contextlib.suppress(OSError):
            holders[claim] = _holder(claim)
    stale = {claim: holder for claim, holder in holders.items() if holder not in living}
    numbers = {int(claim.stem) for claim in stale if _NUMBER.fullmatch(claim.stem)}
    kept = {str(number) for number in unpublished(numbers)} if stale else set()
    for claim, holder in stale.items():
        with contextlib.suppress(OSError):
            if claim.stem not in kept and _holder(claim) == holder:  # no other job has taken it meanwhile
                claim.unlink()
    return min(starts, default=None)


def _content(file: Path) -> Any:
    """The content of a job's file.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is not a job's file.
    """
    return parse_json(read_small(to_uri(os.fsencode(file)), MOST_BYTES))


def _holder(claim: Path) -> str | None:
    """The id of the job that made a claim; None if no job can have made it.

    Raises:
        OSError: it is missing or cannot be read.
    """
    try:
        holder = read_small(to_uri(os.fsencode(claim)), MOST_BYTES).decode("ascii")
    except ValueError:
        return None
    return holder if JOB_ID.fullmatch(holder) else None


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # it is missing, or a folder, which no job makes
        file.unlink()


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which other machines' files show too."""
    probe = folder / f"{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _folder(archive_uri: str) -> Path:
    return Path(os.fsdecode(file_path(join(archive_uri, "jobs"))))


def _works(file: Path, now: float, lease_seconds: float) -> bool:
    """Whether a job still holds what it has taken."""
    try:
        return _exists(file, now) and now - file.stat().st_mtime < lease_seconds
    except OSError:
        return False


def _exists(file: Path, now: float) -> bool:
    """Whether a job may still commit what it has written, even if it is suspended at present."""
    try:
        process = _content(file)
        check_text("host", get_value(process, "host"))
        started = get_value(process, "process_started")
        here = (process["host"], get_value(process, "boot")) == (socket.gethostname(), _boot_id())
        if here and started is not None:
            return process_start(check_integer("pid", get_value(process, "pid"), 1, INT32)) == started
        return now - file.lstat().st_mtime < GONE_SECONDS
    except (OSError, ValueError):
        return False


def _boot_id() -> str:
    """An id that differs between machines and containers with the same name, and after a restart."""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + namespace
    return ""
