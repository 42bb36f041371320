"""Videos are found by names, times and tags as people type them, and what finds nothing says what there is."""

import shutil
import subprocess
import unicodedata

import pytest
from conftest import SAMPLES, VIDX

NANO = SAMPLES / "nano_scenes_1.mp4"
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.fixture(scope="module")
def cafe(tmp_path_factory, vidx):
    """An archive of one video whose name and tag are spelled as macOS does, while the manifest names it as we type."""
    folder = tmp_path_factory.mktemp("cafe")
    shutil.copy(NANO, folder / f"{DECOMPOSED}.mp4")
    (folder / "m.csv").write_text(f"source,captured_at,place\n{COMPOSED}.mp4,2024-05-01T12:00Z,{DECOMPOSED}\n")
    archive = str(folder / "archive")
    run = vidx("index", str(folder / "m.csv"), "--archive", archive)
    assert run.code == 0, run.err
    return folder, archive


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED], ids=["NFC", "NFD"])
@pytest.mark.parametrize(
    "command",
    [
        ("search", "apple", "--video", "{}.mp4", "--min-score", "-1"),
        ("search", "--like", "{}.mp4@9", "--min-score", "-1"),
        ("search", "apple", "--tag", "place={}", "--min-score", "-1"),
        ("export", "out.csv", "apple", "--video", "{}.mp4@1-5", "--min-score", "-1"),
        ("ask", "What is there?", "--video", "{}.mp4@1-5", "--fuse", "tokens"),
        ("clip", "{}.mp4@1-5", "out.mp4"),
        ("delete", "{}.mp4", "--dry-run"),
        ("index", "{}.mp4", "--dry-run"),
    ],
    ids=lambda command: command[0],
)
def test_a_name_is_found_in_either_spelling(vidx, cafe, tmp_path, command, name):
    folder, archive = cafe
    if command[0] == "index":
        command = ("index", str(folder / command[1]), *command[2:])
    run = vidx(*(word.format(name) for word in command), "--archive", archive, cwd=tmp_path)
    assert run.code == 0, run.err
    assert "nothing" not in run.out or command[0] == "index"


def test_known_answers_name_a_video_in_either_spelling(vidx, cafe, tmp_path):
    for name in (COMPOSED, DECOMPOSED, f"{COMPOSED}.mp4"):
        (tmp_path / "known.csv").write_text(f"file,start_seconds,end_seconds,text\n{name},9,16,two apples\n")
        run = vidx("evaluate", "retrieval", str(tmp_path / "known.csv"), "--archive", cafe[1])
        assert run.code == 0, run.err


def test_a_chat_finds_a_name_in_either_spelling(cafe):
    for name in (COMPOSED, DECOMPOSED):
        run = subprocess.run(
            [VIDX, "chat", "--archive", cafe[1]],
            input=f"/video {name}.mp4\n",
            capture_output=True,
            text=True,
            check=True,
        )
        assert "30 frames" in run.stderr


SEARCH = ("search", "apple", "--min-score", "-1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--after", "2024-06-01"), "in this time; 1 of 1 video has a capture time, 2024-05-01T12:00:00Z"),
        (("--tag", "plce=x"), "the video has no tag plce; the tags are place"),
        (("--tag", "place=bar"), f"the video has no tag place=bar; the values of place are {DECOMPOSED}"),
        (("--from", "1:00:00"), "ends at 0:00:30.0"),
        (("--where", "width < 10"), "--where is true for nothing"),
    ],
)
def test_what_finds_nothing_says_what_there_is(vidx, cafe, options, says):
    for command in (SEARCH, ("export", "no.csv", *SEARCH[1:]), ("ask", "What is there?")):
        run = vidx(*command, *options, "--archive", cafe[1])
        assert run.code == 4
        assert says in run.err, run.err


def test_a_list_and_a_deletion_that_find_nothing_say_what_there_is(vidx, cafe):
    for command in (("list",), ("delete", "--dry-run")):
        run = vidx(*command, "--tag", "plce=x", "--archive", cafe[1])
        assert run.code == 0
        assert "the video has no tag plce; the tags are place" in run.err
        assert "--where is true for nothing" in vidx(*command, "--where", "width < 10", "--archive", cafe[1]).err
    assert "nothing was recorded in this time" in vidx("list", "--before", "2024-01-01", "--archive", cafe[1]).err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--after", "2020-01-01"), "none of 7 videos has a capture time"),
        (("--before", "2030-01-01", "--video", "highway.avi"), "the video has no capture time"),
        (("--tag", "camera=north"), "none of 7 videos has a tag; a manifest can give tags"),
    ],
)
def test_what_videos_without_times_and_tags_cannot_match_is_said(vidx, samples_archive, options, says):
    run = vidx(*SEARCH, *options, "--archive", str(samples_archive[0]))
    assert run.code == 4
    assert says in run.err, run.err


@pytest.mark.parametrize("option", ["--after", "--before"])
@pytest.mark.parametrize("time", ["1712010112", "1712010112000", "01.05.2024", "yesterday", "2024-05-01x12:00"])
def test_a_time_that_is_not_of_iso_8601_is_refused(vidx, samples_archive, option, time):
    run = vidx(*SEARCH, option, time, "--archive", str(samples_archive[0]))
    assert run.code == 2
    assert f"{option} {time}: not a time; give ISO 8601" in run.err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("serch", "search"), ("indx", "index"), ("STATUS", "status"), ("modles", "models"), ("qqqq", None)],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(vidx, typed, meant):
    run = vidx(typed, "x")
    assert run.code == 2
    assert f"No such command '{typed}'" in run.err
    assert (f"did you mean {meant}?" in run.err) if meant else ("did you mean" not in run.err)


def test_a_mistyped_option_or_line_of_a_chat_is_answered_alike(vidx, samples_archive):
    assert "Did you mean '--archive'" in vidx("search", "x", "--achive", "a").err
    command = [VIDX, "chat", "--archive", samples_archive[0]]
    run = subprocess.run(command, input="/sorces\n", capture_output=True, text=True, check=True)
    assert "/sorces: no such command (did you mean /sources" in run.stderr
