"""The vector index: search keys of all frames, by which FAISS finds the frames nearest to a query.

    index/index.json    what the index holds: for each file its parts, count and checksum; swapped atomically
    index/ID.faiss      keys as float16 (FAISS: IDMap, SQfp16), row id = video number << 32 | frame index

A file is never changed. Additions go to a new one, which takes in those that are not larger than itself, so that an
addition costs what it adds and the files' number grows with the logarithm of the keys. Search is exact: each file is
mapped and scanned. What is not published any more, and parts that others have replaced, are left out at search,
whatever the files hold. The index is derived: a missing or damaged one is built again from the parts.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import faiss
import google_crc32c
import numpy as np

from storage.archive import Archive
from storage.cells import part_keys
from storage.errors import ArchiveError
from storage.files import (
    exists,
    file_size,
    join,
    list_names,
    local_path,
    make_folder,
    map_file,
    read_bytes,
    remove,
    write_bytes,
    writing,
)
from storage.frames import LivePart
from storage.records import FrameRef, Hit

INDEX_FORMAT = 1
MANIFEST = "index.json"
MAX_FILE_KEYS = 1 << 17  # what an update holds in memory: 200 MB of keys of width 768
MAX_RETIRED = 0.25  # share of a file's keys, before it is written again without them
UPDATE_ROUNDS = 5
OPEN_ROUNDS = 3


@dataclass(frozen=True)
class _Covered:
    """A part whose keys are in a file."""

    path: str
    video_number: int
    key_count: int


@dataclass(frozen=True)
class _KeyFile:
    """One FAISS file and what it must be; without a name where its parts keep no keys."""

    name: str
    checksum: int
    size_bytes: int
    covered: tuple[_Covered, ...]

    @property
    def key_count(self) -> int:
        return sum(part.key_count for part in self.covered)


class _Damaged(Exception):
    """The index, or a file of it, is not what was written."""


class Index:
    """An opened index of one version of an archive.

    Attributes:
        rebuilt: it was missing or damaged, and was built again from the parts just now.
    """

    def __init__(self, archive: Archive, files: Sequence[tuple[_KeyFile, faiss.IndexIDMap]], rebuilt: bool):
        self._live = frozenset(part.path for part in archive.parts())
        self._files = files
        self.rebuilt = rebuilt

    @cached_property
    def _covered(self) -> frozenset[str]:
        covered = {part.path for file, _ in self._files for part in file.covered if part.key_count}
        return self._live & covered

    def covers(self, part: str) -> bool:
        """Whether the frames of a part can be found."""
        return part in self._covered

    @cached_property
    def frame_count(self) -> int:
        """Published frames that a search compares."""
        return sum(part.key_count for file, _ in self._files for part in file.covered if part.path in self._live)

    def pending_count(self, archive: Archive) -> int:
        """Published frames that no search finds yet, or ever where the model gives no search keys."""
        return sum(part.row_count for part in archive.parts() if not self.covers(part.path))

    def search(self, query: np.ndarray, k: int, ids: np.ndarray | None = None) -> list[Hit]:
        """The k frames whose keys have the greatest inner product with the query, best first.

        Args:
            query: (E,) float32, L2-normalised.
            k: at most so many.
            ids: (F,) int64, only these frames, as `ids_of` makes them; None: all.
        Raises:
            ValueError: the query is not as wide as the keys.
        """
        found: list[tuple[float, int]] = []
        for file, index in self._files:
            found += _search_file(file, index, query, k, self._live, ids)
        found.sort(key=lambda hit: (-hit[0], hit[1]))  # equal scores in order of video and time
        return [Hit(row_id >> 32, row_id & 0xFFFFFFFF, score) for score, row_id in found[:k]]


def ids_of(frames: Sequence[FrameRef]) -> np.ndarray:
    """(T,) int64 row ids of frames."""
    numbers = np.fromiter((frame.video_number for frame in frames), np.int64, len(frames))
    return _row_ids(numbers, np.fromiter((frame.frame_index for frame in frames), np.int64, len(frames)))


def _row_ids(video_number: np.ndarray | int, frame_index: np.ndarray) -> np.ndarray:
    """Video number (31 bits) and frame index (32 bits) in one int64."""
    return (np.asarray(video_number, np.int64) << 32) | frame_index


def update_index(archive: Archive, max_retired: float = MAX_RETIRED) -> int:
    """Brings the index up to the archive's newest version; says how many keys were added.

    Args:
        archive: whose frames.
        max_retired: a file of which more keys than this share are not live is written again without them.
    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    added = 0
    for _ in range(UPDATE_ROUNDS):  # of two jobs that end together the last to write looks once more
        archive.refresh()
        try:
            files = _read_manifest(archive)
            for file in files:
                _check_size(archive, file)
        except _Damaged:
            files = []
        count = _bring_up(archive, files, max_retired)
        if count is None:
            break
        added += count
    return added


