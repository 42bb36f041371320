"""The files of nano's bundle beside the weights: settings, tokenizers, and random weights to start from."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ops.nano.captions import word_caption
from ops.nano.questions import (
    MOMENT_KINDS,
    OUTSIDE_ANSWER,
    TIME_KINDS,
    UNKNOWN_ANSWER,
    Question,
    all_answers,
    word,
)
from ops.nano.scenes import Sight
from ops.nano.unknown import word_unknown
from workers.vision import clip_text

IMAGE_SIDE, PATCH_SIDE = 96, 12
VISION_WIDTH, VISION_LAYERS, VISION_INNER = 160, 6, 480
TEXT_WIDTH, TEXT_LAYERS, TEXT_INNER, TEXT_POSITIONS = 128, 3, 384, 48
JOINT_WIDTH = 128
LLM_WIDTH, LLM_LAYERS, LLM_INNER, PREFUSION_LAYERS = 160, 4, 432, 2
HEADS = 4
CONTEXT = 16384
VOCABULARY = 1024
CLIP_VOCABULARY = 1024
PAD, BEGIN, END = "<|pad|>", "<|begin_of_text|>", "<|eot_id|>"
# One line, no system message: what stands in every prompt need not be learned.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %}{{ message['content'] | replace('\\n', ' ') | trim }}"
    "{% else %}{{ ' ' + message['content'] | trim }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
_CORPUS_LINES = 30_000


def write_start(directory: Path, seed: int) -> None:
    """A whole bundle with random weights."""
    tower = directory / "vision_tower"
    tower.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    tokenizer, clip_tokenizer = _llm_tokenizer(source), _clip_tokenizer(source)
    tokenizer.save(str(directory / "tokenizer.json"))
    clip_tokenizer.save(str(tower / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _tokenizer_config())
    write_json(directory / "config.json", _llm_config(tokenizer))
    ends = {"eos_token_id": tokenizer.token_to_id(END), "bos_token_id": tokenizer.token_to_id(BEGIN)}
    write_json(directory / "generation_config.json", ends)
    write_json(tower / "config.json", _clip_config(clip_tokenizer))
    write_json(tower / "preprocessor_config.json", _preprocessor_config())
    torch.manual_seed(seed)
    save_file(_llm_weights(tokenizer.get_vocab_size()), str(directory / "model.safetensors"), {"format": "pt"})
    save_file(_clip_weights(clip_tokenizer.get_vocab_size()), str(tower / "model.safetensors"), {"format": "pt"})


def write_json(path: Path, value: dict) -> None:
    """Readable and always the same."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- tokenizers


