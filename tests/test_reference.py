"""The published numbers are met: ops/check_reference on the reference vectors, and its own honesty."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import run_program
from safetensors.numpy import load_file, save_file

from pipeline.api.open_archive import OpenArchive
from workers.vision import visionzip

REFERENCE = Path(__file__).parent / "reference"
CHECK = Path(__file__).parents[1] / "ops" / "check_reference"


def check(directory: Path) -> tuple[int, dict]:
    run = run_program(CHECK, directory, "--json")
    return run.code, run.json if run.out else {"stderr": run.err}


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("llava-mini-tiny", 55), ("llava-mini-tiny-c2-hd", 48), ("visionzip/clip-16", 40), ("preprocess", 28)],
)
def test_every_reference_tensor_is_met(name, at_least):
    code, report = check(REFERENCE / name)
    assert [tensor for tensor in report["tensors"] if not tensor["ok"]] == []
    assert (code, report["ok"]) == (0, True)
    assert len(report["tensors"]) >= at_least
    assert max(tensor["max_abs_diff"] for tensor in report["tensors"]) <= 5e-5


@pytest.mark.parametrize("name", ["llava-mini-tiny", "llava-mini-tiny-c2-hd"])
def test_index_and_ask_give_the_published_answers(name, vidx, tmp_path):
    golden = load_file(REFERENCE / name / "golden.safetensors")
    about = json.loads((REFERENCE / name / "golden.json").read_text(encoding="utf-8"))
    cases = [case for case in about["cases"] if case["kind"] == "video"]
    videos, place = tmp_path / "videos", str(tmp_path / "archive")
    videos.mkdir()
    for video in {case["name"] for case in cases}:
        write_lossless(videos / f"{video}.mkv", golden[f"video.{video}.frames_u8"])
    made = vidx("index", str(videos), "--archive", place, "--model", str(REFERENCE / name / "checkpoint"), "--fps", "1")
    assert made.code == 0, made.err
    archive = OpenArchive.open(place)
    for case in cases:
        limits = {"frames": None, "max_tokens": len(case["generated_ids"])}
        answer = archive.ask(case["question"], video=f"{case['name']}.mkv", fuse="exact", dtype="float32", **limits)
        assert (answer.text, answer.fuse, answer.frame_count) == (case["generated_text"], "exact", case["frames"])


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """A video of one frame a second, (T, h, w, 3) uint8, whose decoded pixels are these."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("tower", ["clip-16", "clip-64"])
def test_visionzip_keeps_what_the_published_code_keeps_for_every_pair(tower):
    golden = load_file(REFERENCE / "visionzip" / tower / "golden.safetensors")
    hidden, attention, metric = (
        torch.from_numpy(golden[name]) for name in ("hidden_states", "cls_attention_sum", "metric")
    )
    pairs = sorted({name.split(".")[0] for name in golden if name.endswith(".tokens")})
    assert len(pairs) >= 5
    for pair in pairs:
        dominant, contextual = (int(part[1:]) for part in pair.split("_"))
        selection = visionzip.select(hidden, attention, metric, dominant, contextual)
        np.testing.assert_array_equal(selection.all_indices, golden[f"{pair}.all_indices"])
        np.testing.assert_array_equal(selection.targets, golden[f"{pair}.target_indices"])
        np.testing.assert_array_equal(selection.assignment, golden[f"{pair}.assignment"])
        np.testing.assert_allclose(selection.rows, golden[f"{pair}.tokens"], atol=5e-5, rtol=0)


def test_a_wrong_or_unknown_tensor_fails_the_check(tmp_path):
    shutil.copytree(REFERENCE / "visionzip" / "clip-16", tmp_path / "tower")
    golden = load_file(tmp_path / "tower" / "golden.safetensors")
    golden["metric"] = golden["metric"] + np.float32(1e-4)
    golden["d2_c1.novelty"] = np.zeros(3, np.float32)
    golden["something"] = np.zeros(3, np.float32)
    save_file(golden, tmp_path / "tower" / "golden.safetensors")
    code, report = check(tmp_path)
    failed = {tensor["name"]: tensor["max_abs_diff"] for tensor in report["tensors"] if not tensor["ok"]}
    assert code == 1
    assert not report["ok"]
    assert failed.keys() == {"tower/metric", "tower/d2_c1.novelty", "tower/something"}
    assert failed["tower/metric"] == pytest.approx(1e-4, rel=0.1)
    assert failed["tower/something"] is None


def test_a_directory_without_vectors_is_wrong_usage(tmp_path):
    assert check(tmp_path)[0] == 2
    assert check(tmp_path / "nowhere")[0] == 2
