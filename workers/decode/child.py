"""The decoder process that workers.decode.client starts and may kill at any time.

`python -m workers.decode.child SOCKET LIFELINE MAX_PIXELS THREADS CHOICE LIBRARY STRICT` gets one open file at a time,
with a request, and answers with frames.
"""

import importlib
import os
import pkgutil
import socket
import sys
import time
import traceback
from dataclasses import asdict
from fractions import Fraction

import av
import numpy as np

from storage.errors import VideoProblem
from storage.records import Choice, Reason, Segment
from workers.decode import frames_at, pyav
from workers.decode.cut import CutFile, cut
from workers.decode.open_video import DecodeTask, VideoInput, out_of_memory
from workers.decode.picture import store_form, thumbnail
from workers.decode.probe import probe
from workers.decode.sample import KeptFrame, Tally
from workers.protocol import Closed, probe_from_json, probe_to_json, receive, send
from workers.sandbox import confine, die_with_owner
from workers.sources.video_file import VideoFile

ALIVE_SECONDS = 0.5  # between two signs of progress
# The memory limit. A decoder keeps up to 17 pictures of 1.5 to 3 bytes a pixel; RGB and its copies are added to that.
BASE_BYTES, BYTES_PER_PIXEL = 1 << 30, 24


class Reply:
    """Sends answers to the owner, and checks the limit on processor time."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._last = 0.0
        self._began = self._busy_seconds = self._grace_seconds = self._seconds_per_tick = 0.0
        self._first_ticks: int | None = None

    def begin(self, request: dict) -> None:
        """Begins a new answer, with the processor time that its request allows."""
        self._began = time.process_time()
        self._grace_seconds = request["grace_seconds"]
        self._busy_seconds = self._grace_seconds + request["busy_seconds"]
        self._seconds_per_tick = request.get("busy_seconds_per_tick", 0.0)
        self._first_ticks = None

    def send(self, kind: str, values: dict | None = None, body: bytes = b"") -> None:
        """Sends one message."""
        send(self._connection, {"kind": kind} | (values or {}), body)
        self._last = time.monotonic()

    def alive(self) -> None:
        """Tells the owner that work goes on, at most every ALIVE_SECONDS.

        Raises:
            VideoProblem: the allowed processor time is used up.
        """
        self._check_busy()
        if time.monotonic() - self._last > ALIVE_SECONDS:
            self.send("alive")

    def frame(self, kept: KeptFrame) -> None:
        """Sends a frame, pixels and then thumbnail; raises as `alive`."""
        self._check_busy()
        if self._first_ticks is None:
            self._first_ticks = kept.ticks
        reached = self._grace_seconds + (kept.ticks - self._first_ticks) * self._seconds_per_tick
        self._busy_seconds = max(self._busy_seconds, reached)
        values = {"ticks": kept.ticks, "end_ticks": kept.end_ticks, "frame_index": kept.frame_index}
        self.send("frame", values, kept.picture.pixels.tobytes() + kept.picture.thumbnail)

    def _check_busy(self) -> None:
        if time.process_time() > self._began + self._busy_seconds:
            detail = f"not decoded after {self._busy_seconds:.0f} s of processor time, the limit for its length"
            raise VideoProblem(Reason.TIMEOUT, detail)


def main(arguments: list[str]) -> None:
    """Answers requests until the owner ends."""
    descriptor, lifeline, max_pixels, threads = map(int, arguments[:4])
    die_with_owner(lifeline)
    connection = socket.socket(fileno=descriptor)
    _load_everything(Choice(arguments[4]), arguments[5])
    missing = confine(BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
    answer = Reply(connection)
    answer.send("ready", {"sandbox_missing": missing})
    while not (missing and arguments[6] == "strict"):
        request, _, opened = receive(connection, with_descriptor=True)
        assert opened is not None  # every request sends a file along
        try:
            _handle(request, VideoInput(VideoFile(opened), max_pixels, threads, answer.alive), answer)
        finally:
            os.close(opened)


def _handle(request: dict, source: VideoInput, answer: Reply) -> None:
    """Answers one request: the result, a problem of the video, or the traceback of a bug; then "done"."""
    answer.begin(request)
    try:
        if request["kind"] == "probe":
            answer.send("probe", {"probe": probe_to_json(probe(source, request["library"]))})
        elif request["kind"] == "decode":
            segment = Segment("", request["start_ticks"], request["end_ticks"], request["first_index"])
            known, fps = probe_from_json(request["probe"]), Fraction(*request["fps"])
            task = DecodeTask(source, known, segment, fps, Choice(request["choice"]))
            _decode(answer, task, request["library"])
        elif request["kind"] == "frames_at":
            known = probe_from_json(request["probe"])
            for at, pixels in frames_at.frames_at(source, known, request["ticks"], request["times_rise"]):
                answer.send("pixels", {"ticks": at}, pixels.tobytes())
        else:
            known, kind = probe_from_json(request["probe"]), request["format"]
            new = CutFile(lambda offset, data: answer.send("write", {"offset": offset}, data))
            done = cut(source, known, request["start_seconds"], request["end_seconds"], kind, new)
            answer.send("cut", asdict(done))
    except VideoProblem as problem:
        answer.send("problem", {"reason": problem.reason, "detail": problem.detail})
    except MemoryError:
        too_large = out_of_memory()
        answer.send("problem", {"reason": too_large.reason, "detail": too_large.detail})
    except Closed:
        raise
    except Exception:
        answer.send("bug", {"traceback": traceback.format_exc()})
    answer.send("done", {"bytes_read": source.file.bytes_read})


def _decode(answer: Reply, task: DecodeTask, library: str) -> None:
    """Sends a segment's frames: decord's if it was asked for, and PyAV's from the place where decord fails."""
    last_ticks = None
    if library == "decord":
        from workers.decode import decord

        try:
            for kept in pyav.kept_frames(task, decord.read_frames(task), store_form, Tally()):
                answer.frame(kept)
                last_ticks = kept.ticks
            return
        except decord.Unreliable:
            answer.send("taken_over")
    for kept in pyav.decode(task):
        if last_ticks is None or kept.ticks > last_ticks:
            answer.frame(kept)


def _load_everything(choice: Choice, library: str) -> None:
    """Loads what libraries load on first use, because no file can be opened in the sandbox."""
    thumbnail(np.zeros((8, 8, 3), np.uint8))  # Pillow's JPEG writer
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith(("__main__", "datasets")):
            importlib.import_module(module.name)
    if choice is Choice.SCENES:
        importlib.import_module("workers.decode.scenes")
    if library == "decord":
        importlib.import_module("workers.decode.decord")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Closed:
        sys.exit(0)
