"""The list of the vector index's files: index/index.json, which is replaced atomically.

Its first line is the CRC32C of the rest. The rest is JSON: the name, size and checksum of each file, and the versions
of the shards of frames whose parts are in it. Lists of parts, in the order of their keys, are files of their own, for
an archive may have a million of them:

    ID.parts    for each part its path (64 bytes), video number and key count (int32 each)

Writers take a lock before they replace it; the system frees the lock of
a dead process. Files are never changed, so a reader can go on using what it has opened.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np

from storage.archive.archive import Archive
from storage.checks import (
    INDEX_NAME,
    InvalidValue,
    check_integer,
    check_integers,
    file_uri,
    get_list,
    get_value,
    parse_json,
    read_small,
    short_repr,
)
from storage.files import (
    NewFile,
    file_path,
    file_size,
    join,
    make_folder,
    map_file,
    remove,
    source_text,
    write_bytes,
    write_errors,
)

INDEX_FORMAT = 6
MANIFEST = "index.json"
LOCK = "index.lock"
TRAINING = "training.lock"
THRESHOLDS = "floors.json"  # pipeline/ask/thresholds.py
MOST_JSON_BYTES = 1 << 28
MOST_KEYS = 1 << 40
MOST_WIDTH = 1 << 16  # of a key
PartKeys = tuple[str, int, int]  # path, video number, key count
_ENTRY = np.dtype([("path", "S64"), ("video_number", "<i4"), ("key_count", "<i4")])


class Damaged(Exception):
    """The index or one of its files differs from what was written.

    Attributes:
        file: the name of the damaged file, if it is known.
    """

    def __init__(self, what: str, file: str = ""):
        super().__init__(what)
        self.file = file


@dataclass(frozen=True, eq=False)
class Covered:
    """The P parts whose keys a file holds, in the order of the keys. A part without keys has the count 0.

    Attributes:
        entries: (P,) of dtype _ENTRY, in memory or mapped.
    """

    entries: np.ndarray = field(default_factory=lambda: np.empty(0, _ENTRY))

    @classmethod
    def of(cls, parts: Sequence[PartKeys]) -> "Covered":
        """The same from (path, video number, key count) of each part."""
        return cls(np.array([(path.encode(), number, count) for path, number, count in parts], _ENTRY))

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def video_numbers(self) -> np.ndarray:
        """(P,) int64."""
        return self.entries["video_number"].astype(np.int64)

    @cached_property
    def key_counts(self) -> np.ndarray:
        """(P,) int64."""
        return self.entries["key_count"].astype(np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """(P + 1,) int64: the place of each part's first key, then the count of all keys."""
        return np.concatenate([[0], np.cumsum(self.key_counts)]).astype(np.int64)

    @property
    def key_count(self) -> int:
        """Keys of all parts."""
        return int(self.starts[-1])

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of each part, by its path."""
        return {path: place for place, path in enumerate(self.paths())}

    def path(self, place: int) -> str:
        """The path of one part."""
        return self.entries["path"][place].decode("ascii", "replace")

    def paths(self, places: np.ndarray | None = None) -> list[str]:
        """The paths of some parts; None: of all."""
        chosen = self.entries["path"] if places is None else self.entries["path"][places]
        return [path.decode("ascii", "replace") for path in chosen.tolist()]

    @property
    def every(self) -> np.ndarray:
        """(P,) bool, all true: chooses all parts."""
        return np.ones(len(self), bool)

    def parts(self) -> list[PartKeys]:
        """(path, video number, key count) of each part."""
        return list(zip(self.paths(), self.video_numbers.tolist(), self.key_counts.tolist(), strict=True))

    def count_of(self, parts: Sequence[PartKeys]) -> int:
        """How many keys some parts have here; the lists of a million parts are not read for it."""
        paths = {path for path, _, _ in parts}
        near = np.flatnonzero(np.isin(self.video_numbers, [number for _, number, _ in parts]))
        counts = zip(self.paths(near), self.key_counts[near].tolist(), strict=True)
        return sum(count for path, count in counts if path in paths)

    def keys_of(self, kept: np.ndarray) -> np.ndarray:
        """(keys,) bool: the keys of the parts that are chosen by kept, (P,) bool."""
        return np.repeat(kept, self.key_counts)

    @staticmethod
    def join(pieces: Sequence[tuple["Covered", np.ndarray]]) -> "Covered":
        """Some parts of several files, each with (P,) bool."""
        return Covered(np.concatenate([np.empty(0, _ENTRY), *(piece.entries[kept] for piece, kept in pieces)]))


@dataclass(frozen=True)
class Written:
    """A file of the index, with its size and its CRC32C."""

    name: str
    size_bytes: int
    checksum: int


@dataclass(frozen=True)
class KeyFile:
    """The keys of some parts.

    Attributes:
        files: one of exact keys; or one each of codes, runs and rows; or none, where no part has keys.
        parts: the list of the parts as a file; None where there are none.
        covered: the same list.
        gone: (G,) int64, the places in it of parts that are not in the archive any more.
    """

    files: tuple[Written, ...] = ()
    parts: Written | None = None
    covered: Covered = field(default_factory=Covered)
    gone: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class IndexManifest:
    """What the index holds.

    Attributes:
        coded: the main structure, codes of most keys.
        exact: the keys that were added since, as they are stored. In a small archive: all keys.
        centroids: rotation and centroids of the codes; None while nothing is coded.
        trained_count: how many keys there were when the centroids were trained.
        checked_count: how many keys there were when recall was last measured.
        versions: of each shard of frames, by folder, when the index was last brought up to date.
    """

    exact: KeyFile = KeyFile()
    coded: KeyFile = KeyFile()
    centroids: Written | None = None
    trained_count: int = 0
    checked_count: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)

    @property
    def key_count(self) -> int:
        """Keys in both files, with those of parts that are gone."""
        return self.exact.covered.key_count + self.coded.covered.key_count

    @property
    def files(self) -> tuple[Written, ...]:
        """All files."""
        others = (self.centroids, self.exact.parts, self.coded.parts)
        return (*filter(None, others), *self.exact.files, *self.coded.files)

    def names(self) -> set[str]:
        """Names of all files."""
        return {file.name for file in self.files}


def read_manifest(archive: Archive) -> IndexManifest:
    """The manifest of an archive's index.

    Raises:
        Damaged: it is missing, damaged, or of another format or model.
    """
    try:
        content = read_json(join(archive.index_uri, MANIFEST))
        if (get_value(content, "format"), get_value(content, "model_id")) != (INDEX_FORMAT, archive.model_id):
            raise Damaged("another format or model")
        centroids = get_value(content, "centroids")
        coded = _key_file(archive, get_value(content, "coded"), ("codes", "runs", "rows"))
        if centroids is None and len(coded.covered):
            raise Damaged("codes without their centroids")
        return IndexManifest(
            _key_file(archive, get_value(content, "exact"), ("keys",)),
            coded,
            None if centroids is None else _written(centroids, "centroids"),
            check_integer("trained_count", get_value(content, "trained_count"), most=MOST_KEYS),
            check_integer("checked_count", get_value(content, "checked_count"), most=MOST_KEYS),
            _versions(get_value(content, "versions")),
        )
    except InvalidValue as error:
        raise Damaged(str(error)) from error


def write_manifest(archive: Archive, after: IndexManifest) -> None:
    """Replaces the manifest, and removes the files that only the old one names. Call it under `locked`.

    Raises:
        ArchiveError: the index cannot be written.
    """
    try:
        before = read_manifest(archive).names()
    except Damaged:
        before = set()  # `vidx clean` removes the files that it named
    content = {
        "format": INDEX_FORMAT,
        "model_id": archive.model_id,
        "archive_version": archive.version,
        "trained_count": after.trained_count,
        "checked_count": after.checked_count,
        "centroids": None if after.centroids is None else asdict(after.centroids),
        "versions": dict(after.versions),
        "exact": _values(after.exact),
        "coded": _values(after.coded),
    }
    write_json(join(archive.index_uri, MANIFEST), content)
    for name in before - after.names():
        with contextlib.suppress(OSError, InvalidValue):
            remove(file_uri(archive.index_uri, name))


def read_json(uri: str) -> Any:
    """What write_json wrote. The kinds of its values are not checked yet.

    Raises:
        Damaged: the file is missing, or differs from what was written.
    """
    with _reading(uri):
        checksum, _, content = read_small(uri, MOST_JSON_BYTES).partition(b"\n")
        if int(checksum[:8], 16) != google_crc32c.value(content):
            raise Damaged(f"{source_text(uri)}: checksum")
        return parse_json(content)


def write_json(uri: str, content: dict) -> None:
    """Writes a JSON file with the CRC32C of its content as the first line.

    Raises:
        ArchiveError: it cannot be written.
    """
    text = json.dumps(content).encode()
    with write_errors(uri):
        make_folder(uri.rsplit("/", 1)[0])
        write_bytes(uri, b"%08x\n" % google_crc32c.value(text) + text)


@contextlib.contextmanager
def locked(archive: Archive, name: str = LOCK, wait: bool = True) -> Iterator[bool]:
    """Holds a lock against other writers of the index; gives whether it was taken.

    The system frees it when this process ends. Where files cannot be locked, the last writer of the manifest wins.

    Args:
        archive: whose index.
        name: of the lock: LOCK for the manifest, TRAINING for training.
        wait: wait until the lock is free; else give False at once.
    Raises:
        ArchiveError: the index cannot be written.
    """
    uri = join(archive.index_uri, name)
    with contextlib.ExitStack() as stack:
        with write_errors(uri):
            make_folder(archive.index_uri)
            file = stack.enter_context(open(_open_lock(file_path(uri)), "wb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


def _open_lock(path: bytes) -> int:
    """The descriptor of a lock file, whose content is never changed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file")
    return descriptor


