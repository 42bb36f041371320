"""The one executor: a Ray cluster, its workers, and which task runs on which."""

import contextlib
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.connect import address_of_joined, first_line, start_ray
from pipeline.cluster.supervise import RayWatch, watch_joined_ray, watch_own_ray
from storage.errors import ClusterError, UsageError, VidxError
from storage.processes import kill_children
from storage.records import Content, Problem, Reason, SegmentTask
from workers.actors import SEGMENTS_AT_ONCE, Encoder, Examiner, WorkerSettings

REACHED_SECONDS = 1.0  # between two questions to a worker how far it is
ATTEMPTS = 2  # of a task whose worker died; then the task is blamed


@dataclass(frozen=True)
class Outcome:
    """A task that ended: what it was, and its result or why there is none."""

    kind: Literal["examine", "encode"]
    key: Any
    result: Any
    problem: Problem | None


@dataclass
class _Task:
    kind: Literal["examine", "encode", "load"]
    key: Any
    arguments: tuple
    worker: int
    handle: Any = None  # the worker's, where it has been given out
    attempts: int = 0

    @property
    def role(self) -> Literal["examine", "encode"]:
        """The kind of worker that it runs on."""
        return "examine" if self.kind == "examine" else "encode"


class Executor:
    """Starts or joins a cluster, holds its workers for one job, and hands back outcomes as they come.

    Ray is shut down on exit if it was started here; workers are released either way.
    """

    def __init__(self, settings: WorkerSettings, address: str | None, workers: int | None):
        self._settings = settings
        self._address = address
        self._wanted = workers
        self._counts: dict[str, int] = {}  # of workers, by kind
        self._slots = {"examine": 2, "encode": SEGMENTS_AT_ONCE}
        self._workers: dict[tuple[str, int], Any] = {}
        self._running: dict[Any, _Task] = {}
        self._asked: dict[Any, int] = {}  # workers that have not answered how far they are, by the call
        self._last_asked = -REACHED_SECONDS
        self._suspects: list[_Task] = []  # whose worker died; each is tried again with no other beside it
        self._watch: RayWatch | None = None

    def __enter__(self) -> "Executor":
        try:
            self._start()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start(self) -> None:
        if self._address is None:
            self._watch = watch_own_ray()
        start_ray(self._address)
        if self._address is not None:
            self._watch = watch_joined_ray(self._address, address_of_joined(self._address))
        encoders = _worker_count(self._settings.device, self._wanted)
        cores = int(ray.cluster_resources().get("CPU", 1))
        self._settings = replace(self._settings, threads=max(1, cores // encoders))
        self._counts = {"examine": max(1, encoders // 2), "encode": encoders}
        for kind, count in self._counts.items():
            for worker in range(count):
                self._workers[kind, worker] = self._new_worker(kind)
        for worker in range(encoders):
            self._submit(_Task("load", None, (), worker))

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Releases what is left of the cluster.

        Raises:
            ClusterError: an error of Ray comes from its death.
        """
        if self._watch is not None:
            self._watch.stop()
        is_dead = self._watch is not None and self._watch.is_dead()
        if not is_dead:
            # A client that has lost its server raises these.
            with contextlib.suppress(RayError, ConnectionError, AssertionError):
                for handle in self._workers.values():
                    ray.kill(handle)
                ray.shutdown()
        elif self._address is None:  # every call into Ray would wait for it
            kill_children()
        is_of_death = is_dead and isinstance(error, RayError | UsageError)  # also that Ray cannot be started
        if self._watch is not None and error is not None and (is_of_death or type(error) is ConnectionError):
            raise self._watch.error(first_line(error)) from error

    @property
    def running(self) -> int:
        """Tasks that have been given out and have not ended."""
        return len(self._suspects) + sum(task.kind != "load" for task in self._running.values())

    @property
    def is_loading(self) -> bool:
        """Whether no worker has its model yet."""
        return sum(task.kind == "load" for task in self._running.values()) == self._counts["encode"]

    def is_busy(self, kind: Literal["examine", "encode"]) -> bool:
        """Whether a task of that kind runs, or waits to be tried again."""
        return any(task.kind == kind for task in (*self._running.values(), *self._suspects))

    def at_work(self, kind: Literal["examine", "encode"]) -> list[Any]:
        """The keys of the tasks of that kind that workers have, in the order in which they were given out."""
        return [task.key for task in self._running.values() if task.kind == kind]

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """What workers have said since the last call: Encoder.reached of all of them."""
        found: dict[tuple[int, str], tuple[float, int]] = {}
        answers = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else ()
        for answer in answers:
            del self._asked[answer]
            with contextlib.suppress(RayError):  # it died: its tasks tell why
                found |= ray.get(answer)
        if time.monotonic() - self._last_asked >= REACHED_SECONDS:
            self._last_asked = time.monotonic()
            busy = {task.worker for task in self._running.values() if task.kind == "encode"} - {*self._asked.values()}
            for worker in busy:
                handle = self._workers["encode", worker]
                self._asked[handle.reached.remote()] = worker
        return found

    def free(self, kind: Literal["examine", "encode"]) -> int:
        """How many more tasks of that kind may be given out now."""
        if self._suspects or any(task.attempts > 1 for task in self._running.values()):
            return 0
        in_use = sum(task.kind == kind for task in self._running.values())
        return self._counts[kind] * self._slots[kind] - in_use

    def examine(self, key: Any, uri: str, content: Content | None) -> None:
        """Gives out the first look at a source."""
        self._submit(_Task("examine", key, (uri, content), self._least_busy("examine")))

    def encode(self, key: Any, task: SegmentTask) -> None:
        """Gives out a segment."""
        self._submit(_Task("encode", key, (task,), self._least_busy("encode")))

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Tasks that have ended, at least one unless the time is up first.

        Raises:
            VidxError: a worker met one that concerns the whole job, such as a full disk or a model that cannot be
                loaded.
            ClusterError: Ray's own processes died, or workers do while they load the model.
        """
        if self._suspects and not self._running:
            self._submit(self._suspects.pop())
        if not self._running:
            return []
        if self._watch is not None and self._watch.has_died:
            raise self._watch.error()
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        if not done:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds)
        outcomes = [self._collect(reference) for reference in done]
        return [outcome for outcome in outcomes if outcome is not None]

    def _collect(self, reference: Any) -> Outcome | None:
        task = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, VidxError):
                raise error.cause from None
            if task.kind == "load":
                raise
            sys.stderr.write(f"{error}\n")  # our own mistake: its traceback is shown, and the job goes on
            detail = f"{type(error.cause).__name__}: {error.cause}"
            return Outcome(task.kind, task.key, None, Problem(Reason.UNKNOWN, detail))
        except RayError as error:  # the worker, its node or its memory
            return self._after_death(task, error)
        return None if task.kind == "load" else Outcome(task.kind, task.key, result, None)

    def _after_death(self, task: _Task, error: RayError) -> Outcome | None:
        """A worker died: another takes its place and the task is tried again, alone, up to ATTEMPTS times."""
        reason = first_line(error)
        if task.kind == "load" and task.attempts == ATTEMPTS:
            where = f"the cluster at {self._address}" if self._address else "this machine"
            raise ClusterError(
                f"workers on {where} die while they load the model: {reason} Check their memory and that every node "
                "has this version of vidx and Ray; a cluster without authentication needs RAY_AUTH_MODE=disabled"
            )
        if self._watch is not None and self._watch.is_gone():
            raise self._watch.error()
        if self._workers[task.role, task.worker] is task.handle:  # the first of its tasks to notice replaces it
            ray.kill(task.handle)
            self._workers[task.role, task.worker] = self._new_worker(task.role)
        if task.kind == "load":
            self._submit(task)
            return None
        if task.attempts < ATTEMPTS:
            self._suspects.append(task)
            return None
        detail = f"the worker process died {ATTEMPTS} times on it: {reason}"
        return Outcome(task.kind, task.key, None, Problem(Reason.WORKER_LOST, detail))

    def _submit(self, task: _Task) -> None:
        task.attempts += 1
        task.handle = self._workers[task.role, task.worker]
        self._running[getattr(task.handle, task.kind).remote(*task.arguments)] = task

    def _least_busy(self, kind: str) -> int:
        load = Counter(task.worker for task in self._running.values() if task.kind == kind)
        return min(range(self._counts[kind]), key=lambda worker: load[worker])

    def _new_worker(self, kind: str) -> Any:
        if kind == "examine":
            return ray.remote(num_cpus=0)(Examiner).remote(self._settings)
        on_gpu = self._settings.device == "cuda"
        options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": 1}
        ray.method(concurrency_group="reached")(Encoder.reached)  # here: workers do not import Ray
        # Started tasks are given to a worker at a time up to its slots; ours decides about retries, not Ray.
        options |= {"max_concurrency": SEGMENTS_AT_ONCE, "concurrency_groups": {"reached": 1}}
        return ray.remote(max_restarts=0, max_task_retries=0, **options)(Encoder).remote(self._settings)


def _worker_count(device: str, wanted: int | None) -> int:
    """As many as wanted; else one per GPU, or on CPUs one per eight cores, on several of which a model computes.

    Raises:
        UsageError: the cluster has not as many GPUs or cores, so that some would wait for ever.
    """
    kind, cores_each = ("GPU", 1) if device == "cuda" else ("CPU", 8)
    have = int(ray.cluster_resources().get(kind, 0))
    if have == 0 and kind == "GPU":
        raise UsageError("--device cuda: Ray finds no GPU on this machine or cluster; use --device cpu")
    if wanted is not None and wanted > have:
        raise UsageError(f"--workers {wanted}: there are {have} {kind}s; give at most as many")
    return wanted or max(1, have // cores_each)
