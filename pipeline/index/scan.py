"""scan: what the user names -> the list of videos to look at.

Nothing is opened but manifests and files of folders whose suffix other programs use too.
"""

import glob
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.index.folders import EntryKind, FolderWalk, Place
from pipeline.index.manifest import SUFFIXES as MANIFEST_SUFFIXES
from pipeline.index.manifest import read_manifest
from storage.errors import UsageError, VideoProblem
from storage.files import file_path, local_path, normalize_text, to_uri
from storage.records import VideoAsset
from workers.decode.structure import HEAD_BYTES, foreign_content
from workers.sources.identity import open_source

# What a folder is searched for; a file named by itself, by a glob or in a manifest may end as it likes. Of these, a
# file that holds something else is told as a failed video.
VIDEO_SUFFIXES = frozenset(
    b".264 .265 .266 .360 .3g2 .3gp .3gp2 .3gpp .amv .asf .avi .cavs .dirac .divx .dv .dvr-ms .evo .f4v .flv .glv .gxf"
    b" .h261 .h263 .h264 .h265 .h266 .h26l .hdmov .hevc .insv .ismv .ivf .k3g .lrv .m1v .m2p .m2t .m2ts .m2v .m4v .mj2"
    b" .mjpeg .mjpg .mk3d .mkv .mov .mp2v .mp4 .mp4v .mpe .mpeg .mpegts .mpg .mpv .mqv .mxf .nsv .nuv .obu .ogg .ogm"
    b" .ogv .osv .qt .rm .rmvb .ssif .vc1 .vdr .vob .vro .vvc .webm .wm .wmv .wtv .y4m".split()
)
# Suffixes of videos and of other things, such as TypeScript, Modula-2, tracker music, MetaPost, AviSynth and books: a
# file that is plainly one of those is left out.
SHARED_SUFFIXES = frozenset(b".avc .avs .dav .dif .lrf .mod .mp .mts .nut .psp .tod .tp .trp .ts".split())
APPLE_DOUBLE = "._*"  # what macOS keeps beside each file on foreign disks, under the file's own suffix


@dataclass(frozen=True)
class Scan:
    """The videos to look at, in order.

    Attributes:
        assets: the videos.
        left_out: how many files in folders are no videos, by suffix in lower case; "" is none.
        unscanned: places in folders that could not be looked at, each with the reason.
        without_video: named folders, and globs of folders, in which there is none.
    """

    assets: tuple[VideoAsset, ...]
    left_out: Mapping[str, int]
    unscanned: tuple[tuple[str, str], ...]
    without_video: tuple[str, ...]


def scan(sources: Iterable[str]) -> Scan:
    """Every video that the sources name, each file once, in the order named; what links lead to comes last.

    Args:
        sources: files, folders (recursive), globs, `.csv` or `.jsonl` manifests, `file://` URIs.
    Raises:
        UsageError: a source does not exist, a glob matches nothing, or a manifest or a named folder cannot be read.
    """
    found = _FoundFiles()
    for source in sources:
        _scan_source(source, found)
    found.follow_links()
    return found.as_scan()


