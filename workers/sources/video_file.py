"""The open file that a decoder reads; it counts the bytes."""

import os

from workers.sources.identity import problem_of

# The most that is read after a jump; the limit doubles with each further read. FFmpeg asks for 256 kB even where it
# only looks for a time or for the next box.
FIRST_BYTES = 1 << 11


class VideoFile:
    """A seekable file over a descriptor, with a position of its own; does not close the descriptor.

    Args:
        descriptor: of the file.
        hidden: a range of bytes that is left out, as if it were not there.

    Attributes:
        size: bytes of the file when it was opened; may be set to less.
        bytes_read: so far.

    Raises:
        VideoProblem: reading fails.
    """

    def __init__(self, descriptor: int, hidden: range = range(0)):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size - len(hidden)
        self._hidden = hidden
        self.bytes_read = 0
        self._position = 0
        self._at_once = FIRST_BYTES

    def read(self, count: int) -> bytes:
        """At most `count` bytes from the current position; fewer after a jump."""
        data = self.read_at(self._position, min(count, self._at_once))
        self._position += len(data)
        self._at_once = max(FIRST_BYTES, 2 * len(data))
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        position = max(0, base + offset)
        if position != self._position:
            self._position, self._at_once = position, FIRST_BYTES
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position

    def read_at(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from an offset, up to `size`; does not move the position."""
        if not 0 <= offset < self.size:
            return b""
        count = min(count, self.size - offset)
        if offset >= self._hidden.start:
            offset += len(self._hidden)
        else:
            count = min(count, self._hidden.start - offset)
        try:
            data = os.pread(self.descriptor, count, offset)
        except OSError as error:
            raise problem_of(error) from error
        self.bytes_read += len(data)
        return data
