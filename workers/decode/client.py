"""The Decoder: asks a decoder process for the frames of a video.

Only that process loads a decoder library. So a file that hangs or crashes the library does not harm the job.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from itertools import islice, pairwise
from typing import Any

import numpy as np

from storage.errors import UsageError, VideoProblem
from storage.records import FRAME_SIDE, Choice, FrameBatch, Probe, Reason, Segment
from workers.child_process import ChildProcess
from workers.protocol import Closed, probe_from_json, probe_to_json, send
from workers.sandbox import STEPS, missing_here, told
from workers.sources.identity import open_source

FRAME_BYTES = FRAME_SIDE * FRAME_SIDE * 3
FRAMES_AHEAD = 64  # the most decoded frames (22 MB) that wait for the consumer
# Limits of processor time. A second of HD video takes about a hundredth of this.
BUSY_SECONDS_PER_SECOND = 10
HD_PIXELS = 1920 * 1080
PADDING_PIXELS = 128  # FFmpeg pads each side of a picture (800 to 832, for instance) before it checks its limit
LEAST_BYTES_PER_SECOND = 2_000  # a file of a given size holds no more seconds than this allows, whatever it says
PROBED_BYTES_PER_SECOND = 1_000_000
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "AV_LOG_FORCE_NOCOLOR": "1"}
# After these reasons a video is tried once more, in a new process. If that fails too, the file is to blame.
RETRIED = (Reason.TIMEOUT, Reason.CRASHED, Reason.WORKER_LOST)


class Decoder:
    """One decoder process, started when it is first needed and again after a hang or crash; a context manager.

    It serves one caller at a time: a new call ends an earlier one that is not finished.

    Args:
        max_pixels: a video with larger frames is TOO_LARGE; its frames are not decoded.
        timeout_seconds: the process is killed after this time without progress, and the video fails with TIMEOUT.
            Processor time is limited too, by the length of what is decoded.
        threads: of the codec; any number gives the same frames.
        choice: SCENES lets the process load PySceneDetect.
        library: "pyav", or "decord" for files on which both give the same frames.
        is_strict: refuse to decode if the machine does not allow every step of the sandbox.

    Attributes:
        library: what decoded last, "pyav" or "decord"; PyAV takes over where decord finds damage.
        bytes_read: of video files, by all calls of frames_at and batches_at.
        sandbox_missing: the steps of the sandbox (sandbox.STEPS) that the machine did not allow.
        grace_seconds: of processor time that every call may take, however short what it decodes is.
    """

    def __init__(
        self,
        max_pixels: int = 100_000_000,
        timeout_seconds: float = 60,
        threads: int = 1,
        choice: Choice = Choice.RATE,
        library: str = "pyav",
        is_strict: bool = False,
    ):
        self._max_pixels = max_pixels
        self._timeout_seconds = self.grace_seconds = timeout_seconds
        self._threads = threads
        self._choice = choice
        self._library = library
        self._is_strict = is_strict
        self.sandbox_missing: tuple[str, ...] = ()
        self._child: ChildProcess | None = None
        self._call: _Call | None = None
        self.library = ""
        self.bytes_read = 0

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self, path: str | bytes) -> Probe:
        """Size, codec, clock and possible cuts of a file's video stream.

        Raises:
            VideoProblem: the file is missing, cannot be read, is no video, or has no frame that can be decoded.
        """
        request = {"kind": "probe", "library": self._library}
        with self._ask(path, request, lambda size_bytes: size_bytes / PROBED_BYTES_PER_SECOND) as call:
            for header, _ in call:
                if header["kind"] == "probe":
                    found = probe_from_json(header["probe"])
        return found

    def decode(
        self,
        path: str | bytes,
        probe: Probe,
        segment: Segment,
        fps: Fraction,
        batch: int,
        choice: Choice = Choice.RATE,
    ) -> Iterator[FrameBatch]:
        """The chosen frames of a segment, in batches; decoding runs ahead of the consumer.

        Choice.RATE takes the frame that is shown at each of the times first frame + k / fps, and no frame twice.
        Keyframes and first frames of scenes are at least 1 / fps apart, and the segment's first frame is always taken.
        Closing the iterator early ends the decoding.

        Raises:
            VideoProblem: the segment is not whole; raised after its last good frame, and all frames are valid.
        """
        request: dict[str, Any] = {
            "kind": "decode",
            "probe": probe_to_json(probe),
            "start_ticks": segment.start_ticks,
            "end_ticks": segment.end_ticks,
            "first_index": segment.first_index,
            "fps": [fps.numerator, fps.denominator],
            "choice": choice,
        }
        request["busy_seconds_per_tick"] = self.busy_per_second(probe) * float(probe.time_base)
        has_decord = self._library == "decord" and choice is Choice.RATE
        self.library = request["library"] = probe.decoder if has_decord else "pyav"
        waiting: list[tuple[dict, bytearray]] = []
        problem = None
        with self._ask(path, request, partial(self._busy_seconds, probe, segment)) as call:
            try:
                for header, body in call:
                    if header["kind"] == "frame":
                        waiting.append((header, body))
                    if header["kind"] == "taken_over":
                        self.library = "pyav"
                    if len(waiting) == batch:
                        yield _batch_of(waiting)
                        waiting = []
            except VideoProblem as error:
                problem = error
            if waiting:
                yield _batch_of(waiting)
        if problem is not None:
            raise problem

    def frames_at(self, path: str | bytes, probe: Probe, ticks: Sequence[int], times_rise: bool = False) -> np.ndarray:
        """The frames at these presentation times, in the given order; adds to `bytes_read`.

        Args:
            times_rise: the file's clock is known never to restart, as in a video that was indexed without a problem.
                If this is not known, a file without an index is first read to its end, without decoding.
        Returns:
            (T, 336, 336, 3) uint8.
        Raises:
            VideoProblem: the file cannot be read, or has no frame at one of the times.
        """
        wanted = [int(tick) for tick in ticks]
        if not wanted:
            return np.empty((0, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
        pictures = dict(zip(sorted(set(wanted)), self._pictures_at(path, probe, wanted, times_rise), strict=True))
        return np.stack([pictures[tick] for tick in wanted])

    def batches_at(
        self, path: str | bytes, probe: Probe, ticks: Sequence[int], batch: int, times_rise: bool = False
    ) -> Iterator[np.ndarray]:
        """The frames at these ascending presentation times, in batches; decoding runs ahead of the consumer.

        The file is read once. Adds to `bytes_read` at the end.

        Args:
            path, probe, ticks, times_rise: as frames_at.
            batch: most frames in a batch.
        Yields:
            (T, 336, 336, 3) uint8.
        Raises:
            VideoProblem: as frames_at.
        """
        wanted = [int(tick) for tick in ticks]
        if batch < 1 or any(late >= later for late, later in pairwise(wanted)):
            raise ValueError(
                f"batches_at({batch=}, ticks of {len(wanted)} frames): ticks must ascend, batch be positive"
            )
        with closing(self._pictures_at(path, probe, wanted, times_rise)) as pictures:
            while some := list(islice(pictures, batch)):
                yield np.stack(some)

    def _pictures_at(
        self, path: str | bytes, probe: Probe, wanted: list[int], times_rise: bool
    ) -> Generator[np.ndarray, None, None]:
        """The frames at these times in ascending order, each once."""
        request: dict[str, Any] = {"kind": "frames_at", "probe": probe_to_json(probe), "ticks": wanted}
        request["times_rise"] = times_rise
        with self._ask(path, request, partial(self._busy_seconds, probe, Segment("", None, None, 0))) as call:
            for header, body in call:
                if header["kind"] == "pixels":
                    yield _pixels_of(body)
                self.bytes_read += header.get("bytes_read", 0)

    def cut(
        self,
        path: str | bytes,
        probe: Probe,
        start_seconds: float,
        end_seconds: float,
        container: str,
        write: Callable[[int, bytes], None],
    ) -> dict[str, float]:
        """Copies a range of a video with its sound, without decoding; the copy begins at the keyframe before the range.

        Args:
            start_seconds, end_seconds: positions as a player shows them, half-open.
            container: FFmpeg's name of the new file's format.
            write: called with an offset in the new file and the bytes to write there.
        Returns:
            start_seconds and end_seconds of the copy, as positions in the source, and stream_count.
        Raises:
            VideoProblem: the source cannot be read, has no picture in the range, or cannot be copied to this format.
        """
        request: dict[str, Any] = {"kind": "cut", "probe": probe_to_json(probe), "format": container}
        request |= {"start_seconds": start_seconds, "end_seconds": end_seconds}
        done: dict[str, float] = {}
        with self._ask(path, request, lambda size_bytes: size_bytes / LEAST_BYTES_PER_SECOND) as call:
            for header, body in call:
                if header["kind"] == "write":
                    write(header["offset"], bytes(body))
                elif header["kind"] == "cut":
                    done = {name: header[name] for name in ("start_seconds", "end_seconds", "stream_count")}
        return done

    def close(self) -> None:
        """Ends the process; the next call starts a new one."""
        if self._call is not None:
            self._call.abandon()
            self._call = None
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _begin(self, header: dict) -> None:
        """Reads a new process's first message, sent before it opens a file.

        Raises:
            UsageError: the sandbox is not complete, and has to be.
        """
        missing = [step for step in STEPS if step in header["sandbox_missing"]]
        self.sandbox_missing = tuple(step for step in STEPS if step in {*self.sandbox_missing, *missing})
        if self._is_strict and missing:
            raise UsageError(not_confined(missing))

    def _busy_seconds(self, probe: Probe, segment: Segment, size_bytes: int) -> float:
        """Processor time that decoding a segment may take, by the length that its file states.

        The decoder process raises the limit if the times of the frames show that the file is longer.
        """
        start = probe.first_ticks if segment.start_ticks is None else segment.start_ticks
        if segment.end_ticks is not None:
            length = float((segment.end_ticks - start) * probe.time_base)
        else:
            length = size_bytes / LEAST_BYTES_PER_SECOND
            if probe.duration_seconds is not None:
                length = min(length, max(0.0, probe.duration_seconds - probe.time_seconds(start)))
        return length * self.busy_per_second(probe)

    def busy_per_second(self, probe: Probe) -> float:
        return BUSY_SECONDS_PER_SECOND * max(1.0, probe.width * probe.height / HD_PIXELS) * self._threads

    def _ask(self, path: str | bytes, request: dict, busy_seconds: Callable[[int], float]) -> "_Call":
        if self._call is not None and not self._call.finished:
            self.close()
        if self._child is not None and not self._child.is_running:
            self.close()
        descriptor = open_source(path)
        try:
            if self._child is None:
                strictness = "strict" if self._is_strict else "lenient"
                arguments = (self._max_pixels, self._threads, self._choice, self._library, strictness)
                self._child = ChildProcess("workers.decode.child", arguments, (), _ENVIRONMENT)
            request["grace_seconds"] = self.grace_seconds
            request["busy_seconds"] = busy_seconds(os.fstat(descriptor).st_size)
            self._call = _Call(self._child, request, descriptor, self._timeout_seconds, self._begin)
        finally:
            os.close(descriptor)
        return self._call


def allowed_pixels(probe: Probe) -> int:
    """The limit on pixels for reading a video that was read before."""
    return (probe.width + PADDING_PIXELS) * (probe.height + PADDING_PIXELS)


def check_choice(choice: Choice) -> None:
    """Raises UsageError if a choice of frames needs a package that is not installed."""
    if choice is Choice.SCENES and find_spec("scenedetect") is None:
        raise UsageError("--sample scenes: PySceneDetect is not installed; install it with pip install 'vidx[scenes]'")


def check_confined() -> None:
    """Raises UsageError if this machine does not allow every step of the sandbox."""
    if missing := missing_here():
        raise UsageError(not_confined(missing))


def not_confined(missing: Sequence[str]) -> str:
    """The error message of --strict-sandbox."""
    return (
        f"--strict-sandbox: the decoder cannot be kept from {told(missing)} on {socket.gethostname()} (its kernel or "
        "container does not allow it); index on another machine, or leave the option out"
    )


def _batch_of(frames: list[tuple[dict, bytearray]]) -> FrameBatch:
    def column(name: str) -> np.ndarray:
        return np.array([header[name] for header, _ in frames], np.int64)

    return FrameBatch(
        pixels=np.stack([_pixels_of(body) for _, body in frames]),
        ticks=column("ticks"),
        end_ticks=column("end_ticks"),
        frame_index=column("frame_index"),
        thumbnails=tuple(bytes(body[FRAME_BYTES:]) for _, body in frames),
    )


def _pixels_of(body: bytearray) -> np.ndarray:
    return np.frombuffer(body, np.uint8, FRAME_BYTES).reshape(FRAME_SIDE, FRAME_SIDE, 3)


class _Call:
    """One request and its answer; a context manager that kills the process if the answer is not read to its end.

    A thread moves messages from the socket to a bounded queue. So the process decodes ahead of the consumer, by the
    length of the queue at most.
    """

    def __init__(
        self,
        child: ChildProcess,
        request: dict,
        descriptor: int,
        timeout_seconds: float,
        begin: Callable[[dict], None],
    ):
        self._child = child
        self._timeout_seconds = timeout_seconds
        self._begin = begin
        self._messages: queue.Queue = queue.Queue(FRAMES_AHEAD)
        self._abandoned = threading.Event()
        self.finished = False
        child.connection.settimeout(timeout_seconds)
        self._thread = threading.Thread(target=self._pump, args=(request, os.dup(descriptor)), daemon=True)
        self._thread.start()

    def __enter__(self) -> "_Call":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.finished:
            self.abandon()

    def __iter__(self) -> Iterator[tuple[dict, bytearray]]:
        """The messages of the answer; a problem that the process reports is raised after the last one."""
        problem = None
        while not self.finished:
            header, body = self._messages.get()
            if isinstance(header, Exception):
                self.finished = True
                raise header
            if header["kind"] == "problem":
                problem = VideoProblem(Reason(header["reason"]), header["detail"])
            elif header["kind"] == "bug":
                raise RuntimeError(f"the decoder process failed:\n{header['traceback']}")
            self.finished = header["kind"] == "done"
            yield header, body
        if problem is not None:
            raise problem

    def abandon(self) -> None:
        """Kills the process; what it has not sent yet is lost."""
        self._abandoned.set()
        self._child.kill()
        self.finished = True
        self._put((RuntimeError("this decoding was ended by a later call or by close()"), b""))

    def _pump(self, request: dict, descriptor: int) -> None:
        try:
            try:
                send(self._child.connection, request, descriptors=(descriptor,))
            finally:
                os.close(descriptor)
            kind = None
            while kind != "done":
                header, body = self._child.receive()
                kind = header["kind"]
                if kind == "ready":
                    self._begin(header)
                elif kind != "alive":
                    self._put((header, body))
        except UsageError as error:
            self._child.kill()
            self._put((error, b""))
        except TimeoutError:
            self._child.kill()
            detail = f"no progress for {self._timeout_seconds:g} s; the decoder was stopped"
            self._put((VideoProblem(Reason.TIMEOUT, detail), b""))
        except (Closed, OSError):
            detail = "" if self._abandoned.is_set() else f"the decoder process {self._child.describe_end()}"
            self._child.kill()
            # A process that ends before its first message has not read the file.
            reason = Reason.CRASHED if self._child.has_answered else Reason.WORKER_LOST
            self._put((VideoProblem(reason, detail), b""))

    def _put(self, message: tuple) -> None:
        while not self._abandoned.is_set():
            try:
                self._messages.put(message, timeout=0.2)
                return
            except queue.Full:
                continue
