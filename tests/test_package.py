"""`import vidx` works from a wheel and from an editable install, and does what the commands do."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

pytestmark = pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools builds the package")
PACKED = ("pipeline", "workers", "storage", "configs", "pyproject.toml", "README.md", "LICENSE")
# What a user writes in a script, without a guard for the main module.
SCRIPT = """
import sys
import vidx

seen = []
done = vidx.index([sys.argv[1]], sys.argv[2], fps=2, device="cpu", progress=seen.append)
archive = vidx.open(sys.argv[2])
print(done.indexed, done.frame_count, archive.status().frames, bool(seen))
print(len(archive.search("an apple", min_score=-1, top=3)), archive.videos()[0].uri)
print(sum(len(frames) for frames in archive.frames(cells=["token"])))
print(vidx.__file__)
try:
    vidx.index(sys.argv[1], sys.argv[2], batch=0)
except vidx.UsageError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what is packed: building writes beside it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PACKED:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, folder)
    return folder


def pip(python, *arguments, cwd):
    command = [python, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(command, cwd=cwd, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def clean(**settings):
    """The environment without the paths by which tests find this repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings


def check_script(python, folder, tmp_path, **settings):
    """Runs the script outside the repository; its vidx lies below the folder."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [python, str(script), str(SAMPLES / "highway.avi"), str(tmp_path / "archive")]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean(**settings), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    counts, found, read, place, wrong = done.stdout.splitlines()
    assert counts == "1 18 18 True"  # 8.87 s of video, two frames a second
    assert found.endswith("/highway.avi")
    assert read == "18"
    assert Path(place).is_relative_to(folder)
    assert wrong.startswith("batch: ")


def test_a_wheel_holds_all_that_is_needed(sources, tmp_path):
    pip(sys.executable, "wheel", str(sources), "--wheel-dir", str(tmp_path / "wheels"), cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("vidx-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    check_script(sys.executable, tmp_path / "unpacked", tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))


def test_an_editable_install_uses_the_sources(sources, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib"))  # the libraries, not this repository's vidx
    pip(str(python), "install", "--editable", str(sources), cwd=tmp_path)
    check_script(str(python), sources, tmp_path)
    assert (tmp_path / "venv" / "bin" / "vidx").exists()
