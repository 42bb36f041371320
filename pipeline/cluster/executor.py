"""The one executor: the workers of a job on a Ray cluster, and which task runs on which.

Ray places the work. On CPUs each encoder shares reserved cores of its node with its decoders; on GPUs decoders run on
any node with free cores. Frames go from a decoder to the encoder that asked for it; they never come here. The encoders
follow the nodes: those that join get some, and what nodes that leave were at is done again elsewhere.
"""

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.cluster.connect import address_of_joined, first_line, our_errors, start_ray
from pipeline.cluster.nodes import (
    Node,
    anywhere_but,
    cores_each,
    encoders_of,
    in_background,
    living_nodes,
    look_around,
    look_here,
    on_node,
    share_of_node,
    some_of,
    why_left_out,
    within,
)
from pipeline.cluster.stages import Decoding, examine_source
from pipeline.cluster.supervise import RayWatch, watch_joined_ray, watch_own_ray
from storage.errors import ClusterError, UnavailableError, UsageError
from storage.processes import kill_children
from storage.records import Content, Problem, Reason, Receipt, SegmentTask
from workers.actors import Encoder, Examined, WorkerSettings

LOOK_SECONDS = 1.0  # between two looks at the nodes and at how far workers are
ATTEMPTS = 2  # of a task whose worker died; then the task is blamed
PATIENCE_SECONDS = 20.0  # until it is said what a job waits for
UNSEEN = (Reason.VANISHED, Reason.PERMISSION)  # reasons that may lie with the node
MOST_UNSEEN = 3  # sources that one node cannot read and another can: it is left out


@dataclass(frozen=True)
class Outcome:
    """A task that ended: what it was, and its result or why there is none."""

    kind: Literal["examine", "encode"]
    key: Any
    result: Any
    problem: Problem | None


@dataclass(eq=False)
class _Worker:
    """An encoder.

    Attributes:
        handle: Ray's actor.
        node: where it is pinned; None where Ray waits for a node to put it on.
        group: the cores that are reserved for it and its decoders; None on GPUs.
        decoders: how many segments its cores decode at once; None on GPUs, where any cores of the cluster do.
        is_placed: whether Ray has found room for it.
        is_loaded: whether it has its model.
        is_for_suspects: it takes nothing new, so that a suspect can run alone on it.
    """

    handle: Any
    node: Node | None
    group: PlacementGroup | None
    decoders: int | None
    is_placed: bool = False
    is_loaded: bool = False
    is_for_suspects: bool = False


@dataclass(eq=False)
class _Task:
    kind: Literal["examine", "encode", "load", "look"]
    key: Any
    arguments: tuple = ()
    worker: _Worker | None = None
    attempts: int = 0
    unseen_by: set[str] = field(default_factory=set)  # nodes that could not read its source


