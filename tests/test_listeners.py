"""A job on one machine is reached from that machine alone."""

import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SAMPLES, VIDX

LISTENS, UNCONNECTED = "0A", "07"  # states in /proc/net/tcp and /proc/net/udp


def processes_of(pid):
    """A process, and all that it has started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def sockets_of(pids):
    """Inodes of their sockets, each with what the process is called."""
    found = {}
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        found |= {link[8:-1]: name for link in links if link.startswith("socket:[")}
    return found


def address_of(text):
    """As the kernel writes it: words of four bytes in the machine's order."""
    words = [int(text[place : place + 8], 16).to_bytes(4, sys.byteorder) for place in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return getattr(address, "ipv4_mapped", None) or address


def listeners(pid):
    """(process name, address) of everything that a process and what it has started listens at."""
    owners = sockets_of(processes_of(pid))
    for kind, state in (("tcp", LISTENS), ("tcp6", LISTENS), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == state and words[9] in owners:
                yield owners[words[9]], address_of(words[1].split(":")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_whatever_a_job_listens_at_is_loopback(tmp_path):
    command = [VIDX, "index", SAMPLES / "tractor.webm", SAMPLES / "highway.avi", "--archive", tmp_path / "archive"]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(command, stdout=said, stderr=said)
    seen = set()
    while job.poll() is None:
        seen |= set(listeners(job.pid))
        time.sleep(0.05)
    assert job.returncode == 0, (tmp_path / "said").read_text()
    names = {name for name, _ in seen}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::") for name in names), names  # workers
    assert {(name, str(address)) for name, address in seen if not address.is_loopback} == set()
