"""What the vector index consists of: index/index.json, which is swapped atomically.

Its first line is the CRC32C of the rest, which is JSON: for each file its name, bytes and checksums, and the parts
whose keys it holds, in the order of their keys. Writers change it under a lock that the system takes back from a dead
process; files are never changed, so that a reader that has one open keeps what it opened.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import google_crc32c
import numpy as np

from storage.archive import Archive
from storage.files import (
    NewFile,
    file_size,
    join,
    local_path,
    make_folder,
    map_file,
    open_for_read,
    read_bytes,
    remove,
    write_bytes,
    writing,
)

INDEX_FORMAT = 4
MANIFEST = "index.json"
LOCK = "index.lock"
TRAINING = "training.lock"
FLOORS = "floors.json"  # pipeline/floors.py


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
        if (content["format"], content["model_id"]) != (INDEX_FORMAT, archive.model_id):
            raise Damaged("another format or model")
        coarse = content["coarse"]
        return Manifest(
            tuple(_key_file(values) for values in content["exact"]),
            tuple(_key_file(values) for values in content["coded"]),
            None if coarse is None else Written(**coarse),
            content["trained_count"],
            content["checked_count"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        known: set[str] = set()  # what it named cannot be told from what others are writing: `vidx clean` sees to it
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
        with contextlib.suppress(OSError):
            remove(join(archive.index_uri, name))


def read_json(uri: str) -> dict:
    """What write_json wrote.

    Raises:
        Damaged: it is missing, or not what was written.
    """
    with _reading(uri):
        checksum, _, text = read_bytes(uri).partition(b"\n")
        if int(checksum, 16) != google_crc32c.value(text):
            raise Damaged(f"{uri}: checksum")
        return json.loads(text)


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
            file = stack.enter_context(open(path, "wb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


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
        _check_size(join(archive.index_uri, file.name), file)


def map_checked(archive: Archive, file: Written) -> np.ndarray:
    """(bytes,) uint8: a file of the index, mapped, after a look at its size and its head.

    Raises:
        Damaged: it is not what was written.
    """
    uri = join(archive.index_uri, file.name)
    _check_size(uri, file)
    with _reading(uri):
        mapping = map_file(uri)
        data = np.frombuffer(read_bytes(uri) if mapping is None else mapping, np.uint8)
        if google_crc32c.value(data[: file.head_bytes]) != file.head_checksum:
            raise Damaged(f"{uri}: checksum")
        return data


def check_whole(archive: Archive, file: Written) -> None:
    """Raises Damaged where any byte of a file is not what was written."""
    data, checksum = map_checked(archive, file), 0
    for start in range(0, len(data), 1 << 24):
        checksum = google_crc32c.extend(checksum, data[start : start + (1 << 24)].tobytes())
    if checksum != file.checksum:
        raise Damaged(f"{join(archive.index_uri, file.name)}: checksum")


def path_of(archive: Archive, file: Written) -> str:
    """Where a file of a local archive lies, for libraries that open files by themselves."""
    return os.fsdecode(local_path(join(archive.index_uri, file.name)))


def _check_size(uri: str, file: Written) -> None:
    with _reading(uri):
        size = file_size(uri)
    if size != file.size_bytes:
        raise Damaged(f"{uri}: {size} bytes")


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise Damaged(f"{uri}: {error}") from error


def _key_file(values: dict) -> KeyFile:
    covered = values["covered"]
    numbers, counts = (np.array(covered[name], np.int64) for name in ("video_numbers", "key_counts"))
    if not len(covered["paths"]) == len(numbers) == len(counts):
        raise ValueError("parts of a file are not described alike")
    return KeyFile(
        tuple(Written(**file) for file in values["files"]), Covered(tuple(covered["paths"]), numbers, counts)
    )


def _values(file: KeyFile) -> dict:
    covered = {
        "paths": file.covered.paths,
        "video_numbers": file.covered.video_numbers.tolist(),
        "key_counts": file.covered.key_counts.tolist(),
    }
    return {"files": [asdict(written) for written in file.files], "covered": covered}
