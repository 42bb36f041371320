"""What the decoder process gives up before it sees a hostile file: memory without end, files, the network.

Each step is the kernel's to grant; where it does not (an old kernel, a container's own rules, another system),
the process says so, and goes on without that step unless its owner is strict: no decoder is handed a path or an address
in the first place.
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence

from storage.processes import python_path

# What the process is kept from, as people read it, by the names of the steps.
STEPS = {"memory": "taking memory without end", "network": "the network", "files": "opening files"}
TRIAL_BYTES = 2 << 30  # what a trial of the sandbox is limited to
# The same numbers on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_PATH, _LANDLOCK_READ_FILE = 1, 1 << 2  # a rule about a file, and the right to read it
_LANDLOCK_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # rights that each version knows
_LANDLOCK_TCP = 0b11  # bind and connect, from version 4 on
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def die_with_owner(lifeline: int) -> None:
    """Has the kernel kill this process when the other end of the pipe closes, whatever it is busy with.

    PR_SET_PDEATHSIG would do so when the owner's *thread* ends.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)


def confine(limit_bytes: int) -> list[str]:
    """Gives up all that a decoder does not need; names the steps that could not be taken."""
    taken = [*(["memory"] if limit_memory(limit_bytes) else []), *leave_network_and_files()]
    return [step for step in STEPS if step not in taken]


def missing_here() -> list[str]:
    """The steps that could not be taken on this machine, found out by a process that tries."""
    command = [sys.executable, "-P", "-m", "workers.sandbox"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    tried = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    return tried.stdout.split() if tried.returncode == 0 else list(STEPS)


def told(steps: Iterable[str]) -> str:
    """What a process was not kept from, for people."""
    return " and ".join(STEPS[step] for step in STEPS if step in set(steps))


def limit_memory(limit_bytes: int) -> bool:
    """Allocations beyond limit_bytes fail, if the kernel grants it; no core dump is written."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    is_limited = False
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS) if sys.platform != "linux" else (resource.RLIMIT_DATA,):
        _, hard = resource.getrlimit(kind)
        wanted = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (wanted, wanted))
        is_limited = is_limited or 0 <= resource.getrlimit(kind)[0] <= limit_bytes
    return is_limited


def leave_network_and_files(readable: Sequence[int] = ()) -> list[str]:
    """From here on no file can be opened and no address reached; names the steps that the kernel took.

    Args:
        readable: descriptors of files that may be opened again, to read.
    """
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    taken = []
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        taken.append("network")
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version >= 1 and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        rights = (ctypes.c_uint64 * 2)(_LANDLOCK_FILES[min(version, 3)], _LANDLOCK_TCP if version >= 4 else 0)
        size = ctypes.c_size_t(16 if version >= 4 else 8)
        ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, rights, size, 0)
        if ruleset >= 0:
            for descriptor in readable:
                rule = struct.pack("=Qi", _LANDLOCK_READ_FILE, descriptor)
                libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH, rule, 0)
            if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0:
                taken.append("files")
            os.close(ruleset)
    return taken


if __name__ == "__main__":
    print(*confine(TRIAL_BYTES))
