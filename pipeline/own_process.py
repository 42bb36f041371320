"""Runs a command in a process of its own, since Ray's C++ code may end the one that uses it at any moment.

Where a raylet dies while a driver connects to it, Ray ends the driver from C++ with the code 1 and without a word that
a user understands; no handler of Python's runs. The process that stays behind knows what to say.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys

from pipeline.ray_watch import RAY_DIED, end_at_once
from storage.processes import adopt_orphans, kill_children
from workers.sandbox import die_with_owner

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT)


def continue_in_own_process() -> None:
    """Forks, to be called before anything starts threads; what follows the call happens in the new process.

    The old one waits, passes on the signals that it gets, and ends with the exit code of the new one; where that did
    not end by itself, with a word about it and the exit code of a ClusterError. What the new one leaves behind, as
    Ray's agents for a minute where their raylet was killed, is ended then. The new one dies with the old one. It is a
    process group of its own, so that Ctrl-C reaches it once.
    """
    if sys.platform != "linux":
        return
    adopt_orphans()
    here, there = socket.socketpair()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is somebody to pass them on
    pid = os.fork()
    if pid == 0:
        here.close()
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # may write to a terminal that is set to stop other groups
        die_with_owner(there.fileno())
        atexit.register(there.send, b".")
        return
    there.close()
    for number in _PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda got, _: _pass_on(got, pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _, status = os.waitpid(pid, 0)
    kill_children()
    code = os.waitstatus_to_exitcode(status)
    if code == 1 and not here.recv(1):
        end_at_once(RAY_DIED)
    if code < 0:
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        killer = signal.Signals(-code).name
        end_at_once(f"{killer} ended the job{why}; what was committed stays, run the same command again to go on")
    os._exit(code)


def _pass_on(number: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)
    if number == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGSTOP)
