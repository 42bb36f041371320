"""Reading the picture file of `vidx search --image`."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.errors import UsageError


def read_picture(path: str) -> np.ndarray:
    """A picture file as (height, width, 3) uint8 RGB, turned upright.

    Raises:
        UsageError: the file cannot be read, or is no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(Path(path)) as file:
                return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except UnidentifiedImageError:
        raise UsageError(f"--image {path}: no picture that Pillow can read; give a JPEG, PNG or WebP file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(f"--image {path}: has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"--image {path}: cannot be read: {reason}") from error
