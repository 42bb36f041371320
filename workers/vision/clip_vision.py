"""The vision tower: CLIP's patches of layer -2 and, in the same pass, its joint embedding as a search key.

Source: CLIP (arXiv 2103.00020). The modules are those of transformers. They run layer by layer here, so that the last
layer computes only its class token, and VisionZip gets queries and keys of one layer without a full attention map.
LLaVA-Mini's released code takes `hidden_states[mm_vision_select_layer]` without the class token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPEncoderLayer, CLIPVisionEmbeddings

from storage.errors import UsageError
from workers.models.checkpoint import list_tensors, read_json
from workers.models.load import build_empty, check_tensors, fill, sum_exactly
from workers.models.preprocess import PictureSettings

# Keys that are not read: the text side (clip_text.py), CLIP's logit scale, which cosines do not need, and position_ids
# in old files, which are 0, 1, 2, ...
_UNUSED = (r"text_model\..*", r"text_projection\.weight", r"logit_scale", r".*\.position_ids")


class VisionModel(nn.Module):
    """CLIP's vision transformer with the key names of its checkpoints."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]  # it takes the vision part's, as CLIP itself does
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ClipTower(nn.Module):
    """A vision tower with its weights.

    Attributes:
        layer_count: layers before the selected hidden state.
        projection_width: E of the joint embedding, or 0 if the tower has none. Then the layers after the selected one
            and post_layernorm are loaded, because the checkpoint has them, but never run.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int, projection_width: int):
        super().__init__()
        self.vision_model = VisionModel(config)
        self.layer_count = config.num_hidden_layers + 1 + select_layer
        self.projection_width = projection_width
        if projection_width:
            self.visual_projection = nn.Linear(config.hidden_size, projection_width, bias=False)

    @property
    def layers(self) -> Sequence[CLIPEncoderLayer]:
        """All layers, also those after the selected one."""
        return cast("Sequence[CLIPEncoderLayer]", self.vision_model.encoder.layers)


@dataclass(frozen=True)
class TowerFeatures:
    """The results of one pass of the tower, for B pictures of N patches.

    Attributes:
        hidden: (B, 1 + N, D), the selected hidden state, class token first.
        class_query: (B, heads, 1, D / heads), the class token's scaled query in the layer that computes `hidden`.
        keys: (B, heads, 1 + N, D / heads), that layer's keys.
        search_key: (B, E), L2-normalised; E is 0 if the tower has no joint embedding.
    """

    hidden: Tensor
    class_query: Tensor
    keys: Tensor
    search_key: Tensor


def load_tower(directory: Path, select_layer: int, device: torch.device, dtype: torch.dtype) -> ClipTower:
    """The vision tower in a CLIP directory.

    Args:
        select_layer: the hidden state that holds the patches; negative, counted from the end.
    Raises:
        UsageError: a key is missing, extra, or of another shape, or the selected layer does not exist.
    """
    sum_exactly()
    tensors = list_tensors(directory)
    config = vision_config(read_json(directory / "config.json"))
    if config.num_hidden_layers + 1 + select_layer < 1:
        raise UsageError(
            f"mm_vision_select_layer is {select_layer}, but the tower {directory} has {config.num_hidden_layers} "
            f"layers; give at least {-config.num_hidden_layers}"
        )
    width = tensors["visual_projection.weight"].shape[0] if "visual_projection.weight" in tensors else 0
    tower = build_empty(lambda: ClipTower(config, select_layer, width))
    check_tensors(directory, tensors, {"": tower}, _UNUSED)
    fill(tensors, {"": tower}, device, dtype)
    embeddings = tower.vision_model.embeddings
    positions = torch.arange(embeddings.num_positions, device=device)[None]  # (1, 1 + N)
    embeddings.register_buffer("position_ids", positions, persistent=False)
    return tower


def vision_config(tower: dict) -> CLIPVisionConfig:
    """The transformers settings of the vision part of a CLIP config.json."""
    try:
        if tower["model_type"] == "clip_vision_model":
            return CLIPVisionConfig(**tower)
        config = CLIPConfig(**tower).vision_config
        assert isinstance(config, CLIPVisionConfig)  # CLIPConfig makes it from the dict
        return config
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the vision tower's config.json does not describe CLIP: {reason}") from error


def pixel_values(parts: np.ndarray, pictures: PictureSettings, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normalised pixels on the device: (..., S, S, 3) uint8 -> (..., 3, S, S).

    Pixels are rescaled in float64 and normalised in float32, as in the published image processor. Then the tower's
    output equals the published one bit by bit; otherwise it differs by 1e-5.
    """
    mean, std = (torch.tensor(values, device=device) for values in (pictures.mean, pictures.std))
    pixels = torch.from_numpy(np.ascontiguousarray(parts)).to(device)
    scaled = ((pixels.double() * pictures.rescale).float() - mean) / std
    return scaled.movedim(-1, -3).to(dtype).contiguous()  # (..., 3, S, S)


def tower_features(tower: ClipTower, pixels: Tensor) -> TowerFeatures:
    """One pass of the tower over a batch of pictures.

    Args:
        pixels: (B, 3, S, S), normalised.
    """
    model = tower.vision_model
    hidden = model.pre_layrnorm(model.embeddings(pixels))  # (B, 1 + N, D)
    for layer in tower.layers[: tower.layer_count - 1]:
        hidden = encoder_block(layer, hidden)
    selected = tower.layers[tower.layer_count - 1]
    queries, keys, values = attention_inputs(selected, hidden)
    hidden = _finish_block(selected, hidden, queries, keys, values)
    return TowerFeatures(hidden, queries[:, :, :1], keys, _search_key(tower, hidden))


def _search_key(tower: ClipTower, hidden: Tensor) -> Tensor:
    """The joint embedding: the remaining layers, the last of them for the class token only."""
    if not tower.projection_width:
        return hidden.new_empty(len(hidden), 0)
    rest = tower.layers[tower.layer_count :]
    for layer in rest[:-1]:
        hidden = encoder_block(layer, hidden)
    for layer in rest[-1:]:
        hidden = encoder_block(layer, hidden, query_count=1)
    pooled = tower.vision_model.post_layernorm(hidden[:, 0])  # (B, D)
    return functional.normalize(tower.visual_projection(pooled).float(), dim=-1)  # (B, E)


def encoder_block(layer: CLIPEncoderLayer, hidden: Tensor, query_count: int | None = None) -> Tensor:
    """The output of one CLIP layer, for all rows or for the first `query_count` rows.

    Args:
        hidden: (B, S, D).
    Returns:
        (B, query_count, D).
    """
    return _finish_block(layer, hidden, *attention_inputs(layer, hidden, query_count))


def _finish_block(layer: CLIPEncoderLayer, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    attended = functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)  # (B, heads, Q, D / heads)
    attended = layer.self_attn.out_proj(attended.transpose(1, 2).flatten(2))  # (B, Q, D)
    residual = hidden[:, : queries.shape[2]] + attended
    return residual + layer.mlp(layer.layer_norm2(residual))


def attention_inputs(
    layer: CLIPEncoderLayer, hidden: Tensor, query_count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries of the first rows, keys and values of all rows: each (B, heads, rows, D / heads)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    split = (attention.num_heads, attention.head_dim)
    queries = attention.q_proj(normed[:, :query_count]) * attention.scale
    return tuple(
        rows.unflatten(-1, split).transpose(1, 2)  # (B, heads, rows, D / heads)
        for rows in (queries, attention.k_proj(normed), attention.v_proj(normed))
    )
