"""Search keys of pictures, such as a photo, a screenshot or a frame of a video."""

import numpy as np
import torch

from storage.errors import UsageError
from workers.decode.picture import model_pixels
from workers.models.bundle import Bundle
from workers.models.preprocess import frame_parts
from workers.vision.clip_vision import load_tower, pixel_values, tower_features


class PictureEncoder:
    """A bundle's vision tower on the CPU, without the rest of the model.

    Raises:
        UsageError: the tower gives no search keys, or cannot be loaded.
    """

    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._device = torch.device("cpu")
        self._tower = load_tower(bundle.tower_directory, bundle.config.select_layer, self._device, torch.float32)
        if not self._tower.projection_width:
            raise UsageError(
                f"model {bundle.name}: its CLIP has no visual_projection, so it gives no search keys; use another model"
            )

    @torch.inference_mode()
    def embed(self, picture: np.ndarray) -> np.ndarray:
        """The search key of a frame with this picture, (height, width, 3) uint8: (E,) float32, L2-normalised."""
        parts = frame_parts(model_pixels(picture)[None], 1, self._bundle.pictures)  # (1, 1, S, S, 3)
        pixels = pixel_values(parts, self._bundle.pictures, self._device, torch.float32)
        return tower_features(self._tower, pixels.flatten(0, 1)).search_key[0].numpy()
