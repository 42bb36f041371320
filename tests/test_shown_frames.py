"""What is kept of shown frames changes no answer: against the published vectors, and against prompts read whole."""

from itertools import islice

import numpy as np
import pytest
from golden import MODELS, load_golden

from ops.published import encode_pixels, greedy_logits
from storage.errors import VideoProblem
from storage.records import Reason
from workers.llm.engine import ModelOptions, SamplingParams
from workers.llm.model import answer_embeds, fuse_question, load_model
from workers.llm.prompt import PLACEHOLDER_ID
from workers.llm.shown_frames import ShownFrames, prefusion_row_bytes
from workers.models.bundle import find_bundle
from workers.vision.encode import exact_inputs

PLENTY = 1 << 40
CLOSE = 2e-5  # float32 sums in another order; the published logits are met to 5e-5


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    return load_golden(request.param)


class Shown:
    """A fixture's frames, shown with so much memory."""

    def __init__(self, reference, most_bytes=PLENTY):
        self.model, self.golden, self.pixels = reference.model, reference.vectors, reference.pixels
        self.cases = reference.landscape
        self.tokens = self.golden["video.landscape.q0.compressed_after_prefusion"]
        self.asked = 0
        self.frames = ShownFrames(self.model, self.tokens, self.inputs, most_bytes)

    def inputs(self):
        self.asked += 1
        return exact_inputs(self.model.vision, self.pixels)

    def whole(self, ids):
        """The logits after a prompt that is read from its first id on."""
        embeds = answer_embeds(
            self.model, ids, fuse_question(self.model, ids, exact_inputs(self.model.vision, self.pixels)), self.tokens
        )
        return next(greedy_logits(self.model, embeds))


def variants(ids):
    """Prompts that share more or less with a first one."""
    place = ids.index(PLACEHOLDER_ID)
    return {
        "the same": ids,
        "one id more": [*ids, 7],
        "another end": [*ids[:-2], 9, 11],
        "shorter": ids[:-3],
        "masked ids": [*ids[:-2], 0, 5, 0, 6],
        "masked end": [*ids[:-1], 0],
        "others from the frames on": [*ids[: place + 1], 5, 6, 7],
        "another start": [ids[0], 8, *ids[2:]],
        "a conversation": [*ids, 12, 13, 14, 15, *ids[place + 1 :]],
    }


@pytest.mark.parametrize("most_bytes", [PLENTY, 0])
def test_answers_are_the_published_ones_question_after_question(reference, most_bytes):
    shown = Shown(reference, most_bytes)
    for case in [*shown.cases, *reversed(shown.cases)]:
        golden = shown.golden[case["tensor_prefix"] + "step_logits"]
        np.testing.assert_allclose(shown.frames.read(case["input_ids"]).logits, golden[0], atol=5e-5)
        stop = next((i for i, token in enumerate(case["generated_ids"]) if token in (503, 505, 508)), 12)
        assert list(shown.frames.reply(case["input_ids"], 12)) == case["generated_ids"][:stop]
    assert shown.asked == (1 if most_bytes else 4 * len(shown.cases))


@pytest.mark.parametrize("most_bytes", [PLENTY, 0])
@pytest.mark.parametrize("name", variants([1, PLACEHOLDER_ID, 2, 3, 4, 5]))
def test_a_further_prompt_gives_what_it_would_give_alone(reference, name, most_bytes):
    shown = Shown(reference, most_bytes)
    first = shown.cases[0]["input_ids"]
    shown.frames.read(first)
    ids = variants(first)[name]
    np.testing.assert_allclose(shown.frames.read(ids).logits, shown.whole(ids), atol=CLOSE)
    np.testing.assert_allclose(shown.frames.read(first).logits, shown.whole(first), atol=CLOSE)


