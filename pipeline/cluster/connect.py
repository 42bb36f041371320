"""Starts a Ray cluster, or joins one."""

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
from collections.abc import Iterator
from functools import cache
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.job_config import JobConfig

from pipeline.cluster.address import ANSWER_SECONDS
from storage.errors import UsageError, VidxError
from storage.processes import usable_cores, usable_memory

MOST_BYTES = 43  # of the path of Ray's folder: a socket's path has at most 107 bytes, and Ray adds up to 64

BYTES_PER_CORE = 44 << 20  # of frames on their way: stages.BATCHES_AHEAD batches of a decoder and the two at work
CLIENT_TRIES = 2  # to reach a cluster from outside; each takes up to half a minute
LEAST_STORE, MOST_STORE = 128 << 20, 8 << 30  # bytes; Ray refuses less than 75 MiB, and 10 GB outside /dev/shm


def start_ray(address: str | None) -> None:
    """Starts a cluster on this machine, or joins the one at an address.

    Raises:
        UsageError: the cluster cannot be started or reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None or not address.startswith("ray://"):
        # Ray would put the driver's current folder first on the workers' sys.path, and a package there that is called
        # `workers` would be imported instead of ours. It does not do so for a job of its client (`ray://`).
        options |= {"job_config": JobConfig(_client_job=True)}
    if address is None:
        cores = usable_cores()
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cores, "_temp_dir": _folder_for_ray()}
        options |= {"object_store_memory": _store_bytes(cores)}
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would write one to the home folder
    else:
        options |= {"address": address}
        warnings.filterwarnings("ignore", message="Ray Client connection timed out")  # an error says so
    hide_ray_tracebacks()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            check_token(address)
        with _on_loopback() if address is None else contextlib.nullcontext():
            _connect(options)
    except UsageError:
        raise
    except SystemExit as error:  # of Ray's own handler of SIGTERM
        raise KeyboardInterrupt from error
    except Exception as error:  # Ray raises nothing narrower if a node starts too late
        first = first_line(error)
        if address is None:
            raise UsageError(f"Ray cannot be started on this machine: {first}") from error
        raise UsageError(f"--address {address}: no Ray cluster answers at this address: {first}") from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would prevent the last commit


def _connect(options: dict[str, Any]) -> None:
    """Calls ray.init; a client server whose process for this client did not start in time is asked once more."""
    for left in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(**options)
            return
        except ConnectionError as error:
            if not left or "Initialization failure from server" not in str(error):
                raise


def check_token(address: str) -> None:
    """Checks that a cluster accepts this process's token; Ray would try for half a minute and then say nothing of it.

    Raises:
        UsageError: the cluster refuses the token.
    """
    try:
        if address.startswith("ray://"):
            _ask_client_server(address.removeprefix("ray://"))
        elif address.rpartition(":")[2].isdigit():
            GcsClient(address=address)
    except AuthenticationError as error:
        raise UsageError(
            f"--address {address}: the cluster refuses the token of this process; set RAY_AUTH_TOKEN to the token of "
            "the cluster, or RAY_AUTH_TOKEN_PATH to a file with it"
        ) from error


def _ask_client_server(address: str) -> None:
    """Raises an AuthenticationError if the client server refuses the token; ray.init says what else is wrong."""
    try:
        import grpc  # Ray's client needs it; it comes with vidx's extra `client`
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
    except ImportError:
        return
    messages: Any = ray_client_pb2  # mypy does not see what is generated
    ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    with init_grpc_channel(address) as channel:
        try:
            ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(ping, timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(error.details()) from error


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Raises what vidx raised in a worker, instead of Ray's error around it."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, VidxError):
            raise error.cause from None
        raise


def first_line(error: BaseException) -> str:
    """The message of an error in one line: its first line, with the last one if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[-1]}"


def address_of_joined(address: str) -> str:
    """HOST:PORT of a joined cluster's client server, or else of its head."""
    return address.removeprefix("ray://") if address.startswith("ray://") else ray.get_runtime_context().gcs_address


def _store_bytes(cores: int) -> int:
    """The size of Ray's object store: what all frames on their way can take, where there is so much memory.

    Ray keeps the store in /dev/shm if that has room for it, else in its temporary folder. Containers often have a
    /dev/shm of 64 MB; a job was not measurably slower there, since the frames are read before the disk has them.
    """
    wanted = min((cores + 1) * BYTES_PER_CORE, usable_memory() // 4, MOST_STORE)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free * 9 // 10
        if free >= LEAST_STORE:
            wanted = min(wanted, free)
    return max(LEAST_STORE, wanted)


def _folder_for_ray() -> str:
    """A folder for Ray's sockets and logs: its default, or another one that it can use.

    Raises:
        UsageError: there is no such folder.
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
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # it uses memory
        return folder
    raise UsageError(
        f"{chosen}: Ray cannot keep its sockets here, the folder cannot be written or its path is too long; set "
        f"TMPDIR to a folder whose path has at most {MOST_BYTES - len('/ray')} bytes"
    )


def _is_writable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Lets ray.init start a cluster whose processes listen only at 127.0.0.1.

    They do if this is the address of their node. Ray uses it on macOS and Windows; elsewhere it uses an address that
    other machines can reach, even if ray.init gets 127.0.0.1. Ray reads the setting for this from the environment
    (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) when it is imported, which has already happened here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@cache
def hide_ray_tracebacks() -> None:
    """Hides the tracebacks of Ray's threads when its processes die; the waiting call raises an error anyway."""
    tell = threading.excepthook

    def tell_others(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, RayError):
            tell(failure)

    threading.excepthook = tell_others
