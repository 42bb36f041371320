"""jobs: which jobs work on an archive at this moment, and which videos each of them has taken.

    jobs/ID.job         one per job, touched while it lives
    jobs/NUMBER.claim   the id of the job that indexes this video

Both are hints that save work: what makes every row appear once are the guards of the commits. A job whose file has not
been touched for a while, or whose process is gone, is dead, and what it had taken is free.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path

from storage.files import join, local_path, make_folder, writing

BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0  # without a touch, after which a job on another machine counts as dead
_JOB, _CLAIM = ".job", ".claim"


class Job:
    """A running job; a context manager that leaves nothing behind.

    Attributes:
        id: its own, at random.
    """

    def __init__(self, archive_uri: str):
        self.id = uuid.uuid4().hex
        self._uri = join(archive_uri, "jobs")
        self._folder = _folder(archive_uri)
        self._file = self._folder / f"{self.id}{_JOB}"
        self._taken: set[int] = set()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Job":
        with writing(self._uri):
            make_folder(self._uri)
            started = _now(self._folder)
            unfinished = self._file.with_suffix(".tmp")
            unfinished.write_text(json.dumps({"started": started, **_this_process()}), encoding="utf-8")
            unfinished.rename(self._file)
        self._beating.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._beating.join()
        for number in list(self._taken):
            self.release(number)
        self._file.unlink(missing_ok=True)

    def take(self, number: int) -> bool:
        """Takes a video unless a living job has it; says whether it is this job's now."""
        claim = self._claim(number)
        mine = self._folder / f"{uuid.uuid4().hex}.tmp"
        try:
            mine.write_text(self.id, encoding="utf-8")
            if self._holder_lives(claim):
                return False
            with contextlib.suppress(FileNotFoundError):
                claim.unlink()
            os.link(mine, claim)  # fails where another was faster
        except FileExistsError:
            return False
        except OSError:
            return True  # a place without links: work may be done twice, and is committed once
        finally:
            mine.unlink(missing_ok=True)
        self._taken.add(number)
        return True

    def release(self, number: int) -> None:
        """Lets go of a video."""
        self._taken.discard(number)
        with contextlib.suppress(OSError):
            if self._claim(number).read_text(encoding="utf-8") == self.id:
                self._claim(number).unlink()

    def _claim(self, number: int) -> Path:
        return self._folder / f"{number}{_CLAIM}"

    def _holder_lives(self, claim: Path) -> bool:
        try:
            holder = claim.read_text(encoding="utf-8")
        except OSError:
            return False
        return holder != self.id and _lives(self._folder / f"{holder}{_JOB}", _now(self._folder))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def oldest_start(archive_uri: str) -> float | None:
    """When the oldest job that still lives began, in the file system's time; None where none lives.

    What dead jobs have left is removed.
    """
    folder = _folder(archive_uri)
    if not folder.is_dir():
        return None
    now = _now(folder)
    starts, living = [], set()
    for file in folder.glob(f"*{_JOB}"):
        if _lives(file, now):
            living.add(file.stem)
            with contextlib.suppress(OSError, ValueError, KeyError):
                starts.append(float(json.loads(file.read_text(encoding="utf-8"))["started"]))
        else:
            file.unlink(missing_ok=True)
    for claim in folder.glob(f"*{_CLAIM}"):
        with contextlib.suppress(OSError):
            if claim.read_text(encoding="utf-8") not in living:
                claim.unlink()
    return min(starts, default=None)


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which the files of other machines carry too."""
    probe = folder / f"{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _folder(archive_uri: str) -> Path:
    return Path(os.fsdecode(local_path(join(archive_uri, "jobs"))))


def _lives(file: Path, now: float) -> bool:
    try:
        process = json.loads(file.read_text(encoding="utf-8"))
        here = (process["host"], process["boot"]) == (socket.gethostname(), _boot_id())
        if here and process["process_started"] is not None:
            return _start_of(process["pid"]) == process["process_started"]
        return now - file.stat().st_mtime < LEASE_SECONDS
    except (OSError, ValueError, KeyError):
        return False


def _this_process() -> dict:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "process_started": _start_of(pid)}


def _boot_id() -> str:
    """Differs between machines and containers of one name, and after a restart."""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + namespace
    return ""


def _start_of(pid: int) -> str | None:
    """When a process began, so that another one with its number is not taken for it; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None
