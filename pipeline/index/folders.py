"""Walks folders: each real folder once, whichever symbolic links lead to it, and links after all else."""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto


class EntryKind(Enum):
    """What a place is; NOTHING is a link whose target is not there."""

    FILE = auto()
    FOLDER = auto()
    NOTHING = auto()


@dataclass(frozen=True)
class Place:
    """Something that a walk met.

    Attributes:
        path: by which it was reached.
        real: the same place without symbolic links.
        kind: what it is; a pipe or a device counts as a file.
    """

    path: bytes
    real: bytes
    kind: EntryKind


class FolderWalk:
    """Walks below folders.

    Attributes:
        unscanned: places that were left out, each with the reason.
    """

    def __init__(self, seen: set[bytes], hidden: bool = True):
        """Starts with nothing walked.

        Args:
            seen: real folders that are not walked again; walks that share the set share the folders.
            hidden: take names that begin with a dot too.
        """
        self.unscanned: list[tuple[bytes, str]] = []
        self._seen = seen
        self._hidden = hidden
        self._links: deque[tuple[bytes, bytes]] = deque()  # path, and the real folder that the link lies in

    def below(self, folder: bytes) -> Iterator[Place]:
        """The folder and what lies below it, a folder's files in order of name before its folders; links wait."""
        yield from self._walk(Place(folder, os.path.realpath(folder), EntryKind.FOLDER))

    def linked(self) -> Iterator[Place]:
        """What the links met so far lead to, and the links met on the way."""
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
                self.unscanned.append((path, "a link to a folder around it; it was not followed"))
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
