"""Supervision of Ray: a command in a separate process, and a watch over its cluster.

When a cluster is gone, calls into Ray block, or end the process from C++ without a useful message; Python's handlers do
not run. The watch notices this, and the process that waits for the command prints a message.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from storage.errors import ClusterError, UnavailableError
from storage.processes import adopt_orphans, child_pids, kill_children, process_start
from workers.sandbox import die_with_owner

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT)
RAY_NAMES = ("raylet", "gcs_server")
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 2.0  # timeout of a connection to a joined cluster
SILENT_SECONDS = 15.0  # a joined cluster is dead if it accepts no connection for so long; its head may be restarting
GRACE_SECONDS = 30.0  # after the death of a cluster, for the end of a commit; Ray ends the process after 60

INTERRUPTED = 130  # exit code
GO_ON = "committed work stays, run the same command again to continue"
RAY_DIED = "Ray's own processes died (out of memory?)"


class RayWatch:
    """Notices when a cluster dies, and ends this process if it does not end by itself.

    If this process still runs GRACE_SECONDS after the death, a call into Ray blocks it. The watch then ends it with a
    message and the exit code of a ClusterError.

    Attributes:
        word: the message.
        advice: what the user can do then.
        has_died: whether the cluster was dead at the last look, at most LOOK_SECONDS ago; `is_dead` looks now.
    """

    def __init__(
        self,
        is_dead: Callable[[], bool],
        word: str,
        silent_seconds: float = 0.0,
        advice: str = GO_ON,
        kind: type[ClusterError] = ClusterError,
    ) -> None:
        """Starts the watch; the cluster counts as dead when it has looked dead for silent_seconds."""
        self.is_dead = is_dead
        self.word = word
        self.advice = advice
        self.kind = kind
        self.has_died = False
        self._silent_seconds = silent_seconds
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def is_gone(self) -> bool:
        """Whether the cluster is dead; waits until that is certain."""
        end = time.monotonic() + self._silent_seconds
        while self.is_dead():
            if self.has_died or time.monotonic() >= end:
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def error(self, detail: str = "") -> ClusterError:
        """The error about the death of the cluster."""
        return self.kind(f"{self.word}{detail and f': {detail}'}; {self.advice}")

    def stop(self) -> None:
        """Stops the watch."""
        self._over.set()

    def _watch(self) -> None:
        alive = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            if not (is_silent := self.is_dead()):
                alive = time.monotonic()
            self.has_died = is_silent and time.monotonic() - alive >= self._silent_seconds
            if self.has_died and not self._over.wait(GRACE_SECONDS):
                end_at_once(str(self.error()), self.kind.exit_code)


def watch_own_ray() -> RayWatch:
    """A watch over the cluster that this process starts next."""
    others = set(child_pids(*RAY_NAMES))  # of an earlier cluster
    seen: dict[int, str | None] = {}  # start times by process id

    def is_dead() -> bool:
        for pid in set(child_pids(*RAY_NAMES)) - others:
            seen.setdefault(pid, process_start(pid))
        return any(start is None or process_start(pid) != start for pid, start in [*seen.items()])

    return RayWatch(is_dead, RAY_DIED)


def watch_joined_ray(name: str, address: str, advice: str = GO_ON) -> RayWatch:
    """A watch over a running cluster; `name` is the address that the user gave, `address` is HOST:PORT."""
    host, _, port = address.rpartition(":")

    def is_dead() -> bool:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except OSError:
            return True
        return False

    return RayWatch(
        is_dead, f"the cluster at {name} does not answer any more", SILENT_SECONDS, advice, UnavailableError
    )


def end_at_once(word: str, exit_code: int = ClusterError.exit_code) -> NoReturn:
    """Prints a message and ends this process and its children at once."""
    sys.stderr.write(f"vidx: {word}\n")
    sys.stderr.flush()
    kill_children()
    os._exit(exit_code)


def continue_in_own_process() -> None:
    """Forks; the caller continues in the new process. Call this before any thread is started.

    The old process waits, passes on signals, and ends with the exit code of the new one. If the new process was killed,
    the old one prints a message and ends with the exit code of a ClusterError. It also ends processes that are left,
    such as Ray's agents. If the old process dies, the new one dies too. The new one has its own process group, so that
    Ctrl-C reaches it once.
    """
    if sys.platform != "linux":
        return
    adopt_orphans()
    here, there = socket.socketpair()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until the handlers below are installed
    pid = os.fork()
    if pid == 0:
        here.close()
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a terminal can stop other groups that write
        die_with_owner(there.fileno())
        atexit.register(there.send, b".")
        return
    there.close()
    passed_on: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed_on.append(number)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    for number in _PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _, status = os.waitpid(pid, 0)
    kill_children()
    code = os.waitstatus_to_exitcode(status)
    if code == 1 and not here.recv(1):
        end_at_once(f"{RAY_DIED}; {GO_ON}")
    if code < 0 and {*passed_on} & {signal.SIGINT, signal.SIGTERM}:  # Ray's own handlers, in C++, while it starts
        end_at_once(f"interrupted; {GO_ON}", INTERRUPTED)
    if code < 0:
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        killer = signal.Signals(-code).name
        end_at_once(f"{killer} ended the job{why}; {GO_ON}")
    os._exit(code)


def interrupt_on_sigterm() -> None:
    """Lets SIGTERM stop a job like Ctrl-C; some schedulers send it twice, to a process and its parent."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def ignore_interrupts() -> None:
    """Ignores Ctrl-C and SIGTERM from now on, while Ray ends its processes; they would only print a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
