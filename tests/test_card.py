"""What a model's card says reaches the person who uses it, where it matters and nowhere else."""

import shutil
from pathlib import Path

import pytest
from conftest import SAMPLES
from small_bundle import change_json

from workers.models.bundle import find_bundle

CARD = {
    "licence": "MIT",
    "knows": "drawn shapes. Circles above all.",
    "does_not_know": "photographs, or anything else.",
    "trained": "for a day",
    "accuracy": {"exact": {"colour": 98, "count": 71.5}, "tokens": {"colour": 60.04}},
    "search_floor": -1,
}
ELSEWHERE = "--model DIR|HUB-ID, for instance ICTNLP/llava-mini-llama-3.1-8b"
QUESTION = ("What is there?", "--video", str(SAMPLES / "highway.avi"), "--to", "2")


@pytest.fixture
def model(tmp_path):
    """The built-in model under another card; its id is the same."""
    directory = Path(shutil.copytree(find_bundle("nano").directory, tmp_path / "model"))
    change_json(directory / "config.json", {"vidx": CARD})
    return directory


def test_indexing_says_in_a_line_what_the_model_knows_and_does_not(vidx, model, tmp_path):
    command = ["index", str(SAMPLES / "highway.avi"), "--archive", str(tmp_path / "archive"), "--model", str(model)]
    lines = [line for line in vidx(*command).err.splitlines() if line.startswith("model ")]
    (line,) = lines
    assert line.startswith(f"model {model} knows drawn shapes; it does not know photographs, or anything else; ")
    assert line.endswith(ELSEWHERE)
    change_json(model / "config.json", {"vidx": {"licence": "MIT"}})
    assert "know" not in vidx(*command).err.replace(str(model), "")


def test_a_search_is_silent_unless_it_finds_nothing(vidx, model, samples_archive):
    command = ["search", "a car", "--archive", str(samples_archive[0]), "--model", str(model), "--limit", "1"]
    assert vidx(*command).err == ""
    nothing = vidx(*command, "--floor", "1")
    assert nothing.code == 4
    (line,) = nothing.err.splitlines()
    assert line.startswith(
        f"nothing found: none of {samples_archive[1]['frames']} frames reaches the score 1 (--min-score); "
    )
    assert "it does not know photographs, or anything else" in line
    (line,) = vidx(*command, "--from", "1000000").err.splitlines()  # what it knows plays no part in that
    assert "photographs" not in line


def test_an_answer_that_the_card_lists_as_unknown_comes_with_a_hint(vidx, model, samples_archive):
    command = ["ask", *QUESTION, "--archive", str(samples_archive[0]), "--model", str(model)]
    known = vidx(*command, "--json")
    assert (known.json["answer_known"], known.json["hint"], known.err) == (True, "", "")
    listed = {f" {known.json['answer'].upper()}. ": "the footage is outside what it was trained on"}
    change_json(model / "config.json", {"vidx": CARD | {"unknown_answers": listed}})
    unknown = vidx(*command, "--json")
    assert unknown.json["answer"] == known.json["answer"]
    assert unknown.json["answer_known"] is False
    hint = unknown.json["hint"]
    why = "it does not know this: the footage is outside what it was trained on; "
    assert hint.startswith(f"model {model} knows drawn shapes; {why}")
    assert hint.endswith(ELSEWHERE)
    shown = vidx(*command)
    assert shown.err == f"{hint}\n"
    assert shown.out.rstrip().endswith("fused with exact")
    assert "--model" not in shown.out


def test_windows_that_the_model_does_not_know_are_no_known_answers(vidx, samples_archive):
    archive = ["--archive", str(samples_archive[0])]
    asked = ["ask", "What is there?", *archive, "--all", "--over", "windows"]
    real = vidx(*asked, "--video", "highway.avi", "--json").json
    assert len(real["windows"]) == 2  # 9 frames, of which nano sees 8 at once
    for window in real["windows"]:
        alone = ("--video", f"highway.avi@{window['start_seconds']}-{window['end_seconds'] - 0.01}")
        one = vidx("ask", "What is there?", *archive, *alone, "--json").json
        assert (one["answer"], one["answer_known"]) == ("nothing that I know", False)
        assert {name: window[name] for name in ("answer", "answer_known", "hint")} == {
            name: one[name] for name in ("answer", "answer_known", "hint")
        }
    assert (real["answer_known"], real["hint"]) == (False, one["hint"])
    assert vidx(*asked, "--video", "highway.avi").err.splitlines()[-1] == one["hint"]


def test_windows_of_which_some_are_known_make_a_known_answer(vidx, samples_archive):
    asked = ["ask", "What is there?", "--archive", str(samples_archive[0]), "--all", "--over", "windows"]
    asked += ["--where", "source LIKE '%highway.avi' OR source LIKE '%nano_scenes_1.mp4'"]
    run = vidx(*asked, "--json")
    known = [window["answer_known"] for window in run.json["windows"]]
    scenes = ["nano_scenes_1" in window["source"] for window in run.json["windows"]]
    assert known == scenes
    assert run.json["answer_known"]
    some = f"it does not know this in {scenes.count(False)} of the {len(scenes)} windows: the footage is outside"
    assert some in run.json["hint"]
    assert [window["hint"] for window, is_known in zip(run.json["windows"], known, strict=True) if is_known] == [""] * (
        scenes.count(True)
    )


@pytest.mark.parametrize("words", ["1", "2", "4"])
def test_an_answer_that_is_cut_still_says_that_the_model_does_not_know(vidx, samples_archive, words):
    asked = ("--archive", str(samples_archive[0]), "--video", "highway.avi", "--max-words", words, "--json")
    cut = vidx("ask", "What is there?", *asked).json
    assert cut["answer"] == " ".join(["nothing", "that", "I", "know"][: int(words)])
    assert (cut["answer_known"], bool(cut["hint"])) == (False, True)


def test_no_answer_is_no_known_answer(vidx, samples_archive):
    run = vidx("ask", "x", "--from", "1000000", "--archive", str(samples_archive[0]), "--json")
    assert (run.code, run.json["found"], run.json["answer_known"], run.json["hint"]) == (4, False, False, "")


def test_models_shows_the_whole_card(vidx, model, tmp_path):
    cache = tmp_path / "hub" / "models--someone--mini"
    shutil.copytree(model, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    env = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "VIDX_ARCHIVE": str(tmp_path / "none")}
    (found,) = [entry for entry in vidx("models", "--json", env=env).json if entry["name"].startswith("someone/mini")]
    assert {name: found[name] for name in CARD} == CARD
    assert (found["model_id"], found["unknown_answers"]) == (find_bundle("nano").model_id, {})
    out = vidx("models", env=env).out
    details = [line.split() for line in out[out.index("\nsomeone/mini") :].splitlines()]
    assert ["does", "not", "know", "photographs,", "or", "anything", "else."] in details
    assert ["trained", "for", "a", "day"] in details
    assert ["%", "right", "exact", "tokens"] in details
    assert ["colour", "98.0", "60.0"] in details
    assert ["count", "71.5"] in details


def test_a_card_cannot_write_the_terminal(vidx, model, samples_archive):
    change_json(model / "config.json", {"vidx": CARD | {"does_not_know": "a\x1b[2Jb\nc"}})
    run = vidx("search", "x", "--floor", "1", "--archive", str(samples_archive[0]), "--model", str(model))
    assert r"does not know a\x1b[2Jb\nc;" in run.err
    assert len(run.err.splitlines()) == 1
