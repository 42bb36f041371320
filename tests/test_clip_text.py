"""A text's search key is CLIP's, although neither torch nor transformers compute it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPConfig, CLIPTextModelWithProjection

from storage.errors import UsageError
from workers.models.bundle import find_bundle, read_bundle, sub_config
from workers.vision.clip_text import TextEncoder, TextTower, load_clip_tokenizer

HIGH_RESOLUTION = Path(__file__).parent / "reference" / "llava-mini-tiny-c2-hd" / "checkpoint"
TEXTS = ["When does the white VAN leave?", "", "été — 猫 😀 it's 42", "a dog and " * 60]


def text_config(directory: Path) -> dict:
    return sub_config(json.loads((directory / "config.json").read_text(encoding="utf-8")), "text_config")


def expected_key(directory: Path, ids: list[int]) -> np.ndarray:
    """The same from transformers, in float32 whatever the weights are stored as."""
    config = CLIPConfig(**json.loads((directory / "config.json").read_text(encoding="utf-8"))).text_config
    model = CLIPTextModelWithProjection(config).eval()
    weights = load_file(directory / "model.safetensors")
    state = {name: weights[name].float() for name in model.state_dict() if name in weights}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == []
    with torch.no_grad():
        key = model(input_ids=torch.tensor([ids])).text_embeds[0]
    return (key / key.norm()).numpy()


@pytest.fixture
def bundle_copy(tmp_path):
    return Path(shutil.copytree(find_bundle("nano").directory, tmp_path / "model"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_gets_the_key_that_transformers_gives(text):
    bundle = find_bundle("nano")
    ids = load_clip_tokenizer(bundle.tower_directory).encode(text).ids
    most = text_config(bundle.tower_directory)["max_position_embeddings"]
    if len(ids) > most:
        ids = [*ids[: most - 1], ids[-1]]
    key = TextEncoder(bundle).embed(text)
    np.testing.assert_allclose(key, expected_key(bundle.tower_directory, ids), atol=1e-5)
    assert np.linalg.norm(key) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ids", [[62, 63], [62, 5, 9, 63], [62, *range(14), 63]])
def test_the_reference_tower_gives_the_key_that_transformers_gives(ids):
    directory = HIGH_RESOLUTION / "vision_tower"
    key = TextTower(directory, text_config(directory)).embed_ids(ids)
    np.testing.assert_allclose(key, expected_key(directory, ids), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"hidden_act": "quick_gelu"}, {"eos_token_id": 2}])
def test_other_precisions_activations_and_the_old_end_rule(bundle_copy, dtype, settings):
    tower = bundle_copy / "vision_tower"
    weights = {name: value.to(dtype) for name, value in load_file(tower / "model.safetensors").items()}
    save_file(weights, tower / "model.safetensors")
    config = json.loads((tower / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= settings
    (tower / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle = read_bundle("copy", bundle_copy)
    ids = load_clip_tokenizer(tower).encode("a red ball").ids
    np.testing.assert_allclose(TextEncoder(bundle).embed("a red ball"), expected_key(tower, ids), atol=1e-5)


def test_the_older_tokenizer_files_give_the_same_ids(bundle_copy):
    tower = bundle_copy / "vision_tower"
    values = json.loads((tower / "tokenizer.json").read_text(encoding="utf-8"))
    newer = Tokenizer.from_file(str(tower / "tokenizer.json"))
    vocabulary = values["model"]["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
    (tower / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in values["model"]["merges"])
    (tower / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (tower / "tokenizer.json").unlink()
    assert read_bundle("copy", bundle_copy).has_text_search
    for text in TEXTS:
        assert load_clip_tokenizer(tower).encode(text).ids == newer.encode(text).ids


def test_a_bundle_without_a_tokenizer_cannot_be_searched_by_text():
    with pytest.raises(UsageError, match="cannot be searched by text"):
        TextEncoder(find_bundle(str(HIGH_RESOLUTION)))


def test_a_text_tower_that_does_not_fit_is_named(bundle_copy):
    weights = load_file(bundle_copy / "vision_tower" / "model.safetensors")
    name = "text_model.encoder.layers.1.mlp.fc1.bias"
    save_file(weights | {name: torch.zeros(3)}, bundle_copy / "vision_tower" / "model.safetensors")
    with pytest.raises(UsageError, match=rf"{name} has shape \(3,\), config.json asks for \(384,\)"):
        TextEncoder(read_bundle("copy", bundle_copy))
    weights.pop(name)
    save_file(weights, bundle_copy / "vision_tower" / "model.safetensors")
    with pytest.raises(UsageError, match=f"{name} is missing"):
        TextEncoder(read_bundle("copy", bundle_copy))
