"""A question is fused, asked and answered as in the published model, from each of the three sources."""

from itertools import islice

import numpy as np
import pytest
import tokenizers
import torch
from golden import MODELS, REFERENCE, load_golden
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from ops.published import encode_pixels, generate, greedy_logits
from storage.errors import UsageError
from workers.llm.engine import ModelOptions
from workers.llm.model import answer_embeds, embed_text, fuse_frames, fuse_question, load_model
from workers.llm.prompt import (
    PLACEHOLDER_ID,
    PromptTokenizer,
    build_prompt,
    context_needed,
    decode_ids,
    frames_that_fit,
    load_tokenizer,
    prompt_ids,
    stream_text,
)
from workers.models.bundle import find_bundle
from workers.vision.encode import exact_inputs
from workers.vision.prefusion import FusionInputs, patches_inputs, tokens_inputs


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    return load_golden(request.param)


@pytest.fixture(scope="module")
def built_in_model():
    return load_model(find_bundle("nano"), ModelOptions("cpu", "float32"))


def test_prompts_are_the_published_ones(reference):
    model = reference.model
    for case in reference.cases:
        assert build_prompt(model.tokenizer, case["question"]) == case["prompt"]
        assert prompt_ids(model.tokenizer, case["question"]) == case["input_ids"]
    begin = model.tokenizer.tokenizer.token_to_id("<|begin_of_text|>")
    assert case["input_ids"][:2] == [begin, begin]
    assert case["input_ids"].index(PLACEHOLDER_ID) == case["image_placeholder_index"]


def test_an_exact_answer_is_the_published_one_to_the_id(reference):
    model, golden, pixels = reference.model, reference.vectors, reference.pixels
    tokens = golden["video.landscape.q0.compressed_after_prefusion"]
    for case in reference.landscape:
        prefix, ids = case["tensor_prefix"], case["input_ids"]
        fused = fuse_question(model, ids, exact_inputs(model.vision, pixels))
        embeds = answer_embeds(model, ids, fused, tokens)
        np.testing.assert_allclose(embeds[0], golden[prefix + "inputs_embeds"], atol=5e-5)
        logits = torch.stack(list(islice(greedy_logits(model, embeds), 12)))
        np.testing.assert_allclose(logits, golden[prefix + "step_logits"], atol=5e-5)
        stop = next((i for i, token in enumerate(case["generated_ids"]) if token in (503, 505, 508)), 12)
        assert list(generate(model, embeds, 12)) == case["generated_ids"][:stop]


def test_tokens_stored_in_float16_leave_the_answer_near_the_published_one(reference):
    model, golden, pixels = reference.model, reference.vectors, reference.pixels
    stored = encode_pixels(model.vision, pixels, patch_rows=0)
    case = reference.landscape[0]
    fused = fuse_question(model, case["input_ids"], exact_inputs(model.vision, pixels))
    embeds = answer_embeds(model, case["input_ids"], fused, stored.token)
    np.testing.assert_allclose(embeds[0], golden[case["tensor_prefix"] + "inputs_embeds"], atol=0.02)


def test_all_patches_unquantised_are_the_exact_source(reference):
    model, golden, pixels = reference.model, reference.vectors, reference.pixels
    exact = next(exact_inputs(model.vision, pixels))
    count = exact.patches.shape[1]
    source = FusionInputs(exact.patches, torch.arange(count).expand(5, -1), exact.compressed)
    for case in reference.landscape:
        fused = fuse_question(model, case["input_ids"], [source])
        np.testing.assert_allclose(fused, golden[case["tensor_prefix"] + "fused_text_mean"], atol=5e-5)


def test_the_whole_patch_tier_differs_from_exact_by_its_rounding_alone(reference):
    model, pixels = reference.model, reference.pixels
    stored = encode_pixels(model.vision, pixels, model.vision.bundle.patches_per_picture)
    ids = reference.landscape[0]["input_ids"]
    exact = fuse_question(model, ids, exact_inputs(model.vision, pixels))
    patches = fuse_question(model, ids, [patches_inputs(model.vision, stored.compressor_out, stored.patches)])
    tokens = fuse_question(model, ids, [tokens_inputs(model.vision, stored.compressor_out)])
    error = (patches - exact).abs()
    assert error.mean() < 0.02
    assert error.mean() < (tokens - exact).abs().mean() / 10


