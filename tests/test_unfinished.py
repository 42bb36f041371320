"""Long videos can be searched segment by segment while they are indexed, and after their job was interrupted."""

import os
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import VIDX, run_vidx
from small_archive import (
    MODEL_ID,
    PROBE,
    add_video,
    failed_row,
    make_old,
    random_rows,
    receipt_for,
    reserve,
    row_for,
    video_id_of,
)

from pipeline.ask.filter import Filter
from pipeline.index.archived import WantedRows
from pipeline.index.plan import Decision, decide_known
from storage.archive.archive import create_archive, open_archive
from storage.care.clean import clean
from storage.care.compact import compact
from storage.care.verify import verify
from storage.records import Problem, Reason, Sampling, Status
from storage.vectors.vector_index import open_index, update_index

KILLED = 6  # as the process says that waits for the job's
UNFINISHED = Problem(Reason.UNFINISHED, "it is being indexed")
TWICE = Sampling(Fraction(2), 0)
HALF_AN_HOUR = replace(PROBE, clock_offset_seconds=0.0, duration_seconds=1800.0)


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")


def again(archive):
    return open_archive(archive.uri)


def unfinished_row(archive, name, count, **changes):
    return row_for(
        archive, name, count, **{"status": Status.INDEXING, "problem": UNFINISHED, "probe": HALF_AN_HOUR, **changes}
    )


def half(archive, name, place):
    """The first (0) or second (1) five of ten seconds, as a segment to commit."""
    cut = (None, 50) if place == 0 else (50, None)
    return receipt_for(archive, name, random_rows(10, seed=name).cut(5 * place, 5 * place + 5), cut)


def begin_video(archive, name, **changes):
    """Commits the first half of a video and shows it; whether it is shown."""
    archive.parts.commit([half(archive, name, 0)])
    return archive.videos.publish([unfinished_row(archive, name, 5, **changes)]) == {video_id_of(name)}


def shown(archive):
    """Frames by the seed of their video."""
    found = again(archive)
    counts = {}
    for frame in found.frames.find():
        name = int(frame.video_id[:8], 16)
        counts[name] = counts.get(name, 0) + 1
    assert sum(counts.values()) == found.videos.frame_count() == found.status().frames
    return counts


# What readers see


def test_segments_are_seen_as_they_are_committed_and_the_row_says_how_far_it_is(archive):
    assert begin_video(archive, 1)
    assert (shown(archive), again(archive).status().videos_in_progress) == ({1: 5}, 1)
    (row,) = again(archive).videos.all()
    assert (row.status, row.problem.reason, row.frame_count) == (Status.INDEXING, Reason.UNFINISHED, 5)
    assert row.problem.detail.startswith("0:00:05 of 0:30:00 is indexed")
    archive.parts.commit([half(archive, 1, 1)])
    (row,) = again(archive).videos.all()
    assert (shown(archive), row.frame_count) == ({1: 10}, 10)
    assert row.problem.detail.startswith("0:00:10 of 0:30:00 is indexed")
    archive.videos.publish([row_for(archive, 1, 10)])
    assert again(archive).videos.all()[0].status is Status.INDEXED
    status = again(archive).status()
    assert (status.videos_indexed, status.videos_in_progress, status.frames_in_progress) == (1, 0, 0)


def test_a_reader_stays_with_what_it_opened(archive):
    begin_video(archive, 1)
    reader = again(archive)
    archive.parts.commit([half(archive, 1, 1)])
    archive.videos.publish([row_for(archive, 1, 10)])
    assert (len(reader.frames.find()), reader.videos.frame_count(), reader.videos.all()[0].status) == (
        5,
        5,
        Status.INDEXING,
    )
    reader.refresh()
    assert (len(reader.frames.find()), reader.videos.frame_count(), reader.videos.all()[0].status) == (
        10,
        10,
        Status.INDEXED,
    )


def test_sql_counts_the_frames_that_it_shows(vidx, archive):
    begin_video(archive, 1)
    archive.parts.commit([half(archive, 1, 1)])
    statement = "SELECT status, reason, frames, (SELECT count(*) FROM frames) AS n FROM videos"
    found = vidx("sql", statement, "--archive", local(archive), "--json").json
    assert found == [{"status": "indexing", "reason": "unfinished", "frames": 10, "n": 10}]


def local(archive):
    return archive.uri.removeprefix("file://")


