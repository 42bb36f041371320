"""The README is true: its generated parts are fresh and every command line in it runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|console)\n(.*?)```", README, re.DOTALL)
SESSION = [line[2:] for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line[:2] == "$ "]
OTHERS = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
# The gate calls the first two and installs the font; test_nano_training trains, as hours of it would not do here.
ELSEWHERE = ("bash ops/run", "bash ops/test", "apt install", "ops/nano/train")


def test_help_and_benchmark_tables_are_fresh():
    done = subprocess.run([sys.executable, ROOT / "ops" / "readme.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_session_runs_from_first_to_last(tmp_path):
    assert len(SESSION) >= 6
    for command in SESSION:
        done = run(command, {"VIDX_ARCHIVE": str(tmp_path / "archive")})
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("command", [line for line in OTHERS if not line.startswith(ELSEWHERE)])
def test_every_other_command_line_runs_as_far_as_this_machine_can(command, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(SAMPLES / "highway.avi", videos)
    small = ROOT / "tests" / "reference" / "llava-mini-tiny" / "checkpoint"
    settings = {"HF_HUB_OFFLINE": "1", "VIDX_ARCHIVE": str(tmp_path / "archive")}
    places = {
        "~/videos": videos,
        "/shared/videos": videos,
        "~/archive": tmp_path / "a",
        "/shared/archive": tmp_path / "b",
    }
    places |= {"~/models/llava-mini-llama-3.1-8b": small, "--model MODEL": "--model nano"}
    for word, place in places.items():
        command = command.replace(word, str(place))
    if command.startswith("pip install"):
        command = command.replace("pip install", f"{sys.executable} -m pip install --dry-run --no-deps --quiet")
    done = run(command, settings)
    expected = {"--address head:6379 --archive": (2, "no archive"), "ray://": (2, "no archive")}
    expected |= {"ICTNLP/": (2, "hub"), "one_gpu": (2, "no GPU"), "head:6379": (2, "head:6379")}
    code, says = next((end for word, end in expected.items() if word in command), (0, ""))
    assert (done.returncode, says in done.stderr) == (code, True), f"{command}\n{done.stderr}"


def run(command, settings):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **settings, "PATH": path}
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
