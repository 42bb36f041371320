"""The executor: a Ray cluster, its workers, and the distribution of tasks."""

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

REACHED_SECONDS = 1.0  # between two requests for a worker's progress
ATTEMPTS = 2  # a task is tried again once if its worker died


@dataclass(frozen=True)
class Outcome:
    """A finished task, and its result or its problem."""

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
    handle: Any = None  # of the worker that has the task
    attempts: int = 0

    @property
    def role(self) -> Literal["examine", "encode"]:
        """The kind of worker for this task."""
        return "examine" if self.kind == "examine" else "encode"


class Executor:
    """Starts or joins a cluster, runs the tasks of one job on its workers, and returns their outcomes.

    On exit, the workers are released; a cluster that was started here is shut down.
    """

    def __init__(self, settings: WorkerSettings, address: str | None, workers: int | None):
        self._settings = settings
        self._address = address
        self._wanted = workers
        self._counts: dict[str, int] = {}  # workers by kind
        self._slots = {"examine": 2, "encode": SEGMENTS_AT_ONCE}
        self._workers: dict[tuple[str, int], Any] = {}
        self._running: dict[Any, _Task] = {}
        self._asked: dict[Any, int] = {}  # by call, workers that have not yet reported their progress
        self._last_asked = -REACHED_SECONDS
        self._suspects: list[_Task] = []  # tasks whose worker died; each is tried again alone
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
        """Releases the cluster.

        Raises:
            ClusterError: the error was caused by the death of the cluster.
        """
        if self._watch is not None:
            self._watch.stop()
        is_dead = self._watch is not None and self._watch.is_dead()
        if not is_dead:
            # A client that lost its server raises these.
            with contextlib.suppress(RayError, ConnectionError, AssertionError):
                for handle in self._workers.values():
                    ray.kill(handle)
                ray.shutdown()
        elif self._address is None:  # a call into Ray would block
            kill_children()
        is_of_death = is_dead and isinstance(error, RayError | UsageError)  # UsageError: Ray cannot be started
        if self._watch is not None and error is not None and (is_of_death or type(error) is ConnectionError):
            raise self._watch.error(first_line(error)) from error

    @property
    def running(self) -> int:
        """Number of tasks that are not finished."""
        return len(self._suspects) + sum(task.kind != "load" for task in self._running.values())

    @property
    def is_loading(self) -> bool:
        """Whether no worker has loaded its model yet."""
        return sum(task.kind == "load" for task in self._running.values()) == self._counts["encode"]

    def is_busy(self, kind: Literal["examine", "encode"]) -> bool:
        """Whether a task of this kind runs, or waits to be tried again."""
        return any(task.kind == kind for task in (*self._running.values(), *self._suspects))

    def at_work(self, kind: Literal["examine", "encode"]) -> list[Any]:
        """The keys of the running tasks of this kind, oldest first."""
        return [task.key for task in self._running.values() if task.kind == kind]

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """The progress that workers have reported since the last call, see Encoder.reached."""
        found: dict[tuple[int, str], tuple[float, int]] = {}
        answers = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else ()
        for answer in answers:
            del self._asked[answer]
            with contextlib.suppress(RayError):  # the worker died; its tasks say why
                found |= ray.get(answer)
        if time.monotonic() - self._last_asked >= REACHED_SECONDS:
            self._last_asked = time.monotonic()
            busy = {task.worker for task in self._running.values() if task.kind == "encode"} - {*self._asked.values()}
            for worker in busy:
                handle = self._workers["encode", worker]
                self._asked[handle.reached.remote()] = worker
        return found

    def free(self, kind: Literal["examine", "encode"]) -> int:
        """How many more tasks of this kind can be started now."""
        if self._suspects or any(task.attempts > 1 for task in self._running.values()):
            return 0
        in_use = sum(task.kind == kind for task in self._running.values())
        return self._counts[kind] * self._slots[kind] - in_use

    def examine(self, key: Any, uri: str, content: Content | None) -> None:
        """Starts the examination of a source."""
        self._submit(_Task("examine", key, (uri, content), self._least_busy("examine")))

    def encode(self, key: Any, task: SegmentTask) -> None:
        """Starts the work on a segment."""
        self._submit(_Task("encode", key, (task,), self._least_busy("encode")))

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """The tasks that have finished; waits for at least one, up to the timeout.

        Raises:
            VidxError: an error that concerns the whole job, such as a full disk or a model that cannot be loaded.
            ClusterError: Ray's own processes died, or workers died while they loaded the model.
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
            sys.stderr.write(f"{error}\n")  # a bug of vidx: its traceback is shown, and the job continues
            detail = f"{type(error.cause).__name__}: {error.cause}"
            return Outcome(task.kind, task.key, None, Problem(Reason.UNKNOWN, detail))
        except RayError as error:  # the worker, its node or its memory
            return self._after_death(task, error)
        return None if task.kind == "load" else Outcome(task.kind, task.key, result, None)

    def _after_death(self, task: _Task, error: RayError) -> Outcome | None:
        """Replaces a dead worker; its task is tried again alone, or fails after ATTEMPTS."""
        reason = first_line(error)
        if task.kind == "load" and task.attempts == ATTEMPTS:
            where = f"the cluster at {self._address}" if self._address else "this machine"
            raise ClusterError(
                f"workers on {where} died while they loaded the model: {reason} Check their memory, and that each node "
                "has this version of vidx and Ray; a cluster without authentication needs RAY_AUTH_MODE=disabled"
            )
        if self._watch is not None and self._watch.is_gone():
            raise self._watch.error()
        if self._workers[task.role, task.worker] is task.handle:  # not replaced yet
            ray.kill(task.handle)
            self._workers[task.role, task.worker] = self._new_worker(task.role)
        if task.kind == "load":
            self._submit(task)
            return None
        if task.attempts < ATTEMPTS:
            self._suspects.append(task)
            return None
        detail = f"the worker process died {ATTEMPTS} times during this video: {reason}"
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
        ray.method(concurrency_group="reached")(Encoder.reached)  # not in the class: workers do not import Ray
        # The executor decides about retries, not Ray.
        options |= {"max_concurrency": SEGMENTS_AT_ONCE, "concurrency_groups": {"reached": 1}}
        return ray.remote(max_restarts=0, max_task_retries=0, **options)(Encoder).remote(self._settings)


def _worker_count(device: str, wanted: int | None) -> int:
    """The number of workers: as wanted, or else one per GPU, or one per eight cores.

    Raises:
        UsageError: the cluster has fewer GPUs or cores, so that some workers would never start.
    """
    kind, cores_each = ("GPU", 1) if device == "cuda" else ("CPU", 8)
    have = int(ray.cluster_resources().get(kind, 0))
    if have == 0 and kind == "GPU":
        raise UsageError("--device cuda: Ray finds no GPU on this machine or cluster; use --device cpu")
    if wanted is not None and wanted > have:
        raise UsageError(f"--workers {wanted}: there are {have} {kind}s; give at most {have}")
    return wanted or max(1, have // cores_each)
