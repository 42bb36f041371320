"""Which parts of the index are published, and which published parts it lacks.

Of a shard of frames whose version is the one that the index has seen, the lists of the index tell all. Only the other
shards are opened. In an archive of one shard the lists are always compared with it, since that takes little time.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import LivePart
from storage.vectors.index_manifest import Covered, Damaged, IndexManifest, KeyFile


class LiveParts:
    """The published parts of an archive, beside those that an index covers, at the archive's present version.

    Attributes:
        versions: of each shard of frames, by folder.
        kept_exact, kept_coded: (P,) bool: which parts of the two files are published.
    """

    def __init__(self, archive: Archive, manifest: IndexManifest):
        self._published = archive.videos.published().numbers
        self._parts = archive.parts
        versions, seen = archive.parts.versions(), manifest.versions
        covered = [manifest.exact.covered.video_numbers, manifest.coded.covered.video_numbers]
        lacking = self._published[~np.isin(self._published, np.concatenate(covered))]
        is_one = len(versions) == 1
        self._folders = {folder for folder, version in versions.items() if is_one or seen.get(folder) != version}
        self._folders |= self._parts.folders_of(lacking)
        bounds = self._parts.bounds_in(self._folders)
        self._stored = set(bounds.path.tolist())
        self._live = {part.path: part for part in archive.frames.parts_in(bounds)}
        self.versions = archive.parts.versions()  # an opened shard may have a newer one
        self._held: set[str] = set()  # paths of the files' parts in opened shards
        self.kept_exact, self.kept_coded = self._kept(manifest.exact), self._kept(manifest.coded)

    def _opened(self, covered: Covered) -> tuple[np.ndarray, list[str]]:
        """The places and paths of those parts that are in opened shards."""
        places = np.flatnonzero(self._parts.are_in(covered.video_numbers, self._folders))
        return places, covered.paths(places)

    def _kept(self, file: KeyFile) -> np.ndarray:
        """(P,) bool: the parts of a file that are published.

        Raises:
            Damaged: a part is in two files, or its count of keys differs from the log of the frames.
        """
        places, paths = self._opened(file.covered)
        for path, count in zip(paths, file.covered.key_counts[places].tolist(), strict=True):
            part = self._live.get(path)
            if part is not None and (path in self._held or count not in (0, part.row_count)):
                raise Damaged(f"{count} keys of {path}")
            self._held.add(path)
        kept = np.isin(file.covered.video_numbers, self._published)
        kept[self._gone(file, places, paths)] = False
        return kept

    def gone(self, file: KeyFile) -> np.ndarray:
        """(G,) int64: the places of the parts of a file that are not in the archive any more, published or not."""
        return self._gone(file, *self._opened(file.covered))

    def _gone(self, file: KeyFile, places: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        is_missing = np.array([path not in self._stored for path in paths], bool)
        before = file.gone[~np.isin(file.gone, places)]
        return np.sort(np.concatenate([before, places[is_missing]]))

    @cached_property
    def new(self) -> list[LivePart]:
        """The published parts that no file covers."""
        return [part for path, part in self._live.items() if path not in self._held]
