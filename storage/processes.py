"""Processes of this machine, as the system lists them."""

import contextlib
from pathlib import Path


def start_of(pid: int) -> str | None:
    """When a process began, so that another one with its number is not taken for it; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]  # a zombie waits for its parent to look


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
