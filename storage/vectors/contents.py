"""What the vector index consists of: index/index.json, which is swapped atomically.

Its first line is the CRC32C of the rest, which is JSON: for each file its name, bytes and checksums, and the parts
whose keys it holds, in the order of their keys. Writers change it under a lock that the system takes back from a dead
process; files are never changed, so that a reader that has one open keeps what it opened.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np

from storage.archive.archive import Archive
from storage.checked import (
    INDEX_NAME,
    INT32,
    Wrong,
    member,
    members,
    names,
    parse_json,
    place_of,
    read_small,
    shown,
    whole,
    wholes,
)
from storage.files import (
    NewFile,
    file_path,
    file_size,
    join,
    local_path,
    make_folder,
    map_file,
    open_for_read,
    read_bytes,
    remove,
    source_text,
    write_bytes,
    writing,
)

INDEX_FORMAT = 4
MANIFEST = "index.json"
LOCK = "index.lock"
TRAINING = "training.lock"
FLOORS = "floors.json"  # pipeline/ask/thresholds.py
MOST_JSON_BYTES = 1 << 30  # ten million parts
MOST_KEYS = 1 << 40
MOST_WIDTH = 1 << 16  # of a key
CRC = (1 << 32) - 1


class Damaged(Exception):
    """The index, or a file of it, is not what was written."""


@dataclass(frozen=True, eq=False)
class Covered:
    """P parts whose keys are in a file, in the order of their keys; of one that keeps no keys the count is 0.

    Attributes:
        paths: P of them.
        video_numbers, key_counts: (P,) int64.
    """

    paths: tuple[str, ...]
    video_numbers: np.ndarray
    key_counts: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[str, int, int]]) -> "Covered":
        """Of (path, video number, key count)."""
        columns = list(zip(*parts, strict=True)) or [(), (), ()]
        return cls(tuple(columns[0]), np.array(columns[1], np.int64), np.array(columns[2], np.int64))

    @cached_property
    def starts(self) -> np.ndarray:
        """(P + 1,) int64: place of each part's first key, and the count of all."""
        return np.concatenate([[0], np.cumsum(self.key_counts)]).astype(np.int64)

    @property
    def key_count(self) -> int:
        """Of all parts."""
        return int(self.starts[-1])

    @cached_property
    def order(self) -> dict[str, int]:
        """Which one a path is."""
        return {path: place for place, path in enumerate(self.paths)}

    def parts(self) -> list[tuple[str, int, int]]:
        """(path, video number, key count) of each."""
        return list(zip(self.paths, self.video_numbers.tolist(), self.key_counts.tolist(), strict=True))


@dataclass(frozen=True)
class Written:
    """A file and what it must be: all of it, and its head, which is checked whenever it is opened."""

    name: str
    size_bytes: int
    checksum: int
    head_bytes: int
    head_checksum: int


@dataclass(frozen=True)
class KeyFile:
    """The keys of some parts: `files` are one of exact keys; or of codes, of runs and of rows; or none."""

    files: tuple[Written, ...]
    covered: Covered


@dataclass(frozen=True)
class Manifest:
    """What the index holds.

    Attributes:
        exact: files of keys as they are stored.
        coded: files of codes; they share the centroids of `coarse`.
        coarse: rotation and centroids, None where nothing is coded.
        trained_count: how many keys there were when those were worked out.
        checked_count: how many there were when a sample of searches was last compared with the truth.
    """

    exact: tuple[KeyFile, ...] = ()
    coded: tuple[KeyFile, ...] = ()
    coarse: Written | None = None
    trained_count: int = 0
    checked_count: int = 0

    @property
    def key_files(self) -> tuple[KeyFile, ...]:
        """All of them."""
        return (*self.exact, *self.coded)

    @property
    def key_count(self) -> int:
        """Keys in all files, live or not."""
        return sum(file.covered.key_count for file in self.key_files)

    def names(self) -> set[str]:
        """Of all files."""
        coarse = set() if self.coarse is None else {self.coarse.name}
        return coarse | {file.name for keys in self.key_files for file in keys.files}


