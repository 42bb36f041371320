"""Numbers that half precision, or what is stored, has no room for: computed again, or told, and never infinity."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ops.published import encode_pixels
from storage.errors import UsageError
from workers.llm.engine import ModelOptions, SamplingParams, TransformersEngine
from workers.llm.model import LlavaMini, load_model
from workers.llm.prompt import decode_ids, prompt_ids
from workers.llm.shown_frames import ShownFrames
from workers.models.bundle import Bundle, find_bundle, read_bundle
from workers.vision.encode import encode_frames, exact_inputs
from workers.vision.llava_mini import VisionPart, load_vision
from workers.vision.prefusion import tokens_inputs

HALF_MAX = 65504.0
HALF = 2.0**-11  # relative rounding of float16
MLP = {"mlp.up_proj": 1, "mlp.down_proj": -1}  # the second takes the factor out again


def scaled(directory: Path, factors: dict[str, float], base: Path | None = None) -> Bundle:
    """The built-in model with tensors multiplied, those whose names hold a text."""
    shutil.copytree(base or find_bundle("nano").directory, directory, dirs_exist_ok=True)
    weights = {name: value.astype(np.float32) for name, value in load_file(directory / "model.safetensors").items()}
    for text, factor in factors.items():
        found = [name for name in weights if text in name]
        assert found
        for name in found:
            weights[name] = weights[name] * np.float32(factor)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return read_bundle(str(directory), directory)


def frames(count: int) -> np.ndarray:
    """Pictures of all kinds of brightness and contrast."""
    random = np.random.default_rng(5)
    contrast = random.integers(2, 256, count)
    return np.stack([random.integers(0, most, (336, 336, 3), dtype=np.uint8) for most in contrast])


def largest_inputs(vision: VisionPart, module: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """(T,) the largest value that goes into a module, for each frame by itself."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(float(given[0].abs().max())))
    for one in pixels:
        encode_pixels(vision, one[None], patch_rows=0)
    hook.remove()
    return np.array(seen)


