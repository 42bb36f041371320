"""Watches Ray's own processes: calls into Ray block, or end this process without a word, once they are gone."""

import contextlib
import os
import signal
import sys
import threading

from storage.errors import ClusterError
from storage.processes import children, start_of

RAY_NAMES = ("raylet", "gcs_server")
LOOK_SECONDS = 0.5
GRACE_SECONDS = 15.0  # for whoever waits for Ray to notice by himself; Ray ends the process after 60

RAY_DIED = (
    "Ray's own processes on this machine died (out of memory?); what was finished is committed, run the same command "
    "again to go on"
)


class RayWatch:
    """Of the cluster that this process starts, from before it starts it until `stop`.

    Where one of its processes dies and this one is still at work GRACE_SECONDS later, it waits inside Ray for what will
    not come: then it ends, as a ClusterError of RAY_DIED would end it.
    """

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}  # start by process number
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def is_dead(self) -> bool:
        """Whether one of the processes has died."""
        for pid in children(*RAY_NAMES):
            start = start_of(pid)
            if start is not None:
                self._seen.setdefault(pid, start)
        return any(start_of(pid) != start for pid, start in [*self._seen.items()])

    def stop(self) -> None:
        """Watches no more."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if self.is_dead() and not self._over.wait(GRACE_SECONDS):
                sys.stderr.write(f"vidx: {RAY_DIED}\n")
                sys.stderr.flush()
                kill_children()
                os._exit(ClusterError.exit_code)


def kill_children() -> None:
    """Kills the processes that this one started; Ray cannot end them any more, and waits for what is dead."""
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
