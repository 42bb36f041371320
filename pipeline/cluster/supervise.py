"""Supervision of Ray: a command in a process of its own, and a watch over the cluster that it uses.

Calls into Ray block, or end this process from C++ without a word that a user understands, once the cluster is gone: no
handler of Python's runs. The watch notices the death; the process that stays behind knows what to say.
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

from storage.errors import ClusterError
from storage.processes import adopt_orphans, child_pids, kill_children, process_start
from workers.sandbox import die_with_owner

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT)
RAY_NAMES = ("raylet", "gcs_server")
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 2.0  # that a cluster elsewhere has to accept a connection
SILENT_SECONDS = 15.0  # for which it may accept none, as while its head is started again
GRACE_SECONDS = 30.0  # for whoever waits to notice by himself, or to end a commit; Ray ends the process after 60

GO_ON = "what was committed stays, run the same command again to go on"
RAY_DIED = "Ray's own processes died (out of memory?)"


class RayWatch:
    """Notices when a cluster dies, and ends this process where it hangs on that.

    Where the cluster is dead and this process is still at work GRACE_SECONDS later, it waits inside Ray for what will
    not come: then it ends, with the watch's word and the exit code of a ClusterError.

    Attributes:
        word: what to say of the death.
        advice: what the user can do then.
        has_died: whether that was seen at the last look, LOOK_SECONDS ago at most; `is_dead` looks now.
    """

    def __init__(
        self, is_dead: Callable[[], bool], word: str, silent_seconds: float = 0.0, advice: str = GO_ON
    ) -> None:
        """Begins to watch.

        Args:
            is_dead: looks whether the cluster is dead.
            word: what to say then.
            silent_seconds: for how long it has to look dead before it is taken to be.
            advice: what the user can do then.
        """
        self.is_dead = is_dead
        self.word = word
        self.advice = advice
        self.has_died = False
        self._silent_seconds = silent_seconds
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def is_gone(self) -> bool:
        """Looks until the cluster lives, or has looked dead for long enough."""
        end = time.monotonic() + self._silent_seconds
        while self.is_dead():
            if self.has_died or time.monotonic() >= end:
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def error(self, detail: str = "") -> ClusterError:
        """What is told of the death."""
        return ClusterError(f"{self.word}{detail and f': {detail}'}; {self.advice}")

    def stop(self) -> None:
        """Watches no more."""
        self._over.set()

    def _watch(self) -> None:
        alive = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            if not (is_silent := self.is_dead()):
                alive = time.monotonic()
            self.has_died = is_silent and time.monotonic() - alive >= self._silent_seconds
            if self.has_died and not self._over.wait(GRACE_SECONDS):
                end_at_once(str(self.error()))


def watch_own_ray() -> RayWatch:
    """A watch over the processes of the cluster that this process is about to start."""
    others = set(child_pids(*RAY_NAMES))  # of a cluster before this one
    seen: dict[int, str | None] = {}  # start by process number

    def is_dead() -> bool:
        for pid in set(child_pids(*RAY_NAMES)) - others:
            seen.setdefault(pid, process_start(pid))
        return any(start is None or process_start(pid) != start for pid, start in [*seen.items()])

    return RayWatch(is_dead, RAY_DIED)


def watch_joined_ray(name: str, address: str, advice: str = GO_ON) -> RayWatch:
    """A watch over a cluster that others started.

    Args:
        name: the cluster's, as the user gave it.
        address: HOST:PORT of its head, or of its server for clients.
        advice: what the user can do when it has died.
    """
    host, _, port = address.rpartition(":")

    def is_dead() -> bool:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except OSError:
            return True
        return False

    return RayWatch(is_dead, f"the cluster at {name} does not answer any more", SILENT_SECONDS, advice)


def end_at_once(word: str) -> NoReturn:
    """Says why and ends this process with all that it started, whatever it waits for; with a ClusterError's code."""
    sys.stderr.write(f"vidx: {word}\n")
    sys.stderr.flush()
    kill_children()
    os._exit(ClusterError.exit_code)


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
        end_at_once(f"{RAY_DIED}; {GO_ON}")
    if code < 0:
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        killer = signal.Signals(-code).name
        end_at_once(f"{killer} ended the job{why}; {GO_ON}")
    os._exit(code)


def _pass_on(number: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)
    if number == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGSTOP)
