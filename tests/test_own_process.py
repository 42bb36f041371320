"""A command in a process of its own: however that ends, the user hears why, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from storage.processes import start_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a command runs in the process that it was")

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
    assert outer.communicate(timeout=30) == ("", "")
    assert outer.returncode == code


def test_a_traceback_is_a_mistake_of_ours(start):
    outer, _ = start("raise KeyError('ours')")
    assert "KeyError: 'ours'" in outer.communicate(timeout=30)[1]
    assert outer.returncode == 1


def test_an_end_from_ray_without_a_word_is_told(start):
    outer, _ = start("os._exit(1)")
    assert outer.communicate(timeout=30)[1].startswith("vidx: Ray's own processes died")
    assert outer.returncode == 6


def test_a_kill_is_told(start):
    outer, inner = start("signal.pause()")
    os.kill(inner, signal.SIGKILL)
    assert outer.communicate(timeout=30)[1].startswith("vidx: SIGKILL ended the job")
    assert outer.returncode == 6


def test_it_dies_with_the_process_that_waits_for_it(start):
    outer, inner = start("signal.pause()")
    outer.kill()
    outer.wait()
    wait_until(lambda: start_of(inner) is None)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_reaches_it_once(start, send):
    outer, _ = start("while not heard: time.sleep(0.01)\ntime.sleep(0.2); print(len(heard)); sys.exit(7)")
    send(outer.pid, signal.SIGTERM)
    assert outer.communicate(timeout=30)[0] == "1\n"
    assert outer.returncode == 7


def test_what_it_leaves_behind_is_ended(start):
    orphan = "import os, time; os.fork() or (print(os.getpid(), flush=True), time.sleep(600))"
    outer, _ = start(f"import subprocess; subprocess.run([sys.executable, '-c', {orphan!r}]); sys.exit(3)")
    left = int(outer.stdout.readline())
    assert outer.wait(30) == 3
    assert start_of(left) is None
