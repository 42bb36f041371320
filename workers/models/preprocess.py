"""Preprocessing of pictures for the vision tower: 336 x 336 by nearest neighbour, cut into parts, resized as in CLIP.

Source: LLaVA-Mini (arXiv 2501.03895), released code. `load_video` and its callers resize every frame to 336 x 336 by
nearest neighbour, without keeping the aspect ratio, before the CLIP image processor. With `resolution_ratio` r the
model sees the r x r blocks of that picture, then the picture. Pillow does the CLIP processor's bicubic resize, as in
the published run; with a tower of 336 pixels and ratio 1 nothing is resized.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from storage.errors import UsageError
from storage.processes import usable_cores

RESIZE_THREADS = min(4, usable_cores())


@dataclass(frozen=True)
class PictureSettings:
    """Settings of the tower's image processor.

    Attributes:
        resize_side: shortest edge after the resize, in pixels.
        crop_side: side of the centre crop, which the tower sees, in pixels.
        resample: Pillow's number of the resize filter (3 is bicubic).
        rescale: factor from 0..255 to the range of mean and std.
        mean, std: per channel, red first.
    """

    resize_side: int
    crop_side: int
    resample: int
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def split_blocks(pixels: np.ndarray, ratio: int) -> np.ndarray:
    """The r x r blocks of each picture, row-major; remaining rows and columns at the far edges are dropped.

    Args:
        pixels: (T, height, width, 3) uint8.
    Returns:
        (T, r*r, height // r, width // r, 3) uint8.
    """
    count, height, width = pixels.shape[0], pixels.shape[1] // ratio, pixels.shape[2] // ratio
    pixels = pixels[:, : height * ratio, : width * ratio]
    grid = pixels.reshape(count, ratio, height, ratio, width, 3)  # (T, rows, height, columns, width, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, ratio * ratio, height, width, 3)  # (T, r*r, h, w, 3)


def frame_parts(pixels: np.ndarray, ratio: int, settings: PictureSettings) -> np.ndarray:
    """The parts of video frames that the tower sees, not yet normalised.

    Args:
        pixels: (T, 336, 336, 3) uint8.
        ratio: the model's resolution_ratio.
    Returns:
        (T, P, S, S, 3) uint8, S = settings.crop_side; P = 1, or r*r blocks in row-major order and the whole picture.
    """
    if ratio == 1:
        return _clip_resize(pixels, settings)[:, None]  # (T, 1, S, S, 3)
    count, blocks = len(pixels), split_blocks(pixels, ratio)
    blocks = _clip_resize(blocks.reshape(-1, *blocks.shape[2:]), settings)  # (T*r*r, S, S, 3)
    blocks = blocks.reshape(count, ratio * ratio, *blocks.shape[1:])  # (T, r*r, S, S, 3)
    return np.concatenate([blocks, _clip_resize(pixels, settings)[:, None]], axis=1)  # (T, r*r + 1, S, S, 3)


def _clip_resize(pictures: np.ndarray, settings: PictureSettings) -> np.ndarray:
    """Resize and centre crop of the CLIP processor: (n, h, w, 3) -> (n, S, S, 3)."""
    height, width = pictures.shape[1:3]
    short, crop = settings.resize_side, settings.crop_side
    new_height = short if height <= width else int(short * height / width)
    new_width = short if width <= height else int(short * width / height)
    if (new_height, new_width) != (height, width):
        with ThreadPoolExecutor(RESIZE_THREADS) as pool:  # Pillow resizes without the interpreter lock
            resized = list(
                pool.map(lambda p: Image.fromarray(p).resize((new_width, new_height), settings.resample), pictures)
            )
        pictures = np.stack([np.asarray(picture) for picture in resized])  # (n, new_height, new_width, 3)
    top, left = (new_height - crop) // 2, (new_width - crop) // 2
    return pictures[:, top : top + crop, left : left + crop]


def read_settings(tower_directory: Path) -> PictureSettings:
    """The settings in a tower's preprocessor_config.json.

    Raises:
        UsageError: the file is missing or no JSON, or has a setting that is not supported.
    """
    from workers.models.checkpoint import read_json  # not at the top: the decoder process does not need it

    path = tower_directory / "preprocessor_config.json"
    values = read_json(path)
    for step in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"):
        if not values.get(step, True):
            raise UsageError(f"{path}: {step} is false; only towers with the standard CLIP steps are supported")
    try:
        settings = PictureSettings(
            resize_side=_side(values["size"], "shortest_edge"),
            crop_side=_side(values["crop_size"], "height"),
            resample=int(values.get("resample", Image.Resampling.BICUBIC)),
            rescale=float(values.get("rescale_factor", 1 / 255)),
            mean=_three(values["image_mean"]),
            std=_three(values["image_std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error} is missing or malformed") from error
    if settings.crop_side > settings.resize_side:
        raise UsageError(
            f"{path}: crop_size {settings.crop_side} is larger than size {settings.resize_side}; "
            "the crop must lie inside the resized picture"
        )
    return settings


def _side(value: int | dict[str, int], name: str) -> int:
    """The side of the square in a size entry; older files have only a number there."""
    if isinstance(value, dict):
        return int(value[name] if name in value else value["height"])
    return int(value)


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
