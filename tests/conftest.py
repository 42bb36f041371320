"""Fixtures that several test files share: the command line as users run it, and an archive of real clips."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "ops" / "samples"
VIDX = Path(sys.executable).parent / "vidx"
needs_scenes = pytest.mark.skipif(find_spec("scenedetect") is None, reason="the extra `scenes` is not installed")


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run_vidx(*arguments, env=None, timeout=300, cwd=None):
    """The command `vidx` as a process of its own, as a user runs it."""
    finished = subprocess.run(
        [VIDX, *arguments],
        capture_output=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Run(finished.returncode, finished.stdout.decode(), finished.stderr.decode())


@pytest.fixture(scope="session")
def vidx():
    return run_vidx


@pytest.fixture(scope="session")
def samples_archive(tmp_path_factory):
    """An archive of the sample clips, made by the command line once; tests must not change it."""
    archive = tmp_path_factory.mktemp("samples") / "archive"
    run = run_vidx("index", str(SAMPLES), "--archive", str(archive), "--json")
    assert run.code == 0, run.err
    return archive, run.json


@pytest.fixture
def archive_copy(samples_archive, tmp_path):
    """A copy of that archive to change."""
    archive = tmp_path / "archive"
    shutil.copytree(samples_archive[0], archive)
    return archive
