"""Pre-fusion: the Llama blocks that see a frame's patches and the text before the LLM does.

Source: LLaVA-Mini (arXiv 2501.03895, section 4.2), released code at commit 47da113.

The same numbers are computed with less work:
- Masked text is left out of the sequence. Positions are those without it, so a causal mask is enough.
- The last block computes only the rows that are used.
- Pre-fusion is causal and reads vision first. So a frame's vision token does not depend on the question, and is
  computed once, when a video is indexed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, repeat_kv

from storage.records import PatchRows
from workers.vision.llava_mini import VisionPart, frames_at_once, to_device


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
