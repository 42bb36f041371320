"""What pre-fusion loses by what is stored of a frame: answers, bytes, and time to the first word, by patch tier.

Usage: python ops/bench/fidelity.py FOLDER [--seed N]

Videos of nano's world are rendered into FOLDER. Every question about a moment is answered from its frames at one a
second with all patches, with the compressor's output alone, and with VisionZip's rows in several numbers (dominant +
contextual), in int8 with a scale per row and some in float16. The same is done with a reference checkpoint, whose
weights are random, on real clips: there is no right answer there, and what is compared is how many of an answer's first
tokens stay the same.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, figure, render_world, run_vidx, save, seconds

sys.path.insert(0, str(ROOT))

from ops.nano.questions import MOMENT_KINDS
from ops.published import generate, greedy_logits
from pipeline.ask.filter import Filter
from storage.archive.archive import Archive, open_archive
from storage.files import local_path
from storage.records import VideoRow
from workers.decode.client import Decoder, allowed_pixels
from workers.llm.engine import ModelOptions
from workers.llm.model import LlavaMini, answer_embeds, fuse_question, load_model
from workers.llm.prompt import decode_ids, prompt_ids
from workers.models.bundle import find_bundle
from workers.vision.encode import FrameFeatures, all_patches, frame_features, frame_pixels, to_int8, vision_tokens
from workers.vision.prefusion import FusionInputs
from workers.vision.visionzip import keep_rows

VIDEOS, MINUTES = 12, 3.0
TIERS = ((28, 4), (14, 2), (11, 1), (6, 1), (5, 2), (4, 3), (7, 0), (3, 1), (1, 0))  # dominant and contextual rows
BOTH = ((14, 2), (6, 1), (8, 1), (3, 1))  # of these in float16 too
REAL_SECONDS = 4.0  # of each real clip
SAME_IDS = 8  # first tokens of an answer that are compared where none is right
REFERENCE = ROOT / "tests" / "reference" / "llava-mini-tiny" / "checkpoint"
REFERENCE_TIERS = ((8, 1), (4, 1), (3, 1), (2, 0), (1, 0))
REAL_QUESTIONS = ("What is there?", "How many things are there?", "Is there a person?", "What happens in the video?")


@dataclass(frozen=True, repr=False)
class Look:
    """T frames: the features of all their patches, the compressor's output, and the vision tokens."""

    features: FrameFeatures
    tokens: np.ndarray


@dataclass(frozen=True)
class Way:
    """What pre-fusion is given of a frame.

    Attributes:
        name: for the table.
        byte_count: of a frame, the compressor's output included.
        inputs: of some frames.
    """

    name: str
    byte_count: int
    inputs: Callable[[Look], FusionInputs]


@torch.inference_mode()
def look(model: LlavaMini, pixels: np.ndarray) -> Look:
    """(T, 336, 336, 3) uint8 as the model sees it; vision tokens rounded as they are stored."""
    features = frame_features(model.vision, frame_pixels(model.vision, pixels))
    return Look(features, vision_tokens(model.vision, features).to(torch.float16).cpu().numpy())


def ways(model: LlavaMini, tiers: Sequence[tuple[int, int]]) -> list[Way]:
    """All patches first, then the tiers in both precisions, and nothing but the compressor's output."""
    bundle = model.vision.bundle
    width, patch_count = bundle.vision["hidden_size"], bundle.patches_per_picture
    base = 2 * width * bundle.tokens_per_frame
    found = [Way("all patches", base + 2 * width * patch_count, lambda seen: all_patches(seen.features))]
    for dominant, contextual in tiers:
        count = dominant + contextual
        for name, row_bytes, keep in (("int8", width + 4, _to_int8), ("float16", 2 * width, _to_float16)):
            if name == "float16" and (dominant, contextual) not in BOTH:
                continue
            found.append(
                Way(
                    f"{dominant} + {contextual}, {name}",
                    base + count * (row_bytes + 2),
                    lambda seen, dominant=dominant, contextual=contextual, keep=keep: _tier(
                        seen, dominant, contextual, keep
                    ),
                )
            )
    return [*found, Way("compressor's output alone", base, lambda seen: _tier(seen, 0, 0, _to_float16))]


@torch.inference_mode()
def _tier(seen: Look, dominant: int, contextual: int, keep: Callable[[torch.Tensor], torch.Tensor]) -> FusionInputs:
    compressed = _to_float16(seen.features.compressed)
    if not dominant:
        frame_count, _, width = compressed.shape
        nothing = compressed.new_empty(frame_count, 0, width), torch.empty(frame_count, 0, dtype=torch.int64)
        return FusionInputs(*nothing, compressed)
    rows, places = keep_rows(seen.features.tower, dominant, contextual)
    return FusionInputs(keep(rows), places, compressed)


def _to_float16(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.float16).to(rows.dtype)


def _to_int8(rows: torch.Tensor) -> torch.Tensor:
    values, scales = to_int8(rows)
    return values * scales[..., None]


def answer(model: LlavaMini, question: str, seen: Look, inputs: FusionInputs, most: int) -> list[int]:
    """Ids of the answer."""
    ids = prompt_ids(model.tokenizer, question)
    return list(generate(model, answer_embeds(model, ids, fuse_question(model, ids, [inputs]), seen.tokens), most))


