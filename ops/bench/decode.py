"""Decoding 1 frame/s to 336 x 336 against the ffmpeg command line doing the same with as many threads.

Usage: python ops/bench/decode.py
"""

import os
import subprocess
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path

from harness import figure, in_turn, save

from storage.records import Probe, Segment
from workers.decode.client import Decoder

SECONDS = 60


def make_video(path: Path, length: int = SECONDS) -> None:
    """`length` seconds of noisy 720p30 H.264 with a keyframe every 250 frames, as DESIGN's measurements used."""
    source = f"testsrc2=size=1280x720:rate=30:duration={length}"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-vf", "noise=alls=12:allf=t"]
    command += ["-c:v", "libx264", "-g", "250", "-crf", "26", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)


def main() -> None:
    """Times both libraries and writes results/decode.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.mp4"
        make_video(path)
        for library in ("pyav", "decord"):
            with Decoder(threads=1, library=library) as decoder:
                probe = decoder.probe(str(path))
                timed = in_turn(partial(decode, decoder, path, probe), partial(ffmpeg, path), runs=5)
            if decoder.library != library:
                raise RuntimeError(f"{library} does not read this file")
            what = f"decode {SECONDS} s of 720p30 H.264 at 1 frame/s, 1 thread, {library}, thumbnails included"
            value = f"{timed['ratio']:.2f} × its time"
            rows.append(figure(what, "ffmpeg command line, 1 thread", value, "≤ 0.8 ×", **timed))
    save("decode", rows)


def decode(decoder: Decoder, path: Path, probe: Probe) -> None:
    """All frames at one a second, as a job decodes them."""
    frames = sum(map(len, decoder.decode(str(path), probe, Segment("", None, None, 0), Fraction(1), 32)))
    if frames != SECONDS:
        raise RuntimeError(f"{frames} frames of {SECONDS}")


def ffmpeg(path: Path) -> None:
    """The same frames by the command line."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-filter_threads", "1", "-i", str(path)]
    command += ["-vf", "fps=1,scale=336:336:flags=neighbor,format=rgb24", "-f", "rawvideo", "-y", os.devnull]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
