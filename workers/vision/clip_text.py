"""Search keys of texts: CLIP's text tower, in numpy.

transformers is not used because `vidx search` may take one second in all, and importing torch takes longer. Results
equal those of transformers' CLIPTextModelWithProjection within 1e-5. Source: CLIP (arXiv 2103.00020), section 2.4.
"""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from storage.errors import UsageError
from workers.models.bundle import Bundle, sub_config
from workers.models.checkpoint import TensorEntry, list_tensors, read_float32

_DEFAULTS = {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class TextEncoder:
    """A bundle's CLIP text tower and tokenizer.

    Raises:
        UsageError: the bundle has no text tower, or the tower is not a CLIP's.
    """

    def __init__(self, bundle: Bundle):
        if not bundle.has_text_search:
            raise UsageError(
                f"{bundle.name}: its vision tower {bundle.tower_directory} has no text tower, joint projection or "
                "tokenizer, so frames cannot be searched by text; use a model whose mm_vision_tower is a full CLIP"
            )
        self._tower = TextTower(bundle.tower_directory, sub_config(bundle.tower, "text_config"))
        self._tokenizer = load_clip_tokenizer(bundle.tower_directory)

    def embed(self, text: str) -> np.ndarray:
        """The search key of a text: (E,) float32, L2-normalised; the end of a text that is too long is ignored."""
        ids = self._tokenizer.encode(text).ids
        most = self._tower.position_count
        if len(ids) > most:
            ids = [*ids[: most - 1], ids[-1]]  # the end token stays, as in transformers
        return self._tower.embed_ids(ids)


class TextTower:
    """The weights and settings of a text tower; weights are mapped from its files.

    Attributes:
        position_count: the most ids of a text.
    """

    def __init__(self, directory: Path, settings: dict):
        settings = _DEFAULTS | settings
        self._directory = directory
        self._tensors = list_tensors(directory)
        self._heads = settings["num_attention_heads"]
        self._epsilon = settings["layer_norm_eps"]
        self._end_id = settings["eos_token_id"]
        if settings["hidden_act"] not in _ACTIVATIONS:
            allowed = ", ".join(_ACTIVATIONS)
            raise UsageError(
                f"{directory}: hidden_act of the text is {settings['hidden_act']!r}; allowed are {allowed}"
            )
        self._activation = _ACTIVATIONS[settings["hidden_act"]]
        positions = self._entry("text_model.embeddings.position_embedding.weight")
        self.position_count, self._width = positions.shape
        names = {key.split(".")[3] for key in self._tensors if key.startswith("text_model.encoder.layers.")}
        self._layer_count = settings.get("num_hidden_layers", len(names))
        self._check_shapes(settings.get("intermediate_size"))

    def embed_ids(self, ids: list[int]) -> np.ndarray:
        """The joint embedding of ids, including start and end token: (E,) float32, L2-normalised, or zeros."""
        embeddings = self._entry("text_model.embeddings.token_embedding.weight")
        if not ids or not 0 <= min(ids) <= max(ids) < embeddings.shape[0]:
            raise UsageError(
                f"{self._directory}: the tokenizer gives ids outside of 0 to {embeddings.shape[0] - 1}; tokenizer and "
                "weights must belong together"
            )
        places = self._entry("text_model.embeddings.position_embedding.weight")
        hidden = read_float32(embeddings, ids) + read_float32(places, range(len(ids)))  # (L, D)
        for layer in range(self._layer_count):
            hidden = self._layer(hidden, f"text_model.encoder.layers.{layer}")
        pooled = self._norm(hidden[self._end_position(ids)], "text_model.final_layer_norm")  # (D,)
        key = self._weight("text_projection.weight") @ pooled  # (E,)
        length = np.linalg.norm(key)
        return key / length if length else key

    def _check_shapes(self, inner: int | None) -> None:
        """Raises UsageError if a key of the text tower is missing, extra, or of another shape."""
        width = self._width
        inner = inner or self._entry("text_model.encoder.layers.0.mlp.fc1.bias").shape[0]
        vocabulary_size = self._entry("text_model.embeddings.token_embedding.weight").shape[0]
        layer: dict[str, tuple[int, ...]] = {
            f"self_attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")
        }
        layer |= {f"self_attn.{part}_proj.bias": (width,) for part in ("q", "k", "v", "out")}
        layer |= {f"layer_norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
        layer |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
        layer |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
        wanted = {
            "text_model.embeddings.position_embedding.weight": (self.position_count, width),
            "text_model.embeddings.token_embedding.weight": (vocabulary_size, width),
            "text_model.final_layer_norm.weight": (width,),
            "text_model.final_layer_norm.bias": (width,),
        }
        for i in range(self._layer_count):
            wanted |= {f"text_model.encoder.layers.{i}.{key}": shape for key, shape in layer.items()}
        for name, shape in wanted.items():
            if self._entry(name).shape != shape:
                raise UsageError(
                    f"{self._directory}: {name} has shape {self._entry(name).shape}, config.json asks for {shape}"
                )
        for name in self._tensors:
            if name.startswith("text_model.") and name not in wanted and not name.endswith(".position_ids"):
                raise UsageError(f"{self._directory}: {name} is one key too many; config.json and weights must agree")

    def _end_position(self, ids: list[int]) -> int:
        """The place of the end token.

        Old configs say eos_token_id 2, which CLIP tokenizers never give. Then the highest id is the end token
        (transformers pull request 24773).
        """
        if self._end_id == 2:
            return int(np.argmax(ids))
        if self._end_id not in ids:
            raise UsageError(
                f"{self._directory}: the tokenizer does not end a text with eos_token_id {self._end_id}; tokenizer and "
                "config.json must belong together"
            )
        return ids.index(self._end_id)

    def _layer(self, hidden: np.ndarray, name: str) -> np.ndarray:
        """One causal transformer layer: (L, D) -> (L, D)."""
        normed = self._norm(hidden, f"{name}.layer_norm1")
        queries, keys, values = (
            self._linear(normed, f"{name}.self_attn.{part}_proj")
            .reshape(len(hidden), self._heads, -1)  # (L, heads, D / heads)
            .swapaxes(0, 1)  # (heads, L, D / heads)
            for part in "qkv"
        )
        logits = queries @ keys.swapaxes(1, 2) * np.float32(queries.shape[-1] ** -0.5)  # (heads, L, L)
        logits[:, ~np.tri(len(hidden), dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        attended = weights / weights.sum(axis=-1, keepdims=True) @ values  # (heads, L, D / heads)
        attended = attended.swapaxes(0, 1).reshape(len(hidden), self._width)  # (L, D)
        hidden = hidden + self._linear(attended, f"{name}.self_attn.out_proj")
        inner = self._activation(self._linear(self._norm(hidden, f"{name}.layer_norm2"), f"{name}.mlp.fc1"))
        return hidden + self._linear(inner, f"{name}.mlp.fc2")

    def _linear(self, rows: np.ndarray, name: str) -> np.ndarray:
        return rows @ self._weight(f"{name}.weight").T + self._weight(f"{name}.bias")

    def _norm(self, rows: np.ndarray, name: str) -> np.ndarray:
        centred = rows - rows.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self._epsilon))
        return centred / scale * self._weight(f"{name}.weight") + self._weight(f"{name}.bias")

    def _weight(self, name: str) -> np.ndarray:
        return read_float32(self._entry(name))

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._tensors:
            raise UsageError(f"{self._directory}: {name} is missing; the text tower needs it")
        return self._tensors[name]


def load_clip_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from tokenizer.json, or built from vocab.json and merges.txt.

    Raises:
        UsageError: neither can be read.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else _from_vocabulary(directory)
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{directory}: no usable CLIP tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_vocabulary(directory: Path) -> tokenizers.Tokenizer:
    """A tokenizer from vocab.json and merges.txt, built as transformers' converter for CLIP does."""
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#version"))
    merges = [(first, second) for first, second in pairs]
    model = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    tokenizer = clip_tokenizer(model)
    enclose_texts(tokenizer)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def clip_tokenizer(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer that normalises and splits texts as CLIP's does."""
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def enclose_texts(tokenizer: tokenizers.Tokenizer) -> None:
    """Makes a tokenizer put CLIP's start and end tokens around every text."""
    ids = tokenizer.get_vocab()
    end, start = ((token, ids[token]) for token in (END, START))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)


def _quick_gelu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(np.float32(-1.702) * values))


def _gelu(values: np.ndarray) -> np.ndarray:
    """GELU with erf, which numpy lacks: Abramowitz and Stegun 7.1.26, with an error of at most 1.5e-7."""
    size = np.abs(values.astype(np.float64)) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(values) * (1 - series * np.exp(-size * size))
    return (0.5 * values * (1 + erf)).astype(np.float32)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}
