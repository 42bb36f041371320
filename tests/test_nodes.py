"""Jobs on clusters of several real Ray nodes: who works, what a lost or a strange node costs, and two jobs at once."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, VIDX, process_of

from ops.ray_nodes import ENVIRONMENT, ray_nodes

ROWS = "SELECT video_id, ticks, duration_seconds, md5(token) AS token FROM frames ORDER BY ALL"
CLIPS = ("nano_scenes_1.mp4", "nano_scenes_2.mp4", "cars_overhead_vfr.mkv", "highway.avi", "tractor.webm")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Fifteen videos of different content."""
    folder = tmp_path_factory.mktemp("videos")
    for copy in range(3):
        for clip in CLIPS:
            content = (SAMPLES / clip).read_bytes()
            padding = b"\0" * 8 * copy if clip.endswith("mp4") else b"\0" * copy
            (folder / f"{copy}_{clip}").write_bytes(content + padding)
    return folder


@pytest.fixture(scope="module")
def wanted(sources, tmp_path_factory, vidx_alone):
    """The rows that one machine gives, with their statuses."""
    return vidx_alone(sources, tmp_path_factory.mktemp("alone") / "archive")


@pytest.fixture(scope="module")
def vidx_alone():
    def index(sources, place):
        done = subprocess.run([VIDX, "index", sources, "--archive", place], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stderr
        return rows_of(place)

    return index


def rows_of(place):
    done = subprocess.run([VIDX, "sql", ROWS, "--archive", place, "--csv"], capture_output=True, text=True, check=True)
    return done.stdout


def start_index(nodes, sources, place, *options):
    command = [VIDX, "index", sources, "--archive", place, "--address", nodes.address, *options]
    return subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def ended(job):
    out, err = job.communicate(timeout=300)
    assert "Traceback" not in err, err
    return job.returncode, out, err


def wait_for_frames(job):
    """Reads what a job says until it has indexed frames."""
    lines = []
    while not any(re.search(r" [1-9]\d* frames, ", line) for line in lines[-1:]):
        lines.append(job.stderr.readline())
        assert lines[-1], lines


def needs_mounts():
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to give a process a view of the file system of its own")


def test_a_node_that_is_lost_and_one_that_joins_change_no_row(sources, wanted, tmp_path):
    with ray_nodes(1, 1, 1) as nodes:
        job = start_index(nodes, sources, tmp_path / "archive")
        wait_for_frames(job)
        nodes.kill(2)
        nodes.add()
        code, out, err = ended(job)
    assert code in (0, 3), err
    assert rows_of(tmp_path / "archive") == wanted
    for told in re.findall("^decoded by .*$", out, re.MULTILINE):  # none if one node was faster than the others came
        counts = re.findall(r"\): ([\d,]+)(?:, |$)", told)
        assert sum(int(count.replace(",", "")) for count in counts) == wanted.count("\n") - 1


def test_nodes_that_cannot_take_part_are_named_and_left_out(sources, wanted, tmp_path):
    needs_mounts()
    changed = tmp_path / "workers"
    shutil.copytree(ROOT / "workers", changed, ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "segment.py").open("a") as file:
        file.write("# another version\n")
    with ray_nodes(1) as nodes:
        nodes.add(mounts=f"mount --bind {changed} {ROOT}/workers")
        code, _, err = ended(start_index(nodes, sources, tmp_path / "archive"))
    assert code in (0, 3), err
    assert "is left out: it runs vidx" in err
    assert "127.0.0.3" in err
    assert rows_of(tmp_path / "archive") == wanted


def test_a_node_with_another_archive_at_the_same_path_is_left_out(sources, wanted, tmp_path):
    needs_mounts()
    archive, other = tmp_path / "archive", tmp_path / "other"
    subprocess.run([VIDX, "index", sources / "0_highway.avi", "--archive", archive], capture_output=True, check=True)
    shutil.copytree(archive, other)
    with ray_nodes(1) as nodes:
        nodes.add(mounts=f"mount --bind {other} {archive}")
        code, out, err = ended(start_index(nodes, f"{sources}/0_*", archive))
    assert (code, "4 indexed, 0 partial, 0 failed, 1 skipped" in out) == (0, True), err
    assert f"it cannot see the archive {archive}, which is another folder there" in err
    assert {*rows_of(archive).splitlines()} < {*wanted.splitlines()}


def test_a_job_that_no_node_can_take_part_in_ends_with_75(sources, tmp_path):
    needs_mounts()
    with ray_nodes() as nodes:
        nodes.add(mounts=f"mount -t tmpfs none {sources}")
        code, _, err = ended(start_index(nodes, sources, tmp_path / "archive"))
    assert code == 75, err
    assert "it can read none of" in err
    assert "no node of the cluster" in err


def test_sources_that_one_node_cannot_read_are_read_by_another(sources, wanted, tmp_path):
    needs_mounts()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    moved = [shutil.copy(file, hidden) for file in sorted(sources.iterdir())[:5]]
    others = sorted(sources.iterdir())[5:]
    with ray_nodes(1) as nodes:
        nodes.add(mounts=f"mount -t tmpfs none {hidden}")
        command = [VIDX, "index", *moved, *others, "--archive", tmp_path / "archive", "--address", nodes.address]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    assert rows_of(tmp_path / "archive") == wanted


def test_two_jobs_with_the_same_videos_in_reversed_order_both_end(sources, wanted, tmp_path):
    files = sorted(sources.iterdir())
    with ray_nodes(1, 1) as nodes:
        command = [VIDX, "index", "--archive", tmp_path / "archive", "--address", nodes.address]
        jobs = [
            subprocess.Popen(
                [*command, *order], env=os.environ | ENVIRONMENT, stdout=-1, stderr=-1, text=True, cwd=ROOT
            )
            for order in (files, files[::-1])
        ]
        ends = [ended(job) for job in jobs]
    assert [code in (0, 3) for code, _, _ in ends] == [True, True], ends
    assert rows_of(tmp_path / "archive") == wanted


def test_resources_that_do_not_come_in_time_end_the_job_with_75(sources, tmp_path):
    with ray_nodes(1) as nodes:
        holder = (
            f"import ray, time; ray.init(address={nodes.address!r}, log_to_driver=False)\n"
            "hold = ray.remote(num_cpus=1)(lambda: time.sleep(300)).remote()\n"
            "time.sleep(3); print('held', flush=True); ray.get(hold)"
        )
        python = str(Path(VIDX).parent / "python")
        with process_of([python, "-c", holder], env=os.environ | ENVIRONMENT, stdout=-1, text=True) as other:
            assert other.stdout.readline() == "held\n"
            code, _, err = ended(start_index(nodes, sources, tmp_path / "archive", "--wait-for-resources", "4"))
            with contextlib.suppress(ProcessLookupError):
                other.kill()
    assert code == 75, err
    assert "free cores" in err
