"""Steps that vidx itself does not take, for comparisons with the published code and for measurements."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from storage.errors import UsageError
from storage.records import TokenBatch
from workers.decode.picture import model_pixels
from workers.llm.engine import SamplingParams, TransformersContext
from workers.llm.model import LlavaMini
from workers.models.preprocess import PictureSettings, frame_parts, split_blocks
from workers.vision.encode import encode_frames
from workers.vision.llava_mini import VisionPart


def resize_nearest(frames: np.ndarray) -> np.ndarray:
    """Frames as vidx stores them: (T, height, width, 3) uint8 -> (T, 336, 336, 3)."""
    return np.stack([model_pixels(frame) for frame in frames])


def picture_parts(picture: np.ndarray, ratio: int, pad: bool, settings: PictureSettings) -> np.ndarray:
    """The parts of a still picture that the tower sees in the published code; it is not resized to 336 x 336.

    Source: released code, `split_image` and `process_images`. Blocks are cut from the picture in its own size. Each
    block is padded to a square with the mean colour if config.json says `image_aspect_ratio: pad`; else the CLIP
    processor crops it.

    Args:
        picture: (height, width, 3) uint8.
        ratio: the model's resolution_ratio.
        pad: whether to pad.
        settings: of the tower's image processor.
    Returns:
        (1, P, S, S, 3) uint8, as `frame_parts`.
    """
    parts = [*split_blocks(picture[None], ratio)[0], picture] if ratio > 1 else [picture]
    if pad:
        parts = [_pad_to_square(part, settings) for part in parts]
    return np.concatenate([frame_parts(part[None], 1, settings)[0] for part in parts])[None]  # (1, P, S, S, 3)


def _pad_to_square(picture: np.ndarray, settings: PictureSettings) -> np.ndarray:
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in settings.mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def published_sample(frame_count: int, fps: float) -> list[int]:
    """The frame indices that the published code samples from a video, about one per second.

    Source: released code, `load_video`: n = min(total, int(total // fps)), then `middle_of_segments`.
    """
    return middle_of_segments(frame_count, min(frame_count, int(frame_count // fps)))


def middle_of_segments(frame_count: int, sample_count: int) -> list[int]:
    """The middle of each of `sample_count` equal parts of [0, frame_count - 1].

    Source: released code, `get_seq_frames`: borders are rounded half to even, middles are rounded down.
    """
    if sample_count < 1:
        return []
    length = (frame_count - 1) / sample_count
    borders = [round(length * i) for i in range(sample_count + 1)]
    return [(start + end) // 2 for start, end in pairwise(borders)]


def encode_pixels(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> TokenBatch:
    """What is stored of frames, (T, 336, 336, 3) uint8, all of which must fit.

    Raises:
        UsageError: as `encode_frames`, or a frame cannot be stored.
    """
    encoded = encode_frames(vision, pixels, patch_rows)
    for reason in encoded.unfit.values():
        raise UsageError(f"{vision.bundle.name}: {reason}")
    return encoded.tokens


def generate(model: LlavaMini, embeds: Tensor, max_new_tokens: int) -> Iterator[int]:
    """The ids of a greedy answer, without the end token; at most max_new_tokens."""
    context = model.engine.context()
    context.add(embeds)
    yield from context.reply(max_new_tokens, SamplingParams())


def greedy_logits(model: LlavaMini, embeds: Tensor) -> Iterator[Tensor]:
    """The logits, (V,), of each step of a greedy answer, without end; only with transformers as the engine."""
    context = model.engine.context()
    assert isinstance(context, TransformersContext)
    context.add(embeds)
    while context.logits is not None:
        yield context.logits
        context.say(int(context.logits.argmax()))
