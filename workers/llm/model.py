"""LLaVA-Mini's LLM part: the prompt fused with frames, and the answer (the vision part: workers/vision/llava_mini.py).

Source: LLaVA-Mini (arXiv 2501.03895, section 4), released code at commit 47da113. Where they differ, the code is
followed, as its weights want it:
- the text part of pre-fusion is the whole prompt, system message and headers included;
- ids <= 0 (the image placeholder, and id 0 too) are padding there: attended by nobody, replaced by raw embeddings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from workers.llm.engine import Engine, EngineName, ModelOptions, SamplingParams, TransformersEngine
from workers.llm.model_options import Quantize
from workers.llm.prompt import PLACEHOLDER_ID, PromptTokenizer, load_tokenizer
from workers.llm.quantize import quantize_matrices
from workers.models.bundle import Bundle
from workers.models.checkpoint import list_tensors
from workers.models.load import fill
from workers.vision.llava_mini import (
    FusionInputs,
    VisionPart,
    frames_and_text,
    in_pieces,
    load_parts,
    precise_attention,
    prefuse,
    to_device,
)


@dataclass(frozen=True, repr=False)
class LlavaMini:
    """The whole model, loaded: the vision part, and the LLM that answers with what runs it."""

    vision: VisionPart
    embed_tokens: nn.Embedding
    engine: Engine
    tokenizer: PromptTokenizer

    @property
    def llm(self) -> LlamaForCausalLM:
        """The LLM itself, which transformers' engine alone can show."""
        return self._transformers_engine.llm

    @property
    def _transformers_engine(self) -> TransformersEngine:
        assert isinstance(self.engine, TransformersEngine)
        return self.engine

    def __repr__(self) -> str:
        return f"LlavaMini({self.vision!r})"


def load_model(bundle: Bundle, options: ModelOptions = ModelOptions(), kept_bytes: int = 0) -> LlavaMini:
    """The whole model.

    Args:
        bundle: where it lies.
        options: how it is held.
        kept_bytes: of keys and values that vLLM may keep beyond those of one whole context.
    Raises:
        UsageError: a key is missing, extra or misshapen, the tokenizer cannot be used, or the engine cannot run it.
    """
    tokenizer = load_tokenizer(bundle)
    vision, llm = load_parts(bundle, options.device, options.dtype)
    tensors = list_tensors(bundle.directory)
    if options.engine == EngineName.VLLM:
        from workers.llm.vllm_engine import VllmEngine  # with vLLM

        fill(tensors, {"model.embed_tokens.": llm.model.embed_tokens}, vision.device, vision.dtype)
        running = VllmEngine(bundle, tensors, llm.config, vision.device, vision.dtype, kept_bytes)
        return LlavaMini(vision, llm.model.embed_tokens, running, tokenizer)
    whole = {"": llm}
    if options.quantize is not None:
        whole = {"model.embed_tokens.": llm.model.embed_tokens, "model.norm.": llm.model.norm, "lm_head.": llm.lm_head}
        if llm.config.tie_word_embeddings:
            del whole["lm_head."]
        for number, block in enumerate(llm.model.layers):  # block by block, so that one alone is ever there in full
            fill(tensors, {f"model.layers.{number}.": block}, torch.device("cpu"), vision.dtype)
            quantize_matrices(block, Quantize(options.quantize), vision.device, vision.dtype)
    fill(tensors, whole, vision.device, vision.dtype)
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.model.embed_tokens.weight
    llm.model.rotary_emb = vision.rotary
    return LlavaMini(vision, llm.model.embed_tokens, TransformersEngine(llm, bundle.config.eos_ids), tokenizer)


def fuse_question(model: LlavaMini, ids: Sequence[int], batches: Iterable[FusionInputs]) -> Tensor:
    """A prompt's text features, fused with each frame and averaged over all of them.

    Memory is bounded by the batches: the mean is a running float32 sum, as in the released code.

    Args:
        ids: from `prompt_ids`.
        batches: frames in any order, a few hundred at a time.
    Returns:
        (L, H) float32; the row of the placeholder is there and means nothing.
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
    """Places of what attends and is attended to: ids above 0 (released code)."""
    return [place for place, token in enumerate(ids) if token > 0]


def embed_text(model: LlavaMini, ids: Sequence[int]) -> Tensor:
    """The LLM's embeddings of ids, those below 0 as id 0: (L, H)."""
    return model.embed_tokens(torch.tensor(ids, dtype=torch.long, device=model.vision.device).clamp(min=0))


@torch.inference_mode()
def answer_embeds(model: LlavaMini, ids: Sequence[int], fused: Tensor, frame_tokens: np.ndarray) -> Tensor:
    """What enters the LLM: fused text, the frames' vision tokens in place of the placeholder, fused text.

    Args:
        fused: (L, H), from `fuse_question`.
        frame_tokens: (T, C*C, H), the stored vision tokens in the order of time.
    Returns:
        (1, L - 1 + T*C*C, H).
    """
    place = list(ids).index(PLACEHOLDER_ID)
    tokens = to_device(model.vision, frame_tokens).flatten(0, 1)  # (T * C*C, H)
    fused = fused.to(model.vision.dtype)
    return torch.cat([fused[:place], tokens, fused[place + 1 :]])[None]


def generate(model: LlavaMini, embeds: Tensor, max_new_tokens: int) -> Iterator[int]:
    """Greedy decoding, id by id, up to an end token (not yielded) or max_new_tokens."""
    context = model.engine.context()
    context.add(embeds)
    yield from context.reply(max_new_tokens, SamplingParams())


def greedy_logits(model: LlavaMini, embeds: Tensor) -> Iterator[Tensor]:
    """The logits, (V,), of one step after another, each step continuing with the best token; endless.

    The engine has to be transformers'.
    """
    context = model._transformers_engine.context()
    context.add(embeds)
    while context.logits is not None:
        yield context.logits
        context.say(int(context.logits.argmax()))
