"""Decoding 1 frame/s to 336 x 336 against the ffmpeg command line doing the same with as many threads.

Usage: python ops/bench/decode.py
"""

import os
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

from harness import figure, in_turn, save

from storage.records import Segment
from workers.content import identify
from workers.decode import Decoder

SECONDS = 60


def make_video(path: Path) -> None:
    """A minute of noisy 720p30 H.264 with a keyframe every 250 frames, as DESIGN's measurements used."""
    source = f"testsrc2=size=1280x720:rate=30:duration={SECONDS}"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-vf", "noise=alls=12:allf=t"]
    command += ["-c:v", "libx264", "-g", "250", "-crf", "26", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)


def main() -> None:
    """Times both and writes results/decode.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.mp4"
        make_video(path)
        name = os.fsencode(path)
        video_id = identify(name).video_id
        with Decoder(threads=1) as decoder:
            probe = decoder.probe(name)

            def ours() -> None:
                frames = sum(map(len, decoder.decode(name, probe, Segment(video_id, None, None, 0), Fraction(1), 32)))
                if frames != SECONDS:
                    raise RuntimeError(f"{frames} frames of {SECONDS}")

            def ffmpeg() -> None:
                scale = "fps=1,scale=336:336:flags=neighbor,format=rgb24"
                command = [
                    "ffmpeg",
                    "-v",
                    "error",
                    "-threads",
                    "1",
                    "-filter_threads",
                    "1",
                    "-i",
                    str(path),
                    "-vf",
                    scale,
                ]
                subprocess.run([*command, "-f", "rawvideo", "-y", os.devnull], check=True)

            timed = in_turn(ours, ffmpeg, runs=5)
        what = f"decode {SECONDS} s of 720p30 H.264 at 1 frame/s, 1 thread, {probe.decoder}, thumbnails included"
        rows.append(
            figure(what, "ffmpeg command line, 1 thread", f"{timed['ratio']:.2f} × its time", "≤ 0.8 ×", **timed)
        )
    save("decode", rows)


if __name__ == "__main__":
    main()
