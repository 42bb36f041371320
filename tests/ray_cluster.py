"""A real Ray cluster of one node, started for tests; it listens at 127.0.0.1 alone."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile

from ops.ray_nodes import RAY, TOKEN

# Who uses the cluster has the same token, and looks for it at 127.0.0.1.
ENVIRONMENT = TOKEN | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextlib.contextmanager
def ray_cluster():
    """The process, and the addresses from inside and from outside, of a cluster that is started here."""
    ports, folder = free_ports(), tempfile.mkdtemp(prefix="ray")  # the paths of its sockets must be short
    command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    command += ["--port", str(ports[0]), "--ray-client-server-port", str(ports[1])]
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--include-dashboard", "false"]
    command += ["--object-store-memory", str(128 << 20), "--temp-dir", folder]
    environment = os.environ | {"RAY_AUTH_MODE": "token", **ENVIRONMENT}
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **together)
    try:
        heard = []
        while not any("--block" in line for line in heard[-1:]):
            heard.append(process.stdout.readline())
            assert heard[-1], heard
        yield process, f"127.0.0.1:{ports[0]}", f"ray://127.0.0.1:{ports[1]}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]
