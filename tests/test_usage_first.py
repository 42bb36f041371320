"""Wrong usage is told before Ray and torch are imported, which takes many seconds, and before anything is started."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import SAMPLES

CLIP = str(SAMPLES / "highway.avi")
SMALL = str(Path(__file__).parent / "reference" / "llava-mini-tiny" / "checkpoint")
no_gpu = pytest.mark.skipif(any(Path("/dev").glob("nvidiactl")), reason="there is a GPU")
no_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="the extra `vllm` is installed")
no_scenes = pytest.mark.skipif(find_spec("scenedetect") is not None, reason="the extra `scenes` is installed")

# Runs a command line in one process, and says what of these it has imported.
SCRIPT = """
import sys
import click
from pipeline.cli.main import vidx
from storage.errors import VidxError
code, said = 0, ""
try:
    vidx.main(sys.argv[1:], standalone_mode=False)
except VidxError as error:
    code, said = error.exit_code, str(error)
except click.ClickException as error:
    code, said = 2, error.format_message()
except SystemExit as error:
    code = error.code
print("\\n#", code, *sorted({"ray", "torch", "transformers"} & set(sys.modules)), "#", said)
"""


def run_here(*arguments):
    """Exit code, which heavy libraries were imported, and all that was said."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=True)
    _, ended, said = done.stdout.rsplit("#", 2)
    code, *imported = ended.split()
    return int(code), imported, said + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("index", "/nowhere/a.mp4"), 2, "no such file"),
        (("index", CLIP, "--model", "nonesuch"), 2, "nonesuch"),
        (("index", CLIP, "--config", "nowhere.toml"), 2, "nowhere.toml"),
        (("index", CLIP, "--patches", "100000"), 2, "--patches"),
        (("index", CLIP, "--workers", "1000"), 2, "--workers 1000: there are"),
        (("index", CLIP, "--address", "127.0.0.1:1"), 2, "127.0.0.1:1"),
        (("index", CLIP, "--model", SMALL), 2, "this archive is of the model"),
        (("index", CLIP, "--archive", "/proc/archive"), 5, "cannot be written"),
        pytest.param(("index", CLIP, "--device", "cuda"), 2, "there is no GPU", marks=no_gpu),
        pytest.param(("index", CLIP, "--sample", "scenes"), 2, "not installed", marks=no_scenes),
        (("search", " "), 2, "empty"),
        (("search", "x", "--image", "/nowhere/a.jpg"), 2, "--image /nowhere/a.jpg: cannot be read"),
        (("search", "--image", __file__), 2, "no picture that Pillow can read"),
        (("search", "--image", CLIP, "--like", "no.mp4@3"), 2, "no such video"),
        (("search", "x", "--video", "no.mp4"), 2, "no such video"),
        (("search", "x", "--model", "nonesuch"), 2, "nonesuch"),
        (("search", "x", "--contact-sheet", "a.txt"), 2, "a.txt"),
        (("search", "x", "--tag", "camera=north"), 4, "has a tag"),
        (("ask", " "), 2, "the question is empty; ask something"),
        (("ask", "x", "--video", "no.mp4"), 2, "no such video"),
        (("ask", "x", "--model", "nonesuch"), 2, "nonesuch"),
        (("ask", "x", "--model", SMALL), 2, "is not the model of"),
        (("ask", "x", "--all", "--frames", "3"), 2, "leave out one of them"),
        (("ask", "x", "--address", "127.0.0.1:1"), 2, "127.0.0.1:1"),
        (("ask", "x", "--engine", "vllm", "--quantize", "4bit"), 2, "leave out one of"),
        (("ask", "x", "--contact-sheet", "/nowhere/a.html"), 2, "/nowhere"),
        (("ask", "x", "--archive", "/nowhere"), 2, "no archive at"),
        (("ask", "x", "--after", "2020-01-01"), 4, "nothing found"),
        (("ask", "x", "--after", "2020-01-01", "--json"), 4, "nothing found"),
        pytest.param(("ask", "x", "--device", "cuda"), 2, "there is no GPU", marks=no_gpu),
        pytest.param(("ask", "x", "--engine", "vllm"), 2, "vidx[vllm]", marks=no_vllm),
        (("chat", "--video", "no.mp4"), 2, "no such video"),
        (("chat", "--model", "nonesuch"), 2, "nonesuch"),
        (("chat", "--address", "127.0.0.1:1"), 2, "127.0.0.1:1"),
        (("chat", "--from", "soon"), 2, "not a time"),
        pytest.param(("chat", "--device", "cuda"), 2, "there is no GPU", marks=no_gpu),
        pytest.param(("chat", "--engine", "vllm"), 2, "vidx[vllm]", marks=no_vllm),
        (("export", "/nowhere/a.csv", "x"), 2, "/nowhere"),
        (("export", "a.csv", "--image", "/nowhere/a.jpg"), 2, "--image"),
        (("clip", "no.mp4@1-2"), 2, "no such video"),
        (("clip", "highway.avi@1-2", "a.xyz"), 2, "a.xyz"),
        (("evaluate", "retrieval", "/nowhere/a.csv"), 2, "/nowhere/a.csv"),
        (("evaluate", "retrieval", "/nowhere/a.csv", "--model", "nonesuch"), 2, "nonesuch"),
        (("delete", "no.mp4"), 2, "no such video"),
        (("sql", "SELEC"), 2, "SELEC"),
        (("repair", "--archive", "/nowhere"), 2, "no archive at"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_told_before_ray_and_torch_are_imported(samples_archive, arguments, code, says):
    archive = () if "--archive" in arguments else ("--archive", str(samples_archive[0]))
    found, imported, said = run_here(*arguments, *archive)
    assert (found, imported) == (code, [])
    assert says in said


def test_the_libraries_are_imported_where_they_are_needed(samples_archive):
    """Or the test above could not fail."""
    question = ("ask", "What is there?", "--video", "nano_scenes_1.mp4@1-5", "--fuse", "tokens")
    assert run_here(*question, "--archive", str(samples_archive[0]))[:2] == (0, ["torch", "transformers"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("index('/nowhere/a.mp4', place)", "no such file"),
        (f"index({CLIP!r}, place, workers=1000)", "there are"),
        (f"index({CLIP!r}, place, model='nonesuch')", "nonesuch"),
        pytest.param(f"index({CLIP!r}, place, device='cuda')", "there is no GPU", marks=no_gpu),
    ],
)
def test_wrong_calls_in_python_are_refused_before_anything_is_started(tmp_path, call, says):
    place = tmp_path / "archive"
    script = f"import sys, vidx; place = {str(place)!r}\ntry:\n    vidx.{call}\nexcept vidx.UsageError as error:\n"
    script += "    print(*sorted({'ray', 'torch'} & set(sys.modules)), '#', error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    imported, said = done.stdout.split("#", 1)
    assert (imported.strip(), place.exists()) == ("", False)
    assert says in said
