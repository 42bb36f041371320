"""Engines: what runs the LLM over rows of embeddings, transformers' (here) or vLLM's (vllm_engine.py).

An engine gives contexts. A context holds the rows that one prompt has given to the LLM; rows may be taken off its end
and others added, and an answer may follow, which leaves no rows.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

from storage.errors import UsageError
from workers.llm.memory import rows_at_once
from workers.llm.model_options import EngineName as EngineName
from workers.llm.model_options import ModelOptions as ModelOptions
from workers.llm.model_options import SamplingParams as SamplingParams

MADE_BY_LLM = "what the LLM makes of the question and its frames"


def no_numbers(what: str, dtype: torch.dtype) -> UsageError:
    """The error for NaN or infinity, which would be read as an answer of exclamation marks."""
    name = str(dtype).removeprefix("torch.")
    better = "" if dtype is torch.float32 else "--dtype float32, which holds larger ones, or "
    return UsageError(
        f"{what} has values that are no numbers (NaN or infinity, computed in {name}), so there is no answer; try "
        f"{better}--fuse tokens, which reads less of each frame, or other frames"
    )


class Context(Protocol):
    """The rows that one prompt has given to the LLM, and the answer to them."""

    @property
    def row_count(self) -> int:
        """S."""

    @property
    def size_bytes(self) -> int:
        """What is kept of them, outside of what the engine holds in any case."""

    def add(self, embeds: Tensor) -> None:
        """Some more rows, (1, S, H)."""

    def keep(self, row_count: int) -> None:
        """Forgets all but the first so many rows; others have to be added before an answer."""

    def reply(self, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The answer to the rows, id by id, up to an end token (not yielded) or so many.

        Its own rows are forgotten; before another answer, rows have to be added.

        Raises:
            UsageError: before the first id: what follows the rows is no number, and no further answer can be had.
        """


class Engine(Protocol):
    """What runs the LLM."""

    @property
    def most_rows(self) -> int | None:
        """There is memory for so many in a context, answer included; None where it is not reserved."""

    def context(self) -> Context:
        """One without rows."""


class TransformersEngine:
    """transformers' own LLM."""

    most_rows = None

    def __init__(self, llm: LlamaForCausalLM, eos_ids: tuple[int, ...]):
        """An engine for answers that end with one of some ids."""
        self.llm = llm
        self._eos_ids = eos_ids

    def context(self) -> "TransformersContext":
        """One without rows."""
        return TransformersContext(self.llm, self._eos_ids)


class TransformersContext:
    """Rows, as the LLM's keys and values.

    Attributes:
        logits: (V,), of what follows the rows; None where there are none, and after `keep`.
    """

    def __init__(self, llm: LlamaForCausalLM, eos_ids: tuple[int, ...]):
        self.logits: Tensor | None = None
        self._llm = llm
        self._eos_ids = eos_ids
        self._cache = DynamicCache(config=llm.config)

    @property
    def _layers(self) -> list[CacheLayerMixin]:
        return [layer for layer in self._cache.layers if isinstance(layer, CacheLayerMixin)]  # as all of Llama's are

    @property
    def row_count(self) -> int:
        """S."""
        return self._cache.get_seq_length()

    @property
    def size_bytes(self) -> int:
        """Of keys and values."""
        parts = [part for layer in self._layers for part in (layer.keys, layer.values) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    @torch.inference_mode()
    def add(self, embeds: Tensor) -> None:
        """Some more rows, (1, S, H)."""
        rows = self.row_count + embeds.shape[1]
        for piece in embeds.split(rows_at_once(rows), dim=1):
            output = self._llm(inputs_embeds=piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.logits = output.logits[0, -1]

    def keep(self, row_count: int) -> None:
        """Forgets all but the first so many rows; others have to be added before an answer."""
        self.logits = None
        for layer in self._layers:  # Cache.crop means one thing in one version and another in the next
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, :row_count], layer.values[:, :, :row_count]

    def reply(self, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The answer to the rows, id by id, up to an end token (not yielded) or so many."""
        assert self.logits is not None
        if not self.logits.max().isfinite():  # also where one of them is NaN
            raise no_numbers(MADE_BY_LLM, self.logits.dtype)
        rows, choose = self.row_count, _chooser(sampling, self.logits.device)
        try:
            for count in range(1, most_tokens + 1):
                token = choose(self.logits)
                if token in self._eos_ids:
                    return
                yield token
                if count < most_tokens:
                    self.say(token)
        finally:
            self.keep(rows)

    @torch.inference_mode()
    def say(self, token: int) -> None:
        """One more row, that of an id."""
        self.add(self._llm.model.embed_tokens(torch.tensor([[token]], device=self._llm.device)))


def _chooser(sampling: SamplingParams, device: torch.device) -> Callable[[Tensor], int]:
    if sampling.temperature <= 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        shares = torch.softmax(logits.float() / sampling.temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=generator))

    return draw
