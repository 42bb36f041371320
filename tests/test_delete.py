"""Deleted videos are in no answer, do not come back by themselves, and leave no byte once the archive is clean."""

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from conftest import SAMPLES, VIDX, process_of
from small_archive import (
    MODEL_ID,
    add_video,
    cells_left,
    failed_row,
    folder_of,
    make_old,
    random_rows,
    receipt_for,
    reserve,
    row_for,
    video_id_of,
)

from storage.archive.archive import create_archive, open_archive
from storage.care.clean import clean
from storage.care.repair import repair
from storage.care.verify import verify
from storage.errors import UsageError
from storage.files import local_path
from storage.records import CapturedFrom, Status
from storage.sql import run_sql
from storage.vectors.vector_index import open_index, update_index


@pytest.fixture
def archive(tmp_path):
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    for name in (1, 2, 3):
        add_video(archive, name)
    update_index(archive)
    return archive


def shown(archive):
    return sorted(int(video_id[:8]) for video_id in archive.videos.published().values())


def test_a_deleted_video_is_in_no_answer(archive):
    archive.videos.delete([archive.videos.find("2.mp4")])
    found = open_archive(archive.uri)
    assert shown(found) == [1, 3]
    assert {frame.video_id for frame in found.frames.find()} == {video_id_of(1), video_id_of(3)}
    hits = open_index(found).search(np.ones(16, np.float32) / 4, 100)
    assert {hit.video_number for hit in hits} == {reserve(found, 1), reserve(found, 3)}
    for view in ("videos", "frames"):
        assert run_sql(found, f"SELECT count(*) FROM {view} WHERE video_id LIKE '00000002%'")[1] == [(0,)]
    with pytest.raises(UsageError, match=r"2\.mp4: this video was deleted from"):
        found.videos.find("2.mp4")
    status = found.status()
    assert (status.videos_indexed, status.videos_deleted, status.frames) == (2, 1, 10)
    assert not verify(archive.uri).faults


def test_deleted_content_stays_deleted_until_it_is_asked_for(archive):
    row = archive.videos.find("2.mp4")
    archive.videos.delete([row])
    archive.videos.publish([row])  # by a job that was at it, or of a file under another name
    archive.videos.publish([row_for(archive, 2, 5, uri="file:///moved.mp4")])
    archive.videos.delete([row])
    assert shown(archive) == [1, 3]
    archive.parts.commit([receipt_for(archive, 4, random_rows(6))])
    archive.videos.publish([row_for(archive, 4, 6, uri=row.uri)])  # other content at its place
    assert shown(archive) == [1, 3, 4]
    assert [row.status for row in archive.videos.all()].count(Status.DELETED) == 1
    archive.videos.publish([row_for(archive, 2, 5, uri="file:///moved.mp4")], restored={row.video_id})
    assert shown(archive) == [1, 2, 3, 4]
    assert archive.status().videos_deleted == 0


def test_a_video_that_a_job_has_moved_meanwhile_is_deleted_all_the_same(archive):
    row = archive.videos.find("2.mp4")
    open_archive(archive.uri).videos.update([(row, replace(row, uri="file:///moved.mp4"))])
    assert [gone.uri for gone in archive.videos.delete([row])] == ["file:///moved.mp4"]
    assert shown(archive) == [1, 3]
    assert archive.videos.delete([row]) == []


def test_two_videos_of_one_name_have_to_be_told_apart(archive):
    add_video(archive, 4, uri="file:///other/2.mp4")
    with pytest.raises(UsageError, match=r"matches more than one video.*/clips/2.mp4.*/other/2.mp4"):
        archive.videos.find("2.mp4")


def test_repair_does_not_take_deleted_videos_for_lost(archive):
    archive.videos.delete([archive.videos.find("2.mp4")])
    newest = max(folder_of(archive).glob("videos/_delta_log/*.json"))
    newest.with_name(f"{int(newest.stem) + 1:020d}.json").write_bytes(b"")  # as a power cut leaves a commit
    done = repair(archive.uri)
    assert done.notes
    assert done.rows_lost == 0
    assert not any("are lost" in note for note in done.notes)


def test_the_row_of_an_unreadable_file_goes_for_good(archive):
    archive.videos.publish([failed_row(archive, "file:///clips/secret.mp4")])
    archive.videos.delete([archive.videos.find("secret.mp4")])
    assert [row.uri for row in archive.videos.all()] == [f"file:///clips/{name}.mp4" for name in (1, 2, 3)]


