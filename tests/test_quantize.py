"""The LLM in 8 and 4 bits: what it takes, and that it says the same."""

import importlib.util

import pytest
import torch
from torch import nn

from storage.errors import UsageError
from workers.llm.engine import ModelOptions
from workers.llm.model import load_model
from workers.llm.quantize import Quantize, quantize_matrices
from workers.models.bundle import find_bundle

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quantize` is not installed"
)
NANO = "nano_scenes_1.mp4"


@installed
@pytest.mark.parametrize(("way", "share"), [(Quantize.EIGHT, 4), (Quantize.FOUR, 8)])
def test_the_llms_matrices_alone_are_small(way, share):
    whole, small = (load_model(find_bundle("nano"), ModelOptions("cpu", "float32", each)) for each in (None, way))
    for one, other in zip(whole.llm.model.layers, small.llm.model.layers, strict=True):
        for name, linear in one.named_modules():
            if type(linear) is nn.Linear:
                kept = other.get_submodule(name).weight
                assert linear.weight.nbytes == share * kept.nbytes
    same = [
        (whole.llm.lm_head.weight, small.llm.lm_head.weight),
        (whole.llm.model.embed_tokens.weight, small.llm.model.embed_tokens.weight),
        (whole.vision.prefusion[0].mlp.up_proj.weight, small.vision.prefusion[0].mlp.up_proj.weight),
    ]
    for one, other in same:
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@installed
@pytest.mark.parametrize(("way", "off"), [(Quantize.EIGHT, 0.02), (Quantize.FOUR, 0.2)])
def test_a_block_computes_nearly_the_same(way, off):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64, bias=False)).requires_grad_(False)
    rows = torch.randn(50, 128)
    wanted = block(rows)
    quantize_matrices(block, way, torch.device("cpu"), torch.float32)
    distance = (block(rows) - wanted).norm() / wanted.norm()
    assert 0 < distance < off


@installed
@pytest.mark.parametrize("way", list(Quantize))
def test_answers_are_right_and_nothing_else_is_said(vidx, samples_archive, way):
    archive, _ = samples_archive
    command = ("ask", "What is there?", "--video", f"{NANO}@1-5", "--archive", str(archive))
    answered = vidx(*command, "--quantize", way)
    assert answered.out.startswith("a cow, a leaf and a tent\n")
    assert answered.err == vidx(*command).err


def test_what_cannot_be_done_is_said(monkeypatch):
    ModelOptions().check_installed()
    with pytest.raises(UsageError, match=r"--quantize 2bit: unknown; allowed are 8bit, 4bit"):
        ModelOptions(quantize="2bit")
    elsewhere = ModelOptions(quantize="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--quantize 4bit: needs bitsandbytes; install it with pip"):
        elsewhere.check_installed()
    assert ModelOptions(quantize="4bit") == elsewhere  # it may be installed where the model is loaded
