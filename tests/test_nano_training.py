"""Training computes what the product computes, and an interrupted phase ends as if nothing had happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import process_of
from safetensors.torch import load_file

from ops.nano import layout
from ops.nano.batches import IGNORED, Batches, BatchPlan
from ops.nano.data import SLIDES, WINDOWS, Pool, make_shards, read_shard
from ops.nano.learn import EXACT, PATCHES, TOKENS, Learner, PlainAttention
from ops.nano.muon import orthogonal
from ops.nano.pictograms import FONT, THINGS
from ops.nano.questions import CELLS, NOTHING, OUTSIDE_ANSWER, SIDES
from workers.llm.engine import ModelOptions
from workers.llm.model import answer_embeds, fuse_question, load_model
from workers.llm.prompt import prompt_ids
from workers.models.bundle import find_bundle
from workers.vision.prefusion import FusionInputs
from workers.vision.visionzip import keep_patches

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not FONT.is_file(), reason="the pictograms' font is not installed")
PATCH_ROWS = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two small shards."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = find_bundle("nano").pictures
    make_shards([(SLIDES, 0), (WINDOWS, 0)], pictures, folder, clips=2)
    return folder


@pytest.fixture(scope="module")
def learner():
    return Learner(find_bundle("nano").directory, "cpu")


def batch_of(shards, frames, groups=3, questions=4):
    pools = {kind: Pool(kind, 0, 1, 1, shards) for kind in (SLIDES, WINDOWS)}
    plan = BatchPlan(groups=groups, frames=(frames,), questions=questions, captions=int(frames == 1))
    return Batches((plan,), pools, find_bundle("nano").directory, 5, 8)[0]


def test_a_shard_holds_frames_of_encoded_videos_and_is_made_the_same_again(shards, tmp_path):
    first = read_shard(shards / "slides-00000.npy")
    assert first.pixels.shape == (64, 96, 96, 3)
    assert len(first.sights) == len(first.clip) == 64
    make_shards([(SLIDES, 0)], find_bundle("nano").pictures, tmp_path, clips=2)
    again = read_shard(tmp_path / "slides-00000.npy")
    assert np.array_equal(first.pixels, again.pixels)
    assert [sight.things for sight in first.sights] == [sight.things for sight in again.sights]


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("source", [EXACT, PATCHES, TOKENS])
@torch.no_grad()
def test_packed_questions_give_the_logits_of_the_product(shards, learner, source, frames):
    """Several questions in one sequence under a mask, against fuse_question and the LLM one by one."""
    batch = batch_of(shards, frames)
    features = learner.see(batch.pixels)
    logits = learner.answers(features, batch, {source: slice(0, 3)}, PATCH_ROWS).logits
    model = load_model(find_bundle("nano"), ModelOptions("cpu", "float32"))
    tokenizer = model.tokenizer.tokenizer
    group_of, _ = np.nonzero(batch.labels != IGNORED)
    segment_of = batch.llm_segments[batch.labels != IGNORED]
    tower = features.tower
    for group, asked in enumerate(batch.questions):
        part = slice(group * frames, (group + 1) * frames)
        compressed = features.compressed[part]
        if source == EXACT:
            places = torch.arange(64).expand(frames, -1)
            inputs = FusionInputs(features.patches[part], places, compressed)
        elif source == PATCHES:
            piece = type(tower)(tower.hidden[part], tower.class_query[part], tower.keys[part], tower.search_key[part])
            rows, places = keep_patches(piece, PATCH_ROWS)
            scales = rows.abs().amax(dim=-1, keepdim=True) / 127
            inputs = FusionInputs((rows / scales).round() * scales, places, compressed)
        else:
            inputs = FusionInputs(features.patches[part, :0], torch.empty(frames, 0, dtype=torch.int64), compressed)
        tokens = vision_tokens_of(model, features, part)
        for number, (_, text, answer) in enumerate(asked, 1):
            ids = prompt_ids(model.tokenizer, text)
            embeds = answer_embeds(model, ids, fuse_question(model, ids, [inputs]), tokens)
            normalizer, tokenizer.normalizer = tokenizer.normalizer, None
            reply = torch.tensor([tokenizer.encode(f" {answer}").ids])
            tokenizer.normalizer = normalizer
            sequence = torch.cat([embeds, model.llm.model.embed_tokens(reply)], dim=1)
            wanted = model.llm(inputs_embeds=sequence).logits[0, embeds.shape[1] - 1 :]
            ours = logits[torch.from_numpy((group_of == group) & (segment_of == number))]
            torch.testing.assert_close(ours, wanted, atol=0.03, rtol=0.01)  # tokens are stored in float16


def vision_tokens_of(model, features, part):
    from workers.vision.prefusion import prefuse_vision

    vision = model.vision
    patches, compressed = vision.projector(features.patches[part]), vision.projector(features.compressed[part])
    return prefuse_vision(vision, patches, compressed).half().numpy()


def test_a_word_for_a_thing_is_taught_the_place_that_the_answer_names(shards):
    batch = batch_of(shards, 1, groups=40, questions=8)
    taught = 0
    for group, asked in enumerate(batch.questions):
        for number, (question, _, answer) in enumerate(asked, 1):
            places = batch.text_places[group][batch.text_segments[group] == number]
            (known,) = np.nonzero((places != IGNORED).any(axis=1))
            if question.kind == "where" and answer in CELLS:
                (row,) = known
                assert CELLS[places[row] @ (3, 1)] == answer
                taught += 1
            assert len(known) <= len(question.about)
    assert taught > 5
    assert (batch_of(shards, 4).text_places == IGNORED).all()


def test_what_is_in_sight_is_what_a_list_names(shards):
    batch = batch_of(shards, 1, groups=40, questions=8)
    words = [thing.word for thing in THINGS] + [thing.plural for thing in THINGS]
    lists = 0
    for group, asked in enumerate(batch.questions):
        named = {THINGS[number].word for number in np.flatnonzero(batch.frame_words[group][: len(THINGS)])}
        for question, _, answer in asked:
            if question.kind == "what" and answer != OUTSIDE_ANSWER:
                listed = {words.index(word) % len(THINGS) for word in re.findall("[a-z]+", answer) if word in words}
                assert {THINGS[number].word for number in listed} == named
                lists += 1
    assert lists > 5


def test_what_is_beside_a_thing_is_what_the_question_about_it_names(shards):
    batch = batch_of(shards, 1, groups=60, questions=8)
    names = [thing.one for thing in THINGS] + [NOTHING]
    found = 0
    for group, asked in enumerate(batch.questions):
        for question, _, answer in asked:
            covered = batch.patch_words[group] == (question.about or (-1,))[0]
            if question.kind in SIDES and answer != OUTSIDE_ANSWER and covered.any():
                side = list(SIDES).index(question.kind)
                assert {names[there] for there in batch.neighbours[group][covered, side]} == {answer}
                found += 1
    assert found > 10


def test_what_is_new_in_a_frame_was_in_none_before(shards):
    batch = batch_of(shards, 6, groups=12, questions=8)
    sights = batch.frame_words.reshape(12, 6, -1)[..., : len(THINGS)]
    for group in range(12):
        whole = sights[group].any(axis=1) | (batch.news[group].sum(axis=1) > 0)
        assert whole.any()
        for rank in range(6):
            new = batch.news[group, rank, : len(THINGS)]
            assert not (new & batch.news[group, :rank, : len(THINGS)].any(axis=0)).any()
            if sights[group, rank].any():  # nothing half in sight: all that is new is told
                assert (new <= sights[group, rank]).all()
    ranks = batch.first_frames[batch.first_frames != IGNORED]
    assert len(ranks) > 5
    assert (ranks < 6).all()


def test_each_loss_is_a_number_and_has_a_gradient(shards, learner):
    single, film = batch_of(shards, 1), batch_of(shards, 4)
    features = learner.see(single.pixels)
    answered = learner.answers(features, single, {EXACT: slice(0, 3)}, PATCH_ROWS)
    of_film = learner.answers(learner.see(film.pixels), film, {TOKENS: slice(0, 3)}, PATCH_ROWS)
    losses = [
        learner.naming_loss(features, single.patch_words),
        learner.placing_loss(features),
        learner.beside_loss(features, single.neighbours),
        learner.telling_loss(features, single.frame_words),
        learner.caption_loss(features, single),
        learner.pointing_loss(answered.fused, single),
        learner.early_loss(answered.fused, single),
        learner.timing_loss(of_film, film),
        learner.news_loss(of_film, film),
    ]
    for loss in losses:
        learner.zero_grad()
        loss.backward(retain_graph=True)
        assert torch.isfinite(loss)
        assert sum(float(p.grad.abs().sum()) for p in learner.parameters() if p.grad is not None) > 0


@torch.no_grad()
def test_frames_of_which_nothing_is_known_do_not_count(shards, learner):
    batch = batch_of(shards, 1, groups=6)
    features = learner.see(batch.pixels)
    covering, in_sight = batch.patch_words.copy(), batch.frame_words.copy()
    covering[[0, 3]], in_sight[[0, 3]] = IGNORED, False
    assert (in_sight.any(axis=1) == [False, True, True, False, True, True]).all()
    known = [1, 2, 4, 5]
    rest = replace(features, patches=features.patches[known], compressed=features.compressed[known])
    for loss, words in ((learner.naming_loss, covering), (learner.telling_loss, in_sight)):
        torch.testing.assert_close(loss(features, words), loss(rest, words[known]))


@torch.no_grad()
def test_attention_in_plain_products_gives_the_same_logits(shards, learner):
    batch = batch_of(shards, 1)
    features = learner.see(batch.pixels)
    wanted = learner.answers(features, batch, {PATCHES: slice(0, 3)}, PATCH_ROWS).logits
    with PlainAttention():
        features = learner.see(batch.pixels)
        found = learner.answers(features, batch, {PATCHES: slice(0, 3)}, PATCH_ROWS).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_what_is_saved_is_what_the_product_loads(learner, tmp_path):
    directory = tmp_path / "bundle"
    shutil.copytree(find_bundle("nano").directory, directory)
    learner.save(directory)
    for name in ("model.safetensors", "vision_tower/model.safetensors"):
        before, after = (load_file(folder / name) for folder in (find_bundle("nano").directory, directory))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].half(), after[key]) for key in before)
    load_model(find_bundle(str(directory)))


def test_orthogonal_steps_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((2, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_the_start_is_a_whole_bundle_that_follows_from_the_seed(tmp_path):
    for name in ("one", "two"):
        layout.write_start(tmp_path / name, 3)
    for path in (tmp_path / "one").rglob("*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), path.name
    load_model(find_bundle(str(tmp_path / "one")))


def test_an_interrupted_phase_ends_like_one_that_was_not_and_the_last_one_leaves_the_tower_alone(tmp_path):
    def command(out, phase="see", steps="4"):
        work = tmp_path / f"{out}-work"
        work.mkdir(exist_ok=True)
        if not (work / "shards").exists():
            (tmp_path / "shards").mkdir(exist_ok=True)
            (work / "shards").symlink_to(tmp_path / "shards")
        options = ["--phase", phase, "--steps", steps, "--groups", "8", "--clips", "1"]
        options += ["--threads", "1", "--save-every", "0"]
        return [sys.executable, ROOT / "ops/nano/train", tmp_path / out, "--work", work, *options]

    subprocess.run(command("whole"), check=True, timeout=300, stdout=subprocess.DEVNULL)
    state = tmp_path / "cut-work" / "see.state"
    with process_of(command("cut"), start_new_session=True, stdout=subprocess.DEVNULL) as process:
        while not state.is_file() and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert 0 < torch.load(state, weights_only=True)["step"] < 4
    subprocess.run(command("cut"), check=True, timeout=300, stdout=subprocess.DEVNULL)
    answering = load_file(tmp_path / "cut" / "model.safetensors")
    for name in ("model.safetensors", "vision_tower/model.safetensors"):
        whole, cut = (load_file(tmp_path / out / name) for out in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name
    subprocess.run(command("cut", "read", "1"), check=True, timeout=300, stdout=subprocess.DEVNULL)
    tower, read = (
        load_file(tmp_path / "cut" / name) for name in ("vision_tower/model.safetensors", "model.safetensors")
    )
    assert all(torch.equal(cut[key], values) for key, values in tower.items())
    changed = {key for key, values in read.items() if not torch.equal(answering[key], values)}
    assert {key.split(".")[1] for key in changed} >= {"layers", "prefusion_layers", "mm_projector", "embed_tokens"}
    assert not any("compressor" in key for key in changed)
