"""Engines run the LLM over rows of embeddings: with transformers (here) or with vLLM (vllm_engine.py).

An engine makes contexts. A context holds the rows of one prompt. Rows can be added at its end or removed from it, and
the LLM's answer to the rows can be read, which does not change the rows.
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
    """The error for NaN or infinity, which would otherwise give an answer of exclamation marks."""
    name = str(dtype).removeprefix("torch.")
    better = "" if dtype is torch.float32 else "--dtype float32, which has a larger range, or "
    return UsageError(
        f"{what} has values that are no numbers (NaN or infinity, computed in {name}), so there is no answer; try "
        f"{better}--fuse tokens, which reads less of each frame, or other frames"
    )


class Context(Protocol):
    """The rows of one prompt in the LLM, and the answer to them."""

    @property
    def row_count(self) -> int:
        """Number of rows, S."""

    @property
    def size_bytes(self) -> int:
        """Memory of the rows, without what the engine has reserved."""

    def add(self, embeds: Tensor) -> None:
        """Adds rows, (1, S, H)."""

    def keep(self, row_count: int) -> None:
        """Removes all but the first `row_count` rows; rows must be added before the next answer."""

    def reply(self, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The ids of the LLM's answer, without the end token; at most most_tokens.

        The context has the same rows afterwards; rows must be added before the next answer.

        Raises:
            UsageError: before the first id, if the LLM's result is NaN or infinity; the context cannot be used again.
        """


class Engine(Protocol):
    """Runs the LLM."""

    @property
    def most_rows(self) -> int | None:
        """The most rows of a context, with its answer; None if no memory is reserved for contexts."""

    def context(self) -> Context:
        """A context without rows."""


class TransformersEngine:
    """Runs the LLM with transformers."""

    most_rows = None

    def __init__(self, llm: LlamaForCausalLM, eos_ids: tuple[int, ...]):
        self.llm = llm
        self._eos_ids = eos_ids

    def context(self) -> "TransformersContext":
        return TransformersContext(self.llm, self._eos_ids)


class TransformersContext:
    """A Context that holds the LLM's keys and values.

    Attributes:
        logits: (V,), of the token after the rows; None if there are no rows, and after `keep`.
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
        return self._cache.get_seq_length()

    @property
    def size_bytes(self) -> int:
        parts = (part for layer in self._layers for part in (layer.keys, layer.values))
        return sum(part.nbytes for part in parts if part is not None)

    @torch.inference_mode()
    def add(self, embeds: Tensor) -> None:
        rows = self.row_count + embeds.shape[1]
        for piece in embeds.split(rows_at_once(rows), dim=1):
            output = self._llm(inputs_embeds=piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.logits = output.logits[0, -1]

    def keep(self, row_count: int) -> None:
        self.logits = None
        for layer in self._layers:  # not Cache.crop, whose meaning depends on the version of transformers
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, :row_count], layer.values[:, :, :row_count]

    def reply(self, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        assert self.logits is not None
        if not self.logits.max().isfinite():  # max is NaN if any value is
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
        """Adds the row of a token."""
        self.add(self._llm.model.embed_tokens(torch.tensor([[token]], device=self._llm.device)))


def _chooser(sampling: SamplingParams, device: torch.device) -> Callable[[Tensor], int]:
    if sampling.temperature <= 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        shares = torch.softmax(logits.float() / sampling.temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=generator))

    return draw
