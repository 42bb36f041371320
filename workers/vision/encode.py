"""Encode: pixels of frames -> TokenBatch, what is stored of each frame.

Vision tower, compressor, projector and pre-fusion each compute a whole batch of frames. Batches whose activations
exceed a fixed amount of memory are cut into pieces.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.records import PatchRows, TokenBatch, join_tokens
from workers.models.preprocess import frame_parts
from workers.vision.clip_vision import TowerFeatures, pixel_values, tower_features
from workers.vision.llava_mini import VisionPart, arrange_patches, compress, frames_at_once
from workers.vision.prefusion import FusionInputs, prefuse_vision
from workers.vision.visionzip import keep_patches

_FLOAT16_MAX = 65504.0
_LENGTH_ERROR = 0.01  # by which the length of a search key may differ from 1


@dataclass(frozen=True, repr=False)
class FrameFeatures:
    """The tower's and the compressor's results for T frames.

    Attributes:
        tower: for all T * P pictures, frame by frame.
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


@dataclass(frozen=True, repr=False)
class Encoded:
    """The encoded frames of a batch.

    Attributes:
        tokens: of the K frames that can be stored.
        places: (K,) int64, ascending, their places in the batch.
        unfit: place -> reason, for the other frames.
    """

    tokens: TokenBatch
    places: np.ndarray
    unfit: Mapping[int, str]

    def __post_init__(self):
        stored = vars(self.tokens) | {"patches": self.tokens.patches and self.tokens.patches.scales}
        for name, values in stored.items():
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"Encoded.tokens.{name} holds infinity or NaN")

    def __repr__(self) -> str:
        return f"Encoded({len(self.places)} frames, {len(self.unfit)} unfit)"