def first_word(model: LlavaMini, seen: Look, way: Way) -> float:
    """Median seconds from what is stored to the first word of an answer."""
    inputs, ids = way.inputs(seen), prompt_ids(model.tokenizer, "What is there?")

    def run() -> None:
        next(greedy_logits(model, answer_embeds(model, ids, fuse_question(model, ids, [inputs]), seen.tokens)))

    run()
    return statistics.median(seconds(run) for _ in range(9))


def world(folder: Path, seed: int) -> tuple[Archive, list[dict[str, str]]]:
    """A rendered world, indexed once a second, and its questions about moments; what is there is used."""
    place = folder / f"world-{seed}"
    render_world(place, seed, VIDEOS, MINUTES)
    with (place / "QUESTIONS.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] in MOMENT_KINDS]
    return indexed(place, folder / f"archive-{seed}"), rows


def indexed(videos: Path, place: Path) -> Archive:
    """An archive of a folder's videos, once a second."""
    run_vidx("index", str(videos), "--fps", "1", "--archive", str(place))
    return open_archive(str(place))


def pixels_between(archive: Archive, decoder: Decoder, row: VideoRow, start: float, end: float) -> np.ndarray:
    """(T, 336, 336, 3) uint8: the indexed frames of a stretch, decoded again."""
    ticks = [frame.ticks for frame in Filter(row, start, end).frames(archive)]
    return decoder.frames_at(local_path(row.uri), row.probe, ticks)


def on_nano(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Rows of the table: right answers, and answers that are those from all patches."""
    model = load_model(find_bundle("nano"), ModelOptions("cpu"))
    (archive, rows), seen = world(folder, seed), {}
    videos = {Path(row.uri).name: row for row in archive.videos.all()}
    places = [(row["file"], float(row["start_seconds"]), float(row["end_seconds"])) for row in rows]
    with Decoder() as decoder:
        for name, start, end in set(places):
            seen[name, start, end] = look(model, pixels_between(archive, decoder, videos[name], start, end))
    looks = [seen[place] for place in places]
    some = max(looks, key=lambda one: len(one.tokens))
    every = ways(model, TIERS)
    raw = every[0].byte_count
    answers = {}
    for way in every:
        answers[way.name] = [
            decode_ids(model.tokenizer, answer(model, row["question"], one, way.inputs(one), 32))
            for row, one in zip(rows, looks, strict=True)
        ]
        print(way.name, file=sys.stderr)
    exact = answers["all patches"]
    right = {
        name: sum(text.strip() == row["answer"] for text, row in zip(given, rows, strict=True))
        for name, given in answers.items()
    }
    made = []
    for way in every:
        same = sum(a == b for a, b in zip(answers[way.name], exact, strict=True))
        took = first_word(model, some, way)
        share = right[way.name] / right["all patches"]
        value = (
            f"{100 * right[way.name] / len(rows):.1f} % right ({100 * share:.1f} % of all patches'), "
            f"{100 * same / len(rows):.1f} % the same, {way.byte_count} bytes ({way.byte_count / raw:.3f}), "
            f"first word {1e3 * took:.0f} ms"
        )
        made.append(
            figure(
                f"nano, {way.name}: questions about moments",
                f"all patches in float16, {raw} bytes",
                value,
                "≥ 98 % at ≤ 1/8" if way.name in ("11 + 1, int8", "6 + 1, int8") else "-",
                right=right[way.name],
                same=same,
                questions=len(rows),
                byte_count=way.byte_count,
                first_word_seconds=took,
                frames=len(some.tokens),
            )
        )
    return made


def on_reference(folder: Path) -> list[dict[str, Any]]:
    """Rows of the table: first tokens that stay the same, with weights that are random."""
    model = load_model(find_bundle(str(REFERENCE)), ModelOptions("cpu", "float32"))
    archive = indexed(ROOT / "ops" / "samples", folder / "real")
    clips = [row for row in archive.videos.all() if not Path(row.uri).name.startswith("nano")]
    with Decoder(max_pixels=max(allowed_pixels(row.probe) for row in clips)) as decoder:
        looks = []
        for row in clips:
            start = archive.frames.find(row.video_number)[0].time_seconds
            looks.append(look(model, pixels_between(archive, decoder, row, start, start + REAL_SECONDS)))
    made, exact = [], []
    for way in ways(model, REFERENCE_TIERS):
        given = [answer(model, each, seen, way.inputs(seen), SAME_IDS) for seen in looks for each in REAL_QUESTIONS]
        exact = exact or given
        kept = sum(a == b for one, other in zip(given, exact, strict=True) for a, b in zip(one, other, strict=False))
        total = sum(map(len, exact))
        made.append(
            figure(
                f"llava-mini-tiny (random weights), {way.name}: first {SAME_IDS} tokens of answers about real clips",
                "all patches in float16",
                f"{100 * kept / total:.1f} % the same, {way.byte_count} bytes",
                "-",
                kept=kept,
                tokens=total,
            )
        )
    return made


def main() -> None:
    """Measures and writes results/fidelity.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=5000051)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    save("fidelity", [*on_nano(options.folder, options.seed), *on_reference(options.folder)])


if __name__ == "__main__":
    main()
