"""A process that reads a hostile file for its owner, which can kill it at any time."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from storage.processes import python_path
from workers.protocol import receive


class ChildProcess:
    """A Python module that runs as a process, connected by a socket.

    The module's first two arguments are descriptors: of its socket, and of a pipe that closes when the owner ends
    (sandbox.die_with_owner).

    Args:
        module: its dotted name.
        arguments: the further ones.
        descriptors: files that stay open in the process, by the same numbers.
        environment: variables to set.

    Attributes:
        connection: the socket.
        has_answered: whether a message has come from the process.
    """

    def __init__(
        self, module: str, arguments: Sequence[object], descriptors: Sequence[int], environment: Mapping[str, str]
    ):
        self.connection, theirs = socket.socketpair()
        lifeline_theirs, self._lifeline = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill)
        own = (theirs.fileno(), lifeline_theirs)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, (*own, *arguments))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(*own, *descriptors),
                env=os.environ | {"PYTHONPATH": python_path()} | dict(environment),
            )
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        self.has_answered = False
        self._is_closed = False
        self._closing = threading.Lock()  # two threads may kill it at once

    @property
    def is_running(self) -> bool:
        """Whether it can take requests."""
        return not self._is_closed and self._process.poll() is None

    def receive(self) -> tuple[dict, bytearray]:
        """The next message, as protocol.receive."""
        header, body, _ = receive(self.connection)
        self.has_answered = True
        return header, body

    def kill(self) -> None:
        """Ends the process and waits for its end; a second call does nothing."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        self._process.kill()
        self._process.wait()
        self.connection.close()
        self._errors.close()
        os.close(self._lifeline)

    def describe_end(self) -> str:
        """How it ended, and the last line of its error output; to be asked before `kill`."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return how + (f": {lines[-1]}" if lines else "")
