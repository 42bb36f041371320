"""The process that decodes a stranger's file is kept from the network, from files and from memory without end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES

from storage.processes import children
from workers.decode import Decoder
from workers.unpickle import convert

TRY_TO_LEAVE = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000 | 0x40000000))"  # CLONE_NEWUSER, CLONE_NEWNET


def may_leave_the_network():
    """Whether the kernel lets a process of one thread do so."""
    tried = subprocess.run([sys.executable, "-c", TRY_TO_LEAVE], capture_output=True, text=True, check=False)
    return tried.stdout.strip() == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_that_decodes_has_no_network():
    if not may_leave_the_network():
        pytest.skip("this kernel lets no process leave the network")
    before = set(children())
    with Decoder() as decoder:
        decoder.probe(SAMPLES / "tractor.webm")
        (pid,) = set(children()) - before
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert {line.split(":")[0].strip() for line in devices} <= {"lo"}


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are of Linux")
def test_the_process_that_unpickles_has_no_network(tmp_path):
    if not may_leave_the_network():
        pytest.skip("this kernel lets no process leave the network")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin")
    assert "network" not in convert(tmp_path / "a.bin", tmp_path / "a.safetensors", lambda count: None)