def test_search_finds_what_is_committed_and_the_index_takes_in_each_segment_once(archive):
    begin_video(archive, 1)
    keys = random_rows(10, seed=1).tokens.search_key.astype(np.float32)
    assert update_index(again(archive)) == 5
    archive.parts.commit([half(archive, 1, 1)])
    for _ in range(2):  # beside the index, and in it
        index = open_index(again(archive))
        assert index.frame_count == 10
        for place in (2, 7):
            (hit,) = index.search(keys[place], 1)
            assert (hit.frame_index, round(hit.score, 2)) == (25 * place, 1.0)
        update_index(again(archive))
    archive.videos.publish([row_for(archive, 1, 10)])
    assert update_index(again(archive)) == 0


def test_who_looks_at_a_video_that_is_not_whole_is_told(archive):
    begin_video(archive, 1, tags={"camera": "north"})
    add_video(archive, 2, tags={"camera": "south"})
    found = again(archive)
    for within, names in (
        (Filter(), [1]),
        (Filter(tags={"camera": ("north",)}), [1]),
        (Filter(tags={"camera": ("south",)}), []),
        (Filter(where="source LIKE '%1.mp4'"), [1]),
        (Filter(where="frame_index > 25 AND source LIKE '%2.mp4'"), []),
        (Filter(video=found.videos.find("1.mp4"), start_seconds=600.0), [1]),
        (Filter(video=found.videos.find("2.mp4")), []),
    ):
        assert [row.video_id for row in within.unfinished(found)] == [video_id_of(name) for name in names], within


# What a row of a video that is not whole may replace


def test_what_can_be_searched_stays_until_what_replaces_it_is_whole(archive):
    add_video(archive, 1)
    other = {"video_number": reserve(archive, 1, TWICE), "sampling": str(TWICE)}
    assert not archive.videos.publish([unfinished_row(archive, 1, 5, **other)])  # the same content with other settings
    archive.parts.commit([half(archive, 2, 0)])
    assert not archive.videos.publish(
        [unfinished_row(archive, 2, 5, uri="file:///clips/1.mp4")]
    )  # the file has changed
    assert shown(archive) == {1: 5}
    assert again(archive).videos.all()[0].status is Status.INDEXED
    archive.parts.commit([half(archive, 2, 1)])
    archive.videos.publish([row_for(archive, 2, 10, uri="file:///clips/1.mp4")])
    assert shown(archive) == {2: 10}


def test_a_part_stays_until_what_replaces_it_is_whole(archive):
    begin_video(archive, 1)
    archive.parts.commit([half(archive, 2, 0)])
    assert not archive.videos.publish([unfinished_row(archive, 2, 5, uri="file:///clips/1.mp4")])
    other = {"video_number": reserve(archive, 1, TWICE), "sampling": str(TWICE)}
    assert not archive.videos.publish([unfinished_row(archive, 1, 5, **other)])
    crashed = Problem(Reason.CRASHED, "the decoder died")
    assert not archive.videos.publish([row_for(archive, 1, 0, status=Status.FAILED, problem=crashed, **other)])
    assert not archive.videos.publish([failed_row(archive, "file:///clips/1.mp4")])
    assert shown(archive) == {1: 5}


def test_a_late_job_does_not_put_a_part_in_the_place_of_the_whole(archive):
    begin_video(archive, 1)
    archive.parts.commit([half(archive, 1, 1)])
    archive.videos.publish([row_for(archive, 1, 10)])
    assert not archive.videos.publish([unfinished_row(archive, 1, 5)])
    assert again(archive).videos.all()[0].status is Status.INDEXED


def test_what_failed_makes_way_for_a_part(archive):
    archive.videos.publish([failed_row(archive, "file:///clips/1.mp4")])
    timeout = Problem(Reason.TIMEOUT, "gave up")
    archive.videos.publish([row_for(archive, 2, 0, status=Status.FAILED, problem=timeout)])
    assert begin_video(archive, 1)
    assert begin_video(archive, 2)
    assert [row.status for row in again(archive).videos.all()] == [Status.INDEXING] * 2


def test_what_a_user_deletes_meanwhile_stays_deleted(archive):
    begin_video(archive, 1)
    (gone,) = archive.videos.delete([again(archive).videos.all()[0]])
    assert (gone.frame_count, shown(archive)) == (5, {})
    archive.parts.commit([half(archive, 1, 1)])
    assert not archive.videos.publish([unfinished_row(archive, 1, 10)])
    assert not archive.videos.publish([row_for(archive, 1, 10)])
    assert (shown(archive), again(archive).status().videos_in_progress) == ({}, 0)
    assert archive.videos.publish([unfinished_row(archive, 1, 10)], restored={video_id_of(1)})
    assert shown(archive) == {1: 10}