def test_no_byte_of_a_deleted_video_is_left_when_the_archive_is_clean(archive):
    frames = archive.frames.find(archive.videos.find("2.mp4").video_number)
    rows = random_rows(5, seed=2)
    archive.videos.delete([archive.videos.find("2.mp4")])
    make_old(archive)
    assert all(cells_left(archive, rows))
    assert clean(archive, 0).frames == len(frames) == 5
    assert not any(cells_left(archive, rows))
    assert shown(open_archive(archive.uri)) == [1, 3]
    assert not verify(archive.uri).faults


def test_delete_and_restore_from_the_command_line(vidx, archive_copy, tmp_path):
    archive = str(archive_copy)
    name = str(SAMPLES / "tractor.webm")
    (row,) = vidx("sql", f"SELECT * FROM videos WHERE source = '{name}'", "--archive", archive, "--json").json
    refused = vidx("delete", name, "no-such-file.mp4", "--archive", archive)
    assert (refused.code, "no-such-file.mp4: no such video" in refused.err) == (2, True)
    trial = vidx("delete", name, "--archive", archive, "--dry-run", "--json").json
    assert (trial["videos_deleted"], trial["frames_deleted"]) == (1, row["frames"])
    done = vidx("delete", name, row["video_id"][:8], "--archive", archive, "--json")
    assert done.json == {**trial, "dry_run": False}
    search = vidx("search", "x", "--video", name, "--archive", archive)
    again = vidx("delete", os.path.basename(name), "--archive", archive)
    for run in (search, again):
        assert (run.code, "this video was deleted" in run.err) == (2, True)
    assert [one["source"] for one in vidx("status", "--deleted", "--archive", archive, "--json").json] == [name]
    again = vidx("index", str(SAMPLES), "--archive", archive, "--json").json
    assert (again["videos_deleted_before"], again["videos_indexed"]) == (1, 0)
    plan = vidx("index", name, "--archive", archive, "--dry-run", "--json").json
    assert plan["counts"]["deleted_before"] == 1
    back = vidx("index", name, "--archive", archive, "--restore-deleted", "--json").json
    assert (back["videos_indexed"], back["frames"]) == (1, 0)  # its frames were still there
    (found,) = vidx("sql", f"SELECT * FROM videos WHERE source = '{name}'", "--archive", archive, "--json").json
    assert found["frames"] == row["frames"]


@pytest.mark.parametrize(
    ("typed", "code", "says", "left"),
    [
        (b"n\n", 0, "nothing was deleted", [1, 2, 3]),
        (b"y\n", 0, "Delete 1 video with 5 frames?", [1, 3]),
        (b"\x03", 130, "vidx: interrupted", [1, 2, 3]),
    ],
)
def test_on_a_terminal_a_choice_is_confirmed_first(archive, typed, code, says, left):
    ours, terminal = pty.openpty()
    where = ("--where", "source LIKE '%2.mp4'", "--archive", str(folder_of(archive)))
    pipes = {"stdin": terminal, "stderr": terminal, "stdout": subprocess.DEVNULL}
    with process_of([VIDX, "delete", *where], **pipes, start_new_session=True) as process:
        os.close(terminal)
        said = read_until(ours, b"?")
        if typed != b"\x03":
            os.write(ours, typed)
        while typed == b"\x03" and not select.select([ours], [], [], 1)[0]:
            # The terminal is not the one that controls the process. A signal just before it begins to read is lost.
            process.send_signal(signal.SIGINT)
        said += read_until(ours)
    os.close(ours)
    assert (process.returncode, says in said) == (code, True), said
    assert shown(open_archive(archive.uri)) == left


def read_until(terminal, mark=None):
    """What a program writes to a terminal until it writes a mark, or ends."""
    said = b""
    with contextlib.suppress(OSError):  # the program has ended
        while mark is None or mark not in said:
            said += os.read(terminal, 1000)
    return said.decode()


def test_expire_goes_by_capture_time_and_else_by_the_files_time(vidx, archive, tmp_path):
    now = datetime.now(UTC)
    ages = ((1, now - timedelta(days=100), now), (2, None, now - timedelta(days=100)), (3, None, now))
    for name, captured_at, changed in ages:
        mtime_ns = int(changed.timestamp()) * 10**9
        archive.videos.publish([row_for(archive, name, 5, captured_at=captured_at, mtime_ns=mtime_ns)])
    place = str(local_path(archive.uri).decode())
    trial = vidx("expire", "--older-than", "90d", "--archive", place, "--dry-run")
    assert "2 videos with 10 frames would be deleted" in trial.out
    assert shown(open_archive(archive.uri)) == [1, 2, 3]
    done = vidx("expire", "--older-than", "90d", "--archive", place, "--json").json
    assert [entry["source"] for entry in done["videos"]] == ["/clips/1.mp4", "/clips/2.mp4"]
    assert shown(open_archive(archive.uri)) == [3]
    assert vidx("expire", "--older-than", "90d", "--archive", place, "--json").json["videos_deleted"] == 0


