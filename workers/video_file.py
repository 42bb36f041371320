"""The one file a decoder may read: an open descriptor, seekable, that counts what is read."""

import os

from workers.content import problem_of


class VideoFile:
    """A seekable reader over a descriptor that it does not own, with its own position.

    Attributes:
        size: bytes, when it was opened; a reader may take a smaller one.
        bytes_read: what has been read so far.

    Raises:
        VideoProblem: the disk or the network behind the file fails.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.bytes_read = 0
        self._position = 0

    def read(self, count: int) -> bytes:
        """Up to count bytes from the current position."""
        data = self.read_at(self._position, count)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to count bytes from offset, none behind `size`; the position stays."""
        if not 0 <= offset < self.size:
            return b""
        try:
            data = os.pread(self.descriptor, min(count, self.size - offset), offset)
        except OSError as error:
            raise problem_of(error) from error
        self.bytes_read += len(data)
        return data
