"""unchanged: which sources the archive holds as they are wanted, by place, size and time; these files are not read."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipeline.index.archived import ArchivedVideos, WantedRows
from storage.errors import VideoProblem
from storage.files import file_path
from storage.processes import usable_cores
from storage.records import CapturedFrom, Content, Reason, Status, VideoAsset
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify

AT_ONCE = 1 << 15  # sources that are looked up in the archive together
TOGETHER = 1 << 8  # sources that a thread looks at, one after another
_COLUMNS = ("uri", "video_id", "status", "reason", "model_id", "sampling", "size_bytes", "mtime_ns", "is_settled")
_STATED = ("captured_at", "captured_from", "tags")
_NOTES = {None, *(str(reason) for reason in Reason if reason.is_note)}


@dataclass(frozen=True, slots=True)
class Source:
    """A source that is not unchanged.

    Attributes:
        asset: the source.
        content: None if it is not known.
        is_assumed: whether the content is the one that the archive knows of a file with this place, size and time, and
            nobody has read the file.
    """

    asset: VideoAsset
    content: Content | None
    is_assumed: bool


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the archive knows of the file at a place.

    Attributes:
        place: of its row.
        video_id, size_bytes, mtime_ns: of the file.
        is_settled: whether the file had not changed for a while when it was read; see Content.
        is_wanted: whether the row is whole, and made with the wanted model and settings.
        stated: the values of _STATED; empty if no source states any.
    """

    place: int
    video_id: str
    size_bytes: int
    mtime_ns: int | None
    is_settled: bool
    is_wanted: bool
    stated: Mapping[str, Any]

    def is_as(self, source: Source) -> bool:
        """Whether the row is of this file, and has the tags and the capture time that its source states."""
        asset, content = source.asset, source.content
        if content is None or not self.is_settled:
            return False
        if (self.video_id, self.mtime_ns) != (content.video_id, content.mtime_ns):
            return False
        if asset.tags is not None and dict(asset.tags) != dict(self.stated["tags"] or ()):
            return False
        if asset.captured_at is None:
            return True
        origin = self.stated["captured_from"] or CapturedFrom.MANIFEST
        return (asset.captured_at, asset.captured_from) == (self.stated["captured_at"], origin)


def recognise(
    assets: Iterable[VideoAsset],
    archived: ArchivedVideos,
    wanted: WantedRows,
    hashes: HashCache,
    *,
    rehash: bool,
) -> tuple[list[Source], ArchivedVideos]:
    """Looks for what is known of sources, many at once.

    Args:
        assets: the sources.
        archived: the archive's videos.
        wanted: which rows the job wants.
        hashes: hashes of files that were read before.
        rehash: read every file whose size a video of the archive has.
    Returns:
        The sources that are not unchanged, in order; the archive's videos, with the unchanged ones marked.
    """
    sizes = np.unique(archived.stored.column("size_bytes").drop_null().to_numpy())
    rest: list[Source] = []
    unchanged = np.zeros(len(archived.stored), bool)
    with ThreadPoolExecutor(usable_cores()) as pool:  # stat and hashing release the interpreter lock
        for some in _batches(assets):
            files = _files_at(some, archived, wanted)
            found = _Contents(files, sizes, hashes, rehash).find_all(some, pool)
            for source in found:
                file = files.get(source.asset.uri)
                if file is not None and file.is_wanted and file.is_as(source):
                    unchanged[file.place] = True
                else:
                    rest.append(source)
    return rest, replace(archived, unchanged=np.flatnonzero(unchanged))


def _batches(assets: Iterable[VideoAsset]) -> Iterator[list[VideoAsset]]:
    left = iter(assets)
    while some := list(islice(left, AT_ONCE)):
        yield some


def _files_at(assets: Sequence[VideoAsset], archived: ArchivedVideos, wanted: WantedRows) -> dict[str, _Stored]:
    """What the archive knows of the places of sources, by URI."""
    states = any(asset.tags is not None or asset.captured_at is not None for asset in assets)
    names = (*_COLUMNS, *(_STATED if states else ()))
    places = archived.stored.find("uri", (asset.uri for asset in assets))
    table = archived.stored.take(places, names)
    columns = [table.column(name).to_pylist() for name in names]
    found = {}
    for place, *values in zip(places.tolist(), *columns, strict=True):
        uri, video_id, status, reason, model_id, sampling, size_bytes, mtime_ns, is_settled, *stated = values
        if video_id is None or (uri in found and status == Status.DELETED):
            continue
        is_whole = status == Status.INDEXED and reason in _NOTES
        is_wanted = is_whole and (model_id, sampling) == (wanted.model_id, str(wanted.sampling))
        file = (place, video_id, size_bytes, mtime_ns, bool(is_settled))
        found[uri] = _Stored(*file, is_wanted, dict(zip(_STATED, stated)))
    return found


@dataclass(frozen=True)
class _Contents:
    """Finds the content of sources.

    Attributes:
        files: what the archive knows of their places, by URI.
        sizes: (n,) the sizes of the archive's videos, ascending.
        hashes, rehash: see recognise.
    """

    files: Mapping[str, _Stored]
    sizes: np.ndarray
    hashes: HashCache
    rehash: bool

    def find_all(self, assets: Sequence[VideoAsset], pool: Executor) -> Iterator[Source]:
        """The sources with their contents, in order."""
        pieces = [assets[start : start + TOGETHER] for start in range(0, len(assets), TOGETHER)]
        for found in pool.map(lambda piece: [self._find(asset) for asset in piece], pieces):
            yield from found

    def _find(self, asset: VideoAsset) -> Source:
        """A source; its content is not known if a worker will read its file, or if it cannot be read."""
        path = file_path(asset.uri)
        try:
            state = os.stat(path)
            if not stat.S_ISREG(state.st_mode):
                return Source(asset, None, is_assumed=False)
            if not self.rehash and (video_id := self.hashes.get(state)):
                return Source(asset, Content(video_id, state.st_size, state.st_mtime_ns), is_assumed=False)
            if not self.rehash and (content := self._assumed(asset, state)):
                return Source(asset, content, is_assumed=True)
            content = identify(path, self.hashes, read=self.rehash) if self._has_size(state.st_size) else None
            return Source(asset, content, is_assumed=False)
        except (OSError, ValueError, VideoProblem):
            return Source(asset, None, is_assumed=False)  # the worker will find the reason

    def _assumed(self, asset: VideoAsset, state: os.stat_result) -> Content | None:
        """The content that the archive knows of a file with this place, size and time."""
        file, known = self.files.get(asset.uri), (state.st_size, state.st_mtime_ns)
        if file is None or not file.is_settled or (file.size_bytes, file.mtime_ns) != known:
            return None
        return None if self.hashes.contradicts(state) else Content(file.video_id, *known)

    def _has_size(self, size_bytes: int) -> bool:
        place = np.searchsorted(self.sizes, size_bytes)
        return bool(place < len(self.sizes) and self.sizes[place] == size_bytes)
