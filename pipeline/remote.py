"""Questions that are answered on a Ray cluster: the model, the archive's rows and the videos are read there.

What is said on the way comes back piece by piece through plain calls of an actor, since a driver outside the cluster
(`ray://`) has no streaming ones.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.answer import CACHE_BYTES, Asked, Asker, Chosen, silent
from pipeline.cluster import start_ray
from pipeline.filter import Filter
from pipeline.search import bundle_of
from storage.archive import Archive, open_archive
from storage.errors import ClusterError, UsageError, VidxError
from storage.records import Answer, FrameRef
from workers.bundle import Bundle
from workers.load import use_all_cores
from workers.prompt import Turns


class RemoteAsker:
    """An Asker in a worker of a cluster; its calls are those of Asker."""

    def __init__(
        self,
        archive: Archive,
        model: str | None,
        address: str,
        device: str = "auto",
        dtype: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        quantize: str | None = None,
    ):
        """Joins the cluster and starts the worker.

        Args:
            archive: what is asked; its folder is under the same path on the cluster.
            model: where the archive's model lies there; None for the one that made it.
            address: the cluster's.
            device, dtype: for the model; "auto" is a GPU where the cluster has one.
            cache_bytes: how much to keep of shown frames.
            quantize: as Asker takes it.
        Raises:
            UsageError: no cluster is there, or no such archive or model on it.
            ClusterError: the worker died.
        """
        start_ray(address)
        self._address = address
        self._numbers = itertools.count()
        gpus = min(1, ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
        if device == "cuda" and not gpus:
            raise UsageError("--device cuda: Ray finds no GPU on this cluster; use --device cpu")
        options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 3, "max_restarts": 0}
        settings = (archive.uri, model, device, dtype, cache_bytes, quantize)
        self._worker = ray.remote(**options)(_Answerer).remote(*settings)
        self.bundle: Bundle = self._get(self._worker.bundle.remote())

    def ask(self, question: str, within: Filter, asked: Asked, **heard: Callable[[str], None]) -> Answer | None:
        """As Asker.ask."""
        return self._call("ask", (question, within, asked), **heard)

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """As Asker.choose."""
        return self._call("choose", (question, within, asked))

    def answer(
        self, question: str, chosen: Chosen, asked: Asked, *, history: Turns = (), **heard: Callable[[str], None]
    ) -> Answer:
        """As Asker.answer."""
        return self._call("answer", (question, chosen, asked), history=history, **heard)

    def fits(self, question: str, chosen: Chosen, asked: Asked, history: Turns) -> bool:
        """As Asker.fits."""
        return self._call("fits", (question, chosen, asked, history))

    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]:
        """As Asker.best_score."""
        return self._call("best_score", (question, frames))

    def _call(
        self,
        name: str,
        arguments: tuple,
        stream: Callable[[str], None] = silent,
        announce: Callable[[str], None] = silent,
        **others: Any,
    ) -> Any:
        hear = {"stream": stream, "announce": announce}
        number = next(self._numbers)
        result = self._worker.call.remote(number, name, arguments, others)
        try:
            while True:
                for kind, text in self._get(self._worker.said.remote(number)):
                    if kind == "end":
                        return self._get(result)
                    hear[kind](text)
        except KeyboardInterrupt:
            self._get(self._worker.stop.remote())
            ray.wait([result])  # the next call is not to meet the end of this one
            raise

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, VidxError):
                raise error.cause from None
            raise
        except RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(f"the worker that answers on the cluster at {self._address} died: {reason}") from error


class _Answerer:
    """The worker: an Asker, and what was said in each of its calls that nobody has fetched yet."""

    def __init__(self, *settings: Any):
        self._settings = settings
        self._asker: Asker | None = None
        self._queues: dict[int, queue.SimpleQueue[tuple[str, str]]] = {}
        self._stopped = threading.Event()

    def bundle(self) -> Bundle:
        """The archive's model, found; not in the constructor, so that its errors reach the user as they are."""
        uri, model, *place = self._settings
        archive = open_archive(uri)
        bundle = bundle_of(archive, model)
        use_all_cores()
        self._asker = Asker(archive, bundle, *place)
        return bundle

    def call(self, number: int, name: str, arguments: tuple, others: dict[str, Any]) -> Any:
        """A method of the asker; what it says meanwhile waits in `said`, and "end" is the last of it."""
        self._stopped.clear()
        say = self._queue(number).put

        def stream(text: str) -> None:
            if self._stopped.is_set():
                raise _Stopped
            say(("stream", text))

        if name in ("ask", "answer"):
            others |= {"stream": stream, "announce": lambda text: say(("announce", text))}
        try:
            return getattr(self._asker, name)(*arguments, **others)
        finally:
            say(("end", ""))

    def said(self, number: int) -> list[tuple[str, str]]:
        """What has been said in a call since this was asked last, and of which kind; waits for the first of it."""
        waiting = self._queue(number)
        found = [waiting.get()]
        while not waiting.empty():
            found.append(waiting.get())
        if found[-1][0] == "end":
            del self._queues[number]
        return found

    def stop(self) -> None:
        """Has the call that runs end with the next piece of its answer."""
        self._stopped.set()

    def _queue(self, number: int) -> queue.SimpleQueue[tuple[str, str]]:
        return self._queues.setdefault(number, queue.SimpleQueue())


class _Stopped(Exception):
    """Nobody wants the rest of the answer."""
