"""The patch tier keeps the patches that VisionZip would, each with its place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.vision.clip_vision import TowerFeatures
from workers.vision.encode import grid_places
from workers.vision.visionzip import keep_patches, select


def brute_force(hidden, attention, metric, dominant, contextual):
    """VisionZip for one picture, one row at a time, as the README of the reference describes it."""
    order = sorted(range(len(attention)), key=lambda i: -attention[i])
    kept = sorted([0] + [i + 1 for i in order[: dominant - 1]])
    remaining = [i for i in range(len(hidden)) if i not in kept]
    step = max(1, len(remaining) // contextual)
    targets = remaining[::step][:contextual]
    joined = {target: [] for target in targets}
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    for i in remaining:
        if i not in joined:
            joined[max(targets, key=lambda target, i=i: unit[i] @ unit[target])].append(i)
    merged = [hidden[t] + (hidden[js].mean(axis=0) if js else 0) for t, js in joined.items()]
    return np.stack([*hidden[kept], *merged]), kept + targets


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
def test_selection_equals_a_loop_over_rows(seed, dominant, contextual):
    source = np.random.default_rng(seed)
    hidden = source.normal(size=(2, 17, 6))
    attention, metric = source.random((2, 16)), source.normal(size=(2, 17, 4))
    selection = select(*map(torch.from_numpy, (hidden, attention, metric)), dominant, contextual)
    for i in range(2):
        rows, places = brute_force(hidden[i], attention[i], metric[i], dominant, contextual)
        np.testing.assert_allclose(selection.rows[i], rows, atol=1e-9)
        assert [*selection.kept[i].tolist(), *selection.remaining[i, selection.targets].tolist()] == places


def test_rows_of_half_precision_are_summed_beyond_its_range():
    source = np.random.default_rng(1)
    hidden = source.uniform(20_000, 60_000, (2, 65, 6)).astype(np.float16)
    attention, metric = source.random((2, 64)), source.normal(size=(2, 65, 4))
    given = (torch.from_numpy(hidden), torch.from_numpy(attention).float(), torch.from_numpy(metric).float())
    selection = select(*given, 8, 4)
    for i in range(2):
        rows, _ = brute_force(hidden[i].astype(np.float64), attention[i], metric[i], 8, 4)
        assert rows.max() > 65504
        np.testing.assert_allclose(selection.rows[i], rows, rtol=1e-6)


def features(seed: int, patch_count: int = 16) -> TowerFeatures:
    source = torch.Generator().manual_seed(seed)
    return TowerFeatures(
        hidden=torch.randn(3, 1 + patch_count, 8, generator=source),
        class_query=torch.randn(3, 2, 1, 4, generator=source),
        keys=torch.randn(3, 2, 1 + patch_count, 4, generator=source),
        search_key=torch.zeros(3, 0),
    )


@given(st.integers(1, 16))
def test_any_number_of_rows_is_kept_in_order_of_place(row_count):
    rows, places = keep_patches(features(row_count), row_count)
    assert rows.shape == (3, row_count, 8)
    assert (places.diff(dim=1) > 0).all()
    assert places.min() >= 0
    assert places.max() < 16


def test_keeping_all_patches_keeps_them_as_they_are():
    tower = features(0)
    rows, places = keep_patches(tower, 16)
    torch.testing.assert_close(rows, tower.hidden[:, 1:], rtol=0, atol=0)
    assert places.tolist() == [list(range(16))] * 3


def test_more_rows_than_there_are_is_refused():
    with pytest.raises(ValueError, match="cannot keep"):
        keep_patches(features(0), 17)


def test_places_in_the_grid_of_blocks():
    # 2 x 2 blocks of 2 x 2 patches make a grid of 4 x 4; the whole picture's 4 patches follow it
    places = torch.arange(4)
    assert [grid_places(places, picture, 2, 2).tolist() for picture in range(5)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
        [16, 17, 18, 19],
    ]
    assert grid_places(places, 0, 1, 2).tolist() == [0, 1, 2, 3]
