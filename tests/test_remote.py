"""A real Ray cluster of one node: jobs and questions that run there."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, VIDX, process_of
from ray_cluster import ENVIRONMENT, RAY, ray_cluster

from ops.ray_nodes import descendants, kill_all
from pipeline.cluster import remote


@pytest.fixture(scope="module")
def cluster():
    """The addresses of a cluster, which ends with the tests."""
    with ray_cluster() as (_, *addresses):
        yield addresses


@pytest.fixture(scope="module")
def archive(vidx, cluster, tmp_path_factory):
    place = str(tmp_path_factory.mktemp("cluster") / "archive")
    done = vidx(
        "index", str(SAMPLES / "nano_scenes_1.mp4"), "--archive", place, "--address", cluster[0], env=ENVIRONMENT
    )
    assert done.code == 0, done.err
    return place


def test_questions_are_answered_on_a_cluster_as_here(vidx, cluster, archive):
    chosen = ("--archive", archive, "--video", "nano_scenes_1.mp4@1-5")
    here = vidx("ask", "What is there?", *chosen, "--json").json
    there = vidx("ask", "What is there?", *chosen, "--json", "--address", cluster[1], env=ENVIRONMENT)
    assert there.code == 0, there.err
    assert there.json == here
    assert here["fuse"] == "exact"
    assert here["video_bytes_read"] > 0


def test_a_conversation_is_held_on_a_cluster_and_what_is_wrong_there_is_said_here(vidx, cluster, archive, tmp_path):
    chosen = ["--archive", archive, "--video", "nano_scenes_1.mp4@1-5", "--address", cluster[0]]
    talk = subprocess.run(
        [VIDX, "chat", *chosen],
        input="What is there?\nWhere is the tent?\n",
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert [line for line in talk.stdout.splitlines() if line and line[0] != ">"] == [
        "a cow, a leaf and a tent",
        "bottom left",
    ]
    away = vidx("ask", "What is there?", *chosen, "--model", str(tmp_path / "away"), env=ENVIRONMENT)
    assert away.code == 2
    assert str(tmp_path / "away") in away.err
    assert "Traceback" not in away.err


class Talker:
    """Says three words, the second when it may."""

    def __init__(self):
        self.may = threading.Event()

    def ask(self, question, stream, announce):
        announce("soon")
        stream(question)
        self.may.wait()
        stream("there")
        return "all"


def test_what_a_worker_says_is_fetched_piece_by_piece_and_can_be_stopped():
    worker, talker = remote.Answerer(1), Talker()
    worker._asker = talker
    with ThreadPoolExecutor() as pool:
        first = pool.submit(worker.call, 0, "ask", ("who?",), {})
        said = []
        while len(said) < 2:
            said += pool.submit(worker.said, 0).result(timeout=300)
        assert said == [("announce", "soon"), ("stream", "who?")]
        worker.stop(0)
        second = pool.submit(worker.call, 1, "ask", ("and?",), {})  # which waits for the first to end
        talker.may.set()
        assert pool.submit(worker.said, 0).result(timeout=300) == [("end", "")]
        with pytest.raises(remote._Stopped):
            first.result(timeout=300)
        assert second.result(timeout=300) == "all"
        assert worker.said(1)[1:] == [("stream", "and?"), ("stream", "there"), ("end", "")]
        assert not worker._queues


@pytest.mark.parametrize(
    ("command", "share"), [(("ask", "What is there?"), "1.0"), (("index", "--gpus-per-worker", "0.5"), "0.5")]
)
def test_a_gpu_that_a_cluster_may_get_is_asked_for_meanwhile(cluster, archive, tmp_path, command, share):
    places = ["--archive", archive]
    if command[0] == "index":
        places = [SAMPLES / "nano_scenes_1.mp4", "--archive", tmp_path / "archive"]
    environment, pending = os.environ | ENVIRONMENT | {"RAY_AUTH_MODE": "token"}, f"'GPU': {share}}}: 1+ pending"
    command = [VIDX, *command, *places, "--address", cluster[0], "--device", "cuda"]
    with process_of(command, env=environment, stderr=-1, text=True) as job:
        status, end = "", time.monotonic() + 300
        while pending not in status and time.monotonic() < end:
            told = [RAY, "status", "--address", cluster[0]]
            status = subprocess.run(told, env=environment, capture_output=True, text=True, check=True).stdout
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=300)
    assert pending in status
    assert job.returncode == 130, err
    if "ask" in command:
        assert f"waiting for a GPU on the cluster at {cluster[0]}, which has none yet" in err


def test_a_job_outside_the_cluster_indexes_there_and_no_model_comes_to_it(cluster, tmp_path):
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
    code += "from pipeline.cli.main import main; main()"
    command = [sys.executable, "-c", code, "index", SAMPLES / "nano_scenes_1.mp4", "--archive", tmp_path / "archive"]
    done = subprocess.run(
        [*command, "--address", cluster[1]], env=os.environ | ENVIRONMENT, capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, "1 indexed" in done.stdout) == (0, True), done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize(
    "has", [{"RAY_AUTH_TOKEN": "of-another-cluster-0123456789abcdef"}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_a_token_that_the_cluster_refuses_is_said_to_be_so(cluster, where, has, tmp_path):
    address = cluster[0] if where == "inside" else cluster[1]
    command = [VIDX, "index", SAMPLES / "nano_scenes_1.mp4", "--archive", tmp_path / "archive", "--address", address]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | has, capture_output=True, text=True, timeout=300)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"vidx: --address {address}: the cluster refuses the token")
    assert "RAY_AUTH_TOKEN" in line
    assert done.returncode == 2


def test_packages_with_our_names_in_the_current_folder_are_not_imported(cluster, archive, tmp_path):
    for name in ("configs", "pipeline", "storage", "workers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is not vidx')\n")
    inside, outside = cluster
    chosen = ("--archive", archive, "--video", "nano_scenes_1.mp4@1-5", "--address", inside)
    sources = ("index", SAMPLES / "nano_scenes_1.mp4", "--archive")
    joined = [(*sources, tmp_path / address[:3], "--address", address) for address in (inside, outside)]
    for command in ((*sources, tmp_path / "here"), *joined, ("ask", "What is there?", *chosen)):
        done = subprocess.run(
            [VIDX, *command], env=os.environ | ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("how", ["waits", "ctrl-c"])
def test_a_job_whose_cluster_dies_ends_and_can_be_interrupted(vidx, where, how, tmp_path):
    place, sources = str(tmp_path / "archive"), [tmp_path / f"{number}.mp4" for number in range(60)]
    for number, source in enumerate(sources):
        source.write_bytes((SAMPLES / "nano_scenes_1.mp4").read_bytes() + b"\0" * 8 * (number + 1))
    with ray_cluster() as (process, inside, outside):
        command = [VIDX, "index", *sources, "--archive", place, "--fps", "10"]
        command += ["--address", inside if where == "inside" else outside]
        with process_of(command, env=os.environ | ENVIRONMENT, stdout=-1, stderr=-1, text=True) as job:
            heard = []
            while not any("frames/s; " in line for line in heard):  # it indexes
                heard.append(job.stderr.readline())
                assert heard[-1], heard
            kill_all(process)
            if how == "ctrl-c":
                job.send_signal(signal.SIGINT)
            _, err = job.communicate(timeout=300)
    assert job.returncode == (130 if how == "ctrl-c" else 75), err
    assert "Traceback" not in err
    told = "interrupted; finished work is committed" if how == "ctrl-c" else "does not answer any more"
    assert told in err
    assert vidx("verify", "--archive", place).code == 0


@pytest.mark.long
def test_a_job_whose_gcs_alone_dies_ends_within_half_a_minute(tmp_path):
    sources = [tmp_path / f"{number}.mp4" for number in range(20)]
    for number, source in enumerate(sources):
        source.write_bytes((SAMPLES / "nano_scenes_1.mp4").read_bytes() + b"\0" * 8 * (number + 1))
    with ray_cluster() as (process, inside, _):
        command = [VIDX, "index", *sources, "--archive", tmp_path / "archive", "--fps", "25", "--address", inside]
        with process_of(command, env=os.environ | ENVIRONMENT, stdout=-1, stderr=-1, text=True) as job:
            while "mp4 0:" not in (line := job.stderr.readline()):  # it indexes
                assert line
            (gcs,) = [
                pid for pid in descendants(process.pid) if Path(f"/proc/{pid}/comm").read_text() == "gcs_server\n"
            ]
            os.kill(gcs, signal.SIGKILL)
            killed = time.monotonic()
            _, err = job.communicate(timeout=300)
    assert time.monotonic() - killed < 30
    assert (job.returncode, "does not answer any more" in err) == (75, True), err


@pytest.mark.long
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_question_whose_cluster_dies_ends_with_a_word(vidx, where, archive):
    with ray_cluster() as (process, inside, outside):
        command = [VIDX, "chat", "--archive", archive, "--video", "nano_scenes_1.mp4@1-5"]
        command += ["--address", inside if where == "inside" else outside]
        with process_of(
            command, env=os.environ | ENVIRONMENT, stdin=-1, stdout=-1, stderr=-1, text=True, bufsize=1
        ) as talk:
            talk.stdin.write("What is there?\n")
            heard = talk.stdout.readline()
            while "a cow" not in heard:
                heard = talk.stdout.readline()
                assert heard
            kill_all(process)
            _, err = talk.communicate("Where is the tent?\n", timeout=300)
    assert talk.returncode == 75, err
    assert "Traceback" not in err
    assert "ask again" in err
