"""VisionZip: the few patch rows that represent a picture.

Source: VisionZip (arXiv 2412.04467, section 3), released code at commit 3151f6d. Dominant rows are those to which the
class token attends most in the tower's layer -2. The others are merged into contextual rows by the similarity of that
layer's keys. The paper averages a contextual group; the code adds the mean of the others to the target. We follow the
code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workers.vision.clip_vision import TowerFeatures

PROPORTION = (54, 10)  # dominant to contextual rows in the paper's setting of 64 tokens


@dataclass(frozen=True, repr=False)
class Selection:
    """The rows that VisionZip keeps of B pictures; index 0 is the class token, patches count from 1.

    Attributes:
        all_indices: (B, X), class token first, then patches by descending attention.
        kept: (B, X), the same in ascending order.
        remaining: (B, R), the other patches in ascending order.
        targets: (Y,), places in `remaining` of the patches that become contextual rows.
        assignment: (B, R - Y), for each other remaining patch the target (0..Y) that it joins.
        counts: (B, Y) float32, patches that joined each target, at least 1; divisor of their sum.
        rows: (B, X + Y, D) float32, dominant rows in ascending order, then contextual rows.
    """

    all_indices: Tensor
    kept: Tensor
    remaining: Tensor
    targets: Tensor
    assignment: Tensor
    counts: Tensor
    rows: Tensor

    def __repr__(self) -> str:
        return f"Selection(rows={tuple(self.rows.shape)})"


def class_attention(features: TowerFeatures) -> Tensor:
    """The class token's attention in the selected layer, (B, heads, 1 + N)."""
    logits = features.class_query.float() @ features.keys.float().mT  # (B, heads, 1, 1 + N)
    return logits.softmax(dim=-1)[:, :, 0]


def key_metric(features: TowerFeatures) -> Tensor:
    """The selected layer's keys, averaged over heads: (B, 1 + N, D / heads)."""
    return features.keys.float().mean(dim=1)


def select(hidden: Tensor, attention: Tensor, metric: Tensor, dominant: int, contextual: int) -> Selection:
    """The dominant and contextual rows of a batch of pictures.

    Args:
        hidden: (B, 1 + N, D), class token first, in any precision; sums are computed in float32 at least.
        attention: (B, N), the class token's attention to each patch, summed over heads.
        metric: (B, 1 + N, M), vectors by which rows are compared.
        dominant: X, rows that are kept unchanged, including the class token.
        contextual: Y, rows into which the others are merged.
    Raises:
        ValueError: the picture has fewer rows.
    """
    batch, row_count, _ = hidden.shape
    if dominant < 1 or contextual < 0 or dominant + contextual > row_count:
        raise ValueError(f"cannot keep {dominant} + {contextual} of {row_count} rows (with the class token)")
    best = attention.topk(dominant - 1, dim=1).indices + 1  # (B, X - 1)
    all_indices = torch.cat([best.new_zeros(batch, 1), best], dim=1)  # (B, X)
    kept = all_indices.sort(dim=1).values
    is_kept = torch.zeros(batch, row_count, dtype=torch.bool, device=hidden.device).scatter_(1, kept, True)
    remaining = is_kept.int().sort(dim=1, stable=True).indices[:, : row_count - dominant]  # (B, R)

    step = max(1, remaining.shape[1] // contextual) if contextual else 1
    targets = torch.arange(0, remaining.shape[1], step, device=hidden.device)[:contextual]  # (Y,)
    is_target = torch.zeros(remaining.shape[1], dtype=torch.bool, device=hidden.device)
    is_target[targets] = True
    others = remaining[:, ~is_target]  # (B, R - Y)
    target_rows = remaining[:, targets]  # (B, Y)
    others = others if contextual else others[:, :0]  # without targets they are dropped
    metric = functional.normalize(metric, dim=-1)
    similarity = _rows(metric, others) @ _rows(metric, target_rows).mT  # (B, R - Y, Y)
    assignment = similarity.argmax(dim=2) if contextual else others
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # a sum of hundreds may overflow float16
    joined = functional.one_hot(assignment, max(1, contextual))[:, :, :contextual].to(hidden.dtype)  # (B, R - Y, Y)
    counts = joined.sum(dim=1).clamp(min=1)  # (B, Y)
    sums = joined.mT @ _rows(hidden, others)  # (B, Y, D)
    contextual_rows = _rows(hidden, target_rows) + sums / counts[..., None]
    rows = torch.cat([_rows(hidden, kept), contextual_rows], dim=1)  # (B, X + Y, D)
    return Selection(all_indices, kept, remaining, targets, assignment, counts, rows)


def keep_patches(features: TowerFeatures, row_count: int) -> tuple[Tensor, Tensor]:
    """`row_count` patch rows per picture in VisionZip's proportion, without the class token, in order of place.

    Returns:
        (B, row_count, D) rows and (B, row_count) int64 places in the picture's grid; a contextual row has the place
        of its target.
    Raises:
        ValueError: a picture has fewer patches.
    """
    dominant = -(-row_count * PROPORTION[0] // sum(PROPORTION))  # rounded up, so a single row is dominant
    return keep_rows(features, dominant, row_count - dominant)


def keep_rows(features: TowerFeatures, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """As keep_patches, for given numbers of dominant and contextual rows."""
    attention = class_attention(features)[:, :, 1:].sum(dim=1)  # (B, N)
    selection = select(features.hidden, attention, key_metric(features), dominant + 1, contextual)
    places = torch.cat([selection.kept, selection.remaining[:, selection.targets]], dim=1)[:, 1:] - 1
    places, order = places.sort(dim=1)  # (B, dominant + contextual)
    return _rows(selection.rows[:, 1:], order), places


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each picture by index: (B, S, D) and (B, K) -> (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
