"""Search keys that lie as those of real footage do, and archives of them: keys alone, tokens would fill the disk.

What CLIP's embeddings of pictures and texts are like, and what is made here of each:

- pictures share a direction: two unrelated ones have a cosine of 0.55 +- 0.07;
- they differ in few hundred dimensions that matter unequally: the root of the rank divides them;
- a video is about something, a shot about something in it, and frames drift within a shot: cosines of 0.69 within a
  video, 0.96 within a shot, 0.985 between neighbours at one frame a second. Four of five shots last 8 seconds on
  average and one 100, as of a camera that stands;
- texts lie apart (the modality gap): 0.28 with the shot they describe, 0.08 +- 0.03 with the others.

Everything follows from the video's number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import made_video
import numpy as np
from made_video import MadeVideo

from storage.archive.archive import Archive
from storage.records import TokenBatch

MODEL_ID = "f0" * 32
VIDEO_FRAMES = 3600  # an hour at one frame a second
SEGMENT_FRAMES = 300


@dataclass(frozen=True)
class Directions:
    """What all keys share.

    Attributes:
        pictures, texts: (E,) unit vectors, the means of both kinds.
        basis: (D, E), orthonormal, at right angles to both; D is half of E.
        spectrum: (D,), how much each of them matters.
    """

    pictures: np.ndarray
    texts: np.ndarray
    basis: np.ndarray
    spectrum: np.ndarray

    @property
    def width(self) -> int:
        """E."""
        return len(self.pictures)


def directions(width: int) -> Directions:
    """Those of every archive of keys so wide; CLIP ViT-L/14's are 768."""
    square = np.linalg.qr(np.random.default_rng(7).standard_normal((width, width)))[0].astype(np.float32)
    pictures, other, basis = square[0], square[1], square[2 : 2 + width // 2]
    spectrum = (1.0 / np.sqrt(np.arange(1, len(basis) + 1))).astype(np.float32)
    return Directions(pictures, 0.1 * pictures + np.sqrt(0.99, dtype=np.float32) * other, basis, spectrum)


def video_keys(shared: Directions, video: int) -> np.ndarray:
    """(VIDEO_FRAMES, E) float16, L2-normalised."""
    shots, drift, random = _shots(shared, video)
    unit = _unit(shots + 0.4 * drift) @ shared.basis  # (T, E)
    unit += random.standard_normal(unit.shape, np.float32) * np.float32(0.15 / np.sqrt(shared.width))
    return _unit(np.sqrt(0.5, dtype=np.float32) * (shared.pictures + _unit(unit))).astype(np.float16)


def picture_query(shared: Directions, video: int, frame: int) -> np.ndarray:
    """(E,) float32: a frame's picture, encoded from another copy of it: cosine 0.98."""
    noise = np.random.default_rng((video, frame)).standard_normal(shared.width).astype(np.float32)
    return _unit(video_keys(shared, video)[frame].astype(np.float32) + 0.2 * _unit(noise))


def text_query(shared: Directions, video: int, frame: int) -> np.ndarray:
    """(E,) float32: a text that describes a frame's shot."""
    shots, _, _ = _shots(shared, video)
    noise = np.random.default_rng((video, frame, 1)).standard_normal(shared.width).astype(np.float32)
    meant = 0.45 * _unit(shots[frame]) @ shared.basis + np.sqrt(1 - 0.45**2, dtype=np.float32) * _unit(noise)
    return _unit(np.sqrt(0.5, dtype=np.float32) * (shared.texts + meant)).astype(np.float32)


def _shots(shared: Directions, video: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """What each frame's shot shows, and how far the frame has drifted from it, (T, D) float32 each."""
    spectrum = shared.spectrum
    random = np.random.default_rng(video)
    about = _unit(random.standard_normal(len(spectrum)).astype(np.float32) * spectrum)
    lengths: list[int] = []
    while sum(lengths) < VIDEO_FRAMES:
        lengths.append(1 + int(random.exponential(100 if random.random() < 0.2 else 8)))
    own = _unit(random.standard_normal((len(lengths), len(spectrum))).astype(np.float32) * spectrum)
    shots = _unit(0.65 * about + 0.75 * own)
    steps = random.standard_normal((VIDEO_FRAMES, len(spectrum))).astype(np.float32) * spectrum
    drift, last = np.empty_like(steps), np.zeros(len(spectrum), np.float32)
    for frame, step in enumerate(steps):
        last = drift[frame] = 0.95 * last + 0.31 * step
    drift /= np.linalg.norm(spectrum)
    return np.repeat(shots, lengths, axis=0)[:VIDEO_FRAMES], drift, random


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def add_videos(archive: Archive, shared: Directions, videos: range) -> None:
    """Stores videos of search keys alone, in segments of five minutes."""
    made_video.add_videos(
        archive,
        [
            MadeVideo(video, f"file:///footage/{video:06}.mp4", _segments(shared, video), {"camera": str(video % 100)})
            for video in videos
        ],
    )


def _segments(shared: Directions, video: int) -> Iterator[TokenBatch]:
    keys = video_keys(shared, video)
    nothing = np.zeros((SEGMENT_FRAMES, 1, 1), np.float16)
    for start in range(0, VIDEO_FRAMES, SEGMENT_FRAMES):
        yield TokenBatch(nothing, nothing, keys[start : start + SEGMENT_FRAMES], None)