def test_expire_says_how_old_each_video_is_and_how_that_is_known(vidx, archive):
    now = datetime.now(UTC)
    recorded, changed, indexed = (now - timedelta(days=days) for days in (100, 40, 30))
    mtime_ns = int(changed.timestamp()) * 10**9
    archive.videos.publish([row_for(archive, 1, 5, captured_at=recorded, mtime_ns=mtime_ns, indexed_at=indexed)])
    archive.videos.publish([row_for(archive, 2, 5, captured_at=None, mtime_ns=mtime_ns, indexed_at=indexed)])
    archive.videos.publish([row_for(archive, 3, 5, captured_at=None, mtime_ns=None, indexed_at=indexed)])
    place = str(folder_of(archive))
    entries = vidx("expire", "--older-than", "29d", "--dry-run", "--archive", place, "--json").json["videos"]
    known = [(entry["age_from"], entry["age_seconds"], entry["since"]) for entry in entries]
    wanted = (("captured_at", 100, recorded), ("file_changed_at", 40, changed), ("indexed_at", 30, indexed))
    for (source, seconds, since), (name, days, instant) in zip(known, wanted, strict=True):
        assert (source, abs(seconds - days * 86400) < 600) == (name, True)
        assert abs(datetime.fromisoformat(since) - instant) < timedelta(seconds=1)
    trial = vidx("expire", "--older-than", "35d", "--dry-run", "--archive", place)
    one, two, three = (line for line in trial.out.splitlines() if "/clips/" in line)
    for line, words in (
        (one, ("deleted", "100.0d", f"{recorded:%Y-%m-%d %H:%M}", "capture time", "/clips/1.mp4")),
        (two, ("deleted", "40.0d", f"{changed:%Y-%m-%d %H:%M}", "last change of the file", "/clips/2.mp4")),
        (three, ("kept", "30.0d", f"{indexed:%Y-%m-%d %H:%M}", "time of indexing", "/clips/3.mp4")),
    ):
        assert all(word in line for word in words)
    assert "2 videos with 10 frames would be deleted" in trial.out
    kept = vidx("expire", "--older-than", "35d", "--dry-run", "--archive", place, "--json").json["videos_kept"]
    assert [(entry["source"], entry["age_from"]) for entry in kept] == [("/clips/3.mp4", "indexed_at")]
    assert shown(open_archive(archive.uri)) == [1, 2, 3]
    done = vidx("expire", "--older-than", "35d", "--archive", place)
    assert (done.code, "100.0d" in done.out, "/clips/3.mp4" in done.out) == (0, True, False)
    assert shown(open_archive(archive.uri)) == [3]


def test_expire_tells_a_files_own_creation_time_from_a_manifests(vidx, archive):
    for name, source in ((1, CapturedFrom.MANIFEST), (2, CapturedFrom.FILE), (3, CapturedFrom.FILE)):
        captured_at = None if name == 3 else datetime(2024, 5, 1, tzinfo=UTC)
        archive.videos.publish([row_for(archive, name, 5, captured_at=captured_at, captured_from=source)])
    command = ("expire", "--older-than", "1d", "--dry-run", "--archive", str(folder_of(archive)))
    known = [(one["age_from"], one.get("captured_from")) for one in vidx(*command, "--json").json["videos"]]
    assert known == [("captured_at", "manifest"), ("captured_at", "file"), ("file_changed_at", None)]
    assert vidx(*command).out.count("capture time given by the file") == 1


def test_a_video_of_which_no_age_is_known_stays_and_is_named(vidx, archive):
    archive.videos.publish([row_for(archive, 2, 5, captured_at=None, mtime_ns=None, indexed_at=None)])
    run = vidx("expire", "--older-than", "0d", "--archive", str(folder_of(archive)))
    assert "/clips/2.mp4 stays: its age is unknown" in run.err
    assert shown(open_archive(archive.uri)) == [2]


@pytest.mark.parametrize("age", ["90", "d", "-3d", "9e9d", "3000y", "1" * 30 + "y"])
def test_what_is_no_age_is_refused(vidx, tmp_path, age):
    run = vidx("expire", f"--older-than={age}", "--archive", str(tmp_path))
    assert (run.code, "90d" in run.err) == (2, True)


def test_a_copy_of_deleted_content_stays_out_too(vidx, archive_copy, tmp_path):
    archive = str(archive_copy)
    assert vidx("delete", "tractor.webm", "--archive", archive).code == 0
    shutil.copy(SAMPLES / "tractor.webm", tmp_path / "copy.webm")
    run = vidx("index", str(tmp_path / "copy.webm"), "--archive", archive)
    assert "1 of the skipped videos was deleted; --restore-deleted indexes it again" in run.out
