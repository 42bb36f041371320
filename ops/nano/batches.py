"""Batches: frames, packed questions with their answers, and captions. A batch follows from its phase and step alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ops.nano.captions import CASUAL, Claim, question_caption, truth_table, word_caption
from ops.nano.data import SLIDES, WINDOWS, Pool, Shard
from ops.nano.layout import BEGIN, END
from ops.nano.pictograms import THINGS
from ops.nano.questions import (
    NOWHERE,
    OUTSIDE_ANSWER,
    SIDES,
    UNKNOWN,
    UNKNOWN_ANSWER,
    Question,
    beside,
    moment_questions,
    time_questions,
    word,
)
from ops.nano.scenes import COLOURS, OUTSIDE, Sight
from ops.nano.unknown import unknown_caption, word_unknown

IGNORED = -100  # as torch's cross entropy has it
UNKNOWN_CAPTIONS = 8  # so many captions that are true of a picture to one that is true of none
PREFIX_SEGMENT, PADDING_SEGMENT = 0, -1
MOST_FRAMES = 16  # of a group
LENGTH_STEP = 8  # texts are padded to a multiple of it: libraries compile a kernel for every shape that they meet
EARLY_KINDS = ("exists", "ever", "count", "left", "right", "above", "below")  # one word says the answer


@dataclass(frozen=True)
class BatchPlan:
    """What a batch of a phase holds.

    Attributes:
        groups: questions are about groups of frames.
        frames: per group, drawn anew for each batch.
        questions: per group.
        captions: per group; only where a group is one frame.
        question_captions: share of the captions that are questions.
        hard: whether more of the questions are of the kinds that are learned last.
    """

    groups: int
    frames: tuple[int, ...] = (1,)
    questions: int = 6
    captions: int = 1
    question_captions: float = 0.0
    hard: bool = False


@dataclass(repr=False)
class Batch:
    """Arrays of a batch of B groups of T frames.

    Attributes:
        pixels: (B*T, S, S, 3) uint8.
        patch_words: (B*T, N) int64, index into things + colours of what covers each patch, or IGNORED.
        neighbours: (B*T, N, 4) int64, the thing beside the one that covers a patch, on each of SIDES; len(THINGS) where
            nothing is, IGNORED where no single thing covers it or the truth is not clear.
        frame_words: (B*T, things + colours) bool, what is in sight; nothing where that is not clear.
        frames: T.
        text_ids, text_segments, text_positions: (B, R), the prompts' words after the begin token at 0; a segment is a
            question's number from 1 on, 0 what all of them see, -1 padding.
        text_places: (B, R, 2) int64, of a word for a thing that a single frame shows once: the third of the picture's
            height and of its width that it is in, 0 to 2; IGNORED elsewhere.
        text_answers: (B, R) int64, of the word for the thing that a question about a single frame names: the token that
            answers it ("yes", "two", "owl"); IGNORED elsewhere.
        llm_rows: (B, M), the row of the fused text that enters the LLM there, or -1 for the raw word in llm_ids.
        llm_ids, llm_segments, llm_positions, labels: (B, M), behind the begin token and the frames.
        first_frames: (B, M) int64, of a word for a thing, the rank of the first of several frames that shows it;
            IGNORED elsewhere. news: (B, T, things + 1) bool, what no frame before shows; the last: nothing.
        questions: of each group, with its words and the answer.
        caption_ids: (C, L), padded with the end id. truth: (C, B*T) bool.
    """

    pixels: np.ndarray
    patch_words: np.ndarray
    neighbours: np.ndarray
    frame_words: np.ndarray
    frames: int
    text_ids: np.ndarray
    text_segments: np.ndarray
    text_positions: np.ndarray
    text_places: np.ndarray
    text_answers: np.ndarray
    llm_rows: np.ndarray
    llm_ids: np.ndarray
    llm_segments: np.ndarray
    llm_positions: np.ndarray
    labels: np.ndarray
    first_frames: np.ndarray
    news: np.ndarray
    questions: list[list[tuple[Question, str, str]]]
    caption_ids: np.ndarray
    truth: np.ndarray


class Batches(Dataset):
    """Batch number i of a phase."""

    def __init__(
        self,
        plans: Sequence[BatchPlan],
        pools: dict[str, Pool],
        bundle_directory: Path,
        seed: int,
        grid: int,
        augment: bool = True,
    ):
        self._plans = plans
        self._pools = pools
        self._directory = bundle_directory
        self._seed = seed
        self._grid = grid
        self._augment = augment
        self._tokenizers: tuple[Tokenizer, Tokenizer, Tokenizer] | None = None

    def __getitem__(self, step: int) -> Batch:
        source = np.random.default_rng([self._seed, step])
        plan = self._plans[step % len(self._plans)]
        frames = int(plan.frames[source.integers(len(plan.frames))])
        groups = [self._group(source, step, frames) for _ in range(plan.groups)]
        pixels = np.concatenate([pixels for pixels, _ in groups])
        if self._augment:
            pixels = shake(source, pixels)
        sights = [sights for _, sights in groups]
        flat = [sight for group in sights for sight in group]
        asked = [self._questions(source, group, plan) for group in sights]
        captions = [_caption(source, sight, plan) for sight in flat for _ in range(plan.captions)]
        captions += [(unknown_caption(source), Claim(never=True)) for _ in range(len(captions) // UNKNOWN_CAPTIONS)]
        covering = np.stack([patch_words(sight, self._grid) for sight in flat])
        return Batch(
            pixels=pixels,
            patch_words=covering,
            neighbours=np.stack([neighbours(*pair) for pair in zip(flat, covering, strict=True)]),
            frame_words=np.stack([frame_words(sight) for sight in flat]),
            frames=frames,
            **self._pack(asked, sights),
            news=np.stack([news(group) for group in sights]),
            questions=asked,
            caption_ids=self._caption_ids([text for text, _ in captions]),
            truth=truth_table([claim for _, claim in captions], flat),
        )

    def _group(self, source: np.random.Generator, step: int, frames: int) -> tuple[np.ndarray, list[Sight]]:
        """Frames of one moment or window; single ones are of either kind of shard, but none half in sight."""
        kind = SLIDES if frames == 1 and source.random() < 0.75 else WINDOWS
        shards = self._pools[kind].at(step)
        while True:
            shard: Shard = shards[source.integers(len(shards))]
            stride = int(source.choice([1, 2, 2, 2, 3, 4]))  # half seconds
            first = int(source.integers(len(shard.sights)))
            chosen = [first + number * stride for number in range(frames)]
            if chosen[-1] >= len(shard.sights) or shard.clip[first] != shard.clip[chosen[-1]]:
                continue
            if frames > 1 and source.random() < 0.06:  # a film of nothing that is known
                return self._outside(source, step, frames)
            sights = [shard.sights[number] for number in chosen]
            if frames > 1 or (not sights[0].partial and sights[0].background is not None):
                return shard.pixels[chosen], sights

    def _outside(self, source: np.random.Generator, step: int, frames: int) -> tuple[np.ndarray, list[Sight]]:
        shards = self._pools[SLIDES].at(step)
        pixels, sights = [], []
        while len(sights) < frames:
            shard = shards[source.integers(len(shards))]
            number = int(source.integers(len(shard.sights)))
            if shard.sights[number].background == OUTSIDE:
                again = 1 if source.random() < 0.5 else frames - len(sights)
                pixels += [shard.pixels[number]] * again
                sights += [shard.sights[number]] * again
        return np.stack(pixels), sights

    def _questions(self, source: np.random.Generator, sights: list[Sight], plan: BatchPlan) -> list:
        """(question, its words, the answer)."""
        of_time = 0 if len(sights) == 1 else max(1, round(plan.questions * 0.65))
        found = moment_questions(source, sights, plan.questions - of_time, plan.hard)
        if of_time:
            found += time_questions(source, sights, of_time, plan.hard)
        if len(sights) == 1 and source.random() < 0.15:  # "ever" of a single frame
            found += [(q, a) for q, a in time_questions(source, sights, 1) if q.kind in ("ever", "different")]
        worded = [(question, word(question, source, CASUAL), answer) for question, answer in found]
        if source.random() < 0.3 or not worded:
            worded.append((Question(UNKNOWN), word_unknown(source, CASUAL), UNKNOWN_ANSWER))
        return worded

    def _pack(self, asked: list, sights: list[list[Sight]]) -> dict[str, np.ndarray]:
        tokenizer, raw, _ = self._load()
        frames = len(sights[0])
        begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        texts, llms = [], []
        for group, seen in zip(asked, sights, strict=True):
            text = [(begin, PREFIX_SEGMENT, 0, *[IGNORED] * 3)]
            llm = []  # row, id, segment, position, label
            for number, (about, question, answer) in enumerate(group, 1):
                places = {self._word_ids[thing]: place for thing, place in _places(about, seen)}
                answers = self._answer_token(about, answer, seen)
                prompt = [*tokenizer.encode(f" {question.strip()}").ids, end]
                reply = raw.encode(f" {answer}").ids
                labels = [*[IGNORED] * (len(prompt) - 1), *reply, end]
                firsts = {self._word_ids[thing]: rank for thing, rank in _first_frames(about, seen)}
                for i, token in enumerate([*prompt, *reply]):
                    row = len(text) if i < len(prompt) else -1
                    first = firsts.get(token, IGNORED) if i < len(prompt) else IGNORED
                    llm.append((row, token, number, 1 + frames + i, labels[i], first))
                    if i < len(prompt):
                        place = places.get(token, (IGNORED, IGNORED))
                        text.append((token, number, 1 + i, *place, answers.get(token, IGNORED)))
            texts.append(text)
            llms.append(llm)
        text = _pad(texts, (0, PADDING_SEGMENT, 0, *[IGNORED] * 3))
        llm = _pad(llms, (-1, 0, PADDING_SEGMENT, 0, IGNORED, IGNORED))
        names = ("llm_rows", "llm_ids", "llm_segments", "llm_positions", "labels", "first_frames")
        packed = dict(
            zip(("text_ids", "text_segments", "text_positions"), np.moveaxis(text[..., :3], -1, 0), strict=True)
        )
        packed |= {"text_places": text[..., 3:5], "text_answers": text[..., 5]}
        return packed | dict(zip(names, np.moveaxis(llm, -1, 0), strict=True))

    def _answer_token(self, question: Question, answer: str, sights: list[Sight]) -> dict[int, int]:
        """The token that says the answer, by the tokens that may stand for the thing which the question names."""
        if len(sights) > 1 or question.kind not in EARLY_KINDS or len(question.about) != 1 or answer == OUTSIDE_ANSWER:
            return {}
        thing = THINGS[question.about[0]]
        _, raw, _ = self._load()
        (said,) = raw.encode(f" {answer.split()[-1]}").ids
        names = [raw.encode(f" {name}").ids for name in (thing.word, thing.plural)]
        return {name[0]: said for name in names if len(name) == 1}

    def _caption_ids(self, texts: list[str]) -> np.ndarray:
        _, _, clip = self._load()
        rows = [encoding.ids for encoding in clip.encode_batch(texts)]
        longest = max((len(row) for row in rows), default=1)
        return np.array([[*row, *[row[-1]] * (longest - len(row))] for row in rows], np.int64).reshape(-1, longest)

    def _load(self) -> tuple[Tokenizer, Tokenizer, Tokenizer]:
        """For prompts, for answers (which keep their case) and for captions."""
        if self._tokenizers is None:
            path = str(self._directory / "tokenizer.json")
            raw = Tokenizer.from_file(path)
            raw.normalizer = None
            clip = Tokenizer.from_file(str(self._directory / "vision_tower" / "tokenizer.json"))
            self._tokenizers = (Tokenizer.from_file(path), raw, clip)
            self._word_ids = [raw.encode(f" {thing.word}").ids[0] for thing in THINGS]
        return self._tokenizers


def _caption(source: np.random.Generator, sight: Sight, plan: BatchPlan) -> tuple[str, Claim]:
    if plan.question_captions and source.random() < plan.question_captions:
        return question_caption(sight, source)
    return word_caption(sight, source, 0.15)


def _places(question: Question, sights: list[Sight]) -> Iterator[tuple[int, tuple[int, int]]]:
    """The things that a question names and a single frame shows once, each with its row and column of three."""
    if len(sights) > 1:
        return
    for thing in question.about:
        if sights[0].things.count(thing) == 1:
            x, y = sights[0].boxes[sights[0].things.index(thing), :2]
            yield thing, (min(2, int(3 * y)), min(2, int(3 * x)))


def _first_frames(question: Question, sights: list[Sight]) -> Iterator[tuple[int, int]]:
    """The things that a question names and several frames show, each with the rank of the first that does."""
    for thing in question.about if len(sights) > 1 else ():
        first = next((rank for rank, sight in enumerate(sights) if thing in sight.things), None)
        if first is not None and not any(thing in sight.partial for sight in sights[:first]):
            yield thing, first


def _pad(rows: list[list[tuple[int, ...]]], filler: tuple[int, ...]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    longest += -longest % LENGTH_STEP
    return np.array([[*row, *[filler] * (longest - len(row))] for row in rows], np.int64)


def patch_words(sight: Sight, grid: int) -> np.ndarray:
    """What covers each patch: a thing's number, len(THINGS) + a colour's where nothing is, IGNORED in between."""
    if sight.background in (None, OUTSIDE) or sight.partial:
        return np.full(grid * grid, IGNORED)
    words = np.full((grid, grid), len(THINGS) + sight.background)
    edges = np.arange(grid + 1) / grid
    for thing, (x, y, width, height) in zip(sight.things, sight.boxes, strict=True):
        across, down = (
            np.clip(np.minimum(edges[1:], place + size / 2) - np.maximum(edges[:-1], place - size / 2), 0, None) * grid
            for place, size in ((x, width), (y, height))
        )
        covered = down[:, None] * across[None]
        words[(covered > 0) & (covered < 0.5)] = IGNORED
        words[covered >= 0.5] = thing
    assert len(COLOURS) + len(THINGS) > words.max()
    return words.reshape(-1)


def neighbours(sight: Sight, covering: np.ndarray) -> np.ndarray:
    """What is beside the thing that covers each patch, (N, 4); as Batch has it."""
    found = np.full((len(covering), len(SIDES)), IGNORED)
    for thing in set(sight.things):
        if sight.things.count(thing) == 1:
            there = [beside(side, thing, sight) for side in SIDES]
            words = [IGNORED if other is None else len(THINGS) if other == NOWHERE else other for other in there]
            found[covering == thing] = words
    return found


def frame_words(sight: Sight) -> np.ndarray:
    """Which things and which colour of background are in sight, (things + colours,) bool; nothing if half in sight."""
    words = np.zeros(len(THINGS) + len(COLOURS), bool)
    if sight.background not in (None, OUTSIDE) and not sight.partial:
        words[[*sight.things, len(THINGS) + sight.background]] = True
    return words


def news(sights: list[Sight]) -> np.ndarray:
    """What each frame shows that none before it does, (T, things + 1) bool, the last for nothing.

    A frame whose news are half in sight has none of these.
    """
    found = np.zeros((len(sights), len(THINGS) + 1), bool)
    before: set[int] = set()
    for rank, sight in enumerate(sights):
        new = set(sight.things) - before
        if not sight.partial - before:
            found[rank, sorted(new) or len(THINGS)] = True
        before |= new | sight.partial
    return found


def shake(source: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Small changes of light and grain, so that a frame that is drawn again is not quite the same."""
    count = len(pixels)
    gain = source.uniform(0.94, 1.06, (count, 1, 1, 1)).astype(np.float32)
    shift = source.uniform(-6, 6, (count, 1, 1, 3)).astype(np.float32)
    grain = source.integers(-4, 5, pixels.shape[1:], np.int8)
    return np.clip(pixels * gain + shift + grain, 0, 255).astype(np.uint8)
