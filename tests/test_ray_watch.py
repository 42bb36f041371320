"""A job whose Ray dies ends with a clear word, whatever it waits for at that moment."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, VIDX
from ray.exceptions import RpcError

from pipeline.cluster import connect as cluster
from pipeline.cluster import supervise
from storage.processes import start_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds a job's processes in /proc")

BLOCKED = """
import subprocess, sys, threading
from pipeline.cluster import supervise
supervise.GRACE_SECONDS = 0.1
watch = supervise.watch_own_ray()
server = subprocess.Popen([sys.argv[1], "600"])
other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while not supervise.children("gcs_server"):
    pass
assert not watch.is_dead()
print(server.pid, other.pid, flush=True)
if sys.argv[2] == "stopped":
    watch.stop()
    for thread in threading.enumerate()[1:]:
        thread.join()
    print("over", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def blocked(tmp_path):
    """Starts a process that waits for ever beside a child with the name of one of Ray's."""
    server = shutil.copy(shutil.which("sleep"), tmp_path / "gcs_server")
    started = []

    def start(how):
        command = [sys.executable, "-c", BLOCKED, server, how]
        started.append(subprocess.Popen(command, stdout=-1, stderr=-1, cwd=ROOT, start_new_session=True))
        return started[0], *map(int, started[0].stdout.readline().split())

    yield start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started[0].pid, signal.SIGKILL)
    started[0].communicate()


def test_a_wait_inside_ray_ends_when_ray_has_died(blocked):
    process, server, other = blocked("watched")
    os.kill(server, signal.SIGKILL)
    _, heard = process.communicate(timeout=60)
    assert process.returncode == 6
    assert heard.decode().startswith("vidx: Ray's own processes died")
    assert start_of(other) is None


def test_nothing_is_watched_once_the_job_is_over(blocked):
    process, server, _ = blocked("stopped")
    assert process.stdout.readline() == b"over\n"
    os.kill(server, signal.SIGKILL)
    while start_of(server) is not None:
        time.sleep(0.01)
    assert process.poll() is None


def test_what_lives_is_not_taken_for_dead_and_silence_has_to_last(monkeypatch):
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 600.0)
    looks, is_dead = threading.Semaphore(0), threading.Event()

    def look():
        looks.release()
        return is_dead.is_set()

    for silent_seconds in (0.0, 600.0):
        watch = supervise.RayWatch(look, "dead", silent_seconds)
        for _ in range(5):
            looks.acquire()
        assert not watch.has_died
        is_dead.set()
        if silent_seconds:
            for _ in range(5):
                looks.acquire()
            assert not watch.has_died
        else:
            while not watch.has_died:
                time.sleep(0.01)
        watch.stop()
        is_dead.clear()


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_job_whose_ray_dies_while_it_starts_says_so(victim, tmp_path):
    command = [VIDX, "index", SAMPLES / "tractor.webm", "--archive", tmp_path / "archive"]
    with subprocess.Popen(command, stdout=-1, stderr=-1) as job:
        try:
            pid = None
            while pid is None and job.poll() is None:
                pid = next((pid for pid in descendants(job.pid) if name_of(pid) == victim), None)
            assert pid is not None, job.communicate()
            os.kill(pid, signal.SIGKILL)
            _, heard = job.communicate(timeout=120)
        finally:
            job.kill()
    assert job.returncode == 6, heard
    assert "vidx: Ray's own processes died" in heard.decode()
    assert "Traceback" not in heard.decode()


@pytest.mark.parametrize(("failure", "told"), [(RpcError("Connection reset by peer"), []), (KeyError("ours"), [1])])
def test_what_rays_own_threads_meet_is_not_told_twice(failure, told):
    heard = []
    details = threading.ExceptHookArgs((type(failure), failure, None, threading.current_thread()))
    cluster._leave_out_ray(lambda _: heard.append(1), details)
    assert heard == told


def descendants(pid):
    for child in children_of(pid):
        yield child
        yield from descendants(child)


def children_of(pid):
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(word) for words in lists for word in words.split()]


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
