"""Standard input, output and error, which may be closed when vidx starts.

If results cannot be written to standard output, that is an error. Notes on standard error may be lost.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from storage.errors import VidxError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputError(VidxError):
    """Standard output cannot be written."""

    exit_code = 2


def guard_streams() -> None:
    """Replaces closed streams, and escapes characters that the terminal's encoding does not have.

    Call this before any file is opened: the next file would get the number of a closed stream.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for number in closed:
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        os.set_inheritable(number, True)  # for processes that are started from here
    if 0 in closed or sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (until the process ends)
    sys.stdout = _text(sys.stdout, _Output(1, is_closed=1 in closed))
    sys.stderr = _text(sys.stderr, _Notes(2))


def drop_output() -> None:
    """Discards unwritten output, so that it is not written again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class ReaderGone(Exception):
    """The reader of standard output has closed it. Not an OSError, which click would report as a failure."""


class _Output(io.FileIO):
    """A standard output that raises named errors."""

    def __init__(self, number: int, is_closed: bool):
        super().__init__(number, "w", closefd=False)
        self._is_closed = is_closed

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes as FileIO does.

        Raises:
            OutputError: standard output is closed or cannot be written.
            ReaderGone: the reader has closed it.
        """
        try:
            if self._is_closed:
                raise OSError(errno.EBADF, "it is closed")
            return super().write(data)
        except BrokenPipeError as error:
            raise ReaderGone from error
        except OSError as error:
            self._is_closed = False
            drop_output()
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error


class _Notes(io.FileIO):
    """A standard error that ignores failures."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes as FileIO does; data that cannot be written is lost."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _text(stream: TextIO | None, raw: io.FileIO) -> io.TextIOWrapper:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=raw.isatty())
