"""What a machine gives to a job: the cores that the process may use, memory, and room for frames on their way."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLES, VIDX

from storage.processes import usable_cores, usable_memory

HAS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, HAS),
        ({"cpu.max": "max 100000\n"}, HAS),
        ({"cpu.max": "190000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "100000000 100000\n"}, HAS),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HAS),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_the_cores_are_those_that_the_container_allows(tmp_path, files, cores):
    write(tmp_path, files)
    assert usable_cores(tmp_path) == cores


def test_the_memory_is_what_the_container_allows(tmp_path):
    everything = usable_memory(tmp_path)
    assert everything == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write(tmp_path, {"memory.max": "max\n"})
    assert usable_memory(tmp_path) == everything
    write(tmp_path, {"memory.max": "300000000\n"})
    assert usable_memory(tmp_path) == 300_000_000


@pytest.mark.skipif(HAS < 2, reason="needs two cores")
def test_a_job_uses_the_cores_that_its_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import ray; from pipeline.cluster.connect import start_ray\n"
        "start_ray(None); print(ray.cluster_resources()['CPU']); ray.shutdown()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "1.0\n"


def test_a_job_runs_where_shared_memory_is_small(tmp_path):
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to give a process a view of the file system of its own")
    small = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"'
    command = [VIDX, "index", SAMPLES / "nano_scenes_1.mp4", "--fps", "5", "--json", "--archive", tmp_path / "archive"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", small, "sh", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [*told["frames_by_node"].values()] == [told["frames"]] == [150]
