"""Watches Ray's own processes: calls into Ray block, or end this process without a word, once they are gone."""

import os
import sys
import threading
from typing import NoReturn

from storage.errors import ClusterError
from storage.processes import children, kill_children, start_of

RAY_NAMES = ("raylet", "gcs_server")
LOOK_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for whoever waits to notice by himself, or to end a commit; Ray ends the process after 60

RAY_DIED = "Ray's own processes died (out of memory?); what was committed stays, run the same command again to go on"


class RayWatch:
    """Notices when a cluster that this process starts dies, and ends this one where it hangs on that.

    It watches from before the start of the cluster until `stop`. Where a process of the cluster dies and this one is
    still at work GRACE_SECONDS later, it waits inside Ray for what will not come: then it ends, with the message and
    the exit code of a ClusterError of RAY_DIED.

    Attributes:
        has_died: whether that was seen at the last look, LOOK_SECONDS ago at most; `is_dead` looks now.
    """

    def __init__(self) -> None:
        self._others = set(children(*RAY_NAMES))  # of a cluster before this one
        self._seen: dict[int, str | None] = {}  # start by process number
        self._over = threading.Event()
        self.has_died = False
        threading.Thread(target=self._watch, daemon=True).start()

    def is_dead(self) -> bool:
        """Whether one of the processes has died."""
        for pid in set(children(*RAY_NAMES)) - self._others:
            self._seen.setdefault(pid, start_of(pid))
        return any(start is None or start_of(pid) != start for pid, start in [*self._seen.items()])

    def stop(self) -> None:
        """Watches no more."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.has_died = self.is_dead()
            if self.has_died and not self._over.wait(GRACE_SECONDS):
                end_at_once(RAY_DIED)


def end_at_once(word: str) -> NoReturn:
    """Says why and ends this process with all that it started, whatever it waits for; with a ClusterError's code."""
    sys.stderr.write(f"vidx: {word}\n")
    sys.stderr.flush()
    kill_children()
    os._exit(ClusterError.exit_code)