def encode_frames(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> Encoded:
    """Encodes a batch of frames, (T, 336, 336, 3) uint8.

    Args:
        patch_rows: stored patch rows per picture that the model sees of a frame; 0 for none.
    Raises:
        UsageError: patch_rows is more than a picture has patches.
    """
    vision.bundle.check_patch_rows(patch_rows)
    pieces = [_encode(vision, piece, patch_rows) for piece in _pieces(vision, pixels)]
    ends = np.cumsum([len(piece.places) + len(piece.unfit) for piece in pieces])
    return _merge(pieces, np.split(np.arange(len(pixels)), ends[:-1]))


def exact_inputs(vision: VisionPart, pixels: np.ndarray) -> Iterator[FusionInputs]:
    """The inputs of pre-fusion for `--fuse exact`: all patches of frames, (T, 336, 336, 3) uint8, in pieces."""
    for piece in _pieces(vision, pixels):
        with torch.inference_mode():
            inputs = all_patches(frame_features(vision, frame_pixels(vision, piece)))
            if vision.dtype is not torch.float32:
                _recompute(vision, piece, inputs)
        yield inputs


def _recompute(vision: VisionPart, pixels: np.ndarray, inputs: FusionInputs) -> None:
    """Replaces results that are not finite in half precision by those of float32."""
    patches, compressed = inputs.patches, inputs.compressed
    places = (~(_are_numbers(patches) & _are_numbers(compressed))).nonzero()[:, 0]
    done = 0
    for again in exact_inputs(vision.in_float32, pixels[places.cpu().numpy()]) if len(places) else ():
        where = places[done : done + len(again.compressed)]
        patches[where], compressed[where] = again.patches.to(patches), again.compressed.to(compressed)
        done += len(where)


def all_patches(features: FrameFeatures) -> FusionInputs:
    """The inputs of pre-fusion as published: every patch."""
    frame_count, patch_count, _ = features.patches.shape
    positions = torch.arange(patch_count, device=features.patches.device).expand(frame_count, -1)
    return FusionInputs(features.patches, positions, features.compressed)


def frame_pixels(vision: VisionPart, pixels: np.ndarray) -> Tensor:
    """The tower's input for frames: (T, 336, 336, 3) uint8 -> (T, P, 3, S, S), normalised, on the device."""
    bundle = vision.bundle
    parts = frame_parts(pixels, bundle.config.resolution_ratio, bundle.pictures)
    return pixel_values(parts, bundle.pictures, vision.device, vision.dtype)


def frame_features(vision: VisionPart, pixels: Tensor) -> FrameFeatures:
    """The tower's and the compressor's results for (T, P, 3, S, S) normalised pixels."""
    tower = tower_features(vision.tower, pixels.flatten(0, 1))
    features = tower.hidden[:, 1:].unflatten(0, pixels.shape[:2])  # (T, P, N, D)
    grid, patches = arrange_patches(features, vision.bundle.config.resolution_ratio)
    compressed, attention = compress(grid, vision.compressor)
    return FrameFeatures(tower, patches, compressed, attention)


def vision_tokens(vision: VisionPart, features: FrameFeatures) -> Tensor:
    """The vision tokens that the LLM receives, after pre-fusion: (T, C*C, H)."""
    return prefuse_vision(vision, vision.projector(features.patches), vision.projector(features.compressed))


def grid_places(places: Tensor, picture: int, ratio: int, side: int) -> Tensor:
    """Converts places in one picture's grid of patches to places among all patches of a frame.

    Args:
        places: row-major places in a side x side grid.
        picture: part of the frame: 0 to r*r - 1 for its blocks, row-major, r*r for the whole frame.
    """
    if ratio == 1:
        return places
    if picture == ratio * ratio:
        return places + ratio * ratio * side * side
    row = picture // ratio * side + places // side
    column = picture % ratio * side + places % side
    return row * ratio * side + column


@dataclass(frozen=True, repr=False)
class _Computed:
    """The model's results for T frames, before it is known whether they can be stored.

    Attributes:
        token, compressor_out, search_key: as in TokenBatch, but in the model's precision (the key in float32).
        patch_values, patch_scales, patch_places: as in PatchRows; None if no patch rows are stored.
    """

    token: Tensor
    compressor_out: Tensor
    search_key: Tensor | None
    patch_values: Tensor | None
    patch_scales: Tensor | None
    patch_places: Tensor | None

    def fits(self) -> np.ndarray:
        """(T,) bool: which frames can be stored."""
        fits = _fits_float16(self.token) & _fits_float16(self.compressor_out)
        if self.search_key is not None:
            fits &= (self.search_key.norm(dim=1) - 1).abs() < _LENGTH_ERROR
        if self.patch_scales is not None:
            fits &= self.patch_scales.isfinite().all(dim=1)
        return fits.cpu().numpy()

    def why_unfit(self, place: int) -> str:
        """Why a frame cannot be stored."""
        for what, values in (("vision token", self.token), ("compressor output", self.compressor_out)):
            if not _fits_float16(values[place : place + 1]).item():
                largest = float(values[place].abs().max())
                return f"a {what} of {largest:g} does not fit float16 (at most {_FLOAT16_MAX:g}), in which it is stored"
        if self.patch_scales is not None and not self.patch_scales[place].isfinite().all():
            return "a patch row does not fit float32, in which its scale is stored"
        return "its search key has no direction: the tower gives zeros, NaN or infinity"

    def stored(self, places: np.ndarray) -> TokenBatch:
        """The stored form of some frames, all of which fit."""
        where = torch.from_numpy(places).to(self.token.device)

        def half(values: Tensor) -> np.ndarray:
            return values[where].to(torch.float16).cpu().numpy()

        patches = None
        if self.patch_values is not None and self.patch_scales is not None and self.patch_places is not None:
            values, scales = self.patch_values[where].cpu().numpy(), self.patch_scales[where].cpu().numpy()
            patches = PatchRows(values, scales, self.patch_places[where].cpu().numpy().astype(np.uint16))
        key = None if self.search_key is None else half(self.search_key)
        return TokenBatch(half(self.token), half(self.compressor_out), key, patches)


@torch.inference_mode()
def _encode(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> Encoded:
    """Encodes frames in one pass; frames that do not fit in half precision are encoded again in float32."""
    computed = _compute(vision, pixels, patch_rows)
    fits = computed.fits()
    fit, unfit = np.flatnonzero(fits), np.flatnonzero(~fits)
    tokens = computed.stored(fit)
    if not len(unfit):
        return Encoded(tokens, fit, {})
    if vision.dtype is torch.float32:
        return Encoded(tokens, fit, {place: computed.why_unfit(place) for place in unfit.tolist()})
    again = encode_frames(vision.in_float32, pixels[unfit], patch_rows)
    return _merge([Encoded(tokens, np.arange(len(fit)), {}), again], [fit, unfit])


def _compute(vision: VisionPart, pixels: np.ndarray, patch_rows: int) -> _Computed:
    features = frame_features(vision, frame_pixels(vision, pixels))
    keys = features.tower.search_key.unflatten(0, (len(pixels), -1))[:, -1]  # (T, E), of the whole picture
    token = vision_tokens(vision, features)
    patches = _patch_rows(vision, features.tower, len(pixels), patch_rows) if patch_rows else (None, None, None)
    return _Computed(token, features.compressed, keys if keys.shape[1] else None, *patches)


def _merge(pieces: Sequence[Encoded], places: Sequence[np.ndarray]) -> Encoded:
    """Joins pieces of a batch.

    Args:
        pieces: of the batch.
        places: for each piece, the places of its frames in the batch.
    """
    if len(pieces) == 1:
        return pieces[0]
    found = np.concatenate([at[piece.places] for piece, at in zip(pieces, places, strict=True)])
    order = np.argsort(found)
    unfit = {
        int(at[place]): why for piece, at in zip(pieces, places, strict=True) for place, why in piece.unfit.items()
    }
    return Encoded(join_tokens([piece.tokens for piece in pieces]).take(order), found[order], unfit)


def _fits_float16(values: Tensor) -> Tensor:
    """(T,) bool: which of T rows, (T, ...), are finite in float16."""
    return _are_numbers(values.to(torch.float16))


def _are_numbers(values: Tensor) -> Tensor:
    """(T,) bool: which of T rows, (T, ...), are finite."""
    return values.isfinite().flatten(1).all(dim=1)


def _patch_rows(
    vision: VisionPart, tower: TowerFeatures, frame_count: int, row_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The patch rows that VisionZip keeps of each picture: int8 values, a scale per row, and places."""
    ratio = vision.bundle.config.resolution_ratio
    side = round(vision.bundle.patches_per_picture**0.5)
    rows, places = keep_patches(tower, row_count)  # (T*P, K, D), (T*P, K)
    places = places.unflatten(0, (frame_count, -1))  # (T, P, K)
    places = torch.cat([grid_places(places[:, p], p, ratio, side) for p in range(places.shape[1])], dim=1)
    places, order = places.sort(dim=1)  # (T, P*K)
    rows = rows.unflatten(0, (frame_count, -1)).flatten(1, 2)  # (T, P*K, D)
    rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
    return *to_int8(rows), places


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form of patch rows (..., D) float32: int8 values, and a scale for each row, (...)."""
    scales = rows.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (rows / scales[..., None]).round().to(torch.int8), scales


def _pieces(vision: VisionPart, pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Frames in pieces whose activations fit; the size depends only on model and device."""
    if not len(pixels):
        raise ValueError("encode needs at least one frame")
    step = frames_at_once(vision, vision.bundle.patches_per_frame + vision.bundle.tokens_per_frame)
    for start in range(0, len(pixels), step):
        yield pixels[start : start + step]
