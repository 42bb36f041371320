"""scan: sources -> their videos, one after another: there may be a million.

It opens only manifests, and files in folders whose suffix is also used for other things.
"""

import glob
import hashlib
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from pipeline.index.folders import EntryKind, FolderWalk, Place
from pipeline.index.manifest import SUFFIXES as MANIFEST_SUFFIXES
from pipeline.index.manifest import read_manifest
from storage.errors import UsageError, VideoProblem
from storage.files import file_path, local_path, normalize_text, to_uri
from storage.records import VideoAsset
from workers.decode.structure import HEAD_BYTES, foreign_content
from workers.sources.identity import open_source

# The suffixes that count as videos in a folder. Files that are named directly, by a glob or in a manifest may have any
# suffix. If such a file is not a video, it becomes a failed one.
VIDEO_SUFFIXES = frozenset(
    b".264 .265 .266 .360 .3g2 .3gp .3gp2 .3gpp .amv .asf .avi .cavs .dirac .divx .dv .dvr-ms .evo .f4v .flv .glv .gxf"
    b" .h261 .h263 .h264 .h265 .h266 .h26l .hdmov .hevc .insv .ismv .ivf .k3g .lrv .m1v .m2p .m2t .m2ts .m2v .m4v .mj2"
    b" .mjpeg .mjpg .mk3d .mkv .mov .mp2v .mp4 .mp4v .mpe .mpeg .mpegts .mpg .mpv .mqv .mxf .nsv .nuv .obu .ogg .ogm"
    b" .ogv .osv .qt .rm .rmvb .ssif .vc1 .vdr .vob .vro .vvc .webm .wm .wmv .wtv .y4m".split()
)
# Suffixes of videos that other files have too: TypeScript, Modula-2, tracker music, MetaPost, AviSynth, books. A file
# that is clearly one of these is left out.
SHARED_SUFFIXES = frozenset(b".avc .avs .dav .dif .lrf .mod .mp .mts .nut .psp .tod .tp .trp .ts".split())
APPLE_DOUBLE = "._*"  # macOS metadata on foreign disks; it has the suffix of the file that it describes


class Scan:
    """The videos of sources, each file once, in order; targets of links in folders come last.

    What is left out, unscanned and without video is complete when the videos have been looked at.

    Attributes:
        is_empty: whether there is no video.
    """

    def __init__(self, sources: Iterable[str]):
        """Looks at the sources themselves, and reads manifests.

        Args:
            sources: files, folders (recursive), globs, `.csv` or `.jsonl` manifests, `file://` URIs.
        Raises:
            UsageError: a source does not exist, a glob matches nothing, or a manifest or a named folder cannot be read.
        """
        self._left_out: Counter[str] = Counter()
        self._unscanned: list[tuple[bytes, str]] = []
        self._has_video: dict[str, bool] = {}  # by source, for folders
        self._steps: list[VideoAsset | tuple[str, bytes]] = []  # a video, or a source with a folder to walk through
        self._stated: dict[bytes, VideoAsset] = {}  # what manifests state, by path without symbolic links
        self._spelled: dict[str, dict[str, str]] = {}  # names in folders, by their one spelling
        for source in sources:
            _take_source(source, self)
        videos = self._find()
        first = next(videos, None)
        self.is_empty = first is None
        self._videos = itertools.chain(() if first is None else (first,), videos)

    def videos(self) -> Iterator[VideoAsset]:
        """The videos, once; folders are walked through meanwhile."""
        return self._videos

    @property
    def left_out(self) -> dict[str, int]:
        """Numbers of files in folders that are no videos, by suffix in lower case; "" is no suffix."""
        return dict(self._left_out.most_common())

    @property
    def unscanned(self) -> tuple[tuple[str, str], ...]:
        """Places in folders that could not be scanned, with the reason."""
        return tuple((os.fsdecode(path), why) for path, why in dict.fromkeys(self._unscanned))

    @property
    def without_video(self) -> tuple[str, ...]:
        """Named folders, and globs of folders, that contain no video."""
        return tuple(source for source, has_video in self._has_video.items() if not has_video)

    def on_disk(self, path: str) -> str:
        """The path, or an existing one that differs only in its Unicode form (NFC or NFD)."""
        if path.isascii() or os.path.lexists(path):
            return path
        folder, name = os.path.split(path)
        folder = self.on_disk(folder)
        if folder not in self._spelled:
            listed = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            self._spelled[folder] = {normalize_text(other): other for other in listed}
        return os.path.join(folder, self._spelled[folder].get(normalize_text(name), name))

    def add(self, asset: VideoAsset) -> None:
        """Adds a video; a row of a manifest replaces a plain path."""
        if asset.tags is not None or asset.captured_at is not None:
            self._stated[_real(asset)] = asset
        self._steps.append(asset)

    def add_folder(self, source: str, folder: bytes) -> None:
        """Adds the videos of a folder."""
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise UsageError(f"{os.fsdecode(folder)}: {error.strerror}") from error
        self._steps.append((source, folder))

    def add_unscanned(self, places: Iterable[tuple[bytes, str]]) -> None:
        """Adds places that could not be scanned, with the reason."""
        self._unscanned += places

    def _find(self) -> Iterator[VideoAsset]:
        found: set[bytes] = set()  # digests of the paths of videos
        folders: set[bytes] = set()
        walks: list[tuple[str, FolderWalk]] = []  # with their sources
        for step in self._steps:
            if isinstance(step, VideoAsset):
                yield from self._once(_real(step), step, found)
                continue
            source, folder = step
            walk = FolderWalk(folders)
            walks.append((source, walk))
            self._has_video.setdefault(source, os.path.realpath(folder) in folders)
            yield from self._take(source, walk.below(folder), found)
        for source, walk in walks:
            yield from self._take(source, walk.linked(), found)
            self._unscanned += walk.unscanned

    def _once(self, real: bytes, asset: VideoAsset, found: set[bytes]) -> Iterator[VideoAsset]:
        digest = hashlib.blake2b(real, digest_size=16).digest()  # a path would take five times the memory
        if digest not in found:
            found.add(digest)
            yield self._stated.get(real, asset)

    def _take(self, source: str, places: Iterable[Place], found: set[bytes]) -> Iterator[VideoAsset]:
        for place in places:
            if place.kind is EntryKind.FOLDER:
                continue
            kind = _left_out_as(place)
            if kind is None:
                self._has_video[source] = True
                yield from self._once(place.real, VideoAsset(to_uri(place.path)), found)
            elif place.kind is EntryKind.NOTHING:
                self._unscanned.append((place.path, "this link has no target"))
            else:
                self._left_out[kind] += 1


