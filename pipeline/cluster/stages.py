"""The stages of a job as Ray runs them: tasks that probe and decode, whose results say which node they ran on."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from pipeline.cluster.connect import first_line, our_errors
from pipeline.cluster.nodes import anywhere_but, within
from storage.records import Content, FrameBatch, Problem, Reason, SegmentTask
from workers import actors
from workers.actors import Examined, WorkerSettings
from workers.frame_stream import Decoded, FrameStream

BATCHES_AHEAD = 2  # that a decoder makes before its encoder takes one: with the two at work 44 MB


def examine_source(settings: WorkerSettings, uri: str, content: Content | None) -> Examined:
    """As workers.actors.examine, on whatever node Ray runs it."""
    return replace(actors.examine(settings, uri, content), node=_this_node())


def decode_frames(settings: WorkerSettings, task: SegmentTask) -> Generator[FrameBatch | Decoded, None, None]:
    """As workers.actors.decode, on whatever node Ray runs it."""
    with contextlib.closing(actors.decode(settings, task)) as frames:
        for piece in frames:
            yield replace(piece, node=_this_node()) if isinstance(piece, Decoded) else piece


def _this_node() -> str:
    return ray.get_runtime_context().get_node_id()


@dataclass(frozen=True)
class Decoding:
    """Has segments decoded by tasks of the cluster; an encoder calls it.

    The frames come through Ray's object store. A decoder waits while BATCHES_AHEAD of its batches wait.

    Attributes:
        settings: of the job.
        cores: that a task books.
        group: the cores that were reserved for the encoder and its decoders; None where these run on any node.
        left_out: ids of nodes that take no part.
    """

    settings: WorkerSettings
    cores: float
    group: PlacementGroup | None
    left_out: tuple[str, ...]

    def __call__(self, task: SegmentTask, unseen_by: tuple[str, ...] = ()) -> FrameStream:
        """The segment's frames and how that ended; closing the iterator ends the decoding.

        Args:
            task: the segment.
            unseen_by: nodes that cannot read its source.
        """
        options: dict[str, Any] = {"num_returns": "streaming", "max_retries": 0, "num_cpus": self.cores}
        options |= within(self.group) if self.group else anywhere_but([*self.left_out, *unseen_by])
        options["_generator_backpressure_num_objects"] = BATCHES_AHEAD
        decorator: Any = ray.remote(**options)
        remote = decorator(decode_frames)
        references = remote.remote(self.settings, task)
        try:
            for reference in references:
                with our_errors():
                    piece = ray.get(reference)
                yield piece
        except RayTaskError:
            raise
        except RayError as error:
            detail = f"the process that decoded it, or its node, died: {first_line(error)}"
            yield Decoded(Problem(Reason.WORKER_LOST, detail), task.probe.decoder)
        finally:
            ray.cancel(references)
