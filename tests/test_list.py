"""`vidx list` and `vidx delete` by tag or SQL: the videos that a filter leaves, one a line."""

import csv
import io
import json
import os
import pty
import subprocess
import threading
import warnings
from datetime import UTC, datetime

import pytest
from conftest import VIDX
from small_archive import MODEL_ID, add_video, failed_row, folder_of

from pipeline.cli.print import print_csv
from storage.archive.archive import create_archive, open_archive
from storage.records import Problem, Reason, Status

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def archive(tmp_path):
    """Videos of 5 frames a second apart, two of them dated; one partial, one failed, one deleted."""
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, tags={"camera": "north", "shift": "day"})
    add_video(archive, 2, tags={"camera": "south"}, captured_at=None, uri="file:///clips/a%2C%22b%22%0A%FF.mp4")
    partial = Problem(Reason.TRUNCATED, "ends early")
    add_video(archive, 3, 9, tags={"camera": "north"}, status=Status.PARTIAL, problem=partial)
    archive.videos.publish([failed_row(archive, "file:///clips/locked.mp4")])
    add_video(archive, 4, tags={"camera": "north"})
    archive.videos.delete([archive.videos.find("4.mp4")])
    return archive


@pytest.fixture
def listed(vidx, archive):
    """The names that `list` gives with options."""

    def run(*options):
        done = vidx("list", "--archive", str(folder_of(archive)), *options, "--json")
        assert done.code == 0, done.err
        return [entry["source"].rsplit("/", 1)[-1] for entry in done.json]

    return run


def test_a_line_for_each_video_that_is_not_deleted(vidx, archive):
    lines = vidx("list", "--archive", str(folder_of(archive))).out.splitlines()
    assert len(lines) == 2 + 4
    first = next(line for line in lines if "/clips/1.mp4" in line)
    for word in (
        "00000001",
        "indexed",
        " 5 ",
        "0:00:05.2",
        "2024-05-01 12:00",
        "2024-05-02 06:30",
        "camera=north shift=day",
    ):
        assert word in first


def test_json_tells_all_of_a_video(vidx, archive):
    run = vidx("list", "--archive", str(folder_of(archive)), "--video", "3.mp4", "--json")
    (entry,) = run.json
    assert entry == {
        "video_id": "00000003".ljust(64, "0"),
        "source": "/clips/3.mp4",
        "source_uri": "file:///clips/3.mp4",
        "status": "partial",
        "reason": "truncated",
        "detail": "ends early",
        "frames": 9,
        "duration_seconds": 5.25,
        "captured_at": "2024-05-01T12:00:00+00:00",
        "indexed_at": "2024-05-02T06:30:00+00:00",
        "tags": {"camera": "north"},
        "container": "mov,mp4",
        "codec": "h264",
        "width": 640,
        "height": 360,
        "size_bytes": 1234,
        "sampling": "fps=1,patches=0",
        "model_id": MODEL_ID,
        "captured_from": "manifest",
    }


def test_csv_holds_the_same_values(vidx, archive):
    place = ("--archive", str(folder_of(archive)))
    entries, text = vidx("list", *place, "--json").json, vidx("list", *place, "--csv").out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(entries) == 4
    for row, entry in zip(rows, entries, strict=True):
        tags = json.loads(row.pop("tags"))
        assert tags == entry.pop("tags")
        assert row == {name: "" if value is None else str(value) for name, value in entry.items()}
    assert vidx("list", *place, "--csv", "--status", "deleted", "--tag", "camera=x").out == text.splitlines()[0] + "\n"
    assert vidx("list", *place, "--csv", "--json").code == 2


