"""The whole index job against its slowest stage: decode, encode and store overlap where they can.

Usage: python ops/bench/overlap.py

One worker indexes one long clip of several segments. The job's steady state is the time from the first segment's start
to the last receipt; the slowest stage is the same segments' decoding alone, or encoding alone, on the same machine.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

from decode import make_video
from harness import figure, save, seconds

from pipeline.index.split import split
from storage.files import local_path, make_folder, to_uri
from storage.records import Sampling, SegmentTask
from workers.decode.client import Decoder
from workers.frame_stream import decode_segment
from workers.models.bundle import find_bundle
from workers.segment import index_segment
from workers.sources.identity import identify
from workers.vision.encode import encode_frames
from workers.vision.llava_mini import load_vision

COPIES = 2  # of the minute; each is one segment


def main() -> None:
    """Measures each stage alone and all together, and writes results/overlap.json."""
    bundle = find_bundle("nano")
    vision = load_vision(bundle, "cpu", "float32")
    sampling = Sampling(Fraction(8), bundle.default_patch_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.mp4"
        make_video(path)
        name = os.fsencode(path)
        frames_uri = to_uri(str(Path(folder) / "frames"))
        make_folder(frames_uri)
        content = identify(name)
        with Decoder() as first, Decoder() as second:
            probe = first.probe(name)
            (segment,) = split(content.video_id, probe)
            tasks = [SegmentTask(to_uri(name), content, probe, segment, i, sampling) for i in range(COPIES)]
            batches = list(first.decode(name, probe, segment, sampling.fps, 32))

            def decode_alone() -> None:
                _on_two_threads((first, second), tasks, _drain)

            def encode_alone() -> None:
                for _ in range(COPIES):
                    for batch in batches:
                        encode_frames(vision, batch.pixels, sampling.patches)

            def whole() -> None:
                turn = threading.Lock()

                def index(decoder: Decoder, task: SegmentTask) -> None:
                    decode = partial(decode_segment, decoder=decoder, batch=32)
                    index_segment(task, decode, vision, turn, frames_uri, 32)

                _on_two_threads((first, second), tasks, index)

            whole()
            runs = [{f.__name__: seconds(f) for f in (decode_alone, encode_alone, whole)} for _ in range(2)]
    best = min(runs, key=lambda run: run["whole"])
    slowest = max(best["decode_alone"], best["encode_alone"])
    ratio = slowest / best["whole"]
    what = f"whole job over {COPIES} segments of {len(batches) * 32} frames, decoding included (2 cores, model nano)"
    save("overlap", [figure(what, "its slowest stage alone", f"{ratio:.2f}", "≥ 0.9 on a GPU", runs=runs)])


def _on_two_threads(decoders: tuple[Decoder, Decoder], tasks: list[SegmentTask], work: Callable) -> None:
    """Each decoder with its half of the tasks, one after another."""

    def half(place: int) -> None:
        for task in tasks[place::2]:
            work(decoders[place], task)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, range(2)))


def _drain(decoder: Decoder, task: SegmentTask) -> None:
    for _ in decoder.decode(local_path(task.uri), task.probe, task.segment, task.sampling.fps, 32):
        pass


if __name__ == "__main__":
    main()
