"""The stored forms of a decoded frame: upright, as 336 x 336 pixels for the model and as a small JPEG for people."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from storage.records import FRAME_SIDE

THUMBNAIL_SIDE = 160
THUMBNAIL_QUALITY = 70


@lru_cache(maxsize=32)
def nearest_index(source_size: int, side: int = FRAME_SIDE) -> np.ndarray:
    """The source pixel of each of `side` output pixels along one axis.

    Computed in float32 as in the published code: floor(i * scale). Integer division gives another pixel at some sizes
    (2 of 336 rows at 1080).

    Returns:
        (side,) int64, ascending, each in [0, source_size).
    """
    scale = np.float32(source_size) / np.float32(side)
    index = np.floor(np.arange(side, dtype=np.float32) * scale).astype(np.int64)
    index = np.minimum(index, source_size - 1)
    index.flags.writeable = False  # shared by all callers
    return index


@dataclass(frozen=True)
class Orientation:
    """How a frame's pixels are turned to be shown: first transposed, then mirrored along the new axes."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of_display_matrix(cls, matrix: tuple[int, ...]) -> "Orientation":
        """From FFmpeg's nine numbers, row by row: x' = a x + c y, y' = b x + d y for (a, b, _, c, d, ...).

        The nearest quarter turn is taken; scales are ignored.
        """
        a, b, _, c, d = matrix[:5]
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, flip_rows=d < 0, flip_columns=a < 0)
        return cls(True, flip_rows=b < 0, flip_columns=c < 0)

    @property
    def rotation_degrees(self) -> int:
        """The turn, counter-clockwise; for a mirrored frame, the turn after mirroring its columns."""
        if self.transpose:
            return 90 if self.flip_rows else 270
        return 180 if self.flip_rows else 0

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) pixels as they are shown; a view."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)  # (width, height, 3)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True)
class StoredPicture:
    """(336, 336, 3) uint8 pixels and a JPEG file."""

    pixels: np.ndarray
    thumbnail: bytes


def store_form(shown: np.ndarray) -> StoredPicture:
    """Both stored forms of an upright frame, (height, width, 3) uint8 RGB."""
    return StoredPicture(model_pixels(shown), thumbnail(shown))


def model_pixels(shown: np.ndarray) -> np.ndarray:
    """A frame as (336, 336, 3), by nearest neighbour without keeping the aspect ratio, as in the published code."""
    rows, columns = nearest_index(shown.shape[0]), nearest_index(shown.shape[1])
    whole = shown.view("V3")[..., 0]  # (height, width), one item per pixel: three times as fast
    return whole[rows[:, None], columns[None, :]].view(np.uint8).reshape(FRAME_SIDE, FRAME_SIDE, 3)


def thumbnail(shown: np.ndarray) -> bytes:
    """A JPEG of a frame, with its aspect ratio; the longer side has at most 160 pixels."""
    height, width = shown.shape[:2]
    # Pixels are skipped down to four times the size before averaging; an 8K frame would take 100 MB more.
    stride = max(1, max(height, width) // (4 * THUMBNAIL_SIDE))
    picture = Image.fromarray(np.ascontiguousarray(shown[::stride, ::stride]))
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()
