"""What an archive costs per video as it grows to a million videos: opening, status, the plan of a job, and commits.

Usage: python ops/bench/million.py FOLDER [--videos N ...] [--make-only]

FOLDER/N gets an archive of N videos of 360 frames and N sources, tiny files with the sizes, times and hashes that the
archive's rows say. The rows, the numbers and the log of the frames are written by vidx's own commits, in large groups.
The parts that the log names do not exist, so nothing can be read from them. What is there already is used; each
run adds a few hundred videos. Each size is
measured in a process of its own, with an empty cache of hashes, as on a new machine.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from harness import figure, run_vidx, save, seconds

from pipeline.index.config import IndexConfig
from pipeline.index.job import plan_index, sampling_of
from pipeline.index.plan import Decision
from pipeline.index.scan import Scan
from storage.archive import delta
from storage.archive.archive import Archive, create_archive, open_archive
from storage.files import join, to_uri
from storage.parts.write import FrameColumns, PartWriter
from storage.records import Part, Probe, Receipt, Sampling, Segment, Status, TokenBatch, VideoRow
from storage.vectors.exact_keys import build_exact, write_exact
from storage.vectors.index_manifest import Covered, IndexManifest, write_manifest
from workers.models.bundle import Bundle, find_bundle

SIZES = (10_000, 100_000, 1_000_000)
FRAMES = 360  # of each video
GROUP = 50  # videos of a commit of a job
MADE = 100_000  # videos of a commit here
RUNS = 5
KEYED = 200  # videos with search keys
KEY_WIDTH = 128  # of nano
CHANGED = 1_700_000_000  # seconds; when the sources were last changed
PROBE = Probe("pyav", "mov,mp4", "h264", 0, 1920, 1080, 0, Fraction(1, 12800), 0, 0.0, float(FRAMES), ())
BOUNDS = {
    "ticks": (0, 12800 * (FRAMES - 1)),
    "frame_index": (0, 25 * (FRAMES - 1)),
    "time_seconds": (0.0, FRAMES - 1.0),
    "duration_seconds": (1.0, 1.0),
}


def content_of(video: int) -> bytes:
    """The bytes of a source."""
    return f"video {video}".encode()


def id_of(video: int) -> str:
    """Its id."""
    return hashlib.sha256(content_of(video)).hexdigest()


def source_of(folder: Path, video: int) -> Path:
    """Where it lies: a thousand files in a folder."""
    return folder / "videos" / f"camera_{video // 1000:04d}" / f"{video:08d}.mp4"


def row_of(archive: Archive, folder: Path, video: int, number: int, sampling: str) -> VideoRow:
    """Its row."""
    return VideoRow(
        video_id=id_of(video),
        video_number=number,
        uri=to_uri(os.fsencode(source_of(folder, video))),
        status=Status.INDEXED,
        problem=None,
        model_id=archive.model_id,
        sampling=sampling,
        frame_count=FRAMES,
        size_bytes=len(content_of(video)),
        mtime_ns=CHANGED * 10**9,
        is_settled=True,
        probe=PROBE,
        captured_at=datetime(2026, 1, 1, tzinfo=UTC),
        tags={"camera": f"{video // 1000:04d}"},
        attempts=1,
        indexed_at=datetime(2026, 11, 1, tzinfo=UTC),
        sandbox_missing=(),
    )


def make(folder: Path, count: int, bundle: Bundle) -> None:
    """Makes the sources and the archive."""
    sampling = sampling_of(IndexConfig(), bundle)
    for video in range(count):
        path = source_of(folder, video)
        if video % 1000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(video))
        os.utime(path, (CHANGED, CHANGED))
    archive = create_archive(str(folder / "archive"), model_id=bundle.model_id, model_name=bundle.name)
    for start in range(0, count, MADE):
        videos = range(start, min(start + MADE, count))
        numbers = archive.reserve([(id_of(video), sampling) for video in videos])
        given = {video: numbers[id_of(video), str(sampling)] for video in videos}
        shards: dict[str, list[tuple[int, int]]] = {}
        for video, number in given.items():
            shards.setdefault(archive.parts.folder_of(number), []).append((video, number))
        for shard, own in shards.items():
            frames = delta.open_table(join(archive.frames_uri, shard))
            guards = {f"segment:{number}:..": 1 for _, number in own}
            delta.commit(frames, [named_part(video, number) for video, number in own], [], guards)
        archive.refresh()
        archive.videos.publish(
            [row_of(archive, folder, video, number, str(sampling)) for video, number in given.items()]
        )
    make_index(archive, folder, count, sampling)
    (folder / "made").touch()


def make_index(archive: Archive, folder: Path, count: int, sampling: Sampling) -> None:
    """A search index that lists every part; KEYED more videos, with real parts, have keys, and the others have none."""
    videos = range(count, count + KEYED)
    numbers = archive.reserve([(id_of(video), sampling) for video in videos])
    given = {video: numbers[id_of(video), str(sampling)] for video in videos}
    keys = np.random.default_rng(0).standard_normal((KEYED, 2, KEY_WIDTH)).astype(np.float32)
    keys = (keys / np.linalg.norm(keys, axis=2, keepdims=True)).astype(np.float16)
    receipts = [
        written_receipt(archive, video, number, str(sampling), own)
        for (video, number), own in zip(given.items(), keys, strict=True)
    ]
    assert all(archive.parts.commit(receipts))
    archive.videos.publish([row_of(archive, folder, video, number, str(sampling)) for video, number in given.items()])
    archive.refresh()
    named = set(given.values())
    keyed = build_exact(archive, [part for part in archive.frames.parts() if part.video_number in named])
    others = (part for part in archive.frames.parts() if part.video_number not in named)
    bare = Covered.of([(part.path, part.video_number, 0) for part in others])
    covered = Covered.join([(each, each.every) for each in (keyed.covered, bare)])
    exact = write_exact(archive, replace(keyed, covered=covered))
    write_manifest(archive, IndexManifest(exact, versions=archive.parts.versions()))


def named_part(video: int, number: int) -> Part:
    """A part that the log names and that does not exist."""
    shared = {"video_id": id_of(video), "video_number": number, "segment": ".."}
    least = shared | {name: low for name, (low, _) in BOUNDS.items()}
    most = shared | {name: high for name, (_, high) in BOUNDS.items()}
    stats = {"numRecords": FRAMES, "minValues": least, "maxValues": most, "nullCount": dict.fromkeys(least, 0)}
    return Part(f"{video:032x}.00000000.parquet", FRAMES, 80_000 * FRAMES, json.dumps(stats))


def written_receipt(
    archive: Archive, video: int, number: int, sampling: str, keys: np.ndarray | None = None
) -> Receipt:
    """A video's only segment, with a real part of two frames, and search keys, (2, KEY_WIDTH) float16, or none."""
    writer = PartWriter(
        archive.frames_uri,
        video_id=id_of(video),
        video_number=number,
        segment_key="..",
        time_base=PROBE.time_base,
        model_id=archive.model_id,
        sampling=sampling,
        dtype="float32",
        folder=archive.parts.folder_of(number),
    )
    seconds_of, ticks = np.arange(2.0), np.arange(2, dtype=np.int64)
    tokens = TokenBatch(np.zeros((2, 1, 8), np.float16), np.zeros((2, 1, 8), np.float16), keys, None)
    writer.append(FrameColumns(ticks * 12800, ticks * 25, seconds_of, seconds_of, np.ones(2)), tokens, [b"", b""])
    return Receipt(Segment(id_of(video), None, None, 0), number, writer.close(), None, "pyav", 2, 0.0, 0.0, 0.0)


