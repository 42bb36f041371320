"""Several jobs on one archive: what one has taken the others leave alone, as long as it lives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SAMPLES, VIDX, process_of

from storage.archive import claims as jobs
from storage.archive.claims import Job, remove_ended_jobs
from storage.files import to_uri

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from storage.archive.claims import Job
with Job(sys.argv[1]) as job:
    print(job.take(7), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path):
    return to_uri(tmp_path)


@pytest.fixture
def other(place):
    """Another process that has taken number 7."""
    command = [sys.executable, "-c", HOLD, place]
    with process_of(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"True\n"
        yield process
        process.kill()


def test_a_video_is_taken_by_one_job_until_it_is_released(place, tmp_path):
    with Job(place) as first, Job(place) as second:
        assert first.take(1)
        assert not second.take(1)
        assert second.take(2)
        second.release(1)  # not its own
        assert not second.take(1)
        first.release(1)
        assert second.take(1)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_what_a_killed_job_had_taken_is_free_at_once(place, other):
    with Job(place) as job:
        assert not job.take(7)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert job.take(7)


def test_a_killed_job_that_nobody_has_waited_for_is_dead(place, other):
    with Job(place) as job:
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now, and stays one
        assert job.take(7)


def test_a_stopped_job_loses_what_it_took_and_not_what_it_wrote(place, tmp_path, other):
    (file,) = (tmp_path / "jobs").glob("*.job")
    other.send_signal(signal.SIGSTOP)
    old = time.time() - jobs.LEASE_SECONDS - 1
    os.utime(file, (old, old))
    with Job(place) as job:
        assert job.take(7)
        assert remove_ended_jobs(place) < time.time()
        assert file.exists()


def test_a_job_that_was_taken_for_gone_comes_back(place, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.01)
    with Job(place):
        (file,) = (tmp_path / "jobs").glob("*.job")
        text = file.read_text()
        file.unlink()
        while not file.exists():
            time.sleep(0.01)
        assert file.read_text() == text


def test_a_job_on_another_machine_is_dead_when_it_has_not_been_touched(place, tmp_path, other):
    (file,) = (tmp_path / "jobs").glob("*.job")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "elsewhere"}))
    with Job(place) as job:
        assert not job.take(7)
        other.send_signal(signal.SIGSTOP)  # touches nothing any more
        old = time.time() - jobs.LEASE_SECONDS - 1
        os.utime(file, (old, old))
        assert job.take(7)


def test_the_oldest_living_job_counts(place, tmp_path, other):
    before = remove_ended_jobs(place)
    assert time.time() - 60 < before <= time.time() + 1
    with Job(place):
        assert remove_ended_jobs(place) == before
        other.kill()
        other.wait()
        assert remove_ended_jobs(place) > before
    assert remove_ended_jobs(place) is None
    assert list((tmp_path / "jobs").iterdir()) == []
    assert remove_ended_jobs(to_uri(tmp_path / "none")) is None


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.long)])
def test_jobs_that_overlap_share_the_work_and_store_each_frame_once(vidx, tmp_path, count):
    archive = str(tmp_path / "archive")
    sources = sorted(str(path) for path in SAMPLES.iterdir() if path.suffix in (".mp4", ".mkv", ".webm", ".avi"))
    alone = vidx("index", *sources, "--archive", str(tmp_path / "alone"), "--json").json
    commands = [
        [VIDX, "index", *sources[start:], *sources[:2], "--archive", archive, "--json"] for start in range(count)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for command in commands]
    results = [json.loads(process.communicate(timeout=900)[0]) for process in running]
    assert [process.returncode for process in running] == [0] * count
    assert sum(result["frames"] for result in results) == alone["frames"]
    assert sum(result["videos_indexed"] for result in results) == alone["videos_indexed"]
    rows = "SELECT video_id, ticks FROM frames ORDER BY ALL"
    found = vidx("sql", rows, "--archive", archive, "--json").json
    assert found == vidx("sql", rows, "--archive", str(tmp_path / "alone"), "--json").json
    assert vidx("verify", "--archive", archive).code == 0
    assert list((tmp_path / "archive" / "jobs").iterdir()) == []
