"""LLaVA-Mini's vision part: compressor, projector and pre-fusion (the LLM: workers/llm/model.py).

Source: LLaVA-Mini (arXiv 2501.03895, section 4), released code at commit 47da113. Where they differ, the code is
followed, as its weights want it: the paper projects patches first; the code compresses in the tower's space and
projects afterwards.

Where this program computes less for the same numbers: frames go as one batch; the compressor's constant queries are
folded into its keys; padded text is left out of the sequence instead of masked (positions count on without it, so the
rest is plainly causal); the last pre-fusion block computes only the rows that are used. Since pre-fusion is causal with
vision first, a frame's vision token does not depend on the question and is computed once, when a video is indexed.

The vision tower and the Llama blocks are transformers' own classes.
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

COMPRESSOR_HEADS = 8  # whatever the config says (released code, build_compressor)
# Not read by design. The released loader takes the tower from the directory that mm_vision_tower names, never the copy
# inside the checkpoint, and only that directory has the projections for the search key; inv_freq follows from config.
_UNUSED = (r"model\.vision_tower\..*", r".*\.rotary_emb\.inv_freq")
# Activations that one pass may hold. Enough rows to keep a GPU's matrix units busy; on a CPU small, for its caches.
_ACTIVATION_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


class Compressor(nn.Module):
    """Learned queries that attend to the patches: a holder of weights; `fold` and `compress` compute."""

    def __init__(self, token_count: int, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(token_count, width))
        self.pos_embed = nn.Parameter(torch.empty(token_count, width))
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, COMPRESSOR_HEADS)


@dataclass(frozen=True)
class FoldedCompressor:
    """A compressor ready for N patches, its constant queries multiplied into the key projection.

    Attributes:
        module: norms and output projection.
        score_weight: (heads * C*C, D); its product with a normed patch is that patch's attention logit.
        score_bias: (heads * C*C, N); the logit's part that depends on the patch's place alone.
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
    """Everything that indexing needs, loaded: tower, compressor, projector and pre-fusion."""

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
        """The same in float32, for the few frames that half precision cannot compute; loaded when one is met.

        On the CPU where a GPU has not the memory for both.
        """
        with torch.inference_mode(False):  # weights that are made in it cannot be used outside
            try:
                return load_vision(self.bundle, str(self.device), "float32")
            except torch.OutOfMemoryError:
                return load_vision(self.bundle, "cpu", "float32")

    def __repr__(self) -> str:
        return f"VisionPart({self.bundle.name!r}, {self.device}, {self.dtype})"