def measure(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """Seconds of each step at this size."""
    config = IndexConfig()
    sampling = sampling_of(config, bundle)
    taken: dict[str, Any] = {}
    place = str(folder / "archive")
    taken["open"] = seconds(lambda: open_archive(place))
    taken["open_and_status"] = seconds(lambda: open_archive(place).status())
    taken["status_process"] = statistics.median(process_seconds("status", "--archive", place))
    taken["search_process"] = statistics.median(
        process_seconds("search", "two apples", "--min-score", "-1", "--archive", place)
    )
    archive = open_archive(place)
    taken["videos"] = archive.status().videos_indexed
    taken["memory_mb_opened"] = peak_mb()
    sources = [str(folder / "videos")]
    count = 0

    def look() -> None:
        nonlocal count
        count = sum(1 for _ in Scan(sources).videos())

    taken["scan"] = seconds(look)
    taken["stat"] = seconds(lambda: [os.stat(source_of(folder, video)) for video in range(count)])
    start = time.perf_counter()
    plan = plan_index(Scan(sources).videos(), archive, bundle, sampling, config)
    taken["scan_and_plan"] = time.perf_counter() - start
    if plan.count(Decision.KNOWN) != count:
        raise SystemExit(f"{plan.count(Decision.KNOWN)} of {count} sources are known: remove {folder}")
    del plan
    taken["memory_mb_planned"] = peak_mb()
    steps: dict[str, list[float]] = {"reserve": [], "commit": [], "publish": []}
    next_video = time.time_ns()
    for _ in range(RUNS + 1):  # the first one reads what the others keep
        videos = range(next_video, next_video + GROUP)
        next_video += GROUP
        start = time.perf_counter()
        numbers = archive.reserve([(id_of(video), sampling) for video in videos])
        steps["reserve"].append(time.perf_counter() - start)
        given = {video: numbers[id_of(video), str(sampling)] for video in videos}
        receipts = [written_receipt(archive, video, number, str(sampling)) for video, number in given.items()]
        start = time.perf_counter()
        assert all(archive.parts.commit(receipts))
        steps["commit"].append(time.perf_counter() - start)
        rows = [row_of(archive, folder, video, number, str(sampling)) for video, number in given.items()]
        start = time.perf_counter()
        archive.videos.publish(rows)
        assert next(iter(given.values())) in archive.videos.published()
        steps["publish"].append(time.perf_counter() - start)
    taken |= {f"{name}_{GROUP}": statistics.median(each[1:]) for name, each in steps.items()}
    taken |= {f"{name}_{GROUP}_first": each[0] for name, each in steps.items()}
    taken["memory_mb"] = peak_mb()
    return {name: round(value, 4) for name, value in taken.items()}


def process_seconds(*arguments: str) -> list[float]:
    """How long a command takes as a whole process."""
    return [seconds(lambda: run_vidx(*arguments)) for _ in range(3)]


def peak_mb() -> int:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def one_size(folder: Path, count: int, make_only: bool) -> dict[str, Any]:
    """Makes and measures one size; runs in a process of its own."""
    bundle = find_bundle("nano")
    if not (folder / "made").exists():
        print(f"making {count:,} videos took {seconds(lambda: make(folder, count, bundle)):.0f} s", flush=True)
    if make_only:
        return {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VIDX_CACHE"] = cache
        return measure(folder, bundle)


def main() -> None:
    """Measures every size and writes results/million.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, nargs="+", default=SIZES)
    parser.add_argument("--make-only", action="store_true")
    options = parser.parse_args()
    records = []
    for count in options.videos:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            record = pool.apply(one_size, (options.folder / str(count), count, options.make_only))
        print(json.dumps(record), flush=True)
        records.append(record)
    if not options.make_only:
        save("million", [row(count, record) for count, record in zip(options.videos, records, strict=True)])


def row(count: int, record: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    commits = record[f"reserve_{GROUP}"] + record[f"commit_{GROUP}"] + record[f"publish_{GROUP}"]
    value = (
        f"open and status {record['open_and_status']:.2f} s; `vidx search` as a whole process "
        f"{record['search_process']:.2f} s; plan of an unchanged run, with the scan, {record['scan_and_plan']:.1f} s "
        f"(`stat` {record['stat']:.1f} s); commits {1000 * commits / GROUP:.1f} ms a video"
    )
    return figure(f"An archive of {count:,} videos", "stat", value, "2 s; 2 s; 60 s; the same per video", **record)


if __name__ == "__main__":
    main()