def open_index(archive: Archive) -> Index:
    """The index of an archive; a missing or damaged one is built again, in place where that can be written.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    parts = archive.parts()
    if not parts and not exists(join(archive.index_uri, MANIFEST)):
        return Index(archive, [], False)
    for _ in range(OPEN_ROUNDS):  # a job that swaps the index meanwhile removes the files of the old one
        with contextlib.suppress(_Damaged):
            return Index(archive, _read_files(archive), False)
    try:
        _bring_up(archive, [], MAX_RETIRED)
        return Index(archive, _read_files(archive), True)
    except (ArchiveError, _Damaged):  # read-only: in memory, for this process alone
        built = [_build(archive, group) for group in _groups(parts)]
        return Index(archive, [(_KeyFile("", 0, 0, covered), index) for index, covered in built if index], True)


def _bring_up(archive: Archive, files: list[_KeyFile], max_retired: float) -> int | None:
    """Writes what the files lack, and the manifest; the count of keys added, None where all is there already."""
    live = {part.path: part for part in archive.parts()}
    covered = {part.path for file in files for part in file.covered}
    new = [part for path, part in live.items() if path not in covered]
    kept, folded = _choose_files(files, live, sum(part.row_count for part in new), max_retired)
    if not new and not folded and exists(join(archive.index_uri, MANIFEST)):
        return None
    again = [live[part.path] for file in folded for part in file.covered if part.path in live]
    written = [_write_file(archive, group) for group in _groups([*again, *new])]
    _write_manifest(archive, [*kept, *written])
    _tidy(archive, folded if files else None, {file.name for file in (*kept, *written)})
    new_paths = {part.path for part in new}
    return sum(part.key_count for file in written for part in file.covered if part.path in new_paths)


def _choose_files(
    files: list[_KeyFile], live: Mapping[str, LivePart], new_count: int, max_retired: float
) -> tuple[list[_KeyFile], list[_KeyFile]]:
    """Files that stay, and files that are written again together with the new keys."""
    kept, folded = [], []
    for file in files:
        retired = sum(part.key_count for part in file.covered if part.path not in live)
        (folded if retired > max_retired * file.key_count else kept).append(file)
    count = new_count
    for file in sorted(kept, key=lambda file: file.key_count):
        if file.key_count > count or file.key_count + count > MAX_FILE_KEYS:
            break
        kept.remove(file)
        folded.append(file)
        count += file.key_count
    return kept, folded


def _groups(parts: Iterable[LivePart]) -> Iterator[list[LivePart]]:
    """The parts of one file each."""
    group, count = [], 0
    for part in parts:
        if group and count + part.row_count > MAX_FILE_KEYS:
            yield group
            group, count = [], 0
        group.append(part)
        count += part.row_count
    if group:
        yield group


def _build(archive: Archive, parts: Sequence[LivePart]) -> tuple[faiss.IndexIDMap | None, tuple[_Covered, ...]]:
    """Keys of the parts in a new FAISS index; None where the parts keep none."""
    index, covered = None, []
    for part in parts:
        found = part_keys(archive.frames_uri, part.path)
        covered.append(_Covered(part.path, part.video_number, 0 if found is None else len(found[0])))
        if found is None:
            continue
        keys, frame_index = found
        if index is None:
            scalar = faiss.IndexScalarQuantizer(
                keys.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
            index = faiss.IndexIDMap(scalar)
        # The codes of QT_fp16 are the float16 keys themselves; FAISS's own encoder takes 20 times as long.
        index.add_sa_codes(keys.view(np.uint8), _row_ids(part.video_number, frame_index))
    return index, tuple(covered)


def _write_file(archive: Archive, parts: Sequence[LivePart]) -> _KeyFile:
    index, covered = _build(archive, parts)
    if index is None:
        return _KeyFile("", 0, 0, covered)
    data = faiss.serialize_index(index)
    name = f"{uuid.uuid4().hex}.faiss"
    uri = join(archive.index_uri, name)
    with writing(uri):
        make_folder(archive.index_uri)
        write_bytes(uri, data)
    return _KeyFile(name, google_crc32c.value(data), len(data), covered)


def _write_manifest(archive: Archive, files: Sequence[_KeyFile]) -> None:
    content = {
        "format": INDEX_FORMAT,
        "model_id": archive.model_id,
        "archive_version": archive.version,
        "files": [asdict(file) for file in files],
    }
    text = json.dumps({"checksum": _text_checksum(content), **content})
    uri = join(archive.index_uri, MANIFEST)
    with writing(uri):
        make_folder(archive.index_uri)
        write_bytes(uri, text.encode())


def _read_manifest(archive: Archive) -> list[_KeyFile]:
    try:
        content = json.loads(read_bytes(join(archive.index_uri, MANIFEST)))
        checksum = content.pop("checksum")
        if checksum != _text_checksum(content):
            raise _Damaged("checksum of the manifest")
        if (content["format"], content["model_id"]) != (INDEX_FORMAT, archive.model_id):
            raise _Damaged("another format or model")
        return [
            _KeyFile(**{**file, "covered": tuple(_Covered(**part) for part in file["covered"])})
            for file in content["files"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(str(error)) from error


def named_files(archive: Archive) -> set[str]:
    """Names of the FAISS files that the manifest names; none where it is missing or damaged."""
    try:
        return {file.name for file in _read_manifest(archive)}
    except _Damaged:
        return set()


def index_faults(archive: Archive) -> Iterator[tuple[str, str]]:
    """URI and what is wrong, of every file of the index that is not as it was written or differs from the parts.

    A missing index is none: it is built again.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    manifest = join(archive.index_uri, MANIFEST)
    while exists(manifest):
        before = read_bytes(manifest)
        found = [*_faults_by_manifest(archive, manifest)]
        if not exists(manifest) or read_bytes(manifest) == before:
            yield from found
            return
        archive.refresh()  # a job has written another index meanwhile, and removed files of this one


