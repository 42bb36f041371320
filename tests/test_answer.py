"""Answers: which frames are shown where there are more than the context holds, what is kept between questions."""

import itertools
import json
import shutil
from collections import Counter

import pytest

from pipeline.ask.answer import Asked, Asker, Over
from pipeline.ask.filter import Filter
from storage.archive.archive import open_archive
from storage.errors import UsageError
from workers.llm.engine import ModelOptions, SamplingParams
from workers.llm.memory import MASK_BYTES, PREFILL_ROWS, answer_bytes, rows_at_once
from workers.llm.prompt import frames_that_fit, load_tokenizer, prompt_ids
from workers.models.bundle import find_bundle

CLIP = "nano_scenes_1.mp4"
CONTEXT = 96  # tokens, of a model that is nano otherwise


@pytest.fixture(scope="module")
def archive(samples_archive):
    return open_archive(str(samples_archive[0]))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Nano with a short context as its only limit, as a directory; its archives are nano's."""
    directory = tmp_path_factory.mktemp("narrow") / "nano"
    shutil.copytree(find_bundle("nano").directory, directory)
    config = json.loads((directory / "config.json").read_text())
    card = {name: value for name, value in config["vidx"].items() if name not in ("takes_history", "most_frames")}
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT, "vidx": card}))
    return directory


@pytest.fixture(scope="module")
def asker(archive):
    return Asker(archive, find_bundle("nano"), ModelOptions("cpu"))


@pytest.fixture(scope="module")
def narrow_asker(archive, narrow):
    return Asker(archive, find_bundle(str(narrow)), ModelOptions("cpu"))


@pytest.fixture
def clip(archive):
    return Filter(archive.videos.find(CLIP))


def told():
    """What was announced, and the function to announce it with."""
    lines = []
    return lines, lines.append


def asked(**changes):
    return Asked(**{"frame_limit": None, "most_tokens": 20, **changes})


def test_more_frames_than_the_context_holds_are_refused_with_what_to_do(narrow_asker, archive):
    lines, announce = told()
    every = Filter().frames(archive)
    with pytest.raises(UsageError, match=rf"{len(every)} frames, .* {CONTEXT}, enough for \d+ frames; .*--over"):
        narrow_asker.ask("Is there a tent?", Filter(), asked(), announce=announce)
    assert lines == []


def room_of(narrow, question):
    bundle = find_bundle(str(narrow))
    return frames_that_fit(bundle, prompt_ids(load_tokenizer(bundle), question), 20)


def test_stride_shows_frames_from_all_of_it(narrow_asker, narrow, archive):
    lines, announce = told()
    question = "Is there a tent?"
    room, every = room_of(narrow, question), Filter().frames(archive)
    answer = narrow_asker.ask(question, Filter(), asked(over=Over.STRIDE), announce=announce)
    assert (answer.frame_count, answer.over) == (room, "stride")
    assert lines == [f"{room} of {len(every)} frames are shown (--over stride)"]
    chosen = narrow_asker.choose(question, Filter(), asked())
    assert answer.moments == chosen.moments  # all that it was asked of


def test_retrieve_shows_the_best_of_it(narrow_asker, narrow, clip, archive):
    question = "Is there an apple?"
    room = room_of(narrow, question)
    answer = narrow_asker.ask(question, Filter(), asked(over=Over.RETRIEVE))
    assert 0 < answer.frame_count <= room
    assert answer.text == "yes"
    best = max(answer.moments, key=lambda moment: moment.score)
    assert best.uri.endswith(CLIP)
    assert best.start_seconds <= 12 < best.end_seconds  # a look at the clip: the apple