def test_tags_of_a_growing_video_can_be_changed(archive):
    begin_video(archive, 1)
    (row,) = again(archive).videos.all()
    archive.parts.commit([half(archive, 1, 1)])
    archive.videos.update([(row, replace(row, uri="file:///new/1.mp4", tags={"camera": "south"}))])
    (row,) = again(archive).videos.all()
    assert (row.uri, row.tags, row.status, row.frame_count) == (
        "file:///new/1.mp4",
        {"camera": "south"},
        Status.INDEXING,
        10,
    )


# Care


def test_care_takes_a_part_for_what_it_is(archive):
    begin_video(archive, 1)
    archive.parts.commit([half(archive, 1, 1)])
    make_old(archive)
    assert clean(again(archive), 0).frames == 0
    assert compact(again(archive)).parts_joined == 0  # a job that resumes needs its segments
    assert verify(archive.uri).faults == ()
    assert shown(archive) == {1: 10}
    assert archive.videos.recount() == []


def test_a_part_that_loses_frames_is_told_and_tried_again(archive):
    begin_video(archive, 1)
    (path,) = [part.path for part in again(archive).frames.parts()]
    archive.parts.drop([path])
    assert [fault.table for fault in verify(archive.uri).faults] == ["videos"]
    (row,) = archive.videos.recount()
    assert (row.status, row.problem.reason, row.frame_count) == (Status.FAILED, Reason.DAMAGED, 0)
    assert decide_known(row, WantedRows(MODEL_ID, Sampling.from_text(row.sampling), 10**9)) is Decision.RETRY


def test_the_next_run_goes_on_with_a_part(archive):
    begin_video(archive, 1)
    (row,) = again(archive).videos.all()
    wanted = WantedRows(MODEL_ID, Sampling.from_text(row.sampling), 10**9)
    assert decide_known(row, wanted) is Decision.UNFINISHED
    assert Decision.UNFINISHED.is_work
    assert decide_known(row, replace(wanted, sampling=TWICE)) is Decision.SETTINGS
    assert archive.parts.committed(row.video_number, ["..50", "50.."]) == {"..50"}


# The whole path, killed


JOB = """
import os, signal, sys, pipeline.index.job
from functools import partial
from storage.archive import delta
from storage.archive.archive import open_archive
last, what = {last_step}, {what!r}  # at which step it happens: odd ones lie before a commit, even ones behind
pipeline.index.job.split = partial(pipeline.index.job.split, segment_seconds=5)
pipeline.index.job.COMMIT_SECONDS = pipeline.index.job.SHOW_PART_SECONDS = 0.0
commit, steps = delta.commit, 0
def step():
    global steps
    steps += 1
    if steps == last and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif steps == last:
        archive = open_archive(sys.argv[sys.argv.index("--archive") + 1])
        archive.videos.delete(archive.videos.all())
def commit_and_count(*arguments):
    step()
    commit(*arguments)
    step()
delta.commit = commit_and_count
"""


def run_job(last_step, *arguments, what="kill"):
    """`vidx index` that cuts videos every five seconds and is killed at a step; 0 for never."""
    return run_vidx("index", *arguments, script=JOB.format(last_step=last_step, what=what))


