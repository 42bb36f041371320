"""The one file-system layer: every place is a URI; local ones are mapped, others go through fsspec."""

import contextlib
import errno
import io
import mmap
import os
import re
import shutil
import tempfile
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import google_crc32c

from storage.errors import ArchiveError, UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# FUSE and some network mounts cannot sync a directory or a file; the data is as safe there as they make it.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)

# What a place without hard links says.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


def to_uri(path_or_uri: str | bytes) -> str:
    """The absolute URI of a path; a URI stays as it is, but for file:// ones in canonical spelling.

    The bytes of a path are percent-encoded exactly, whether they are UTF-8 or not. Symbolic links are kept.
    """
    if isinstance(path_or_uri, str) and _SCHEME.match(path_or_uri):
        path = local_path(path_or_uri)
        if path is None:
            return path_or_uri.rstrip("/")
    else:
        path = os.fsencode(path_or_uri)
    return "file://" + urllib.parse.quote(os.path.abspath(path))


def local_path(uri: str) -> bytes | None:
    """The bytes of a file:// URI's path; None for other schemes."""
    for prefix in ("file:///", "file://localhost/"):
        if uri.lower().startswith(prefix):
            return urllib.parse.unquote_to_bytes(uri[len(prefix) - 1 :])
    return None


def file_path(uri: str) -> bytes:
    """The bytes of the path of a URI that is known to be a file:// one."""
    path = local_path(uri)
    if path is None:
        raise ValueError(f"{uri}: is no file:// URI")
    return path


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; other bytes of a command line stand in it as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def source_text(uri: str) -> str:
    r"""A place as people read it: a local file's path, with bytes that are no UTF-8 as \xNN; else the URI."""
    path = local_path(uri)
    return uri if path is None else path.decode("utf-8", "backslashreplace")


def normalize_text(text: str) -> str:
    """A text in the one spelling (NFC) of all that look alike; macOS names files in another (NFD) than people type."""
    return unicodedata.normalize("NFC", text)


def normalize_uri(uri: str) -> str:
    """The same of a URI, with what is percent-encoded in it decoded: to compare with others, not to open."""
    return normalize_text(urllib.parse.unquote(uri, errors="backslashreplace")) if "%" in uri else uri


def join(uri: str, *names: str) -> str:
    """The URI of a thing below uri; names are plain text, encoded where the scheme wants it."""
    if local_path(uri) is not None:
        names = tuple(urllib.parse.quote(os.fsencode(name)) for name in names)
    return "/".join((uri.rstrip("/"), *names))


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    path = local_path(uri)
    if path is not None:
        return os.path.exists(path)
    file_system, remote = _remote(uri)
    return file_system.exists(remote)


def list_names(uri: str) -> list[str]:
    """Names directly in a folder, sorted; none where there is no such folder."""
    path = local_path(uri)
    if path is not None:
        return sorted(os.fsdecode(name) for name in os.listdir(path)) if os.path.isdir(path) else []
    file_system, remote = _remote(uri)
    if not file_system.exists(remote):
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in file_system.ls(remote, detail=False))


def file_size(uri: str) -> int:
    """Bytes of one file."""
    path = local_path(uri)
    if path is not None:
        return os.stat(path).st_size
    file_system, remote = _remote(uri)
    return file_system.size(remote)


def tree_size(uri: str) -> int:
    """Bytes of all files below a folder."""
    path = local_path(uri)
    if path is None:
        file_system, remote = _remote(uri)
        return file_system.du(remote) if file_system.exists(remote) else 0
    total, folders = 0, [path]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):  # a running job tidies up
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def make_folder(uri: str) -> None:
    """A folder and its parents; nothing to do on object storage."""
    path = local_path(uri)
    if path is not None:
        os.makedirs(path, exist_ok=True)


def remove(uri: str) -> None:
    """Deletes one file; one that is gone already is fine."""
    path = local_path(uri)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path is not None:
            os.remove(path)
        else:
            file_system, remote = _remote(uri)
            file_system.rm_file(remote)


def read_bytes(uri: str) -> bytes:
    """The whole of a file."""
    path = local_path(uri)
    if path is None:
        file_system, remote = _remote(uri)
        return file_system.cat_file(remote)
    with open(path, "rb") as file:
        return file.read()


