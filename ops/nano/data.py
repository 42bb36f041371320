"""Training data: shards of frames that went through a real encoder, a decoder and the product's preprocessing.

A shard follows from its kind and number alone. It is made in a process of its own, ahead of the training, and kept in a
folder, so that an interrupted phase finds it again.
"""

import pickle
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ops.nano.films import ENCODINGS, encode_script, read_frames
from ops.nano.render import outside_kinds
from ops.nano.scenes import Sight, sight, write_script, write_slides
from workers.models.preprocess import PictureSettings

TRAINING_SEEDS = 1_000_000  # seeds below it are for training alone
VALIDATION = TRAINING_SEEDS // 64  # the first shard whose seeds are not for training
SLIDES, WINDOWS = "slides", "windows"
_CLIPS = {SLIDES: 32, WINDOWS: 16}
_SLIDES_PER_CLIP = 32
_WINDOW_SECONDS, _WINDOW_RATE = 40, 2.0
_OUTSIDE_SHARE = 0.08


@dataclass(frozen=True, repr=False)
class Shard:
    """Frames and the truth about them.

    Attributes:
        pixels: (N, S, S, 3) uint8.
        sights: N of them.
        clip: (N,), which clip each frame belongs to; frames of one clip are in order of time.
    """

    pixels: np.ndarray
    sights: list[Sight]
    clip: np.ndarray


def make_shard(kind: str, number: int, pictures: PictureSettings, folder: Path, clips: int | None = None) -> Path:
    """Makes a shard unless it is there; returns its file. Numbers from VALIDATION on have seeds that do not train.

    Args:
        clips: so many of its clips alone, to try something out.
    """
    path = shard_path(kind, number, folder)
    if path.is_file():
        return path
    pixels, sights, numbers = [], [], []
    with TemporaryDirectory() as scratch:
        for clip in range(clips or _CLIPS[kind]):
            seed = (2 * number + (kind == WINDOWS)) * max(_CLIPS.values()) + clip  # 64 a number: room for 15,625
            source = np.random.default_rng(seed)
            if kind == SLIDES:
                script = write_slides(source, _SLIDES_PER_CLIP, outside_kinds(), _OUTSIDE_SHARE)
                times = [float(slide) for slide in range(_SLIDES_PER_CLIP)]
            else:
                script = replace(write_script(source, _WINDOW_SECONDS), rate=_WINDOW_RATE)
                times = [tick / _WINDOW_RATE for tick in range(round(_WINDOW_SECONDS * _WINDOW_RATE))]
            encoding = ENCODINGS[source.integers(len(ENCODINGS))]
            film = Path(scratch) / f"clip{encoding.suffix}"
            encode_script(script, film, encoding, source)
            frames = read_frames(film, pictures)
            if len(frames) != len(times):
                raise RuntimeError(f"{encoding}: {len(times)} frames went in, {len(frames)} came out (seed {seed})")
            pixels.append(frames)
            sights += [sight(script, instant) for instant in times]
            numbers += [clip] * len(frames)
    truth = path.with_suffix(".pickle")
    truth.write_bytes(pickle.dumps((sights, np.array(numbers))))
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.save(file, np.concatenate(pixels))
    unfinished.rename(path)  # last: a shard is there when its pixels are
    return path


def read_shard(path: Path) -> Shard:
    """A shard from its files, which this program wrote; the pixels stay on the disk until they are used."""
    sights, clip = pickle.loads(path.with_suffix(".pickle").read_bytes())
    return Shard(np.load(path, mmap_mode="r"), sights, clip)


def make_shards(
    wanted: list[tuple[str, int]], pictures: PictureSettings, folder: Path, clips: int | None = None
) -> None:
    """Makes shards one after another, those that are there already left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, number in wanted:
        make_shard(kind, number, pictures, folder, clips)


class Pool:
    """The shards of one kind that a phase draws from; it grows while the phase runs.

    Which shards a step may draw from depends on the step alone, never on how fast they were made.
    """

    def __init__(self, kind: str, first: int, count: int, steps_per_shard: float, folder: Path):
        self._paths = [shard_path(kind, first + number, folder) for number in range(count)]
        self._steps_per_shard = steps_per_shard
        self._shards: list[Shard] = []

    def at(self, step: int, at_least: int = 3) -> list[Shard]:
        """The shards for a step; waits until they are made."""
        wanted = min(len(self._paths), at_least + int(step / self._steps_per_shard))
        while len(self._shards) < wanted:
            path = self._paths[len(self._shards)]
            while not path.is_file():
                time.sleep(1)
            self._shards.append(read_shard(path))
        return self._shards[:wanted]


def shard_path(kind: str, number: int, folder: Path) -> Path:
    """Where a shard's pixels are."""
    return folder / f"{kind}-{number:05d}.npy"
