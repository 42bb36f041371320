"""A cache for further questions about the same frames.

Pre-fusion and the LLM are causal. So keys and values of everything before the first different id of two prompts are
the same for both: the frames' rows and the shared text in pre-fusion, the shared text and the frames' tokens in the
LLM. They are kept. A further question computes only its own text; a further turn of a conversation also computes the
last answer. Results are those of the whole prompt, up to the order of sums (tests/test_shown_frames.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from storage.errors import UsageError
from workers.llm.engine import Context, SamplingParams, no_numbers
from workers.llm.model import LlavaMini, answer_embeds, embed_text, fuse_question, unmasked
from workers.llm.prompt import PLACEHOLDER_ID
from workers.vision.llava_mini import precise_attention
from workers.vision.prefusion import FusionInputs, Past, frames_and_text, in_pieces, prefuse


class ShownFrames:
    """T frames in order of time, with the keys and values of the last prompt."""

    def __init__(
        self,
        model: LlavaMini,
        tokens: np.ndarray,
        inputs: Callable[[], Iterable[FusionInputs]],
        most_bytes: int,
    ):
        """Takes frames; computes nothing yet.

        Args:
            tokens: (T, C*C, H), the stored vision tokens.
            inputs: gives the inputs of pre-fusion for the same frames, in any order; called for each prompt if
                pre-fusion's keys and values are not kept.
            most_bytes: pre-fusion's keys and values are kept if they take at most this; those of the LLM always.
        """
        self._model = model
        self._tokens = tokens
        self._inputs = inputs
        self._most_bytes = most_bytes
        self._ids: list[int] = []  # of the prompt whose keys and values are kept
        self._batches: list[list[Past]] = []  # pre-fusion's, for each batch of frames and block
        self._context: Context | None = None  # the LLM's

    @property
    def frame_count(self) -> int:
        """Number of frames, T."""
        return len(self._tokens)

    @property
    def size_bytes(self) -> int:
        """Memory of all keys and values."""
        parts = (part for batch in self._batches for past in batch for part in (past.keys, past.values))
        kept = self._context.size_bytes if self._context else 0
        return kept + sum(part.nbytes for part in parts if part is not None)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Context:
        """Reads a prompt (from `prompt_ids`) into the LLM; returns its context.

        Raises:
            VideoProblem: raised by `inputs`.
            UsageError: the fused text is NaN or infinity.
        """
        ids = list(ids)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids, strict=False))
        known = min(sum(1 for _ in same), len(ids) - 1)
        if known <= ids.index(PLACEHOLDER_ID):
            known = 0
        try:
            self._forget_from(known)
            fused = self._fuse(ids, known)
            if not fused.isfinite().all():
                raise no_numbers("the question, fused with its frames,", self._model.vision.dtype)
            context = self._context
            if context is not None:
                embeds = fused.to(self._model.vision.dtype)[None]  # (1, new, H)
            else:
                context = self._context = self._model.engine.context()
                embeds = answer_embeds(self._model, ids, fused, self._tokens)
            context.add(embeds)
        except BaseException:  # also Ctrl-C
            self._clear()
            raise
        self._ids = ids
        return context

    def reply(self, ids: Sequence[int], most_tokens: int, sampling: SamplingParams = SamplingParams()) -> Iterator[int]:
        """The ids of the answer to a prompt, without the end token; at most most_tokens.

        Raises:
            VideoProblem, UsageError: before the first id, as `read` and Context.reply.
        """
        context = self.read(ids)
        try:
            yield from context.reply(most_tokens, sampling)
        except UsageError:
            self._clear()
            raise

    # --- pre-fusion

    def _fuse(self, ids: Sequence[int], known: int) -> Tensor:
        """The text from place `known` on, fused with each frame and averaged: (L - known, H) float32."""
        if not self._batches and not self._fits(ids):
            return fuse_question(self._model, ids, self._inputs())[known:]
        if not self._batches:
            known_here = 0
            sums = [self._first(ids, piece) for piece in in_pieces(self._model.vision, self._inputs(), len(ids))]
        else:
            known_here = known
            sums = [self._more(ids, known, batch) for batch in self._batches]
        new = list(ids[known_here:])
        fused = embed_text(self._model, new).float()  # rows of masked ids stay unchanged
        fused[unmasked(new)] = torch.stack(sums).sum(dim=0) / self.frame_count
        return fused[known - known_here :]

    def _first(self, ids: Sequence[int], inputs: FusionInputs) -> Tensor:
        """The fused text summed over some frames, (U, H) float32; keeps their keys and values."""
        vision, text = self._model.vision, self._text(ids)
        sequence, positions = frames_and_text(vision, inputs, text)
        pasts = [Past() for _ in vision.prefusion]
        with precise_attention(vision):
            fused = prefuse(vision, sequence, positions, len(text), pasts)
        self._batches.append(pasts)
        return fused.float().sum(dim=0)

    def _more(self, ids: Sequence[int], known: int, pasts: Sequence[Past]) -> Tensor:
        """The fused text from place `known` on, summed over the frames of a batch: (U, H) float32."""
        vision = self._model.vision
        keys = pasts[0].keys
        assert keys is not None  # kept by _first
        text = self._text(ids[known:]).expand(len(keys), -1, -1)
        if not text.shape[1]:
            return text.float().sum(dim=0)
        before = vision.bundle.patches_per_frame + self._tokens.shape[1] + len(unmasked(ids[:known]))
        positions = before + torch.arange(text.shape[1], device=vision.device)[None]
        with precise_attention(vision):
            return prefuse(vision, text, positions, text.shape[1], pasts).float().sum(dim=0)

    def _text(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of the ids that are not masked: (U, H)."""
        return embed_text(self._model, [ids[place] for place in unmasked(ids)])

    def _fits(self, ids: Sequence[int]) -> bool:
        """Whether pre-fusion's keys and values may be kept; counts all patches, also those that are not stored."""
        vision = self._model.vision
        rows = vision.bundle.patches_per_frame + self._tokens.shape[1] + len(ids)
        return self.frame_count * rows * prefusion_row_bytes(self._model) <= self._most_bytes

    # --- removing

    def _clear(self) -> None:
        self._ids, self._batches, self._context = [], [], None

    def _forget_from(self, known: int) -> None:
        """Keeps only the keys and values of the first `known` ids."""
        if not known or self._context is None:
            self._batches, self._context = [], None
            return
        for batch in self._batches:
            for past in batch:
                past.crop(len(past) - len(unmasked(self._ids[known:])))
        self._context.keep(known - 1 + self._tokens.shape[0] * self._tokens.shape[1])


def prefusion_row_bytes(model: LlavaMini) -> int:
    """Memory of one row's keys and values in all blocks of pre-fusion."""
    weights = [block.self_attn.k_proj.weight for block in model.vision.prefusion]
    return sum(2 * weight.shape[0] * weight.element_size() for weight in weights)
