"""Real Ray clusters of several nodes on this machine, for tests and ops/chaos.

Each node has a loopback address of its own, so that Ray takes it for a machine.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

RAY = Path(sys.executable).parent / "ray"
HEAD = "127.0.0.2"
TOKEN = {"RAY_AUTH_TOKEN": "of-these-tests-alone-0123456789abcdef"}
# With it Ray takes the addresses that the nodes are given; who uses the cluster has the same token.
ENVIRONMENT = TOKEN | {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "6",
}


class Nodes:
    """A cluster to which nodes are added and from which they are taken.

    Attributes:
        address: for a driver.
        processes: of the nodes by their number, the head's is 0.
    """

    def __init__(self) -> None:
        """A cluster without nodes; `add` starts the head first."""
        self._folder = tempfile.mkdtemp(prefix="ray")  # the paths of its sockets must be short
        self._port = free_port()
        self.address = f"{HEAD}:{self._port}"
        self.processes: dict[int, subprocess.Popen] = {}

    def add(self, cores: int = 1, mounts: str = "", gpus: int = 0) -> int:
        """Starts a node and gives its number.

        Args:
            cores: that Ray may use there.
            gpus: that Ray believes to be there.
            mounts: commands that change the node's view of the file system, and of no other process.
        """
        number = len(self.processes)
        command = [RAY, "start", "--block", "--node-ip-address", f"127.0.0.{number + 2}", "--num-cpus", str(cores)]
        command += ["--num-gpus", str(gpus)]
        command += ["--object-store-memory", str(100 << 20), "--min-worker-port", "0", "--max-worker-port", "0"]
        if number == 0:
            command += ["--head", "--port", str(self._port), "--ray-client-server-port", str(free_port())]
            command += ["--include-dashboard", "false", "--temp-dir", self._folder]
        else:
            command += ["--address", self.address]
        if mounts:
            command = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
        environment = os.environ | ENVIRONMENT
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes[number] = process
        assert process.stdout is not None
        heard: list[str] = []
        while not any("--block" in line for line in heard[-1:]):  # Ray's last line before it waits
            heard.append(process.stdout.readline())
            assert heard[-1], heard
        return number

    def kill(self, number: int) -> None:
        """Kills a node with all that it started, as if its machine were gone."""
        kill_all(self.processes[number])
        self.processes[number].wait(30)

    def close(self) -> None:
        """Ends all nodes."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(*cores: int, gpus: int = 0) -> Iterator[Nodes]:
    """A cluster of nodes with so many cores, and so many GPUs in name, each."""
    nodes = Nodes()
    try:
        for count in cores:
            nodes.add(count, gpus=gpus)
        yield nodes
    finally:
        nodes.close()


def kill_all(process: subprocess.Popen) -> None:
    """Kills a process and all that it has started."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that one has started, and those that they have."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    return [found for child in map(int, children) for found in [child, *descendants(child)]]


def free_port() -> int:
    """A port of the head's address that nothing uses."""
    with socket.create_server((HEAD, 0)) as server:
        return server.getsockname()[1]
