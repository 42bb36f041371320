"""How a model that answers is held, checked before torch is imported, which takes seconds."""

import importlib.util
import os
from dataclasses import dataclass
from enum import StrEnum

from storage.errors import UsageError

# Devices of which one is there where torch may find a GPU: NVIDIA's, the same under WSL, and AMD's.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


class EngineName(StrEnum):
    """What runs the LLM."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Quantize(StrEnum):
    """How the LLM's matrices are kept."""

    EIGHT = "8bit"
    FOUR = "4bit"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest one; above that the greater, the more freely it is drawn.
        seed: of the draws; the same gives the same answer on one machine.
    """

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ModelOptions:
    """How a model that answers is held.

    Attributes:
        device, dtype: as workers.models.load.choose_device and choose_dtype take them.
        quantize: how the LLM's matrices are kept, "8bit" or "4bit"; None for as dtype says.
        engine: what runs the LLM, "transformers" or "vllm".
    Raises:
        UsageError: there is no such way, or two of them exclude each other.
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
                f"--quantize {self.quantize} is for --engine {EngineName.TRANSFORMERS}; leave one of them out"
            )

    @property
    def reserves_memory(self) -> bool:
        """Its engine takes memory for contexts once, when it is loaded, and its `most_rows` says for how long ones."""
        return self.engine == EngineName.VLLM

    def check_installed(self) -> None:
        """To be called where the model is loaded, which may be another machine.

        Raises:
            UsageError: what it needs is not installed here, or there is no GPU.
        """
        check_device(self.device)
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(
                f"--quantize {self.quantize}: needs bitsandbytes; install it with pip install 'vidx[quantize]'"
            )
        if self.engine == EngineName.VLLM and importlib.util.find_spec("vllm") is None:
            raise UsageError(f"--engine {self.engine}: needs vLLM; install it with pip install 'vidx[vllm]'")


def check_device(name: str) -> None:
    """Refuses a GPU where there is surely none; what torch can use of one that is there, it says itself.

    Raises:
        UsageError: no GPU.
    """
    if name.startswith("cuda") and not any(map(os.path.exists, _GPU_DEVICES)):
        raise UsageError(f"--device {name}: there is no GPU on this machine; use --device cpu")
