"""Settings: defaults, presets, files and the command line, and what is refused."""

from fractions import Fraction

import pytest

from pipeline.index.config import IndexConfig, load_config, preset_names
from storage.errors import UsageError


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("batch = 8\nfps = 0.5\n")
    config = load_config(str(file), {"batch": 4, "workers": None})
    assert (config.batch, config.fps, config.workers) == (4, Fraction(1, 2), None)
    assert config.max_pixels == IndexConfig().max_pixels == 100_000_000


def test_every_preset_loads():
    assert preset_names() == ["cluster", "embedded", "one_gpu"]
    assert load_config("embedded", {}).device == "cpu"
    assert load_config("one_gpu", {}).device == "cuda"
    assert load_config("cluster", {}).address == "auto"


@pytest.mark.parametrize("text", ["1", "0.1", "30000/1001", "29.97"])
def test_frame_rates_are_exact(text):
    assert load_config(None, {"fps": text}).fps == Fraction(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fps": "0"}, "--fps: must be above 0"),
        ({"fps": "1e99999999"}, "--fps: must be a number or a ratio"),
        ({"fps": "fast"}, "--fps: must be a number or a ratio"),
        ({"batch": 0}, "--batch: must be at least 1, not 0"),
        ({"batch": 5000}, "--batch: must be at most 4096, not 5000"),
        ({"batch": 1.5}, "--batch: must be a whole number, not 1.5"),
        ({"patches": -1}, "--patches: must be at least 0, not -1"),
        ({"max_pixels": 0}, "--max-pixels: must be at least 1, not 0"),
        ({"sample": "all"}, "--sample: must be 'rate', 'keyframes' or 'scenes', not 'all'"),
        ({"timeout_seconds": 0}, "--timeout-seconds: must be above 0, not 0"),
        ({"model": 1}, "--model: must be a text, not 1"),
        ({"device": "tpu"}, "--device: must be 'auto', 'cpu' or 'cuda', not 'tpu'"),
    ],
)
def test_values_out_of_range_are_refused_naming_the_option(options, says):
    with pytest.raises(UsageError) as error:
        load_config(None, options)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bach = 8\n", "bach: there is no such setting; the settings are model, tower, sample, fps"),
        ("batch = \n", "not TOML"),
        ("batch = 0\n", "my.toml: batch: must be at least 1, not 0"),
    ],
)
def test_a_wrong_file_is_refused_naming_it(tmp_path, text, says):
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_config(str(file), {})
    assert says in str(error.value)


def test_a_missing_file_is_refused_naming_the_presets():
    with pytest.raises(UsageError, match="--config nowhere: cannot be read; give a TOML file or one of cluster"):
        load_config("nowhere", {})
