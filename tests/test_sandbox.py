"""The process that decodes a stranger's file is kept from the network, from files and from memory without end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES, VIDX

from storage.processes import child_pids
from workers.decode.client import Decoder
from workers.models.unpickle import convert
from workers.sandbox import STEPS, missing_here

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's, and so is the way around it")
LAUNCHER = Path(__file__).parent / "without_sandbox.py"
CLIP = SAMPLES / "tractor.webm"

TRY_TO_LEAVE = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000 | 0x40000000))"  # CLONE_NEWUSER, CLONE_NEWNET


def may_leave_the_network():
    """Whether the kernel lets a process of one thread do so."""
    tried = subprocess.run([sys.executable, "-c", TRY_TO_LEAVE], capture_output=True, text=True, check=False)
    return tried.stdout.strip() == "0"


def test_the_process_that_decodes_has_no_network():
    if not may_leave_the_network():
        pytest.skip("this kernel lets no process leave the network")
    before = set(child_pids())
    with Decoder() as decoder:
        decoder.probe(CLIP)
        (pid,) = set(child_pids()) - before
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert {line.split(":")[0].strip() for line in devices} <= {"lo"}


def test_the_process_that_unpickles_has_no_network(tmp_path):
    if not may_leave_the_network():
        pytest.skip("this kernel lets no process leave the network")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    assert "network" not in convert(tmp_path / "a.bin", tmp_path / "a.safetensors", lambda count: None)


def run_without(steps, *command):
    """A command where the kernel does not grant these steps."""
    launched = [sys.executable, LAUNCHER, ",".join(steps), *command]
    return subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)


needs_all = pytest.mark.skipif(sys.platform == "linux" and bool(missing_here()), reason="this kernel grants not all")


@needs_all
@pytest.mark.parametrize("steps", [["network"], ["files"], ["memory"], list(STEPS)])
def test_a_strict_sandbox_refuses_in_one_line_before_anything_is_made(tmp_path, steps):
    archive = tmp_path / "archive"
    run = run_without(steps, VIDX, "index", CLIP, "--archive", archive, "--strict-sandbox")
    assert run.returncode == 2
    assert run.stderr.startswith("vidx: --strict-sandbox: the decoder cannot be kept from ")
    assert run.stderr.count("\n") == 1
    assert {step: words in run.stderr for step, words in STEPS.items()} == {step: step in steps for step in STEPS}
    assert not archive.exists()


@needs_all
def test_a_strict_decoder_reads_nothing_where_it_is_not_confined():
    script = f"""
from storage.errors import UsageError
from workers.decode.client import Decoder
with Decoder(is_strict=True) as decoder:
    try:
        decoder.probe({str(CLIP)!r})
    except UsageError as error:
        print(error)
with Decoder() as decoder:
    print(decoder.probe({str(CLIP)!r}).codec, *decoder.sandbox_missing)
"""
    run = run_without(["files"], sys.executable, "-c", script)
    refused, read = run.stdout.splitlines()
    assert (refused[:17], read) == ("--strict-sandbox:", "vp9 files")
    with Decoder(is_strict=True) as decoder:
        assert (decoder.probe(CLIP).codec, decoder.sandbox_missing) == ("vp9", ())


@needs_all
def test_what_a_decoder_was_not_kept_from_is_told_once_and_kept_with_the_video(tmp_path, vidx):
    archive = ("--archive", str(tmp_path / "archive"))
    run = run_without(["network", "files"], VIDX, "index", CLIP, *archive, "--json")
    assert run.returncode == 0
    (note,) = [line for line in run.stderr.splitlines() if "not kept from" in line]
    assert note.startswith("the decoders were not kept from the network and opening files: ")
    assert json.loads(run.stdout)["sandbox_missing"] == ["files", "network"]
    status = vidx("status", "--json", *archive).json
    assert (status["videos_unconfined"], status["sandbox_missing"]) == (1, ["files", "network"])
    assert "1 video decoded without being kept from the network and opening files" in vidx("status", *archive).out
    assert vidx("sql", "SELECT sandbox_missing AS s FROM videos", "--json", *archive).json == [{"s": "files,network"}]
    assert vidx("delete", CLIP.name, *archive).code == 0
    assert vidx("status", "--json", *archive).json["videos_unconfined"] == 0


@needs_all
def test_where_everything_is_enforced_nothing_is_said(samples_archive, tmp_path, vidx):
    archive = ("--archive", str(tmp_path / "archive"))
    run = vidx("index", str(CLIP), *archive, "--strict-sandbox", ray=True)
    assert (run.code, "kept from" in run.err) == (0, False)
    for place in (archive, ("--archive", str(samples_archive[0]))):
        status = vidx("status", "--json", *place).json
        assert (status["videos_unconfined"], status["sandbox_missing"]) == (0, [])
        assert "sandbox" not in vidx("status", *place).out
