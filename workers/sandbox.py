"""The sandbox: a process that reads hostile files limits its memory and gives up opening files and the network.

An old kernel, a container or another operating system may not allow a step. The process then reports the step as
missing and continues, unless --strict-sandbox is given. In any case a decoder gets one open file, and no path.
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

# Name of each step -> what it prevents, for messages.
STEPS = {"memory": "taking memory without end", "network": "the network", "files": "opening files"}
TRIAL_BYTES = 2 << 30  # memory limit of the process that tries the sandbox
# These system call numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_PATH, _LANDLOCK_READ_FILE = 1, 1 << 2  # a rule about a file, and the right to read it
_LANDLOCK_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # version -> its file rights
_LANDLOCK_TCP = 0b11  # bind and connect; since version 4
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def die_with_owner(lifeline: int) -> None:
    """Makes the kernel kill this process when the other end of a pipe closes.

    PR_SET_PDEATHSIG is no replacement: it kills when the owner's *thread* ends.

    Args:
        lifeline: descriptor of this end.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)


def confine(limit_bytes: int) -> list[str]:
    """Takes all steps of the sandbox, for good.

    Args:
        limit_bytes: of memory.
    Returns:
        Names of the steps that this machine does not allow.
    """
    taken = [*(["memory"] if limit_memory(limit_bytes) else []), *leave_network_and_files()]
    return [step for step in STEPS if step not in taken]


def missing_here() -> list[str]:
    """Names of the steps that this machine does not allow; starts a process that tries them."""
    command = [sys.executable, "-P", "-m", "workers.sandbox"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    tried = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    return tried.stdout.split() if tried.returncode == 0 else list(STEPS)


def told(steps: Iterable[str]) -> str:
    """What the missing steps would have prevented, in words."""
    return " and ".join(STEPS[step] for step in STEPS if step in set(steps))


def limit_memory(limit_bytes: int) -> bool:
    """Makes allocations beyond limit_bytes fail, and turns core dumps off; False where the system refuses."""
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
    """Gives up opening files and the network, for good.

    Args:
        readable: descriptors of files that may still be opened for reading.
    Returns:
        Names of the steps that the kernel allowed: "network", "files".
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
