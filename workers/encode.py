"""Encode: frames in, what is stored of them out. FrameBatch -> TokenBatch.

One pass: vision tower -> compressor -> projector -> pre-fusion, every stage over a whole batch of frames, cut only
where the activations of published widths would not fit a bounded amount of memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.errors import UsageError
from storage.records import FrameBatch, PatchRows, TokenBatch
from workers.clip import TowerFeatures, pixel_values, tower_features
from workers.llava_mini import FusionInputs, VisionPart, arrange_patches, compress, frames_at_once, prefuse_vision
from workers.preprocess import frame_parts
from workers.visionzip import keep_patches

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, repr=False)
class FrameFeatures:
    """What the tower and the compressor make of T frames.

    Attributes:
        tower: of all T * P pictures, frame by frame.
        patches: (T, P*N, D), in pre-fusion's order.
        compressed: (T, C*C, D), before the projector.
        attention: (T, C*C, r*r*N), the compressor's, averaged over heads.
    """

    tower: TowerFeatures
    patches: Tensor
    compressed: Tensor
    attention: Tensor

    def __repr__(self) -> str:
        return f"FrameFeatures(patches={tuple(self.patches.shape)}, compressed={tuple(self.compressed.shape)})"


def encode_frames(vision: VisionPart, batch: FrameBatch, patch_rows: int) -> TokenBatch:
    """What is stored of a batch of frames.

    Args:
        patch_rows: rows of the patch tier per picture that the model sees of a frame; 0 for none.
    Raises:
        UsageError: more patch rows than a picture has patches, or values that float16 cannot hold.
    """
    return encode_pixels(vision, batch.pixels, patch_rows)


def encode_pixels(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> TokenBatch:
    """As `encode_frames`, of pixels alone: (T, 336, 336, 3) uint8."""
    vision.bundle.check_patch_rows(patch_rows)
    pieces = [_encode(vision, piece, patch_rows) for piece in _pieces(vision, pixels)]
    if len(pieces) == 1:
        return pieces[0]
    keys = [piece.search_key for piece in pieces]
    return TokenBatch(
        token=np.concatenate([piece.token for piece in pieces]),
        compressor_out=np.concatenate([piece.compressor_out for piece in pieces]),
        search_key=None if keys[0] is None else np.concatenate(keys),
        patches=_join([piece.patches for piece in pieces]) if patch_rows else None,
    )


def exact_inputs(vision: VisionPart, pixels: np.ndarray) -> Iterator[FusionInputs]:
    """What `--fuse exact` reads of frames, (T, 336, 336, 3) uint8: all patches, encoded again, piece by piece."""
    for piece in _pieces(vision, pixels):
        with torch.inference_mode():
            features = frame_features(vision, frame_pixels(vision, piece))
        yield all_patches(features)


def all_patches(features: FrameFeatures) -> FusionInputs:
    """What pre-fusion reads of frames as published: every patch."""
    frame_count, patch_count, _ = features.patches.shape
    positions = torch.arange(patch_count, device=features.patches.device).expand(frame_count, -1)
    return FusionInputs(features.patches, positions, features.compressed)


def frame_pixels(vision: VisionPart, pixels: np.ndarray) -> Tensor:
    """Frames as the tower takes them: (T, 336, 336, 3) uint8 -> (T, P, 3, S, S), normalised, on the device."""
    bundle = vision.bundle
    parts = frame_parts(pixels, bundle.config.resolution_ratio, bundle.pictures)
    return pixel_values(parts, bundle.pictures, vision.device, vision.dtype)


def frame_features(vision: VisionPart, pixels: Tensor) -> FrameFeatures:
    """Tower and compressor over a batch: (T, P, 3, S, S) normalised pixels in."""
    tower = tower_features(vision.tower, pixels.flatten(0, 1))
    features = tower.hidden[:, 1:].unflatten(0, pixels.shape[:2])  # (T, P, N, D)
    grid, patches = arrange_patches(features, vision.bundle.config.resolution_ratio)
    compressed, attention = compress(grid, vision.compressor)
    return FrameFeatures(tower, patches, compressed, attention)


def vision_tokens(vision: VisionPart, features: FrameFeatures) -> Tensor:
    """The vision tokens after pre-fusion, as the LLM receives them: (T, C*C, H)."""
    return prefuse_vision(vision, vision.projector(features.patches), vision.projector(features.compressed))


def grid_places(places: Tensor, picture: int, ratio: int, side: int) -> Tensor:
    """Places in one picture's grid of patches -> places among all patches of a frame's pre-fusion input.

    Args:
        places: row-major places in a side x side grid.
        picture: which part of the frame: 0 .. r*r - 1 its blocks, row-major, r*r the whole.
    """
    if ratio == 1:
        return places
    if picture == ratio * ratio:
        return places + ratio * ratio * side * side
    row = picture // ratio * side + places // side
    column = picture % ratio * side + places % side
    return row * ratio * side + column


@torch.inference_mode()
def _encode(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> TokenBatch:
    features = frame_features(vision, frame_pixels(vision, pixels))
    keys = features.tower.search_key.unflatten(0, (len(pixels), -1))[:, -1]  # (T, E), of the whole picture
    return TokenBatch(
        token=_to_float16("vision token", vision_tokens(vision, features), vision),
        compressor_out=_to_float16("compressor output", features.compressed, vision),
        search_key=_to_float16("search key", keys, vision) if keys.shape[1] else None,
        patches=_patch_rows(vision, features.tower, len(pixels), patch_rows) if patch_rows else None,
    )


def _patch_rows(vision: VisionPart, tower: TowerFeatures, frame_count: int, row_count: int) -> PatchRows:
    """The patch tier: per picture the rows that VisionZip keeps, int8 with a scale per row."""
    ratio = vision.bundle.config.resolution_ratio
    side = round(vision.bundle.patches_per_picture**0.5)
    rows, places = keep_patches(tower, row_count)  # (T*P, K, D), (T*P, K)
    places = places.unflatten(0, (frame_count, -1))  # (T, P, K)
    places = torch.cat([grid_places(places[:, p], p, ratio, side) for p in range(places.shape[1])], dim=1)
    places, order = places.sort(dim=1)  # (T, P*K)
    rows = rows.float().unflatten(0, (frame_count, -1)).flatten(1, 2)  # (T, P*K, D)
    rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
    values, scales = to_int8(rows)
    return PatchRows(values.cpu().numpy(), scales.cpu().numpy(), places.cpu().numpy().astype(np.uint16))


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D) float32 as the patch tier stores them: int8 values, and a scale for each row, (...)."""
    scales = rows.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (rows / scales[..., None]).round().to(torch.int8), scales


def _pieces(vision: VisionPart, pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Frames in runs whose activations fit; the size depends on model and device alone."""
    if not len(pixels):
        raise ValueError("encode needs at least one frame")
    step = frames_at_once(vision, vision.bundle.patches_per_frame + vision.bundle.tokens_per_frame)
    for start in range(0, len(pixels), step):
        yield pixels[start : start + step]


def _to_float16(what: str, values: Tensor, vision: VisionPart) -> np.ndarray:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest <= _FLOAT16_MAX:  # also true of NaN
        raise UsageError(
            f"{vision.bundle.name}: a {what} of {largest:g} does not fit float16 (at most {_FLOAT16_MAX:g}), in which "
            f"it is stored; it was computed in {vision.dtype}, so try --dtype float32, or use another model"
        )
    return values.to(torch.float16).cpu().numpy()


def _join(rows: list[PatchRows]) -> PatchRows:
    return PatchRows(
        np.concatenate([piece.values for piece in rows]),
        np.concatenate([piece.scales for piece in rows]),
        np.concatenate([piece.positions for piece in rows]),
    )
