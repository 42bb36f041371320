"""Questions that a Ray cluster answers: it reads the model, the archive and the videos.

Pieces of an answer come back through plain calls of an actor, because a driver outside the cluster (`ray://`) cannot
make streaming calls.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.ask.answer import Asked, Asker, Chosen, Say, silent
from pipeline.ask.filter import Filter
from pipeline.ask.search import bundle_of
from pipeline.cluster.connect import address_of_joined, first_line, our_errors, start_ray
from pipeline.cluster.supervise import LOOK_SECONDS, watch_joined_ray
from storage.archive.archive import Archive, open_archive
from storage.errors import ClusterError, UnavailableError
from storage.records import Answer, FrameRef
from workers.llm.engine import ModelOptions
from workers.llm.prompt import Turns
from workers.models.bundle import Bundle
from workers.models.load import use_cores

CORES = 4  # maximum for a worker without a GPU
PATIENCE_SECONDS = 20.0  # until a note says that the worker waits for free cores or a GPU
GPU_SECONDS = 600.0  # that an autoscaler has to bring a GPU


class RemoteAsker:
    """An Asker in a worker of a cluster; it has the methods of Asker."""

    def __init__(
        self,
        archive: Archive,
        model: str | None,
        address: str,
        options: ModelOptions,
        cache_bytes: int,
        announce: Callable[[str], None],
        tower: str | None = None,
    ):
        """Joins the cluster and starts the worker.

        Args:
            archive: the archive to ask; it has the same path on the cluster.
            model, tower: where the archive's model and its CLIP are on the cluster; None if they were not moved.
            options: how to load the model; device "auto" is a GPU if the cluster has one.
            announce: gets a note if the worker must wait for others.
        Raises:
            UsageError: there is no such cluster, or it has no such archive or model.
            ClusterError: the worker died.
            UnavailableError: the cluster got no GPU in time.
        """
        start_ray(address)
        self._address = address
        self._watch = watch_joined_ray(address, address_of_joined(address), "ask again when it runs")
        self._numbers = itertools.count()
        have = ray.cluster_resources()
        gpus = 1 if options.device == "cuda" or (options.device == "auto" and have.get("GPU", 0) >= 1) else 0
        cores = 1 if gpus else min(CORES, int(have.get("CPU", 1)))
        place: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus, "max_concurrency": 3, "max_restarts": 0}
        settings = (cores, archive.uri, model, tower, options, cache_bytes)
        remote: Any = ray.remote(**place)
        self._worker = remote(Answerer).remote(*settings)
        found = self._worker.bundle.remote()
        is_there = have.get("GPU", 0) >= gpus  # an autoscaler may bring what is not
        if not is_there or not ray.wait([found], timeout=PATIENCE_SECONDS)[0]:
            needs = "a GPU" if gpus else f"{cores} free cores"
            has = "" if is_there else f", which has none yet, for {GPU_SECONDS / 60:.0f} minutes at most"
            announce(f"waiting for {needs} on the cluster at {address}{has}; Ctrl-C gives up")
        if not is_there and not ray.wait([found], timeout=GPU_SECONDS)[0]:
            raise UnavailableError(f"--device cuda: no GPU has come to the cluster at {address}; or use --device cpu")
        self.bundle: Bundle = self._get(found)

    def ask(self, question: str, within: Filter, asked: Asked, **heard: Say) -> Answer | None:
        """As Asker.ask."""
        return self._call("ask", (question, within, asked), **heard)

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """As Asker.choose."""
        return self._call("choose", (question, within, asked))

    def answer(self, question: str, chosen: Chosen, asked: Asked, *, history: Turns = (), **heard: Say) -> Answer:
        """As Asker.answer."""
        return self._call("answer", (question, chosen, asked), **heard, history=history)

    def fits(self, question: str, chosen: Chosen, asked: Asked, history: Turns) -> bool:
        """As Asker.fits."""
        return self._call("fits", (question, chosen, asked, history))

    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]:
        """As Asker.best_score."""
        return self._call("best_score", (question, frames))

    def _call(self, name: str, arguments: tuple, stream: Say = silent, announce: Say = silent, **others: Any) -> Any:
        hear = {"stream": stream, "announce": announce}
        number = next(self._numbers)
        try:
            result = self._worker.call.remote(number, name, arguments, others)
            while True:
                said = self._worker.said.remote(number)
                if result in self._first_of(said, result):
                    self._get(result)  # raises if the call failed before it could report that
                for kind, text in self._get(said):
                    if kind == "end":
                        return self._get(result)
                    hear[kind](text)
        except KeyboardInterrupt:
            with contextlib.suppress(RayError, ConnectionError):
                self._worker.stop.remote(number)
            raise
        except RayTaskError:
            raise
        except (RayError, ConnectionError) as error:
            raise self._lost(error) from error

    def _first_of(self, *references: Any) -> list[Any]:
        """The references that are ready; waits for at least one.

        Raises:
            ClusterError: the cluster has died; Ray itself would wait for a minute and then end this process.
        """
        while True:
            found, _ = ray.wait([*references], num_returns=1, timeout=LOOK_SECONDS)
            if found:
                return found
            if self._watch.has_died:
                raise self._watch.error()

    def _get(self, reference: Any) -> Any:
        try:
            with our_errors():
                return ray.get(self._first_of(reference)[0])
        except RayTaskError:
            raise
        except (RayError, ConnectionError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> ClusterError:
        """The error if the worker or its cluster has died."""
        reason = first_line(error)
        return ClusterError(
            f"the worker on the cluster at {self._address} died: {reason} Check its memory, and that each node has "
            "this version of vidx and Ray; then ask again"
        )


class Answerer:
    """The worker: an Asker, and for each call the pieces that nobody has fetched yet."""

    def __init__(self, cores: int, *settings: Any):
        self._cores = cores
        self._settings = settings
        self._asker: Asker | None = None
        self._turn = threading.Lock()  # one call at a time
        self._queues: dict[int, queue.SimpleQueue[tuple[str, str]]] = {}
        self._stopped = -1  # this call and all earlier ones are stopped

    def bundle(self) -> Bundle:
        """The archive's model. It is not found in the constructor, whose errors Ray would wrap."""
        uri, model, tower, *how = self._settings
        archive = open_archive(uri)
        bundle = bundle_of(archive, model, tower)
        use_cores(self._cores)
        self._asker = Asker(archive, bundle, *how)
        return bundle

    def call(self, number: int, name: str, arguments: tuple, others: dict[str, Any]) -> Any:
        """Calls a method of the asker; `said` gives its pieces, and an "end" after the last one."""
        waiting = self._queue(number)

        def say(kind: str, text: str) -> None:
            if number <= self._stopped:
                raise _Stopped
            waiting.put((kind, text))

        if name in ("ask", "answer"):
            others |= {kind: partial(say, kind) for kind in ("stream", "announce")}
        try:
            with self._turn:
                return getattr(self._asker, name)(*arguments, **others)
        finally:
            waiting.put(("end", ""))

    def said(self, number: int) -> list[tuple[str, str]]:
        """The new pieces of a call, each with its kind; waits for at least one."""
        waiting = self._queue(number)
        found = [waiting.get()]
        while not waiting.empty():
            found.append(waiting.get())
        if found[-1][0] == "end":
            del self._queues[number]
        return found

    def stop(self, number: int) -> None:
        """Stops a call, and all earlier ones, at its next piece."""
        self._stopped = number

    def _queue(self, number: int) -> queue.SimpleQueue[tuple[str, str]]:
        return self._queues.setdefault(number, queue.SimpleQueue())


class _Stopped(Exception):
    """The user has stopped the answer."""
