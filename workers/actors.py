"""The thin Ray shells around probing and encoding; all work is done by the modules they call."""

import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import ClusterError, VideoProblem
from storage.files import file_path
from storage.records import Choice, Content, Probe, Problem, Receipt, SegmentTask
from workers.decode.client import RETRIED, Decoder, check_choice
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify

if TYPE_CHECKING:
    from workers.vision.llava_mini import VisionPart

PARENT_SECONDS = 1.0  # between two looks at whether the parent lives
SEGMENTS_AT_ONCE = 2  # per encoder: one decodes while the other encodes


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a job is started with."""

    frames_uri: str
    model: str
    tower: str | None
    device: str
    dtype: str
    batch: int
    threads: int
    max_pixels: int
    decode_threads: int
    timeout_seconds: float
    choice: Choice
    thumbnails: bool
    decoder: str
    strict_sandbox: bool

    def new_decoder(self) -> Decoder:
        """A decoder process of its own for one user at a time."""
        how = (self.choice, self.decoder, self.strict_sandbox)
        return Decoder(self.max_pixels, self.timeout_seconds, self.decode_threads, *how)


@dataclass(frozen=True)
class Examined:
    """A source after its first look: its content where that could be read, its stream where it has one.

    sandbox_missing names what the process that looked was not kept from.
    """

    content: Content | None
    probe: Probe | None
    problem: Problem | None
    sandbox_missing: tuple[str, ...] = ()


class Examiner:
    """Hashes and probes sources, one at a time."""

    def __init__(self, settings: WorkerSettings):
        _die_with_parent()
        self._decoder = settings.new_decoder()
        self._hashes = HashCache()

    def examine(self, uri: str, content: Content | None) -> Examined:
        """Identity and stream of one source; content is given where the caller has hashed it already."""
        path = file_path(uri)
        try:
            content = content or identify(path, self._hashes)
            probe = self._probe(path)
            return Examined(content, probe, None, self._decoder.sandbox_missing)
        except VideoProblem as error:
            return Examined(content, None, Problem(error.reason, error.detail), self._decoder.sandbox_missing)

    def _probe(self, path: bytes) -> Probe:
        try:
            return self._decoder.probe(path)
        except VideoProblem as error:
            if error.reason not in RETRIED:
                raise
        return self._decoder.probe(path)


class Encoder:
    """Owns a model and as many decoders as segments run at once."""

    def __init__(self, settings: WorkerSettings):
        _die_with_parent()
        self._settings = settings
        self._vision: VisionPart | None = None
        self._loading = threading.Lock()
        self._model_turn = threading.Lock()
        self._reached: dict[tuple[int, str], tuple[float, int]] = {}
        self._decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for _ in range(SEGMENTS_AT_ONCE):
            self._decoders.put(settings.new_decoder())

    def load(self) -> None:
        """Loads the model, once; not in the constructor, so that its errors reach the job as they are.

        Raises:
            UsageError: the model cannot be loaded, or what finds scenes is not installed.
        """
        self._loaded()  # it stays here: what is returned goes to the job

    def _loaded(self) -> "VisionPart":
        check_choice(self._settings.choice)
        with self._loading:
            if self._vision is None:
                self._vision = _load_vision(self._settings)
            return self._vision

    def encode(self, task: SegmentTask) -> Receipt:
        """One segment: decode, encode, write its part.

        Raises:
            UsageError: as `load`.
            ClusterError: there is not the memory for it.
        """
        vision = self._loaded()
        from workers.segment import index_segment  # after it: transformers' lazy imports do not bear two threads

        settings = self._settings
        stored = (settings.frames_uri, settings.batch, settings.thumbnails)
        key = task.video_number, task.segment.key

        def reached(position_seconds: float, frame_count: int) -> None:
            self._reached[key] = position_seconds, frame_count

        with self._borrowed_decoder() as decoder:
            try:
                return index_segment(task, decoder, vision, self._model_turn, *stored, reached)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise ClusterError(
                    f"a worker has not the memory for {settings.batch} frames at once; what was finished is committed, "
                    "run the same command again with a smaller --batch to go on"
                ) from error
            finally:
                self._reached.pop(key, None)

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """The position that each segment at work has come to, and its frames, by video number and segment key."""
        return dict(self._reached)

    @contextmanager
    def _borrowed_decoder(self) -> Iterator[Decoder]:
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, here or on a GPU; on a CPU torch has no class of its own for it."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _die_with_parent() -> None:
    """Ends this process when the raylet that started it dies, which Ray leaves to a busy worker to notice."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load_vision(settings: WorkerSettings) -> "VisionPart":
    import torch  # here, so that examiners and the driver stay light

    from workers.models.bundle import find_bundle
    from workers.vision.llava_mini import load_vision

    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    return load_vision(find_bundle(settings.model, settings.tower), settings.device, settings.dtype)
