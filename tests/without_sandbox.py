"""Runs a command where the kernel grants no sandbox: `python without_sandbox.py STEPS COMMAND...`.

STEPS, with commas between, are of `network`, `files` and `memory`. A seccomp filter, which all that is started from
here inherits, answers the system calls that those need as an old kernel or a container does.
"""

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # the latter with an errno
NUMBER, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 24, 32  # in struct seccomp_data
RLIMIT_DATA = 2
UNSHARE, PRLIMIT = {"x86_64": (272, 302), "aarch64": (97, 261)}[os.uname().machine]
LANDLOCK_CREATE_RULESET = 444


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def refused(call: int, number: int) -> bytes:
    """Answers a system call with an error."""
    return instruction(EQUAL, call, 0, 1) + instruction(RETURN, REFUSE | number)


def without_memory_limit() -> bytes:
    """Answers a change of RLIMIT_DATA with EPERM; asking for it stays possible."""
    return b"".join(
        (
            instruction(EQUAL, PRLIMIT, 0, 6),
            instruction(LOAD, SECOND_ARGUMENT),
            instruction(EQUAL, RLIMIT_DATA, 0, 3),
            instruction(LOAD, THIRD_ARGUMENT),
            instruction(EQUAL, 0, 1, 0),
            instruction(RETURN, REFUSE | errno.EPERM),
            instruction(LOAD, NUMBER),
        )
    )


def main() -> None:
    steps = sys.argv[1].split(",")
    program = instruction(LOAD, NUMBER)
    program += refused(UNSHARE, errno.EPERM) if "network" in steps else b""
    program += refused(LANDLOCK_CREATE_RULESET, errno.ENOSYS) if "files" in steps else b""
    program += without_memory_limit() if "memory" in steps else b""
    program += instruction(RETURN, ALLOW)
    code = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters):
        sys.exit(f"no seccomp here: {os.strerror(ctypes.get_errno())}")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
