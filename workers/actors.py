"""The classes that run as Ray actors: Examiner probes sources, Encoder indexes segments."""

import os
import queue
import threading
import time
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

PARENT_SECONDS = 1.0  # between two checks that the parent process is alive
SEGMENTS_AT_ONCE = 2  # per encoder: one is decoded while the other is encoded


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a job's workers."""

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
        """Hashes and probes one source.

        Args:
            content: known already if the caller has hashed the file.
        """
        path = file_path(uri)
        try:
            content = content or identify(path, self._hashes)
            try:
                probe = self._decoder.probe(path)
            except VideoProblem as error:
                if error.reason not in RETRIED:
                    raise
                probe = self._decoder.probe(path)
            return Examined(content, probe, None, self._decoder.sandbox_missing)
        except VideoProblem as error:
            return Examined(content, None, Problem(error.reason, error.detail), self._decoder.sandbox_missing)


class Encoder:
    """A loaded model, and one decoder for each segment that is indexed at once."""

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
        """Loads the model; a second call does nothing.

        The constructor does not load it, because Ray wraps a constructor's errors. Nothing is returned, because Ray
        would send it to the job.

        Raises:
            UsageError: the model cannot be loaded, or PySceneDetect is needed and not installed.
        """
        self._loaded()

    def _loaded(self) -> "VisionPart":
        check_choice(self._settings.choice)
        with self._loading:
            if self._vision is None:
                import torch  # not at the top: examiners and the driver do not need it

                from workers.models.bundle import find_bundle
                from workers.vision.llava_mini import load_vision

                settings = self._settings
                if settings.device == "cpu":
                    torch.set_num_threads(settings.threads)
                bundle = find_bundle(settings.model, settings.tower)
                self._vision = load_vision(bundle, settings.device, settings.dtype)
            return self._vision

    def encode(self, task: SegmentTask) -> Receipt:
        """Indexes one segment: decodes and encodes it, and writes its part.

        Raises:
            UsageError: as `load`.
            ClusterError: the worker ran out of memory.
        """
        vision = self._loaded()
        from workers.segment import index_segment  # after loading: transformers' lazy imports are not thread-safe

        settings = self._settings
        stored = (settings.frames_uri, settings.batch, settings.thumbnails)
        key = task.video_number, task.segment.key

        def reached(position_seconds: float, frame_count: int) -> None:
            self._reached[key] = position_seconds, frame_count

        decoder = self._decoders.get()
        try:
            return index_segment(task, decoder, vision, self._model_turn, *stored, reached)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ClusterError(
                f"a worker ran out of memory at --batch {settings.batch}; finished segments are committed; run the "
                "same command again with a smaller --batch to continue"
            ) from error
        finally:
            self._decoders.put(decoder)
            self._reached.pop(key, None)

    def reached(self) -> dict[tuple[int, str], tuple[float, int]]:
        """Progress of the segments at work: (video number, segment key) -> (position in seconds, frames done)."""
        return dict(self._reached)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or a GPU."""
    import torch
    # On a CPU torch raises a plain RuntimeError.

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _die_with_parent() -> None:
    """Ends this process when the raylet that started it dies; Ray alone ends a busy worker too late."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