@dataclass(frozen=True, repr=False)
class FusionInputs:
    """What pre-fusion reads of T frames before the text.

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
            raise ValueError(f"FusionInputs do not fit together: {self!r}, positions {tuple(self.positions.shape)}")

    def __repr__(self) -> str:
        return f"FusionInputs(patches={tuple(self.patches.shape)}, compressed={tuple(self.compressed.shape)})"


# --- loading


def load_vision(bundle: Bundle, device: str = "auto", dtype: str = "auto") -> VisionPart:
    """The part of a model that indexing needs; of a published checkpoint about 2.5 GB instead of 17.

    Raises:
        UsageError: a key is missing, extra or misshapen, in whatever part of the checkpoint.
    """
    return load_parts(bundle, device, dtype)[0]


def load_parts(bundle: Bundle, device_name: str, dtype_name: str) -> tuple[VisionPart, LlamaForCausalLM]:
    """The vision part, and the LLM checked but still without memory."""
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
    """The tower's width, which the published compressor has too (1024), whatever else the config says."""
    width = bundle.vision["hidden_size"]
    if width % COMPRESSOR_HEADS:
        raise UsageError(
            f"{bundle.tower_directory}: hidden_size {width} is no multiple of the compressor's {COMPRESSOR_HEADS} heads"
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
        layers += [nn.GELU(), nn.Linear(width, width)]  # GELU by erf; the tanh form is off by 8e-4
    return nn.Sequential(*layers)


# --- a frame


def arrange_patches(features: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """The patches in pre-fusion's order, and those that the compressor attends to.

    Args:
        features: (T, P, N, D), the tower's patches of each part of a frame, the whole picture last.
        ratio: r; P = 1, or r*r + 1.
    Returns:
        (T, r*r*N, D), the blocks' patches as one grid row by row (for r = 1 the picture's own), and
        (T, P*N, D), that grid and then the whole picture's patches.
    """
    if ratio == 1:
        return features[:, 0], features[:, 0]
    side = round(features.shape[2] ** 0.5)
    grid = features[:, :-1].unflatten(2, (side, side)).unflatten(1, (ratio, ratio))  # (T, r, r, side, side, D)
    grid = grid.transpose(2, 3).flatten(1, 4)  # (T, r*side*r*side, D)
    return grid, torch.cat([grid, features[:, -1]], dim=1)


def fold(compressor: Compressor, patch_count: int) -> FoldedCompressor:
    """The compressor for `patch_count` patches, with what does not depend on them multiplied out in float32.

    Raises:
        UsageError: patch_count is no square.
    """
    side = round(patch_count**0.5)
    if side * side != patch_count:
        raise UsageError(f"the compressor wants a square grid of patches, not {patch_count}; check the tower's sizes")
    width = compressor.query.shape[1]
    heads, head_width = COMPRESSOR_HEADS, width // COMPRESSOR_HEADS
    weights = compressor.attn.in_proj_weight.float().unflatten(0, (3, heads, head_width))  # (3, heads, dh, D)
    bias = compressor.attn.in_proj_bias.float().unflatten(0, (3, heads, head_width))  # (3, heads, dh)
    places = compressor.pos_embed.float()  # (C*C, D)
    queries = functional.layer_norm(
        compressor.query.float(), (width,), compressor.ln_q.weight.float(), compressor.ln_q.bias.float()
    )
    queries = torch.einsum("hed,cd->hce", weights[0], queries + places) + bias[0][:, None]  # (heads, C*C, dh)
    # the key bias adds the same to every patch's logit, so softmax drops it
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
    """The C x C learned places as a side x side grid, bicubic: (C*C, D) -> (side*side, D)."""
    source = round(len(places) ** 0.5)
    if source == side:
        return places
    grid = places.T.unflatten(1, (source, source))[None]  # (1, D, C, C)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T  # (side*side, D)


def compress(patches: Tensor, compressor: FoldedCompressor) -> tuple[Tensor, Tensor]:
    """C*C vision tokens per frame, by attention of the learned queries to the patches.

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
    """The vision tokens as the LLM receives them; no question needed, because pre-fusion is causal.

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
    """Keys and values of a block's rows so far, (T, key heads, P, H / heads) each; None before the first."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some more rows, after all before them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        """Forgets the rows from a place on; the memory is free once the next ones are there."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def prefuse(
    vision: VisionPart, sequence: Tensor, positions: Tensor, kept: int, past: Sequence[Past] | None = None
) -> Tensor:
    """Causal pre-fusion; the last block computes the last `kept` rows alone.

    Args:
        sequence: (T, S, H). positions: (1 or T, S).
        kept: how many rows are wanted.
        past: for each block, the rows before these, to which these are added; None where they are the first and no
            others follow.
    Returns:
        (T, kept, H).
    """
    count, held = sequence.shape[1], len(past[0]) if past is not None else 0
    rotary = vision.rotary(sequence, positions)
    last_number = len(vision.prefusion) - 1
    for number, block in enumerate(vision.prefusion):
        wanted = kept if number == last_number else count if held else None
        allowed = None  # causal where all rows are wanted; the very last row sees all
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
    """The last `kept` rows of a Llama block's output; all, causal, where kept is None.

    Args:
        sequence: (T, S, H).
        rotary: cosines and sines, (1 or T, S, H / heads).
        allowed: (kept, P + S) bool, which rows each kept one may attend to; None with kept: all of them.
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
    if allowed is not None:  # the fused GPU kernels take grouped keys or a mask, not both
        keys, values = (repeat_kv(part, attention.num_key_value_groups) for part in (keys, values))
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed, is_causal=kept is None, enable_gqa=allowed is None
    )
    residual = sequence[:, first:] + attention.o_proj(attended.transpose(1, 2).flatten(2))  # (T, kept, H)
    return residual + block.mlp(block.post_attention_layernorm(residual))


# --- what pre-fusion reads


def tokens_inputs(vision: VisionPart, compressor_out: np.ndarray) -> FusionInputs:
    """What `--fuse tokens` reads: the stored compressor outputs alone, at their published place.

    Args:
        compressor_out: (T, C*C, D) float16, as stored.
    """
    compressed = to_device(vision, compressor_out)
    frame_count, _, width = compressed.shape
    positions = torch.empty(frame_count, 0, dtype=torch.int64, device=vision.device)
    return FusionInputs(compressed.new_empty(frame_count, 0, width), positions, compressed)


def patches_inputs(vision: VisionPart, compressor_out: np.ndarray, rows: PatchRows) -> FusionInputs:
    """What `--fuse patches` reads: the stored patch rows too, each at its own place in the grid."""
    values = torch.from_numpy(rows.values).to(vision.device).float()
    scales = torch.from_numpy(rows.scales).to(vision.device)
    patches = (values * scales[..., None]).to(vision.dtype)  # (T, K, D)
    positions = torch.from_numpy(rows.positions.astype(np.int64)).to(vision.device)
    return FusionInputs(patches, positions, to_device(vision, compressor_out))


def in_pieces(vision: VisionPart, batches: Iterable[FusionInputs], text_rows: int) -> Iterator[FusionInputs]:
    """Batches of frames, cut to what one pass of pre-fusion with so much text may hold."""
    for batch in batches:
        step = frames_at_once(vision, batch.patches.shape[1] + batch.compressed.shape[1] + text_rows)
        for start in range(0, len(batch.compressed), step):
            part = slice(start, start + step)
            yield FusionInputs(batch.patches[part], batch.positions[part], batch.compressed[part])


def frames_and_text(vision: VisionPart, inputs: FusionInputs, text: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-fusion's rows of each frame with the text after it, (T, S, H), and their positions, (T, S).

    Every part keeps its published position: a patch its place, compressed tokens and text as if all of a
    frame's patches stood before them, however few are given.

    Args:
        text: (U, H), embeddings of what is not masked.
    """
    frame_count = len(inputs.compressed)
    frames = [vision.projector(inputs.patches), vision.projector(inputs.compressed)]
    sequence = torch.cat([*frames, text.expand(frame_count, -1, -1)], dim=1)
    rest = torch.arange(inputs.compressed.shape[1] + len(text), device=vision.device) + vision.bundle.patches_per_frame
    return sequence, torch.cat([inputs.positions, rest.expand(frame_count, -1)], dim=1)


def precise_attention(vision: VisionPart) -> AbstractContextManager[None]:
    """On a CPU, attention with an exact exponential.

    The fast kernel rounds it to 20 bits, and greedy decoding amplifies that: the largest distance to the published
    logits is then 5.1e-5 instead of 2.4e-5.
    """
    return sdpa_kernel(SDPBackend.MATH) if vision.device.type == "cpu" else nullcontext()


def frames_at_once(vision: VisionPart, row_count: int) -> int:
    """Frames of `row_count` pre-fusion rows whose activations fit what one pass may hold; at least 1."""
    mlp = vision.prefusion[0].mlp
    head_count = mlp.hidden_size // vision.prefusion[0].self_attn.head_dim
    width = 3 * mlp.intermediate_size + 8 * mlp.hidden_size + 2 * head_count * row_count
    row_bytes = width * torch.finfo(vision.dtype).bits // 8
    return max(1, _ACTIVATION_BYTES[vision.device.type] // (row_bytes * row_count))


def to_device(vision: VisionPart, values: np.ndarray) -> Tensor:
    """Values in the memory and the precision of the model."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(vision.device, vision.dtype)
