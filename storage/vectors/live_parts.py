"""Which parts of the index are published, and which published parts it lacks.

Of a shard of frames whose version is the one that the index has seen, the lists of the index tell all. Only the other
shards are opened. In an archive of one shard the lists are always compared with it, since that takes little time.
"""

from functools import cached_property

import numpy as np

from storage.archive.archive import Archive
from storage.archive.frames import LivePart
from storage.vectors.index_manifest import Damaged, IndexManifest, KeyFile


class LiveParts:
    """The published parts of an archive, beside those that an index covers, at the archive's present version.

    Attributes:
        versions: of each shard of frames, by folder.
        kept_exact, kept_coded: (P,) bool: which parts of the two files are published.
    """

    def __init__(self, archive: Archive, manifest: IndexManifest):
        self._published = np.sort(np.fromiter(archive.videos.published(), np.int64))
        self._parts = archive.parts
        self.versions = archive.parts.versions()
        covered = [manifest.exact.covered.video_numbers, manifest.coded.covered.video_numbers]
        lacking = self._published[~np.isin(self._published, np.concatenate(covered))]
        is_one, seen = len(self.versions) == 1, manifest.versions
        self._folders = {folder for folder, version in self.versions.items() if is_one or seen.get(folder) != version}
        self._folders |= self._parts.folders_of(lacking)
        bounds = self._parts.bounds_in(self._folders)
        self._stored = set(bounds.path.tolist())
        self._live = {part.path: part for part in archive.frames.parts_in(bounds)}
        self.versions |= {folder: self._parts.versions()[folder] for folder in self._folders & self.versions.keys()}
        self._files = (manifest.exact, manifest.coded)
        self._check()
        self.kept_exact, self.kept_coded = (self._kept(file) for file in self._files)

    def _check(self) -> None:
        """Raises Damaged where a part is in two files, or its count of keys differs from the log of the frames."""
        held: set[str] = set()
        for file in self._files:
            for place in self._places(file).tolist():
                path = file.covered.path(place)
                part, count = self._live.get(path), int(file.covered.key_counts[place])
                if part is not None and (path in held or count not in (0, part.row_count)):
                    raise Damaged(f"{count} keys of {path}")
                held.add(path)

    def _places(self, file: KeyFile) -> np.ndarray:
        """The places of the parts of a file that are in an opened shard."""
        return np.flatnonzero(self._parts.are_in(file.covered.video_numbers, self._folders))

    def _kept(self, file: KeyFile) -> np.ndarray:
        """(P,) bool: the parts of a file that are published."""
        kept = np.isin(file.covered.video_numbers, self._published)
        kept[self.gone(file)] = False
        return kept

    def gone(self, file: KeyFile) -> np.ndarray:
        """(G,) int64: the places of the parts of a file that are not in the archive any more, published or not."""
        opened = self._places(file)
        missing = [place for place, path in zip(opened, file.covered.paths(opened)) if path not in self._stored]
        before = file.gone[~np.isin(file.gone, opened)]
        return np.sort(np.concatenate([before, np.array(missing, np.int64)]))

    @cached_property
    def new(self) -> list[LivePart]:
        """The published parts that no file covers."""
        held = {path for file in self._files for path in file.covered.paths(self._places(file))}
        return [part for path, part in self._live.items() if path not in held]
