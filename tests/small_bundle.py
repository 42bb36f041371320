"""Small bundles of any sizes with random weights, laid out as the published ones: the modules are transformers' own."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from workers.models.bundle import find_bundle


def write_bundle(
    directory: Path, sizes: dict[str, Any], vision: dict[str, Any], seed: int, base: Path | None = None
) -> None:
    """A bundle with other settings, tokenizers kept, and weights of its own.

    Args:
        directory: is made.
        sizes: what is to be different in config.json.
        vision: what is to be different in the vision tower's part of its config.json.
        seed: of the weights.
        base: the bundle; None for the built-in one.
    """
    shutil.copytree(base or find_bundle("nano").directory, directory, dirs_exist_ok=True)
    config = change_json(directory / "config.json", sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save(checkpoint(config, write_tower(directory / "vision_tower", vision)), directory)


def write_tower(directory: Path, changes: dict[str, Any]) -> int:
    """Changes the vision part of a tower's config.json, and gives it weights; its width."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "vision_config" in config:  # as nano's; the published ones are of a vision model alone
        config = change_json(path, {"vision_config": config["vision_config"] | changes})
        save(CLIPModel(CLIPConfig(**config)).state_dict(), directory)
        return config["vision_config"]["hidden_size"]
    config = change_json(path, changes)
    weights = CLIPVisionModel(CLIPVisionConfig(**config)).state_dict()
    save({f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in weights.items()}, directory)
    return config["hidden_size"]


def checkpoint(config: dict[str, Any], tower_width: int) -> dict[str, torch.Tensor]:
    """LLM, pre-fusion, compressor and projector, by the published names."""
    llama = LlamaConfig(**{name: value for name, value in config.items() if name != "vidx"})
    llm, width, token_count = LlamaForCausalLM(llama), llama.hidden_size, config["compressor_size"] ** 2
    query, places = torch.randn(2, token_count, tower_width)
    parts = {
        "": llm,
        "model.prefusion_layers.": nn.ModuleList(
            LlamaDecoderLayer(llama, i) for i in range(config["prefusion_layer_num"])
        ),
        "model.compressor.ln_q.": nn.LayerNorm(tower_width),
        "model.compressor.ln_kv.": nn.LayerNorm(tower_width),
        "model.compressor.attn.": nn.MultiheadAttention(tower_width, 8),
        "model.mm_projector.": nn.Sequential(nn.Linear(tower_width, width), nn.GELU(), nn.Linear(width, width)),
    }
    weights = {f"{prefix}{key}": value for prefix, part in parts.items() for key, value in part.state_dict().items()}
    if llama.tie_word_embeddings:
        weights.pop("lm_head.weight")
    return weights | {"model.compressor.query": query, "model.compressor.pos_embed": places}


def save(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """As model.safetensors, in float16, every bias and norm random too."""
    noise = {name: torch.randn_like(value) for name, value in weights.items()}
    values = {
        name: noise[name] / value[0].numel() ** 0.5 if value.ndim > 1 else value + noise[name] / 10
        for name, value in weights.items()
    }
    halves = {name: value.to(torch.float16).contiguous() for name, value in values.items()}
    save_file(halves, directory / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A file's object with some values changed, written and returned."""
    changed = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(changed), encoding="utf-8")
    return changed