def test_a_further_question_computes_its_own_words_alone(reference):
    shown = Shown(reference)
    ids = shown.cases[0]["input_ids"]
    rows = {"pre-fusion": 0, "llm": 0}

    def count(name):
        def hook(module, inputs, output):
            rows[name] += output.shape[0] * output.shape[1]

        return hook

    hooks = [
        shown.model.vision.prefusion[0].input_layernorm.register_forward_hook(count("pre-fusion")),
        shown.model.llm.model.layers[0].input_layernorm.register_forward_hook(count("llm")),
    ]
    try:
        shown.frames.read(ids)
        first = dict(rows)
        rows.update(dict.fromkeys(rows, 0))
        shown.frames.read([*ids[:-3], 5, 6, 7])
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == {"pre-fusion": 3 * shown.frames.frame_count, "llm": 3}
    assert first["llm"] == len(ids) - 1 + shown.tokens.shape[0] * shown.tokens.shape[1]


def test_size_is_what_the_caches_hold(reference):
    shown = Shown(reference)
    ids = shown.cases[0]["input_ids"]
    assert shown.frames.size_bytes == 0
    shown.frames.read(ids)
    frames, rows = shown.tokens.shape[:2]
    text = sum(token > 0 for token in ids)
    patches = next(exact_inputs(shown.model.vision, shown.pixels)).patches.shape[1]
    in_fusion = frames * (patches + rows + text) * prefusion_row_bytes(shown.model)
    llm = shown.model.llm.config
    row_bytes = 4 * 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim  # float32, keys and values
    in_llm = (frames * rows + len(ids) - 1) * row_bytes
    assert shown.frames.size_bytes == in_fusion + in_llm
    less = Shown(reference, in_fusion - 1)
    less.frames.read(ids)
    assert less.frames.size_bytes == in_llm


def test_an_answer_that_is_broken_off_leaves_no_trace(reference):
    shown = Shown(reference)
    ids = shown.cases[0]["input_ids"]
    answer = shown.frames.reply(ids, 12)
    list(islice(answer, 2))
    answer.close()
    longer = [*ids, 5, 6]
    np.testing.assert_allclose(shown.frames.read(longer).logits, shown.whole(longer), atol=CLOSE)


def test_a_video_that_fails_on_the_way_leaves_nothing_half_done(reference):
    shown = Shown(reference)
    ids, pixels = shown.cases[0]["input_ids"], shown.pixels

    def failing():
        yield next(exact_inputs(shown.model.vision, pixels[:2]))
        raise VideoProblem(Reason.VANISHED, "gone")

    works = shown.frames._inputs
    shown.frames._inputs = failing
    with pytest.raises(VideoProblem):
        shown.frames.read(ids)
    shown.frames._inputs = works
    np.testing.assert_allclose(shown.frames.read(ids).logits, shown.whole(ids), atol=CLOSE)


def test_a_long_prompt_goes_in_in_pieces(reference, monkeypatch):
    shown = Shown(reference)
    ids = shown.cases[0]["input_ids"]
    monkeypatch.setattr("workers.llm.memory.PREFILL_ROWS", 5)
    np.testing.assert_allclose(shown.frames.read(ids).logits, shown.whole(ids), atol=CLOSE)


def test_drawn_answers_follow_from_the_seed():
    model = load_model(find_bundle("nano"), ModelOptions("cpu", "float32"))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 336, 336, 3), dtype=np.uint8)
    stored = encode_pixels(model.vision, pixels, patch_rows=0)
    shown = ShownFrames(model, stored.token, lambda: exact_inputs(model.vision, pixels), PLENTY)
    ids = [1, 20, PLACEHOLDER_ID, 30, 40, 50]

    def drawn(temperature, seed):
        return list(shown.reply(ids, 8, SamplingParams(temperature, seed)))

    assert drawn(5.0, 1) == drawn(5.0, 1)
    assert len({tuple(drawn(5.0, seed)) for seed in range(6)}) > 1
    assert drawn(1e-4, 3) == drawn(0.0, 0)
