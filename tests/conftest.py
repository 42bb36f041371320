"""Fixtures that several test files share: the command line as users run it, and an archive of real clips."""

import atexit
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from command_server import VIDX, CommandServer
from ray_cluster import ENVIRONMENT, ray_cluster

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "ops" / "samples"
ABOUT_RAY = {"--address", "--workers", "--device", "--config", "--strict-sandbox", "--dry-run"}
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


def limits_of_this_process():
    return [resource.getrlimit(kind) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_CPU)]


@pytest.fixture(autouse=True)
def _limits_stay():
    """A limit that a test leaves behind would make later ones fail, in all that they start."""
    before = limits_of_this_process()
    yield
    assert limits_of_this_process() == before


@contextlib.contextmanager
def process_of(command, **options):
    """A process, which a test that fails kills instead of waiting for its end."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@cache
def ray_address():
    """Of a cluster that most jobs of these tests share: it takes Ray five seconds to start and to end one."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(ray_cluster())[1]


@cache
def command_server():
    """Started by the first command."""
    return CommandServer({"RAY_AUTH_MODE": "token", **ENVIRONMENT}) if sys.platform == "linux" else None


def run_vidx(*arguments, env=None, timeout=300, cwd=None, ray=False, script=""):
    """The command `vidx` as a process of its own, as a user runs it; see command_server.py.

    Args:
        ray: whether a job starts a Ray of its own, as it does by itself, or joins the cluster that the tests share.
            One with other settings in its environment, or with one of ABOUT_RAY, starts its own.
        script: Python to run in that process before.
    """
    environment, server = {**os.environ, **(env or {})}, command_server()
    is_usual = server is not None and server.is_at_home(environment)  # as the workers of the cluster are
    if arguments[:1] == ("index",) and is_usual and not (ray or ABOUT_RAY & {*arguments}):
        arguments = ("index", "--address", ray_address(), *arguments[1:])
    if server is not None and server.can_run(environment) and "--engine" not in arguments:  # it imports what it wants
        with TemporaryFile() as out, TemporaryFile() as err:
            folder = os.fspath(cwd or os.getcwd())
            code = server.run(arguments, script, environment, folder, out.fileno(), err.fileno(), timeout)
            return Run(code, read_back(out), read_back(err))
    start = f"import sys; sys.argv[0] = {str(VIDX)!r}\n{script}\nfrom pipeline.cli.main import main\nmain()"
    finished = subprocess.run(
        [sys.executable, "-c", start, *arguments] if script else [VIDX, *arguments],
        capture_output=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Run(finished.returncode, finished.stdout.decode(), finished.stderr.decode())


def run_program(path, *arguments):
    """A program of ops/ as a process of its own, in the same way."""
    script = f"import runpy, sys; sys.path[0] = {str(path.parent)!r}; sys.argv[0] = {str(path)!r}\n"
    script += f"runpy.run_path({str(path)!r}, run_name='__main__'); sys.exit()"
    return run_vidx(*map(str, arguments), ray=True, script=script)


def read_back(file):
    file.seek(0)
    return file.read().decode()


@pytest.fixture(scope="session")
def vidx():
    return run_vidx


@pytest.fixture(scope="session")
def samples_archive(tmp_path_factory):
    """An archive of the sample clips, made by the command line once; tests must not change it."""
    archive = tmp_path_factory.mktemp("samples") / "archive"
    run = run_vidx("index", str(SAMPLES), "--archive", str(archive), "--json", ray=True)
    assert run.code == 0, run.err
    return archive, run.json


@pytest.fixture
def archive_copy(samples_archive, tmp_path):
    """A copy of that archive to change."""
    archive = tmp_path / "archive"
    shutil.copytree(samples_archive[0], archive)
    return archive
