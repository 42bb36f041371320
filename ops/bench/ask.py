"""Answers: the first word against the model alone, a second question, a thousand frames, and twenty thousand.

Usage: python ops/bench/ask.py FOLDER

Renders a video of nano's world of 17 minutes into FOLDER and indexes it. While answers from stored rows are timed the
video is moved out of reach, so that none of it can be read. The published way decodes the video, encodes and fuses one
frame after another, and keeps nothing. A second question is timed on nano, whose prompt is little more than the
question, and on a model of small width with random weights that has the published prompt (the reference checkpoint's)
and the published number of patches. Twenty thousand frames are of random tokens, shown to a model of small width with
random weights and a context of 32,768, each number of them in a process of its own.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, figure, in_turn, render_world, run_vidx, save, seconds
from made_video import MadeVideo, add_videos

sys.path.insert(0, str(ROOT / "tests"))

from small_bundle import change_json, write_bundle

from ops.published import encode_pixels, greedy_logits
from pipeline.ask.answer import Asked, Asker
from pipeline.ask.filter import Filter
from pipeline.ask.search import bundle_of
from pipeline.ask.showing import stored_inputs
from storage.archive.archive import Archive, create_archive, open_archive
from storage.files import local_path
from storage.parts.read import read_tokens
from storage.records import PatchRows, TokenBatch
from workers.decode.client import Decoder, allowed_pixels
from workers.llm.engine import ModelOptions
from workers.llm.model import answer_embeds, fuse_question, load_model
from workers.llm.prompt import prompt_ids
from workers.models.bundle import Bundle, find_bundle
from workers.vision.encode import exact_inputs

REFERENCE = ROOT / "tests" / "reference" / "llava-mini-tiny" / "checkpoint"
PIXELS = 336  # of a published frame's side: 576 patches
SEED, MINUTES = 5000029, 17
FRAMES = 1000
QUESTIONS = ("What is there?", "How many different things appear?")
MANY = (5_000, 10_000, 20_000)
SEGMENT_FRAMES = 1_000
FIRST = {"most_tokens": 1}


def make(folder: Path) -> Archive:
    """The video's archive; what is there already is used."""
    world, place = folder / "world", folder / "archive"
    render_world(world, SEED, 1, MINUTES)
    run_vidx("index", str(world), "--archive", str(place))
    return open_archive(str(place))


def without_limit(bundle: Bundle) -> Bundle:
    """A model whose card limits how many frames are shown, without: the time that they take is what counts here."""
    return replace(bundle, card=replace(bundle.card, most_frames=None))


