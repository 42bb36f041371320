"""However a command that uses Ray ends, the user hears why, and nothing stays behind.

A job whose Ray dies ends with a clear word, whatever it waits for at that moment; a process of its own ends as it does.
"""

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
from conftest import ROOT, SAMPLES, VIDX, process_of
from ray.exceptions import RpcError

from pipeline.cluster import connect, supervise
from storage.processes import process_start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds a job's processes in /proc")

BLOCKED = """
import subprocess, sys, threading
from pipeline.cluster import supervise
supervise.GRACE_SECONDS = 0.1
watch = supervise.watch_own_ray()
server = subprocess.Popen([sys.argv[1], "600"])
other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while not supervise.child_pids("gcs_server"):
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
    _, heard = process.communicate(timeout=300)
    assert process.returncode == 6
    assert heard.decode().startswith("vidx: Ray's own processes died")
    assert process_start(other) is None


def test_nothing_is_watched_once_the_job_is_over(blocked):
    process, server, _ = blocked("stopped")
    assert process.stdout.readline() == b"over\n"
    os.kill(server, signal.SIGKILL)
    while process_start(server) is not None:
        time.sleep(0.01)
    assert process.poll() is None


def test_what_lives_is_not_taken_for_dead_and_silence_has_to_last(monkeypatch):
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 600.0)

    def watch(answers, silent_seconds):
        """A watch that gets these answers, the last one ever after, and how many it has got."""
        looks = threading.Semaphore(0)

        def look():
            looks.release()
            return answers.pop(0) if len(answers) > 1 else answers[0]

        return supervise.RayWatch(look, "dead", silent_seconds), looks

    for answers, silent_seconds in (([False], 0.0), ([True], 600.0), ([True] * 3 + [False], 600.0)):
        living, looks = watch(answers, silent_seconds)
        for _ in range(10):
            looks.acquire()
        assert not living.has_died
        living.stop()
    for silent_seconds in (0.0, 0.05):
        dying, _ = watch([True], silent_seconds)
        while not dying.has_died:
            time.sleep(0.01)
        assert dying.is_gone()
        dying.stop()
    back, _ = watch([True, True, False], 600.0)
    assert not back.is_gone()
    back.stop()


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_job_whose_ray_dies_while_it_starts_says_so(victim, tmp_path):
    command = [VIDX, "index", SAMPLES / "tractor.webm", "--archive", tmp_path / "archive"]
    with process_of(command, stdout=-1, stderr=-1) as job:
        try:
            pid = None
            while pid is None and job.poll() is None:
                pid = next((pid for pid in descendants(job.pid) if name_of(pid) == victim), None)
            assert pid is not None, job.communicate()
            os.kill(pid, signal.SIGKILL)
            _, heard = job.communicate(timeout=300)
        finally:
            job.kill()
    assert job.returncode == 6, heard
    assert "vidx: Ray's own processes died" in heard.decode()
    assert "Traceback" not in heard.decode()


@pytest.mark.parametrize(("failure", "told"), [(RpcError("Connection reset by peer"), []), (KeyError("ours"), [1])])
def test_what_rays_own_threads_meet_is_not_told_twice(failure, told, monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda _: heard.append(1))
    connect.hide_ray_tracebacks.__wrapped__()
    threading.excepthook(threading.ExceptHookArgs((type(failure), failure, None, threading.current_thread())))
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


# A command in a process of its own


START = """
import os, signal, sys, time
from pipeline.cluster.supervise import continue_in_own_process
continue_in_own_process()
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print(os.getpid(), flush=True)
"""


@pytest.fixture
def start():
    """Starts a script in a process of its own; both, and the number of the inner one."""
    started = []

    def run(script):
        command = [sys.executable, "-c", START + script]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, cwd=ROOT, start_new_session=True))
        return started[0], int(started[0].stdout.readline())

    yield run
    started[0].kill()
    started[0].communicate()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_its_exit_code_is_the_commands(start, code):
    outer, inner = start(f"sys.exit({code})")
    assert inner != outer.pid
    assert outer.communicate(timeout=300) == ("", "")
    assert outer.returncode == code


def test_a_traceback_is_a_mistake_of_ours(start):
    outer, _ = start("raise KeyError('ours')")
    assert "KeyError: 'ours'" in outer.communicate(timeout=300)[1]
    assert outer.returncode == 1


def test_an_end_from_ray_without_a_word_is_told(start):
    outer, _ = start("os._exit(1)")
    assert outer.communicate(timeout=300)[1].startswith("vidx: Ray's own processes died")
    assert outer.returncode == 6


def test_a_kill_is_told(start):
    outer, inner = start("signal.pause()")
    os.kill(inner, signal.SIGKILL)
    assert outer.communicate(timeout=300)[1].startswith("vidx: SIGKILL ended the job")
    assert outer.returncode == 6


def test_a_signal_that_ends_it_from_c_is_told_as_an_interruption(start):
    outer, _ = start("""
signal.signal(signal.SIGTERM, lambda *_: os.abort())  # as Ray's own handler does while Ray starts
print("handled", flush=True)
time.sleep(60)
""")
    assert outer.stdout.readline() == "handled\n"
    os.kill(outer.pid, signal.SIGTERM)
    _, err = outer.communicate(timeout=300)
    assert (outer.returncode, "interrupted; " in err) == (130, True), err


def test_it_dies_with_the_process_that_waits_for_it(start):
    outer, inner = start("signal.pause()")
    outer.kill()
    outer.wait()
    wait_until(lambda: process_start(inner) is None)


def wait_until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_reaches_it_once(start, send):
    outer, _ = start("while not heard: time.sleep(0.01)\ntime.sleep(0.2); print(len(heard)); sys.exit(7)")
    send(outer.pid, signal.SIGTERM)
    assert outer.communicate(timeout=300)[0] == "1\n"
    assert outer.returncode == 7


def test_what_it_leaves_behind_is_ended(start):
    orphan = "import os, time; os.fork() or (print(os.getpid(), flush=True), time.sleep(600))"
    outer, _ = start(f"import subprocess; subprocess.run([sys.executable, '-c', {orphan!r}]); sys.exit(3)")
    left = int(outer.stdout.readline())
    assert outer.wait(30) == 3
    assert process_start(left) is None