def _real(asset: VideoAsset) -> bytes:
    return os.path.realpath(file_path(asset.uri))


def _left_out_as(place: Place) -> str | None:
    """The suffix of a file in a folder that is no video; None for a video."""
    name = os.path.basename(place.path)
    if name.startswith(b"._"):
        return APPLE_DOUBLE
    suffix = os.path.splitext(name)[1].lower()
    if suffix in VIDEO_SUFFIXES or (suffix in SHARED_SUFFIXES and not _is_foreign(place.path)):
        return None
    return suffix.decode("utf-8", "backslashreplace")


def _is_foreign(path: bytes) -> bool:
    """Whether a file is clearly no video. A file that cannot be read may be one, and becomes a failed video."""
    try:
        descriptor = open_source(path)
    except VideoProblem:
        return False
    with open(descriptor, "rb") as file:
        try:
            return foreign_content(file.read(HEAD_BYTES)) is not None
        except OSError:
            return False


def _take_source(source: str, found: Scan) -> None:
    path = found.on_disk(_as_path(source))
    if os.path.isdir(path):
        found.add_folder(source, os.fsencode(path))
    elif os.path.lexists(path):
        if not path.lower().endswith(MANIFEST_SUFFIXES):
            found.add(VideoAsset(to_uri(path)))
            return
        for row in read_manifest(path):
            place = found.on_disk(os.path.join(os.path.dirname(path), _as_path(row.source)))
            found.add(VideoAsset(to_uri(place), row.captured_at, row.tags))
    elif glob.has_magic(path):
        _scan_glob(source, path, found)
    else:
        raise UsageError(f"{source}: no such file or folder")


def _as_path(source: str) -> str:
    if "://" not in source:
        return source
    path = local_path(source)
    if path is None:
        raise UsageError(f"{source}: only local files can be indexed; give a path or a file:// URI")
    return os.fsdecode(path)


def _scan_glob(source: str, pattern: str, found: Scan) -> None:
    spellings = {pattern, *(unicodedata.normalize(form, pattern) for form in ("NFC", "NFD"))}
    matches = sorted({match for each in spellings for match in _expand(os.fsencode(each), found)})
    recursive = "**" in pattern.split("/")  # ** itself matches everything below a folder
    files = [match for match in matches if not os.path.isdir(match)]
    folders = [] if recursive else [match for match in matches if os.path.isdir(match)]
    if not files and not folders:
        raise UsageError(f"{source}: no video matches this pattern")
    for match in matches:
        if match in folders:
            found.add_folder(source, match)
        elif match in files:
            found.add(VideoAsset(to_uri(match)))


def _expand(pattern: bytes, found: Scan) -> Iterator[bytes]:
    """The paths that a glob matches; ** stands for folders at any depth, each visited once.

    The glob module follows links in ** without end if they lead to a folder that contains them.
    """
    parts = pattern.split(b"/")
    if b"**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index(b"**")
    starts = glob.glob(b"/".join([*parts[:place], b""])) if place else [b"."]
    rest = [part for part in parts[place + 1 :] if part] or [b"*"]
    walk = FolderWalk(set(), hidden=False)
    for folder in itertools.chain(*(walk.below(start) for start in starts), walk.linked()):
        if folder.kind is EntryKind.FOLDER:
            yield from _expand(os.path.join(glob.escape(folder.path), *rest), found)
    found.add_unscanned(walk.unscanned)
