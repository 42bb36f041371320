"""A decoded picture as it is stored: upright, 336 x 336 for the model, and a small JPEG for people."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from storage.records import FRAME_SIDE
from workers.models.preprocess import nearest_index

THUMBNAIL_SIDE = 160
THUMBNAIL_QUALITY = 70


@dataclass(frozen=True)
class Orientation:
    """How stored pixels are turned to be shown: first transposed, then mirrored along the shown axes."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of_display_matrix(cls, matrix: tuple[int, ...]) -> "Orientation":
        """From FFmpeg's nine numbers, row by row: x' = a x + c y, y' = b x + d y for (a, b, _, c, d, ...).

        The nearest quarter turn is taken; a scale other than 1 has no meaning for pixels.
        """
        a, b, _, c, d = matrix[:5]
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, flip_rows=d < 0, flip_columns=a < 0)
        return cls(True, flip_rows=b < 0, flip_columns=c < 0)

    @property
    def rotation_degrees(self) -> int:
        """Counter-clockwise; of a mirrored picture, that of the turn left after mirroring the columns."""
        if self.transpose:
            return 90 if self.flip_rows else 270
        return 180 if self.flip_rows else 0

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of (height, width, 3) pixels as shown."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)  # (width, height, 3)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True)
class StoredPicture:
    """(336, 336, 3) uint8 pixels and a JPEG file."""

    pixels: np.ndarray
    thumbnail: bytes


def store_form(shown: np.ndarray) -> StoredPicture:
    """Both stored forms of upright (height, width, 3) uint8 RGB; the input may be a view and is not changed."""
    return StoredPicture(model_pixels(shown), thumbnail(shown))


def model_pixels(shown: np.ndarray) -> np.ndarray:
    """336 x 336 by nearest neighbour, aspect ratio ignored, as the published code resizes."""
    rows, columns = _index(shown.shape[0]), _index(shown.shape[1])
    whole = shown.view("V3")[..., 0]  # (height, width), a pixel as one item: three times as fast
    return whole[rows[:, None], columns[None, :]].view(np.uint8).reshape(FRAME_SIDE, FRAME_SIDE, 3)


def thumbnail(shown: np.ndarray) -> bytes:
    """A JPEG whose longer side is at most 160 pixels, aspect ratio kept."""
    height, width = shown.shape[:2]
    # Whole pixels are skipped down to four times the size before averaging: an 8K frame would cost 100 MB more.
    stride = max(1, max(height, width) // (4 * THUMBNAIL_SIDE))
    picture = Image.fromarray(np.ascontiguousarray(shown[::stride, ::stride]))
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


@lru_cache(maxsize=16)
def _index(source_size: int) -> np.ndarray:
    return nearest_index(source_size, FRAME_SIDE)
