"""The frames of one segment on their way from a decoder to an encoder, which may be processes on different machines."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from storage.errors import VideoProblem
from storage.files import file_path
from storage.records import FrameBatch, Problem, SegmentTask, join_frames
from workers.decode.client import Decoder
from workers.sources.identity import check_unchanged

MOST_FRAMES = 32  # that travel from a decoder to an encoder at once: 11 MB


@dataclass(frozen=True)
class Decoded:
    """The end of a segment's frames.

    Attributes:
        problem: why the segment is not whole; None where it is.
        decoder: the library that decoded it.
        sandbox_missing: what the decoder's process was not kept from.
        node: id of the cluster's node that decoded it; empty where there is no cluster.
    """

    problem: Problem | None
    decoder: str
    sandbox_missing: tuple[str, ...] = ()
    node: str = ""


FrameStream = Generator[FrameBatch | Decoded, None, None]


def decode_segment(task: SegmentTask, decoder: Decoder, batch: int) -> FrameStream:
    """The segment's frames, at most MOST_FRAMES at a time, and then how that ended.

    Args:
        task: what to decode.
        decoder: this task's own until the iterator ends.
        batch: frames per forward pass.
    """
    path, sampling, problem = file_path(task.uri), task.sampling, None
    decoder.library = task.probe.decoder
    try:
        check_unchanged(path, task.content)
        at_once = min(batch, MOST_FRAMES)
        yield from decoder.decode(path, task.probe, task.segment, sampling.fps, at_once, sampling.choice)
        check_unchanged(path, task.content)
    except VideoProblem as error:
        problem = Problem(error.reason, error.detail)
    yield Decoded(problem, decoder.library, decoder.sandbox_missing)


def in_batches(frames: FrameStream, batch: int) -> FrameStream:
    """The same frames, `batch` at a time whatever pieces they come in, and the end."""
    waiting: list[FrameBatch] = []
    with closing(frames):
        for piece in frames:
            if isinstance(piece, Decoded):
                if waiting:
                    yield join_frames(waiting)
                yield piece
                return
            room = batch - sum(map(len, waiting))
            if len(piece) <= room:
                waiting.append(piece)
            else:
                places = np.arange(len(piece))
                waiting.append(piece.take(places[:room]))
                yield join_frames(waiting)
                waiting = [piece.take(places[room:])]
            if sum(map(len, waiting)) == batch:
                yield join_frames(waiting)
                waiting = []