@contextmanager
def out_of_reach(path: Path) -> Iterator[None]:
    """The video cannot be read in here."""
    away = path.with_suffix(".away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def first_word(archive: Archive, frames: int, source: str) -> dict[str, Any]:
    """Seconds to the first word of an answer from stored rows, and of fusing and the LLM's prefill by themselves."""
    bundle = without_limit(bundle_of(archive, None))
    within = Filter(archive.videos.all()[0], 0.0, float(frames) - 0.5)
    chosen = within.frames(archive)
    asked = Asked(frame_limit=None, fuse=source, **FIRST)
    asker = Asker(archive, bundle, ModelOptions("cpu"), cache_bytes=0)
    model = asker._model
    ids = prompt_ids(model.tokenizer, QUESTIONS[0])
    inputs, tokens = list(stored_inputs(archive, model, chosen, source)), read_tokens(archive.frames_uri, chosen)

    def ours() -> None:
        asker._showings.clear()
        asker.ask(QUESTIONS[0], within, asked)

    def alone() -> None:
        next(greedy_logits(model, answer_embeds(model, ids, fuse_question(model, ids, inputs), tokens)))

    return {"frames": len(chosen), "source": source, **in_turn(ours, alone, 9)}


def second_question(archive: Archive, frames: int, source: str) -> dict[str, Any]:
    """Seconds to the first word of a question on frames that were shown before, and of the first question."""
    within = Filter(archive.videos.all()[0], 0.0, float(frames) - 0.5)
    asked = Asked(frame_limit=None, fuse=source, **FIRST)
    asker = Asker(archive, without_limit(bundle_of(archive, None)), ModelOptions("cpu"))

    def first() -> None:
        asker._showings.clear()
        asker.ask(QUESTIONS[0], within, asked)

    def second() -> None:
        asker.ask(QUESTIONS[1], within, asked)

    first(), second()
    pairs = []
    for _ in range(9):
        one = seconds(first)
        pairs.append((seconds(second), one))
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    return {"frames": frames, "source": source, "ratio": round(ratios[len(ratios) // 2], 4), "runs": pairs}


def published_way(archive: Archive, question: str) -> tuple[float, str]:
    """Seconds of decoding a video and showing it frame by frame, and the first word's id."""
    model = load_model(bundle_of(archive, None), ModelOptions("cpu"))
    row = archive.videos.all()[0]
    ids = prompt_ids(model.tokenizer, question)
    ticks = [frame.ticks for frame in archive.frames.find(row.video_number)][:FRAMES]

    def run() -> None:
        total, tokens = None, []
        with Decoder(max_pixels=allowed_pixels(row.probe)) as decoder:
            pixels = list(decoder.batches_at(local_path(row.uri), row.probe, ticks, 64))
        for frame in np.concatenate(pixels):
            one = frame[None]
            tokens.append(encode_pixels(model.vision, one, patch_rows=0).token)
            fused = fuse_question(model, ids, exact_inputs(model.vision, one))
            total = fused if total is None else total + fused
        next(greedy_logits(model, answer_embeds(model, ids, total / len(ticks), np.concatenate(tokens))))

    return seconds(run)


def thousand(archive: Archive) -> dict[str, Any]:
    """Seconds of an answer over a thousand frames: with 8 that are retrieved, with all, and the published way."""
    asker = Asker(archive, without_limit(bundle_of(archive, None)), ModelOptions("cpu"), cache_bytes=0)
    rows = archive.videos.all()[0]
    ways = {
        "retrieved": (Filter(), Asked(frame_limit=8, fuse="patches", anyway=True, **FIRST)),
        "all": (Filter(rows, 0.0, FRAMES - 0.5), Asked(frame_limit=None, fuse="patches", **FIRST)),
    }
    found = {}
    for name, (within, asked) in ways.items():
        runs = []
        for _ in range(6):
            asker._showings.clear()
            runs.append(seconds(lambda within=within, asked=asked: asker.ask("Is there a dog?", within, asked)))
        found[name] = sorted(runs[1:])[2]
    return {**found, "published": published_way(archive, "Is there a dog?")}


def many(folder: Path, count: int) -> dict[str, Any]:
    """An answer from so many frames in a process of its own: seconds, and the most memory it had."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import ask; ask.show_many({str(folder)!r}, {count})"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def show_many(folder: str, count: int) -> None:
    """Prints what `many` gives; called in its process."""
    archive = open_archive(f"{folder}/many")
    asker = Asker(archive, without_limit(find_bundle(f"{folder}/wide-context")), ModelOptions("cpu"), cache_bytes=0)
    asker.ask(
        "What is there?", Filter(archive.videos.all()[0], 0.0, 7.5), Asked(frame_limit=None, fuse="tokens", **FIRST)
    )
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the most of what follows
    before = memory("VmRSS")
    within = Filter(archive.videos.all()[0], 0.0, count - 0.5)
    announced: list[str] = []
    answers = []
    asked = Asked(frame_limit=None, fuse="tokens", most_tokens=8)
    took = seconds(lambda: answers.append(asker.ask("What is there?", within, asked, announce=announced.append)))
    print(
        json.dumps(
            {
                "frames": answers[0].frame_count,
                "seconds": took,
                "bytes": memory("VmHWM") - before,
                "reckoned": answers[0].memory_bytes,
                "announced": announced,
            }
        )
    )


def memory(name: str) -> int:
    """Bytes of this process, as /proc names them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make_many(folder: Path) -> None:
    """A model of small width with a long context, and an archive of random tokens for it."""
    bundle_path = folder / "wide-context"
    if not bundle_path.exists():
        sizes = {"max_position_embeddings": 32768}
        write_bundle(bundle_path, sizes, {}, seed=3)
    bundle = find_bundle(str(bundle_path))
    place = folder / "many"
    if (place / "archive.json").exists():
        return
    archive = create_archive(str(place), model_id=bundle.model_id, model_name=str(bundle_path))
    add_videos(archive, [MadeVideo(1, "file:///many.mp4", _random_tokens(bundle, MANY[-1]))])


def make_published_prompt(folder: Path) -> Archive:
    """An archive of random rows for a model of small width with the published prompt and number of patches."""
    bundle_path, place = folder / "published-prompt", folder / "prompts"
    if not bundle_path.exists():
        half = folder / "published-prompt.part"
        write_bundle(half, {}, {"image_size": PIXELS}, seed=3, base=REFERENCE)
        sides = {"height": PIXELS, "width": PIXELS}
        sizes = {"size": {"shortest_edge": PIXELS}, "crop_size": sides}
        change_json(half / "vision_tower" / "preprocessor_config.json", sizes)
        half.rename(bundle_path)
    bundle = find_bundle(str(bundle_path))
    archive = create_archive(str(place), model_id=bundle.model_id, model_name=str(bundle_path))
    if not archive.videos.all():
        rows = bundle.default_patch_rows
        add_videos(archive, [MadeVideo(1, "file:///prompts.mp4", _random_tokens(bundle, SEGMENT_FRAMES, rows))], rows)
    return archive


def _random_tokens(bundle: Bundle, count: int, patch_rows: int = 0) -> Iterator[TokenBatch]:
    source = np.random.default_rng(0)
    widths = bundle.config.hidden_size, bundle.vision["hidden_size"]
    for _ in range(count // SEGMENT_FRAMES):
        token, out = (source.standard_normal((SEGMENT_FRAMES, 1, width)).astype(np.float16) for width in widths)
        yield TokenBatch(token, out, None, _random_patches(bundle, patch_rows, source) if patch_rows else None)


def _random_patches(bundle: Bundle, rows: int, source: np.random.Generator) -> PatchRows:
    places = [np.sort(source.permutation(bundle.patches_per_frame)[:rows]) for _ in range(SEGMENT_FRAMES)]
    values = source.integers(-127, 128, (SEGMENT_FRAMES, rows, bundle.vision["hidden_size"]), np.int8)
    scales = np.full((SEGMENT_FRAMES, rows), 0.01, np.float32)
    return PatchRows(values, scales, np.array(places, np.uint16))


def main() -> None:
    """Measures and writes results/ask.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    archive = make(folder)
    video = Path(archive.videos.all()[0].uri.removeprefix("file://"))
    rows = []
    asked = {"nano": archive, "published prompt and patches, width 64": make_published_prompt(folder)}
    with out_of_reach(video):
        for source in ("patches", "tokens"):
            one = first_word(archive, 32, source)
            what = f"first word of an answer from 32 stored frames, `{source}`, the video out of reach"
            value = f"{one['seconds'] * 1e3:.0f} ms, {one['ratio']:.2f}×"
            rows.append(figure(what, "fusing and the LLM's prefill by themselves", value, "≤ 1.3×", **one))
            for count, (kind, some) in itertools.product((32, 512), asked.items()):
                two = second_question(some, count, source)
                what = f"a second question on the same {count} frames, `{source}`, {kind}"
                rows.append(figure(what, "the first", f"{two['ratio']:.2f}×", "≤ 0.3×", **two))
    over = thousand(archive)
    way = "decode, encode and fuse one frame after another"
    for name, words, reach in (
        ("retrieved", "8 of them retrieved", "≥ 100×"),
        ("all", "all shown", "≥ 5×"),
    ):
        value = f"{over[name] * 1e3:.0f} ms, {over['published'] / over[name]:.0f}× ({over['published']:.1f} s)"
        rows.append(figure(f"an answer over {FRAMES:,} indexed frames, {words}", way, value, reach, **over))
    make_many(folder)
    counts = [many(folder, count) for count in MANY]
    per_frame = [
        (more["bytes"] - less["bytes"]) / (more["frames"] - less["frames"]) for less, more in itertools.pairwise(counts)
    ]
    last = counts[-1]
    value = f"{last['seconds']:.1f} s, {last['bytes'] / 1e9:.2f} GB, {per_frame[-1] / 1e3:.1f} kB a frame"
    rows.append(
        figure(
            f"{last['frames']:,} frames in one answer, a model of width 160",
            f"{per_frame[0] / 1e3:.1f} kB a frame up to {MANY[1]:,}; {last['reckoned'] / 1e9:.2f} GB announced",
            value,
            "done, linear",
            runs=counts,
        )
    )
    save("ask", rows)


if __name__ == "__main__":
    main()