def read_manifest(archive: Archive) -> Manifest:
    """The manifest of an archive's index.

    Raises:
        Damaged: it is missing, damaged, or of another format or model.
    """
    try:
        content = read_json(join(archive.index_uri, MANIFEST))
        if (member(content, "format"), member(content, "model_id")) != (INDEX_FORMAT, archive.model_id):
            raise Damaged("another format or model")
        coarse = member(content, "coarse")
        if coarse is None and members(content, "coded"):
            raise Damaged("codes without their centroids")
        return Manifest(
            tuple(_key_file(values, ("faiss",)) for values in members(content, "exact")),
            tuple(_key_file(values, ("codes", "runs", "rows")) for values in members(content, "coded")),
            None if coarse is None else _written(coarse, "coarse"),
            whole("trained_count", member(content, "trained_count"), most=MOST_KEYS),
            whole("checked_count", member(content, "checked_count"), most=MOST_KEYS),
        )
    except Wrong as error:
        raise Damaged(str(error)) from error


def write_manifest(archive: Archive, after: Manifest) -> None:
    """Puts another manifest in place, and removes the files that the one before named and this one does not.

    To be called under `locked`.

    Raises:
        ArchiveError: the index cannot be written.
    """
    try:
        known = read_manifest(archive).names()
    except Damaged:
        known = set()  # what it named cannot be told from what others are writing: `vidx clean` sees to it
    content = {
        "format": INDEX_FORMAT,
        "model_id": archive.model_id,
        "archive_version": archive.version,
        "trained_count": after.trained_count,
        "checked_count": after.checked_count,
        "coarse": None if after.coarse is None else asdict(after.coarse),
        "exact": [_values(file) for file in after.exact],
        "coded": [_values(file) for file in after.coded],
    }
    write_json(join(archive.index_uri, MANIFEST), content)
    for name in known - after.names():
        with contextlib.suppress(OSError, Wrong):
            remove(place_of(archive.index_uri, name))


def read_json(uri: str) -> Any:
    """What write_json wrote; of what kind its values are is still to be looked at.

    Raises:
        Damaged: it is missing, or not what was written.
    """
    with _reading(uri):
        checksum, _, content = read_small(uri, MOST_JSON_BYTES).partition(b"\n")
        if int(checksum[:8], 16) != google_crc32c.value(content):
            raise Damaged(f"{source_text(uri)}: checksum")
        return parse_json(content)


def write_json(uri: str, content: dict) -> None:
    """Puts a file in place: the CRC32C of the rest as its first line, and the rest.

    Raises:
        ArchiveError: it cannot be written.
    """
    text = json.dumps(content).encode()
    with writing(uri):
        make_folder(uri.rsplit("/", 1)[0])
        write_bytes(uri, b"%08x\n" % google_crc32c.value(text) + text)