def masked_way(model, ids, inputs: FusionInputs, all_patches: torch.Tensor) -> torch.Tensor:
    """One frame's fused text with all patches in the sequence, and those that were not kept hidden by a mask."""
    vision = model.vision
    rows = [vision.projector(part) for part in (all_patches, inputs.compressed[0])]
    sequence = torch.cat([*rows, embed_text(model, ids)])[None]
    size, count = sequence.shape[1], len(all_patches)
    hidden = torch.ones(size, dtype=torch.bool)
    hidden[inputs.positions[0]] = False
    hidden[count:] = torch.tensor([False] * inputs.compressed.shape[1] + [token <= 0 for token in ids])
    masked_text = torch.zeros(size, dtype=torch.bool)
    masked_text[-len(ids) :] = torch.tensor([token <= 0 for token in ids])
    positions = ((~masked_text).long().cumsum(0) - 1).masked_fill(masked_text, 1)
    blocked = torch.ones(size, size, dtype=torch.bool).triu(1) | hidden
    blocked.fill_diagonal_(False)  # a row sees itself at least; hidden rows are not read
    mask = torch.zeros(size, size).masked_fill(blocked, torch.finfo(torch.float32).min)[None, None]
    rotary = vision.rotary(sequence, positions[None])
    for block in vision.prefusion:
        sequence = block(sequence, attention_mask=mask, position_embeddings=rotary)
    fused = sequence[0, -len(ids) :].clone()
    raw = embed_text(model, ids)
    unread = masked_text[-len(ids) :]
    fused[unread] = raw[unread]
    return fused


@pytest.mark.parametrize("kept", [[], [0], [3, 7, 12], [1, 2, 15]])
def test_fewer_patches_leave_every_part_at_its_published_position(reference, kept):
    model, pixels = reference.model, reference.pixels
    ids = reference.landscape[1]["input_ids"]
    exact = next(exact_inputs(model.vision, pixels[:1]))
    places = torch.tensor([kept], dtype=torch.int64)
    inputs = FusionInputs(exact.patches[:, kept], places, exact.compressed)
    with torch.inference_mode():
        wanted = masked_way(model, ids, inputs, exact.patches[0])
        torch.testing.assert_close(fuse_frames(model, ids, inputs)[0], wanted, atol=5e-5, rtol=0)


def test_frames_given_in_batches_have_the_mean_of_all(built_in_model):
    pixels = np.random.default_rng(3).integers(0, 256, (5, 336, 336, 3), dtype=np.uint8)
    stored = encode_pixels(built_in_model.vision, pixels, patch_rows=0)
    ids = prompt_ids(built_in_model.tokenizer, "When does it start?")
    parts = [tokens_inputs(built_in_model.vision, stored.compressor_out[part]) for part in (slice(0, 2), slice(2, 5))]
    whole = tokens_inputs(built_in_model.vision, stored.compressor_out)
    single = fuse_frames(built_in_model, ids, whole)
    torch.testing.assert_close(fuse_question(built_in_model, ids, parts), single.mean(dim=0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least one frame"):
        fuse_question(built_in_model, ids, [])


def test_greedy_answers_equal_those_of_transformers(built_in_model):
    ids = prompt_ids(built_in_model.tokenizer, "What is shown?")
    embeds = embed_text(built_in_model, ids)[None]
    with torch.inference_mode():
        wanted = built_in_model.llm.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), do_sample=False, max_new_tokens=24
        )[0].tolist()
    eos = built_in_model.vision.bundle.config.eos_ids
    stop = next((i for i, token in enumerate(wanted) if token in eos), len(wanted))
    assert list(generate(built_in_model, embeds, 24)) == wanted[:stop]


@given(st.text())
def test_any_question_is_encoded_and_comes_back(question):
    tokenizer = load_tokenizer(find_bundle(str(REFERENCE / "llava-mini-tiny" / "checkpoint")))
    ids = prompt_ids(tokenizer, question)
    assert ids.count(PLACEHOLDER_ID) == 1
    text = tokenizer.tokenizer.decode([token for token in ids if token >= 0], skip_special_tokens=False)
    assert question.strip() in text


def test_case_and_spaces_of_a_question_do_not_count_for_the_built_in_model():
    tokenizer = load_tokenizer(find_bundle("nano"))
    ids = prompt_ids(tokenizer, "is the ball red?")
    assert prompt_ids(tokenizer, " Is the  BALL\nred? ") == ids
    assert decode_ids(tokenizer, [token for token in ids if token >= 0]) == "is the ball red?"


def test_a_placeholder_in_the_question_is_text():
    tokenizer = load_tokenizer(find_bundle("nano"))
    ids = prompt_ids(tokenizer, "what does <image> mean?")
    assert ids.count(PLACEHOLDER_ID) == 1
    assert "<image> mean" in decode_ids(tokenizer, ids[ids.index(PLACEHOLDER_ID) + 1 :])


