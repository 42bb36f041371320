"""Processes of this machine, as the system lists them."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def start_of(pid: int) -> str | None:
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
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children(*names: str) -> list[int]:
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
