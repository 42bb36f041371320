"""nano's world: the truth is what the pictures show, and the same seed gives the same files."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from ops.nano.captions import question_caption, truth_table, whole_caption, word_caption
from ops.nano.films import ENCODINGS, encode_script
from ops.nano.pictograms import FONT, NUMBER, THINGS
from ops.nano.questions import (
    CELLS,
    MOMENT_KINDS,
    NOTHING,
    OUTSIDE_ANSWER,
    TIME_KINDS,
    UNKNOWN_ANSWER,
    Question,
    list_things,
    reply,
    word,
)
from ops.nano.scenes import COLOURS, OUTSIDE, Sight, sight, write_script, write_slides
from ops.nano.unknown import word_unknown

ROOT = Path(__file__).parent.parent
needs_font = pytest.mark.skipif(not FONT.is_file(), reason="the pictograms' font is not installed")
RED = COLOURS.index("red")


def seen(*things, background=RED, partial=()):
    """A sight of things given as (word, x, y)."""
    numbers = tuple(NUMBER[word] for word, _, _ in things)
    boxes = np.array([(x, y, 0.2, 0.2) for _, x, y in things]).reshape(-1, 4)
    return Sight(background, numbers, boxes, frozenset(NUMBER[word] for word in partial))


def ask(kind, *about, of):
    return reply(Question(kind, tuple(NUMBER[word] for word in about)), of if isinstance(of, list) else [of])


SCENE = seen(("dog", 0.2, 0.2), ("bus", 0.8, 0.5), ("owl", 0.5, 0.85))


def test_there_are_a_hundred_things_in_alphabetical_order():
    assert len(THINGS) == 100
    assert [thing.word for thing in THINGS] == sorted({thing.word for thing in THINGS})


@pytest.mark.parametrize(
    ("kind", "about", "answer"),
    [
        ("exists", ["dog"], "yes"),
        ("exists", ["cat"], "no"),
        ("what", [], "a bus, a dog and an owl"),
        ("count", [], "three"),
        ("count", ["dog"], "one"),
        ("count", ["cat"], "none"),
        ("where", ["dog"], "top left"),
        ("where", ["bus"], "right"),
        ("where", ["owl"], "bottom"),
        ("left", ["bus"], "an owl"),
        ("left", ["dog"], NOTHING),
        ("right", ["dog"], "an owl"),
        ("above", ["owl"], "a bus"),
        ("below", ["owl"], NOTHING),
        ("background", [], "red"),
    ],
)
def test_questions_about_a_moment(kind, about, answer):
    assert ask(kind, *about, of=SCENE) == answer


def test_what_is_not_clear_has_no_answer():
    assert ask("where", "dog", of=seen(("dog", 0.34, 0.2))) is None  # on the border between two cells
    assert ask("left", "dog", of=seen(("dog", 0.5, 0.2), ("bus", 0.52, 0.8))) is None
    assert ask("where", "cat", of=SCENE) is None
    assert ask("where", "dog", of=seen(("dog", 0.2, 0.2), ("dog", 0.8, 0.8))) is None
    assert ask("exists", "cat", of=seen(partial=["cat"])) is None
    assert ask("background", of=[SCENE, seen(background=0)]) is None
    assert ask("count", of=[SCENE, seen()]) is None


def test_footage_from_outside_and_empty_scenes():
    assert ask("what", of=seen(background=OUTSIDE)) == OUTSIDE_ANSWER
    assert ask("exists", "dog", of=seen(background=OUTSIDE)) == OUTSIDE_ANSWER
    assert ask("what", of=seen()) == NOTHING
    assert reply(Question("unknown"), [SCENE]) == UNKNOWN_ANSWER


def test_several_of_one_thing():
    assert ask("what", of=seen(("bus", 0.2, 0.2), ("bus", 0.8, 0.2), ("cat", 0.5, 0.8))) == "two buses and a cat"
    assert list_things(Counter({NUMBER["sheep"]: 3})) == "three sheep"


FILM = [
    seen(("dog", 0.2, 0.2)),
    seen(("dog", 0.2, 0.2)),
    seen(("dog", 0.2, 0.2), ("bus", 0.8, 0.5)),
    seen(("bus", 0.8, 0.5)),
    seen(("bus", 0.8, 0.5), partial=["owl"]),
    seen(("bus", 0.8, 0.5), ("owl", 0.5, 0.8)),
    seen(("owl", 0.5, 0.8)),
    seen(),
]


@pytest.mark.parametrize(
    ("kind", "about", "answer"),
    [
        ("ever", ["bus"], "yes"),
        ("ever", ["cat"], "no"),
        ("first", ["owl", "dog"], "the dog"),
        ("after", ["dog"], "a bus"),
        ("after", ["bus"], "an owl"),
        ("after", ["owl"], NOTHING),
        ("part", ["dog"], "the beginning"),
        ("part", ["owl"], None),  # begins to come in in the middle, is whole at the end
        ("different", [], "three"),
        ("what", [], "a bus, a dog and an owl"),
    ],
)
def test_questions_over_time(kind, about, answer):
    assert ask(kind, *about, of=FILM) == answer


def test_what_comes_together_has_no_order():
    together = [seen(), seen(("dog", 0.2, 0.2), ("bus", 0.8, 0.5))]
    assert ask("first", "dog", "bus", of=together) is None
    assert ask("after", "cat", of=together) is None


def test_every_kind_has_words_and_careless_typing():
    source = np.random.default_rng(0)
    for kind in (*MOMENT_KINDS, *TIME_KINDS):
        about = (NUMBER["bus"], NUMBER["owl"]) if kind == "first" else (NUMBER["bus"],)
        texts = {word(Question(kind, about), source, 0.5) for _ in range(80)}
        assert len(texts) > 8, kind
        assert any(not text.endswith("?") for text in texts), kind
    assert not any("{" in word_unknown(source, 0.5) for _ in range(300))


def test_held_out_questions_are_never_trained():
    source = np.random.default_rng(1)
    trained = {word_unknown(source, 0.0) for _ in range(3000)}
    held_out = {word_unknown(source, 0.0, held_out=True) for _ in range(300)}
    assert not trained & held_out


def test_captions_are_true_of_their_own_picture_and_of_no_wrong_one():
    source = np.random.default_rng(2)
    pictures = [
        SCENE,
        seen(("dog", 0.8, 0.8), ("bus", 0.1, 0.5)),
        seen(background=OUTSIDE),
        seen(),
        seen(("dog", 0.2, 0.2), ("dog", 0.7, 0.7)),
    ]
    for _ in range(200):
        for number, picture in enumerate(pictures):
            text, claim = word_caption(picture, source, 0.2)
            row = truth_table([claim], pictures)[0]
            assert row[number], text
            if "dog left of" in text:
                assert not row[1], text
    assert whole_caption(SCENE) == "a bus, a dog and an owl on a red background"


@needs_font
def test_a_question_to_search_with_fits_what_shows_what_it_asks_about():
    source = np.random.default_rng(0)
    other = seen(("cow", 0.2, 0.2))
    nothing = Sight(OUTSIDE, (), np.zeros((0, 4)), frozenset())
    for _ in range(300):
        text, claim = question_caption(SCENE, source)
        fits = truth_table([claim], [SCENE, other, nothing])[0]
        assert fits[0]
        assert not fits[2]
        assert fits[1] == ("cow" in text.lower() or not any(word in text.lower() for word in ("dog", "bus", "owl")))
    assert truth_table([question_caption(nothing, source)[1]], [SCENE, nothing])[0].tolist() == [False, True]


def test_scripts_never_overlap_what_stands_still_and_show_up_to_four():
    for seed in range(8):
        script = write_script(np.random.default_rng(seed), 60)
        for time in np.arange(0, 60, 0.5):
            there = sight(script, float(time))
            assert len(there.things) <= 4
            for i, (x, y, width, height) in enumerate(there.boxes):
                assert width / 2 - 1e-6 <= x <= 1 - width / 2 + 1e-6
                for other_x, other_y, other_width, other_height in there.boxes[i + 1 :]:
                    apart = abs(x - other_x) * 2 >= width + other_width - 1e-6
                    assert apart or abs(y - other_y) * 2 >= height + other_height - 1e-6


@needs_font
def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        command = [sys.executable, ROOT / "ops/nano/world", "--seed", "1000007", "--videos", "2", "--minutes", "0.2"]
        subprocess.run([*command, tmp_path / name], check=True, timeout=300)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4


@needs_font
def test_the_truth_is_what_the_video_shows(tmp_path):
    """A thing's place, found in the pixels of the encoded video, is where the question's answer says."""
    source = np.random.default_rng(1_000_011)
    script = write_slides(source, 80, ["shapes"], 0.0)
    encode_script(script, tmp_path / "film.mp4", ENCODINGS[1], source)
    with av.open(str(tmp_path / "film.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    checked = 0
    for number, picture in enumerate(pictures):
        there = sight(script, float(number))
        if len(there.things) != 1:
            continue
        answer = reply(Question("where", there.things), [there])
        edges = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3)])
        stands_out = np.abs(picture - np.median(edges, axis=0)).max(axis=2) > 100
        if answer is None or stands_out.sum() < 100:
            continue
        y, x = (np.median(places) for places in np.nonzero(stands_out))
        row, column = (round(3 * v / size - 0.5) for v, size in zip((y, x), picture.shape[:2], strict=True))
        said = divmod(CELLS.index(answer), 3)
        near_a_border = min(abs(3 * y / picture.shape[0] - border) for border in (1, 2)) < 0.25
        near_a_border |= min(abs(3 * x / picture.shape[1] - border) for border in (1, 2)) < 0.25
        assert (row, column) == said or near_a_border, (number, answer)
        checked += 1
    assert checked >= 5


@needs_font
def test_a_wrong_call_is_answered_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "ops/nano/world", "--seed", "-1", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--seed from 0 on" in run.stderr
    assert not (tmp_path / "out").exists()
