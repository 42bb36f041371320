"""Output files outside the archive: checked before any work is done, and written."""

from collections.abc import Iterable
from pathlib import Path

from storage.errors import UsageError


def check_output(path: str, suffixes: Iterable[str]) -> None:
    """Checks that a file can be written.

    Raises:
        UsageError: the file has another suffix, or there is no such folder.
    """
    allowed, folder = tuple(suffixes), Path(path).absolute().parent
    if Path(path).suffix.lower() not in allowed:
        raise UsageError(f"{path}: the file must end in {' or '.join(allowed)}")
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder}; create it, or name another file")


def write_output(path: str, data: bytes) -> None:
    """Writes a file, and overwrites an existing one.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
