"""LLaVA-Mini's vision part: tower, compressor and projector (pre-fusion: prefusion.py; the LLM: workers/llm/model.py).

Source: LLaVA-Mini (arXiv 2501.03895, section 4), released code at commit 47da113. They differ: the paper projects
patches first; the code compresses in the tower's space and projects afterwards. We follow the code, which belongs to
the weights.

The same numbers are computed with less work:
- Frames are computed as one batch.
- The compressor's queries are constant, and folded into its keys.

The vision tower and the Llama blocks are classes of transformers.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from storage.errors import UsageError
from workers.models.bundle import Bundle
from workers.models.checkpoint import list_tensors
from workers.models.load import build_empty, check_tensors, choose_device, choose_dtype, fill
from workers.vision.clip_vision import ClipTower, load_tower

COMPRESSOR_HEADS = 8  # fixed in the released code (build_compressor)
# Keys that are not read. The released loader takes the tower from the directory that mm_vision_tower names, not the
# copy in the checkpoint, which lacks the projections for the search key. inv_freq follows from the config.
_UNUSED = (r"model\.vision_tower\..*", r".*\.rotary_emb\.inv_freq")
# Most activations of one pass: enough rows to use a GPU fully; few on a CPU, for its caches.
_ACTIVATION_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


class Compressor(nn.Module):
    """The weights of the learned queries that attend to the patches; `fold` and `compress` compute with them."""

    def __init__(self, token_count: int, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(token_count, width))
        self.pos_embed = nn.Parameter(torch.empty(token_count, width))
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, COMPRESSOR_HEADS)


@dataclass(frozen=True)
class FoldedCompressor:
    """A compressor for N patches, with its constant queries multiplied into the key projection.

    Attributes:
        module: norms and output projection.
        score_weight: (heads * C*C, D); multiplied by a normed patch, it gives the patch's attention logit.
        score_bias: (heads * C*C, N); the part of the logit that depends only on the patch's place.
        value_weight: (heads, D / heads, D).
        value_bias: (D,).
    """

    module: Compressor
    score_weight: Tensor
    score_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor


@dataclass(frozen=True, repr=False)
class VisionPart:
    """The loaded part of a model that indexing needs: tower, compressor, projector and pre-fusion."""

    bundle: Bundle
    device: torch.device
    dtype: torch.dtype
    tower: ClipTower
    compressor: FoldedCompressor
    projector: nn.Sequential
    prefusion: Sequence[LlamaDecoderLayer]
    rotary: LlamaRotaryEmbedding

    @cached_property
    def in_float32(self) -> "VisionPart":
        """The same part in float32, for frames that half precision cannot compute; loaded when it is first needed.

        It is on the CPU if the GPU's memory is too small for both.
        """
        with torch.inference_mode(False):  # weights created in inference mode cannot be used outside of it
            try:
                return load_vision(self.bundle, str(self.device), "float32")
            except torch.OutOfMemoryError:
                return load_vision(self.bundle, "cpu", "float32")

    def __repr__(self) -> str:
        return f"VisionPart({self.bundle.name!r}, {self.device}, {self.dtype})"


# --- loading


def load_vision(bundle: Bundle, device: str = "auto", dtype: str = "auto") -> VisionPart:
    """Loads the part of a model that indexing needs; about 2.5 of 17 GB of a published checkpoint.

    Raises:
        UsageError: a key of the checkpoint is missing, extra, or of another shape, in any part.
    """
    return load_parts(bundle, device, dtype)[0]


def load_parts(bundle: Bundle, device_name: str, dtype_name: str) -> tuple[VisionPart, LlamaForCausalLM]:
    """The loaded vision part, and the LLM, which is checked but has no memory yet."""
    device = choose_device(device_name)
    dtype = choose_dtype(dtype_name, device)
    tensors = list_tensors(bundle.directory)
    settings = _llama_settings(bundle)
    llm = build_empty(lambda: LlamaForCausalLM(settings))
    blocks = range(bundle.config.prefusion_layer_count)
    compressor = build_empty(lambda: Compressor(bundle.tokens_per_frame, _compressor_width(bundle)))
    projector = build_empty(lambda: _empty_projector(bundle))
    prefusion = build_empty(lambda: nn.ModuleList(LlamaDecoderLayer(settings, i) for i in blocks))
    modules = {"model.compressor.": compressor, "model.mm_projector.": projector, "model.prefusion_layers.": prefusion}
    check_tensors(bundle.directory, tensors, {"": llm, **modules}, _UNUSED)
    fill(tensors, modules, device, dtype)
    patch_count = bundle.patches_per_picture * bundle.config.resolution_ratio**2
    vision = VisionPart(
        bundle=bundle,
        device=device,
        dtype=dtype,
        tower=load_tower(bundle.tower_directory, bundle.config.select_layer, device, dtype),
        compressor=fold(compressor, patch_count),
        projector=projector,
        prefusion=cast("Sequence[LlamaDecoderLayer]", prefusion),
        rotary=LlamaRotaryEmbedding(settings).to(device),
    )
    return vision, llm


def _llama_settings(bundle: Bundle) -> LlamaConfig:
    try:
        return LlamaConfig(**{name: value for name, value in bundle.config.llama.items() if name != "model_type"})
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{bundle.directory}: config.json does not describe Llama blocks: {reason}") from error


def _compressor_width(bundle: Bundle) -> int:
    """The tower's width, as in the published compressor (1024); its setting in the config is ignored."""
    width = bundle.vision["hidden_size"]
    if width % COMPRESSOR_HEADS:
        raise UsageError(
            f"{bundle.tower_directory}: hidden_size is {width}; it must be a multiple of the compressor's "
            f"{COMPRESSOR_HEADS} heads"
        )
    return width


