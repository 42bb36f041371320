"""The decoder process of workers.decode.client.

`python -m workers.decode.child SOCKET LIFELINE MAX_PIXELS THREADS CHOICE LIBRARY STRICT` starts it. It
gets one open file at a time and answers with frames. It may be killed at any moment: it owns nothing.
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
from workers.decode.open_video import DecodeTask, out_of_memory
from workers.decode.picture import thumbnail
from workers.decode.probe import probe
from workers.decode.remux import CutFile, cut
from workers.decode.sample import KeptFrame
from workers.protocol import Closed, probe_from_json, probe_to_json, receive, send
from workers.sandbox import confine, die_with_owner
from workers.sources.video_file import VideoFile

ALIVE_SECONDS = 0.5
# A decoder keeps up to 17 pictures of 1.5 to 3 bytes a pixel; RGB and its copies come on top.
BASE_BYTES, BYTES_PER_PIXEL = 1 << 30, 24


class Reply:
    """The way back to the owner."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._last = 0.0
        self._began = self._busy_seconds = self._grace_seconds = self._seconds_per_tick = 0.0
        self._first_ticks: int | None = None

    def begin(self, request: dict) -> None:
        """A new answer, and how much processor time is allowed for it."""
        self._began = time.process_time()
        self._grace_seconds = request["grace_seconds"]
        self._busy_seconds = self._grace_seconds + request["busy_seconds"]
        self._seconds_per_tick = request.get("busy_seconds_per_tick", 0.0)
        self._first_ticks = None

    def send(self, kind: str, values: dict | None = None, body: bytes = b"") -> None:
        """One message."""
        send(self._connection, {"kind": kind} | (values or {}), body)
        self._last = time.monotonic()

    def alive(self) -> None:
        """Shows progress, at most every ALIVE_SECONDS.

        Raises:
            VideoProblem: the allowed processor time is used up.
        """
        self._check_busy()
        if time.monotonic() - self._last > ALIVE_SECONDS:
            self.send("alive")

    def frame(self, kept: KeptFrame) -> None:
        """A frame: pixels, then its thumbnail; raises as `alive`."""
        self._check_busy()
        if self._first_ticks is None:
            self._first_ticks = kept.ticks
        reached = self._grace_seconds + (kept.ticks - self._first_ticks) * self._seconds_per_tick
        self._busy_seconds = max(self._busy_seconds, reached)
        values = {"ticks": kept.ticks, "end_ticks": kept.end_ticks, "frame_index": kept.frame_index}
        self.send("frame", values, kept.picture.pixels.tobytes() + kept.picture.thumbnail)

    def _check_busy(self) -> None:
        if time.process_time() > self._began + self._busy_seconds:
            detail = f"not decoded after {self._busy_seconds:.0f} s of processor time, the most for its length"
            raise VideoProblem(Reason.TIMEOUT, detail)


def main(arguments: list[str]) -> None:
    """Answers requests until the owner is gone."""
    descriptor, lifeline, max_pixels, threads = map(int, arguments[:4])
    die_with_owner(lifeline)
    connection = socket.socket(fileno=descriptor)
    _load_everything(Choice(arguments[4]), arguments[5])
    missing = confine(BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
    answer = Reply(connection)
    answer.send("ready", {"sandbox_missing": missing})
    while not (missing and arguments[6] == "strict"):
        request, _, source = receive(connection, with_descriptor=True)
        assert source is not None  # it comes with every request
        try:
            _handle(request, VideoFile(source), max_pixels, threads, answer)
        finally:
            os.close(source)


def _handle(request: dict, file: VideoFile, max_pixels: int, threads: int, answer: Reply) -> None:
    """Answers one request with its result, a problem of the video, or a traceback of ours; then "done"."""
    answer.begin(request)
    try:
        if request["kind"] == "probe":
            found = probe(file, max_pixels, threads, answer.alive, request["library"])
            answer.send("probe", {"probe": probe_to_json(found)})
        elif request["kind"] == "decode":
            segment = Segment("", request["start_ticks"], request["end_ticks"], request["first_index"])
            known, fps = probe_from_json(request["probe"]), Fraction(*request["fps"])
            choice = Choice(request["choice"])
            task = DecodeTask(file, known, segment, fps, choice, threads, max_pixels, answer.alive)
            _decode(answer, task, request["library"])
        elif request["kind"] == "frames_at":
            known, ticks = probe_from_json(request["probe"]), request["ticks"]
            how = (request["times_rise"], threads, max_pixels, answer.alive)
            for at, pixels in frames_at.frames_at(file, known, ticks, *how):
                answer.send("pixels", {"ticks": at}, pixels.tobytes())
        elif request["kind"] == "cut":
            known, kind = probe_from_json(request["probe"]), request["format"]
            new = CutFile(lambda offset, data: answer.send("write", {"offset": offset}, data))
            moment = (request["start_seconds"], request["end_seconds"])
            answer.send("cut", asdict(cut(file, known, *moment, kind, max_pixels, new, answer.alive)))
        else:
            raise ValueError(f"unknown request {request['kind']!r}")
    except VideoProblem as problem:
        answer.send("problem", {"reason": problem.reason, "detail": problem.detail})
    except MemoryError:
        too_large = out_of_memory()
        answer.send("problem", {"reason": too_large.reason, "detail": too_large.detail})
    except Closed:
        raise
    except Exception:
        answer.send("bug", {"traceback": traceback.format_exc()})
    answer.send("done", {"bytes_read": file.bytes_read})


def _decode(answer: Reply, task: DecodeTask, library: str) -> None:
    """Sends a segment's frames: decord's where it is the one, and PyAV's from where decord gets unsure."""
    last_ticks = None
    if library == "decord":
        from workers.decode.decord import Unsure, decode

        try:
            for kept in decode(task):
                answer.frame(kept)
                last_ticks = kept.ticks
            return
        except Unsure:
            answer.send("taken_over")
    for kept in pyav.decode(task):
        if last_ticks is None or kept.ticks > last_ticks:
            answer.frame(kept)


def _load_everything(choice: Choice, library: str) -> None:
    """Loads what libraries load on first use: no file can be opened later."""
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
