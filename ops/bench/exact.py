"""One exact frame at the end of an hour: what is read and computed, against ffmpeg's seek and decoding from the start.

Usage: python ops/bench/exact.py
"""

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import figure, save

from workers.decode.damage import Damage
from workers.decode.frames_at import frames_at
from workers.decode.open_video import OpenVideo, VideoInput
from workers.decode.probe import probe
from workers.decode.pyav import read_frames
from workers.sources.identity import open_source
from workers.sources.video_file import VideoFile

PIECE_SECONDS, PIECES = 60, 60
BEFORE_END_SECONDS = 10
MAX_PIXELS = 1 << 24
RUNS = 5
H264 = ["-c:v", "libx264", "-preset", "veryfast", "-b:v", "500k", "-x264-params", "open-gop=1"]
MPEG4 = ["-c:v", "mpeg4", "-b:v", "500k", "-g", "250", "-bf", "2"]
FILES = (
    ("open.mp4", "H.264 in open groups of pictures, MP4", H264, []),
    ("open.ts", "H.264 in open groups of pictures, MPEG-TS", H264, []),
    ("open.flv", "H.264 in open groups of pictures, FLV", H264, []),
    ("live.mkv", "H.264 in open groups of pictures, Matroska without an index", H264, ["-live", "1"]),
    ("plain.avi", "MPEG-4, AVI", MPEG4, []),
)


def run_ffmpeg(*arguments: str) -> None:
    """The command line, one thread."""
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-threads", "1", *arguments], check=True)


def make_hour(folder: Path, name: str, codec: list[str], container: list[str]) -> Path:
    """An hour of noisy 640x360 at 30 frames/s: a minute of it, sixty times."""
    piece, path = folder / f"piece_{codec[1]}.mkv", folder / name
    if not piece.exists():
        source = f"testsrc2=size=640x360:rate=30:duration={PIECE_SECONDS},noise=alls=4:allf=t"
        run_ffmpeg("-f", "lavfi", "-i", source, *codec, "-pix_fmt", "yuv420p", str(piece))
    run_ffmpeg("-stream_loop", str(PIECES - 1), "-i", str(piece), "-c", "copy", *container, str(path))
    return path


def used_seconds(call: Callable[[], object]) -> float:
    """Processor time of a call, that of finished children included."""
    before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    children = [(used.ru_utime + used.ru_stime) for _, used in (before, after)]
    return after[0] - before[0] + children[1] - children[0]


def as_input(file: VideoFile) -> VideoInput:
    """A file, to be read by one thread."""
    return VideoInput(file, MAX_PIXELS, 1, lambda: None)


def first_after(file: VideoFile, least_ticks: int) -> int:
    """The time of the first frame from one on, found by decoding all that comes before."""
    with OpenVideo(as_input(file)) as video:
        frames = read_frames(video, Damage())
        return next(frame.ticks for frame in frames if frame.ticks >= least_ticks)


def measure(path: Path, words: str) -> dict:
    """A row of the table for one file."""
    file = VideoFile(open_source(os.fsencode(path)))
    known = replace(probe(as_input(file)), cuts=())  # an archive does not keep them
    second = int(1 / known.time_base)
    least = known.first_ticks + (PIECE_SECONDS * PIECES - BEFORE_END_SECONDS) * second
    wanted: list[int] = []
    from_start = used_seconds(lambda: wanted.append(first_after(file, least)))
    position = known.time_seconds(wanted[0])
    seek = ["-ss", f"{position:.3f}", "-i", str(path), "-frames:v", "1"]
    scaled = ["-vf", "scale=336:336:flags=neighbor,format=rgb24", "-f", "rawvideo", os.devnull]
    ours, theirs, read = [], [], []
    for _ in range(RUNS):
        file = VideoFile(file.descriptor)
        ours.append(used_seconds(lambda file=file: list(frames_at(as_input(file), known, wanted, True))))
        read.append(file.bytes_read)
        theirs.append(used_seconds(lambda: run_ffmpeg(*seek, *scaled)))
    os.close(file.descriptor)
    mine, yardstick, share = sorted(ours)[RUNS // 2], sorted(theirs)[RUNS // 2], read[0] / file.size
    value = f"{share:.3f} of the file, {mine:.2f} s of processor time: {mine / yardstick:.1f} × `ffmpeg -ss`, "
    value += f"{mine / from_start:.4f} × from the start ({from_start:.0f} s)"
    return figure(
        f"one exact frame {BEFORE_END_SECONDS} s before the end of an hour, {words}",
        f"`ffmpeg -ss` ({yardstick:.2f} s); decoding from the start",
        value,
        "≤ 0.05 of the file",
        size_bytes=file.size,
        bytes_read=read,
        ours=ours,
        ffmpeg=theirs,
        from_start=from_start,
    )


def main() -> None:
    """Measures and writes results/exact.json."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, words, codec, container in FILES:
            path = make_hour(Path(folder), name, codec, container)
            rows.append(measure(path, words))
            path.unlink()
    save("exact", rows)


if __name__ == "__main__":
    main()
