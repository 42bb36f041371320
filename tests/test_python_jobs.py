"""A job that Python starts is as safe as the command, and the program that starts it is safe from the job."""

import subprocess
import sys
import textwrap
from fractions import Fraction

import pytest
from conftest import ROOT, SAMPLES

import vidx
from pipeline.api.job_process import IndexJob, run_job
from pipeline.index.config import IndexConfig
from storage.archive.archive import create_archive, open_archive
from storage.records import Sampling
from workers.models.bundle import find_bundle

FRAMES = 800  # two a second


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """400 seconds in two segments, of which the second is the shorter."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=400:r=4:s=128x96", "-g", "40"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)
    return path


def run(code, *arguments):
    """Lines that a script prints; it is in a process group of its own."""
    head = "import os, signal, sys, threading; from pipeline import vidx\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ctrl_c_leaves_what_is_finished_and_the_next_call_goes_on(video, tmp_path):
    script = """
    def report(progress):
        if not seen and vidx.open(sys.argv[2]).status().frames:  # one segment is committed
            seen.append(progress)
            os.kill(os.getpid(), signal.SIGINT)

    seen = []
    try:
        vidx.index(sys.argv[1], sys.argv[2], fps=2, progress=report)
    except KeyboardInterrupt:
        print("interrupted")
    done = vidx.index(sys.argv[1], sys.argv[2], fps=2)
    print(done.failures, done.frame_count < 800, vidx.open(sys.argv[2]).status().frames)
    """
    assert run(script, video, tmp_path / "archive") == ["interrupted", f"[] True {FRAMES}"]


def test_nothing_to_index_makes_no_archive(tmp_path):
    (tmp_path / "inbox").mkdir()
    done = vidx.index(tmp_path / "inbox", tmp_path / "archive")
    assert (done.indexed, done.skipped, (tmp_path / "archive").exists()) == (0, 0, False)


def test_a_job_may_be_started_by_any_thread(tmp_path):
    script = """
    def index():
        print(vidx.index(sys.argv[1], sys.argv[2]).indexed)

    thread = threading.Thread(target=index)
    thread.start()
    thread.join()
    """
    assert run(script, SAMPLES / "highway.avi", tmp_path / "archive") == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
def test_the_program_lives_on_where_rays_processes_are_killed(tmp_path):
    script = """
    def children(pid):
        return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]

    def descendants(pid):
        found = []
        for child in children(pid):
            try:
                found += [child, *descendants(child)]
            except OSError:  # it has just ended
                pass
        return found

    def report(progress):
        for pid in descendants(os.getpid()):
            try:
                if b"raylet/raylet" in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")[0]:
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass

    try:
        vidx.index(sys.argv[1], sys.argv[2], progress=report)
    except vidx.ClusterError as error:
        print(error)
    print(descendants(os.getpid()))
    done = vidx.index(sys.argv[1], sys.argv[2])
    print(done.indexed, vidx.open(sys.argv[2]).status().frames)
    """
    why, left, counts = run(script, SAMPLES / "highway.avi", tmp_path / "archive")
    assert "Ray's own processes died" in why
    assert (left, counts) == ("[]", "1 9")


def test_a_failing_report_stops_the_job_and_is_raised(tmp_path):
    script = """
    def report(progress):
        raise LookupError("mine")

    try:
        vidx.index(sys.argv[1], sys.argv[2], progress=report)
    except LookupError as error:
        print(error)
    print(vidx.index(sys.argv[1], sys.argv[2]).indexed)
    """
    assert run(script, SAMPLES / "highway.avi", tmp_path / "archive") == ["mine", "1"]


def test_a_mistake_in_the_job_is_told_with_its_traceback(tmp_path):
    bundle = find_bundle("nano")
    archive = create_archive(str(tmp_path / "archive"), model_id=bundle.model_id, model_name=bundle.name)
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*TypeError"):
        run_job(IndexJob([None], archive.uri, Sampling(Fraction(1), 0), IndexConfig()), lambda progress: None)
    assert open_archive(archive.uri).videos.all() == []
