"""LLaVA-Mini's LLM part: fuses the prompt with frames, and answers (the vision part: workers/vision/llava_mini.py).

Source: LLaVA-Mini (arXiv 2501.03895, section 4), released code at commit 47da113. Where they differ, we follow the
code, which belongs to the weights:
- The text part of pre-fusion is the whole prompt, with system message and headers.
- Ids <= 0 (the image placeholder, and id 0) are padding there: no row attends to them, and their rows keep the
  embeddings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from workers.llm.engine import Engine, EngineName, ModelOptions, TransformersEngine
from workers.llm.model_options import Quantize
from workers.llm.prompt import PLACEHOLDER_ID, PromptTokenizer, load_tokenizer
from workers.llm.quantize import quantize_matrices
from workers.models.bundle import Bundle
from workers.models.checkpoint import list_tensors
from workers.models.load import fill
from workers.vision.llava_mini import VisionPart, load_parts, precise_attention, to_device
from workers.vision.prefusion import FusionInputs, frames_and_text, in_pieces, prefuse


@dataclass(frozen=True, repr=False)
class LlavaMini:
    """The whole model, loaded: the vision part, and the LLM with the engine that runs it."""

    vision: VisionPart
    embed_tokens: nn.Embedding
    engine: Engine
    tokenizer: PromptTokenizer

    @property
    def llm(self) -> LlamaForCausalLM:
        """The LLM's module; only with transformers as the engine."""
        assert isinstance(self.engine, TransformersEngine)
        return self.engine.llm

    def __repr__(self) -> str:
        return f"LlavaMini({self.vision!r})"


def load_model(bundle: Bundle, options: ModelOptions = ModelOptions(), kept_bytes: int = 0) -> LlavaMini:
    """Loads the whole model.

    Args:
        options: device, precision and engine.
        kept_bytes: memory for keys and values that vLLM gets in addition to that for one full context.
    Raises:
        UsageError: a key is missing, extra, or of another shape, the tokenizer cannot be used, or the engine cannot
            run the model.
    """
    tokenizer = load_tokenizer(bundle)
    vision, llm = load_parts(bundle, options.device, options.dtype)
    tensors = list_tensors(bundle.directory)
    if options.engine == EngineName.VLLM:
        from workers.llm.vllm_engine import VllmEngine  # not at the top: vLLM is an extra

        fill(tensors, {"model.embed_tokens.": llm.model.embed_tokens}, vision.device, vision.dtype)
        running = VllmEngine(bundle, tensors, llm.config, vision.device, vision.dtype, kept_bytes)
        return LlavaMini(vision, llm.model.embed_tokens, running, tokenizer)
    whole = {"": llm}
    if options.quantize is not None:
        whole = {"model.embed_tokens.": llm.model.embed_tokens, "model.norm.": llm.model.norm, "lm_head.": llm.lm_head}
        if llm.config.tie_word_embeddings:
            del whole["lm_head."]
        for number, block in enumerate(llm.model.layers):  # only one block at a time is in full precision
            fill(tensors, {f"model.layers.{number}.": block}, torch.device("cpu"), vision.dtype)
            quantize_matrices(block, Quantize(options.quantize), vision.device, vision.dtype)
    fill(tensors, whole, vision.device, vision.dtype)
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.model.embed_tokens.weight
    llm.model.rotary_emb = vision.rotary
    return LlavaMini(vision, llm.model.embed_tokens, TransformersEngine(llm, bundle.config.eos_ids), tokenizer)


def fuse_question(model: LlavaMini, ids: Sequence[int], batches: Iterable[FusionInputs]) -> Tensor:
    """A prompt's text features, fused with each frame and averaged over the frames.

    The mean is a running float32 sum, as in the released code, so memory depends only on the size of the batches.

    Args:
        ids: from `prompt_ids`.
        batches: frames in any order, a few hundred at a time.
    Returns:
        (L, H) float32; the row of the placeholder has no meaning.
    Raises:
        ValueError: there are no frames.
    """
    total = torch.zeros(len(ids), model.vision.bundle.config.hidden_size, device=model.vision.device)
    frame_count = 0
    for piece in in_pieces(model.vision, batches, len(ids)):
        total += fuse_frames(model, ids, piece).sum(dim=0)
        frame_count += len(piece.compressed)
    if not frame_count:
        raise ValueError("fuse_question needs at least one frame")
    return total / frame_count


@torch.inference_mode()
def fuse_frames(model: LlavaMini, ids: Sequence[int], inputs: FusionInputs) -> Tensor:
    """A prompt's text features fused with each frame: (T, L, H) float32."""
    raw = embed_text(model, ids)  # (L, H)
    places = unmasked(ids)
    sequence, positions = frames_and_text(model.vision, inputs, raw[places])
    fused = raw.float().repeat(len(inputs.compressed), 1, 1)  # (T, L, H)
    with precise_attention(model.vision):
        fused[:, places] = prefuse(model.vision, sequence, positions, len(places)).float()
    return fused


def unmasked(ids: Sequence[int]) -> list[int]:
    """Places of the ids above 0; the others are masked (released code)."""
    return [place for place, token in enumerate(ids) if token > 0]


def embed_text(model: LlavaMini, ids: Sequence[int]) -> Tensor:
    """The LLM's embeddings of ids, (L, H); ids below 0 get the embedding of id 0."""
    return model.embed_tokens(torch.tensor(ids, dtype=torch.long, device=model.vision.device).clamp(min=0))


@torch.inference_mode()
def answer_embeds(model: LlavaMini, ids: Sequence[int], fused: Tensor, frame_tokens: np.ndarray) -> Tensor:
    """The LLM's input: the fused text, with the frames' vision tokens in place of the placeholder.

    Args:
        ids: from `prompt_ids`.
        fused: (L, H), from `fuse_question`.
        frame_tokens: (T, C*C, H), the stored vision tokens in order of time.
    Returns:
        (1, L - 1 + T*C*C, H).
    """
    place = list(ids).index(PLACEHOLDER_ID)
    tokens = to_device(model.vision, frame_tokens).flatten(0, 1)  # (T * C*C, H)
    fused = fused.to(model.vision.dtype)
    return torch.cat([fused[:place], tokens, fused[place + 1 :]])[None]
