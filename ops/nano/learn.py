"""nano in training: the product's own layers, with gradients, on packed questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import CLIPConfig, CLIPTextModelWithProjection

from ops.nano.batches import IGNORED, MOST_FRAMES, PADDING_SEGMENT, PREFIX_SEGMENT, Batch
from ops.nano.pictograms import THINGS
from ops.nano.questions import NOTHING, SIDES
from ops.nano.scenes import COLOURS
from ops.nano.tables import SOURCES
from workers.llm.engine import ModelOptions
from workers.llm.model import LlavaMini, load_model
from workers.models.bundle import find_bundle
from workers.models.checkpoint import read_json
from workers.vision.clip_vision import pixel_values
from workers.vision.encode import FrameFeatures, frame_features
from workers.vision.llava_mini import fold
from workers.vision.prefusion import block_rows, prefuse_vision
from workers.vision.visionzip import keep_patches

EXACT, PATCHES, TOKENS = SOURCES
_PLACES = (("top", "middle", "bottom"), ("left", "middle", "right"))


class PlainAttention(TorchFunctionMode):
    """While it is entered, attention is two products and a softmax.

    On CPUs the backward pass of that takes a quarter of the time of the fused one's in bfloat16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Stands in for scaled_dot_product_attention, and lets everything else pass."""
        if function is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    scores = queries @ keys.mT * (scale or queries.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(dim=-1).to(values.dtype) @ values


@dataclass(frozen=True)
class Answered:
    """What the forward pass of B groups of T frames with questions gives.

    Attributes:
        logits: (labels, V), of the LLM at every labelled place, in the order of `Batch.labels`' rows.
        fused: (B, R, H), the fused text.
        frames: (B, T, H), the frames' rows in the middle of the LLM. words: (B, M, H), those of the words.
    """

    logits: Tensor
    fused: Tensor
    frames: Tensor
    words: Tensor


class Learner(nn.Module):
    """Every weight of a bundle, trainable, and the forward passes that its losses need."""

    def __init__(self, directory: Path, device: str):
        super().__init__()
        self.model: LlavaMini = load_model(find_bundle(str(directory)), ModelOptions(device, "float32"))
        vision = self.model.vision
        self.parts = nn.ModuleDict(
            {
                "tower": vision.tower,
                "compressor": vision.compressor.module,
                "projector": vision.projector,
                "prefusion": vision.prefusion,
                "llm": self.model.llm,
            }
        )
        tower = load_file(directory / "vision_tower" / "model.safetensors")
        config = CLIPConfig(**read_json(directory / "vision_tower" / "config.json")).text_config
        self.text = CLIPTextModelWithProjection(config).to(vision.device)
        wanted = {name: values.float() for name, values in tower.items() if name.startswith("text_")}
        self.text.load_state_dict(wanted, strict=True)
        self.logit_scale = nn.Parameter(tower["logit_scale"].float().to(vision.device))
        self.register_buffer("word_ids", self._one_token_each((*(thing.word for thing in THINGS), *COLOURS)))
        self.register_buffer("place_ids", torch.stack([self._one_token_each(words) for words in _PLACES]))
        width = self.model.llm.config.hidden_size
        self.beside = nn.Linear(width, len(SIDES) * width, bias=False, device=vision.device)  # for training alone
        self.when = nn.Linear(width, MOST_FRAMES, device=vision.device)  # for training alone
        self.register_buffer("nothing_id", self._one_token_each([NOTHING]))
        self.requires_grad_(True)
        self.train()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    def _one_token_each(self, words: Sequence[str]) -> Tensor:
        ids = [self.model.tokenizer.tokenizer.encode(f" {word}").ids for word in words]
        if any(len(tokens) != 1 for tokens in ids):
            raise ValueError(f"not one token each: {', '.join(words)}")
        return torch.tensor(ids, device=self.device)[:, 0]

    # --- forward

    def see(self, pixels: np.ndarray) -> FrameFeatures:
        """Tower and compressor, (T, S, S, 3) uint8 in."""
        vision = self._vision()
        pictures = pixel_values(pixels[:, None], vision.bundle.pictures, vision.device, vision.dtype)
        return frame_features(vision, pictures)

    def naming_loss(self, features: FrameFeatures, patch_words: np.ndarray) -> Tensor:
        """Projected patches against the LLM's embeddings of the words for what covers them."""
        rows = self.parts["projector"](features.patches).flatten(0, 1)
        wanted = torch.from_numpy(patch_words).to(self.device).flatten()
        embeddings = self.model.llm.model.embed_tokens.weight[self.word_ids]
        return functional.cross_entropy((rows @ embeddings.T).float(), wanted, ignore_index=IGNORED)

    def beside_loss(self, features: FrameFeatures, neighbours: np.ndarray) -> Tensor:
        """Projected patches, a linear map for each side, against the words for what is on that side."""
        rows = self.parts["projector"](features.patches).flatten(0, 1)  # (T*N, H)
        wanted = torch.from_numpy(neighbours).to(self.device).flatten(0, 1)  # (T*N, 4)
        known = (wanted != IGNORED).any(dim=1)
        sides = _products(rows[known], self.beside.weight).unflatten(1, (len(SIDES), -1))  # (K, 4, H)
        ids = torch.cat([self.word_ids[: len(THINGS)], self.nothing_id])
        logits = _products(sides, self.model.llm.model.embed_tokens.weight[ids])
        return functional.cross_entropy(logits.flatten(0, 1), wanted[known].flatten(), ignore_index=IGNORED)

    def placing_loss(self, features: FrameFeatures) -> Tensor:
        """Projected patches against the embeddings of the words for their place: top ... bottom and left ... right."""
        rows = self.parts["projector"](features.patches)  # (T, N, H)
        side = round(rows.shape[1] ** 0.5)
        thirds = (2 * torch.arange(side, device=self.device) + 1) * 3 // (2 * side)  # (side,), each in 0..2
        embeddings = self.model.llm.model.embed_tokens.weight[self.place_ids]  # (2, 3, H)
        logits = torch.einsum("tnh,awh->atnw", rows, embeddings)  # (2, T, N, 3)
        wanted = torch.stack([thirds.repeat_interleave(side), thirds.repeat(side)])  # (2, N)
        return functional.cross_entropy(logits.float().movedim(-1, 1), wanted[:, None].expand(-1, len(rows), -1))

    def telling_loss(self, features: FrameFeatures, frame_words: np.ndarray) -> Tensor:
        """Vision tokens, compressed and fused, against the embeddings of the words for everything in sight."""
        vision = self._vision()
        wanted = torch.from_numpy(frame_words).to(self.device).float()  # (T, W)
        shares = wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1)
        compressed = vision.projector(features.compressed)  # (T, 1, H)
        fused = prefuse_vision(vision, vision.projector(features.patches), compressed)
        embeddings = self.model.llm.model.embed_tokens.weight[self.word_ids]
        chances = (torch.stack([compressed, fused])[:, :, 0] @ embeddings.T).float().log_softmax(dim=-1)  # (2, T, W)
        return -(chances * shares).sum() / (2 * shares.sum())

    def caption_loss(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """CLIP's loss where several pictures may fit a text and several texts a picture (truth as targets)."""
        ids = torch.from_numpy(batch.caption_ids).to(self.device)
        texts = functional.normalize(self.text(input_ids=ids).text_embeds.float(), dim=-1)
        with torch.autocast(self.device.type, enabled=False):  # cosines that are then scaled up
            scores = texts @ features.tower.search_key.float().T * self.logit_scale.clamp(max=4.6).exp()  # (C, B)
        truth = torch.from_numpy(batch.truth).to(self.device).float()
        losses = []
        for logits, fits in ((scores, truth), (scores.T, truth.T)):
            some = fits.sum(dim=1) > 0
            chances = logits[some].log_softmax(dim=1)
            losses.append(-((chances * fits[some]).sum(dim=1) / fits[some].sum(dim=1)).mean())
        return sum(losses) / 2

    def early_loss(self, fused: Tensor, batch: Batch) -> Tensor:
        """A fused word for a thing against the embedding of the word that answers the question about it."""
        wanted = torch.from_numpy(batch.text_answers).to(self.device)  # (B, R)
        known = wanted != IGNORED
        logits = _products(fused[known], self.model.llm.model.embed_tokens.weight)
        return functional.cross_entropy(logits, wanted[known])

    def pointing_loss(self, fused: Tensor, batch: Batch) -> Tensor:
        """A fused word for a thing against the embeddings of the words for the thing's place.

        Args:
            fused: (B, R, H), as `answers` gives it.
        """
        wanted = torch.from_numpy(batch.text_places).to(self.device)  # (B, R, 2)
        known = wanted[..., 0] != IGNORED
        embeddings = self.model.llm.model.embed_tokens.weight[self.place_ids]  # (2, 3, H)
        logits = _products(fused[known], embeddings.flatten(0, 1)).unflatten(-1, embeddings.shape[:2])
        return functional.cross_entropy(logits.flatten(0, 1), wanted[known].flatten())

    def timing_loss(self, answered: Answered, batch: Batch) -> Tensor:
        """In the middle of the LLM: frames against their rank, words for things against the first that shows them."""
        ranks = torch.arange(batch.frames, device=self.device).expand(answered.frames.shape[:2])
        wanted = torch.from_numpy(batch.first_frames).to(self.device)  # (B, M)
        rows = torch.cat([answered.frames.flatten(0, 1), answered.words[wanted != IGNORED]])
        logits = _products(rows, self.when.weight) + self.when.bias
        return functional.cross_entropy(logits, torch.cat([ranks.flatten(), wanted[wanted != IGNORED]]))

    def news_loss(self, answered: Answered, batch: Batch) -> Tensor:
        """In the middle of the LLM: frames against the words for what no frame before them shows."""
        wanted = torch.from_numpy(batch.news).to(self.device).float()  # (B, T, things + 1)
        known = wanted.sum(dim=-1) > 0
        ids = torch.cat([self.word_ids[: len(THINGS)], self.nothing_id])
        logits = _products(answered.frames[known], self.model.llm.model.embed_tokens.weight[ids])
        shares = wanted[known] / wanted[known].sum(dim=-1, keepdim=True)
        return functional.cross_entropy(logits, shares)

    def answers(self, features: FrameFeatures, batch: Batch, sources: dict[str, slice], rows: int) -> Answered:
        """Every question of a batch, put to pre-fusion and to the LLM.

        Args:
            sources: which groups are asked with which source of pre-fusion; together all of them, in order.
            rows: of the patch tier, per picture.
        """
        outputs = [self._ask(features, batch, source, groups, rows) for source, groups in sources.items()]
        return Answered(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))

    def _ask(self, features: FrameFeatures, batch: Batch, source: str, groups: slice, rows: int) -> tuple[Tensor, ...]:
        vision, count = self._vision(), batch.frames
        part = slice(groups.start * count, groups.stop * count)
        text = {
            name: torch.from_numpy(getattr(batch, name)[groups]).to(self.device)
            for name in ("text_ids", "text_segments", "text_positions")
        }
        compressed = vision.projector(features.compressed[part])  # (T, 1, H)
        projected = vision.projector(features.patches[part])  # (T, N, H)
        grid = projected.shape[1]
        embedded = self.model.llm.model.embed_tokens(text["text_ids"]).repeat_interleave(count, dim=0)  # (T, R, H)
        if source == EXACT:
            first, places = projected, torch.arange(grid, device=self.device).expand(len(projected), -1)
        elif source == PATCHES:
            first, places = self._stored_patches(features, part, rows)
            first = vision.projector(first)
        else:
            first, places = projected[:, :0], torch.empty(len(projected), 0, dtype=torch.int64, device=self.device)
        positions = grid + 1 + text["text_positions"].repeat_interleave(count, dim=0)
        positions = torch.cat([places, torch.full_like(positions[:, :1], grid), positions], dim=1)
        segments = text["text_segments"].repeat_interleave(count, dim=0)
        segments = functional.pad(segments, (first.shape[1] + 1, 0), value=PREFIX_SEGMENT)
        sequence = torch.cat([first, compressed, embedded], dim=1)
        rotary = vision.rotary(sequence, positions)
        allowed = block_mask(segments)
        kept = 1 + embedded.shape[1]
        for block in vision.prefusion[:-1]:
            sequence = block_rows(block, sequence, rotary, sequence.shape[1], allowed)
        sequence = block_rows(vision.prefusion[-1], sequence, rotary, kept, allowed[:, :, -kept:])
        tokens = sequence[:, :1] if source == EXACT else prefuse_vision(vision, projected, compressed)
        fused = sequence[:, 1:].unflatten(0, (-1, count)).mean(dim=1)  # (B, R, H)
        return self._answer(batch, groups, tokens.unflatten(0, (-1, count)).flatten(1, 2), fused)

    def _answer(self, batch: Batch, groups: slice, tokens: Tensor, fused: Tensor) -> tuple[Tensor, ...]:
        names = ("llm_rows", "llm_ids", "llm_segments", "llm_positions", "labels")
        rows, ids, segments, positions, labels = (
            torch.from_numpy(getattr(batch, name)[groups]).to(self.device) for name in names
        )
        raw = self.model.llm.model.embed_tokens(ids)
        taken = fused.gather(1, rows.clamp(min=0)[..., None].expand_as(raw))
        words = torch.where((rows >= 0)[..., None], taken, raw)
        sequence = torch.cat([fused[:, :1], tokens, words], dim=1)  # (B, 1 + T + M, H)
        front = 1 + tokens.shape[1]
        segments = functional.pad(segments, (front, 0), value=PREFIX_SEGMENT)
        places = torch.arange(front, device=self.device).expand(len(sequence), -1)
        rotary = self.model.vision.rotary(sequence, torch.cat([places, positions], dim=1))
        allowed = block_mask(segments)
        depths = []
        for block in self.model.llm.model.layers:
            sequence = block_rows(block, sequence, rotary, sequence.shape[1], allowed)
            depths.append(sequence)
        said = self.model.llm.model.norm(sequence[:, front:][labels != IGNORED])
        logits = _products(said, self.model.llm.lm_head.weight)
        middle = len(depths) // 2
        return logits, fused, depths[middle - 1][:, 1:front], depths[middle][:, front:]

    def _stored_patches(self, features: FrameFeatures, part: slice, rows: int) -> tuple[Tensor, Tensor]:
        """The patch tier as it comes back from an archive: VisionZip's rows after int8."""
        tower = features.tower
        piece = replace(tower, hidden=tower.hidden[part], class_query=tower.class_query[part], keys=tower.keys[part])
        values, places = keep_patches(piece, rows)
        scales = values.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (values.detach() / scales).round() * scales
        return values + (rounded - values.detach()), places

    def _vision(self):
        vision = self.model.vision
        return replace(vision, compressor=fold(vision.compressor.module, vision.bundle.patches_per_frame))

    # --- files

    def save(self, directory: Path) -> None:
        """Writes the weights, float16, in the published layout."""
        llm = self.model.llm.state_dict()
        llm.pop("lm_head.weight")  # tied
        names = {
            "model.compressor.": "compressor",
            "model.mm_projector.": "projector",
            "model.prefusion_layers.": "prefusion",
        }
        for prefix, part in names.items():
            llm |= {f"{prefix}{name}": values for name, values in self.parts[part].state_dict().items()}
        tower = dict(self.parts["tower"].state_dict()) | dict(self.text.state_dict())
        tower["logit_scale"] = self.logit_scale.data
        tower = {name: values for name, values in tower.items() if not name.endswith("position_ids")}
        for path, tensors in ((directory, llm), (directory / "vision_tower", tower)):
            halves = {name: values.detach().cpu().half().contiguous() for name, values in tensors.items()}
            save_file(halves, str(path / "model.safetensors"), {"format": "pt"})
            (path / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """(..., H) and (W, H) to (..., W) in float32, where the number of rows differs from batch to batch.

    On CPUs the kernels for bfloat16 are compiled anew for each shape, which takes longer than these products.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ weights.float().T


def block_mask(segments: Tensor) -> Tensor:
    """Causal, and each row sees its own segment and the prefix alone: (B, S) -> (B, 1, S, S) bool."""
    same = segments[:, :, None] == segments[:, None, :]
    prefix = (segments == PREFIX_SEGMENT)[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (
        (same | prefix) & causal & (segments != PADDING_SEGMENT)[:, None, :]
        | torch.eye(length, dtype=torch.bool, device=segments.device)
    )[:, None]


class Scores:
    """Questions asked and rightly answered, by kind."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def add(self, kind: str, is_right: bool) -> None:
        """Counts one."""
        self.asked[kind] += 1
        self.right[kind] += is_right

    def text(self) -> str:
        """In one line, per cent."""
        whole = 100 * self.right.total() / max(1, self.asked.total())
        kinds = sorted(self.asked)
        return f"all {whole:.1f} | " + " ".join(f"{k} {100 * self.right[k] / self.asked[k]:.0f}" for k in kinds)


def score(batch: Batch, logits: Tensor, groups: slice, scores: Scores) -> None:
    """Counts whole answers: right if every one of their words is the likeliest after those before it."""
    labels, segments = batch.labels[groups], batch.llm_segments[groups]
    hits = (logits.argmax(dim=-1).cpu().numpy() == labels[labels != IGNORED]).astype(bool)
    group, column = np.nonzero(labels != IGNORED)
    numbers = segments[group, column]
    for g in range(labels.shape[0]):
        for number, (question, _, _) in enumerate(batch.questions[groups][g], 1):
            scores.add(question.kind, bool(hits[(group == g) & (numbers == number)].all()))
