"""Local files by URI (file://): names and paths, whole and durable writes, checksums."""

import contextlib
import errno
import io
import mmap
import os
import re
import unicodedata
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import google_crc32c

from storage.errors import ArchiveError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# FUSE and some network mounts cannot sync a file or a directory; the data is as safe there as they make it.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)

# The errors of a file system without hard links.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


def to_uri(path_or_uri: str | bytes) -> str:
    """The absolute URI of a path; a file:// URI gets its canonical spelling, any other URI stays as it is.

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
    """The path of a file:// URI, as bytes; None for other schemes."""
    for prefix in ("file:///", "file://localhost/"):
        if uri.lower().startswith(prefix):
            return urllib.parse.unquote_to_bytes(uri[len(prefix) - 1 :])
    return None


def file_path(uri: str) -> bytes:
    """The path of a file:// URI, as bytes.

    Raises:
        ValueError: the URI has another scheme.
    """
    path = local_path(uri)
    if path is None:
        raise ValueError(f"{uri}: is not a file:// URI")
    return path


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; Python keeps other bytes of a command line as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def source_text(uri: str) -> str:
    r"""A URI as people read it: the path of a local file, with bytes that are not UTF-8 as \xNN; else the URI."""
    path = local_path(uri)
    return uri if path is None else path.decode("utf-8", "backslashreplace")


def normalize_text(text: str) -> str:
    """A text in Unicode form NFC, so that texts that look alike compare equal; macOS names files in NFD."""
    return unicodedata.normalize("NFC", text)


def normalize_uri(uri: str) -> str:
    """A URI to compare with others, not to open: percent-decoded and in Unicode form NFC."""
    return normalize_text(urllib.parse.unquote(uri, errors="backslashreplace")) if "%" in uri else uri


def join(uri: str, *names: str) -> str:
    """The URI of a file or folder below a folder; empty names are left out.

    The names are plain text and are percent-encoded for file:// URIs.
    """
    names = tuple(filter(None, names))
    if local_path(uri) is not None:
        names = tuple(urllib.parse.quote(os.fsencode(name)) for name in names)
    return "/".join((uri.rstrip("/"), *names))


def exists(uri: str) -> bool:
    """Whether the file or folder exists."""
    return os.path.exists(file_path(uri))


def list_names(uri: str) -> list[str]:
    """The names in a folder, sorted; empty if there is no such folder."""
    path = file_path(uri)
    return sorted(os.fsdecode(name) for name in os.listdir(path)) if os.path.isdir(path) else []


def file_size(uri: str) -> int:
    """The size of a file, in bytes."""
    return os.stat(file_path(uri)).st_size


def tree_size(uri: str) -> int:
    """The size of all files below a folder, in bytes."""
    total, folders = 0, [file_path(uri)]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):  # a running job removes its temporary files
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def make_folder(uri: str) -> None:
    """Creates a folder and its parents; an existing one stays."""
    os.makedirs(file_path(uri), exist_ok=True)


def remove(uri: str) -> None:
    """Deletes a file; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.remove(file_path(uri))


class NewFile:
    """A file being written: `keep` puts it in place, whole and safe on disk; until then it does not exist for readers.

    Attributes:
        file: to write to.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self._temporary = file_path(uri) + b"." + uuid.uuid4().hex.encode() + b".tmp"
        self.file = ChecksummedFile(io.FileIO(self._temporary, "xb"))  # closed by keep or discard

    def keep(self, uri: str | None = None) -> None:
        """Puts the file in place; an existing file there is replaced.

        Args:
            uri: another name for it, in the same folder.
        """
        uri = uri or self._uri
        self.file.flush()
        _sync(self.file.fileno())
        self.file.close()
        os.replace(self._temporary, file_path(uri))
        sync_file(uri.rsplit("/", 1)[0])

    def discard(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):  # a full disk cannot take what is still buffered
            self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._temporary)


class ChecksummedFile(io.BufferedWriter):
    """A file that is written from beginning to end, with a running checksum.

    Attributes:
        checksum: the CRC32C of all bytes written so far.
    """

    checksum = 0

    def write(self, data: "ReadableBuffer") -> int:
        """Appends bytes."""
        self.checksum = google_crc32c.extend(self.checksum, bytes(data))
        return super().write(data)


def name_with_checksum(stem: str, checksum: int, suffix: str) -> str:
    """A file name that includes the checksum of the file's content."""
    return f"{stem}.{checksum:08x}{suffix}"


def checksum_in_name(name: str) -> int | None:
    """The CRC32C in a file name, or None."""
    match = re.fullmatch(r"[0-9a-f]{32}\.([0-9a-f]{8})\.\w+", name)
    return None if match is None else int(match[1], 16)


def checksum_of(uri: str) -> int:
    """The CRC32C of a file's content."""
    checksum = 0
    with open(file_path(uri), "rb") as file:
        while piece := file.read(1 << 22):
            checksum = google_crc32c.extend(checksum, piece)
    return checksum


def write_bytes(uri: str, data: "ReadableBuffer") -> None:
    """Writes a whole file; an existing one is replaced at the end."""
    new = NewFile(uri)
    try:
        new.file.write(data)
        new.keep()
    except BaseException:
        new.discard()
        raise


def sync_file(uri: str) -> None:
    """Makes a file or folder that another library wrote survive a power cut."""
    descriptor = os.open(file_path(uri), os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def map_file(uri: str) -> mmap.mmap:
    """A file's content, mapped into memory instead of read."""
    with open(file_path(uri), "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def write_errors(uri: str) -> Iterator[None]:
    """Turns an OSError of the block, which writes at uri, into one line for the user.

    Raises:
        ArchiveError: no permission, read-only, no space, or any other OSError.
    """
    try:
        yield
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise ArchiveError(f"{source_text(uri)}: cannot be written: {reason}") from error
