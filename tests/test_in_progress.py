"""What the status says of videos that a job has begun: what is committed and not shown, nothing that was replaced."""

import multiprocessing
import os
import signal
import time
from fractions import Fraction

import pytest
from small_archive import MODEL_ID, add_video, random_rows, receipt_for, reserve, row_for

from storage.archive.archive import create_archive, open_archive
from storage.archive.claims import Job
from storage.care.clean import clean, remove_stale_claims, remove_unnamed_files
from storage.records import Sampling

SPAWN = multiprocessing.get_context("spawn")  # deltalake does not survive a fork


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")


def in_progress(archive):
    status = open_archive(archive.uri).status()
    return status.videos_in_progress, status.frames_in_progress


def first_segment(archive, name):
    """Of two: the first five seconds."""
    return receipt_for(archive, name, random_rows(5, seed=name), (None, 50))


def begin_all(uri, names, begun):
    """A job that commits the first half of some videos and then does nothing more."""
    archive = open_archive(uri)
    with Job(uri) as job:
        for name in names:
            receipt = first_segment(archive, name)
            assert job.take(receipt.video_number)
            job.begin(receipt.video_number)
            archive.parts.commit([receipt])
        begun.put(True)
        time.sleep(600)


@pytest.fixture
def killed_job(archive):
    """One that had begun videos 1 and 2 when it was killed."""
    begun = SPAWN.Queue()
    job = SPAWN.Process(target=begin_all, args=(archive.uri, [1, 2], begun))
    job.start()
    assert begun.get(timeout=300)
    assert in_progress(archive) == (2, 10)  # while it runs, too
    os.kill(job.pid, signal.SIGKILL)
    job.join(10)


def test_what_a_killed_job_has_committed_is_told_until_it_is_shown(archive, killed_job):
    assert in_progress(archive) == (2, 10)
    assert open_archive(archive.uri).status().frames == 0
    for tidy in (remove_unnamed_files, remove_stale_claims):
        tidy(open_archive(archive.uri))
        assert in_progress(archive) == (2, 10)
    archive.parts.commit([receipt_for(archive, 1, random_rows(3, start=5), (50, None))])
    archive.videos.publish([row_for(archive, 1, 8)])
    assert in_progress(archive) == (1, 5)
    clean(open_archive(archive.uri), 0)
    assert in_progress(archive) == (1, 5)  # written a moment ago


def test_what_was_replaced_or_deleted_is_not_in_progress(archive, killed_job):
    archive.videos.publish([row_for(archive, 1, 5), row_for(archive, 2, 5)])
    remove_stale_claims(open_archive(archive.uri))  # as each job does that begins
    twice = Sampling(Fraction(2), 0)
    add_video(archive, 3)
    replaced = row_for(archive, 1, 5, video_number=reserve(archive, 1, twice), sampling=str(twice))
    archive.videos.publish([replaced])
    archive.videos.delete([row_for(archive, 3, 5)])
    assert in_progress(archive) == (0, 0)
    with Job(archive.uri) as job:
        job.take(reserve(archive, 3))
        assert in_progress(archive) == (0, 0)


def test_an_ended_job_leaves_the_claims_of_what_it_has_begun_alone(archive, tmp_path):
    with Job(archive.uri) as job:
        receipt = first_segment(archive, 1)
        for number in (receipt.video_number, reserve(archive, 2)):
            assert job.take(number)
        job.begin(receipt.video_number)
        archive.parts.commit([receipt])
    assert in_progress(archive) == (1, 5)
    assert [path.name for path in (tmp_path / "archive" / "jobs").iterdir()] == [f"{receipt.video_number}.claim"]
    with Job(archive.uri) as job:  # and another goes on at once
        assert job.take(receipt.video_number)
        archive.videos.publish([row_for(archive, 1, 5)])
        job.release(receipt.video_number)
    assert in_progress(archive) == (0, 0)
    assert list((tmp_path / "archive" / "jobs").iterdir()) == []
