"""Indexing of one segment, without Ray: encode its frames, which may come from another process, and write its part."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager

from storage.parts.write import FrameColumns, PartWriter
from storage.records import FrameBatch, Probe, Problem, Reason, Receipt, SegmentTask
from workers.decode.client import RETRIED
from workers.frame_stream import Decoded, FrameStream, in_batches
from workers.vision.encode import encode_frames
from workers.vision.llava_mini import VisionPart


def index_segment(
    task: SegmentTask,
    decode: Callable[[SegmentTask], FrameStream],
    model: VisionPart,
    model_turn: AbstractContextManager,
    frames_uri: str,
    batch: int,
    thumbnails: bool = True,
    reached: Callable[[float, int], None] = lambda position_seconds, frame_count: None,
) -> Receipt:
    """Indexes one segment and writes its rows as one part; nothing is committed.

    If the decoder hangs or crashes, the segment is indexed once more from its start.

    Args:
        task: the segment.
        decode: starts decoding it: frames as workers.frame_stream.decode_segment gives them. Closing the iterator ends
            that.
        model: may be shared with other tasks.
        model_turn: a lock that is held while the model computes, so that other segments can be decoded meanwhile.
        frames_uri: the archive's frames table.
        batch: frames per forward pass; the same number gives the same rows again.
        thumbnails: store a small JPEG of each frame.
        reached: called after each batch with the position in seconds and the number of frames done.
    Returns:
        What was written, and the problem of the segment if it is not whole.
    Raises:
        ArchiveError: the part cannot be written.
    """
    receipt = _attempt(task, decode, model, model_turn, frames_uri, batch, thumbnails, reached)
    if receipt.problem is not None and receipt.problem.reason in RETRIED:
        if receipt.part is not None:
            PartWriter.discard(frames_uri, receipt.part)
        receipt = _attempt(task, decode, model, model_turn, frames_uri, batch, thumbnails, reached)
    return receipt


def _attempt(
    task: SegmentTask,
    decode: Callable[[SegmentTask], FrameStream],
    model: VisionPart,
    model_turn: AbstractContextManager,
    frames_uri: str,
    batch: int,
    thumbnails: bool,
    reached: Callable[[float, int], None],
) -> Receipt:
    writer = PartWriter(
        frames_uri,
        video_id=task.content.video_id,
        video_number=task.video_number,
        segment_key=task.segment.key,
        time_base=task.probe.time_base,
        model_id=model.bundle.model_id,
        sampling=str(task.sampling),
        dtype=str(model.dtype).removeprefix("torch."),
        folder=task.folder,
    )
    clock = _Clock()
    ended, frame_count, end_seconds = Decoded(None, task.probe.decoder), 0, None
    unfit: list[tuple[float, str]] = []  # frames that cannot be stored: their times, and why
    try:
        with closing(in_batches(decode(task), batch)) as batches:
            for frames in clock.iterate("decode", batches):
                if isinstance(frames, Decoded):
                    ended = frames
                    break
                with model_turn, clock.measure("encode"):
                    encoded = encode_frames(model, frames.pixels, task.sampling.patches)
                with clock.measure("store"):
                    kept = frames.take(encoded.places) if encoded.unfit else frames
                    pictures = kept.thumbnails if thumbnails else [b""] * len(kept)
                    writer.append(_columns(task.probe, kept), encoded.tokens, pictures)
                frame_count += len(kept)
                end_seconds = float(task.probe.time_seconds(int(frames.end_ticks[-1])))
                unfit += [(float(task.probe.time_seconds(frames.ticks[at])), why) for at, why in encoded.unfit.items()]
                reached(end_seconds, frame_count)
        problem = ended.problem
        if unfit:
            problem = _with_left_out(problem, unfit, frame_count)
        if problem is not None and problem.reason is Reason.CHANGED:
            writer.abort()  # its rows may come from two different contents
            part, frame_count, end_seconds = None, 0, None
        else:
            with clock.measure("store"):
                part = writer.close(problem)
    except BaseException:
        writer.abort()
        raise
    return Receipt(
        segment=task.segment,
        video_number=task.video_number,
        part=part,
        problem=problem,
        decoder=ended.decoder,
        sandbox_missing=ended.sandbox_missing,
        frame_count=frame_count,
        decode_seconds=clock.seconds["decode"],
        encode_seconds=clock.seconds["encode"],
        store_seconds=clock.seconds["store"],
        end_seconds=end_seconds,
        node=ended.node,
    )


def _with_left_out(problem: Problem | None, unfit: Sequence[tuple[float, str]], stored_count: int) -> Problem:
    """The problem of a segment from which frames are left out, joined with the problem that it has already."""
    (seconds, why), count = min(unfit), len(unfit)
    detail = f"{count} of {count + stored_count} frames are left out, the first at {seconds:.3f} s: {why}"
    if problem is None:
        return Problem(Reason.OVERFLOW, detail)
    return Problem(problem.reason, f"{problem.detail}; {detail}")


def _columns(probe: Probe, frames: FrameBatch) -> FrameColumns:
    pts_seconds = probe.pts_seconds(frames.ticks)
    return FrameColumns(
        ticks=frames.ticks,
        frame_index=frames.frame_index,
        pts_seconds=pts_seconds,
        time_seconds=probe.time_seconds(frames.ticks),
        duration_seconds=probe.pts_seconds(frames.end_ticks) - pts_seconds,
    )


class _Clock:
    """Seconds spent on each step: waiting for the decoder, computing, writing."""

    def __init__(self):
        self.seconds = dict.fromkeys(("decode", "encode", "store"), 0.0)

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start

    def iterate(self, step: str, batches: Iterator[FrameBatch | Decoded]) -> Iterator[FrameBatch | Decoded]:
        while True:
            with self.measure(step):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