def test_csv_uses_nothing_that_click_is_about_to_take_away(capsys):
    with warnings.catch_warnings(action="error"):
        print_csv(["uri"], [{"uri": "caf\xe9"}])
    assert capsys.readouterr().out == "uri\ncaf\xe9\n"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], {"1.mp4", r'a,"b"' + "\n\\xff.mp4", "3.mp4", "locked.mp4"}),
        (["--tag", "camera=north"], {"1.mp4", "3.mp4"}),
        (["--tag", "camera=north", "--tag", "camera=south", "--tag", "shift=day"], {"1.mp4"}),
        (["--video", "00000003"], {"3.mp4"}),
        (["--status", "partial", "--status", "failed"], {"3.mp4", "locked.mp4"}),
        (["--status", "deleted"], {"4.mp4"}),
        (["--status", "deleted", "--tag", "camera=south"], set()),
        (["--after", "2024-05-01T12:00:08"], {"3.mp4"}),  # of which a frame was recorded then
        (["--before", "2024-05-01T12:00:00"], set()),
        (["--before", "2024-05-01T12:00:01"], {"1.mp4", "3.mp4"}),
        (["--where", "status = 'failed'"], {"locked.mp4"}),
        (["--where", "captured_at = '2024-05-01 12:00:00' AND frames < 9"], {"1.mp4"}),
        (["--where", "time_seconds >= 8"], {"3.mp4"}),
        (["--where", "true", "--tag", "camera=south"], {r'a,"b"' + "\n\\xff.mp4"}),
    ],
)
def test_filters_choose_videos(listed, options, names):
    found = listed(*options)
    assert set(found) == names
    assert len(found) == len(names)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--where", "no such column"], "SQL"),
        (["--status", "deleted", "--where", "true"], "--status deleted --where"),
        (["--status", "gone"], "gone"),
        (["--video", "none.mp4"], "no such video"),
        (["--tag", "camera"], "KEY=VALUE"),
    ],
)
def test_what_cannot_be_listed_is_said_in_one_line(vidx, archive, options, word):
    run = vidx("list", "--archive", str(folder_of(archive)), *options)
    assert (run.code, word in run.err, "Traceback" in run.err) == (2, True, False)


# Deleting what a filter leaves


@pytest.fixture
def left(archive):
    """The names of the videos that are not deleted."""

    def names():
        rows = open_archive(archive.uri).videos.all()
        return {row.uri.rsplit("/", 1)[-1] for row in rows if row.status is not Status.DELETED}

    return names


def test_delete_takes_what_a_tag_or_sql_chooses(vidx, archive, left):
    place, before = ("--archive", str(folder_of(archive))), left()
    trial = vidx("delete", "--tag", "camera=north", *place, "--dry-run", "--json").json
    assert (trial["videos_deleted"], trial["frames_deleted"], trial["dry_run"]) == (2, 14, True)
    assert left() == before
    narrow = ["--tag", "camera=north", "--where", "frames > 5"]
    assert [entry["source"] for entry in vidx("delete", *narrow, *place, "--json").json["videos"]] == ["/clips/3.mp4"]
    assert left() == before - {"3.mp4"}
    assert "1 video with 0 frames deleted" in vidx("delete", "--where", "status = 'failed'", *place).out
    assert left() == before - {"3.mp4", "locked.mp4"}
    nothing = vidx("delete", "--tag", "camera=west", *place)
    assert (nothing.code, "0 videos with 0 frames deleted" in nothing.out) == (0, True)
    assert vidx("status", "--deleted", *place, "--json").json[0]["source"] == "/clips/3.mp4"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--where"),
        (["1.mp4", "--tag", "camera=north"], "--tag"),
        (["1.mp4", "--where", "true"], "--where"),
        (["--where", "time_seconds > 1"], "time_seconds"),  # a few frames do not condemn a video
        (["--where", "1 = 1; SELECT 1"], "SQL"),
    ],
)
def test_what_delete_cannot_mean_deletes_nothing(vidx, archive, left, arguments, word):
    before = left()
    run = vidx("delete", *arguments, "--archive", str(folder_of(archive)))
    assert (run.code, word in run.err) == (2, True)
    assert left() == before


@pytest.mark.parametrize(
    ("answer", "options", "gone"),
    [("n", [], set()), ("y", [], {"1.mp4", "3.mp4"}), ("", ["--yes"], {"1.mp4", "3.mp4"})],
)
def test_a_terminal_is_asked_before_a_filter_deletes(archive, left, answer, options, gone):
    before = left()
    command = [VIDX, "delete", "--tag", "camera=north", "--archive", str(folder_of(archive)), *options]
    code, text = on_terminal(command, answer)
    assert ("[y/N]" in text) == (not options)
    assert left() == before - gone
    assert code == 0
    assert ("nothing was deleted" in text) == (answer == "n")


def on_terminal(command, answer):
    """Exit code and output of a command that has a terminal, and an answer typed beforehand."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    pieces = []

    def read():
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(timeout=300)
    reader.join(timeout=300)
    os.close(ours)
    return code, b"".join(pieces).decode()
