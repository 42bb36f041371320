"""Files that a user asks for beside the archive: where they can be written, told before any work is done."""

from collections.abc import Iterable
from pathlib import Path

from storage.errors import UsageError


def check_output(path: str, suffixes: Iterable[str]) -> None:
    """Refuses a file that cannot be written.

    Raises:
        UsageError: another suffix, or no such folder.
    """
    allowed, folder = tuple(suffixes), Path(path).absolute().parent
    if Path(path).suffix.lower() not in allowed:
        raise UsageError(f"{path}: name a file that ends in {', '.join(allowed)}")
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder}")


def write_output(path: str, data: bytes) -> None:
    """Writes a file, over one that is there.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
