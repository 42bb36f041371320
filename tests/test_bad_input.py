"""Bad input gets one clear line and its exit code; nothing is lost."""

import csv
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import SAMPLES

BROKEN = Path(__file__).parent / "videos" / "broken"
SMALL = Path(__file__).parent / "reference" / "llava-mini-tiny" / "checkpoint"
TRACTOR = str(SAMPLES / "tractor.webm")


def one_line(run):
    lines = [line for line in run.err.splitlines() if line.startswith("vidx: ") or line.startswith("Error: ")]
    assert len(lines) == 1, run.err
    assert "Traceback" not in run.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["index", "/nowhere/a.mp4"], 2, "/nowhere/a.mp4: no such file or folder"),
        (["index", TRACTOR, "--model", "nonesuch"], 2, "nonesuch"),
        (["index", TRACTOR, "--model", str(SAMPLES)], 2, "config.json"),
        (["index", TRACTOR, "--device", "tpu"], 2, "'tpu' is not one of"),
        (["index", TRACTOR, "--fps", "0"], 2, "--fps: must be above 0"),
        (["index", TRACTOR, "--patches", "100000"], 2, "--patches 100000"),
        (["index", TRACTOR, "--config", "nowhere.toml"], 2, "--config nowhere.toml"),
        (["index", TRACTOR, "--workers", "1000"], 2, "--workers 1000: there are"),
        (["index", TRACTOR, "--address", "127.0.0.1:1"], 2, "--address 127.0.0.1:1"),
        (["search", "x", "--archive", "/nowhere/archive"], 2, "no archive at /nowhere/archive"),
        (["status", "--archive", "/nowhere/archive"], 2, "no archive at /nowhere/archive"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(vidx, tmp_path, arguments, code, says):
    env = {"VIDX_ARCHIVE": str(tmp_path / "archive")}
    run = vidx(*arguments, env=env)
    assert run.code == code, run.err
    assert says in run.err
    assert "Traceback" not in run.err
    assert not list((tmp_path / "archive").glob("frames/*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["search", "  "], 2, "the text to search is empty"),
        (["search", "x", "--video", "nonesuch.mp4"], 2, "nonesuch.mp4"),
        (["search", "x", "--video", "abc"], 2, "abc"),
        (["search", "x", "--video", "one.mp4", "--video", "b.mp4"], 2, "--video one.mp4 --video b.mp4: give one video"),
        (["search", "x", "--video", ""], 2, "no such video"),
        (["search", "x", "--from", ""], 2, "--from : not a time"),
        (["search", b"x\xff"], 2, "not UTF-8"),
        (["search", "x", "--from", "soon"], 2, "--from soon: not a time"),
        (["search", "x", "--from", "0:75:00"], 2, "must be below 60"),
        (["search", "x", "--from", "20", "--to", "10"], 2, "the range must end after it starts"),
        (["search", "x", "--video", f"{TRACTOR}@5-2"], 2, "must end after it starts"),
        (["search", "x", "--from", "1000000"], 4, "no searchable frames"),
        (["search", "x", "--floor", "1"], 4, "nothing found"),
        (["ask", " "], 2, "empty"),
        (["ask", "How", "many", "apples"], 2, "put a text of several words in quotes"),
        (
            ["ask", "x", "--from", "1000000", "--all"],
            4,
            "nothing found: the chosen part of the archive has no searchable frames",
        ),
        (
            ["ask", "x", "--from", "1000000"],
            4,
            "nothing found: the chosen part of the archive has no searchable frames",
        ),
        (["ask", "x", "--fuse", "magic"], 2, "'magic' is not one of"),
        (["sql", "SELEC 1"], 2, "SELEC"),
        (["sql", "SELECT * FROM read_csv('/etc/passwd')"], 2, ""),
        (["sql", "COPY videos TO '/tmp/out.csv'"], 2, ""),
    ],
)
def test_a_wrong_query_says_what_is_wrong(vidx, samples_archive, arguments, code, says):
    run = vidx(*arguments, "--archive", str(samples_archive[0]))
    assert run.code == code, run.err
    assert says in run.err
    assert "Traceback" not in run.err


def test_a_question_to_an_empty_archive_finds_nothing(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    assert vidx("index", str(BROKEN / "text.mp4"), "--archive", archive).code == 3
    for command in (["search", "x"], ["ask", "x"], ["ask", "x", "--all"], ["chat"]):
        run = vidx(*command, "--archive", archive)
        assert run.code == 4, run.err
        assert "nothing found" in run.err
        assert "Traceback" not in run.err


def test_a_failed_video_has_nothing_to_search_or_ask(vidx, archive_copy):
    broken = str(BROKEN / "text.mp4")
    made = vidx("index", broken, "--archive", str(archive_copy), "--json")
    (failure,) = made.json["failures"]
    assert (made.code, failure["reason"]) == (3, "not_a_video")
    search = vidx("search", "x", "--video", broken, "--archive", str(archive_copy), "--json")
    assert (search.code, search.json["moments"], search.json["frames_searched"]) == (4, [], 0)
    ask = vidx("ask", "x", "--video", broken, "--all", "--archive", str(archive_copy), "--json")
    assert (ask.code, ask.json["found"], ask.json["frames_used"]) == (4, False, 0)
    for run in (search, ask):
        assert run.err.splitlines()[0] == f"{broken} is failed: not_a_video: {failure['detail']}"


def test_a_larger_limit_on_pixels_tries_a_refused_video_again(vidx, tmp_path):
    command = ["index", str(SAMPLES / "highway.avi"), "--archive", str(tmp_path / "archive"), "--json"]
    assert vidx(*command, "--max-pixels", "1000").json["failures"][0]["reason"] == "too_large"
    assert vidx(*command, "--max-pixels", "1000").json["videos_skipped"] == 1
    assert vidx(*command).json["videos_indexed"] == 1


def test_frames_beyond_the_context_are_refused_with_the_numbers(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    command = ["index", str(SAMPLES / "highway.avi"), "--fps", "25", "--model", str(SMALL), "--archive", archive]
    assert vidx(*command).code == 0
    run = vidx("ask", "What?", "--all", "--archive", archive, "--max-tokens", "4000")
    assert run.code == 2
    assert "221 frames" in one_line(run)
    assert "4096" in one_line(run)  # the model's context


def test_a_model_without_text_tower_answers_but_cannot_search(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    assert vidx("index", str(SAMPLES / "highway.avi"), "--model", str(SMALL), "--archive", archive).code == 0
    for where in (["--all"], ["--video", "highway.avi"], ["--to", "9"], ["--to", "9", "--frames", "9"]):
        assert vidx("ask", "What?", *where, "--archive", archive, "--json").json["frames_used"] == 9, where
    status = vidx("status", "--archive", archive, "--json").json
    assert (status["frames"], status["frames_searchable"], status["frames_pending"]) == (9, 0, 9)
    for command in (["search", "x"], ["ask", "x"], ["ask", "x", "--to", "9", "--frames", "8"]):
        run = vidx(*command, "--archive", archive)
        assert run.code == 2
        assert "no text tower" in one_line(run)


def test_an_archive_of_another_model_is_refused_by_both_names(vidx, archive_copy):
    other = Path(__file__).parent / "reference" / "llava-mini-tiny-c2-hd" / "checkpoint"
    for command in (["index", TRACTOR], ["search", "x"], ["ask", "x"]):
        run = vidx(*command, "--model", str(other), "--archive", str(archive_copy))
        assert run.code == 2, run.err
        assert re.search(r"\bnano[ ,]", one_line(run))
        assert str(other) in one_line(run)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self/mountinfo"), reason="needs Linux")
def test_an_archive_that_cannot_be_written_is_exit_code_5(vidx, tmp_path):
    run = vidx("index", TRACTOR, "--archive", "/proc/archive")
    assert run.code == 5, run.err
    assert "/proc/archive" in one_line(run)


def test_every_broken_file_ends_as_listed_and_none_stops_the_job(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    videos = tmp_path / "broken"
    shutil.copytree(BROKEN, videos)
    shutil.copy(TRACTOR, videos / "tractor.webm")
    with open(BROKEN.parent / "BROKEN.csv", encoding="utf-8", newline="") as file:
        expected = {row["file"].removeprefix("broken/"): row["expected"] for row in csv.DictReader(file)}
    expected = {name: end for name, end in expected.items() if (videos / name).exists()}
    run = vidx("index", str(videos), "--archive", archive, "--json")
    assert run.code == 3, run.err
    status = {"works": "indexed", "partial_with_reason": "partial", "fails_with_reason": "failed"}
    rows = vidx("sql", "SELECT source, status, reason, frames FROM videos", "--archive", archive, "--json").json
    found = {os.path.basename(row["source"]): row for row in rows}
    assert found.pop("tractor.webm")["status"] == "indexed"
    assert {name: row["status"] for name, row in found.items()} == {name: status[end] for name, end in expected.items()}
    for row in found.values():
        assert (row["reason"] is None) == (row["status"] == "indexed")
        assert (row["frames"] == 0) == (row["status"] == "failed")
    result = run.json
    kinds = ("videos_indexed", "videos_partial", "videos_failed", "videos_skipped")
    assert sum(result[kind] for kind in kinds) == len(expected) + 1
    assert {os.path.basename(failure["source"]) for failure in result["failures"]} == {
        name for name, row in found.items() if row["status"] != "indexed"
    }
    again = vidx("index", str(videos), "--archive", archive, "--json")
    assert again.code == 0  # the same bytes end the same way: nothing is tried, nothing fails anew
    assert again.json["videos_skipped"] == len(expected) + 1
