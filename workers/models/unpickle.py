"""Pickled weights as safetensors, by a process that can open nothing else (unpickle_child.py)."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from storage.errors import UsageError
from storage.processes import python_path
from workers.models.checkpoint import read_header
from workers.protocol import Closed, receive

STEPS = {"network", "files"}  # that the process gives up
TIMEOUT_SECONDS = 600  # without a word from the process
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a sandbox wants one thread


def convert(source: Path, target: Path, report: Callable[[int], None]) -> set[str]:
    """Writes the tensors of a pickled file to a safetensors file, which is there in full or not at all.

    Args:
        source: as torch.save writes it.
        target: beside files that may be anything.
        report: hears how many bytes have been written.
    Returns:
        What the process could not give up before it read the file, as the system does not allow it: "network", "files".
    Raises:
        UsageError: it holds more than tensors, is damaged, or the target cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(source, "rb") as read, open(draft, "w+b") as written:
            kept = STEPS - _run(source, read.fileno(), written.fileno(), report)
            os.fsync(written.fileno())
        read_header(draft)
        draft.replace(target)
        return kept
    except OSError as error:
        raise UsageError(f"{error.filename or target}: {error.strerror}; VIDX_CACHE names another folder") from error
    finally:
        draft.unlink(missing_ok=True)


def _run(source: Path, read: int, written: int, report: Callable[[int], None]) -> set[str]:
    """What the process has given up."""
    ours, theirs = socket.socketpair()
    lifeline_theirs, lifeline = os.pipe()
    passed = (theirs.fileno(), lifeline_theirs, read, written)
    with ours, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "workers.models.unpickle_child",
                    *map(str, passed),
                    os.path.realpath(source),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=passed,
                env=os.environ | _THREADS | {"PYTHONPATH": python_path()},
            )
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        ours.settimeout(TIMEOUT_SECONDS)
        try:
            return _listen(ours, source, report)
        except (Closed, TimeoutError) as error:
            process.kill()
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines()
            how = f": {said[-1]}" if said else " or stopped answering"
            raise UsageError(f"{source}: pickled weights; the process that reads them was killed{how}") from error
        finally:
            process.kill()
            process.wait()
            os.close(lifeline)


def _listen(connection: socket.socket, source: Path, report: Callable[[int], None]) -> set[str]:
    given_up: set[str] = set()
    while True:
        message, _, _ = receive(connection)
        if message["kind"] == "ready":
            given_up = set(message["sandbox"])
        elif message["kind"] == "written":
            report(message["bytes"])
        elif message["kind"] == "refused":
            raise UsageError(f"{source}: pickled weights that are refused: {message['detail']}")
        elif message["kind"] == "unwritten":
            raise UsageError(f"{source}: cannot be converted: {message['detail']}; VIDX_CACHE names another folder")
        elif message["kind"] == "done":
            return given_up
