"""Processes of this machine, their memory and their cores."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
_PR_SET_CHILD_SUBREAPER = 36
_CGROUP = Path("/sys/fs/cgroup")  # where Linux shows the limits of a container


def python_path() -> str:
    """A PYTHONPATH with which `python -P -m` finds vidx's modules from any folder, and no file of that folder."""
    return os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def process_start(pid: int) -> str | None:
    """The start time of a process, which tells it from a later one with the same id; None if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]  # a zombie has ended


def adopt_orphans() -> None:
    """Makes this process the parent of orphans among its descendants; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children() -> None:
    """Kills the children of this process; after adopt_orphans also all their descendants."""
    while pids := child_pids():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def child_pids(*names: str) -> list[int]:
    """The ids of this process's children, of any name or with one of these; empty if there is no /proc."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for pid in task.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
                    if not names or name in names:
                        found.append(int(pid))
    return found


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """How many cores this process may use, by its affinity and by the limit of its container; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of cgroup version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = map(int, " ".join((cgroup / name).read_text("ascii") for name in names).split())
            if quota > 0:
                cores = max(1, min(cores, quota // period))
    return cores


def usable_memory(cgroup: Path = _CGROUP) -> int:
    """The memory of this machine or the limit of its container, in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int((cgroup / name).read_text("ascii")))
    return memory


def anonymous_bytes() -> int:
    """The memory of this process without mapped files, in bytes; 0 if there is no /proc."""
    return _status_bytes("RssAnon")


@contextlib.contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Limits this process, for a while, to so many bytes more than it has now; on Linux only.

    An allocation beyond the limit fails at once. Without a limit, the system would kill a process when memory runs out.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    wanted = _status_bytes("VmData") + more_bytes
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (before, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _status_bytes(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0
