"""Questions that are answered on a Ray cluster: the model, the archive's rows and the videos are read there.

What is said on the way comes back piece by piece through plain calls of an actor, since a driver outside the cluster
(`ray://`) has no streaming ones.
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
from pipeline.cluster.connect import address_of_joined, first_line, start_ray
from pipeline.cluster.supervise import LOOK_SECONDS, watch_joined_ray
from storage.archive.archive import Archive, open_archive
from storage.errors import ClusterError, UsageError, VidxError
from storage.records import Answer, FrameRef
from workers.llm.engine import ModelOptions
from workers.llm.prompt import Turns
from workers.models.bundle import Bundle
from workers.models.load import use_cores

CORES = 4  # of a worker without a GPU, at most
PATIENCE_SECONDS = 20.0  # until it is said that the worker waits for a place


class RemoteAsker:
    """An Asker in a worker of a cluster; its calls are those of Asker."""

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
            archive: what is asked; its folder is under the same path on the cluster.
            model: where the archive's model lies there; None for the one that made it.
            address: the cluster's.
            options: how the model is held there; device "auto" is a GPU where the cluster has one.
            cache_bytes: as Asker takes it.
            announce: hears when the worker has to wait for others to end.
            tower: where its vision tower lies there; None for the one that made it.
        Raises:
            UsageError: no cluster is there, or no such archive or model on it.
            ClusterError: the worker died.
        """
        start_ray(address)
        self._address = address
        self._watch = watch_joined_ray(address, address_of_joined(address), "ask again when it is back")
        self._numbers = itertools.count()
        have = ray.cluster_resources()
        gpus = min(1, int(have.get("GPU", 0))) if options.device != "cpu" else 0
        if options.device == "cuda" and not gpus:
            raise UsageError("--device cuda: Ray finds no GPU on this cluster; use --device cpu")
        cores = 1 if gpus else min(CORES, int(have.get("CPU", 1)))
        place: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus, "max_concurrency": 3, "max_restarts": 0}
        settings = (cores, archive.uri, model, tower, options, cache_bytes)
        remote: Any = ray.remote(**place)
        self._worker = remote(_Answerer).remote(*settings)
        found = self._worker.bundle.remote()
        if not ray.wait([found], timeout=PATIENCE_SECONDS)[0]:
            needs = "a GPU" if gpus else f"{cores} free cores"
            announce(f"waiting for {needs} on the cluster at {address}; Ctrl-C gives up")
        self.bundle: Bundle = self._get(found)

    def ask(self, question: str, within: Filter, asked: Asked, **heard: Say) -> Answer | None:
        """As Asker.ask."""
        return self._call("ask", (question, within, asked), **heard)

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """As Asker.choose."""
        return self._call("choose", (question, within, asked))

    def answer(
        self,
        question: str,
        chosen: Chosen,
        asked: Asked,
        *,
        history: Turns = (),
        stream: Say = silent,
        announce: Say = silent,
    ) -> Answer:
        """As Asker.answer."""
        return self._call("answer", (question, chosen, asked), stream, announce, history=history)

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
        stream: Say = silent,
        announce: Say = silent,
        **others: Any,
    ) -> Any:
        hear = {"stream": stream, "announce": announce}
        number = next(self._numbers)
        try:
            result = self._worker.call.remote(number, name, arguments, others)
            while True:
                said = self._worker.said.remote(number)
                if result in self._first_of(said, result):
                    self._get(result)  # raises where the call has failed before it could say so
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
        """The references that are there, as soon as one is.

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
            return ray.get(self._first_of(reference)[0])
        except RayTaskError as error:
            if isinstance(error.cause, VidxError):
                raise error.cause from None
            raise
        except (RayError, ConnectionError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> ClusterError:
        """What a call is told whose worker, or its cluster, has died."""
        reason = first_line(error)
        return ClusterError(
            f"the worker that answers on the cluster at {self._address} died: {reason} Check its memory and that "
            "every node has this version of vidx and Ray, and ask again"
        )


class _Answerer:
    """The worker: an Asker, and what was said in each of its calls that nobody has fetched yet."""

    def __init__(self, cores: int, *settings: Any):
        self._cores = cores
        self._settings = settings
        self._asker: Asker | None = None
        self._turn = threading.Lock()  # of calls
        self._queues: dict[int, queue.SimpleQueue[tuple[str, str]]] = {}
        self._stopped = -1  # this call, and all before it

    def bundle(self) -> Bundle:
        """The archive's model, found; not in the constructor, so that its errors reach the user as they are."""
        uri, model, tower, *how = self._settings
        archive = open_archive(uri)
        bundle = bundle_of(archive, model, tower)
        use_cores(self._cores)
        self._asker = Asker(archive, bundle, *how)
        return bundle

    def call(self, number: int, name: str, arguments: tuple, others: dict[str, Any]) -> Any:
        """A method of the asker; what it says meanwhile waits in `said`, and "end" is the last of it."""
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
        """What has been said in a call since this was asked last, and of which kind; waits for the first of it."""
        waiting = self._queue(number)
        found = [waiting.get()]
        while not waiting.empty():
            found.append(waiting.get())
        if found[-1][0] == "end":
            del self._queues[number]
        return found

    def stop(self, number: int) -> None:
        """Has a call end when it says something next."""
        self._stopped = number

    def _queue(self, number: int) -> queue.SimpleQueue[tuple[str, str]]:
        return self._queues.setdefault(number, queue.SimpleQueue())


class _Stopped(Exception):
    """Nobody wants the rest of the answer."""