def rows_of(archive):
    """Every frame that is shown, and its token, with how often it is there."""
    statement = "SELECT video_id, ticks, duration_seconds, md5(token) AS token FROM frames ORDER BY ALL"
    return [tuple(row.values()) for row in run_vidx("sql", statement, "--archive", archive, "--json").json]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Twenty seconds with a key frame every five: four segments."""
    path = tmp_path_factory.mktemp("video") / "cam1.mp4"
    source = "testsrc2=size=128x96:rate=10:duration=20"
    coded = ["-c:v", "libx264", "-g", "50", "-keyint_min", "50", "-sc_threshold", "0", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *coded, path], check=True)
    return path


@pytest.fixture(scope="module")
def undisturbed(video):
    archive = str(video.parent / "undisturbed")
    done = run_job(0, str(video), "--archive", archive, "--json")
    assert (done.code, done.json["frames"]) == (0, 20), done.err
    return rows_of(archive)


@pytest.mark.parametrize(
    "steps", [(4, 3, 2, 4, 1), *[pytest.param((n,), marks=pytest.mark.long) for n in range(1, 16)]]
)
def test_jobs_that_are_killed_between_commits_lose_and_double_nothing(video, undisturbed, tmp_path, steps):
    """Each job goes on where the one before was killed."""
    archive, before = str(tmp_path / "archive"), set()
    for last_step in steps:
        done = run_job(last_step, str(video), "--archive", archive)
        assert done.code in (0, KILLED), done.err
        found = open_archive(archive)
        committed = int(found.parts.bounds().row_count.sum())
        status = found.status()
        is_whole = status.videos_indexed == 1
        assert (status.videos_in_progress, status.frames_in_progress) == (
            (0, 0) if is_whole else (committed > 0, committed)
        )
        rows = rows_of(archive)
        assert len(set(rows)) == len(rows) == found.videos.frame_count()
        assert before <= set(rows) <= set(undisturbed)
        assert verify(archive).faults == ()
        before = set(rows)
    done = run_job(0, str(video), "--archive", archive, "--json")
    assert (done.code, rows_of(archive)) == (0, undisturbed), done.err
    assert run_vidx("status", "--archive", archive, "--json").json["videos_in_progress"] == 0
    assert os.listdir(Path(archive) / "jobs") == []


def test_a_part_is_searched_and_what_it_replaces_stays_until_it_is_whole(video, tmp_path):
    archive = str(tmp_path / "archive")
    assert run_job(8, str(video), "--archive", archive).code == KILLED  # two segments are in
    found = run_vidx("search", "x", "--floor", "-1", "--archive", archive, "--json")
    count = found.json["frames_searched"]
    assert count in (10, 15)  # what was ready together is committed together
    assert f"not complete yet: {video}: 0:00:{count} of 0:00:20 is indexed" in found.err
    assert [entry["source"] for entry in found.json["videos_unfinished"]] == [str(video)]
    listed = run_vidx("list", "--status", "indexing", "--archive", archive, "--json").json
    assert [(row["source"], row["status"], row["frames"]) for row in listed] == [(str(video), "indexing", count)]
    chat = subprocess.run(
        [VIDX, "chat", "--archive", archive], input="", capture_output=True, text=True, timeout=300, check=False
    )
    assert "not complete yet" in chat.stderr
    asked = run_vidx("ask", "What?", "--video", str(video), "--max-tokens", "1", "--archive", archive, "--json")
    assert (asked.code, asked.json["videos_unfinished"]) == (0, found.json["videos_unfinished"])
    assert "not complete yet" in asked.err
    plans = run_vidx("index", str(video), "--archive", archive, "--dry-run", "--json").json["counts"]
    assert (plans["unfinished"], plans["known"]) == (1, 0)

    done = run_job(0, str(video), "--archive", archive, "--json")
    assert done.json["frames_resumed"] == count
    whole = run_vidx("search", "x", "--floor", "-1", "--archive", archive, "--json")
    assert (whole.json["frames_searched"], whole.json["videos_unfinished"], "whole" in whole.err) == (20, [], False)

    assert run_job(8, str(video), "--fps", "2", "--archive", archive).code == KILLED
    assert len(rows_of(archive)) == 20  # the first ones
    status = run_vidx("status", "--archive", archive, "--json").json
    assert (status["frames"], status["videos_in_progress"], status["frames_in_progress_searchable"]) == (20, 1, 0)
    assert status["frames_in_progress"] >= 10
    assert run_job(0, str(video), "--fps", "2", "--archive", archive).code == 0
    assert len(rows_of(archive)) == 40
    assert run_vidx("status", "--archive", archive, "--json").json["videos_in_progress"] == 0


def test_a_video_that_is_deleted_while_a_job_is_at_it_stays_deleted(video, tmp_path):
    archive = str(tmp_path / "archive")
    done = run_job(6, str(video), "--archive", archive, "--json", what="delete")  # as soon as it is shown
    assert done.code == 0, done.err
    result = done.json
    assert (result["videos_indexed"], result["videos_skipped"], result["videos_deleted_before"]) == (0, 1, 1)
    assert rows_of(archive) == []
    again = run_vidx("index", str(video), "--archive", archive, "--json").json
    assert (again["videos_deleted_before"], again["frames"]) == (1, 0)
    status = run_vidx("status", "--archive", archive, "--json").json
    assert (status["videos"]["deleted"], status["videos_in_progress"]) == (1, 0)
