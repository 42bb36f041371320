"""scan: what the user names -> the list of videos to look at; nothing is opened but manifests."""

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage.errors import UsageError
from storage.files import is_text, local_path, to_uri
from storage.records import VideoAsset

# What a folder is searched for; a file named by itself, by a glob or in a manifest may end as it likes.
VIDEO_SUFFIXES = frozenset(
    b".3g2 .3gp .asf .avi .divx .dv .f4v .flv .h264 .h265 .hevc .ivf .m1v .m2ts .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4"
    b" .mpeg .mpg .mts .mxf .nut .obu .ogg .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m".split()
)
MANIFEST_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Scan:
    """The videos to look at, in order.

    Attributes:
        assets: the videos.
        passed_over: how many files in folders are not named like videos.
        unreadable: folders below those named that could not be listed.
    """

    assets: tuple[VideoAsset, ...]
    passed_over: int
    unreadable: tuple[str, ...]


def scan(sources: Iterable[str]) -> Scan:
    """Every video that the sources name, each URI once, in the order named (folders sorted by name).

    Args:
        sources: files, folders (recursive), globs, `.csv` or `.jsonl` manifests, `file://` URIs.
    Raises:
        UsageError: a source does not exist or holds no video, or a manifest cannot be read.
    """
    assets: dict[str, VideoAsset] = {}
    passed_over, unreadable = 0, []
    for source in sources:
        found, others = _scan_source(source, unreadable)
        passed_over += others
        for asset in found:
            if asset.uri not in assets or asset.tags or asset.captured_at:  # a manifest's row says more than a path
                assets[asset.uri] = asset
    return Scan(tuple(assets.values()), passed_over, tuple(unreadable))


def _scan_source(source: str, unreadable: list[str]) -> tuple[list[VideoAsset], int]:
    path = _as_path(source)
    if os.path.isdir(path):
        videos, others = _scan_folder(path, unreadable)
        if not videos:
            raise UsageError(
                f"{source}: no video in this folder ({others} other files); name files themselves to try them"
            )
        return videos, others
    if os.path.lexists(path):
        if path.lower().endswith(MANIFEST_SUFFIXES):
            return list(_scan_manifest(path)), 0
        return [VideoAsset(to_uri(path))], 0
    if glob.has_magic(path):
        return _scan_glob(source, path, unreadable)
    raise UsageError(f"{source}: no such file or folder")


def _as_path(source: str) -> str:
    if "://" not in source:
        return source
    path = local_path(source)
    if path is None:
        raise UsageError(f"{source}: only local files can be indexed (paths or file:// URIs)")
    return os.fsdecode(path)


def _scan_folder(folder: str, unreadable: list[str]) -> tuple[list[VideoAsset], int]:
    def refuse(error: OSError) -> None:
        if os.fsdecode(error.filename) == folder:  # the one that the user named
            raise UsageError(f"{folder}: {error.strerror}") from error
        unreadable.append(os.fsdecode(error.filename))

    videos, others = [], 0
    for parent, folders, names in os.walk(os.fsencode(folder), onerror=refuse):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                videos.append(VideoAsset(to_uri(os.path.join(parent, name))))
            else:
                others += 1
    return videos, others


def _scan_glob(source: str, pattern: str, unreadable: list[str]) -> tuple[list[VideoAsset], int]:
    matches = sorted(glob.glob(os.fsencode(pattern), recursive=True))
    assets, others = [], 0
    for match in matches:
        if not os.path.isdir(match):
            assets.append(VideoAsset(to_uri(match)))
        elif "**" not in pattern:  # ** lists what lies below a folder by itself
            found, passed_over = _scan_folder(os.fsdecode(match), unreadable)
            assets += found
            others += passed_over
    if not assets:
        raise UsageError(f"{source}: matches no video")
    return assets, others


def _scan_manifest(path: str) -> Iterator[VideoAsset]:
    read = _read_csv if path.lower().endswith(".csv") else _read_jsonl
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(read(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a manifest: {error}") from error
    if not rows:
        raise UsageError(f"{path}: no rows; a manifest has a column `source` and one row per video")
    for where, row in rows:
        yield _manifest_asset(where, row, Path(path).parent)


def _read_csv(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(file, strict=True)
    if "source" not in (reader.fieldnames or ()):
        raise UsageError(f"{path}: no column `source`; columns are {', '.join(reader.fieldnames or ['none'])}")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise UsageError(f"{where}: more cells than columns; quote cells that hold commas")
        yield where, row


def _read_jsonl(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a line must be a JSON object with a key `source`")
        yield where, row


def _manifest_asset(where: str, row: dict, folder: Path) -> VideoAsset:
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise UsageError(f"{where}: no `source`")
    tags = {
        str(name): value if isinstance(value, str) else json.dumps(value)
        for name, value in row.items()
        if name not in ("source", "captured_at") and value not in (None, "")
    }
    if not all(map(is_text, (*tags, *tags.values()))):
        raise UsageError(f"{where}: a tag is no valid text (a lone surrogate)")
    path = _as_path(source)
    return VideoAsset(to_uri(os.path.join(folder, path)), _captured_at(where, row.get("captured_at")), tags)


def _captured_at(where: str, text: object) -> datetime | None:
    if text in (None, ""):
        return None
    try:
        moment = datetime.fromisoformat(str(text))
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: captured_at {text!r} is not ISO 8601, e.g. 2024-05-01T12:00:00Z") from error
