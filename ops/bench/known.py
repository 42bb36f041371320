"""An unchanged folder of many videos: the `vidx index` that finds nothing to do, beside `find` looking at each file.

Usage: python ops/bench/known.py FOLDER [--files N]

The videos are made and indexed in FOLDER first, 10,000 of them in half an hour on 2 cores; what is there already is
used.
"""

import argparse
import json
import os
import struct
import subprocess
from pathlib import Path

from harness import figure, in_turn, run_vidx, save

CLIP = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=5:duration=1", "-c:v", "libx264", "-pix_fmt", "yuv420p")


def main() -> None:
    """Times both and writes results/known.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    options = parser.parse_args()
    count, folder, archive = options.files, options.folder / "videos", str(options.folder / "archive")
    os.environ["VIDX_CACHE"] = str(options.folder / "cache")
    if not folder.exists():
        make_videos(folder, count)
    run_vidx("index", str(folder), "--archive", archive)
    again = json.loads(run_vidx("index", str(folder), "--archive", archive, "--json").stdout)
    if again["videos_skipped"] != count:
        known = again["videos_skipped"]
        raise SystemExit(f"{known} of {count} videos known: remove {options.folder}, or give its --files")
    timed = in_turn(
        lambda: run_vidx("index", str(folder), "--archive", archive),
        lambda: subprocess.run(["find", str(folder), "-printf", "%i %s %T@ %C@\n"], check=True, capture_output=True),
        runs=3,
    )
    value = f"{timed['seconds']:.1f} s ({timed['yardstick_seconds']:.2f} s)"
    what = f"`vidx index` of {count:,} unchanged videos as a whole process"
    save("known", [figure(what, "`find`, looking at each file", value, "seconds", **timed)])


def make_videos(folder: Path, count: int) -> None:
    """One clip, each copy with a number of its own in a box that players skip."""
    folder.mkdir(parents=True)
    clip = folder / "clip.mp4"
    subprocess.run(["ffmpeg", "-v", "error", *CLIP, str(clip)], check=True, stdin=subprocess.DEVNULL)
    data = clip.read_bytes()
    clip.unlink()
    for number in range(count):
        (folder / f"{number:06d}.mp4").write_bytes(data + struct.pack(">I4sQ", 16, b"free", number))


if __name__ == "__main__":
    main()
