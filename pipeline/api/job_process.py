"""Runs an index job in a separate process, pipeline.api.job_child, for `vidx.index`.

Ray can end the process that uses it at any moment, takes over its signals, and starts only in the main thread. A
separate process keeps this away from the program or notebook that calls `vidx.index`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, BinaryIO

from storage.errors import ClusterError, VidxError
from storage.processes import python_path
from storage.records import Sampling

if TYPE_CHECKING:
    from pipeline.index.config import IndexConfig
    from pipeline.index.job import IndexResult
    from pipeline.index.progress import Report


@dataclass(frozen=True)
class IndexJob:
    """What pipeline.api.job_child indexes, and how."""

    sources: Sequence[str]
    archive_uri: str
    sampling: Sampling
    config: "IndexConfig"


@dataclass(frozen=True)
class Broken:
    """A bug of vidx that ended the job."""

    traceback: str


def run_job(job: IndexJob, report: "Report") -> "IndexResult":
    """Runs a job in a new process; passes on its progress, its result, and Ctrl-C.

    Raises:
        VidxError: as run_index raises it; a ClusterError if the process was killed.
        RuntimeError: a bug of vidx ended the job; the message has the traceback.
    """
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        process, connection = _start(errors, stack)
        ended = None
        try:
            connection.send(job)
            ended = _listen(connection, process, report)
        finally:
            if ended is None and process.poll() is None:
                process.terminate()  # the job commits finished work
            _wait(process)
        if isinstance(ended, VidxError):
            raise ended
        if isinstance(ended, Broken):
            raise RuntimeError(f"a bug of vidx ended the job:\n{ended.traceback}")
        if ended is None:
            errors.seek(0)
            lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.startswith("vidx: ")]
            why = (
                lines[-1].removeprefix("vidx: ") if lines else f"the job's process ended with code {process.returncode}"
            )
            raise ClusterError(why)
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
            process_group=0,  # Ctrl-C reaches the job once, through this process
        )
    finally:
        theirs.close()
        os.close(lifeline)
    return process, connection


def _listen(
    connection: Connection, process: subprocess.Popen, report: "Report"
) -> "IndexResult | VidxError | Broken | None":
    """The job's result or error; None if its process ended without one."""
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
