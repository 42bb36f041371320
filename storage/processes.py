"""Processes of this machine, as the system lists them."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
_PR_SET_CHILD_SUBREAPER = 36


def python_path() -> str:
    """PYTHONPATH with which `python -P -m` finds this program's modules from any folder, and no folder's own av.py."""
    return os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def process_start(pid: int) -> str | None:
    """When a process began, so that another one with its number is not taken for it; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]  # a zombie waits for its parent to look


def adopt_orphans() -> None:
    """From now on this process is the parent of what its descendants leave behind, where the system can do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children() -> None:
    """Kills the processes that this one started, or has adopted; those that they leave behind too, where it adopts."""
    while pids := child_pids():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def child_pids(*names: str) -> list[int]:
    """Child processes of this one, of any name or with one of these; none where the system does not list them."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for pid in task.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
                    if not names or name in names:
                        found.append(int(pid))
    return found


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def anonymous_bytes() -> int:
    """Memory that this process has besides mapped files; 0 where the system does not say."""
    return _status_bytes("RssAnon")


def limit_memory(more_bytes: int) -> None:
    """From now on this process gets no more than so many bytes besides what it has; Linux alone knows such a limit.

    Whatever asks for more is refused at once, instead of the system ending a process when the machine has none left.
    """
    if sys.platform != "linux":
        return
    import resource

    wanted = _status_bytes("VmData") + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or wanted < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _status_bytes(name: str) -> int:
    """A line of what the system says of this process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0
