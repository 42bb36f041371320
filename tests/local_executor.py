"""The workers of a job in its own process, in place of those of a Ray cluster, which takes seconds to start.

For tests of what a job does with its videos, and not of Ray. The workers, their decoders and what passes between them
and the job are the real ones.
"""

import pickle
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from pipeline.cluster import executor
from storage.errors import VidxError
from storage.records import Content, Problem, Reason, SegmentTask
from workers.actors import SEGMENTS_AT_ONCE, Encoder, Examiner, WorkerSettings


class LocalExecutor:
    """As pipeline.cluster.executor.Executor, with one worker of each kind."""

    def __init__(self, settings: WorkerSettings, address: str | None, workers: int | None):
        assert (address, workers) == (None, None), "these are for Ray"
        self._settings = replace(settings, threads=1)
        self._slots = {"examine": 1, "encode": SEGMENTS_AT_ONCE}
        self._waiting = {kind: SimpleQueue() for kind in self._slots}
        self._running: dict[Future, tuple[str, Any]] = {}

    def __enter__(self) -> "LocalExecutor":
        self._examiner, self._encoder = Examiner(self._settings), Encoder(self._settings)
        self._encoder.load()
        for kind, count in self._slots.items():
            for _ in range(count):
                threading.Thread(target=_work, args=(self._waiting[kind],), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        """What still runs ends with the process, as Ray's workers are killed."""

    is_loading = False

    @property
    def running(self) -> int:
        return len(self._running)

    def is_busy(self, kind: str) -> bool:
        return bool(self.at_work(kind))

    def at_work(self, kind: str) -> list[Any]:
        return [key for of_kind, key in self._running.values() if of_kind == kind]

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        return self._encoder.reached()

    def free(self, kind: str) -> int:
        return self._slots[kind] - len(self.at_work(kind))

    def examine(self, key: Any, uri: str, content: Content | None) -> None:
        self._submit("examine", key, self._examiner.examine, uri, content)

    def encode(self, key: Any, task: SegmentTask) -> None:
        self._submit("encode", key, self._encoder.encode, task)

    def _submit(self, kind: str, key: Any, work: Any, *arguments: Any) -> None:
        future = Future()
        self._running[future] = kind, key
        self._waiting[kind].put((future, work, pickle.dumps(arguments)))

    def wait(self, timeout_seconds: float) -> list[executor.Outcome]:
        done, _ = wait(list(self._running), timeout_seconds, FIRST_COMPLETED)
        return [self._collect(future) for future in done]

    def _collect(self, future: Future) -> executor.Outcome:
        kind, key = self._running.pop(future)
        try:
            return executor.Outcome(kind, key, pickle.loads(future.result()), None)
        except VidxError:
            raise
        except Exception as error:
            sys.stderr.write(f"{error}\n")
            problem = Problem(Reason.UNKNOWN, f"{type(error).__name__}: {error}")
            return executor.Outcome(kind, key, None, problem)


def _work(waiting: SimpleQueue) -> None:
    """One call after another; arguments and results are copied, as between processes."""
    while True:
        future, work, arguments = waiting.get()
        try:
            future.set_result(pickle.dumps(work(*pickle.loads(arguments))))
        except Exception as error:
            future.set_exception(error)


def install() -> None:
    """From now on this process's jobs use it."""
    executor.Executor = LocalExecutor