def _empty_projector(bundle: Bundle) -> nn.Sequential:
    kind = bundle.config.projector_type
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None:
        raise UsageError(f"{bundle.directory}: mm_projector_type is {kind!r}; only mlp<N>x_gelu is supported")
    width = bundle.config.hidden_size
    layers: list[nn.Module] = [nn.Linear(bundle.vision["hidden_size"], width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]  # GELU with erf; with tanh results differ by 8e-4
    return nn.Sequential(*layers)


# --- a frame


def arrange_patches(features: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """The patches for the compressor, and the patches for pre-fusion.

    Args:
        features: (T, P, N, D), the tower's patches of each part of a frame, the whole frame last.
        ratio: r; P = 1, or r*r + 1.
    Returns:
        (T, r*r*N, D), the blocks' patches as one grid, row by row (for r = 1 the frame's own), and
        (T, P*N, D), that grid and then the whole frame's patches.
    """
    if ratio == 1:
        return features[:, 0], features[:, 0]
    side = round(features.shape[2] ** 0.5)
    grid = features[:, :-1].unflatten(2, (side, side)).unflatten(1, (ratio, ratio))  # (T, r, r, side, side, D)
    grid = grid.transpose(2, 3).flatten(1, 4)  # (T, r*side*r*side, D)
    return grid, torch.cat([grid, features[:, -1]], dim=1)


def fold(compressor: Compressor, patch_count: int) -> FoldedCompressor:
    """The compressor for `patch_count` patches; what does not depend on the patches is computed here, in float32.

    Raises:
        UsageError: patch_count is no square.
    """
    side = round(patch_count**0.5)
    if side * side != patch_count:
        raise UsageError(
            f"the tower gives {patch_count} patches; the compressor needs a square number: check image_size and "
            "patch_size of the tower"
        )
    width = compressor.query.shape[1]
    heads, head_width = COMPRESSOR_HEADS, width // COMPRESSOR_HEADS
    weights = compressor.attn.in_proj_weight.float().unflatten(0, (3, heads, head_width))  # (3, heads, dh, D)
    bias = compressor.attn.in_proj_bias.float().unflatten(0, (3, heads, head_width))  # (3, heads, dh)
    places = compressor.pos_embed.float()  # (C*C, D)
    queries = functional.layer_norm(
        compressor.query.float(), (width,), compressor.ln_q.weight.float(), compressor.ln_q.bias.float()
    )
    queries = torch.einsum("hed,cd->hce", weights[0], queries + places) + bias[0][:, None]  # (heads, C*C, dh)
    # The key bias adds the same number to every logit, so it has no effect on the softmax.
    scores = torch.einsum("hce,hed->hcd", queries, weights[1]) * head_width**-0.5  # (heads, C*C, D)
    grid_places = _stretch(places, side)  # (N, D)
    scores = scores.flatten(0, 1)  # (heads * C*C, D)
    dtype = compressor.query.dtype
    return FoldedCompressor(
        module=compressor,
        score_weight=scores.to(dtype),
        score_bias=(scores @ grid_places.T).to(dtype),  # (heads * C*C, N)
        value_weight=weights[2].to(dtype),
        value_bias=bias[2].flatten().to(dtype),
    )


def _stretch(places: Tensor, side: int) -> Tensor:
    """The C x C learned positions, resized to a side x side grid (bicubic): (C*C, D) -> (side*side, D)."""
    source = round(len(places) ** 0.5)
    if source == side:
        return places
    grid = places.T.unflatten(1, (source, source))[None]  # (1, D, C, C)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T  # (side*side, D)


def compress(patches: Tensor, compressor: FoldedCompressor) -> tuple[Tensor, Tensor]:
    """The compressor's output, C*C vision tokens per frame, by attention of the learned queries to the patches.

    Args:
        patches: (T, N, D) features of the tower's selected layer.
    Returns:
        (T, C*C, D), not yet projected, and the attention averaged over heads, (T, C*C, N).
    """
    heads = COMPRESSOR_HEADS
    normed = compressor.module.ln_kv(patches)  # (T, N, D)
    logits = compressor.score_weight @ normed.mT + compressor.score_bias  # (T, heads * C*C, N)
    attention = logits.float().softmax(dim=-1).to(patches.dtype).unflatten(1, (heads, -1))  # (T, heads, C*C, N)
    pooled = attention @ normed[:, None]  # (T, heads, C*C, D)
    values = pooled @ compressor.value_weight.mT  # (T, heads, C*C, D / heads)
    values = values.transpose(1, 2).flatten(2) + compressor.value_bias  # (T, C*C, D)
    return compressor.module.attn.out_proj(values), attention.mean(dim=1)


# --- how it computes


def precise_attention(vision: VisionPart) -> AbstractContextManager[None]:
    """Makes attention on a CPU use an exact exponential.

    The fast kernel rounds it to 20 bits. The largest difference from the published logits is then 5.1e-5, not 2.4e-5.
    """
    return sdpa_kernel(SDPBackend.MATH) if vision.device.type == "cpu" else nullcontext()


def frames_at_once(vision: VisionPart, row_count: int) -> int:
    """The most frames of `row_count` pre-fusion rows that fit one pass; at least 1."""
    mlp = vision.prefusion[0].mlp
    head_count = mlp.hidden_size // vision.prefusion[0].self_attn.head_dim
    width = 3 * mlp.intermediate_size + 8 * mlp.hidden_size + 2 * head_count * row_count
    row_bytes = width * torch.finfo(vision.dtype).bits // 8
    return max(1, _ACTIVATION_BYTES[vision.device.type] // (row_bytes * row_count))


def to_device(vision: VisionPart, values: np.ndarray) -> Tensor:
    """Values as a tensor on the model's device and in its precision."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(vision.device, vision.dtype)
