"""Converts pickled weights to safetensors, in a process that can open no other file (unpickle_child.py)."""

import os
from collections.abc import Callable
from pathlib import Path

from storage.errors import UsageError
from workers.child_process import ChildProcess
from workers.models.checkpoint import read_header
from workers.protocol import Closed

STEPS = {"network", "files"}  # steps of the sandbox that the process takes
TIMEOUT_SECONDS = 600  # without a message from the process
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def convert(source: Path, target: Path, report: Callable[[int], None]) -> set[str]:
    """Writes the tensors of a pickled file to a safetensors file; the file appears only when it is complete.

    Args:
        report: called with the number of bytes written so far.
    Returns:
        The steps of the sandbox ("network", "files") that this machine did not allow.
    Raises:
        UsageError: the source is damaged or holds more than tensors, or the target cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(source, "rb") as read, open(draft, "w+b") as written:
            missing = STEPS - _run(source, read.fileno(), written.fileno(), report)
            os.fsync(written.fileno())
        read_header(draft)
        draft.replace(target)
        return missing
    except OSError as error:
        raise UsageError(f"{error.filename or target}: {error.strerror}; VIDX_CACHE names another folder") from error
    finally:
        draft.unlink(missing_ok=True)


def _run(source: Path, read: int, written: int, report: Callable[[int], None]) -> set[str]:
    """Runs the process; returns the steps of the sandbox that it took."""
    arguments = (read, written, os.path.realpath(source))
    child = ChildProcess("workers.models.unpickle_child", arguments, (read, written), _ENVIRONMENT)
    child.connection.settimeout(TIMEOUT_SECONDS)
    taken: set[str] = set()
    try:
        while True:
            message, _ = child.receive()
            if message["kind"] == "ready":
                taken = set(message["sandbox"])
            elif message["kind"] == "written":
                report(message["bytes"])
            elif message["kind"] == "refused":
                raise UsageError(f"{source}: pickled weights that are refused: {message['detail']}")
            elif message["kind"] == "unwritten":
                raise UsageError(f"{source}: cannot be converted: {message['detail']}; VIDX_CACHE names another folder")
            elif message["kind"] == "done":
                return taken
    except (Closed, TimeoutError) as error:
        raise UsageError(f"{source}: pickled weights; the process that reads them {child.describe_end()}") from error
    finally:
        child.kill()
