"""Pictures reach the tower as in the published code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ops.published import picture_parts, published_sample, resize_nearest
from storage.errors import UsageError
from workers.decode.picture import nearest_index
from workers.models.preprocess import (
    frame_parts,
    read_settings,
    split_blocks,
)

REFERENCE = Path(__file__).parent / "reference"
TOWER = REFERENCE / "llava-mini-tiny" / "checkpoint" / "vision_tower"


def test_every_published_index_map_is_met():
    maps = load_file(REFERENCE / "preprocess" / "nearest_336.safetensors")
    assert len(maps) == 26
    for name, wanted in maps.items():
        np.testing.assert_array_equal(nearest_index(int(name.removeprefix("size_"))), wanted)


@given(st.integers(1, 20_000))
def test_an_index_map_only_ascends_and_stays_inside(size):
    index = nearest_index(size)
    assert index[0] == 0
    assert (np.diff(index) >= 0).all()
    assert index[-1] < size
    assert index[-1] >= size * 335 // 336 - 1


def test_resize_takes_whole_pixels_and_ignores_the_aspect_ratio():
    picture = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 3)
    resized = resize_nearest(picture)
    assert resized.shape == (1, 336, 336, 3)
    np.testing.assert_array_equal(resized[0, ::84, ::84, 0], picture[0][[0, 0, 1, 1]][:, [0, 1, 2, 3], 0])


def test_high_resolution_blocks_come_row_by_row_and_the_whole_picture_last():
    pixels = np.zeros((1, 336, 336, 3), np.uint8)
    for number, (row, column) in enumerate([(0, 0), (0, 168), (168, 0), (168, 168)]):
        pixels[0, row : row + 168, column : column + 168] = number * 10
    parts = frame_parts(pixels, 2, read_settings(TOWER))
    assert parts.shape == (1, 5, 56, 56, 3)
    assert [int(part[28, 5, 0]) for part in parts[0, :4]] == [0, 10, 20, 30]
    assert int(parts[0, 4, 50, 50, 0]) == 30


@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4))
def test_blocks_put_together_are_the_picture(height, width, ratio):
    picture = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    blocks = split_blocks(picture, ratio)[0]
    rows = [np.concatenate(blocks[r * ratio : (r + 1) * ratio], axis=1) for r in range(ratio)]
    together = np.concatenate(rows)
    np.testing.assert_array_equal(together, picture[0, : together.shape[0], : together.shape[1]])


def test_a_padded_still_picture_gets_the_mean_colour_above_and_below():
    picture = np.full((20, 60, 3), 200, np.uint8)
    padded = picture_parts(picture, 1, pad=True, settings=read_settings(TOWER))[0, 0]
    assert padded[0, 28].tolist() == [122, 116, 104]
    assert padded[28, 28].tolist() == [200, 200, 200]
    assert picture_parts(picture, 1, pad=False, settings=read_settings(TOWER)).min() == 200


def test_the_published_sampling_tables_are_met():
    tables = json.loads((REFERENCE / "preprocess" / "sampling.json").read_text(encoding="utf-8"))
    for entry in tables["load_video"]:
        assert published_sample(entry["total_frames"], entry["fps"]) == entry.get("indices", [])


def test_processor_settings_that_cannot_be_followed_are_refused(tmp_path):
    settings = json.loads((TOWER / "preprocessor_config.json").read_text(encoding="utf-8"))
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(tmp_path)
    for change, message in (
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"image_mean": [0.5]}, "missing or malformed"),
        ({"crop_size": 99}, "larger than size"),
    ):
        path.write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            read_settings(tmp_path)
    path.write_text(json.dumps(settings | {"size": 56, "crop_size": 56}), encoding="utf-8")  # the older spelling
    assert read_settings(tmp_path) == read_settings(TOWER)


def test_preprocessing_does_not_load_torch():
    code = "import sys, workers.models.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
