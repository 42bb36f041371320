"""LLaVA-Mini's vision part: compressor, projector and pre-fusion (the LLM: workers/llm/model.py).

Source: LLaVA-Mini (arXiv 2501.03895, section 4), released code at commit 47da113. They differ: the paper projects
patches first; the code compresses in the tower's space and projects afterwards. We follow the code, which belongs to
the weights.

The same numbers are computed with less work:
- Frames are computed as one batch.
- The compressor's queries are constant, and folded into its keys.
- Masked text is left out of the sequence. Positions are those without it, so a causal mask is enough.
- The last pre-fusion block computes only the rows that are used.
- Pre-fusion is causal and reads vision first. So a frame's vision token does not depend on the question, and is
  computed once, when a video is indexed.

The vision tower and the Llama blocks are classes of transformers.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
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
    apply_rotary_pos_emb,
    repeat_kv,
)

from storage.errors import UsageError
from storage.records import PatchRows
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


@dataclass(frozen=True, repr=False)
class FusionInputs:
    """The inputs of pre-fusion for T frames, which come before the text.

    Attributes:
        patches: (T, K, D) features of the tower's selected layer.
        positions: (T, K) int64, each patch's place among all patches of its frame, ascending.
        compressed: (T, C*C, D), the compressor's output.
    """

    patches: Tensor
    positions: Tensor
    compressed: Tensor

    def __post_init__(self):
        frame_count, _, width = self.patches.shape
        if self.positions.shape != self.patches.shape[:2] or self.compressed.shape[::2] != (frame_count, width):
            raise ValueError(f"shapes do not match: {self!r}, positions {tuple(self.positions.shape)}")

    def __repr__(self) -> str:
        return f"FusionInputs(patches={tuple(self.patches.shape)}, compressed={tuple(self.compressed.shape)})"


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


def prefuse_vision(vision: VisionPart, patches: Tensor, compressed: Tensor) -> Tensor:
    """The vision tokens that the LLM receives; independent of the question, because pre-fusion is causal.

    Args:
        patches: (T, N, H), projected. compressed: (T, C*C, H), projected.
    Returns:
        (T, C*C, H).
    """
    sequence = torch.cat([patches, compressed], dim=1)  # (T, N + C*C, H)
    positions = torch.arange(sequence.shape[1], device=sequence.device)[None]
    return prefuse(vision, sequence, positions, compressed.shape[1])


# --- pre-fusion


@dataclass(eq=False)
class Past:
    """Keys and values of a block's rows so far, (T, key heads, P, H / heads) each; None if there are no rows."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of further rows; returns those of all rows."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Keeps the first `length` rows; the memory of the others is freed when rows are added."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def prefuse(
    vision: VisionPart, sequence: Tensor, positions: Tensor, kept: int, past: Sequence[Past] | None = None
) -> Tensor:
    """Causal pre-fusion; the last block computes only the last `kept` rows.

    Args:
        sequence: (T, S, H).
        positions: (1 or T, S).
        kept: how many rows are wanted.
        past: for each block the rows before these, to which these are added; None if there are no other rows.
    Returns:
        (T, kept, H).
    """
    count, held = sequence.shape[1], len(past[0]) if past is not None else 0
    rotary = vision.rotary(sequence, positions)
    last_number = len(vision.prefusion) - 1
    for number, block in enumerate(vision.prefusion):
        wanted = kept if number == last_number else count if held else None
        allowed = None  # with all rows the mask is causal; the last row attends to all
        if wanted not in (None, 1):
            allowed = torch.ones(wanted, held + count, dtype=torch.bool, device=sequence.device)
            allowed = allowed.tril(held + count - wanted)
        sequence = block_rows(block, sequence, rotary, wanted, allowed, None if past is None else past[number])
    return sequence


