"""The vector index as an archive grows to ten million frames: time, recall, memory, and what each frame costs.

Usage: python ops/bench/index.py FOLDER [--frames N]

Makes an archive of footage-like keys of width 768 in FOLDER (2.5 kB a frame and 0.5 kB of index), hour by hour as jobs
would, and stops at each size to measure. It goes on where it was stopped. Recall and time are against comparing the
query with every key in float16, by FAISS on both cores, on the same machine in the same run. A second archive, of keys
as wide as the built-in model's, is for `vidx search` as a whole process.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import footage
import numpy as np
from harness import figure, run_vidx, save, seconds

from pipeline.ask.filter import Filter
from storage.archive.archive import Archive, create_archive, open_archive
from storage.archive.frames import Rows
from storage.files import tree_size
from storage.parts.read import part_keys
from storage.vectors.exact_keys import part_row_ids
from storage.vectors.nearest import Index
from storage.vectors.vector_index import drop_index, improve_index, open_index, update_index
from workers.models.bundle import find_bundle
from workers.vision.clip_text import TextEncoder

SIZES = (10_800, 108_000, 1_000_800, 10_000_800)
BATCH_VIDEOS = 8
QUERIES = 100  # of each kind
WIDTH = 768
EXACT = "each key compared in float16"
K = 10


def queries(shared: footage.Directions, frames: int) -> dict[str, np.ndarray]:
    """(QUERIES, E) float32 of each kind, about frames that the archive holds."""
    random = np.random.default_rng(frames)
    videos = random.integers(1, frames // footage.VIDEO_FRAMES + 1, QUERIES).tolist()
    places = random.integers(0, footage.VIDEO_FRAMES, QUERIES).tolist()
    makers = {"picture": footage.picture_query, "text": footage.text_query}
    return {
        kind: np.stack([make(shared, video, frame) for video, frame in zip(videos, places, strict=True)])
        for kind, make in makers.items()
    }


def blocks(archive: Archive, rows: Rows | None = None, most: int = 1 << 18) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys, (T, E) float16, and row ids, (T,), of frames, as many at a time as fit into memory."""
    keys, ids = [], []
    for part in archive.frames.parts():
        if rows is not None and part.path not in rows:
            continue
        chosen = None if rows is None else rows[part.path]
        keys.append(part_keys(archive.frames_uri, part.path, chosen))
        row_ids = part_row_ids(archive, part.path, part.video_number)
        ids.append(row_ids if chosen is None else row_ids[chosen])
        if sum(len(piece) for piece in keys) >= most:
            yield np.concatenate(keys), np.concatenate(ids)
            keys, ids = [], []
    if keys:
        yield np.concatenate(keys), np.concatenate(ids)


def exact(archive: Archive, wanted: np.ndarray, rows: Rows | None = None) -> tuple[np.ndarray, float]:
    """(Q, K) row ids of the best keys of each query, and seconds a query, compared one after another."""
    best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(wanted)
    total, timed_count = 0.0, min(10, len(wanted))
    for keys, ids in blocks(archive, rows):
        scalar = faiss.IndexScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        scalar.add_sa_codes(keys.view(np.uint8))
        halves = np.array_split(np.arange(len(keys)), 2)
        for number, query in enumerate(wanted):
            start = time.perf_counter()
            scores, places = _both_cores(scalar, query, halves)
            if number < timed_count:
                total += time.perf_counter() - start
            joined = (np.concatenate([best[number][0], scores]), np.concatenate([best[number][1], ids[places]]))
            order = np.argsort(-joined[0], kind="stable")[:K]
            best[number] = (joined[0][order], joined[1][order])
    return np.stack([ids for _, ids in best]), total / timed_count


