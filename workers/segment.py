"""One segment from file to Parquet part: decode -> encode -> store, without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from storage.errors import VideoProblem
from storage.files import file_path
from storage.parts.write import FrameColumns, PartWriter
from storage.records import FrameBatch, Probe, Problem, Reason, Receipt, SegmentTask
from workers.decode.client import RETRIED, Decoder
from workers.sources.identity import check_unchanged
from workers.vision.encode import encode_frames
from workers.vision.llava_mini import VisionPart


def index_segment(
    task: SegmentTask,
    decoder: Decoder,
    model: VisionPart,
    model_turn: AbstractContextManager,
    frames_uri: str,
    batch: int,
    thumbnails: bool = True,
    reached: Callable[[float, int], None] = lambda position_seconds, frame_count: None,
) -> Receipt:
    """Writes the segment's rows as one part and says what became of it; nothing is committed.

    Args:
        task: what to index.
        decoder: this task's own until the function returns.
        model: a workers.vision.llava_mini.VisionPart, shared with other tasks.
        model_turn: a lock held while the model computes, so that decoding of one segment overlaps encoding of another.
        frames_uri: the archive's frames table.
        batch: frames per forward pass; fixed, so that the same segment gives the same rows again.
        thumbnails: keep a small JPEG of each frame.
        reached: is told after each batch the position at which it ends, and how many frames are done.
    Raises:
        ArchiveError: the part cannot be written.
    """
    receipt = _attempt(task, decoder, model, model_turn, frames_uri, batch, thumbnails, reached)
    # Once more from the segment's start, and what came out before is kept the second time.
    if receipt.problem is not None and receipt.problem.reason in RETRIED:
        if receipt.part is not None:
            PartWriter.discard(frames_uri, receipt.part)
        receipt = _attempt(task, decoder, model, model_turn, frames_uri, batch, thumbnails, reached)
    return receipt


def _attempt(
    task: SegmentTask,
    decoder: Decoder,
    model: VisionPart,
    model_turn: AbstractContextManager,
    frames_uri: str,
    batch: int,
    thumbnails: bool,
    reached: Callable[[float, int], None],
) -> Receipt:
    path = file_path(task.uri)
    writer = PartWriter(
        frames_uri,
        video_id=task.content.video_id,
        video_number=task.video_number,
        segment_key=task.segment.key,
        time_base=task.probe.time_base,
        model_id=model.bundle.model_id,
        sampling=str(task.sampling),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    clock = _Clock()
    decoder.library = task.probe.decoder
    problem, frame_count, end_seconds = None, 0, None
    unfit: list[tuple[float, str]] = []  # frames that are left out: when they are shown, and why
    try:
        try:
            check_unchanged(path, task.content)
            sampling = task.sampling
            batches = decoder.decode(path, task.probe, task.segment, sampling.fps, batch, sampling.choice)
            for frames in clock.iterate("decode", batches):
                with model_turn, clock.measure("encode"):
                    encoded = encode_frames(model, frames, sampling.patches)
                with clock.measure("store"):
                    kept = frames.take(encoded.places) if encoded.unfit else frames
                    pictures = kept.thumbnails if thumbnails else [b""] * len(kept)
                    writer.append(_columns(task.probe, kept), encoded.tokens, pictures)
                frame_count += len(kept)
                end_seconds = float(task.probe.time_seconds(int(frames.end_ticks[-1])))
                unfit += [(float(task.probe.time_seconds(frames.ticks[at])), why) for at, why in encoded.unfit.items()]
                reached(end_seconds, frame_count)
            check_unchanged(path, task.content)
        except VideoProblem as error:
            problem = Problem(error.reason, error.detail)
        if unfit:
            problem = _with_left_out(problem, unfit, frame_count)
        if problem is not None and problem.reason is Reason.CHANGED:
            writer.abort()  # rows of two contents under one identity would be wrong
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
        decoder=decoder.library,
        sandbox_missing=decoder.sandbox_missing,
        frame_count=frame_count,
        decode_seconds=clock.seconds["decode"],
        encode_seconds=clock.seconds["encode"],
        store_seconds=clock.seconds["store"],
        end_seconds=end_seconds,
    )


def _with_left_out(problem: Problem | None, unfit: Sequence[tuple[float, str]], stored_count: int) -> Problem:
    """A segment's problem, where it has one besides, and that frames are missing whose numbers cannot be stored."""
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
    """Seconds spent waiting for the decoder, computing, and writing, apart."""

    def __init__(self):
        self.seconds = dict.fromkeys(("decode", "encode", "store"), 0.0)

    def measure(self, step: str) -> "_Stopwatch":
        return _Stopwatch(self.seconds, step)

    def iterate(self, step: str, batches: Iterator[FrameBatch]) -> Iterator[FrameBatch]:
        while True:
            with self.measure(step):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class _Stopwatch:
    def __init__(self, seconds: dict[str, float], step: str):
        self.seconds, self.step = seconds, step

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self.step] += time.perf_counter() - self.start