class _FoundFiles:
    """What has been found so far."""

    def __init__(self):
        self._assets: dict[bytes, VideoAsset] = {}  # by path without symbolic links
        self._left_out: Counter[str] = Counter()
        self._unscanned: list[tuple[bytes, str]] = []
        self._seen: set[bytes] = set()
        self._walks: list[tuple[str, FolderWalk]] = []  # with the source that each is of
        self._has_video: dict[str, bool] = {}  # by source, where that is a folder
        self._spelled: dict[str, dict[str, str]] = {}  # names in folders, by their one spelling

    def on_disk(self, path: str) -> str:
        """The path, or the one that looks the same (NFC and NFD of Unicode) where nothing has these very bytes."""
        if path.isascii() or os.path.lexists(path):
            return path
        folder, name = os.path.split(path)
        folder = self.on_disk(folder)
        if folder not in self._spelled:
            listed = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            self._spelled[folder] = {normalize_text(other): other for other in listed}
        return os.path.join(folder, self._spelled[folder].get(normalize_text(name), name))

    def add(self, asset: VideoAsset, real: bytes | None = None) -> None:
        """One video; a manifest's row says more than a path."""
        real = real or os.path.realpath(file_path(asset.uri))
        if real not in self._assets or asset.tags is not None or asset.captured_at is not None:
            self._assets[real] = asset

    def add_folder(self, source: str, folder: bytes) -> None:
        """The videos in a folder, whose links are kept for later."""
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise UsageError(f"{os.fsdecode(folder)}: {error.strerror}") from error
        walk = FolderWalk(self._seen)
        self._walks.append((source, walk))
        self._has_video.setdefault(source, os.path.realpath(folder) in self._seen)
        self._take(source, walk.below(folder))

    def note_unscanned(self, walk: FolderWalk) -> None:
        """Remembers what a walk left out."""
        self._unscanned += walk.unscanned

    def follow_links(self) -> None:
        """The videos that links in folders lead to and that were not found without them."""
        for source, walk in self._walks:
            self._take(source, walk.linked())
            self.note_unscanned(walk)

    def as_scan(self) -> Scan:
        """All that was found."""
        return Scan(
            tuple(self._assets.values()),
            dict(self._left_out.most_common()),
            tuple((os.fsdecode(path), why) for path, why in dict.fromkeys(self._unscanned)),
            tuple(source for source, has_video in self._has_video.items() if not has_video),
        )

    def _take(self, source: str, places: Iterable[Place]) -> None:
        for place in places:
            if place.kind is EntryKind.FOLDER:
                continue
            kind = _left_out_as(place)
            if kind is None:
                self._has_video[source] = True
                if place.real not in self._assets:
                    self.add(VideoAsset(to_uri(place.path)), place.real)
            elif place.kind is EntryKind.NOTHING:
                self._unscanned.append((place.path, "a link that leads nowhere"))
            else:
                self._left_out[kind] += 1


def _left_out_as(place: Place) -> str | None:
    """The suffix of a file in a folder that is no video; None of one that is to be looked at."""
    name = os.path.basename(place.path)
    if name.startswith(b"._"):
        return APPLE_DOUBLE
    suffix = os.path.splitext(name)[1].lower()
    if suffix in VIDEO_SUFFIXES or (suffix in SHARED_SUFFIXES and not _is_foreign(place.path)):
        return None
    return suffix.decode("utf-8", "backslashreplace")


def _is_foreign(path: bytes) -> bool:
    """Whether a file is plainly no video; not one that cannot be read, which is to be told as a failed video."""
    try:
        descriptor = open_source(path)
    except VideoProblem:
        return False
    with open(descriptor, "rb") as file:
        try:
            return foreign_content(file.read(HEAD_BYTES)) is not None
        except OSError:
            return False


def _scan_source(source: str, found: _FoundFiles) -> None:
    path = found.on_disk(_as_path(source))
    if os.path.isdir(path):
        found.add_folder(source, os.fsencode(path))
    elif os.path.lexists(path):
        if path.lower().endswith(MANIFEST_SUFFIXES):
            _scan_manifest(path, found)
        else:
            found.add(VideoAsset(to_uri(path)))
    elif glob.has_magic(path):
        _scan_glob(source, path, found)
    else:
        raise UsageError(f"{source}: no such file or folder")


def _as_path(source: str) -> str:
    if "://" not in source:
        return source
    path = local_path(source)
    if path is None:
        raise UsageError(f"{source}: only local files can be indexed (paths or file:// URIs)")
    return os.fsdecode(path)


def _scan_manifest(path: str, found: _FoundFiles) -> None:
    for row in read_manifest(path):
        place = found.on_disk(os.path.join(os.path.dirname(path), _as_path(row.source)))
        found.add(VideoAsset(to_uri(place), row.captured_at, row.tags))


def _scan_glob(source: str, pattern: str, found: _FoundFiles) -> None:
    spellings = {pattern, *(unicodedata.normalize(form, pattern) for form in ("NFC", "NFD"))}
    matches = sorted({match for each in spellings for match in _expand(os.fsencode(each), found)})
    recursive = "**" in pattern.split("/")  # it lists what lies below a folder by itself
    files = [match for match in matches if not os.path.isdir(match)]
    folders = [] if recursive else [match for match in matches if os.path.isdir(match)]
    if not files and not folders:
        raise UsageError(f"{source}: matches no video")
    for match in matches:
        if match in folders:
            found.add_folder(source, match)
        elif match in files:
            found.add(VideoAsset(to_uri(match)))


def _expand(pattern: bytes, found: _FoundFiles) -> Iterator[bytes]:
    """What a glob matches, where ** stands for folders at any depth, those that links lead to once.

    The glob module follows links in ** again and again: two that lead to a folder around them take it for ever.
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
    found.note_unscanned(walk)