def block_keys(block: LlamaDecoderLayer, normed: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values, of a block's normed input: each (T, key heads, S, H / heads)."""
    attention = block.self_attn
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return apply_rotary_pos_emb(keys, keys, *rotary)[1], values


def block_rows(
    block: LlamaDecoderLayer,
    sequence: Tensor,
    rotary: tuple[Tensor, Tensor],
    kept: int | None = None,
    allowed: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """The last `kept` rows of a Llama block's output; all rows, with a causal mask, if kept is None.

    Args:
        sequence: (T, S, H).
        rotary: cosines and sines, (1 or T, S, H / heads).
        kept: how many rows are wanted.
        allowed: (kept, P + S) bool, which rows each kept row may attend to; None: all.
        past: the P rows before these, to which these are added.
    Returns:
        (T, kept, H).
    """
    attention = block.self_attn
    first = 0 if kept is None else sequence.shape[1] - kept
    normed = block.input_layernorm(sequence)  # (T, S, H)
    keys, values = block_keys(block, normed, rotary)
    if past is not None:
        keys, values = past.extend(keys, values)
    queries = attention.q_proj(normed[:, first:])
    queries = queries.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (T, heads, kept, H / heads)
    cosines, sines = (part[:, first:] for part in rotary)
    queries = apply_rotary_pos_emb(queries, queries, cosines, sines)[0]
    if allowed is not None:  # fused GPU kernels accept grouped keys or a mask, not both
        keys, values = (repeat_kv(part, attention.num_key_value_groups) for part in (keys, values))
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed, is_causal=kept is None, enable_gqa=allowed is None
    )
    residual = sequence[:, first:] + attention.o_proj(attended.transpose(1, 2).flatten(2))  # (T, kept, H)
    return residual + block.mlp(block.post_attention_layernorm(residual))


# --- inputs of pre-fusion


def tokens_inputs(vision: VisionPart, compressor_out: np.ndarray) -> FusionInputs:
    """The inputs of pre-fusion for `--fuse tokens`: only the stored compressor outputs.

    Args:
        compressor_out: (T, C*C, D) float16, as stored.
    """
    compressed = to_device(vision, compressor_out)
    frame_count, _, width = compressed.shape
    positions = torch.empty(frame_count, 0, dtype=torch.int64, device=vision.device)
    return FusionInputs(compressed.new_empty(frame_count, 0, width), positions, compressed)


def patches_inputs(vision: VisionPart, compressor_out: np.ndarray, rows: PatchRows) -> FusionInputs:
    """The inputs of pre-fusion for `--fuse patches`: stored compressor outputs and patch rows."""
    values = torch.from_numpy(rows.values).to(vision.device).float()
    scales = torch.from_numpy(rows.scales).to(vision.device)
    patches = (values * scales[..., None]).to(vision.dtype)  # (T, K, D)
    positions = torch.from_numpy(rows.positions.astype(np.int64)).to(vision.device)
    return FusionInputs(patches, positions, to_device(vision, compressor_out))


def in_pieces(vision: VisionPart, batches: Iterable[FusionInputs], text_rows: int) -> Iterator[FusionInputs]:
    """Batches of frames, cut to pieces that fit one pass of pre-fusion with `text_rows` rows of text."""
    for batch in batches:
        step = frames_at_once(vision, batch.patches.shape[1] + batch.compressed.shape[1] + text_rows)
        for start in range(0, len(batch.compressed), step):
            part = slice(start, start + step)
            yield FusionInputs(batch.patches[part], batch.positions[part], batch.compressed[part])


def frames_and_text(vision: VisionPart, inputs: FusionInputs, text: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-fusion's rows of each frame and of the text after it, (T, S, H), and their positions, (T, S).

    Positions are those of the published code, with all patches of a frame, even if fewer are given.

    Args:
        text: (U, H), embeddings of the text that is not masked.
    """
    frame_count = len(inputs.compressed)
    frames = [vision.projector(inputs.patches), vision.projector(inputs.compressed)]
    sequence = torch.cat([*frames, text.expand(frame_count, -1, -1)], dim=1)
    rest = torch.arange(inputs.compressed.shape[1] + len(text), device=vision.device) + vision.bundle.patches_per_frame
    return sequence, torch.cat([inputs.positions, rest.expand(frame_count, -1)], dim=1)


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