def write_file(archive: Archive, suffix: str, pieces: Iterable[bytes]) -> Written:
    """A new file of the index, not yet in the manifest.

    Raises:
        ArchiveError: the index cannot be written.
    """
    name = f"{uuid.uuid4().hex}.{suffix}"
    uri = join(archive.index_uri, name)
    with write_errors(uri):
        make_folder(archive.index_uri)
        new = NewFile(uri)
        try:
            for piece in pieces:
                new.file.write(piece)
            written = Written(name, new.file.tell(), new.file.checksum)
            new.keep()
        except BaseException:
            new.discard()
            raise
    return written


def check_sizes(archive: Archive, manifest: IndexManifest) -> None:
    """Raises Damaged where a file is missing or has another size than was written."""
    for file in manifest.files:
        _place(archive, file)


def map_whole(archive: Archive, file: Written) -> np.ndarray:
    """(bytes,) uint8: a file of the index, mapped, after a check of every byte.

    Raises:
        Damaged: it differs from what was written.
    """
    data, checksum = map_sized(archive, file), 0
    for start in range(0, len(data), 1 << 24):
        checksum = google_crc32c.extend(checksum, data[start : start + (1 << 24)].tobytes())
    if checksum != file.checksum:
        raise Damaged(f"{file.name}: checksum", file.name)
    return data


