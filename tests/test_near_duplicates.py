"""Runs tile a part, and hold frames that look alike; their means say about where the frames' keys lie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.vectors.near_duplicates import ALIKE, LONGEST, run_means, run_starts


def turned(*degrees):
    """Keys in a plane."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("keys", "starts"),
    [
        (turned(0), [0]),
        (turned(*[0] * LONGEST), [0]),
        (turned(*[0] * (2 * LONGEST + 1)), [0, LONGEST, 2 * LONGEST]),
        (turned(0, 90, 0, 90), [0, 1, 2, 3]),
        (turned(0, 10, 90, 95, 0), [0, 2, 4]),
        (turned(0, 10, 20, 30), [0, 2]),  # each is like its neighbour; the third is not like the first
        (turned(*range(0, 0)), []),
    ],
)
def test_a_run_ends_where_a_frame_looks_unlike_its_first(keys, starts):
    assert run_starts(keys).tolist() == starts


@given(st.lists(st.integers(0, 359), max_size=120))
def test_runs_tile_a_part_and_each_is_alike_and_as_long_as_may_be(degrees):
    keys = turned(*degrees)
    starts = run_starts(keys).tolist()
    ends = [*starts, len(keys)][1:]
    assert [row for start, end in zip(starts, ends, strict=True) for row in range(start, end)] == [*range(len(keys))]
    for start, end in zip(starts, ends, strict=True):
        assert (keys[start + 1 : end] @ keys[start] >= ALIKE).all()
        assert end - start <= LONGEST
        assert end == len(keys) or end - start == LONGEST or keys[end] @ keys[start] < ALIKE


def test_the_mean_of_a_run_scores_as_its_frames_do_on_average():
    keys = turned(0, 5, 10, 90, 95)
    means, query = run_means(keys, run_starts(keys)), turned(30)[0]
    assert np.allclose(means @ query, [(keys[:3] @ query).mean(), (keys[3:] @ query).mean()], atol=1e-6)
