"""Finding moments with the built-in model: by text, by picture, and "nothing found", in a world that it has not seen.

Usage: python ops/bench/retrieval.py FOLDER [--seed N] [--clips FOLDER ...]

Ten videos of five minutes are made from the seed and indexed at four frames a second: half of the moments last less
than 2.3 seconds, and at one frame a second not even the right frames overlap three of four by half. Texts: every
caption of a scene, once, right wherever it is true. Not there: things outside its world, by words that no
training has seen, and pairs of the world's things that no scene shows together are counted by themselves. Pictures: of
every caption's first scene, the frame that the encoded file shows a third of a second past the middle. On real clips
every pictogram is searched for: their world holds none.
"""

import argparse
import csv
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, figure, render_world, run_vidx, save

sys.path.insert(0, str(ROOT))

from ops.nano.pictograms import THINGS, with_article
from ops.nano.unknown import unknown_caption
from pipeline.ask.filter import Filter
from pipeline.ask.query import Kind, Query, Term
from pipeline.ask.search import Searcher, SearchLimits, bundle_of
from pipeline.evaluate.retrieval import Annotated, Judged, judge, read_annotations, score
from storage.archive.archive import Archive, open_archive
from storage.records import Status, VideoRow

VIDEOS, MINUTES, FPS = 10, 5.0, 4
BESIDE_SECONDS = 1 / 3
DEPTH = 10


def make(folder: Path, seed: int) -> tuple[Archive, list[dict[str, str]]]:
    """The world of a seed, indexed, and its moments; what is there already is used."""
    world, place = folder / f"world-{seed}", folder / f"archive-{seed}-{FPS}"
    render_world(world, seed, VIDEOS, MINUTES)
    run_vidx("index", str(world), "--fps", str(FPS), "--archive", str(place))
    with (world / "MOMENTS.csv").open(encoding="utf-8", newline="") as file:
        return open_archive(str(place)), list(csv.DictReader(file))


class Bench:
    """An archive with the built-in model, and what its searches give."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self._searcher = Searcher(archive, bundle_of(archive, None))

    def judged(self, wanted: Sequence[tuple[Annotated, Term]]) -> list[Judged]:
        """What each search gives against its truth."""
        return [
            judge(one, self._searcher.search(Query((term,)), Filter(), SearchLimits(DEPTH)).moments)
            for one, term in wanted
        ]

    def texts(self, annotated: Sequence[Annotated]) -> list[Judged]:
        """What each text gives."""
        return self.judged([(one, Term(one.text)) for one in annotated])


def absent(texts: Sequence[str]) -> list[Annotated]:
    """Texts that nothing fits."""
    return [Annotated(text, (), None) for text in dict.fromkeys(texts)]


def strangers(count: int) -> list[str]:
    """Names of things that are not of the world."""
    source = np.random.default_rng(0)
    return [unknown_caption(source, held_out=True) for _ in range(count)]


def never_together(captions: Sequence[str], count: int) -> list[str]:
    """Pairs of the world's things that no caption names together."""
    seen = [set(caption.replace(",", "").split()) for caption in captions]
    source, pairs = random.Random(0), []
    while len(pairs) < count:
        one, other = source.sample(THINGS, 2)
        forms = [{thing.word, thing.plural} for thing in (one, other)]
        if not any(words & forms[0] and words & forms[1] for words in seen):
            pairs.append(f"{with_article(one.word)} next to {with_article(other.word)}")
    return pairs


def pictures(archive: Archive, annotated: Sequence[Annotated], folder: Path) -> list[tuple[Annotated, Term]]:
    """A frame of each caption's first scene, as a decoder of another program gives it."""
    folder.mkdir(exist_ok=True)
    uris, wanted = {row.video_id: row.uri for row in archive.videos.all()}, []
    for number, one in enumerate(annotated):
        truth = one.truths[0]
        path = folder / f"{number:04d}.png"
        if not path.exists():
            at = min((truth.start_seconds + truth.end_seconds) / 2 + BESIDE_SECONDS, truth.end_seconds - 0.05)
            command = ["ffmpeg", "-v", "error", "-ss", f"{at:.3f}", "-i", uris[truth.video_id].removeprefix("file://")]
            subprocess.run([*command, "-frames:v", "1", str(path)], check=True)
        wanted.append((one, Term(str(path), kind=Kind.IMAGE)))
    return wanted


