"""What is stored of a frame is what the published model computes for it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_bundle import write_bundle
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.configuration_clip import CLIPConfig

from ops.published import encode_pixels, resize_nearest
from storage.errors import UsageError
from workers.models.bundle import find_bundle, read_bundle
from workers.vision import visionzip
from workers.vision.clip_vision import pixel_values, tower_features
from workers.vision.encode import encode_frames, frame_features, frame_pixels, vision_tokens
from workers.vision.llava_mini import arrange_patches, load_vision

REFERENCE = Path(__file__).parent / "reference"
HALF = 2.0**-11  # relative rounding of float16


@pytest.fixture(scope="module", params=["llava-mini-tiny", "llava-mini-tiny-c2-hd"])
def reference(request):
    directory = REFERENCE / request.param
    golden = load_file(directory / "golden.safetensors")
    vision = load_vision(find_bundle(str(directory / "checkpoint")), "cpu", "float32")
    return vision, golden, resize_nearest(golden["video.landscape.frames_u8"])


@pytest.fixture(scope="module")
def built_in_vision():
    return load_vision(find_bundle("nano"), "cpu", "float32")


@pytest.fixture(scope="module")
def other_vision(tmp_path_factory):
    """Sizes that no reference has: C = 3, 3 x 3 blocks, an LLM wider than the tower, three pre-fusion blocks."""
    directory = tmp_path_factory.mktemp("other")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    sizes = {"hidden_size": 96, "intermediate_size": 144, "prefusion_layer_num": 3} | heads
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}
    write_bundle(directory, sizes | {"compressor_size": 3, "resolution_ratio": 3}, vision, seed=7)
    return load_vision(read_bundle("other", directory), "cpu", "float32")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 336, 336, 3), dtype=np.uint8)


def published_way(vision, pixels: np.ndarray, text: torch.Tensor) -> torch.Tensor:
    """The vision tokens frame by frame, every row of every block, with text behind them: nothing of our shortcuts."""
    ratio, tokens = vision.bundle.config.resolution_ratio, []
    for frame in pixels:
        features = tower_features(vision.tower, frame_pixels(vision, frame[None])[0]).hidden[:, 1:][None]
        grid, patches = arrange_patches(features, ratio)
        module, side = vision.compressor.module, round(grid.shape[1] ** 0.5)
        places = module.pos_embed
        count = round(len(places) ** 0.5)
        key_places = places.T.reshape(1, -1, count, count)
        if count != side:
            key_places = functional.interpolate(key_places, size=(side, side), mode="bicubic", align_corners=False)
        key_places = key_places.flatten(2).transpose(1, 2)
        normed = module.ln_kv(grid)
        query = (module.ln_q(module.query) + places)[:, None]
        compressed, _ = module.attn(query, (normed + key_places).transpose(0, 1), normed.transpose(0, 1))
        compressed = compressed.transpose(0, 1)
        sequence = torch.cat([vision.projector(patches), vision.projector(compressed), text[None]], dim=1)
        size = sequence.shape[1]
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
        rotary = vision.rotary(sequence, torch.arange(size)[None])
        for block in vision.prefusion:
            sequence = block(sequence, attention_mask=mask, position_embeddings=rotary)
        tokens.append(sequence[0, patches.shape[1] : patches.shape[1] + compressed.shape[1]])
    return torch.stack(tokens)


def test_stored_tokens_are_the_published_ones_within_float16(reference):
    vision, golden, pixels = reference
    batch = encode_pixels(vision, pixels, patch_rows=0)
    for ours, name in ((batch.token, "q0.compressed_after_prefusion"), (batch.compressor_out, "compressor_out")):
        wanted = golden[f"video.landscape.{name}"]
        assert ours.dtype == np.float16
        np.testing.assert_array_less(np.abs(ours - wanted), 5e-5 + np.abs(wanted) * HALF)


@pytest.mark.parametrize("name", ["built_in_vision", "other_vision"])
def test_batched_and_pruned_equals_frame_by_frame_with_text_behind(name, request):
    vision = request.getfixturevalue(name)
    text = torch.randn(20, vision.bundle.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = vision_tokens(vision, frame_features(vision, frame_pixels(vision, frames(3))))
        torch.testing.assert_close(ours, published_way(vision, frames(3), text), atol=5e-5, rtol=0)
    assert ours.shape == (3, vision.bundle.tokens_per_frame, vision.bundle.config.hidden_size)


def test_a_frame_is_encoded_the_same_alone_and_among_others(built_in_vision):
    pixels = frames(9)
    together = encode_pixels(built_in_vision, pixels, patch_rows=7)
    alone = encode_pixels(built_in_vision, pixels[4:5], patch_rows=7)
    for name in ("token", "compressor_out", "search_key"):
        np.testing.assert_allclose(getattr(together, name)[4:5], getattr(alone, name), atol=2e-3)
    np.testing.assert_array_equal(together.patches.positions[4:5], alone.patches.positions)
    again = encode_pixels(built_in_vision, pixels, patch_rows=7)
    assert again.token.tobytes() == together.token.tobytes()


@pytest.mark.parametrize("name", ["built_in_vision", "other_vision"])
def test_the_search_key_is_the_joint_embedding_of_the_whole_picture(name, request):
    vision = request.getfixturevalue(name)
    bundle = vision.bundle
    config = CLIPConfig(**json.loads((bundle.tower_directory / "config.json").read_text(encoding="utf-8")))
    model = CLIPVisionModelWithProjection(config.vision_config).eval()
    weights = load_file(bundle.tower_directory / "model.safetensors")
    state = {key: torch.from_numpy(weights[key]).float() for key in model.state_dict() if key in weights}
    assert not model.load_state_dict(state, strict=False).missing_keys
    pixels = frames(2)
    with torch.no_grad():
        whole = frame_pixels(vision, pixels)[:, -1]
        wanted = functional.normalize(model(pixel_values=whole).image_embeds, dim=-1)
    ours = encode_pixels(vision, pixels, patch_rows=0).search_key
    np.testing.assert_allclose(ours, wanted, atol=HALF)
    np.testing.assert_allclose(np.linalg.norm(ours.astype(np.float32), axis=1), 1, atol=1e-3)


def test_a_tower_without_a_joint_embedding_gives_no_search_key():
    vision = load_vision(find_bundle(str(REFERENCE / "llava-mini-tiny" / "checkpoint")), "cpu", "float32")
    assert encode_pixels(vision, frames(1), patch_rows=0).search_key is None


def test_patch_rows_are_visionzip_rows_within_half_a_step_at_their_places(reference):
    vision, _, pixels = reference
    rows = encode_pixels(vision, pixels, patch_rows=5).patches
    pictures, patch_count = vision.bundle.pictures_per_frame, vision.bundle.patches_per_picture
    assert rows.values.shape == (5, 5 * pictures, 64)
    assert (np.diff(rows.positions.astype(int), axis=1) > 0).all()
    assert rows.positions.max() < vision.bundle.patches_per_frame
    whole = rows.positions >= vision.bundle.patches_per_frame - patch_count
    assert (whole.sum(axis=1) == 5).all()  # of each picture as many; the whole picture's patches come last
    with torch.inference_mode():
        features = frame_features(vision, frame_pixels(vision, pixels))
        kept, places = visionzip.keep_patches(features.tower, 5)
    last = slice(pictures - 1, None, pictures)  # the whole picture of each frame
    np.testing.assert_array_equal(rows.positions[whole].reshape(5, 5) % patch_count, places[last])
    restored = (rows.values * rows.scales[..., None])[whole].reshape(5, 5, 64)
    steps = rows.scales[whole].reshape(5, 5, 1)
    assert (np.abs(restored - kept[last].numpy()) <= steps * 0.5 + 1e-5).all()
    assert (np.abs(rows.values).max(axis=-1) == 127).all()


def test_high_resolution_places_lead_to_the_patch_that_was_kept(other_vision):
    pixels = frames(1)
    rows = encode_pixels(other_vision, pixels, other_vision.bundle.patches_per_picture).patches
    with torch.inference_mode():
        patches = frame_features(other_vision, frame_pixels(other_vision, pixels)).patches[0]
    assert rows.positions[0].tolist() == list(range(640))  # 9 blocks and the whole, 64 patches each
    np.testing.assert_allclose(rows.values[0] * rows.scales[0][:, None], patches, atol=float(rows.scales.max()) / 2)


@pytest.mark.parametrize("patch_rows", [-1, 65])
def test_a_patch_tier_that_the_model_cannot_give_is_refused(built_in_vision, patch_rows):
    with pytest.raises(UsageError, match=f"--patches {patch_rows}: nano has 64 patches a picture; give 0 to 64"):
        encode_pixels(built_in_vision, frames(1), patch_rows)


def test_frames_that_all_fit_are_encoded_in_their_order(built_in_vision):
    encoded = encode_frames(built_in_vision, frames(2), patch_rows=1)
    assert encoded.tokens.token.tobytes() == encode_pixels(built_in_vision, frames(2), 1).token.tobytes()
    assert encoded.tokens.patches.values.shape == (2, 1, 160)
    assert (encoded.places.tolist(), dict(encoded.unfit)) == ([0, 1], {})


def test_a_value_beyond_float16_is_an_error_and_never_infinity(tmp_path):
    directory = Path(shutil.copytree(find_bundle("nano").directory, tmp_path / "model"))
    weights = {name: value.astype(np.float32) for name, value in load_file(directory / "model.safetensors").items()}
    weights["model.compressor.attn.out_proj.bias"][3] = 70000
    save_file(weights, directory / "model.safetensors")
    vision = load_vision(read_bundle("large", directory), "cpu", "float32")
    with pytest.raises(UsageError, match=r"compressor output of (70|69)\d{3}.* does not fit float16"):
        encode_pixels(vision, frames(1), patch_rows=0)


@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 0.05), ("bfloat16", 0.5)])
def test_half_precision_stays_near_the_published_numbers(dtype, allowed):
    directory = REFERENCE / "llava-mini-tiny"
    golden = load_file(directory / "golden.safetensors")
    vision = load_vision(find_bundle(str(directory / "checkpoint")), "cpu", dtype)
    batch = encode_pixels(vision, resize_nearest(golden["video.landscape.frames_u8"]), patch_rows=0)
    wanted = golden["video.landscape.q0.compressed_after_prefusion"]
    assert np.abs(batch.token - wanted).max() < allowed


def test_pixels_are_normalised_to_the_last_bit():
    golden = load_file(REFERENCE / "llava-mini-tiny" / "golden.safetensors")
    bundle = find_bundle(str(REFERENCE / "llava-mini-tiny" / "checkpoint"))
    vision = load_vision(bundle, "cpu", "float32")
    ours = frame_pixels(vision, resize_nearest(golden["video.landscape.frames_u8"]))
    np.testing.assert_array_equal(ours, golden["video.landscape.pixel_values"])
    black = pixel_values(np.zeros((1, 2, 2, 3), np.uint8), bundle.pictures, vision.device, vision.dtype)
    assert black[0, 0, 0, 0].item() == pytest.approx(-0.48145466 / 0.26862954, abs=1e-6)


def test_a_gpu_gives_the_same_tokens(built_in_vision):
    if not torch.cuda.is_available():
        assert os.environ.get("REQUIRE_GPU") != "1", "REQUIRE_GPU=1, but torch finds no GPU"
        pytest.skip("no GPU")
    on_gpu = load_vision(find_bundle("nano"), "cuda", "float32")
    ours, wanted = (encode_pixels(vision, frames(4), 7) for vision in (on_gpu, built_in_vision))
    np.testing.assert_allclose(ours.token, wanted.token, atol=2e-2)
    np.testing.assert_allclose(ours.search_key, wanted.search_key, atol=2e-3)


def test_an_unknown_device_or_precision_is_refused():
    bundle = find_bundle("nano")
    with pytest.raises(UsageError, match="--dtype int4"):
        load_vision(bundle, "cpu", "int4")
    with pytest.raises(UsageError, match="--device abacus"):
        load_vision(bundle, "abacus", "float32")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no GPU"):
            load_vision(bundle, "cuda", "float32")
