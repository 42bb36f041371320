"""clean removes what nothing names or shows any more, and nothing else."""

import errno
import os
import time
from dataclasses import replace

import pytest
from small_archive import (
    MODEL_ID,
    add_video,
    cells_left,
    folder_of,
    held_files,
    make_old,
    partial_receipt,
    random_rows,
    receipt_for,
    reserve,
    row_for,
    video_id_of,
    write_part,
)

from storage.archive.archive import create_archive, open_archive
from storage.archive.claims import GONE_SECONDS, Job
from storage.archive.part_table import PartTable
from storage.care import clean as sweeping
from storage.care.clean import UNNAMED_KEPT_SECONDS, Cleaned, clean, remove_unnamed_files
from storage.care.verify import verify
from storage.records import Reason, Status
from storage.vectors.vector_index import open_index, update_index


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="a model")


def commit_unpublished(archive, name, count=5):
    """Frames that no row shows, from long ago; their number."""
    assert archive.parts.commit([receipt_for(archive, name, random_rows(count))]) == [True]
    make_old(archive)
    return reserve(archive, name)


def test_what_a_running_job_has_written_is_left_alone(archive, monkeypatch):
    monkeypatch.setattr(sweeping, "MARGIN_SECONDS", 0)
    add_video(archive, 1)
    before = held_files(archive)
    with Job(archive.uri):
        part = write_part(archive.frames_uri, random_rows(3, 5), video_id=video_id_of(2), number=2)
        assert remove_unnamed_files(archive, 0) == 0
        assert f"frames/{part.path}" in held_files(archive)
    assert remove_unnamed_files(archive, 0) == 1
    assert held_files(archive) == before


def test_a_sweep_removes_files_that_nothing_names_for_a_week_and_nothing_else(archive):
    add_video(archive, 1, 20)
    archive.parts.commit([partial_receipt(archive, 2, random_rows(4))])
    archive.videos.publish([row_for(archive, 2, 4)])
    update_index(archive)
    reader = open_archive(archive.uri)
    archive.parts.commit([receipt_for(archive, 2, random_rows(9))])
    archive.videos.publish([row_for(archive, 2, 9)])
    archive.parts.commit([receipt_for(archive, 3, random_rows(5))])  # not published
    update_index(archive)
    orphans = {"frames/a.parquet", "frames/a.parquet.b.tmp", "videos/c.parquet", "numbers/d.parquet", "index/e.keys"}
    for name in orphans:
        (folder_of(archive) / name).write_bytes(b"x")
    make_old(archive)
    for name in ("frames/young.parquet", "index/young.keys"):
        (folder_of(archive) / name).write_bytes(b"x")
    before = held_files(archive)
    assert remove_unnamed_files(archive) == len(orphans)
    assert held_files(archive) == before - orphans  # also what was replaced just now, for readers of older versions
    assert len(reader.frames.find()) == 24
    found = open_archive(archive.uri)
    assert found.version == archive.version
    assert (len(found.frames.find()), found.parts.frame_count(reserve(archive, 3))) == (29, 5)
    assert not open_index(found).rebuilt
    assert remove_unnamed_files(archive) == 0


def test_no_byte_of_replaced_content_is_left(archive):
    kept = add_video(archive, 1, 50)
    gone = add_video(archive, 2, 6)
    halfway = random_rows(4, 8)
    archive.parts.commit([partial_receipt(archive, 4, halfway)])
    archive.videos.publish([row_for(archive, 4, 4)])
    update_index(archive)
    archive.parts.commit([receipt_for(archive, 3, random_rows(7, 9)), receipt_for(archive, 4, random_rows(5, 10))])
    archive.videos.publish([row_for(archive, 3, 7, uri="file:///clips/2.mp4"), row_for(archive, 4, 5)])
    update_index(archive)
    make_old(archive)
    assert all(cells_left(archive, kept) + cells_left(archive, gone) + cells_left(archive, halfway))
    assert clean(archive, 0).frames == 6
    assert all(cells_left(archive, kept))
    assert not any(cells_left(archive, gone) + cells_left(archive, halfway))
    found = open_archive(archive.uri)
    assert len(found.frames.find()) == 62
    assert not open_index(found).rebuilt
    assert not verify(archive.uri).faults


def test_frames_that_a_killed_job_left_stay_for_a_while(archive):
    add_video(archive, 1)
    archive.parts.commit([receipt_for(archive, 2, random_rows(5))])
    number = reserve(archive, 2)
    assert clean(archive, UNNAMED_KEPT_SECONDS) == Cleaned(0, 0)
    make_old(archive)
    assert remove_unnamed_files(archive) == 0
    assert open_archive(archive.uri).parts.frame_count(number) == 5
    assert clean(archive, UNNAMED_KEPT_SECONDS).frames == 5
    assert open_archive(archive.uri).parts.frame_count(number) == 0
    assert archive.parts.commit([receipt_for(archive, 2, random_rows(5))]) == [True]  # and can come again
    archive.videos.publish([row_for(archive, 2, 5)])
    assert not verify(archive.uri).faults


def test_frames_of_a_video_that_a_job_has_taken_stay(archive):
    number = commit_unpublished(archive, 1)
    with Job(archive.uri) as job:
        assert job.take(number)
        (file,) = folder_of(archive).glob("jobs/*.job")
        long_ago = time.time() - 2 * GONE_SECONDS
        os.utime(file, (long_ago, long_ago))  # the machine slept
        assert clean(archive, 0).frames == 0
        archive.videos.publish([row_for(archive, 1, 5)])
    assert clean(archive, 0).frames == 0
    assert len(open_archive(archive.uri).frames.find()) == 5


@pytest.mark.parametrize("others", [0, 1])
def test_where_nothing_can_be_taken_frames_stay_while_another_job_is_there(archive, monkeypatch, others):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    number = commit_unpublished(archive, 1)
    monkeypatch.setattr(os, "link", refuse)
    jobs = [Job(archive.uri).__enter__() for _ in range(others)]
    try:
        assert clean(archive, 0).frames == (0 if others else 5)
    finally:
        for job in jobs:
            job.__exit__()
    assert archive.parts.frame_count(number) == (5 if others else 0)


def test_a_row_that_shows_frames_while_they_are_dropped_says_that_they_are_missing(archive, monkeypatch):
    """As by a job that took the video while this process slept."""
    commit_unpublished(archive, 1)
    drop = PartTable.drop

    def publish_first(self, paths):
        open_archive(archive.uri).videos.publish([row_for(archive, 1, 5)])
        drop(self, paths)

    monkeypatch.setattr(PartTable, "drop", publish_first)
    clean(archive, 0)
    (row,) = open_archive(archive.uri).videos.all()
    assert (row.status, row.problem.reason, row.frame_count) == (Status.FAILED, Reason.DAMAGED, 0)
    assert row.problem.reason.is_temporary
    assert not verify(archive.uri).faults


def test_a_moved_file_does_not_bring_back_frames_that_were_replaced(archive):
    add_video(archive, 1, 5)
    before = row_for(archive, 1, 5)
    rows = random_rows(7)
    archive.parts.commit([receipt_for(archive, 2, rows)])
    other = row_for(archive, 1, 7, video_number=reserve(archive, 2))  # the same content with other settings
    archive.videos.publish([other])
    archive.videos.update([(before, replace(before, uri="file:///moved.mp4"))])
    assert [row.uri for row in archive.videos.all()] == [before.uri]
    archive.videos.update([(other, replace(other, uri="file:///moved.mp4"))])
    assert [(row.uri, row.frame_count) for row in archive.videos.all()] == [("file:///moved.mp4", 7)]