def map_sized(archive: Archive, file: Written) -> np.ndarray:
    """(bytes,) uint8: a file of the index, mapped, after a check of its size alone.

    Raises:
        Damaged: it is missing or has another size.
    """
    uri = _place(archive, file)
    with _reading(uri):
        return np.frombuffer(map_file(uri), np.uint8)


def path_of(archive: Archive, file: Written) -> str:
    """Where a file of a local archive lies, for libraries that open files by themselves."""
    return os.fsdecode(file_path(_place(archive, file)))


def _place(archive: Archive, file: Written) -> str:
    """The URI of a file that exists and has the size that was written."""
    with _reading(file.name, file.name):
        uri = file_uri(archive.index_uri, file.name)
        size = file_size(uri)
    if size != file.size_bytes:
        raise Damaged(f"{source_text(uri)}: {size} bytes", file.name)
    return uri


@contextlib.contextmanager
def _reading(uri: str, file: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise Damaged(f"{source_text(uri)}: {error}", file) from error


def _written(values: Any, suffix: str) -> Written:
    name = get_value(values, "name")
    if not isinstance(name, str) or not INDEX_NAME.fullmatch(name) or not name.endswith(f".{suffix}"):
        raise InvalidValue(f"it names a file {short_repr(name)}, which no file of an index is called")
    size_bytes, checksum = (check_integer(key, get_value(values, key)) for key in ("size_bytes", "checksum"))
    return Written(name, size_bytes, checksum)


def _key_file(archive: Archive, values: Any, suffixes: Sequence[str]) -> KeyFile:
    files, parts = get_list(values, "files"), get_value(values, "parts")
    if len(files) not in (0, len(suffixes)):
        raise InvalidValue("the files of its keys are not those of its format")
    written = None if parts is None else _written(parts, "parts")
    covered = Covered() if written is None else _open_covered(archive, written)
    if (covered.key_count > 0) != bool(files) or covered.key_count > MOST_KEYS:
        raise InvalidValue("its keys are not those of its parts")
    gone = check_integers("gone", get_list(values, "gone"), 0, max(0, len(covered) - 1))
    return KeyFile(tuple(map(_written, files, suffixes)), written, covered, gone)


def _open_covered(archive: Archive, file: Written) -> Covered:
    """The list of parts in a file, mapped, every byte checked.

    Raises:
        Damaged: it differs from what was written.
        InvalidValue: it lists what no archive can have.
    """
    data = map_whole(archive, file)
    if len(data) % _ENTRY.itemsize:
        raise Damaged(f"{file.name}: {len(data)} bytes")
    covered = Covered(data.view(_ENTRY))
    if len(covered) and (covered.video_numbers.min() < 1 or covered.key_counts.min() < 0):
        raise InvalidValue("a part has no video or a negative number of keys")
    return covered


def write_covered(archive: Archive, covered: Covered) -> Written | None:
    """The list of parts as a file of the index; None where there are none.

    Raises:
        ArchiveError: the index cannot be written.
    """
    return write_file(archive, "parts", [covered.entries.tobytes()]) if len(covered) else None


def _versions(values: Any) -> dict[str, int]:
    if not isinstance(values, dict):
        raise InvalidValue(f"its versions are {short_repr(values)}, not an object")
    return {folder: check_integer("version", version) for folder, version in values.items()}


def _values(file: KeyFile) -> dict:
    return {
        "files": [asdict(written) for written in file.files],
        "parts": None if file.parts is None else asdict(file.parts),
        "gone": file.gone.tolist(),
    }