@contextlib.contextmanager
def locked(archive: Archive, name: str = LOCK, wait: bool = True) -> Iterator[bool]:
    """Keeps other writers of the index out, until this process ends at the latest; says whether it does.

    Where files cannot be locked the last one to write the manifest wins.

    Args:
        archive: whose index.
        name: of the lock: LOCK for the manifest, TRAINING for making it anew.
        wait: until another has done; or else say False at once.
    Raises:
        ArchiveError: the index cannot be written.
    """
    uri = join(archive.index_uri, name)
    path = local_path(uri)
    if path is None:
        yield True
        return
    with contextlib.ExitStack() as stack:
        with writing(uri):
            make_folder(archive.index_uri)
            file = stack.enter_context(open(_open_lock(path), "wb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


def _open_lock(path: bytes) -> int:
    """A lock file's descriptor; whatever it is that bears its name keeps what it holds."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file")
    return descriptor


def write_file(archive: Archive, suffix: str, write: Callable[[NewFile], int]) -> Written:
    """A new file of the index, not yet in the manifest.

    Args:
        archive: whose index.
        suffix: of its name.
        write: writes it and says how many bytes are its head.
    Raises:
        ArchiveError: the index cannot be written.
    """
    name = f"{uuid.uuid4().hex}{suffix}"
    uri = join(archive.index_uri, name)
    with writing(uri):
        make_folder(archive.index_uri)
        new = NewFile(uri)
        try:
            head_bytes = write(new)
            size_bytes, checksum = new.file.tell(), new.file.checksum
            new.keep()
        except BaseException:
            new.discard()
            raise
        head_checksum = checksum
        if head_bytes < size_bytes:
            with open_for_read(uri) as file:
                head_checksum = google_crc32c.value(file.read(head_bytes))
    return Written(name, size_bytes, checksum, head_bytes, head_checksum)


def check_sizes(archive: Archive, manifest: Manifest) -> None:
    """Raises Damaged where a file is missing or has not as many bytes as were written."""
    coarse = () if manifest.coarse is None else (manifest.coarse,)
    for file in (*coarse, *(file for keys in manifest.key_files for file in keys.files)):
        _place(archive, file)


def map_checked(archive: Archive, file: Written) -> np.ndarray:
    """(bytes,) uint8: a file of the index, mapped, after a look at its size and its head.

    Raises:
        Damaged: it is not what was written.
    """
    uri = _place(archive, file)
    with _reading(uri):
        mapping = map_file(uri)
        data = np.frombuffer(read_bytes(uri) if mapping is None else mapping, np.uint8)
        if google_crc32c.value(data[: file.head_bytes]) != file.head_checksum:
            raise Damaged(f"{source_text(uri)}: checksum")
        return data


def check_whole(archive: Archive, file: Written) -> None:
    """Raises Damaged where any byte of a file is not what was written."""
    data, checksum = map_checked(archive, file), 0
    for start in range(0, len(data), 1 << 24):
        checksum = google_crc32c.extend(checksum, data[start : start + (1 << 24)].tobytes())
    if checksum != file.checksum:
        raise Damaged(f"{file.name}: checksum")


def path_of(archive: Archive, file: Written) -> str:
    """Where a file of a local archive lies, for libraries that open files by themselves."""
    return os.fsdecode(file_path(_place(archive, file)))


def _place(archive: Archive, file: Written) -> str:
    """The URI of a file that is there and has as many bytes as were written."""
    with _reading(file.name):
        uri = place_of(archive.index_uri, file.name)
        size = file_size(uri)
    if size != file.size_bytes:
        raise Damaged(f"{source_text(uri)}: {size} bytes")
    return uri


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise Damaged(f"{source_text(uri)}: {error}") from error


def _written(values: Any, suffix: str) -> Written:
    name = member(values, "name")
    if not isinstance(name, str) or not INDEX_NAME.fullmatch(name) or not name.endswith(f".{suffix}"):
        raise Wrong(f"it names a file {shown(name)}, which no file of an index is called")
    size_bytes = whole("size_bytes", member(values, "size_bytes"))
    return Written(
        name,
        size_bytes,
        whole("checksum", member(values, "checksum"), most=CRC),
        whole("head_bytes", member(values, "head_bytes"), most=size_bytes),
        whole("head_checksum", member(values, "head_checksum"), most=CRC),
    )


def _key_file(values: Any, suffixes: Sequence[str]) -> KeyFile:
    covered, files = member(values, "covered"), members(values, "files")
    paths = names(members(covered, "paths"))
    numbers = wholes("video_number", members(covered, "video_numbers"), 1, INT32)
    counts = wholes("key_count", members(covered, "key_counts"), 0, MOST_KEYS)
    if not len(paths) == len(numbers) == len(counts) or len(files) not in (0, len(suffixes)):
        raise Wrong("the parts or files of its keys are not described alike")
    if (counts.sum(dtype=float) > 0) != bool(files) or counts.sum(dtype=float) > MOST_KEYS:
        raise Wrong("its keys are not those of its parts")
    return KeyFile(tuple(map(_written, files, suffixes)), Covered(paths, numbers, counts))


def _values(file: KeyFile) -> dict:
    covered = {
        "paths": file.covered.paths,
        "video_numbers": file.covered.video_numbers.tolist(),
        "key_counts": file.covered.key_counts.tolist(),
    }
    return {"files": [asdict(written) for written in file.files], "covered": covered}
