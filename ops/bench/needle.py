"""One frame among a thousand, three thousand and ten thousand: is it found, with its time, and is it seen among all?

Usage: python ops/bench/needle.py FOLDER [--seed N]

Videos of nano's world are indexed at six frames a second. Ten of the world's things are the needles: from the stored
frames that show none of them a haystack is made, one frame a second, and in it one frame of each needle, where chance
puts it. Each is asked for by `ask` with retrieval (answered "yes", with a moment that holds the frame) and by `--all
--over windows`; ten things of the world that are nowhere in it, and are asked for too, say how much of that is
guessing.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, figure, render_world, run_vidx, save
from made_video import MadeVideo, add_videos

sys.path.insert(0, str(ROOT))

from ops.nano.pictograms import THINGS, with_article
from pipeline.ask.answer import Asked, Asker, Over
from pipeline.ask.filter import Filter
from pipeline.ask.search import bundle_of
from storage.archive.archive import Archive, create_archive, open_archive
from storage.files import source_text
from storage.parts.read import read_compressor_out, read_keys, read_patches, read_tokens
from storage.records import FrameRef, TokenBatch
from storage.vectors.vector_index import update_index
from workers.llm.engine import ModelOptions

SIZES = (1_000, 3_000, 10_000)
VIDEOS, MINUTES, FPS = 16, 5.0, 6
NEEDLES = 10
SHOWN_WHOLE = 4  # of them, and of what is not there, asked for with every frame shown
EDGE_SECONDS = 0.5  # frames so near to a scene's end may be of a fade
SEGMENT_FRAMES = 500


def make(folder: Path, seed: int) -> tuple[Archive, list[dict[str, str]]]:
    """The world of a seed, indexed, and its moments; what is there already is used."""
    world, place = folder / f"world-{seed}", folder / f"frames-{seed}"
    render_world(world, seed, VIDEOS, MINUTES)
    run_vidx("index", str(world), "--fps", str(FPS), "--archive", str(place))
    with (world / "MOMENTS.csv").open(encoding="utf-8", newline="") as file:
        return open_archive(str(place)), list(csv.DictReader(file))


def frames_of(archive: Archive, moments: Sequence[dict[str, str]]) -> list[tuple[FrameRef, set[str]]]:
    """Frames well inside a scene, each with the words of its caption."""
    videos = {source_text(row.uri).rsplit("/", 1)[-1]: row for row in archive.videos.all()}
    found = []
    for moment in moments:
        start, end = float(moment["start_seconds"]) + EDGE_SECONDS, float(moment["end_seconds"]) - EDGE_SECONDS
        if start < end:
            words = set(moment["text"].replace(",", "").split())
            within = Filter(videos[moment["file"]], start, end)
            found += [(frame, words) for frame in within.frames(archive) if start <= frame.time_seconds < end]
    return found


def haystack(source: Archive, frames: Sequence[FrameRef], place: Path) -> Archive:
    """An archive of one video, a frame a second, of the stored rows of some frames."""
    archive = create_archive(str(place), model_id=source.model_id, model_name=source.model_name)
    pieces = (frames[start : start + SEGMENT_FRAMES] for start in range(0, len(frames), SEGMENT_FRAMES))
    add_videos(archive, [MadeVideo(1, "file:///haystack.mp4", (_rows(source, piece) for piece in pieces))], patches=64)
    update_index(archive)
    return archive


def _rows(source: Archive, frames: Sequence[FrameRef]) -> TokenBatch:
    uri = source.frames_uri
    return TokenBatch(
        read_tokens(uri, frames), read_compressor_out(uri, frames), read_keys(uri, frames), read_patches(uri, frames)
    )


def hide(
    frames: Sequence[tuple[FrameRef, set[str]]], size: int, source: np.random.Generator
) -> tuple[list[FrameRef], dict[str, int], list[str]]:
    """The frames of a haystack, the second of each needle by its word, and words of what is not in it."""
    order = source.permutation(len(THINGS))[: 2 * NEEDLES].tolist()
    needles, absent = [THINGS[place] for place in order[:NEEDLES]], [THINGS[place] for place in order[NEEDLES:]]
    nowhere = {form for thing in absent for form in (thing.word, thing.plural)}
    frames = [(frame, words) for frame, words in frames if not words & nowhere]
    forms = {form for thing in needles for form in (thing.word, thing.plural)}
    hay = [frame for frame, words in frames if not words & forms]
    if len(hay) < size:
        raise SystemExit(f"{len(hay)} frames without the needles, {size} wanted: take another --seed")
    chosen = [hay[place] for place in np.sort(source.permutation(len(hay))[:size]).tolist()]
    seconds = {}
    for thing, second in zip(needles, source.permutation(size)[:NEEDLES].tolist(), strict=True):
        with_it = [frame for frame, words in frames if words & {thing.word, thing.plural}]
        chosen[second] = with_it[int(source.integers(len(with_it)))]
        seconds[thing.word] = second
    return chosen, seconds, [thing.word for thing in absent]


def retrieved(asker: Asker, seconds: dict[str, int], absent: Sequence[str]) -> dict[str, int]:
    """How many needles are found with their time, and how many of what is not there is."""
    asked = Asked(fuse="patches", most_tokens=20)
    answers = {word: asker.ask(f"Is there {with_article(word)}?", Filter(), asked) for word in (*seconds, *absent)}
    found = [
        word
        for word, second in seconds.items()
        if (answer := answers[word]) is not None
        and answer.text == "yes"
        and any(moment.start_seconds <= second < moment.end_seconds for moment in answer.moments)
    ]
    wrong = [word for word in absent if answers[word] is not None and answers[word].text == "yes"]
    return {"found": len(found), "wrong": len(wrong)}


def seen_among_all(asker: Asker, seconds: dict[str, int], absent: Sequence[str]) -> dict[str, int]:
    """Every frame is shown: how many needles the stretch that holds them sees, and how many others any stretch does."""
    asked = Asked(frame_limit=None, fuse="patches", over=Over.WINDOWS, most_tokens=20)
    found = wrong = 0
    for word in (*seconds, *absent):
        answer = asker.ask(f"Is there ever {with_article(word)}?", Filter(), asked)
        yes = [window for window in answer.windows if window.text == "yes"]
        if word in seconds:
            found += any(window.start_seconds <= seconds[word] < window.end_seconds for window in yes)
        else:
            wrong += bool(yes)
    return {"found": found, "wrong": wrong}


def main() -> None:
    """Measures and writes results/needle.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=5000021)
    parser.add_argument("--haystacks", type=int, default=4, help="of each size; the first is shown whole too")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source, moments = make(options.folder, options.seed)
    frames = frames_of(source, moments)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        found = wrong = 0
        whole: dict[str, int] = {}
        for number in range(options.haystacks):
            chosen, seconds, absent = hide(frames, size, np.random.default_rng([options.seed, size, number]))
            place = options.folder / f"hay-{options.seed}-{size}-{number}"
            archive = open_archive(str(place)) if (place / "archive.json").exists() else haystack(source, chosen, place)
            asker = Asker(archive, bundle_of(archive, None), ModelOptions("cpu"))
            one = retrieved(asker, seconds, absent)
            found, wrong = found + one["found"], wrong + one["wrong"]
            if not whole:
                some = dict(itertools.islice(seconds.items(), SHOWN_WHOLE))
                whole = seen_among_all(asker, some, absent[:SHOWN_WHOLE])
            print(size, number, one, whole, file=sys.stderr)
        count = NEEDLES * options.haystacks
        what = f"one frame of a thing among {size:,}"
        value = f"{100 * found / count:.0f} % of {count} found with their time"
        yard = f"things that are not there: {wrong} of {count}"
        rows.append(figure(f"{what}, asked with retrieval", yard, value, "≥ 95 %"))
        yard = f"things that are not there: {whole['wrong']} of {SHOWN_WHOLE}"
        value = f"{whole['found']} of {SHOWN_WHOLE} seen"
        rows.append(
            figure(f"{what}, all shown, stretch by stretch (`--all --over windows`)", yard, value, "the honest figure")
        )
    save("needle", rows)


if __name__ == "__main__":
    main()
