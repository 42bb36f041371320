"""decode: one segment of a video -> batches of frames, through a process that can be killed.

This is the owner's side and loads no decoder: a file that hangs or crashes one costs that process, not the job.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
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
from storage.processes import python_path
from storage.records import FRAME_SIDE, Choice, FrameBatch, Probe, Reason, Segment
from workers.protocol import Closed, probe_from_json, probe_to_json, receive, send
from workers.sandbox import STEPS, missing_here, told
from workers.sources.identity import open_source

FRAME_BYTES = FRAME_SIDE * FRAME_SIDE * 3
FRAMES_AHEAD = 64  # at most so many decoded frames (22 MB) wait for the consumer
# What a decoder may use, besides the time without progress: seconds of processor time per second of HD video, a
# hundred times what it takes, and a length that no file of a size exceeds, whatever its header says.
BUSY_SECONDS_PER_SECOND = 10
HD_PIXELS = 1920 * 1080
PADDING_PIXELS = 128  # FFmpeg pads each side of a picture (800 to 832, say) before it compares with its limit
LEAST_BYTES_PER_SECOND = 2_000
PROBED_BYTES_PER_SECOND = 1_000_000
# A decoder that hung or died is tried once more, in a new process: a second time the file is to blame.
RETRIED = (Reason.TIMEOUT, Reason.CRASHED, Reason.WORKER_LOST)


class Decoder:
    """Owns one decoder process, started when first needed and again after a hang or a crash; a context manager.

    For one user at a time: a new call ends what is left of the one before.

    Args:
        max_pixels: of one frame; larger ones are TOO_LARGE before they are decoded.
        timeout_seconds: without any progress, after which the process is killed and the video is at TIMEOUT. So is one
            that makes progress without end: processor time is limited too, by the length of what is decoded.
        threads: of the codec; the frames are the same for any number.
        choice: what `decode` will be asked for at most; SCENES loads what finds them.
        library: "pyav", or "decord" for the files that it reads right.
        is_strict: decode nothing in a process that the kernel does not confine in every way (sandbox.py).

    Attributes:
        library: that the last decoding ended with; PyAV takes over where decord meets damage.
        bytes_read: of video files, by all calls of frames_at and batches_at.
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
        if max_pixels < 1 or timeout_seconds <= 0 or threads < 1:
            raise ValueError(f"Decoder({max_pixels=}, {timeout_seconds=}, {threads=}): each must be positive")
        self._max_pixels = max_pixels
        self._timeout_seconds = self._grace_seconds = timeout_seconds
        self._threads = threads
        self._choice = choice
        self._library = library
        self._is_strict = is_strict
        self._sandbox_missing: tuple[str, ...] = ()
        self._child: _Child | None = None
        self._call: _Call | None = None
        self.library = ""
        self.bytes_read = 0

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sandbox_missing(self) -> tuple[str, ...]:
        """What the processes that were started so far were not kept from (sandbox.STEPS)."""
        return self._sandbox_missing

    def probe(self, path: str | bytes) -> Probe:
        """What the file's video stream says about itself.

        Raises:
            VideoProblem: the file is gone, closed to us, no video, or nothing in it can be decoded.
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
        """The segment's kept frames, `batch` at a time, decoded ahead of the consumer.

        At a rate, instants are the video's first frame + k / fps, exactly; of each the frame then shown is taken, each
        frame once. Keyframes and first frames of scenes lie at least 1 / fps apart, and the segment's first frame is
        always one. Closing the iterator early ends the decoding.

        Raises:
            VideoProblem: after every good frame, where the segment is not whole; what came before stays valid.
        """
        fps = Fraction(fps)
        if fps <= 0 or batch < 1:
            raise ValueError(f"decode(fps={fps}, batch={batch}): both must be positive")
        request: dict[str, Any] = {
            "kind": "decode",
            "probe": probe_to_json(probe),
            "start_ticks": segment.start_ticks,
            "end_ticks": segment.end_ticks,
            "first_index": segment.first_index,
            "fps": [fps.numerator, fps.denominator],
            "choice": choice,
        }
        request["busy_seconds_per_tick"] = self._busy_per_second(probe) * float(probe.time_base)
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
        """Exactly the frames at these presentation times, in the order asked for; adds to `bytes_read`.

        Args:
            path, probe: the source.
            ticks: the frames' times.
            times_rise: that the file's clock never begins anew is known, as of a video that was indexed whole. Else a
                file without an index is read through first, without decoding.
        Returns:
            (T, 336, 336, 3) uint8.
        Raises:
            VideoProblem: the file cannot be read, or has no frame at one of these times.
        """
        wanted = [int(tick) for tick in ticks]
        if not wanted:
            return np.empty((0, FRAME_SIDE, FRAME_SIDE, 3), np.uint8)
        pictures = dict(zip(sorted(set(wanted)), self._pictures_at(path, probe, wanted, times_rise), strict=True))
        return np.stack([pictures[tick] for tick in wanted])

    def batches_at(
        self, path: str | bytes, probe: Probe, ticks: Sequence[int], batch: int, times_rise: bool = False
    ) -> Iterator[np.ndarray]:
        """The frames at these ascending presentation times, `batch` at a time, decoded ahead of the consumer.

        The file is gone through once. Adds to `bytes_read` when it is.

        Args:
            path, probe, ticks, times_rise: as frames_at has them.
            batch: frames at once.
        Yields:
            (at most `batch`, 336, 336, 3) uint8.
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
        """The frames at these times, ascending, each once."""
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
        """Copies a stretch of a video and its sound, from the keyframe before it on, without decoding.

        Args:
            path, probe: the source.
            start_seconds, end_seconds: positions that a player shows, half-open.
            container: FFmpeg's name of the new file's format.
            write: is given an offset in the new file and bytes.
        Returns:
            start_seconds and end_seconds of what came out, as positions in the source, and stream_count.
        Raises:
            VideoProblem: the source cannot be read, has no picture there, or cannot be copied into this format.
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
        """Ends the process; the decoder may be used again and starts another."""
        if self._call is not None:
            self._call.abandon()
            self._call = None
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _take_missing(self, steps: Sequence[str]) -> None:
        self._sandbox_missing = tuple(step for step in STEPS if step in {*self._sandbox_missing, *steps})

    def _busy_seconds(self, probe: Probe, segment: Segment, size_bytes: int) -> float:
        """Seconds of processor time that decoding a segment may take, by what its file says of its length.

        A file that is longer than it says gets more on the way, by the times of its frames.
        """
        start = probe.first_ticks if segment.start_ticks is None else segment.start_ticks
        if segment.end_ticks is not None:
            length = float((segment.end_ticks - start) * probe.time_base)
        else:
            length = size_bytes / LEAST_BYTES_PER_SECOND
            if probe.duration_seconds is not None:
                length = min(length, max(0.0, probe.duration_seconds - probe.time_seconds(start)))
        return length * self._busy_per_second(probe)

    def _busy_per_second(self, probe: Probe) -> float:
        return BUSY_SECONDS_PER_SECOND * max(1.0, probe.width * probe.height / HD_PIXELS) * self._threads

    def _ask(self, path: str | bytes, request: dict, busy_seconds: Callable[[int], float]) -> "_Call":
        if self._call is not None and not self._call.finished:
            self.close()
        if self._child is not None and not self._child.usable:
            self.close()
        descriptor = open_source(path)
        try:
            if self._child is None:
                self._child = _Child(
                    self._max_pixels, self._threads, self._choice, self._library, self._is_strict, self._take_missing
                )
            request["grace_seconds"] = self._grace_seconds
            request["busy_seconds"] = busy_seconds(os.fstat(descriptor).st_size)
            self._call = _Call(self._child, request, descriptor, self._timeout_seconds)
        finally:
            os.close(descriptor)
        return self._call


def allowed_pixels(probe: Probe) -> int:
    """The limit on pixels under which a video that was read once is read again."""
    return (probe.width + PADDING_PIXELS) * (probe.height + PADDING_PIXELS)


def check_choice(choice: Choice) -> None:
    """Raises UsageError where a choice needs a package that is not installed."""
    if choice is Choice.SCENES and find_spec("scenedetect") is None:
        raise UsageError("--sample scenes: PySceneDetect is not installed; pip install 'vidx[scenes]' adds it")


def check_confined() -> None:
    """Raises UsageError where this machine does not confine a decoder in every way."""
    if missing := missing_here():
        raise UsageError(not_confined(missing))


def not_confined(missing: Sequence[str]) -> str:
    """The line that says why --strict-sandbox refuses."""
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


class _Child:
    """The decoder process and the socket to it.

    Attributes:
        is_ready: whether it has said anything.
    """

    def __init__(
        self,
        max_pixels: int,
        threads: int,
        choice: Choice,
        library: str,
        is_strict: bool,
        tell_missing: Callable[[Sequence[str]], None],
    ):
        self.connection, theirs = socket.socketpair()
        lifeline_theirs, self._lifeline = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill)
        settings = {"PYTHONPATH": python_path(), "OPENBLAS_NUM_THREADS": "1", "AV_LOG_FORCE_NOCOLOR": "1"}
        how = "strict" if is_strict else "lenient"
        arguments = [theirs.fileno(), lifeline_theirs, max_pixels, threads, choice, library, how]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "workers.decode.child", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(), lifeline_theirs),
                env=os.environ | settings,
            )
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        self.is_ready = False
        self._is_strict, self._tell_missing = is_strict, tell_missing
        self._closed = False
        self._closing = threading.Lock()  # the owner and the thread that reads may both end it

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """Whether it runs."""
        return not self._closed and self._process.poll() is None

    def begin(self, header: dict) -> None:
        """Takes in the first thing that the process says, before it has read anything.

        Raises:
            UsageError: it is not confined as it has to be, and ends.
        """
        self.is_ready = True
        missing = [step for step in STEPS if step in header.get("sandbox_missing", ())]
        self._tell_missing(missing)
        if self._is_strict and missing:
            raise UsageError(not_confined(missing))

    def kill(self) -> None:
        """Ends the process at once and waits for that; does nothing the second time."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._process.kill()
        self._process.wait()
        self.connection.close()
        self._errors.close()
        os.close(self._lifeline)

    def describe_death(self) -> str:
        """How it ended, in one line."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder process stopped answering"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the decoder process {how}" + (f": {lines[-1]}" if lines else "")


class _Call:
    """One request and the messages that answer it; a context manager that kills the child when left early.

    A thread takes the messages off the socket into a bounded queue, so that the child decodes while the consumer
    is busy elsewhere, and no further ahead than the queue is long.
    """

    def __init__(self, child: _Child, request: dict, descriptor: int, timeout_seconds: float):
        self._child = child
        self._timeout_seconds = timeout_seconds
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
        """The answer's messages; a problem that the child reports is raised when the answer is complete."""
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
        """Kills the child, so that nothing of this answer is left on the way."""
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
                header, body, _ = receive(self._child.connection)
                kind = header["kind"]
                if not self._child.is_ready:
                    self._child.begin(header)
                if kind not in ("alive", "ready"):
                    self._put((header, body))
        except UsageError as error:
            self._child.kill()
            self._put((error, b""))
        except TimeoutError:
            self._child.kill()
            detail = f"no progress for {self._timeout_seconds:g} s; the decoder was stopped"
            self._put((VideoProblem(Reason.TIMEOUT, detail), b""))
        except (Closed, OSError):
            detail = "" if self._abandoned.is_set() else self._child.describe_death()
            self._child.kill()
            # One that died before it had anything to read died of the machine.
            reason = Reason.CRASHED if self._child.is_ready else Reason.WORKER_LOST
            self._put((VideoProblem(reason, detail), b""))

    def _put(self, message: tuple) -> None:
        while not self._abandoned.is_set():
            try:
                self._messages.put(message, timeout=0.2)
                return
            except queue.Full:
                continue
