"""Identity of a source: the SHA-256 of its bytes, and checks that the file has not changed since."""

import errno
import hashlib
import os
import stat
import time

from storage.errors import VideoProblem
from storage.files import file_path, source_text
from storage.records import Content, Reason, VideoRow
from workers.sources.hash_cache import HashCache, is_settled


def identify(path: str | bytes, cache: HashCache | None = None, *, read: bool = False) -> Content:
    """The SHA-256 of a file, with its size and modification time.

    Args:
        path: of the file.
        cache: a file whose hash is in it, in its present state, is not read.
        read: read it all the same.
    Raises:
        VideoProblem: the file is missing, cannot be read, is no regular file, or changes while it is read.
    """
    descriptor = open_source(path)
    with open(descriptor, "rb", buffering=0) as file:
        read_ns, before = time.time_ns(), os.fstat(descriptor)
        if cache is not None and not read and (known := cache.get(before)):
            return Content(known, before.st_size, before.st_mtime_ns)
        try:
            video_id = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise problem_of(error) from error
        after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise VideoProblem(Reason.CHANGED, "the file changed while it was read; index it again when it is complete")
    if cache is not None and before.st_ctime_ns == after.st_ctime_ns:
        cache.put(after, video_id, read_ns)
    return Content(video_id, after.st_size, after.st_mtime_ns, is_settled(after, read_ns))


def check_unchanged(path: str | bytes, content: Content) -> None:
    """Checks that a file still has the size and modification time that it had when it was hashed.

    Raises:
        VideoProblem: CHANGED, VANISHED or PERMISSION.
    """
    try:
        now = os.stat(path)
    except (OSError, ValueError) as error:
        raise problem_of(error) from error
    if (now.st_size, now.st_mtime_ns) != (content.size_bytes, content.mtime_ns):
        raise VideoProblem(
            Reason.CHANGED, f"the file changed: {content.size_bytes} bytes when hashed, {now.st_size} bytes now"
        )


def check_still_there(row: VideoRow) -> None:
    """Checks that an indexed video's file is there and has not changed.

    Raises:
        VideoProblem: the file is gone or has changed; the detail names it.
    """
    path = file_path(row.uri)
    try:
        now = os.stat(path)
        same = now.st_size == row.size_bytes
        if same and now.st_mtime_ns != row.mtime_ns:  # perhaps only touched, or copied back
            same = identify(path, HashCache()).video_id == row.video_id
    except OSError as error:
        raise in_video(row, VideoProblem(Reason.VANISHED, str(error.strerror))) from error
    except ValueError as error:
        raise in_video(row, problem_of(error)) from error
    except VideoProblem as problem:
        raise in_video(row, problem) from problem
    if not same:
        raise in_video(row, VideoProblem(Reason.CHANGED, "changed since it was indexed"))


def in_video(row: VideoRow, problem: VideoProblem) -> VideoProblem:
    """The same problem, with the video's name in its detail."""
    return VideoProblem(problem.reason, f"{source_text(row.uri)}: {problem.detail}")


def open_source(path: str | bytes) -> int:
    """Opens a regular file for reading and returns its descriptor; never blocks on a pipe or device.

    Raises:
        VideoProblem: the file is missing, cannot be read, or is no regular file.
    """
    try:
        _refuse_irregular(os.stat(path).st_mode)
        # A pipe may take the file's place between stat and open: O_NONBLOCK, and a second check.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise problem_of(error) from error
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode)
    except VideoProblem:
        os.close(descriptor)
        raise
    return descriptor


def problem_of(error: OSError | ValueError) -> VideoProblem:
    """The VideoProblem for a failed system call on a source."""
    if isinstance(error, ValueError):
        return VideoProblem(Reason.VANISHED, f"no file can have this name: {error}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE):
        return VideoProblem(Reason.VANISHED, f"there is no such file ({error.strerror})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return VideoProblem(Reason.PERMISSION, "the file may not be read (permission denied)")
    return VideoProblem(Reason.UNKNOWN, f"the file cannot be read: {error.strerror}")


def _refuse_irregular(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise VideoProblem(Reason.NOT_A_VIDEO, f"this is {kind}, not a file")
