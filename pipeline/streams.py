"""Standard input, output and error as the commands use them: whoever started vidx may have closed them.

Results that cannot be written are an error; notes on standard error that cannot be written are lost.
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
    """Standard output takes no more."""

    exit_code = 2


def guard_streams() -> None:
    """To be called before any file is opened: what is opened next would take the number of a closed stream.

    Text that the terminal's encoding lacks is written with escapes.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for number in closed:
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        os.set_inheritable(number, True)  # or the processes started from here would have it closed again
    if 0 in closed or sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (until the process ends)
    sys.stdout = _text(sys.stdout, _Output(1, is_closed=1 in closed))
    sys.stderr = _text(sys.stderr, _Notes(2))


def drop_output() -> None:
    """Lets what standard output could not take go, lest the end of the process tries again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class ReaderGone(Exception):
    """Whoever reads standard output has seen enough; no OSError, which click would make a failure of."""


class _Output(io.FileIO):
    """A standard output whose failures have a name."""

    def __init__(self, number: int, is_closed: bool):
        super().__init__(number, "w", closefd=False)
        self._is_closed = is_closed

    def write(self, data: "ReadableBuffer", /) -> int:
        """As FileIO does it.

        Raises:
            OutputError: it is closed, or what is behind it takes no more.
            ReaderGone: whoever reads it has seen enough.
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
    """A standard error that may fail without harm."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)

    def write(self, data: "ReadableBuffer", /) -> int:
        """As FileIO does it; what cannot be written counts as written."""
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
