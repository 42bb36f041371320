"""README.md and ops/docs are true: generated parts are fresh, links lead somewhere, and the command lines run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "ops" / "docs").glob("*.md"))]
TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
BLOCKS = [block for text in TEXTS for block in re.findall(r"```(bash|console)\n(.*?)```", text, re.DOTALL)]
SESSION = [each for kind, block in BLOCKS if kind == "console" for each in re.split(r"^\$ ", block, flags=re.M)[1:]]
OTHERS = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
OTHERS = list(dict.fromkeys(OTHERS))  # a line that stands on two pages runs once
# The gate calls the first ones and installs the font, the next test calls ops/readme.py, test_nano_answers evaluates,
# and test_nano_training trains, as hours of it would not do here.
ELSEWHERE = (
    "bash ops/",
    "source ",
    "ruff ",
    "mypy",
    "apt install",
    "python ops/readme.py",
    "ops/nano/evaluate",
    "ops/nano/train",
    "pip install",
)
PIP = [line for line in OTHERS if line.startswith("pip install")]


def test_generated_parts_are_fresh_and_links_lead_somewhere():
    command = [sys.executable, ROOT / "ops" / "readme.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert [page.name for page in PAGES[1:] if f"(ops/docs/{page.name})" not in text] == []


@pytest.mark.parametrize(
    ("page", "link", "leads"),
    [
        ("README.md", "ops/docs/query.md#search", True),
        ("README.md", "#numbers", True),
        ("README.md", "ops/docs/query.md#no-such-heading", False),
        ("README.md", "ops/docs/no_such_page.md", False),
        ("ops/docs/query.md", "commands.md#exit-codes", True),
        ("ops/docs/query.md", "README.md", False),
        ("ops/docs/query.md", "https://example.org/#anything", True),
    ],
)
def test_a_link_that_leads_nowhere_is_found(page, link, leads):
    from ops.readme import broken_links

    assert broken_links(ROOT / page, f"# A page\n\n## Numbers\n\nSee [this]({link}).") == ([] if leads else [link])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The lines of the console blocks, run from first to last on one archive, which it gives with what they said."""
    archive = tmp_path_factory.mktemp("session") / "archive"
    return archive, [run(each.splitlines()[0], {"VIDX_ARCHIVE": str(archive)}) for each in SESSION]


def test_the_sessions_run_and_print_what_the_pages_show(session):
    archive, runs = session
    assert len(SESSION) >= 10
    for each, done in zip(SESSION, runs, strict=True):
        command, *shown = each.splitlines()
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if not command.startswith("vidx index"):  # which tells how fast it was
            assert lines(shown, archive) - lines((done.stdout + done.stderr).splitlines(), archive) == set(), command


def lines(text, archive):
    """What lines say, without widths of columns, scores, sizes and the count of commits, and with short paths."""
    said = (line.replace(str(archive), "./vidx-archive").replace(f"{ROOT}/", "") for line in text)
    said = (re.sub(r"\b0\.\d{3}\b", "SCORE", " ".join(line.split())) for line in said)
    return {line for line in said if not re.fullmatch(r"─*|size .*|version \d+, .*", line)}


def test_extras_that_the_pages_name_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for line in PIP for extra in re.search(r"\[(.+)\]", line)[1].split(",")}
    assert len(named) >= 5
    assert named <= set(project["optional-dependencies"])
    assert run(pip_dry('pip install ".[gpu]"'), {}).returncode == 0


@pytest.mark.parametrize("command", [line for line in OTHERS if not line.startswith(ELSEWHERE)])
def test_every_other_command_line_runs_as_far_as_this_machine_can(command, session, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(SAMPLES / "highway.avi", videos)
    small = ROOT / "tests" / "reference" / "llava-mini-tiny" / "checkpoint"
    archive = tmp_path / "archive"
    if "--model" not in command:
        shutil.copytree(session[0], archive)
    settings = {"HF_HUB_OFFLINE": "1", "VIDX_ARCHIVE": str(archive)}
    places = {"~/videos": videos, "/shared/videos": videos, "~/archive": archive, "/shared/archive": tmp_path / "none"}
    places |= {"~/models/llava-mini-llama-3.1-8b": small, "--model MODEL": "--model nano"}
    for word, place in places.items():
        command = command.replace(word, str(place))
    done = run(command, settings)
    expected = {"--address head:6379 --archive": (2, "no archive"), "ray://": (2, "no archive")}
    expected |= {"ICTNLP/": (2, "hub"), "one_gpu": (2, "no GPU"), "head:6379": (2, "head:6379")}
    code, says = next((end for word, end in expected.items() if word in command), (0, ""))
    assert (done.returncode, says in done.stderr) == (code, True), f"{command}\n{done.stderr}"


def pip_dry(command):
    return command.replace("pip install", f"{sys.executable} -m pip install --dry-run --no-deps --quiet")


def run(command, settings):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **settings, "PATH": path}
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
