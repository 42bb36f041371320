"""The Ray cluster that a command uses."""

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from storage.errors import UsageError

MOST_BYTES = 43  # of the path of Ray's folder: that of a socket has 107, of which Ray's names take up to 64


def start_ray(address: str | None) -> None:
    """Starts a cluster on this machine, or joins the one at an address.

    Raises:
        UsageError: it cannot be started or reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 128 << 20}
        options |= {"_temp_dir": _folder_for_ray()}
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would keep one in a home that may not be there
    else:
        options |= {"address": address}
        warnings.filterwarnings("ignore", message="Ray Client connection timed out")  # which is told as an error
    _hear_threads()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _on_loopback() if address is None else contextlib.nullcontext():
            ray.init(**options)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler would end the job without a last commit
    except Exception as error:  # a node that does not come up in time raises no narrower kind
        first = first_line(error)
        if address is None:
            raise UsageError(f"Ray cannot be started on this machine: {first}") from error
        raise UsageError(f"--address {address}: no Ray cluster can be reached there: {first}") from error


def first_line(error: BaseException) -> str:
    """What an error says in one line: its first, and its last where the first one announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[-1]}"


def address_of_joined(address: str) -> str:
    """HOST:PORT at which the cluster that was joined there answers: its server for clients, or else its head."""
    return address.removeprefix("ray://") if address.startswith("ray://") else ray.get_runtime_context().gcs_address


def _folder_for_ray() -> str:
    """Where Ray keeps its sockets and logs: where it would by itself, or another place that it can use.

    Raises:
        UsageError: there is none.
    """
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    for parent in dict.fromkeys((chosen, "/tmp", "/var/tmp")):
        shared, own = os.path.join(parent, "ray"), os.path.join(parent, f"ray-{os.getuid()}")
        for folder in (shared, own) if _is_writable(parent) else ():
            free = not os.path.lexists(folder)
            usable = free or (_is_writable(folder) and (folder == shared or os.lstat(folder).st_uid == os.getuid()))
            if usable and len(os.fsencode(os.path.abspath(folder))) <= MOST_BYTES:
                return os.path.abspath(folder)
    if _is_writable("/dev/shm"):
        folder = tempfile.mkdtemp(prefix="ray-", dir="/dev/shm")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # it takes memory
        return folder
    raise UsageError(
        f"Ray needs a folder for its sockets that can be written and whose path is short, and {chosen} is none; set "
        f"TMPDIR to a folder whose path has at most {MOST_BYTES - len('/ray')} bytes"
    )


def _is_writable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Has ray.init start a cluster whose processes all listen at 127.0.0.1 alone.

    They do where that is the address of their node. Ray takes it on macOS and Windows; elsewhere it takes an address
    that other machines reach, even where ray.init is given 127.0.0.1. What says which is read from the environment
    (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) when Ray is imported, so that the environment comes too late here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@cache
def _hear_threads() -> None:
    """Once a process, however often Ray is started."""
    threading.excepthook = partial(_leave_out_ray, threading.excepthook)


def _leave_out_ray(tell: Callable[[threading.ExceptHookArgs], Any], failure: threading.ExceptHookArgs) -> None:
    """Ray's own threads end with tracebacks when its processes die, of which whoever waits for a result says a word."""
    if not isinstance(failure.exc_value, RayError):
        tell(failure)
