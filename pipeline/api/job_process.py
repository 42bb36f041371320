"""Runs a job in a process of its own, pipeline.api.job_child, for `vidx.index`.

Ray may end the process that uses it at any moment, takes over its signals, and starts in no thread but the first one: a
program or a notebook that indexes videos is spared all of that.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from storage.errors import ClusterError, VidxError
from storage.processes import python_path
from storage.records import Sampling, VideoAsset

if TYPE_CHECKING:
    from pipeline.index.config import IndexConfig
    from pipeline.index.job import IndexResult
    from pipeline.index.progress import Progress


@dataclass(frozen=True)
class IndexJob:
    """What `pipeline.index.job.run_index` is to do."""

    assets: Sequence[VideoAsset]
    archive_uri: str
    sampling: Sampling
    config: "IndexConfig"


@dataclass(frozen=True)
class Broken:
    """A mistake of ours in the process of the job."""

    traceback: str


def run_job(job: IndexJob, report: "Callable[[Progress], None]") -> "IndexResult":
    """Runs a job in a new process, and passes on what it says and Ctrl-C.

    Raises:
        VidxError: as run_index raises it; ClusterError where the process was ended from outside.
        RuntimeError: the job broke off by a mistake of ours; the message holds the traceback.
    """
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        process, connection = _start(errors, stack)
        ended = None
        try:
            connection.send(job)
            ended = _listen(connection, process, report)
        finally:
            if ended is None and process.poll() is None:
                process.terminate()  # it commits what is finished
            _wait(process)
        if isinstance(ended, VidxError):
            raise ended
        if isinstance(ended, Broken):
            raise RuntimeError(f"the job broke off:\n{ended.traceback}")
        if ended is None:
            _tell_end(process.returncode, errors)
        return ended


def _start(errors: BinaryIO, stack: contextlib.ExitStack) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    lifeline, held = os.pipe()
    connection = stack.enter_context(Connection(ours.detach()))
    stack.callback(os.close, held)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.api.job_child", str(theirs.fileno()), str(lifeline)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(theirs.fileno(), lifeline),
            env=os.environ | {"PYTHONPATH": python_path()},
            process_group=0,  # Ctrl-C reaches it through this process, once
        )
    finally:
        theirs.close()
        os.close(lifeline)
    return process, connection


def _listen(
    connection: Connection, process: subprocess.Popen, report: "Callable[[Progress], None]"
) -> "IndexResult | VidxError | Broken | None":
    """How the job ended; None where its process ended without a word."""
    from pipeline.index.progress import Progress

    while True:
        try:
            said = connection.recv()
        except (EOFError, ConnectionError):
            return None
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            continue
        if not isinstance(said, Progress):
            return said
        report(said)


def _wait(process: subprocess.Popen) -> None:
    while True:
        try:
            process.wait()
            return
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _tell_end(code: int, errors: BinaryIO) -> NoReturn:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.startswith("vidx: ")]
    why = lines[-1].removeprefix("vidx: ") if lines else f"the job's process ended with code {code}"
    raise ClusterError(why)
