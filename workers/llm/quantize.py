"""Quantizes the LLM's matrices to 8 or 4 bits with bitsandbytes: half or a quarter of the memory, less precision.

LLM.int8 (arXiv 2208.07339) and NF4 (QLoRA, arXiv 2305.14314). The vision part and pre-fusion are not quantized.
"""

import logging

import torch
from torch import nn

from workers.llm.model_options import Quantize

OUTLIER = 6.0  # larger activations are multiplied in full precision (LLM.int8, section 3.2)


def quantize_matrices(block: nn.Module, way: Quantize, device: torch.device, dtype: torch.dtype) -> None:
    """Quantizes the matrices of a block on the CPU, and moves the block to a device."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs optional packages and every cast
    import bitsandbytes

    for name, linear in [(name, each) for name, each in block.named_modules() if type(each) is nn.Linear]:
        sizes, biased = (linear.in_features, linear.out_features), linear.bias is not None
        small: nn.Linear
        if way is Quantize.EIGHT:
            small = bitsandbytes.nn.Linear8bitLt(*sizes, bias=biased, has_fp16_weights=False, threshold=OUTLIER)
            small.weight = bitsandbytes.nn.Int8Params(linear.weight, requires_grad=False, has_fp16_weights=False)
        else:
            small = bitsandbytes.nn.Linear4bit(*sizes, bias=biased, compute_dtype=dtype, quant_type="nf4")
            small.weight = bitsandbytes.nn.Params4bit(linear.weight, requires_grad=False, quant_type="nf4")
        if biased:
            small.bias = linear.bias
        block.set_submodule(name, small)
    block.to(device)