def _both_cores(
    index: faiss.IndexScalarQuantizer, query: np.ndarray, halves: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The best keys of one query; FAISS puts one query on one thread."""
    found: list[Any] = [None] * len(halves)

    def half(number: int) -> None:
        places = halves[number]
        selector = faiss.IDSelectorRange(int(places[0]), int(places[-1]) + 1)
        parameters = faiss.SearchParameters(sel=selector)
        found[number] = index.search(query[None], K, params=parameters)

    threads = [threading.Thread(target=half, args=(number,)) for number in range(len(halves)) if len(halves[number])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scores, places = (np.concatenate([pair[side][0] for pair in found if pair]) for side in (0, 1))
    return scores[places >= 0], places[places >= 0]


def ours(index: Index, wanted: np.ndarray, rows: Rows | None = None) -> tuple[np.ndarray, list[float]]:
    """(Q, K) row ids, -1 where fewer were found, and the seconds of each query, after one round to warm up."""
    for query in wanted:
        index.search(query, K, rows)
    found, times = np.full((len(wanted), K), -1, np.int64), []
    for number, query in enumerate(wanted):
        start = time.perf_counter()
        hits = index.search(query, K, rows)
        times.append(time.perf_counter() - start)
        found[number, : len(hits)] = [(hit.video_number << 32) | hit.frame_index for hit in hits]
    return found, times


def recall(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true best that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)]))


def memory_bytes(uri: str) -> int:
    """Of a process that has opened the index and searched, besides the pages of files that it has mapped."""
    code = (
        "import numpy as np; from storage.archive.archive import open_archive;"
        "from storage.vectors.vector_index import open_index;"
        f"index = open_index(open_archive({uri!r})); queries = np.random.default_rng(0).standard_normal((20, {WIDTH}));"
        "[index.search(query.astype(np.float32), 10) for query in queries];"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))"
    )
    return 1024 * int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure(archive: Archive, shared: footage.Directions) -> dict[str, Any]:
    """What one size gives."""
    frames = archive.videos.frame_count()
    start = time.perf_counter()
    index = open_index(archive)
    record: dict[str, Any] = {"frames": frames, "open_seconds": time.perf_counter() - start}
    for kind, wanted in queries(shared, frames).items():
        found, times = ours(index, wanted)
        true, exact_seconds = exact(archive, wanted)
        record[kind] = {
            "ms": 1e3 * statistics.median(times),
            "ms_p95": 1e3 * sorted(times)[int(0.95 * len(times))],
            "recall": recall(found, true),
            "exact_ms": 1e3 * exact_seconds,
        }
    record["memory_bytes"] = memory_bytes(archive.uri)
    wanted = np.concatenate(list(queries(shared, frames).values()))[::4]
    for name, within in filters(archive, frames).items():
        rows = within.rows(archive)
        start = time.perf_counter()
        within.rows(archive)
        resolve = time.perf_counter() - start
        found, times = ours(index, wanted, rows)
        true, exact_seconds = exact(archive, wanted, rows)
        record[name] = {
            "share": index.count(rows) / frames,
            "ms": 1e3 * statistics.median(times),
            "resolve_ms": 1e3 * resolve,
            "recall": recall(found, true),
            "exact_ms": 1e3 * exact_seconds,
        }
    record["index_bytes"], record["archive_bytes"] = tree_size(archive.index_uri), tree_size(archive.uri)
    return record


def filters(archive: Archive, frames: int) -> dict[str, Filter]:
    """The videos of one camera of a hundred; and a hundred thousandth: a minute or two of one video."""
    row = archive.videos.all()[frames // footage.VIDEO_FRAMES // 2]
    return {
        "filter 1 %": Filter(tags={"camera": (row.tags["camera"],)}),
        "filter 0.001 %": Filter(video=row, start_seconds=1000.0, end_seconds=1000.0 + frames / 1e5),
    }


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and the most memory that this process has had so far."""
    start = time.perf_counter()
    call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def grow(folder: Path, target: int) -> list[dict[str, Any]]:
    """Adds hours until there are so many frames, measures at each size; what was measured is kept in the folder."""
    records_path = folder / "records.jsonl"
    records = [json.loads(line) for line in records_path.read_text().splitlines()] if records_path.exists() else []
    archive = create_archive(str(folder / "archive"), model_id=footage.MODEL_ID, model_name="footage")
    shared = footage.directions(WIDTH)
    for size in (size for size in SIZES if size <= target):
        while archive.videos.frame_count() < size:
            first = archive.videos.frame_count() // footage.VIDEO_FRAMES + 1
            last = min(first + BATCH_VIDEOS, size // footage.VIDEO_FRAMES + 1)
            footage.add_videos(archive, shared, range(first, last))
            print(f"{archive.videos.frame_count()} frames", file=sys.stderr)
        if archive.videos.frame_count() == size and all(record["frames"] != size for record in records):
            built = build(archive, folder / f"build-{size}.json")
            record = {**measure(open_archive(archive.uri), shared), "build": built}
            records.append(record)
            with records_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), file=sys.stderr)
    return records


def build(archive: Archive, record_path: Path) -> dict[str, float]:
    """What building the index from nothing takes; where that has been done, as it was written down."""
    if not record_path.exists():
        drop_index(archive)
        record_path.write_text(json.dumps(timed(lambda: update_index(archive))))
        improve_index(archive)
    return json.loads(record_path.read_text())


