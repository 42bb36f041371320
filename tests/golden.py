"""The whole model of a reference checkpoint and what the published code says of it (tests/reference)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from ops.published import resize_nearest
from workers.llm.engine import ModelOptions
from workers.llm.model import LlavaMini, load_model
from workers.models.bundle import find_bundle

REFERENCE = Path(__file__).parent / "reference"
MODELS = ("llava-mini-tiny", "llava-mini-tiny-c2-hd")


class Golden(NamedTuple):
    """A model in float32; its vectors by name; all cases; the landscape clip's frames as the tower takes them."""

    model: LlavaMini
    vectors: dict[str, np.ndarray]
    cases: list[dict]
    pixels: np.ndarray

    @property
    def landscape(self) -> list[dict]:
        """The cases that ask about the landscape clip."""
        return [case for case in self.cases if case["tensor_prefix"].startswith("video.landscape")]


def load_golden(name: str) -> Golden:
    directory = REFERENCE / name
    vectors = load_file(directory / "golden.safetensors")
    about = json.loads((directory / "golden.json").read_text(encoding="utf-8"))
    model = load_model(find_bundle(str(directory / "checkpoint")), ModelOptions("cpu", "float32"))
    return Golden(model, vectors, about["cases"], resize_nearest(vectors["video.landscape.frames_u8"]))
