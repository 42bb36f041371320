"""An engine that runs the LLM with vLLM (arXiv 2309.06180), for a GPU that answers many questions.

vLLM keeps keys and values in pages that all contexts share, and finds the first rows of a context there by their
content. It runs in this process and gets rows of embeddings; the vision part and pre-fusion are computed without it.
"""

import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from storage.errors import ClusterError, UsageError
from storage.files import to_uri, write_bytes
from workers.cache_folder import cache_folder
from workers.llm.engine import MADE_BY_LLM, EngineName, SamplingParams, no_numbers
from workers.models.bundle import Bundle
from workers.models.checkpoint import TensorEntry
from workers.models.load import tensor_values

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm import SamplingParams as VllmSampling

LOAD_FORMAT = "vidx"  # vLLM's name for the loader that is registered here
LLM_KEYS = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
# Memory besides weights and pages: the activations of pre-fusion (llava_mini.py), which vLLM uses after it, and 1 GiB
# for vLLM's compiled graphs and further allocations.
_WORKING_BYTES = {"cpu": 1 << 30, "cuda": 5 << 30}
_SPARE_ROWS = 256  # two pages: a context's last page may be nearly empty, and vLLM never uses one page
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",  # no usage statistics are sent
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


class VllmEngine:
    """vLLM with a bundle's LLM.

    vLLM is called in a thread of its own, so that Ctrl-C cannot interrupt a step. An interrupted step leaves pages that
    vLLM takes for computed.

    Attributes:
        most_rows: the most rows of a context, with its answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        tensors: Mapping[str, TensorEntry],
        settings: LlamaConfig,
        device: torch.device,
        dtype: torch.dtype,
        kept_bytes: int,
    ):
        """Loads the LLM.

        Args:
            tensors: of the bundle, checked before.
            kept_bytes: memory for keys and values in addition to that for one full context, for further questions.
        Raises:
            UsageError: vLLM cannot run this model here, or there is too little memory.
        """
        self.eos_ids = bundle.config.eos_ids
        self._dtype = dtype
        self._numbers = itertools.count()
        self._failed: Exception | None = None
        self._thread = ThreadPoolExecutor(1, "vllm", torch.set_num_threads, (torch.get_num_threads(),))
        self._thread.submit(int).result()  # starts the thread before vLLM replaces torch.set_num_threads
        tensors = {name: entry for name, entry in tensors.items() if name.startswith(LLM_KEYS)}
        weight_bytes = sum(math.prod(entry.shape) for entry in tensors.values()) * dtype.itemsize
        key_heads, head_dim = settings.num_key_value_heads, settings.head_dim
        assert key_heads is not None  # LlamaConfig sets both
        assert head_dim is not None
        row_bytes = 2 * settings.num_hidden_layers * key_heads * head_dim * dtype.itemsize
        wanted = row_bytes * (bundle.context_length + _SPARE_ROWS) + kept_bytes
        with _starting(bundle.name, device):
            free, total = free_memory(device)
            page_bytes = min(wanted, free - weight_bytes - _WORKING_BYTES[device.type])
            self.most_rows = min(bundle.context_length, page_bytes // row_bytes - _SPARE_ROWS)
            if self.most_rows < min(bundle.context_length, _SPARE_ROWS):
                raise UsageError(
                    f"--engine {EngineName.VLLM}: the weights of {bundle.name} and what is computed with them leave no "
                    f"memory on {device} for keys and values; --engine {EngineName.TRANSFORMERS} takes --quantize"
                )
            _register_loader(tensors)
            directory = _describe(bundle, settings)
            share = (weight_bytes + page_bytes) / total
            self._llm = _start(directory, device, dtype, self.most_rows, page_bytes, share)
            trial = torch.zeros(1, settings.hidden_size, dtype=dtype)  # some sizes fail only in the first step
            list(self.reply(trial, 1, SamplingParams()))

    def context(self) -> "VllmContext":
        return VllmContext(self)

    def reply(self, rows: Tensor, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The ids of the answer to rows, (S, H), as Context.reply.

        vLLM does not give logits. If they are NaN or infinity, so is the likelihood of the chosen id.
        """
        from vllm import SamplingParams as VllmSampling
        from vllm.sampling_params import RequestOutputKind

        params = VllmSampling(
            temperature=sampling.temperature,
            seed=sampling.seed,
            max_tokens=most_tokens,
            stop_token_ids=list(self.eos_ids),
            logprobs=0,  # of the chosen id alone
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        number, ended, token_count = str(next(self._numbers)), False, 0
        try:
            self._do(self._ask, number, rows, params)
            while not ended:
                tokens, likelihood, ended = self._do(self._step, number)
                if tokens and not token_count and not math.isfinite(likelihood):
                    raise no_numbers(MADE_BY_LLM, self._dtype)
                token_count += len(tokens)
                for token in tokens:
                    if token in self.eos_ids:
                        return
                    yield token
        finally:
            if self._failed is None:
                self._do(self._llm.abort_request, [number])

    def _do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes a call in the thread, and waits for its result; after a failure no further call is made.

        Raises:
            ClusterError: this call or an earlier one failed.
        """
        return self._thread.submit(self._guarded, call, *arguments).result()

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._failed is None:
            try:
                return call(*arguments)
            except Exception as error:  # any class: from an allocation, a kernel or a driver
                self._failed = error
        raise ClusterError(
            f"--engine {EngineName.VLLM}: vLLM failed: {_in_a_line(self._failed)}; start again, with fewer frames "
            f"if the memory was too small, or use --engine {EngineName.TRANSFORMERS}"
        ) from self._failed

    def _ask(self, number: str, rows: Tensor, params: "VllmSampling") -> None:
        self._llm.add_request(number, self._llm.renderer.render_cmpl([{"prompt_embeds": rows}])[0], params)

    def _step(self, number: str) -> tuple[list[int], float, bool]:
        """New ids of a request, the logarithm of the likelihood of all its ids, and whether it has ended."""
        outputs = [output for output in self._llm.step() if output.request_id == number]
        tokens = [token for output in outputs for token in output.outputs[0].token_ids]
        likelihood = outputs[-1].outputs[0].cumulative_logprob if tokens else 0.0
        return tokens, likelihood, any(output.finished for output in outputs)


class VllmContext:
    """A Context that holds rows on the CPU; vLLM keeps their keys and values."""

    def __init__(self, engine: VllmEngine):
        self._engine = engine
        self._rows: Tensor | None = None  # (S, H)

    @property
    def row_count(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @property
    def size_bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def add(self, embeds: Tensor) -> None:
        new = embeds[0].cpu()
        self._rows = new if self._rows is None else torch.cat([self._rows, new])

    def keep(self, row_count: int) -> None:
        assert self._rows is not None
        self._rows = self._rows[:row_count]

    def reply(self, most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        assert self._rows is not None
        yield from self._engine.reply(self._rows, most_tokens, sampling)


def _start(
    directory: Path, device: torch.device, dtype: torch.dtype, most_rows: int, page_bytes: int, memory_share: float
) -> "LLMEngine":
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(directory),
            load_format=LOAD_FORMAT,
            skip_tokenizer_init=True,
            enable_prompt_embeds=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=most_rows,
            max_num_seqs=1,
            kv_cache_memory_bytes=page_bytes,
            gpu_memory_utilization=memory_share,
            enforce_eager=device.type == "cpu",  # compilation takes minutes on a CPU
            disable_log_stats=True,
        )
    )


def _describe(bundle: Bundle, settings: LlamaConfig) -> Path:
    """A directory with the LLM's config.json; always the same one, because vLLM finds compiled code by its path."""
    directory = cache_folder() / "vllm" / bundle.model_id
    directory.mkdir(parents=True, exist_ok=True)
    described = LlamaConfig(
        **settings.to_dict() | {"architectures": ["LlamaForCausalLM"], "eos_token_id": list(bundle.config.eos_ids)}
    )
    write_bytes(to_uri(str(directory / "config.json")), described.to_json_string().encode())
    return directory


def _register_loader(tensors: Mapping[str, TensorEntry]) -> None:
    """Makes vLLM load these tensors; it does not know the published layout."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(tensor_values(tensors))

    register_model_loader(LOAD_FORMAT)(Loader)


@contextmanager
def _starting(name: str, device: torch.device) -> Iterator[None]:
    """Sets vLLM up to run quietly, in this process and on this device; turns its errors into UsageError."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the loader is registered only in this process
    if device.type == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else vLLM uses one thread
    logging.getLogger("vllm").setLevel(logging.ERROR)  # before vLLM reads the variables
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated names in torch
        try:
            from vllm.platforms import current_platform

            if current_platform.device_type != device.type:
                raise UsageError(
                    f"--engine {EngineName.VLLM}: the installed vLLM computes on "
                    f"{current_platform.device_type or 'another device'}, not on {device.type}; use --device, or "
                    f"--engine {EngineName.TRANSFORMERS}"
                )
            if device.index:
                raise UsageError(
                    f"--engine {EngineName.VLLM}: vLLM uses the first GPU, not {device}; make {device} the first with "
                    f"CUDA_VISIBLE_DEVICES={device.index}"
                )
            yield
        except UsageError:
            raise
        except Exception as error:  # any class: from a model's sizes, a kernel or a driver
            reason = _in_a_line(error.__cause__ or error if isinstance(error, ClusterError) else error)
            raise UsageError(
                f"--engine {EngineName.VLLM}: vLLM cannot run {name} here: {reason}; --engine "
                f"{EngineName.TRANSFORMERS} can"
            ) from error


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    import psutil  # comes with vLLM

    memory = psutil.virtual_memory()
    return memory.available, memory.total
