"""Muon: gradient steps for matrices with all their singular values made equal (Jordan et al., 2024).

torch.optim.Muon orthogonalises in bfloat16, which a CPU without it computes 30 times slower than float32; this one does
it in float32, matrices of one shape together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled so that AdamW's learning rates fit (0.2 * sqrt(longer side))."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                moments = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "moment" not in state:
                        state["moment"] = torch.zeros_like(parameter)
                    state["moment"].lerp_(parameter.grad, 1 - group["momentum"])
                    moments.append(parameter.grad.lerp(state["moment"], group["momentum"]))  # Nesterov's
                updates = orthogonal(torch.stack(moments))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """(K, R, C) matrices with singular values near 1, by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    values = matrices.mT if tall else matrices
    values = values / (values.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_STEPS):
        square = values @ values.mT
        values = first * values + (second * square + third * square @ square) @ values
    return values.mT if tall else values
