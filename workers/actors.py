"""What runs as Ray tasks and actors: `examine` probes sources, `decode` gives frames, Encoder indexes segments."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from storage.errors import ClusterError, VideoProblem
from storage.files import file_path
from storage.processes import usable_cores
from storage.records import Choice, Content, Probe, Problem, Receipt, SegmentTask
from workers.decode.client import RETRIED, Decoder, check_choice
from workers.frame_stream import FrameStream, decode_segment
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify

if TYPE_CHECKING:
    from workers.vision.llava_mini import VisionPart

PARENT_SECONDS = 1.0  # between two checks that the parent process is alive


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a job's workers."""

    frames_uri: str
    model: str
    tower: str | None
    device: str
    dtype: str
    batch: int
    max_pixels: int
    decode_threads: int
    timeout_seconds: float
    choice: Choice
    thumbnails: bool
    decoder: str
    strict_sandbox: bool

    def new_decoder(self) -> Decoder:
        """A Decoder with these settings; its process starts when it is first used."""
        options = (self.choice, self.decoder, self.strict_sandbox)
        return Decoder(self.max_pixels, self.timeout_seconds, self.decode_threads, *options)


@dataclass(frozen=True)
class Examined:
    """What is known of a source after it was probed.

    Attributes:
        content: None where the file could not be read.
        probe: None where it has no video stream that can be decoded.
        problem: why one of them is None.
        sandbox_missing: the steps of the sandbox (sandbox.STEPS) that the decoder's machine did not allow.
        node: id of the cluster's node that probed it.
    """

    content: Content | None
    probe: Probe | None
    problem: Problem | None
    sandbox_missing: tuple[str, ...] = ()
    node: str = ""


def examine(settings: WorkerSettings, uri: str, content: Content | None) -> Examined:
    """Hashes and probes one source.

    Args:
        settings: of the job.
        uri: of the source.
        content: known already if the caller has hashed the file.
    """
    with _decoder_of(settings) as decoder:
        path = file_path(uri)
        try:
            content = content or identify(path, _hashes())
            return Examined(content, _probe(decoder, path), None, decoder.sandbox_missing)
        except VideoProblem as error:
            return Examined(content, None, Problem(error.reason, error.detail), decoder.sandbox_missing)


def _probe(decoder: Decoder, path: bytes) -> Probe:
    try:
        return decoder.probe(path)
    except VideoProblem as error:
        if error.reason not in RETRIED:
            raise
    return decoder.probe(path)


def decode(settings: WorkerSettings, task: SegmentTask) -> FrameStream:
    """A segment's frames and how that ended, as workers.frame_stream.decode_segment gives them."""
    with _decoder_of(settings) as decoder:
        yield from decode_segment(task, decoder, settings.batch)


@cache
def _hashes() -> HashCache:
    return HashCache()


_decoders: dict[WorkerSettings, list[Decoder]] = {}  # of this process, that nobody uses


@contextmanager
def _decoder_of(settings: WorkerSettings) -> Iterator[Decoder]:
    """A decoder for one task; the processes that read files are kept for the next one."""
    _die_with_parent()
    free = _decoders.setdefault(settings, [])
    decoder = free.pop() if free else settings.new_decoder()
    try:
        yield decoder
    finally:
        free.append(decoder)


class Encoder:
    """A loaded model. Several segments take turns at it; each is written while others are computed."""

    def __init__(self, settings: WorkerSettings, decode: Callable[..., FrameStream]):
        """An encoder without its model yet.

        Args:
            settings: the job's.
            decode: (segment task, unseen_by) -> the segment's frames, decoded here or elsewhere.
        """
        _die_with_parent()
        self._settings = settings
        self._decode = decode
        self._vision: VisionPart | None = None
        self._loading = threading.Lock()
        self._model_turn = threading.Lock()
        self._reached: dict[tuple[int, str], tuple[float, int]] = {}

    def load(self, threads: int | None) -> None:
        """Loads the model; a second call does nothing.

        The constructor does not load it, because Ray wraps a constructor's errors. Nothing is returned, because Ray
        would send it to the job.

        Args:
            threads: of the model on a CPU; None for all cores that this process may use.
        Raises:
            UsageError: the model cannot be loaded, or PySceneDetect is needed and not installed.
        """
        check_choice(self._settings.choice)
        with self._loading:
            if self._vision is None:
                self._vision = _load_vision(self._settings, threads)

    def encode(self, task: SegmentTask, unseen_by: tuple[str, ...] = ()) -> Receipt:
        """Indexes one segment: has it decoded, encodes it, and writes its part.

        Args:
            task: the segment.
            unseen_by: ids of nodes that cannot read its source.
        Raises:
            ClusterError: the worker ran out of memory.
        """
        from workers.segment import index_segment  # after loading: transformers' lazy imports are not thread-safe

        assert self._vision is not None
        settings = self._settings
        stored = (settings.frames_uri, settings.batch, settings.thumbnails)
        key = task.video_number, task.segment.key

        def reached(position_seconds: float, frame_count: int) -> None:
            self._reached[key] = position_seconds, frame_count

        try:
            decode = partial(self._decode, unseen_by=unseen_by)
            return index_segment(task, decode, self._vision, self._model_turn, *stored, reached)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ClusterError(
                f"a worker ran out of memory at --batch {settings.batch}; finished segments are committed; run the "
                "same command again with a smaller --batch to continue"
            ) from error
        finally:
            self._reached.pop(key, None)

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """Progress of the segments at work: (video number, segment key) -> (position in seconds, frames done)."""
        return dict(self._reached)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or a GPU."""
    import torch
    # On a CPU torch raises a plain RuntimeError.

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@cache
def _die_with_parent() -> None:
    """Ends this process when the raylet that started it dies; Ray alone ends a busy worker too late."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load_vision(settings: WorkerSettings, threads: int | None) -> "VisionPart":
    import torch  # not at the top: decoders and the driver do not need it

    from workers.models.bundle import find_bundle
    from workers.vision.llava_mini import load_vision

    if settings.device == "cpu":
        torch.set_num_threads(threads or usable_cores())
    return load_vision(find_bundle(settings.model, settings.tower), settings.device, settings.dtype)
