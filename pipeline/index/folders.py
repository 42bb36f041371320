"""Walks folders; each folder is visited once, even if several symbolic links lead to it. Links come last."""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto


class EntryKind(Enum):
    """The kind of a place; NOTHING is a link without a target."""

    FILE = auto()
    FOLDER = auto()
    NOTHING = auto()


@dataclass(frozen=True)
class Place:
    """A file, folder or broken link.

    Attributes:
        path: the path by which it was found.
        real: the path without symbolic links.
        kind: what it is; a pipe or a device counts as a file.
    """

    path: bytes
    real: bytes
    kind: EntryKind


class FolderWalk:
    """A walk through folders.

    Attributes:
        unscanned: places that were not visited, with the reason.
    """

    def __init__(self, seen: set[bytes], hidden: bool = True):
        """Prepares a walk that skips the folders in `seen`, and without `hidden`, names that begin with a dot."""
        self.unscanned: list[tuple[bytes, str]] = []
        self._seen = seen
        self._hidden = hidden
        self._links: deque[tuple[bytes, bytes]] = deque()  # path, and the real folder that the link lies in

    def below(self, folder: bytes) -> Iterator[Place]:
        """A folder and everything below it except links; files come before folders, in order of name."""
        yield from self._walk(Place(folder, os.path.realpath(folder), EntryKind.FOLDER))

    def linked(self) -> Iterator[Place]:
        """The targets of all links found so far, and of links found there."""
        while self._links:
            path, folder = self._links.popleft()
            real = os.path.realpath(path)
            try:
                os.stat(path)
            except OSError:
                yield Place(path, real, EntryKind.NOTHING)
                continue
            if not os.path.isdir(path):
                yield Place(path, real, EntryKind.FILE)
            elif real in self._seen:
                continue
            elif (folder + b"/").startswith(real.rstrip(b"/") + b"/"):
                self.unscanned.append((path, "this link leads to a folder that contains it, and was not followed"))
            else:
                yield from self._walk(Place(path, real, EntryKind.FOLDER))

    def _walk(self, top: Place) -> Iterator[Place]:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            if folder.real in self._seen:
                continue
            self._seen.add(folder.real)
            try:
                with os.scandir(folder.path) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                self.unscanned.append((folder.path, f"this folder cannot be read and was left out: {error.strerror}"))
                continue
            yield folder
            folders = []
            for entry in entries:
                if entry.name.startswith(b".") and not self._hidden:
                    continue
                if entry.is_symlink():
                    self._links.append((entry.path, folder.real))
                    continue
                kind = EntryKind.FOLDER if _is_folder(entry) else EntryKind.FILE
                place = Place(entry.path, os.path.join(folder.real, entry.name), kind)
                if kind is EntryKind.FOLDER:
                    folders.append(place)
                else:
                    yield place
            waiting += reversed(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