def at_random(archive: Archive, annotated: Sequence[Annotated]) -> float:
    """R@1 (IoU 0.5) of moments that begin anywhere and are as long as the text's truth."""
    rows: list[VideoRow] = [row for row in archive.videos.all() if row.status is Status.INDEXED]
    source, met = random.Random(0), 0
    for one in annotated:
        truth, row = one.truths[0], source.choice(rows)
        start = source.uniform(0, row.probe.duration_seconds)
        length = truth.end_seconds - truth.start_seconds
        met += any(
            other.video_id == row.video_id
            and 2 * (min(start + length, other.end_seconds) - max(start, other.start_seconds))
            >= max(start + length, other.end_seconds) - min(start, other.start_seconds)
            for other in one.truths
        )
    return met / len(annotated)


def real_clips(folders: Sequence[Path], folder: Path) -> dict[str, Any]:
    """How many of the pictograms' names find something in real footage."""
    clips = {path.name: path for place in folders for path in sorted(place.iterdir()) if is_real(path)}
    run_vidx("index", *map(str, clips.values()), "--archive", str(folder / "real"), check=False)
    archive = open_archive(str(folder / "real"))
    judged = Bench(archive).texts(absent([with_article(thing.word) for thing in THINGS]))
    wrong = [one.text for one in judged if one.is_found]
    return {"clips": len(archive.videos.published()), "texts": len(judged), "found": wrong}


def is_real(path: Path) -> bool:
    """Whether it is a video, and not one of nano's world."""
    return path.suffix in (".mp4", ".mkv", ".webm", ".avi", ".mov", ".ts") and not path.name.startswith("nano")


def main() -> None:
    """Measures and writes results/retrieval.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=5000021)
    parser.add_argument("--clips", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    archive, moments = make(options.folder, options.seed)
    bench = Bench(archive)
    there = read_annotations(str(options.folder / f"world-{options.seed}" / "MOMENTS.csv"), archive)
    found = bench.texts(there)
    unknown = bench.texts(absent(strangers(len(there))))
    apart = bench.texts(absent(never_together([row["text"] for row in moments], len(there))))
    seen = bench.judged(pictures(archive, there, options.folder / f"pictures-{options.seed}"))
    real = real_clips([ROOT / "ops/samples", *options.clips], options.folder)

    both, text, picture = score([*found, *unknown]), score(found), score(seen)
    chance = at_random(archive, there)
    counts = {
        "texts": len(there),
        "not_there": len(unknown),
        "seed": options.seed,
        "frames": archive.videos.frame_count(),
    }
    r1, picture_r1 = text.recall[1, 0.5], picture.recall[1, 0.5]
    wrong = len(real["found"]) / real["texts"]
    missed = [one.text for one in found if one.ranks[0.5] != 1]
    rows = [
        figure(
            f"nano, 10 videos of 5 minutes at {FPS} frames a second: text → moment, R@1 (IoU 0.5)",
            f"at random {100 * chance:.1f} %",
            f"{100 * r1:.1f} % of {len(there)}",
            "≥ 90 %",
            **counts,
            recall={f"R@{rank} IoU={least}": share for (rank, least), share in text.recall.items()},
            mrr=text.reciprocal_rank,
            missed=missed,
        ),
        figure(
            f"found or not, F1: those, and {len(unknown)} texts about things outside its world",
            f"all found {2 * len(there) / (2 * len(there) + len(unknown)):.3f}",
            f"{both.found_f1:.3f} ({both.found} of {both.there}; wrongly {both.found_wrongly} of {both.absent})",
            "≥ 0.9",
        ),
        figure(
            "two things of its world that no scene shows together",
            "-",
            f"{sum(one.is_found for one in apart)} of {len(apart)} find a scene with one of them",
            "-",
        ),
        figure("picture → moment, R@1 (IoU 0.5)", "-", f"{100 * picture_r1:.1f} % of {len(seen)}", "≥ 95 %"),
        figure(
            f"{real['clips']} real clips: names of pictograms that find something",
            "-",
            f"{100 * wrong:.0f} % of {real['texts']}",
            "≤ 10 %",
            found=real["found"],
        ),
    ]
    save("retrieval", rows)


if __name__ == "__main__":
    main()
