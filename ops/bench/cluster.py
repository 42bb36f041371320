"""Jobs on a cluster: how fast whole jobs are, who works, what reaches the driver, and what lost nodes cost.

Usage: python ops/bench/cluster.py [--part PART ...] [--clips N] [--rate FRAMES] [--gpu-seconds SECONDS]

Each part writes results/cluster_PART.json. The nodes are real Ray nodes on this machine (ops/ray_nodes.py), and the
model is nano on the CPU.

    stages   a job of one node whose slow stage is decoding, then encoding, against that stage alone on the same cores
    nodes    three nodes of one core against one node of three
    driver   memory of the process that starts a job of many clips, and what it gets from Ray
    gpu      an encoder that sleeps as long as a GPU would compute, fed by as many decoders as arithmetic says; they
             sleep as long as decoding took
    ends     two jobs with the same videos in reversed order, and a job that loses a node of three
"""

import argparse
import itertools
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from decode import make_video
from harness import ROOT, figure, run_vidx, save, seconds

sys.path.insert(0, str(ROOT))

from ops.ray_nodes import ENVIRONMENT, Nodes, ray_nodes

os.environ |= ENVIRONMENT  # Ray reads it when it is imported
import ray

import vidx
from pipeline.cluster import executor as executors
from pipeline.cluster.executor import Executor
from pipeline.index.config import IndexConfig
from pipeline.index.job import IndexResult, plan_index, run_index, sampling_of, worker_settings
from pipeline.index.progress import Progress
from pipeline.index.scan import Scan
from pipeline.index.split import split
from storage.archive.archive import create_archive
from storage.archive.claims import Job
from storage.files import local_path, to_uri
from storage.processes import anonymous_bytes, usable_cores
from storage.records import Choice, FrameBatch, Receipt, Sampling, SegmentTask
from workers.actors import Encoder, WorkerSettings
from workers.decode.client import Decoder
from workers.frame_stream import Decoded, FrameStream, decode_segment
from workers.models.bundle import find_bundle
from workers.sources.identity import identify

SCENES = ROOT / "ops" / "samples" / "nano_scenes_1.mp4"
ROWS = "SELECT video_id, ticks, duration_seconds, md5(token) AS token FROM frames ORDER BY ALL"
BATCH = 32


