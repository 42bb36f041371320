"""Options of a model that answers; they are checked before torch is imported, which takes seconds."""

import importlib.util
import os
from dataclasses import dataclass
from enum import StrEnum

from storage.errors import UsageError

# Device files of GPUs: NVIDIA's, NVIDIA's under WSL, AMD's.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class EngineName(StrEnum):
    """The library that runs the LLM."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Quantize(StrEnum):
    """Precision of the LLM's matrices."""

    EIGHT = "8bit"
    FOUR = "4bit"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; higher values draw more freely.
        seed: of the draws; the same seed gives the same answer on the same machine.
    """

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ModelOptions:
    """Device, precision and engine of a model that answers.

    Attributes:
        device, dtype: as in workers.models.load.choose_device and choose_dtype.
        quantize: precision of the LLM's matrices, "8bit" or "4bit"; None: that of dtype.
        engine: the library that runs the LLM, "transformers" or "vllm".
    Raises:
        UsageError: a value is unknown, or two options exclude each other.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    engine: str = EngineName.TRANSFORMERS

    def __post_init__(self):
        for name, value, allowed in (("quantize", self.quantize, Quantize), ("engine", self.engine, EngineName)):
            if value is not None and value not in set(allowed):
                raise UsageError(f"--{name} {value}: unknown; allowed are {', '.join(allowed)}")
        if self.engine == EngineName.VLLM and self.quantize is not None:
            raise UsageError(
                f"--quantize {self.quantize} is for --engine {EngineName.TRANSFORMERS}; leave out one of the options"
            )

    @property
    def reserves_memory(self) -> bool:
        """Whether the engine reserves memory for contexts when it is loaded; its `most_rows` is then their limit."""
        return self.engine == EngineName.VLLM

    def check_installed(self) -> None:
        """Checks that this machine, which will load the model, has the needed packages and GPU.

        Raises:
            UsageError: a package is not installed, or there is no GPU.
        """
        check_device(self.device)
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(
                f"--quantize {self.quantize}: needs bitsandbytes; install it with pip install 'vidx[quantize]'"
            )
        if self.engine == EngineName.VLLM and importlib.util.find_spec("vllm") is None:
            raise UsageError(f"--engine {self.engine}: needs vLLM; install it with pip install 'vidx[vllm]'")


def check_device(name: str) -> None:
    """Checks that there is a GPU if --device names one, without importing torch.

    Raises:
        UsageError: there is no GPU.
    """
    if name.startswith("cuda") and not any(map(os.path.exists, _GPU_DEVICES)):
        raise UsageError(f"--device {name}: there is no GPU on this machine; use --device cpu")
