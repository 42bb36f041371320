"""Encoding frames as one batch, pruned, against one frame at a time as the published code does it.

Usage: python ops/bench/encode.py [MODEL]

The yardstick runs the same weights through transformers' own layers and torch's attention module, frame by frame, every
row of pre-fusion computed, with a prompt of 100 tokens behind the frame, since the published code knows no other way.
"""

import os
import sys

import numpy as np
import torch
from harness import ROOT, figure, in_turn, save
from torch import Tensor
from torch.nn import functional

from ops.published import encode_pixels
from workers.models.bundle import find_bundle
from workers.vision.encode import frame_features, frame_pixels, vision_tokens
from workers.vision.llava_mini import VisionPart, arrange_patches, load_vision

FRAMES = 64
PROMPT_TOKENS = 100
SMALL = ROOT / "tests" / "reference" / "llava-mini-tiny" / "checkpoint"


@torch.inference_mode()
def as_published(vision: VisionPart, pixels: np.ndarray, text: Tensor) -> Tensor:
    """Vision tokens, (T, C*C, H), one frame per pass."""
    return torch.cat([_one_frame(vision, frame_pixels(vision, frame[None]), text) for frame in pixels])


def _one_frame(vision: VisionPart, frame: Tensor, text: Tensor) -> Tensor:
    model = vision.tower.vision_model
    hidden = model.pre_layrnorm(model.embeddings(frame.flatten(0, 1)))
    states = [hidden]
    for layer in model.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
        states.append(hidden)
    features = states[vision.bundle.config.select_layer][None, :, 1:]  # (1, P, N, D)
    grid, patches = arrange_patches(features, vision.bundle.config.resolution_ratio)
    compressed = _compress(vision, grid)
    sequence = torch.cat([vision.projector(patches), vision.projector(compressed), text[None]], dim=1)
    rotary = vision.rotary(sequence, torch.arange(sequence.shape[1])[None])
    mask = torch.full((sequence.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    for block in vision.prefusion:
        sequence = block(sequence, attention_mask=mask, position_embeddings=rotary)
    first = patches.shape[1]
    return sequence[:, first : first + compressed.shape[1]]


def _compress(vision: VisionPart, patches: Tensor) -> Tensor:
    module = vision.compressor.module
    count, side = len(module.query), round(patches.shape[1] ** 0.5)
    source = round(count**0.5)
    grid = module.pos_embed.T.unflatten(1, (source, source))[None]
    if source != side:
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    values = module.ln_kv(patches).transpose(0, 1)  # (N, 1, D)
    keys = values + grid.flatten(2).permute(2, 0, 1)  # (N, 1, D)
    queries = (module.ln_q(module.query) + module.pos_embed)[:, None]  # (C*C, 1, D)
    return module.attn(queries, keys, values)[0].transpose(0, 1)  # (1, C*C, D)


def main() -> None:
    """Checks that both give the same tokens, times them and writes results/encode.json."""
    name = sys.argv[1] if len(sys.argv) > 1 else str(SMALL)
    vision = load_vision(find_bundle(name), "cpu", "float32")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (FRAMES, 336, 336, 3), dtype=np.uint8)
    text = torch.randn(PROMPT_TOKENS, vision.bundle.config.hidden_size, generator=torch.Generator().manual_seed(0))
    difference = np.abs(encode_pixels(vision, pixels, 0).token - as_published(vision, pixels, text).numpy()).max()
    if difference > 1e-2:  # float16 storage
        raise RuntimeError(f"the two differ by {difference}")
    timed = in_turn(lambda: encode_pixels(vision, pixels, 0), lambda: as_published(vision, pixels, text), runs=9)
    what = f"encode {FRAMES} frames in one batch, resizing included, llava-mini-tiny, {os.cpu_count()} cores"
    value = f"{1 / timed['ratio']:.1f}x ({FRAMES / timed['seconds']:.0f} frames/s)"
    figures = [figure(what, "one frame at a time, as published", value, "≥ 5x", **timed)]
    inputs = frame_pixels(vision, pixels)
    with torch.inference_mode():
        timed = in_turn(
            lambda: vision_tokens(vision, frame_features(vision, inputs)),
            lambda: [_one_frame(vision, inputs[i : i + 1], text) for i in range(FRAMES)],
            runs=9,
        )
    what = "the same without resizing"
    value = f"{1 / timed['ratio']:.1f}x ({FRAMES / timed['seconds']:.0f} frames/s)"
    figures.append(figure(what, "one frame at a time, as published", value, "≥ 5x", **timed))
    save("encode", figures)


if __name__ == "__main__":
    main()