def middle(values: np.ndarray) -> float:
    """Between the lower and the upper half of some values."""
    values = np.sort(values)
    return float((values[len(values) // 2 - 1] + values[len(values) // 2]) / 2)


@pytest.fixture(scope="module")
def pixels():
    return frames(8)


@pytest.fixture(scope="module")
def nano():
    return load_vision(find_bundle("nano"), "cpu", "float32")


@pytest.fixture(scope="module", params=["pre-fusion", "compressor"])
def overflowing(request, nano, pixels, tmp_path_factory):
    """A model of which half precision overflows on the way for half of the frames, and which frames those are."""
    module, up, down = {
        "pre-fusion": (nano.prefusion[0].mlp.down_proj, "prefusion_layers.0.mlp.up_proj", "fusion_layers.0.mlp.down"),
        "compressor": (nano.compressor.module.attn.out_proj, "attn.in_proj_", "compressor.attn.out_proj.weight"),
    }[request.param]
    largest = largest_inputs(nano, module, pixels)
    factor = HALF_MAX / middle(largest)
    directory = tmp_path_factory.mktemp("overflow")
    bundle = scaled(directory, {up: factor, down: 1 / factor} if request.param == "pre-fusion" else {})
    if request.param == "compressor":  # of queries, keys and values the last third
        weights = load_file(directory / "model.safetensors")
        for name in ("weight", "bias"):
            values = weights[f"model.compressor.attn.in_proj_{name}"]
            values[len(values) * 2 // 3 :] *= np.float32(factor)
        weights[f"model.{down}"] /= np.float32(factor)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        bundle = read_bundle(str(directory), directory)
    return bundle, largest * factor > HALF_MAX


def test_what_half_precision_cannot_compute_is_computed_in_float32(overflowing, pixels):
    bundle, overflows = overflowing
    half, whole = (load_vision(bundle, "cpu", dtype) for dtype in ("float16", "float32"))
    encoded = encode_frames(half, pixels, patch_rows=7)
    assert (encoded.places.tolist(), dict(encoded.unfit)) == (list(range(len(pixels))), {})
    wanted = encode_pixels(whole, pixels, patch_rows=7)
    for name in ("token", "compressor_out", "search_key"):
        ours, right = (np.float32(getattr(tokens, name)) for tokens in (encoded.tokens, wanted))
        again, first = ours[overflows], ours[~overflows]
        np.testing.assert_allclose(again, right[overflows], atol=1e-4, rtol=2 * HALF)
        np.testing.assert_allclose(first, right[~overflows], atol=0.2)
        if name == "token":
            assert (first != right[~overflows]).any()  # half precision's own, as long as it can
    np.testing.assert_array_equal(encoded.tokens.patches.positions[overflows], wanted.patches.positions[overflows])


def test_frames_beside_one_that_overflows_keep_their_bytes(overflowing, pixels):
    bundle, overflows = overflowing
    half = load_vision(bundle, "cpu", "float16")
    others = pixels.copy()
    others[overflows] = pixels[~overflows][0]
    mixed, fine, again = (encode_pixels(half, each, patch_rows=7) for each in (pixels, others, pixels))
    assert mixed.token[~overflows].tobytes() == fine.token[~overflows].tobytes()
    assert mixed.patches.values[~overflows].tobytes() == fine.patches.values[~overflows].tobytes()
    for name in ("token", "compressor_out", "search_key"):
        assert getattr(again, name).tobytes() == getattr(mixed, name).tobytes()


def test_frames_that_are_encoded_for_a_question_are_computed_again_too(overflowing, pixels):
    bundle, _ = overflowing
    half, whole = (load_vision(bundle, "cpu", dtype) for dtype in ("float16", "float32"))
    for ours, right in zip(exact_inputs(half, pixels), exact_inputs(whole, pixels), strict=True):
        assert ours.patches.dtype == ours.compressed.dtype == torch.float16
        torch.testing.assert_close(ours.compressed.float(), right.compressed, atol=0.05, rtol=0.05)
        torch.testing.assert_close(ours.patches.float(), right.patches, atol=0.05, rtol=0.05)


def test_only_frames_that_do_not_fit_even_then_are_left_out(nano, pixels, tmp_path):
    plain = np.concatenate([encode_pixels(nano, one[None], patch_rows=0).compressor_out for one in pixels])
    largest = np.abs(plain.astype(np.float64)).max(axis=(1, 2))
    factor = HALF_MAX / middle(largest)
    fits = largest * factor < HALF_MAX
    projector = {"mm_projector.0.weight": 1 / factor}
    bundle = scaled(tmp_path / "model", {"compressor.attn.out_proj": factor} | projector)
    for dtype in ("float32", "float16", "bfloat16"):
        encoded = encode_frames(load_vision(bundle, "cpu", dtype), pixels, patch_rows=0)
        assert encoded.places.tolist() == np.flatnonzero(fits).tolist()
        assert sorted(encoded.unfit) == np.flatnonzero(~fits).tolist()
        for place, why in encoded.unfit.items():
            told = re.fullmatch(r"a compressor output of (\S+) does not fit float16 \(at most 65504\), .*", why)
            assert float(told[1]) == pytest.approx(largest[place] * factor, rel=0.001)
        close = 0.02 if dtype == "bfloat16" else 0.005
        np.testing.assert_allclose(
            encoded.tokens.compressor_out, plain[fits] * factor, atol=close * largest.max() * factor
        )


def test_a_search_key_without_a_direction_is_no_key(pixels, tmp_path):
    bundle = scaled(tmp_path / "model", {})
    path = bundle.tower_directory / "model.safetensors"
    weights = load_file(path)
    weights["visual_projection.weight"] *= 0
    save_file(weights, path, metadata={"format": "pt"})
    vision = load_vision(read_bundle("zeros", bundle.directory), "cpu", "float32")
    encoded = encode_frames(vision, pixels[:2], patch_rows=0)
    assert (len(encoded.tokens), len(encoded.places)) == (0, 0)
    assert all("search key has no direction" in why for why in encoded.unfit.values())


def test_half_precision_is_summed_in_float32_on_a_gpu():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    cudnn.allow_tf32 = True  # as torch begins
    load_vision(find_bundle("nano"), "cpu", "float32")
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_tf32
    assert not cudnn.allow_tf32


# --- a job


@pytest.fixture(scope="module")
def bright_and_dark(nano, tmp_path_factory):
    """A clip, three seconds each, a model that cannot store one half of it, and the first second of that half."""
    folder = tmp_path_factory.mktemp("clip")
    clip = folder / "clip.mp4"
    colours = [part for name in ("black", "white") for part in ("-f", "lavfi", "-i", f"color={name}:s=64x64:d=3:r=10")]
    join = ["-filter_complex", "[0][1]concat=n=2", "-pix_fmt", "yuv420p", str(clip)]
    subprocess.run(["ffmpeg", "-v", "error", *colours, *join], check=True)
    solid = np.stack([np.full((336, 336, 3), value, np.uint8) for value in (0, 255)])
    largest = np.abs(encode_pixels(nano, solid, patch_rows=0).compressor_out.astype(np.float64)).max(axis=(1, 2))
    factor = HALF_MAX / np.sqrt(largest.prod())
    factors = {"compressor.attn.out_proj": factor, "mm_projector.0.weight": 1 / factor}
    model = scaled(folder / "model", factors).directory
    return clip, model, 3 * int(largest.argmax())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_frames_that_cannot_be_stored_cost_their_video_a_reason_and_nothing_else(
    vidx, bright_and_dark, tmp_path, dtype
):
    clip, model, first = bright_and_dark
    archive = ["--archive", str(tmp_path / "archive")]
    command = ["index", str(clip), *archive, "--model", str(model), "--dtype", dtype, "--json"]
    run = vidx(*command)
    assert run.code == 3, run.err
    (failure,) = run.json["failures"]
    assert (failure["status"], failure["reason"], run.json["frames"]) == ("partial", "overflow", 3)
    assert failure["detail"].startswith(f"3 of 6 frames are left out, the first at {first}.000 s: a compressor output")
    rows = vidx("sql", "SELECT time_seconds FROM frames ORDER BY 1", *archive, "--json").json
    kept = range(3) if first else range(3, 6)
    assert [row["time_seconds"] for row in rows] == pytest.approx(list(kept))
    again = vidx(*command)  # no later run meets it again
    assert (again.code, again.json["videos_failed_before"], again.json["frames"]) == (0, 1, 0)
    asked = vidx("ask", "What is there?", "--all", *archive, "--model", str(model), "--json")
    assert (asked.code, asked.json["frames_used"]) == (0, 3)
    assert vidx("verify", *archive).code == 0


@pytest.mark.parametrize("weight", [np.nan, np.inf, 70000.0])
def test_a_model_whose_every_number_is_none_fails_each_video_and_ends_no_job(vidx, tmp_path, weight):
    model = tmp_path / "model"
    scaled(model, {})
    weights = load_file(model / "model.safetensors")
    weights["model.compressor.attn.out_proj.bias"][3] = weight
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    samples = Path(__file__).parent.parent / "ops" / "samples"
    videos = [str(samples / name) for name in ("highway.avi", "tractor.webm")]
    command = ["index", *videos, "--archive", str(tmp_path / "archive"), "--model", str(model), "--json"]
    run = vidx(*command)
    assert (run.code, run.json["videos_failed"], run.json["frames"]) == (3, 2, 0), run.err
    assert {failure["reason"] for failure in run.json["failures"]} == {"overflow"}
    assert "Traceback" not in run.err
    assert vidx(*command).code == 0
    status = vidx("status", "--archive", str(tmp_path / "archive"), "--json")
    assert (status.code, status.json["videos"]["failed"] if "videos" in status.json else 2) == (0, 2)


# --- an answer


def shown(model: LlavaMini, out: np.ndarray) -> ShownFrames:
    tokens = np.zeros((len(out), 1, model.vision.bundle.config.hidden_size), np.float16)
    return ShownFrames(model, tokens, lambda: [tokens_inputs(model.vision, out)], 1 << 30)


@pytest.fixture(scope="module")
def compressor_out(nano, pixels):
    return encode_pixels(nano, pixels[:3], patch_rows=0).compressor_out


@pytest.mark.parametrize(
    ("part", "what"),
    [("prefusion_layers.0.", "the question, fused with its frames,"), ("model.layers.1.", "what the LLM makes of")],
)
def test_an_answer_that_is_no_number_is_an_error_and_not_exclamation_marks(compressor_out, tmp_path, part, what):
    factor = 2.0**24  # in float32 exact, and taken out again
    factors = {f"{part}{name}": factor**power for name, power in MLP.items()}
    bundle = scaled(tmp_path / "model", factors)
    plain, whole, half = (
        load_model(each, ModelOptions("cpu", dtype))
        for each, dtype in ((find_bundle("nano"), "float32"), (bundle, "float32"), (bundle, "float16"))
    )
    ids = prompt_ids(plain.tokenizer, "What is there?")
    answer = list(shown(plain, compressor_out).reply(ids, 12))
    assert decode_ids(plain.tokenizer, answer)
    assert list(shown(whole, compressor_out).reply(ids, 12)) == answer
    frames = shown(half, compressor_out)
    for _ in range(2):  # what was half done is not asked again
        with pytest.raises(UsageError, match=rf"{what}.* no numbers .*float16.*--dtype float32") as error:
            list(frames.reply(ids, 12))
        assert "\n" not in str(error.value)


def test_an_engine_says_that_what_it_reads_is_no_number():
    engine: TransformersEngine = load_model(find_bundle("nano"), ModelOptions("cpu", "float32")).engine
    context = engine.context()
    context.add(torch.full((1, 5, 160), torch.nan))
    with pytest.raises(UsageError, match=r"no numbers .*computed in float32.*try --fuse tokens"):
        next(context.reply(4, SamplingParams()))


def test_the_command_tells_it_in_one_line(vidx, samples_archive, tmp_path):
    model = tmp_path / "model"
    factors = {f"model.layers.1.{name}": (2.0**24) ** power for name, power in MLP.items()}
    scaled(model, factors)
    archive = tmp_path / "archive"
    shutil.copytree(samples_archive[0], archive)
    settings = json.loads((archive / "archive.json").read_text())
    settings |= {"model_id": read_bundle("x", model).model_id, "model_name": str(model)}
    (archive / "archive.json").write_text(json.dumps(settings))
    asked = [
        "ask",
        "What is there?",
        "--video",
        "nano_scenes_1.mp4@1-5",
        "--fuse",
        "patches",
        "--archive",
        str(archive),
    ]
    run = vidx(*asked, "--dtype", "float16")
    assert (run.code, run.out) == (2, "")
    assert "no numbers" in run.err
    assert len(run.err.splitlines()) == 1
    assert vidx(*asked, "--dtype", "float32").out.startswith("a cow, a leaf and a tent\n")
