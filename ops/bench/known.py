"""An unchanged folder of many videos: the `vidx index` that finds nothing to do, beside `find` looking at each file.

Usage: python ops/bench/known.py [FILES]; 10000 without it, which are indexed first (half an hour on 2 cores).
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import figure, in_turn, run_vidx, save

CLIP = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=5:duration=1", "-c:v", "libx264", "-pix_fmt", "yuv420p")


def main() -> None:
    """Times both and writes results/known.json."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VIDX_CACHE"] = f"{scratch}/cache"
        folder, archive = Path(scratch) / "videos", f"{scratch}/archive"
        make_videos(folder, count)
        first = json.loads(run_vidx("index", str(folder), "--archive", archive, "--json").stdout)
        again = json.loads(run_vidx("index", str(folder), "--archive", archive, "--json").stdout)
        if (first["videos_indexed"], again["videos_skipped"]) != (count, count):
            raise RuntimeError(f"{first['videos_indexed']} of {count} videos indexed, {again['videos_skipped']} known")
        timed = in_turn(
            lambda: run_vidx("index", str(folder), "--archive", archive),
            lambda: subprocess.run(
                ["find", str(folder), "-printf", "%i %s %T@ %C@\n"], check=True, capture_output=True
            ),
            runs=3,
        )
    value = f"{timed['seconds']:.1f} s ({timed['yardstick_seconds']:.2f} s)"
    what = f"`vidx index` of {count} unchanged videos as a whole process"
    save("known", [figure(what, "`find`, looking at each file", value, "seconds", indexing=first["seconds"], **timed)])


def make_videos(folder: Path, count: int) -> None:
    """One clip, each copy with a number of its own in a box that players skip."""
    folder.mkdir()
    clip = folder / "clip.mp4"
    subprocess.run(["ffmpeg", "-v", "error", *CLIP, str(clip)], check=True, stdin=subprocess.DEVNULL)
    data = clip.read_bytes()
    clip.unlink()
    for number in range(count):
        (folder / f"{number:06d}.mp4").write_bytes(data + struct.pack(">I4sQ", 16, b"free", number))


if __name__ == "__main__":
    main()