class NewFile:
    """A file being written: it appears at its URI whole, and safe on disk, with `keep`, or not at all.

    Attributes:
        file: to write to.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self._path = local_path(uri)
        if self._path is None:  # it may get another name when it is whole, and an object cannot be renamed
            self.file = ChecksummedFile(tempfile.TemporaryFile())  # noqa: SIM115  (closed by keep or discard)
        else:
            self._temporary = self._path + b"." + uuid.uuid4().hex.encode() + b".tmp"
            self.file = ChecksummedFile(open(self._temporary, "xb"))  # noqa: SIM115

    def keep(self, uri: str | None = None) -> None:
        """Puts the file in place, instead of what was there.

        Args:
            uri: under another name in the same folder.
        """
        uri = uri or self._uri
        if self._path is None:
            file_system, remote = _remote(uri)
            self.file.flush()
            self.file.raw.seek(0)
            with file_system.open(remote, "wb") as place:
                shutil.copyfileobj(self.file.raw, place)
            self.file.close()
            return
        self.file.flush()
        _sync(self.file.fileno())
        self.file.close()
        os.replace(self._temporary, file_path(uri))
        sync_folder(uri.rsplit("/", 1)[0])

    def discard(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(OSError):  # a full disk cannot take what is still buffered
            self.file.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._temporary)


class ChecksummedFile(io.BufferedIOBase):
    """A file that is written from its beginning to its end.

    Attributes:
        raw: the file itself.
        checksum: the CRC32C of all that was written.
    """

    def __init__(self, file: BinaryIO):
        self.raw = file
        self.checksum = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: "ReadableBuffer") -> int:
        """Adds bytes at the end."""
        self.checksum = google_crc32c.extend(self.checksum, bytes(data))
        return self.raw.write(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.raw.tell()

    def fileno(self) -> int:
        """The system's number of the file."""
        return self.raw.fileno()

    def flush(self) -> None:
        """Hands all to the system."""
        if not self.raw.closed:
            self.raw.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        self.raw.close()
        super().close()


def name_with_checksum(stem: str, checksum: int, suffix: str) -> str:
    """A file's name that says what its bytes must be."""
    return f"{stem}.{checksum:08x}{suffix}"


def checksum_in_name(name: str) -> int | None:
    """The CRC32C that a name says, or None."""
    match = re.fullmatch(r"[0-9a-f]{32}\.([0-9a-f]{8})\.\w+", name)
    return None if match is None else int(match[1], 16)


def checksum_of(uri: str) -> int:
    """The CRC32C of a file's bytes."""
    checksum = 0
    with open_for_read(uri) as file:
        while piece := file.read(1 << 22):
            checksum = google_crc32c.extend(checksum, piece)
    return checksum


def write_bytes(uri: str, data: "ReadableBuffer") -> None:
    """Puts a file in place, whole, instead of what was there."""
    new = NewFile(uri)
    try:
        new.file.write(data)
        new.keep()
    except BaseException:
        new.discard()
        raise


def sync_file(uri: str) -> None:
    """Makes a local file that another library wrote survive a power cut; other schemes see to it themselves."""
    path = local_path(uri)
    if path is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def map_file(uri: str) -> mmap.mmap | None:
    """A local file's bytes without reading them, or None where there is no local file to map."""
    path = local_path(uri)
    if path is None:
        return None
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_ranges(uri: str, starts: list[int], length: int) -> list[bytes]:
    """Equally long stretches of a file that cannot be mapped, fetched side by side."""
    file_system, remote = _remote(uri)
    ends = [start + length for start in starts]
    return file_system.cat_ranges([remote] * len(starts), starts, ends, on_error="raise")


@contextlib.contextmanager
def open_for_read(uri: str) -> Iterator[BinaryIO]:
    """A file to read and seek in."""
    path = local_path(uri)
    if path is not None:
        with open(path, "rb") as file:
            yield file
        return
    file_system, remote = _remote(uri)
    with file_system.open(remote, "rb") as file:
        yield file


@contextlib.contextmanager
def write_errors(uri: str) -> Iterator[None]:
    """Turns what the system says against writing at uri into the one line that a user reads.

    Raises:
        ArchiveError: no permission, read-only, no space, or any other OSError.
    """
    try:
        yield
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise ArchiveError(f"{source_text(uri)}: cannot be written: {reason}") from error


def _remote(uri: str) -> tuple:
    import fsspec  # here, so that a command on a local archive does not pay for it

    try:
        return fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{uri!r}: places of this kind cannot be reached: {' '.join(str(error).split())}") from error
