"""Checks the address of a Ray cluster, before Ray is imported."""

import os
import socket
from pathlib import Path

from storage.errors import UsageError

ANSWER_SECONDS = 10


def check_address(address: str) -> None:
    """Checks that something listens at the address, because Ray would try for minutes; lets Ray send its token.

    Ray 2.60 reads its authentication mode when it is imported. Without this mode, it sends the token only to "auto".

    Raises:
        UsageError: HOST:PORT cannot be reached.
    """
    in_home = Path(os.path.expanduser("~")) / ".ray" / "auth_token"  # missing if no home folder is known
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or in_home.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://") and not port.isdigit():
        raise UsageError(f"--address {address}: give the port of the cluster's client server, e.g. ray://HOST:10001")
    if address == "auto" or not port.isdigit():
        return  # Ray itself finds the cluster, or fails at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--address {address}: no Ray cluster answers at this address: {error}") from error
