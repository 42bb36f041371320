"""A model is found by name, directory or hub id, known by one id, and refused by name where it does not fit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.index.config import IndexConfig
from storage.errors import UsageError
from workers.llm.engine import ModelOptions
from workers.llm.model import load_model
from workers.models.bundle import find_bundle, list_bundles, read_bundle
from workers.vision.llava_mini import load_vision

REFERENCE = Path(__file__).parent / "reference"
TINY = REFERENCE / "llava-mini-tiny" / "checkpoint"
HIGH_RESOLUTION = REFERENCE / "llava-mini-tiny-c2-hd" / "checkpoint"


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change_weights(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


def shard(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (directory / "model.safetensors").unlink()


def test_a_bundle_says_what_its_files_say():
    bundle = find_bundle(str(HIGH_RESOLUTION))
    assert (bundle.config.compressor_size, bundle.config.resolution_ratio) == (2, 2)
    assert (bundle.tokens_per_frame, bundle.patches_per_picture, bundle.patches_per_frame) == (4, 16, 80)
    assert bundle.context_length == 131072
    assert bundle.config.eos_ids == (503, 505, 508)
    assert bundle.default_patch_rows == 1
    assert bundle.has_search_key
    assert not bundle.has_text_search  # a text tower, but no tokenizer
    assert not find_bundle(str(TINY)).has_search_key
    assert bundle.card.licence == "unknown"
    assert bundle.card.search_floor is None


def test_the_default_model_is_built_in_and_can_be_searched_by_text():
    bundle = find_bundle(IndexConfig().model)
    assert bundle.card.licence == "Apache-2.0"
    assert bundle.has_text_search
    assert bundle.name in [found.name for found in list_bundles()]


CARD = {
    "licence": "MIT",
    "knows": "drawn shapes",
    "does_not_know": "photographs",
    "trained": "for a day",
    "accuracy": {"exact": {"colour": 98, "count": 71.5}, "tokens": {"colour": 60}},
    "unknown_answers": {"I do not know that": "the question is outside", "Nothing.": "the footage is outside"},
    "search_floor": 0,
    "takes_history": False,
    "most_frames": 8,
}


def test_a_card_says_what_config_json_says(checkpoint):
    change_config(checkpoint, vidx=CARD)
    card = read_bundle("x", checkpoint).card
    assert asdict(card) == CARD
    assert card.states_limits
    assert read_bundle("x", checkpoint).model_id == find_bundle(str(TINY)).model_id  # a card changes no number
    change_config(checkpoint, vidx={"licence": "MIT"})
    plain = read_bundle("x", checkpoint).card
    assert (plain.trained, plain.accuracy, plain.unknown_answers) == (plain.knows, {}, {})
    assert plain.takes_history  # as the published weights do
    assert plain.most_frames is None
    assert not plain.states_limits


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("I do not know that", "the question is outside"),
        ("  i do NOT know that. \n", "the question is outside"),
        ("nothing", "the footage is outside"),
        ("I do not know that ball", None),
        ("I do not know that..", None),
        ("", None),
    ],
)
def test_an_answer_that_says_that_the_model_does_not_know_has_its_reason(checkpoint, answer, why):
    change_config(checkpoint, vidx=CARD)
    assert read_bundle("x", checkpoint).card.why_unknown(answer) == why


def test_finding_a_model_does_not_load_torch():
    code = (
        "import sys; from workers.models.bundle import find_bundle;"
        "import workers.llm.prompt, workers.vision.clip_text;"
        "find_bundle('nano').model_id; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_id_does_not_hang_on_place_or_sharding(checkpoint):
    before = read_bundle("x", checkpoint).model_id
    assert before == find_bundle(str(TINY)).model_id
    assert len(before) == 16
    shard(checkpoint)
    assert read_bundle("x", checkpoint).model_id == before
    vision = load_vision(read_bundle("x", checkpoint), "cpu", "float32")
    np.testing.assert_array_equal(
        vision.projector[0].weight, load_file(TINY / "model.safetensors")["model.mm_projector.0.weight"]
    )


def test_the_id_changes_with_a_weight_and_with_a_setting_that_changes_numbers(checkpoint):
    ids = {read_bundle("x", checkpoint).model_id}
    change_weights(checkpoint, lambda weights: weights["model.norm.weight"].__setitem__(0, 2.0))
    ids.add(read_bundle("x", checkpoint).model_id)
    change_config(checkpoint, mm_vision_select_layer=-1)
    ids.add(read_bundle("x", checkpoint).model_id)
    change_config(checkpoint, rope_theta=10000.0)
    ids.add(read_bundle("x", checkpoint).model_id)
    change_config(checkpoint / "vision_tower", hidden_act="gelu")
    ids.add(read_bundle("x", checkpoint).model_id)
    assert len(ids) == 5
    change_config(checkpoint, transformers_version="5.0.0")
    assert read_bundle("x", checkpoint).model_id in ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.prefusion_layers.1.mlp.up_proj.weight"), r"up_proj.weight of shape \(160, 64\) is mis"),
        (lambda w: w.update(new=np.zeros((2, 3), np.float32)), r"new of shape \(2, 3\) is one key too many"),
        (
            lambda w: w.update({"model.compressor.query": np.zeros((4, 64), np.float32)}),
            r"compressor.query has shape \(4, 64\), config.json asks for \(1, 64\)",
        ),
        (
            lambda w: w.update({"lm_head.weight": np.zeros((512, 64), np.int32)}),
            "lm_head.weight is I32; only floating-point",
        ),
    ],
)
def test_a_missing_extra_or_misshapen_key_is_named(checkpoint, change, message):
    change_weights(checkpoint, change)
    with pytest.raises(UsageError, match=message):
        load_vision(read_bundle("x", checkpoint), "cpu", "float32")


def test_a_tower_that_does_not_fit_is_named(checkpoint):
    change_weights(checkpoint / "vision_tower", lambda w: w.pop("vision_model.post_layernorm.bias"))
    with pytest.raises(UsageError, match=r"vision_model.post_layernorm.bias of shape \(64,\) is missing"):
        load_vision(read_bundle("x", checkpoint), "cpu", "float32")


def test_the_second_copy_of_the_tower_is_not_read_by_design(checkpoint):
    tower = load_file(checkpoint / "vision_tower" / "model.safetensors")
    copy = {f"model.vision_tower.vision_tower.{name}": value * 2 for name, value in tower.items()}
    change_weights(checkpoint, lambda weights: weights.update(copy))
    vision = load_vision(read_bundle("x", checkpoint), "cpu", "float32")
    name = "vision_model.post_layernorm.weight"
    np.testing.assert_array_equal(vision.tower.state_dict()[name], tower[name])


def test_tied_output_weights_need_no_key(checkpoint):
    change_config(checkpoint, tie_word_embeddings=True)
    change_weights(checkpoint, lambda weights: weights.pop("lm_head.weight"))
    model = load_model(read_bundle("x", checkpoint), ModelOptions("cpu", "float32"))
    assert model.llm.lm_head.weight.data_ptr() == model.llm.model.embed_tokens.weight.data_ptr()


def test_pickled_weights_are_refused_with_the_way_to_convert_them(checkpoint):
    (checkpoint / "vision_tower" / "model.safetensors").rename(checkpoint / "vision_tower" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="weights_only=True") as error:
        read_bundle("x", checkpoint)
    assert "\n" not in str(error.value)


def test_broken_files_are_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", whole[:1000], whole[:-1], b"\xff" * 100):
        weights.write_bytes(broken)
        with pytest.raises(UsageError, match=r"model.safetensors: .*no safetensors"):
            load_vision(read_bundle("x", checkpoint), "cpu", "float32")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "must be the name of a .safetensors file"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
    ],
)
def test_an_index_cannot_lead_elsewhere(checkpoint, weight_map, message):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        _ = read_bundle("x", checkpoint).model_id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava"}, "only llava_mini_llama can be loaded"),
        ({"compressor_size": 0}, "compressor_size is 0"),
        ({"mm_vision_tower": "nowhere"}, "mm_vision_tower nowhere: no such directory"),
        ({"mm_vision_select_layer": 3}, "mm_vision_select_layer is 3; it must be negative"),
        ({"vidx": {"knows": "all"}}, "vidx needs licence"),
        ({"vidx": {"licence": "MIT", "search_floor": "low"}}, "vidx.search_floor is 'low'; it must be a number"),
        ({"vidx": {"licence": "MIT", "search_floor": True}}, "vidx.search_floor is True; it must be a number"),
        ({"vidx": {"licence": "MIT", "trained": ["long"]}}, r"vidx.trained is \['long'\]; it must be text"),
        (
            {"vidx": {"licence": "MIT", "unknown_answers": ["no"]}},
            "vidx.unknown_answers is .*an object whose values are texts",
        ),
        (
            {"vidx": {"licence": "MIT", "unknown_answers": {"no": 1}}},
            "vidx.unknown_answers is .*an object whose values",
        ),
        ({"vidx": {"licence": "MIT", "accuracy": {"exact": 90}}}, "vidx.accuracy is .*source -> kind of question"),
        ({"vidx": {"licence": "MIT", "accuracy": {"exact": {"all": "90"}}}}, "vidx.accuracy is .*per cent, a number"),
        ({"vidx": {"licence": "MIT", "random": True}}, "vidx needs licence and knows only .* found licence, random"),
        ({"vidx": {"licence": "MIT", "most_frames": 0}}, "vidx.most_frames is 0; it must be a whole number above 0"),
        ({"vidx": "Apache-2.0"}, "vidx is 'Apache-2.0'; it must be an object"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(checkpoint, values, message):
    change_config(checkpoint, **values)
    with pytest.raises(UsageError, match=message):
        read_bundle("x", checkpoint)


def test_a_name_that_means_nothing_lists_what_is_built_in(tmp_path):
    with pytest.raises(UsageError, match=r"no model named nothing: .*built-in names: .*nano"):
        find_bundle("nothing")


def test_a_hub_repository_in_the_local_cache_needs_no_network(tmp_path):
    cache = tmp_path / "hub"
    revision = "0123456789abcdef0123456789abcdef01234567"
    for name, source in (("models--someone--mini", TINY), ("models--someone--clip", TINY / "vision_tower")):
        shutil.copytree(source, cache / name / "snapshots" / revision)
        (cache / name / "refs").mkdir()
        (cache / name / "refs" / "main").write_text(revision, encoding="utf-8")
    snapshot = cache / "models--someone--mini" / "snapshots" / revision
    shutil.rmtree(snapshot / "vision_tower")
    change_config(snapshot, mm_vision_tower="someone/clip@main")
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    code = (
        "from workers.models.bundle import find_bundle, list_bundles\n"
        "bundle = find_bundle('someone/mini')\n"
        "print(bundle.model_id, bundle.card.licence, [b.name for b in list_bundles()])\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = f"{find_bundle(str(TINY)).model_id} apache-2.0 "
    assert result.stdout.startswith(expected)
    assert f"someone/mini@{revision}" in result.stdout
    missing = "from workers.models.bundle import find_bundle\nfind_bundle('someone/else')"
    result = subprocess.run([sys.executable, "-c", missing], env=environment, capture_output=True, text=True)
    assert "UsageError: no model named someone/else: not in the local hub cache" in result.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": 3}, "does not describe Llama blocks"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "does not describe Llama blocks"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'"),
        ({"intermediate_size": 96}, r"gate_proj.weight has shape \(160, 64\), config.json asks for \(96, 64\)"),
    ],
)
def test_settings_that_no_model_can_be_built_of_are_named(checkpoint, values, message):
    change_config(checkpoint, **values)
    with pytest.raises(UsageError, match=message):
        load_vision(read_bundle("x", checkpoint), "cpu", "float32")
