"""known: which sources the archive holds already, and what of their rows has to follow the files."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from storage.archive import Archive
from storage.errors import VideoProblem
from storage.files import local_path
from storage.records import Content, Reason, Sampling, VideoAsset, VideoRow
from workers.bundle import Bundle
from workers.content import identify


@dataclass(frozen=True)
class Known:
    """What is left to do, and what is known of it.

    Attributes:
        todo: sources that need work.
        skipped: sources that need none.
        contents: of sources that have been hashed, by uri.
        by_id, by_uri: the archive's rows.
    """

    todo: tuple[VideoAsset, ...]
    skipped: int
    contents: Mapping[str, Content]
    by_id: Mapping[str, VideoRow]
    by_uri: Mapping[str, VideoRow]

    def inherit(self, asset: VideoAsset, content: Content | None) -> VideoAsset:
        """The asset with tags and capture time of the same content, or tags of the same place, where it has none."""
        same_content = self.by_id.get(content.video_id) if content else None
        same_place = same_content or self.by_uri.get(asset.uri)
        captured_at = asset.captured_at or (same_content.captured_at if same_content else None)
        tags = asset.tags or (same_place.tags if same_place else {})
        return replace(asset, captured_at=captured_at, tags=tags)


def drop_known(
    assets: list[VideoAsset], archive: Archive, bundle: Bundle, sampling: Sampling, max_pixels: int
) -> Known:
    """Tells the sources that need work from those that do not, and publishes what moved or was retagged.

    Only files of a size that the archive knows are hashed here (they are probably known, and then no cluster
    need be started); the others are hashed by the workers.
    """
    rows = archive.videos()
    by_id = {row.video_id: row for row in rows if row.video_id is not None}
    sizes = {row.size_bytes for row in by_id.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
        found = list(pool.map(lambda asset: _content_if(asset, sizes), assets))
    contents = {asset.uri: content for asset, content in zip(assets, found, strict=True) if content}
    todo, renewed = [], {}
    for asset in assets:
        content = contents.get(asset.uri)
        row = by_id.get(content.video_id) if content else None
        if row is None or not _is_settled(row, bundle, sampling, max_pixels):
            todo.append(asset)
        row = renewed.get(row.video_id, row) if row else None
        if row is not None and (changed := _renewed(row, asset, content, contents)) is not None:
            renewed[row.video_id] = changed
    if renewed:
        archive.publish(list(renewed.values()))  # before anything new takes the place of what has moved away
    rows = [renewed.get(row.video_id, row) for row in rows]
    by_uri = {row.uri: row for row in rows}
    return Known(tuple(todo), len(assets) - len(todo), contents, by_id | renewed, by_uri)


def _content_if(asset: VideoAsset, sizes: set[int | None]) -> Content | None:
    path = local_path(asset.uri)
    try:
        return identify(path) if os.path.isfile(path) and os.stat(path).st_size in sizes else None
    except (OSError, VideoProblem):
        return None  # the worker meets it again and gives it its reason


def _is_settled(row: VideoRow, bundle: Bundle, sampling: Sampling, max_pixels: int) -> bool:
    """Whether trying again would give the same rows."""
    if row.model_id != bundle.model_id or row.sampling != str(sampling):
        return False
    if row.problem is None:
        return True
    if row.problem.reason is Reason.TOO_LARGE:
        return f" {max_pixels} " in row.problem.detail  # which names the limit that it was above
    return not row.problem.reason.may_pass


def _renewed(row: VideoRow, asset: VideoAsset, content: Content, contents: Mapping[str, Content]) -> VideoRow | None:
    """The row with what the source says differently now: moved, retagged, redated; None where nothing is."""
    changes = {}
    if asset.uri == row.uri:
        if content.mtime_ns != row.mtime_ns:
            changes["mtime_ns"] = content.mtime_ns
    elif not _still_there(row, contents):
        changes |= {"uri": asset.uri, "mtime_ns": content.mtime_ns}
    if asset.captured_at is not None and asset.captured_at != row.captured_at:
        changes["captured_at"] = asset.captured_at
    if asset.tags and dict(asset.tags) != dict(row.tags):
        changes["tags"] = asset.tags
    return replace(row, **changes) if changes else None


def _still_there(row: VideoRow, contents: Mapping[str, Content]) -> bool:
    """Whether the place that a row names still holds its content; another file may have taken the name."""
    if row.uri in contents:
        return contents[row.uri].video_id == row.video_id
    path = local_path(row.uri)
    try:
        stat = os.stat(path)
        if stat.st_size != row.size_bytes:
            return False
        return stat.st_mtime_ns == row.mtime_ns or identify(path).video_id == row.video_id
    except (OSError, VideoProblem):
        return False
