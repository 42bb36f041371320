"""The library gives what the commands give."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLES
from PIL import Image

from pipeline.api import Archive
from pipeline.query import Term
from storage.errors import UsageError


@pytest.fixture(scope="module")
def archive(samples_archive):
    return Archive.open(samples_archive[0])


def test_a_search_gives_the_moments_of_the_command(vidx, archive, samples_archive):
    command = ["search", "an apple^2", "a snake", "--not", "a cow", "--archive", str(samples_archive[0])]
    wanted = vidx(*command, "--where", "width > 100", "--min-score", "0.1", "--json").json["moments"]
    found = archive.search(Term("an apple", 2.0), "a snake", without=["a cow"], where="width > 100", min_score=0.1)
    assert len(found) == len(wanted) > 0
    assert [(moment.video_id, round(moment.start_seconds, 6)) for moment in found] == [
        (moment["video_id"], moment["start_seconds"]) for moment in wanted
    ]
    assert found[0] is next(iter(found))
    assert found[:1] == (found[0],)


def test_moments_are_tables_too(archive, tmp_path):
    found = archive.search("an apple", top=3, min_score=-1)
    table = found.to_arrow()
    assert table.column("score").to_pylist() == [moment.score for moment in found]
    assert table.column("source").to_pylist()[0].startswith(str(SAMPLES))
    assert archive.search("an apple", min_score=1).to_arrow().num_rows == 0
    found.contact_sheet(tmp_path / "found.html")
    assert (tmp_path / "found.html").read_text(encoding="utf-8").count("<img") == 3
    with pytest.raises(UsageError, match="html"):
        found.contact_sheet(tmp_path / "found.txt")


def test_an_answer_is_the_answer_of_the_command(vidx, archive, samples_archive):
    video = str(SAMPLES / "nano_scenes_1.mp4")
    place = ["--archive", str(samples_archive[0]), "--video", video, "--from", "8", "--to", "9", "--json"]
    wanted = vidx("ask", "How many apples are there?", *place).json
    found = archive.ask("How many apples are there?", video=video, start_seconds=8, end_seconds=9)
    assert (found.text, found.frame_count, found.fuse) == (wanted["answer"], wanted["frames_used"], wanted["fuse"])
    assert archive.ask("What?", where="false") is None


def test_pictures_and_moments_are_searched_as_by_the_command(vidx, archive, samples_archive, tmp_path):
    picture = tmp_path / "scene.jpg"
    Image.new("RGB", (64, 48), "purple").save(picture)
    command = ["search", "a cow", "--image", str(picture), "--like", "nano_scenes_1.mp4@2"]
    wanted = vidx(*command, "--archive", str(samples_archive[0]), "--min-score", "0.1", "--json").json
    found = archive.search("a cow", images=[picture], like=["nano_scenes_1.mp4@2"], min_score=0.1)
    assert [round(moment.score, 4) for moment in found] == [round(one["score"], 4) for one in wanted["moments"]]
    assert found
    assert found.floor == 0.1
    assert archive.search("a cow").floor > 0.1


def test_what_is_wrong_is_said_as_by_the_command(archive, tmp_path):
    with pytest.raises(UsageError, match="no archive"):
        Archive.open(tmp_path)
    with pytest.raises(UsageError, match="no such video"):
        archive.search("x", video="no-such-file.mp4")
    with pytest.raises(UsageError, match="SQL"):
        archive.search("x", where="no such column")
    with pytest.raises(UsageError, match="empty"):
        archive.search(" ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", 0),
        ("fuse", "stored"),
        ("over", "all"),
        ("max_tokens", 0),
        ("max_words", 0),
        ("temperature", -0.1),
        ("seed", -1),
    ],
)
def test_an_option_of_ask_that_cannot_be_is_named_with_what_is_allowed(archive, name, value):
    with pytest.raises(UsageError, match=f"^{name}={value!r}: "):
        archive.ask("What is there?", **{name: value})


def test_rows_counts_and_videos(archive):
    (row,) = archive.sql("SELECT count(*) AS frames FROM frames")
    assert archive.status().frames == row["frames"]
    assert archive.video("tractor.webm").uri.endswith("tractor.webm")


def test_the_example_of_the_documentation_runs(samples_archive, tmp_path):
    """Of the README, with the archive and a video of the samples."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("./vidx-archive", str(samples_archive[0])).replace("found.html", str(tmp_path / "found.html"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found.html").exists()
    assert done.stdout.count("\n") > 3