class Executor:
    """Starts or joins a cluster, holds its workers for one job, and hands back outcomes as they come.

    Ray is shut down on exit if it was started here; workers are released either way.

    Attributes:
        is_wanted: whether there is work for encoders; without it they are given back to other jobs.
        node_names: of all nodes that the cluster had until now, by their ids.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        archive_uri: str,
        job_uri: str,
        sources: Sequence[str],
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus_each: float = 1.0,
        wait_seconds: float = math.inf,
        announce: Callable[[str], None] = lambda line: None,
    ):
        """An executor that has not started.

        Args:
            settings: of the workers.
            archive_uri, job_uri: the archive and the job's file in it, which each node has to see.
            sources: the job's sources.
            address: of a cluster; None starts one here.
            workers: at most so many encoders; None for what the cluster has room for.
            gpus_each: the share of a GPU that an encoder takes.
            wait_seconds: for which no encoder may have started.
            announce: is told what the job waits for, and which nodes are left out.
        """
        self.is_wanted = True
        self.node_names: dict[str, str] = {}
        self._settings = settings
        self._place = archive_uri, job_uri
        self._sources = some_of(sources)
        self._address = address
        self._bound = workers
        self._gpus_each = gpus_each
        self._wait_seconds = wait_seconds
        self._announce = announce
        self._workers: list[_Worker] = []
        self._running: dict[Any, _Task] = {}
        self._waiting: list[_Task] = []  # to be tried again, on any worker
        self._suspects: list[_Task] = []  # whose worker died; each is tried again alone on a worker
        self._asked: dict[Any, _Worker] = {}  # workers that have not answered how far they are, by the call
        self._nodes: dict[str, Node] = {}  # living ones that take part
        self._left_out: set[str] = set()  # ids of nodes that take no part
        self._unseen: Counter[str] = Counter()  # sources that a node could not read and another could
        self._deaths: Counter[str] = Counter()  # of encoders that loaded their model, by node
        self._last_look = -math.inf
        self._idle_since = time.monotonic()  # since when no encoder has its model
        self._has_told = False
        self._look: Future[list[Node]] | None = None  # at the nodes, that has not ended
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
        self._examine: Any = ray.remote(num_cpus=0, max_retries=0)(examine_source)
        self._look_around: Any = ray.remote(num_cpus=0, max_retries=0)(look_around)
        self._here = look_here(self._sources)
        self._check_counts()
        self._idle_since = time.monotonic()
        self._follow_nodes()

    def _check_counts(self) -> None:
        """Refuses more than a cluster that was started here will ever have.

        Raises:
            UsageError: there is no GPU, or --workers are more than there are GPUs or cores.
        """
        if self._address is not None:
            return
        kind, have = ("GPU", "GPUs") if self._on_gpu else ("CPU", "CPUs")
        count = int(ray.cluster_resources().get(kind, 0) / (self._gpus_each if self._on_gpu else 1))
        if count == 0 and self._on_gpu:
            raise UsageError("--device cuda: Ray finds no GPU on this machine; use --device cpu")
        if self._bound is not None and self._bound > count:
            raise UsageError(f"--workers {self._bound}: there are {count} {have}; give at most as many")

    @property
    def _on_gpu(self) -> bool:
        return self._settings.device == "cuda"

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
                for worker in [*self._workers]:
                    self._dismiss(worker)
                for reference, task in self._running.items():
                    if task.kind in ("examine", "look"):
                        ray.cancel(reference, force=True)
                ray.shutdown()
        elif self._address is None:  # every call into Ray would wait for it
            kill_children()
        is_of_death = is_dead and isinstance(error, RayError | UsageError)  # also that Ray cannot be started
        if self._watch is not None and error is not None and (is_of_death or type(error) is ConnectionError):
            raise self._watch.error(first_line(error)) from error

    @property
    def running(self) -> int:
        """Tasks that have been given out and have not ended."""
        given_out = sum(task.kind in ("examine", "encode") for task in self._running.values())
        return given_out + len(self._suspects) + len(self._waiting)

    @property
    def is_loading(self) -> bool:
        """Whether no worker has its model yet."""
        return not any(worker.is_loaded for worker in self._workers)

    def is_busy(self, kind: Literal["examine", "encode"]) -> bool:
        """Whether a task of that kind runs, or waits to be tried again."""
        return any(task.kind == kind for task in (*self._running.values(), *self._suspects, *self._waiting))

    def at_work(self, kind: Literal["examine", "encode"]) -> list[Any]:
        """The keys of the tasks of that kind that workers have, in the order in which they were given out."""
        return [task.key for task in self._running.values() if task.kind == kind]

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """What workers have said since the last call: Encoder.reached of all of them."""
        found: dict[tuple[int, str], tuple[float, int]] = {}
        answers = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else ()
        for answer in answers:
            worker = self._asked.pop(answer)
            with contextlib.suppress(RayError):  # it died: its tasks tell why
                found |= ray.get(answer)
                worker.is_placed = True
        return found

    def free(self, kind: Literal["examine", "encode"]) -> int:
        """How many more tasks of that kind may be given out now."""
        if not self._nodes or self._waiting:
            return 0
        if kind == "examine":
            return max(2, self._decoders_at_once) - sum(task.kind == "examine" for task in self._running.values())
        return sum(max(0, self._free_slots(worker)) for worker in self._workers)

    def _free_slots(self, worker: _Worker) -> int:
        if not worker.is_loaded or worker.is_for_suspects or self._is_left_out(worker):
            return 0
        decoders = worker.decoders or math.ceil(self._decoders_at_once / len(self._workers))
        return decoders + 1 - self._load(worker)  # one more begins as soon as another has ended

    def _is_left_out(self, worker: _Worker) -> bool:
        return worker.node is not None and worker.node.id in self._left_out

    def _seeing(self, task: _Task) -> list[_Worker]:
        """The encoders that may have a segment: those that decode where its source can be read."""
        seeing = [worker for worker in self._workers if not (worker.node and worker.node.id in task.unseen_by)]
        return seeing or self._workers

    def _load(self, worker: _Worker) -> int:
        return sum(task.worker is worker for task in self._running.values())

    @property
    def _decoders_at_once(self) -> int:
        """Segments that the cluster's cores decode at once, besides what encoders take."""
        cores = sum(node.cores for node in self._nodes.values())
        if self._on_gpu:
            return max(1, int(cores - len(self._workers)) // self._settings.decode_threads)
        return max(1, int(cores))

    def examine(self, key: Any, uri: str, content: Content | None) -> None:
        """Gives out the first look at a source."""
        self._submit(_Task("examine", key, (uri, content)))

    def encode(self, key: Any, task: SegmentTask) -> None:
        """Gives out a segment."""
        self._submit(_Task("encode", key, (task,)))

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Tasks that have ended, at least one unless the time is up first.

        Raises:
            VidxError: a worker met one that concerns the whole job, such as a full disk or a model that cannot be
                loaded.
            ClusterError: Ray's own processes died, workers do while they load the model, or the resources that the job
                needs do not come.
        """
        if self._watch is not None and self._watch.has_died:
            raise self._watch.error()
        self._follow_nodes()
        self._try_again()
        if not self._running:
            time.sleep(min(timeout_seconds, LOOK_SECONDS))  # until nodes join, or others let go of what is left
            return []
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        if not done:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds)
        outcomes = [self._collect(reference) for reference in done]
        return [outcome for outcome in outcomes if outcome is not None]

    def _follow_nodes(self) -> None:
        """Looks at the nodes: those that joined are looked at, and get encoders; what encoders do is asked."""
        if time.monotonic() - self._last_look < LOOK_SECONDS:
            return
        self._last_look = time.monotonic()
        self._look = self._look or in_background(living_nodes)
        if not wait([self._look], LOOK_SECONDS).done:  # the head is busy or has died
            return
        living, self._look = {node.id: node for node in self._look.result()}, None
        self.node_names |= {node.id: node.name for node in living.values()}
        looking = {task.key.id for task in self._running.values() if task.kind == "look"}
        for node in living.values():
            if node.id not in self._nodes and node.id not in self._left_out and node.id not in looking:
                if self._address is None:  # this machine
                    self._nodes[node.id] = node
                else:
                    self._submit(_Task("look", node))
        self._nodes = {node_id: node for node_id, node in self._nodes.items() if node_id in living}
        self._place_encoders()
        self._ask_workers()
        self._tell_waiting()

    def _place_encoders(self) -> None:
        """Starts encoders where there is room, or gives all back while they are not wanted."""
        for worker in [worker for worker in self._workers if self._is_left_out(worker)]:
            if not any(task.worker is worker and task.kind == "encode" for task in self._running.values()):
                self._dismiss(worker)
        if not self.is_wanted:
            self._idle_since = time.monotonic()
            if not any(task.kind == "encode" for task in self._running.values()):
                for worker in [*self._workers]:
                    self._dismiss(worker)
            return
        held = Counter(worker.node.id for worker in self._workers if worker.node)
        room = {node.id: encoders_of(node, self._on_gpu, self._gpus_each) for node in self._nodes.values()}
        pending = [worker for worker in self._workers if worker.node is None]
        bound = self._bound or max(1, sum(room.values()))
        turns = [(turn, node) for node in self._nodes.values() for turn in range(held[node.id], room[node.id])]
        for _, node in sorted(turns, key=lambda each: each[0])[: max(0, bound - len(self._workers))]:
            self._add_encoder(node)
        # What the cluster has no room for stays asked for, so that one that can grow does.
        if self._address is not None and self._nodes and not pending and len(self._workers) < bound:
            for _ in range(bound - len(self._workers)):
                self._add_encoder(None)

    def _add_encoder(self, node: Node | None) -> None:
        """Starts an encoder on a node, or on the first that has room for it."""
        left_out = tuple(sorted(self._left_out))
        threads = group = decoders = None
        if self._on_gpu:
            cores: float = self._settings.decode_threads
            options: dict[str, Any] = {"num_gpus": self._gpus_each, "num_cpus": 1 if node and node.cores > 1 else 0}
            options |= on_node(node.id) if node else anywhere_but(left_out)
        else:
            # Half of each core is for the model and half for decoding; whichever is slower gets them from the system.
            threads, cores, group = cores_each(node) if node else 1, 0.5, share_of_node(node, left_out)
            own = 0.5 if threads == 1 else threads // 2
            decoders = int((threads - own) / cores)
            options = {"num_cpus": own, **within(group)}
        ray.method(concurrency_group="reached")(Encoder.reached)  # here: workers do not import Ray
        # Ours decides about retries, not Ray; how many segments an encoder has at once is decided here too.
        options |= {"max_concurrency": 1000, "concurrency_groups": {"reached": 1}, "max_restarts": 0}
        decoding = Decoding(self._settings, cores, group, left_out)
        handle = ray.remote(max_task_retries=0, **options)(Encoder).remote(self._settings, decoding)
        worker = _Worker(handle, node, group, decoders)
        self._workers.append(worker)
        self._submit(_Task("load", None, (threads,), worker))

    def _dismiss(self, worker: _Worker) -> None:
        """Gives a worker back to the cluster."""
        with contextlib.suppress(RayError):
            ray.kill(worker.handle)
            if worker.group is not None:
                remove_placement_group(worker.group)
        if worker in self._workers:
            self._workers.remove(worker)
        for reference in [reference for reference, task in self._running.items() if task.worker is worker]:
            if self._running[reference].kind == "load":
                del self._running[reference]
        if self.is_loading:
            self._idle_since = time.monotonic()
            self._has_told = False

    def _ask_workers(self) -> None:
        for worker in self._workers:
            if worker not in self._asked.values():
                self._asked[worker.handle.reached.remote()] = worker

    def _tell_waiting(self) -> None:
        """Says once what the job waits for; ends it where that takes too long.

        Raises:
            UnavailableError: no node can take part, or no encoder started in time.
        """
        looking = any(task.kind == "look" for task in self._running.values())
        if self._left_out and not self._nodes and not looking:
            raise UnavailableError(f"no node of the cluster at {self._address} can take part: see the lines above")
        if not self.is_loading or not self.is_wanted:
            return
        waited = time.monotonic() - self._idle_since
        needs = "a GPU" if self._on_gpu else "free cores"
        if any(worker.is_placed for worker in self._workers):
            return
        if waited > self._wait_seconds:
            raise UnavailableError(
                f"no encoder could start within {self._wait_seconds:g} seconds (--wait-for-resources): the cluster at "
                f"{self._address} has not had {needs}; what is committed stays, run the same command again"
            )
        if waited > PATIENCE_SECONDS and not self._has_told and self._address is not None:
            self._has_told = True
            self._announce(f"waiting for {needs} on the cluster at {self._address}; Ctrl-C gives up")

    def _try_again(self) -> None:
        """Gives out tasks whose worker was lost: on any worker, or a suspect alone on one."""
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            if task.kind == "examine" or any(self._free_slots(worker) > 0 for worker in self._seeing(task)):
                self._submit(task)
            else:
                self._waiting.append(task)
        for worker in self._workers:
            worker.is_for_suspects = worker.is_for_suspects and bool(self._load(worker))
        if not self._suspects:
            return
        if self._suspects[0].kind == "examine":
            self._submit(self._suspects.pop(0))
            return
        loaded = [worker for worker in self._workers if worker.is_loaded]
        if not loaded or any(worker.is_for_suspects for worker in loaded):
            return
        worker = min(loaded, key=self._load)
        worker.is_for_suspects = True
        if not self._load(worker):
            task = self._suspects.pop(0)
            task.worker = worker
            self._submit(task)

    def _submit(self, task: _Task) -> None:
        """Gives a task to Ray: a source or a node to any worker process, a segment to an encoder."""
        task.attempts += 1
        if task.kind == "look":
            looker = self._look_around.options(**on_node(task.key.id))
            reference = looker.remote(self._settings, *self._place, self._sources)
        elif task.kind == "examine":
            remote = self._examine.options(**anywhere_but([*self._left_out, *task.unseen_by]))
            reference = remote.remote(self._settings, *task.arguments)
        else:
            if task.worker is None:
                task.worker = max(self._seeing(task), key=self._free_slots)
            handle = task.worker.handle
            if task.kind == "load":
                reference = handle.load.remote(*task.arguments)
            else:
                reference = handle.encode.remote(*task.arguments, tuple(task.unseen_by))
        self._running[reference] = task

    def _collect(self, reference: Any) -> Outcome | None:
        task = self._running.pop(reference)
        try:
            with our_errors() if task.kind != "look" else contextlib.nullcontext():
                result = ray.get(reference)
        except RayTaskError as error:
            if task.kind == "look":
                self._leave_out(task.key, f"vidx does not run there: {first_line(error.cause or error)}")
                return None
            if task.kind == "load":
                raise
            sys.stderr.write(f"{error}\n")  # our own mistake: its traceback is shown, and the job goes on
            detail = f"{type(error.cause).__name__}: {error.cause}"
            return Outcome(_given_out(task), task.key, None, Problem(Reason.UNKNOWN, detail))
        except RayError as error:  # the worker, its node or its memory
            return self._after_death(task, error)
        if task.kind == "look":
            if why := why_left_out(result, self._here):
                self._leave_out(task.key, why)
            else:
                self._nodes[task.key.id] = task.key
                self._last_look = -math.inf  # it gets its encoders at once
            return None
        if task.kind == "load":
            assert task.worker is not None
            task.worker.is_loaded = True
            return None
        return self._unless_unseen(task, result)

    def _leave_out(self, node: Node, why: str) -> None:
        """Does without a node, and says so."""
        self._left_out.add(node.id)
        self._nodes.pop(node.id, None)
        self._announce(f"node {node.name} is left out: {why}")

    def _unless_unseen(self, task: _Task, result: Examined | Receipt) -> Outcome | None:
        """The outcome; a source that one node could not read is tried once more on another."""
        problem, part = result.problem, result.part if isinstance(result, Receipt) else None
        is_unseen = problem is not None and problem.reason in UNSEEN
        on_any_node = task.kind == "examine" or self._on_gpu
        places = {*self._nodes} if on_any_node else {worker.node.id for worker in self._workers if worker.node}
        others = places - self._left_out - {result.node}
        if is_unseen and result.node and others and not task.unseen_by and part is None:
            task.unseen_by.add(result.node)  # it may have been left out meanwhile
            task.attempts -= 1
            task.worker = None
            self._waiting.append(task)
            return None
        for blamed in () if is_unseen else task.unseen_by:
            self._unseen[blamed] += 1
            if self._unseen[blamed] >= MOST_UNSEEN and blamed in self._nodes:
                self._leave_out(self._nodes[blamed], f"it cannot read {MOST_UNSEEN} sources that other nodes can")
        return Outcome(_given_out(task), task.key, result, None)

    def _after_death(self, task: _Task, error: RayError) -> Outcome | None:
        """A worker died: what its node's end took with it is tried again; else the task is suspected, up to ATTEMPTS.

        Raises:
            ClusterError: the cluster died, or workers die while they load the model.
        """
        reason = first_line(error)
        if self._watch is not None and self._watch.is_gone():
            raise self._watch.error()
        if task.kind == "look":
            return None  # asked again at the next look, where the node lives
        worker = task.worker
        is_first = worker is not None and worker in self._workers  # of its tasks to notice
        if worker is not None and is_first:
            self._dismiss(worker)
        if task.kind == "load":
            self._count_death(worker, reason)
            return None
        task.worker = None
        if worker is not None and worker.node is not None and not _lives(worker.node):
            task.attempts -= 1
            self._waiting.append(task)
            return None
        if task.attempts < ATTEMPTS:
            self._suspects.append(task)
            return None
        detail = f"the worker process died {ATTEMPTS} times on it: {reason}"
        return Outcome(_given_out(task), task.key, None, Problem(Reason.WORKER_LOST, detail))

    def _count_death(self, worker: _Worker | None, reason: str) -> None:
        """An encoder died while it loaded its model: after ATTEMPTS its node is left out.

        Raises:
            ClusterError: there is no other node.
        """
        node = worker.node if worker is not None else None
        if node is not None and not _lives(node):
            return
        self._deaths[node.id if node else ""] += 1
        if self._deaths[node.id if node else ""] < ATTEMPTS:
            return
        if node is not None and len(self._nodes) > 1:
            self._leave_out(node, f"workers die there while they load the model: {reason}")
            return
        where = f"the cluster at {self._address}" if self._address else "this machine"
        raise ClusterError(
            f"workers on {where} die while they load the model: {reason} Check their memory and that every node "
            "has this version of vidx and Ray; a cluster without authentication needs RAY_AUTH_MODE=disabled"
        )


def _given_out(task: _Task) -> Literal["examine", "encode"]:
    return "examine" if task.kind == "examine" else "encode"


def _lives(node: Node) -> bool:
    return any(other.id == node.id for other in living_nodes())