def test_windows_are_asked_one_by_one_and_then_their_answers(narrow_asker, narrow, archive):
    lines, announce = told()
    question = "Is there a tent?"
    room, every = room_of(narrow, question), Filter().frames(archive)
    short = asked(over=Over.WINDOWS, frame_limit=None, most_tokens=20)
    with pytest.raises(UsageError, match=r"answers of \d+ windows, .* do not fit"):
        narrow_asker.ask(question, Filter(), short, announce=announce)
    sizes = Counter(frame.video_number for frame in every)
    count = sum(-(-size // room) for size in sizes.values())
    assert lines[0] == f"{len(every)} frames are shown in {count} windows (--over windows)"
    assert len(lines) == count + 1
    assert sum(line.startswith(f"{CLIP} 0:00:00.0 to 0:00:") for line in lines) == 1  # none goes over a video's end
    assert {line.rsplit(": ", 1)[1] for line in lines[1:]} >= {"yes"}


def test_the_answers_of_windows_come_with_their_times(asker, archive, clip, monkeypatch):
    monkeypatch.setattr("pipeline.ask.answer.frames_that_fit", lambda bundle, ids, most: 12)
    frames = clip.frames(archive)
    answer = asker.ask("Is there an apple?", clip, asked(over=Over.WINDOWS))
    ends = [(window.start_seconds, window.end_seconds) for window in answer.windows]
    assert len(ends) == -(-len(frames) // 12)
    assert ends[0][0] == frames[0].time_seconds
    assert ends[-1][1] == pytest.approx(frames[-1].time_seconds + frames[-1].duration_seconds)
    assert all(one[1] == pytest.approx(other[0], abs=0.01) for one, other in itertools.pairwise(ends))
    for window in answer.windows:
        within = Filter(clip.video, window.start_seconds + 0.001, window.end_seconds - 0.001)
        assert window.text == asker.ask("Is there an apple?", within, asked()).text
    assert (answer.frame_count, answer.over) == (len(frames), "windows")
    lines = [line.rsplit(": ", 1) for line in answer.text.splitlines()]  # nano reads no answers: these are all
    assert [text for _, text in lines] == [text for text, _ in itertools.groupby(each.text for each in answer.windows)]
    assert lines[0][0].startswith("0:00:00.0 to 0:00:")


def test_of_a_range_that_is_longer_than_what_the_model_was_trained_on_frames_are_shown_evenly(asker, clip, archive):
    lines, announce = told()
    every, question = clip.frames(archive), "Is there ever an apple?"
    answer = asker.ask(question, clip, Asked(fuse="tokens", most_tokens=20), announce=announce)
    assert len(every) > 8
    assert (answer.frame_count, answer.over, answer.text) == (8, "stride", "yes")
    assert lines == [f"8 of {len(every)} frames are shown (evenly spread; nano was trained on at most 8)"]
    with pytest.raises(
        UsageError, match=r"was trained on at most 8 frames .*its context could hold more.*--over"
    ) as caught:
        asker.ask(question, clip, asked())
    assert "tokens of context" not in str(caught.value)
    found = asker.ask("Is there an apple?", Filter(), Asked(most_tokens=20))
    assert 0 < found.frame_count <= 8


def test_memory_is_announced_and_grows_with_the_frames_alone(asker, clip, monkeypatch):
    monkeypatch.setattr("pipeline.ask.answer.MANY_FRAMES", 4)
    lines, announce = told()
    answer = asker.ask("Is there an apple?", Filter(clip.video, 8.0, 13.5), asked(), announce=announce)
    assert answer.frame_count == 6
    assert lines == [
        f"{answer.frame_count} frames need about {answer.memory_bytes / 1e9:.2g} GB of memory besides the model"
    ]
    bundle = find_bundle("nano")
    sizes = [answer_bytes(bundle, rows) for rows in (10_000, 20_000, 30_000)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


@pytest.mark.parametrize("rows", [1, 100, 5_000, 20_000, 10**6, 10**9])
def test_the_mask_of_a_long_context_stays_within_what_is_announced(rows):
    at_once = rows_at_once(rows)
    assert 1 <= at_once <= PREFILL_ROWS
    assert at_once == 1 or 5 * at_once * rows <= MASK_BYTES


def test_nothing_that_fits_is_not_found_and_anyway_answers_all_the_same(asker):
    limited = Asked(most_tokens=20)
    assert asker.ask("Is there a submarine?", Filter(), limited) is None
    answer = asker.ask("Is there a submarine?", Filter(), Asked(most_tokens=20, anyway=True))
    assert answer.frame_count > 0
    assert answer.text in ("I do not know that", "no", "nothing that I know")


def test_words_are_counted(asker, clip):
    within = Filter(clip.video, 1.0, 5.0)
    pieces = []
    whole = asker.ask("What is there?", within, Asked(), stream=pieces.append)
    assert whole.text == "".join(pieces) == "a cow, a leaf and a tent"
    for most in (1, 2, 4):
        short = asker.ask("What is there?", within, Asked(most_words=most))
        assert short.text == " ".join(whole.text.split()[:most])
    assert asker.ask("What is there?", within, Asked(most_words=100)).text == whole.text


def test_draws_follow_from_the_seed(asker, clip):
    within = Filter(clip.video, 1.0, 5.0)

    def drawn(temperature, seed):
        asked = Asked(most_tokens=12, sampling=SamplingParams(temperature, seed))
        return asker.ask("What is there?", within, asked).text

    assert drawn(4.0, 5) == drawn(4.0, 5)
    assert len({drawn(4.0, seed) for seed in range(5)}) > 1


def test_a_second_question_gets_what_it_would_get_alone(archive, clip):
    kept, alone = Asker(archive, find_bundle("nano"), ModelOptions("cpu")), None
    questions = ("What is there?", "Where is the tent?", "How many cows are there?", "Is there a dog?")
    for fuse in ("exact", "patches", "tokens"):
        within = Filter(clip.video, 1.0, 5.0)
        for question in questions:
            answer = kept.ask(question, within, Asked(fuse=fuse))
            alone = Asker(archive, find_bundle("nano"), ModelOptions("cpu"), cache_bytes=0).ask(
                question, within, Asked(fuse=fuse)
            )
            assert (answer.text, answer.fuse) == (alone.text, fuse)
            again = question != questions[0]
            assert (answer.video_bytes_read == 0) == (again or fuse != "exact")
    assert alone.text == "no"


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(archive, clip):
    asker = Asker(archive, find_bundle("nano"), ModelOptions("cpu"))
    ranges = [Filter(clip.video, float(start), start + 2.0) for start in (1, 10, 20)]
    for within in ranges:
        asker.ask("What is there?", within, Asked(fuse="tokens"))
    assert len(asker._showings) == 3
    one = max(each.size_bytes for each in asker._showings.values())
    asker._cache_bytes = 2 * one + one // 2
    asker.ask("What is there?", ranges[0], Asked(fuse="tokens"))  # the first one is the last used now
    assert [round(each.frames[0].time_seconds) for each in asker._showings.values()] == [20, 1]


def test_the_command_says_what_was_shown(vidx, samples_archive, narrow):
    command = ["ask", "Is there an apple?", "--all", "--archive", str(samples_archive[0]), "--model", str(narrow)]
    command += ["--max-tokens", "20"]
    assert "--over" in vidx(*command).err
    run = vidx(*command, "--over", "stride", "--json")
    assert (run.code, run.json["over"], run.json["windows"]) == (0, "stride", [])
    assert run.json["memory_bytes"] > 0
    assert "(--over stride)" in run.err


def test_not_found_is_said_and_ends_with_its_code(vidx, samples_archive):
    command = ["ask", "Is there a submarine?", "--archive", str(samples_archive[0])]
    run = vidx(*command)
    assert (run.code, run.out) == (4, "")
    assert run.err.startswith("not found in this archive: ")
    assert "--anyway" in run.err
    assert vidx(*command, "--anyway", "--json").json["found"]
