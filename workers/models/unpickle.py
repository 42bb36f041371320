"""Pickled weights as safetensors, by a process that can open nothing else (unpickle_child.py)."""

import os
from collections.abc import Callable
from pathlib import Path

from storage.errors import UsageError
from workers.child_process import ChildProcess
from workers.models.checkpoint import read_header
from workers.protocol import Closed

STEPS = {"network", "files"}  # that the process gives up
TIMEOUT_SECONDS = 600  # without a word from the process
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


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
    arguments = (read, written, os.path.realpath(source))
    child = ChildProcess("workers.models.unpickle_child", arguments, (read, written), _ENVIRONMENT)
    child.connection.settimeout(TIMEOUT_SECONDS)
    try:
        return _listen(child, source, report)
    except (Closed, TimeoutError) as error:
        raise UsageError(f"{source}: pickled weights; the process that reads them {child.describe_end()}") from error
    finally:
        child.kill()


def _listen(child: ChildProcess, source: Path, report: Callable[[int], None]) -> set[str]:
    given_up: set[str] = set()
    while True:
        message, _ = child.receive()
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