def _faults_by_manifest(archive: Archive, manifest: str) -> Iterator[tuple[str, str]]:
    try:
        files = _read_manifest(archive)
    except _Damaged as error:
        yield manifest, f"damaged: {error}"
        return
    live = {part.path for part in archive.parts()}
    for file in files:
        uri = join(archive.index_uri, file.name)
        try:
            found = _file_keys(uri, file) if file.name else {}
        except _Damaged as error:
            yield uri, f"damaged: {error}"
            continue
        for part in file.covered:
            if part.path in live and not _are_stored(archive, part, found.get(part.path)):
                yield uri, f"its keys of {part.path} are not those that are stored"


def _file_keys(uri: str, file: _KeyFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The keys of each part in a FAISS file, (T, E) float16, with their row ids."""
    index = _read_file(uri, file)
    scalar = faiss.downcast_index(index.index)
    row_ids = faiss.vector_to_array(index.id_map)
    found, start = {}, 0
    for part in file.covered:
        end = start + part.key_count
        keys = scalar.reconstruct_n(start, part.key_count) if part.key_count else np.empty((0, index.d), np.float32)
        found[part.path] = (keys.astype(np.float16), row_ids[start:end])
        start = end
    return found


def _are_stored(archive: Archive, part: _Covered, found: tuple[np.ndarray, np.ndarray] | None) -> bool:
    stored = part_keys(archive.frames_uri, part.path)
    if stored is None or found is None or part.key_count == 0:
        return stored is None and part.key_count == 0
    keys, frame_index = stored
    return np.array_equal(found[0], keys) and np.array_equal(found[1], _row_ids(part.video_number, frame_index))


def drop_index(archive: Archive) -> None:
    """Forgets the index, so that the next update builds it from the parts."""
    remove(join(archive.index_uri, MANIFEST))


def _text_checksum(content: dict) -> int:
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode())


def _check_size(archive: Archive, file: _KeyFile) -> None:
    if file.name:
        try:
            size = file_size(join(archive.index_uri, file.name))
        except OSError as error:
            raise _Damaged(str(error)) from error
        if size != file.size_bytes:
            raise _Damaged(f"{file.name}: {size} bytes")


def _read_files(archive: Archive) -> list[tuple[_KeyFile, faiss.IndexIDMap]]:
    files = _read_manifest(archive)
    return [(file, _read_file(join(archive.index_uri, file.name), file)) for file in files if file.name]


def _read_file(uri: str, file: _KeyFile) -> faiss.IndexIDMap:
    """A FAISS file, mapped where it is local, after its checksum."""
    try:
        mapping = map_file(uri)
        data = np.frombuffer(read_bytes(uri) if mapping is None else mapping, np.uint8)
        if len(data) != file.size_bytes or google_crc32c.value(data) != file.checksum:
            raise _Damaged(f"{uri}: checksum")
        if mapping is None:
            return faiss.deserialize_index(data)
        return faiss.read_index(os.fsdecode(local_path(uri)), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, ValueError, RuntimeError) as error:
        raise _Damaged(f"{uri}: {error}") from error


def _tidy(archive: Archive, replaced: Iterable[_KeyFile] | None, named: set[str]) -> None:
    """Removes files that the manifest named before, or, where that is not known, every one that it does not name now.

    Readers that have one mapped keep it, others read the new manifest.
    """
    names = list_names(archive.index_uri) if replaced is None else [file.name for file in replaced]
    for name in names:
        if name.endswith(".faiss") and name not in named:
            with contextlib.suppress(OSError):
                remove(join(archive.index_uri, name))


def _search_file(
    file: _KeyFile, index: faiss.IndexIDMap, query: np.ndarray, k: int, live: frozenset[str], ids: np.ndarray | None
) -> list[tuple[float, int]]:
    """(score, row id) of the best keys of one file, those of its parts that are live."""
    if query.shape != (index.d,):
        raise ValueError(f"query is {query.shape}, keys are ({index.d},)")
    parameters = None
    row_ids = faiss.vector_to_array(index.id_map)
    is_live = [part.path in live for part in file.covered]
    if ids is not None or not all(is_live):
        mask = np.repeat(is_live, [part.key_count for part in file.covered])  # keys lie in the order of their parts
        if ids is not None:
            mask &= np.isin(row_ids, ids)
        bits = np.packbits(mask, bitorder="little")
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
    stored = faiss.downcast_index(index.index)  # by place, so that the selector can be a bitmap
    scores, places = stored.search(query[None].astype(np.float32), min(k, index.ntotal), params=parameters)
    return [
        (float(score), int(row_ids[place]))
        for score, place in zip(scores[0], places[0], strict=True)
        if place >= 0  # FAISS pads with -1
    ]