def copies(source: Path, folder: Path, count: int) -> list[str]:
    """Files of different content that show the same: each has a box of its own that no decoder reads."""
    folder.mkdir()
    content, found = source.read_bytes(), []
    for number in range(count):
        path = folder / f"{number:06d}.mp4"
        path.write_bytes(content + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
        found.append(str(path))
    return found


def pace_of(files: Sequence[str], archive: Path, **options: Any) -> tuple[float, IndexResult]:
    """Frames a second of a job from its first frames to its last, without the start of Ray and the model."""
    marks: list[tuple[float, int]] = []

    def note(state: Progress) -> None:
        if frames := state.frames_done + state.frames_at_work:
            marks.append((time.monotonic(), frames))

    result = vidx.index(files, archive, progress=note, **options)
    end, last = next(mark for mark in marks if mark[1] == marks[-1][1])
    return (last - marks[0][1]) / (end - marks[0][0]), result


def task_of(file: str, sampling: Sampling) -> SegmentTask:
    """The one segment of a clip."""
    name = os.fsencode(file)
    content = identify(name)
    with Decoder() as decoder:
        probe = decoder.probe(name)
    (segment,) = split(content.video_id, probe)
    return SegmentTask(to_uri(name), content, probe, segment, 0, sampling)


def measure_stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A job whose slow stage is decoding, and one whose slow stage is encoding."""
    rows, cores = [], usable_cores()
    for name, fps, make in (
        ("decode", Fraction(1, 4), partial(make_video, length=30)),
        ("encode", Fraction(10), copy_scenes),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.mp4"
            make(source)
            files = copies(source, Path(folder) / "clips", options.clips or 4 * cores)
            task = task_of(files[0], Sampling(fps, find_bundle("nano").default_patch_rows))
            alone = {"decode": decoding_alone(task, cores), "encode": encoding_alone(task, cores)}
            pace, _ = pace_of(files, Path(folder) / "archive", fps=str(fps))
        slowest = min(alone, key=alone.__getitem__)
        together = 1 / sum(1 / each for each in alone.values())  # where no core ever waits
        what = f"whole job on one node of {cores} cores, {name} the slow stage (nano)"
        value = f"{pace / alone[slowest]:.2f} × its pace; with no core idle it would be {together / alone[slowest]:.2f}"
        raw = {"job_frames_per_second": pace, "alone_frames_per_second": alone, "slowest": slowest}
        rows.append(figure(what, f"{slowest} alone on the same cores", value, "≥ 0.9 ×", **raw))
    return rows


def copy_scenes(path: Path) -> None:
    """A clip that is decoded fast."""
    shutil.copy(SCENES, path)


def decoding_alone(task: SegmentTask, cores: int) -> float:
    """Frames a second of a decoder on each core."""

    def drain(decoder: Decoder) -> int:
        pieces = decode_segment(task, decoder, BATCH)
        return sum(len(piece) for piece in pieces if isinstance(piece, FrameBatch))

    decoders = [Decoder() for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(drain, decoders))  # the processes start
        start = time.monotonic()
        frames = sum(pool.map(drain, decoders))
        taken = time.monotonic() - start
    for decoder in decoders:
        decoder.close()
    return frames / taken


def encoding_alone(task: SegmentTask, cores: int) -> float:
    """Frames a second of the model on all cores."""
    import torch  # here: the process that starts a job does not need it, and its memory is measured

    from workers.vision.encode import encode_frames
    from workers.vision.llava_mini import load_vision

    vision = load_vision(find_bundle("nano"), "cpu", "float32")
    torch.set_num_threads(cores)
    with Decoder() as decoder:
        pieces = [piece for piece in decode_segment(task, decoder, BATCH) if isinstance(piece, FrameBatch)]
    encode_frames(vision, pieces[0].pixels, task.sampling.patches)
    rounds = max(1, 300 // sum(map(len, pieces)))
    taken = seconds(
        lambda: [encode_frames(vision, piece.pixels, task.sampling.patches) for _ in range(rounds) for piece in pieces]
    )
    return rounds * sum(map(len, pieces)) / taken


def measure_nodes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same job on three nodes of one core, and on one node of three."""
    paces, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = copies(SCENES, Path(folder) / "clips", options.clips or 24)
        for name, cores in (("three", (1, 1, 1)), ("one", (3,))):
            with ray_nodes(*cores) as nodes:
                place = Path(folder) / name
                paces[name], results[name] = pace_of(files, place, fps="4", address=nodes.address)
    by_node = results["three"].frames_by_node
    value = f"{paces['three'] / paces['one']:.2f} × its pace; frames by node: {', '.join(map(str, by_node.values()))}"
    raw = {"frames_per_second": paces, "frames_by_node": {name: each.frames_by_node for name, each in results.items()}}
    what = f"{len(files)} clips on three nodes of one core, all on this machine (nano)"
    return [figure(what, "one node of three cores", value, "≥ 0.9 ×, each node in proportion", **raw)]


def measure_driver(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory and received bytes of the process that starts a job, as the job goes on."""
    count = options.clips or 1000
    answers = {"bytes": 0, "largest": 0}
    samples: list[tuple[float, int, int, int]] = []
    get = ray.get

    def counted(*arguments: Any, **others: Any) -> Any:
        result = get(*arguments, **others)
        size = len(pickle.dumps(result))
        answers["bytes"] += size
        answers["largest"] = max(answers["largest"], size)
        return result

    def note(state: Progress) -> None:
        samples.append((time.monotonic(), state.videos_done, anonymous_bytes(), answers["bytes"]))

    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.mp4"
        command = ["ffmpeg", "-v", "error", "-i", str(SCENES), "-t", "2", "-c:v", "libx264", str(short)]
        subprocess.run(command, check=True)
        copies(short, Path(folder) / "clips", count)
        config, bundle = IndexConfig(device="cpu"), find_bundle("nano")
        archive = create_archive(to_uri(str(Path(folder) / "archive")), model_id=bundle.model_id, model_name="nano")
        videos = Scan([str(Path(folder) / "clips")]).videos()
        plan = plan_index(videos, archive, bundle, sampling_of(config, bundle), config)
        with patch.object(ray, "get", counted):
            result = run_index(plan, archive, bundle, config, note)
    if result.indexed != count:
        raise RuntimeError(f"{result.indexed} of {count} clips are indexed")
    at = [next(sample for sample in samples if sample[1] >= share * count) for share in (0.25, 0.5, 0.75)]
    at.append(max(samples, key=lambda sample: (sample[1], sample[0])))
    memory = [sample[2] / 1e6 for sample in at]
    per_clip = [(after[3] - before[3]) / max(1, after[1] - before[1]) for before, after in itertools.pairwise(at)]
    value = (
        f"memory {', '.join(f'{each:.0f}' for each in memory)} MB; {', '.join(f'{each:,.0f}' for each in per_clip)} "
        f"bytes of answers a clip; the largest has {answers['largest']:,} bytes"
    )
    what = f"the process that starts a job of {count:,} clips, after 25, 50, 75 and 100 %"
    raw = {"samples": samples[:: max(1, len(samples) // 200)], "clips": count}
    return [figure(what, "a frame has 338,688 bytes", value, "flat; no frame or token", **raw)]


def recorded_decoding(sampling: Sampling) -> tuple[SegmentTask, list[tuple[int, float]], str]:
    """A segment of 720p30, and how many frames its pieces have and how long each took; and where its file is."""
    folder = tempfile.mkdtemp()
    make_video(Path(folder) / "noise.mp4")
    task = task_of(str(Path(folder) / "noise.mp4"), sampling)
    pieces: list[tuple[int, float]] = []
    with Decoder() as decoder:
        for _ in range(2):  # the process starts in the first
            pieces, before = [], time.monotonic()
            for batch in decoder.decode(local_path(task.uri), task.probe, task.segment, sampling.fps, BATCH):
                pieces.append((len(batch), time.monotonic() - before))
                before = time.monotonic()
    return task, pieces, folder


def sleeping_encoder(pieces: Sequence[tuple[int, float]], rate: float) -> type[Encoder]:
    """An Encoder that sleeps as long as a GPU would compute, whose decoders sleep as long as decoding took."""

    def decode(_settings: WorkerSettings, task: SegmentTask) -> FrameStream:
        import numpy as np

        for count, taken in pieces:
            time.sleep(taken)
            places = np.arange(count)
            yield FrameBatch(np.zeros((count, 336, 336, 3), np.uint8), places, places + 1, places, (b"",) * count)
        yield Decoded(None, task.probe.decoder)

    class SleepingEncoder(Encoder):
        def load(self, threads: int | None) -> None:
            from pipeline.cluster import stages

            stages.decode_frames = decode

        def encode(self, task: SegmentTask, unseen_by: tuple[str, ...] = ()) -> Receipt:
            count = 0
            for piece in self._decode(task, unseen_by):
                if isinstance(piece, FrameBatch):
                    with self._model_turn:
                        time.sleep(len(piece) / rate)
                    count += len(piece)
            return Receipt(task.segment, task.video_number, None, None, "pyav", count, 0.0, count / rate, 0.0)

    return SleepingEncoder


def measure_gpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of time for which a simulated GPU waits for frames."""
    sampling = Sampling(Fraction(1), 0)
    task, pieces, videos = recorded_decoding(sampling)
    frames, taken = sum(count for count, _ in pieces), sum(taken for _, taken in pieces)
    decoders = math.ceil(options.rate * taken / frames)
    segments = max(10 * decoders, int(options.rate * options.gpu_seconds / frames))
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ray_nodes(decoders + 1, gpus=1) as nodes:
        bundle = find_bundle("nano")
        archive = create_archive(to_uri(str(Path(folder) / "archive")), model_id=bundle.model_id, model_name="nano")
        settings = worker_settings(archive, bundle, IndexConfig(device="cuda"), Choice.RATE)
        with (
            patch.object(executors, "Encoder", sleeping_encoder(pieces, options.rate)),
            Job(archive.uri) as job,
            Executor(settings, archive.uri, job.uri, [task.uri], address=nodes.address, announce=print) as executor,
        ):
            given = 0
            while len(ends) < segments:
                while given < segments and executor.free("encode") > 0:
                    executor.encode(given, task)
                    given += 1
                for outcome in executor.wait(0.5):
                    if outcome.result is None or outcome.result.frame_count != frames:
                        raise RuntimeError(f"a segment failed: {outcome.problem}")
                    ends.append(time.monotonic())
    shutil.rmtree(videos)
    # Without the first rounds, in which the decoders' processes start, and the last, in which some have no work left.
    steady = ends[2 * decoders : -decoders - 1] or ends
    busy = (len(steady) - 1) * frames / options.rate / (steady[-1] - steady[0])
    what = f"a simulated GPU of {options.rate:g} frames/s, fed by {decoders} simulated decoders of 720p30 at 1 frame/s"
    yardstick = f"{frames / taken:.1f} frames/s of one decoder alone, so {options.rate * taken / frames:.1f} decoders"
    raw = {"recorded": pieces, "segments": segments, "busy": busy, "decoders": decoders}
    return [figure(what, yardstick, f"idle for {1 - busy:.1%}", "≤ 5 %", **raw)]


def measure_ends(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two jobs with the same videos in reversed order, and a node of three killed with no core to spare."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = copies(SCENES, Path(folder) / "clips", options.clips or 12)
        run_vidx("index", *files, "--fps", "4", "--archive", f"{folder}/alone")
        wanted = run_vidx("sql", ROWS, "--csv", "--archive", f"{folder}/alone").stdout
        cases: dict[str, tuple[tuple[int, ...], Callable[[Nodes, list[str], str], Iterator[str]]]] = {
            "two jobs with the same videos in reversed order, on two nodes of one core": ((1, 1), two_jobs),
            "a job on three nodes of one core, of which one is killed": ((1, 1, 1), lost_node),
        }
        for number, (what, (cores, run)) in enumerate(cases.items()):
            archive = f"{folder}/archive{number}"
            with ray_nodes(*cores) as nodes:
                start = time.monotonic()
                told = list(run(nodes, files, archive))
                taken = time.monotonic() - start
            equal = run_vidx("sql", ROWS, "--csv", "--archive", archive).stdout == wanted
            value = f"{'; '.join(told)}; rows {'equal' if equal else 'differ'}"
            raw = {"seconds": taken, "rows": wanted.count("\n") - 1, "equal": equal}
            rows.append(figure(what, "the rows of one machine", value, "all end; equal", **raw))
    return rows


def start_job(nodes: Nodes, files: Sequence[str], archive: str) -> subprocess.Popen:
    """A job on a cluster."""
    command = [str(Path(sys.executable).parent / "vidx"), "index", *files, "--fps", "4", "--archive", archive]
    return subprocess.Popen([*command, "--address", nodes.address], stdout=-1, stderr=-1, text=True)


def two_jobs(nodes: Nodes, files: list[str], archive: str) -> Iterator[str]:
    """How two jobs at once end."""
    jobs = [start_job(nodes, order, archive) for order in (files, files[::-1])]
    with ThreadPoolExecutor(2) as pool:
        for job, _ in zip(jobs, list(pool.map(subprocess.Popen.communicate, jobs)), strict=True):
            yield f"exit code {job.returncode}"


def lost_node(nodes: Nodes, files: list[str], archive: str) -> Iterator[str]:
    """How a job ends that loses a node."""
    job = start_job(nodes, files, archive)
    assert job.stderr is not None
    while "mp4 0:" not in (line := job.stderr.readline()):  # it indexes
        if not line:
            raise RuntimeError("the job ended before a node was killed")
    nodes.kill(2)
    killed = time.monotonic()
    job.communicate()
    yield f"exit code {job.returncode}, {time.monotonic() - killed:.0f} s later"


PARTS = {
    "stages": measure_stages,
    "nodes": measure_nodes,
    "driver": measure_driver,
    "gpu": measure_gpu,
    "ends": measure_ends,
}


def main() -> None:
    """Runs the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clips", type=int, help="of a job; by default each part has a number of its own")
    parser.add_argument("--rate", type=float, default=600, help="frames a second of the simulated GPU")
    parser.add_argument("--gpu-seconds", type=float, default=60, help="for which the simulated GPU has work")
    options = parser.parse_args()
    for part in options.part:
        save(f"cluster_{part}", PARTS[part](options))


if __name__ == "__main__":
    main()
