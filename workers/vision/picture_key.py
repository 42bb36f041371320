"""The search key of a picture that somebody has: a photo, a screenshot, a frame of some video."""

import numpy as np
import torch

from storage.errors import UsageError
from workers.decode.picture import model_pixels
from workers.models.bundle import Bundle
from workers.models.preprocess import frame_parts
from workers.vision.clip_vision import ClipTower, load_tower, pixel_values, tower_features


class PictureEncoder:
    """A bundle's vision tower, without the rest of the model, on the CPU.

    Raises:
        UsageError: the tower gives no search keys, or its files are wrong.
    """

    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._device = torch.device("cpu")
        self._tower: ClipTower = load_tower(
            bundle.tower_directory, bundle.config.select_layer, self._device, torch.float32
        )
        if not self._tower.projection_width:
            raise UsageError(f"model {bundle.name} gives no search keys, so pictures cannot be searched")

    @torch.inference_mode()
    def embed(self, picture: np.ndarray) -> np.ndarray:
        """(E,) float32, L2-normalised: the key that a frame with this picture, (height, width, 3) uint8, would have."""
        parts = frame_parts(model_pixels(picture)[None], 1, self._bundle.pictures)  # (1, 1, S, S, 3)
        pixels = pixel_values(parts, self._bundle.pictures, self._device, torch.float32)
        return tower_features(self._tower, pixels.flatten(0, 1)).search_key[0].numpy()
