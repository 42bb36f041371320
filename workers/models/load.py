"""Loading: builds modules without memory, checks them against a checkpoint, and fills them tensor by tensor.

Modules are built on torch's meta device, so a 17 GB model takes its memory once. Every tensor is copied out of the
mapped file, because matrix kernels round differently at another alignment.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import nn

from storage.errors import UsageError
from workers.models.checkpoint import TensorEntry

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that --device names; `auto` is the GPU if there is one.

    Raises:
        UsageError: the name is unknown, or torch finds no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown; allowed are auto, cpu, cuda and cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no GPU here; use --device cpu")
    return device


def sum_exactly() -> None:
    """Makes a GPU sum half-precision products, and multiply float32, in float32; torch's defaults are less precise."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def use_cores(count: int) -> None:
    """Makes torch compute on `count` cores; in a Ray worker it would use one."""
    torch.set_num_threads(count)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that --dtype names; `auto` is float32 on a CPU and float16 on a GPU.

    The published model runs in float16, whose results are 7 to 10 times closer to float32 than those of bfloat16.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: unknown; allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_empty(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, for inference, with shapes but without memory."""
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def check_tensors(
    directory: Path, tensors: Mapping[str, TensorEntry], modules: Mapping[str, nn.Module], unused: Sequence[str]
) -> None:
    """Checks that a checkpoint has exactly the tensors of some modules.

    Args:
        modules: key prefix -> module.
        unused: patterns of keys that may be there and are not read.
    Raises:
        UsageError: a key is missing, extra, or of another shape; the message names it.
    """
    wanted = {
        f"{prefix}{key}": tuple(value.shape) for prefix, module in modules.items() for key, value in _state(module)
    }
    for name, shape in wanted.items():
        if name not in tensors:
            raise UsageError(f"{directory}: {name} of shape {shape} is missing; config.json and weights must agree")
        if tensors[name].shape != shape:
            raise UsageError(f"{directory}: {name} has shape {tensors[name].shape}, config.json asks for {shape}")
        if tensors[name].dtype not in ("F64", "F32", "F16", "BF16"):
            raise UsageError(f"{directory}: {name} is {tensors[name].dtype}; only floating-point weights can be loaded")
    for name, entry in tensors.items():
        if name not in wanted and not any(re.fullmatch(pattern, name) for pattern in unused):
            raise UsageError(
                f"{directory}: {name} of shape {entry.shape} is one key too many; config.json and weights must agree"
            )


def fill(
    tensors: Mapping[str, TensorEntry], modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype
) -> None:
    """Copies weights into modules (key prefix -> module) that were checked, one tensor at a time."""
    places = {f"{prefix}{key}": (module, key) for prefix, module in modules.items() for key, _ in _state(module)}
    for name, value in tensor_values({name: tensors[name] for name in places}):
        module, key = places[name]
        value = value.to(device=device, dtype=dtype, copy=True)
        module.load_state_dict({key: value}, strict=False, assign=True)


def tensor_values(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values, file by file; a value is a view of a mapped file and valid until the next one."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in tensors.items():
        by_file.setdefault(entry.path, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def _state(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's weights by key; a weight that two keys share (a tied output layer) is listed under the first."""
    seen: set[int] = set()
    state = []
    for key, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state.append((key, value))
    return state
