"""The nodes of a cluster: what each has, whether it can take part in a job, and where encoders go."""

import hashlib
import os
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from storage.errors import VidxError
from storage.files import exists, file_path, join, source_text
from workers.actors import WorkerSettings

T = TypeVar("T")
CORES_EACH = 8  # of an encoder on CPUs: on more, one forward pass gets hardly faster
SOURCES_ASKED = 8  # of the job, that each node looks for


@dataclass(frozen=True)
class Node:
    """A living node.

    Attributes:
        id: Ray's.
        name: its host and address, for people.
        cores, gpus: that Ray may use there.
    """

    id: str
    name: str
    cores: float
    gpus: float


@dataclass(frozen=True)
class NodeFacts:
    """What a node sees and runs.

    Attributes:
        versions: of Python, torch and vidx's code, by name.
        lacks: what it cannot see of the archive and the model, for people; empty where it sees them.
        sources: of the sources asked for, those that it can read.
    """

    versions: dict[str, str]
    lacks: str
    sources: frozenset[str]


def living_nodes() -> list[Node]:
    """The nodes of the cluster, in a steady order."""
    found = [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.id)


def in_background(call: Callable[[], T]) -> Future[T]:
    """The result of a call that may block for a minute, as Ray's do when a head has died; this process does not."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def encoders_of(node: Node, on_gpu: bool, gpus_each: float) -> int:
    """How many encoders a node has room for: by its GPUs, or one for each CORES_EACH cores and one on smaller nodes."""
    if on_gpu:
        return int(node.gpus / gpus_each + 1e-9)
    return max(1, int(node.cores) // CORES_EACH) if node.cores > 0 else 0


def cores_each(node: Node) -> int:
    """Cores that each encoder of a node has on CPUs, together with its decoders."""
    return max(1, int(node.cores) // max(1, encoders_of(node, False, 1.0)))


def look_around(settings: WorkerSettings, archive_uri: str, job_uri: str, sources: Sequence[str]) -> NodeFacts:
    """What this node sees and runs; called on each node of a job.

    Args:
        settings: the job's.
        archive_uri: the folder of its archive.
        job_uri: the job's file in it; an archive without it is another one with the same path.
        sources: some of its sources.
    """
    lacks = ""
    if not exists(job_uri):
        is_other = exists(join(archive_uri, "archive.json"))
        lacks = f"the archive {source_text(archive_uri)}{', which is another folder there' if is_other else ''}"
    else:
        from workers.models.bundle import find_bundle

        try:
            find_bundle(settings.model, settings.tower)
        except VidxError as error:
            lacks = f"the model ({error})"
    return replace(look_here(sources), lacks=lacks)


@cache
def versions_here() -> dict[str, str]:
    """Versions of what decides about the rows that a worker writes."""
    return {"Python": platform.python_version(), "torch": _version("torch"), "vidx": _code_digest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _code_digest() -> str:
    """A short digest of the installed code: two checkouts of one version may differ."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("storage", "workers", "pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def why_left_out(facts: NodeFacts, here: NodeFacts) -> str:
    """Why a node cannot take part, compared with what the driver sees and runs; empty where it can."""
    if facts.lacks:
        return f"it cannot see {facts.lacks}"
    for name, wanted in here.versions.items():
        if (found := facts.versions.get(name, "none")) != wanted:
            return f"it runs {name} {found}, and this job {wanted}"
    if here.sources and not facts.sources:
        return f"it can read none of {len(here.sources)} sources, such as {source_text(min(here.sources))}"
    return ""


def look_here(sources: Sequence[str]) -> NodeFacts:
    """What the driver sees and runs."""
    seen = frozenset(uri for uri in sources if os.access(file_path(uri), os.R_OK))
    return NodeFacts(versions_here(), "", seen)


def some_of(sources: Sequence[str]) -> list[str]:
    """A few sources, evenly spread."""
    step = max(1, len(sources) // SOURCES_ASKED)
    return list(sources[::step][:SOURCES_ASKED])


def on_node(node_id: str) -> dict[str, Any]:
    """Ray's options for what runs on one node and nowhere else."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def anywhere_but(node_ids: Sequence[str]) -> dict[str, Any]:
    """Ray's options for what is spread over all nodes but some."""
    selector = {"label_selector": _not(node_ids)} if node_ids else {}
    return {"scheduling_strategy": "SPREAD", **selector}


def share_of_node(node: Node | None, left_out: Sequence[str]) -> PlacementGroup:
    """Cores for one encoder and its decoders together, on a node, or on any but some; Ray waits until they are free.

    Encoders of two jobs could otherwise take all cores, and leave none to the decoders that both wait for.
    """
    selector = {"ray.io/node-id": node.id} if node else _not(left_out) if left_out else {}
    return placement_group([{"CPU": cores_each(node) if node else 1}], bundle_label_selector=[selector])


def within(group: PlacementGroup) -> dict[str, Any]:
    """Ray's options for what runs on reserved cores."""
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}


def _not(node_ids: Sequence[str]) -> dict[str, str]:
    return {"ray.io/node-id": f"!in({','.join(sorted(node_ids))})"}