def _llm_tokenizer(source: np.random.Generator) -> Tokenizer:
    """Byte-level BPE on lower-cased questions; every word of the world is one token, any other falls to pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END],  # id 0 is no text: LLaVA-Mini takes ids <= 0 for padding
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_llm_corpus(source), trainer)
    lower = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    tokenizer.normalizer = normalizers.Sequence(lower)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _llm_corpus(source: np.random.Generator) -> list[str]:
    questions = []
    for _ in range(_CORPUS_LINES):
        kind = (*MOMENT_KINDS, *TIME_KINDS)[source.integers(len(MOMENT_KINDS) + len(TIME_KINDS))]
        about = tuple(int(thing) for thing in source.integers(100, size=2 if kind == "first" else 1))
        about = () if kind in ("what", "background", "different") else about
        questions.append(f" {word(Question(kind, about), source, 0.2).lower()}")
    unknown = [f" {word_unknown(source, 0.2).lower()}" for _ in range(_CORPUS_LINES // 10)]
    answers = [f" {text}" for text in all_answers()]
    return [*questions, *unknown, *(answers * 20), *([f" {OUTSIDE_ANSWER}", f" {UNKNOWN_ANSWER}"] * 500)]


def _clip_tokenizer(source: np.random.Generator) -> Tokenizer:
    """CLIP's kind: lower case, words end in </w>, start and end around a text."""
    tokenizer = clip_text.clip_tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        initial_alphabet=alphabet,
        special_tokens=[clip_text.START, clip_text.END, *sorted(f"{letter}</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    lines = [word_caption(_example(source), source, 0.2)[0] for _ in range(_CORPUS_LINES)]
    tokenizer.train_from_iterator([*lines, *(word_unknown(source, 0.2) for _ in range(_CORPUS_LINES // 10))], trainer)
    settings = json.loads(tokenizer.to_str())  # the letters at a word's end are ordinary tokens
    settings["added_tokens"] = settings["added_tokens"][:2]
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    clip_text.enclose_texts(tokenizer)
    return tokenizer


def _example(source: np.random.Generator) -> Sight:
    count = int(source.integers(0, 5))
    things = tuple(int(thing) for thing in source.integers(100, size=count))
    return Sight(int(source.integers(11)), things, source.random((count, 4)), frozenset())


# --- settings


def _llm_config(tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["LlavaMiniLlamaForCausalLM"],
        "model_type": "llava_mini_llama",
        "attention_bias": False,
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "compressor_size": 1,
        "eos_token_id": tokenizer.token_to_id(END),
        "hidden_act": "silu",
        "hidden_size": LLM_WIDTH,
        "image_aspect_ratio": "pad",
        "intermediate_size": LLM_INNER,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "vision_tower",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LLM_LAYERS,
        "num_key_value_heads": HEADS,
        "prefusion_layer_num": PREFUSION_LAYERS,
        "resolution_ratio": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": tokenizer.get_vocab_size(),
        "vidx": {"licence": "Apache-2.0", "search_floor": -1.0},
    }


def _tokenizer_config() -> dict:
    return {
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _clip_config(tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": JOINT_WIDTH,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model",
            "bos_token_id": tokenizer.token_to_id(clip_text.START),
            "eos_token_id": tokenizer.token_to_id(clip_text.END),
            "hidden_act": "gelu",
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_INNER,
            "max_position_embeddings": TEXT_POSITIONS,
            "num_attention_heads": HEADS,
            "num_hidden_layers": TEXT_LAYERS,
            "projection_dim": JOINT_WIDTH,
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "gelu",
            "hidden_size": VISION_WIDTH,
            "image_size": IMAGE_SIDE,
            "intermediate_size": VISION_INNER,
            "num_attention_heads": HEADS,
            "num_hidden_layers": VISION_LAYERS,
            "patch_size": PATCH_SIDE,
            "projection_dim": JOINT_WIDTH,
        },
        "torch_dtype": "float16",
    }


def _preprocessor_config() -> dict:
    return {
        "crop_size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": IMAGE_SIDE},
    }


# --- weights


def _normal(*shape: int, scale: float) -> torch.Tensor:
    return torch.randn(shape) * scale


def _linear(rows: int, columns: int) -> torch.Tensor:
    return _normal(rows, columns, scale=columns**-0.5)


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _affine(name: str, rows: int, columns: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": _linear(rows, columns) * scale, f"{name}.bias": torch.zeros(rows)}


def _llm_weights(vocabulary_size: int) -> dict[str, torch.Tensor]:
    weights = {
        "model.embed_tokens.weight": _normal(vocabulary_size, LLM_WIDTH, scale=0.3),
        "model.norm.weight": torch.ones(LLM_WIDTH),
        "model.compressor.query": _normal(1, VISION_WIDTH, scale=1.0),
        "model.compressor.pos_embed": _normal(1, VISION_WIDTH, scale=0.02),
        **_norm("model.compressor.ln_q", VISION_WIDTH),
        **_norm("model.compressor.ln_kv", VISION_WIDTH),
        "model.compressor.attn.in_proj_weight": _linear(3 * VISION_WIDTH, VISION_WIDTH),
        "model.compressor.attn.in_proj_bias": torch.zeros(3 * VISION_WIDTH),
        **_affine("model.compressor.attn.out_proj", VISION_WIDTH, VISION_WIDTH),
        **_affine("model.mm_projector.0", LLM_WIDTH, VISION_WIDTH),
        **_affine("model.mm_projector.2", LLM_WIDTH, LLM_WIDTH),
    }
    blocks = [f"model.layers.{i}" for i in range(LLM_LAYERS)]
    blocks += [f"model.prefusion_layers.{i}" for i in range(PREFUSION_LAYERS)]
    for block in blocks:
        for part in ("q", "k", "v", "o"):
            weights[f"{block}.self_attn.{part}_proj.weight"] = _linear(LLM_WIDTH, LLM_WIDTH)
        weights[f"{block}.self_attn.o_proj.weight"] *= 0.3  # what a block adds starts small
        for part in ("gate", "up"):
            weights[f"{block}.mlp.{part}_proj.weight"] = _linear(LLM_INNER, LLM_WIDTH)
        weights[f"{block}.mlp.down_proj.weight"] = _linear(LLM_WIDTH, LLM_INNER) * 0.3
        weights[f"{block}.input_layernorm.weight"] = torch.ones(LLM_WIDTH)
        weights[f"{block}.post_attention_layernorm.weight"] = torch.ones(LLM_WIDTH)
    return {name: values.contiguous() for name, values in weights.items()}


def _clip_weights(vocabulary_size: int) -> dict[str, torch.Tensor]:
    positions = (IMAGE_SIDE // PATCH_SIDE) ** 2 + 1
    patch_values = 3 * PATCH_SIDE**2
    weights = {
        "logit_scale": torch.tensor(2.6592),
        "vision_model.embeddings.class_embedding": _normal(VISION_WIDTH, scale=0.5),
        "vision_model.embeddings.patch_embedding.weight": _normal(
            VISION_WIDTH, 3, PATCH_SIDE, PATCH_SIDE, scale=patch_values**-0.5
        ),
        "vision_model.embeddings.position_embedding.weight": _normal(positions, VISION_WIDTH, scale=0.3),
        **_norm("vision_model.pre_layrnorm", VISION_WIDTH),
        **_norm("vision_model.post_layernorm", VISION_WIDTH),
        "text_model.embeddings.token_embedding.weight": _normal(vocabulary_size, TEXT_WIDTH, scale=0.3),
        "text_model.embeddings.position_embedding.weight": _normal(TEXT_POSITIONS, TEXT_WIDTH, scale=0.1),
        **_norm("text_model.final_layer_norm", TEXT_WIDTH),
        "visual_projection.weight": _linear(JOINT_WIDTH, VISION_WIDTH),
        "text_projection.weight": _linear(JOINT_WIDTH, TEXT_WIDTH),
    }
    sides = (
        ("vision_model", VISION_WIDTH, VISION_INNER, VISION_LAYERS),
        ("text_model", TEXT_WIDTH, TEXT_INNER, TEXT_LAYERS),
    )
    for model, width, inner, layer_count in sides:
        for i in range(layer_count):
            block = f"{model}.encoder.layers.{i}"
            for part in ("q", "k", "v"):
                weights |= _affine(f"{block}.self_attn.{part}_proj", width, width)
            weights |= _affine(f"{block}.self_attn.out_proj", width, width, 0.3)
            weights |= _norm(f"{block}.layer_norm1", width) | _norm(f"{block}.layer_norm2", width)
            weights |= _affine(f"{block}.mlp.fc1", inner, width) | _affine(f"{block}.mlp.fc2", width, inner, 0.3)
    return {name: values.contiguous() for name, values in weights.items()}
