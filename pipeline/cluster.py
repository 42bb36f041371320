"""The Ray cluster that a command uses."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import ray
from ray.exceptions import RayError

from storage.errors import UsageError


def start_ray(address: str | None) -> None:
    """Starts a cluster on this machine, or joins the one at an address.

    Raises:
        UsageError: it cannot be started or reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 128 << 20}
    else:
        options |= {"address": address}
    _hear_threads()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler would end the job without a last commit
    except Exception as error:  # a node that does not come up in time raises no narrower kind
        first = str(error).splitlines()[0]
        if address is None:
            raise UsageError(f"Ray cannot be started on this machine: {first}") from error
        raise UsageError(f"--address {address}: no Ray cluster can be reached there: {first}") from error


@cache
def _hear_threads() -> None:
    """Once a process, however often Ray is started."""
    threading.excepthook = partial(_leave_out_ray, threading.excepthook)


def _leave_out_ray(tell: Callable[[threading.ExceptHookArgs], Any], failure: threading.ExceptHookArgs) -> None:
    """Ray's own threads end with tracebacks when its processes die, of which whoever waits for a result says a word."""
    if not isinstance(failure.exc_value, RayError):
        tell(failure)
