"""Frames that a model is shown: what was computed of them for one prompt serves the next one too.

Pre-fusion and the LLM are causal and read the frames first, so all that comes before the first different id of two
prompts is the same for both: each frame's rows and the shared text in pre-fusion, and in the LLM the shared text and
the frames' tokens. Their keys and values are kept; a further question pays for its own words, and a further turn of a
conversation for the last answer and its own. What comes out is what the whole prompt would give, up to the order of
sums (tests/test_frame_cache.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from storage.errors import UsageError
from workers.llm.engine import Context, SamplingParams, no_numbers
from workers.llm.model import LlavaMini, answer_embeds, embed_text, fuse_question, unmasked
from workers.llm.prompt import PLACEHOLDER_ID
from workers.vision.llava_mini import FusionInputs, Past, frames_and_text, in_pieces, precise_attention, prefuse


class ShownFrames:
    """T frames in the order of time, and the prompt that was read with them last."""

    def __init__(
        self,
        model: LlavaMini,
        tokens: np.ndarray,
        inputs: Callable[[], Iterable[FusionInputs]],
        most_bytes: int,
    ):
        """Frames; nothing is computed yet.

        Args:
            model: the whole model.
            tokens: (T, C*C, H), the stored vision tokens.
            inputs: what pre-fusion reads of the same frames, in any order; called again where its keys and values are
                not kept.
            most_bytes: keys and values of pre-fusion are kept up to this; those of the LLM always.
        """
        self._model = model
        self._tokens = tokens
        self._inputs = inputs
        self._most_bytes = most_bytes
        self._ids: list[int] = []  # what is in both caches
        self._batches: list[list[Past]] = []  # for each batch of frames, by block
        self._context: Context | None = None  # of the LLM

    @property
    def frame_count(self) -> int:
        """T."""
        return len(self._tokens)

    @property
    def size_bytes(self) -> int:
        """What is kept."""
        parts = (part for batch in self._batches for past in batch for part in (past.keys, past.values))
        kept = self._context.size_bytes if self._context else 0
        return kept + sum(part.numel() * part.element_size() for part in parts if part is not None)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Context:
        """The LLM's context after a prompt (from `prompt_ids`).

        Raises:
            VideoProblem: the inputs raised it; the next prompt starts anew.
            UsageError: the fused text is no number.
        """
        ids = list(ids)
        known = min(_common(self._ids, ids), len(ids) - 1)
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
        except BaseException:  # as Ctrl-C: what is half done is of no use
            self._begin_anew()
            raise
        self._ids = ids
        return context

    def reply(self, ids: Sequence[int], most_tokens: int, sampling: SamplingParams = SamplingParams()) -> Iterator[int]:
        """The answer to a prompt, id by id, up to an end token (not yielded) or so many.

        Raises:
            VideoProblem, UsageError: before the first id, as `read` and Context.reply.
        """
        context = self.read(ids)
        try:
            yield from context.reply(most_tokens, sampling)
        except UsageError:
            self._begin_anew()
            raise

    # --- pre-fusion

    def _fuse(self, ids: Sequence[int], known: int) -> Tensor:
        """(L - known, H) float32: the text from place `known` on, fused with each frame, and the mean."""
        if not self._batches and not self._fits(ids):
            return fuse_question(self._model, ids, self._inputs())[known:]
        if not self._batches:
            known_here = 0
            sums = [self._first(ids, piece) for piece in in_pieces(self._model.vision, self._inputs(), len(ids))]
        else:
            known_here = known
            sums = [self._more(ids, known, batch) for batch in self._batches]
        new = list(ids[known_here:])
        fused = embed_text(self._model, new).float()  # what is masked stays as it is
        fused[unmasked(new)] = torch.stack(sums).sum(dim=0) / self.frame_count
        return fused[known - known_here :]

    def _first(self, ids: Sequence[int], inputs: FusionInputs) -> Tensor:
        """(U, H) float32, summed over some frames, whose keys and values are kept from now on."""
        vision, text = self._model.vision, self._text(ids)
        sequence, positions = frames_and_text(vision, inputs, text)
        pasts = [Past() for _ in vision.prefusion]
        with precise_attention(vision):
            fused = prefuse(vision, sequence, positions, len(text), pasts)
        self._batches.append(pasts)
        return fused.float().sum(dim=0)

    def _more(self, ids: Sequence[int], known: int, pasts: Sequence[Past]) -> Tensor:
        """(U, H) float32 of the text from place `known` on, summed over the frames of a batch."""
        vision = self._model.vision
        keys = pasts[0].keys
        assert keys is not None  # of the rows before
        text = self._text(ids[known:]).expand(len(keys), -1, -1)
        if not text.shape[1]:
            return text.float().sum(dim=0)
        before = vision.bundle.patches_per_frame + self._tokens.shape[1] + len(unmasked(ids[:known]))
        positions = before + torch.arange(text.shape[1], device=vision.device)[None]
        with precise_attention(vision):
            return prefuse(vision, text, positions, text.shape[1], pasts).float().sum(dim=0)

    def _text(self, ids: Sequence[int]) -> Tensor:
        """(U, H): the embeddings of the ids that frames are fused with."""
        return embed_text(self._model, [ids[place] for place in unmasked(ids)])

    def _fits(self, ids: Sequence[int]) -> bool:
        """Whether pre-fusion's keys and values may be kept; reckoned with all patches, of which few may be stored."""
        vision = self._model.vision
        rows = vision.bundle.patches_per_frame + self._tokens.shape[1] + len(ids)
        return self.frame_count * rows * prefusion_row_bytes(self._model) <= self._most_bytes

    # --- forgetting

    def _begin_anew(self) -> None:
        self._ids, self._batches, self._context = [], [], None

    def _forget_from(self, known: int) -> None:
        """Keeps what belongs to the first so many ids."""
        if not known or self._context is None:
            self._batches, self._context = [], None
            return
        for batch in self._batches:
            for past in batch:
                past.crop(len(past) - len(unmasked(self._ids[known:])))
        self._context.keep(known - 1 + self._tokens.shape[0] * self._tokens.shape[1])


def prefusion_row_bytes(model: LlavaMini) -> int:
    """Keys and values of one row in all blocks of pre-fusion."""
    weights = [block.self_attn.k_proj.weight for block in model.vision.prefusion]
    return sum(2 * weight.shape[0] * weight.element_size() for weight in weights)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
