"""The address of a Ray cluster, looked at before Ray is imported."""

import os
import socket
from pathlib import Path

from storage.errors import UsageError

ANSWER_SECONDS = 10


def check_address(address: str) -> None:
    """Refuses an address where nothing listens (Ray would try for minutes), and has Ray show its token there.

    Ray 2.60 reads its mode of authentication when it is imported, and sends the token it has unasked only to "auto".

    Raises:
        UsageError: HOST:PORT cannot be reached.
    """
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://") and not port.isdigit():
        raise UsageError(f"--address {address}: give the port of the cluster's server for clients, ray://HOST:10001")
    if address == "auto" or not port.isdigit():
        return  # Ray knows where to look, or says at once what is wrong
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--address {address}: no Ray cluster can be reached there: {error}") from error


def _has_token() -> bool:
    in_home = Path(os.path.expanduser("~")) / ".ray" / "auth_token"  # there is none where no home is known
    return bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)) or in_home.exists()