def add_one(folder: Path) -> dict[str, Any]:
    """Seconds until one more hour is in the index, and whether a search finds it then."""
    archive, shared = open_archive(str(folder / "archive")), footage.directions(WIDTH)
    video = len(archive.numbers.known()) + 1  # none that was there and is deleted
    footage.add_videos(archive, shared, range(video, video + 1))
    times = timed(lambda: update_index(archive))
    (hit,) = open_index(archive).search(footage.picture_query(shared, video, 1800), 1)
    number = archive.videos.find(f"{video:06}.mp4").video_number
    return {**times, "found": (hit.video_number, hit.frame_index) == (number, 1800)}


def whole_process(folder: Path, frames: int) -> dict[str, Any]:
    """Seconds of `vidx search` in an archive of so many frames of the built-in model."""
    bundle = find_bundle("nano")
    archive = create_archive(str(folder / "nano"), model_id=bundle.model_id, model_name="nano")
    shared = footage.directions(len(TextEncoder(bundle).embed("a dog")))
    while archive.videos.frame_count() < frames:
        first = archive.videos.frame_count() // footage.VIDEO_FRAMES + 1
        footage.add_videos(archive, shared, range(first, min(first + BATCH_VIDEOS, frames // footage.VIDEO_FRAMES + 1)))
    update_index(archive)
    improve_index(archive)
    command = ["search", "a dog", "--min-score", "-1", "--archive", str(folder / "nano")]
    runs = [seconds(lambda: run_vidx(*command)) for _ in range(6)][1:]
    return {"frames": archive.videos.frame_count(), "seconds": statistics.median(runs), "runs": runs}


def figures(records: list[dict[str, Any]], added: dict[str, Any], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ops/docs/benchmarks.md."""
    rows = []
    for record in records:
        size = f"{record['frames']:,} x {WIDTH} keys"
        for kind, words in (("picture", "near"), ("text", "far")):
            one = record[kind]
            value = f"{one['ms']:.1f} ms, recall@10 {one['recall']:.3f} ({one['exact_ms']:.0f} ms)"
            rows.append(figure(f"search {size}, {kind} queries ({words})", EXACT, value, "≤ 10 ms, ≥ 0.95", **one))
        for name in ("filter 1 %", "filter 0.001 %") if record["frames"] > 1e6 else ():
            one = record[name]
            value = f"{one['ms']:.1f} ms, recall@10 {one['recall']:.3f} ({one['exact_ms']:.1f} ms)"
            rows.append(figure(f"{name} of {size}", EXACT, value, "≤ 20 ms, ≥ 0.95 / 1", **one))
    rows.append(growth(records))
    last = records[-1]
    build, size = last["build"], f"{last['frames']:,}"
    minutes = f"{build['seconds'] / 60:.1f} minutes, {build['peak_bytes'] / 2**30:.1f} GiB at most"
    rows.append(figure(f"build the index of {size} keys", "-", minutes, "≤ 24 GiB", build=build))
    memory = f"{last['memory_bytes'] / 2**30:.2f} GiB"
    rows.append(figure(f"memory of a search in {size} keys besides mapped files", "-", memory, "≤ 2.5 GB"))
    value = f"{added['seconds']:.2f} s, {'found' if added['found'] else 'not found'} at once"
    rows.append(figure(f"add an hour of 3,600 frames to {size}", "-", value, "≤ 2 s", **added))
    value = f"{whole['seconds']:.2f} s"
    rows.append(figure(f"`vidx search` as a whole process, {whole['frames']:,} frames", "-", value, "≤ 1.0 s", **whole))
    return rows


def growth(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What each added frame costs from one size to the next; ops/bench/growth.py draws it."""
    large = [record for record in records if record["frames"] > 1e5]
    costs = {
        name: [
            (more[f"{name}_bytes"] - less[f"{name}_bytes"]) / (more["frames"] - less["frames"])
            for less, more in itertools.pairwise(large)
        ]
        for name in ("archive", "index")
    }
    value = "; ".join(
        f"{name} {' → '.join(f'{cost:,.0f}' for cost in each)} bytes" for name, each in costs.items() if each
    )
    sizes = " → ".join(f"{record['frames']:,}" for record in large)
    what = f"each added frame, keys and index alone, {sizes} frames"
    return figure(what, "the step before", value, "flat within 10 %", costs=costs, records=records)


def main() -> None:
    """Grows the archive, measures, and writes results/index.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=SIZES[-1])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    records = grow(options.folder, options.frames)
    save("index", figures(records, add_one(options.folder), whole_process(options.folder, options.frames)))


if __name__ == "__main__":
    main()