@given(st.lists(st.integers(0, 511), max_size=30))
def test_streamed_text_is_the_whole_text(ids):
    tokenizer = load_tokenizer(find_bundle(str(REFERENCE / "llava-mini-tiny" / "checkpoint")))
    assert "".join(stream_text(tokenizer, ids)) == decode_ids(tokenizer, ids)


class CountingTokenizer:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.count = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.count += len(ids)
        return self._tokenizer.decode(ids, **options)


def byte_tokenizer():
    """Byte level, with ids that begin and end in the middle of a character, as byte-pair merges may."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letter for each byte
    letters = dict(
        zip([*letters, *(byte for byte in range(256) if byte not in letters)], map(chr, letters), strict=False)
    )
    letters |= {byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if byte not in letters)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    for joined in (b"\x82\xac\xe2", b" \xe2", b"\x9f\x98", "\ufffd".encode()):
        vocabulary["".join(letters[byte] for byte in joined)] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer():
    """Llama 2's kind: a space is a letter, and what the vocabulary lacks is spelt in bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256, "b": 257, "\u2581": 258}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def as_prompt_tokenizer(tokenizer, clean_up=False):
    return PromptTokenizer(CountingTokenizer(tokenizer), None, {}, "", clean_up)


@given(st.lists(st.integers(0, 259), max_size=60), st.booleans())
def test_characters_that_come_in_pieces_are_streamed_whole(ids, clean_up):
    tokenizer = byte_tokenizer()
    pieces = list(stream_text(as_prompt_tokenizer(tokenizer, clean_up), ids))
    assert "".join(pieces) == decode_ids(as_prompt_tokenizer(tokenizer, clean_up), ids)


@given(st.text(st.sampled_from("a b\u00e9\u20ac\U0001f600."), max_size=80))
def test_streamed_text_of_any_tokenizer_is_what_was_written(text):
    raw = list(text.encode())  # in both of them, id N is the byte N
    for tokenizer, wanted in ((byte_tokenizer(), text), (fallback_tokenizer(), text.removeprefix(" "))):
        pieces = list(stream_text(as_prompt_tokenizer(tokenizer), raw))
        assert "".join(pieces) == wanted
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    "ids",
    [[32, 97], [*"\u20ac".encode()], [256], [0x80], [0xE2], [257]],
    ids=["text", "euro", "cut", "80", "E2", "E2s"],
)
def test_each_id_of_a_long_answer_is_decoded_with_a_few_others_alone(ids):
    for tokenizer in (byte_tokenizer(), fallback_tokenizer()):
        counted = []
        for length in (600, 1200, 2400):
            counting = as_prompt_tokenizer(tokenizer, clean_up=True)
            for _ in stream_text(counting, (ids * length)[:length]):
                pass
            counted.append(counting.tokenizer.count)
        assert counted[2] - counted[1] == pytest.approx(2 * (counted[1] - counted[0]), rel=0.05)
        assert counted[2] < 64 * 2400


def test_the_built_in_model_answers_in_printable_text(built_in_model):
    pixels = np.zeros((1, 336, 336, 3), np.uint8)
    ids = prompt_ids(built_in_model.tokenizer, "What is this?")
    stored = encode_pixels(built_in_model.vision, pixels, patch_rows=0)
    fused = fuse_question(built_in_model, ids, [tokens_inputs(built_in_model.vision, stored.compressor_out)])
    answer = generate(built_in_model, answer_embeds(built_in_model, ids, fused, stored.token), 40)
    text = decode_ids(built_in_model.tokenizer, list(answer))
    assert text
    assert text.isprintable()


def test_the_room_in_the_context_is_known_before_a_model_is_loaded():
    bundle = find_bundle(str(REFERENCE / "llava-mini-tiny-c2-hd" / "checkpoint"))
    ids = prompt_ids(load_tokenizer(bundle), "What happens in this video?")
    assert (len(ids), bundle.tokens_per_frame) == (74, 4)
    assert context_needed(bundle, ids, frame_count=5, max_new_tokens=0) == 93  # golden.json: llm_length
    most = frames_that_fit(bundle, ids, max_new_tokens=256)
    assert context_needed(bundle, ids, most, 256) <= 131072 < context_needed(bundle, ids, most + 1, 256)


def test_a_broken_chat_template_is_named(tmp_path):
    bundle = find_bundle(str(REFERENCE / "llava-mini-tiny" / "checkpoint"))
    tokenizer = load_tokenizer(bundle)
    for template, message in (("{{ raise_exception('no system turn') }}", "no system turn"), ("nothing", "omits")):
        environment = tokenizer.template.environment
        broken = type(tokenizer)(tokenizer.tokenizer, environment.from_string(template), {}, "", False)
        with pytest.raises(UsageError, match=message):
            build_prompt(broken, "Why?")
