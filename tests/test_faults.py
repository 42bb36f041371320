"""Short runs of ops/chaos, ops/fuzz and ops/fuzz_archive; the long ones are in ops/docs/benchmarks.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.nano.pictograms import FONT

ROOT = Path(__file__).parent.parent


def run(*command, timeout):
    finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, check=False)
    assert finished.stdout, finished.stderr
    return finished.returncode, json.loads(finished.stdout)


@pytest.mark.skipif(not FONT.is_file(), reason="the pictograms' font is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="finds a job's processes in /proc")
@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.long)])
def test_killed_jobs_lose_double_and_leave_nothing(kills):
    size = ("--videos", "2", "--minutes", "0.2") if kills < 100 else ()
    code, found = run(ROOT / "ops/chaos", "--kills", str(kills), "--json", *size, timeout=7200)
    wrong = ("rows_lost", "rows_doubled", "rows_other", "faults", "unclear_ends", "hung", "processes_left")
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0), found["notes"]
    assert code == 0
    assert sum(found["kills"].values()) >= kills
    assert found["archives"] >= 1


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="makes its clips with ffmpeg")
@pytest.mark.parametrize("files", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_damaged_files_end_with_a_reason_and_leave_nothing(files):
    code, found = run(ROOT / "ops/fuzz", "--files", str(files), "--seed", "7", "--json", timeout=7200)
    assert (code, found["files"], found["processes_left"]) == (0, files, 0)
    assert sum(found["ends"].values()) == files
    assert found["ends"].get("timeout", 0) == 0
    assert found["frames"] > 0


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="makes its clips with ffmpeg")
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the memory of what it forks")
@pytest.mark.parametrize("archives", [12, pytest.param(2000, marks=pytest.mark.long)])
def test_damaged_and_hostile_archives_end_in_one_line_and_reach_nothing_outside(archives):
    code, found = run(ROOT / "ops/fuzz_archive", "--archives", str(archives), "--seed", "7", "--json", timeout=14400)
    assert (code, found["wrong"], found["archives"]) == (0, {}, archives), found["cases"]
    assert found["ends"]["0"] > archives
    assert found["ends"]["5"] > archives / 4
