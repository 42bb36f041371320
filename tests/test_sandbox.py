"""The process that decodes a stranger's file is kept from the network, from files and from memory without end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLES

from storage.processes import children
from workers.decode import Decoder

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
