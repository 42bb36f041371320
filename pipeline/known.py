"""known: which sources the archive holds already, and what of their rows has to follow the files."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum

from storage.errors import VideoProblem
from storage.files import local_path
from storage.records import Content, Reason, Sampling, Status, VideoAsset, VideoRow
from workers.content import identify, open_source
from workers.hash_cache import HashCache

TRIES = 3  # runs that try, unasked, what failed for a reason that may pass


class Plan(StrEnum):
    """What a job does with a source, and why."""

    NEW = "new"
    CHANGED = "changed"
    SETTINGS = "settings"
    RETRY = "retry"
    MOVED = "moved"
    KNOWN = "known"
    FAILED = "failed before"
    DELETED = "deleted before"

    @property
    def is_work(self) -> bool:
        """Whether frames are decoded for it."""
        return self in (Plan.NEW, Plan.CHANGED, Plan.SETTINGS, Plan.RETRY)


@dataclass(frozen=True)
class Wanted:
    """What a job wants of every source: rows of this model with these settings.

    Attributes:
        retry_failed: try again what failed or is partial, whatever the reason.
        restore_deleted: index again what was deleted.
    """

    model_id: str
    sampling: Sampling
    max_pixels: int
    retry_failed: bool = False
    restore_deleted: bool = False

    def is_of(self, row: VideoRow) -> bool:
        """Whether a row was made with this model and these settings."""
        return (row.model_id, row.sampling) == (self.model_id, str(self.sampling))


@dataclass(frozen=True)
class Known:
    """What is to be done, and what is known of it.

    Attributes:
        wanted: of the sources.
        plans: of each source, in order.
        renewed: rows to publish before anything else: of sources that moved, were retagged or redated.
        contents: of sources that have been hashed, by uri.
        cache_problem: why hashes are not remembered from run to run; empty where they are.
        by_id, by_uri: the archive's rows, renewed.
    """

    wanted: Wanted
    plans: tuple[tuple[VideoAsset, Plan], ...]
    renewed: tuple[VideoRow, ...]
    contents: Mapping[str, Content]
    by_id: Mapping[str, VideoRow]
    by_uri: Mapping[str, VideoRow]
    cache_problem: str = ""

    @property
    def todo(self) -> tuple[VideoAsset, ...]:
        """Sources that need work."""
        return tuple(asset for asset, plan in self.plans if plan.is_work)

    @property
    def restored(self) -> set[str]:
        """Ids of deleted content that is to be indexed again."""
        ids = {content.video_id for asset in self.todo if (content := self.contents.get(asset.uri))}
        return {video_id for video_id in ids & self.by_id.keys() if self.by_id[video_id].status is Status.DELETED}

    def count(self, *plans: Plan) -> int:
        """Sources with one of these plans."""
        return sum(plan in plans for _, plan in self.plans)

    def inherit(self, asset: VideoAsset, content: Content | None) -> VideoAsset:
        """The asset with tags and capture time of the same content, or tags of the same place, where it has none."""
        same_content = self.by_id.get(content.video_id) if content else None
        same_place = same_content or self.by_uri.get(asset.uri)
        captured_at = asset.captured_at or (same_content.captured_at if same_content else None)
        tags = asset.tags or (same_place.tags if same_place else {})
        return replace(asset, captured_at=captured_at, tags=tags)

    def attempts(self, asset: VideoAsset, content: Content | None) -> int:
        """How many runs have tried this content, or this place where the content cannot be read, as it is wanted."""
        row = self.by_id.get(content.video_id) if content else self.by_uri.get(asset.uri)
        if row is None or not self.wanted.is_of(row):
            return 0
        return row.attempts if content or row.video_id is None else 0


def plan_sources(assets: Sequence[VideoAsset], rows: Sequence[VideoRow], wanted: Wanted, hashes: HashCache) -> Known:
    """Tells the sources that need work from those that do not; changes nothing.

    Only files of a size that the archive knows are hashed here (they are probably known, and then no cluster
    need be started), and those whose hash is remembered; the others are hashed by the workers.
    """
    by_id = {row.video_id: row for row in rows if row.video_id is not None}
    sizes = {row.size_bytes for row in by_id.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
        found = list(pool.map(lambda asset: _content_if(asset, sizes, hashes), assets))
    contents = {asset.uri: content for asset, content in zip(assets, found, strict=True) if content}
    by_uri = {row.uri: row for row in rows if row.status is not Status.DELETED}
    renewed: dict[str, VideoRow] = {}
    plans = []
    for asset, content in zip(assets, found, strict=True):
        row = by_id.get(content.video_id) if content else None
        if row is None:
            plans.append((asset, _plan_unknown(asset, by_uri.get(asset.uri), wanted)))
            continue
        if row.status is Status.DELETED:
            plans.append((asset, plan_known(row, wanted)))
            continue
        changed = _renewed(renewed.get(row.video_id, row), asset, content, contents)
        if changed is not None:
            renewed[row.video_id] = changed
        plan = plan_known(row, wanted)
        moved = plan is Plan.KNOWN and changed is not None and changed.uri != row.uri
        plans.append((asset, Plan.MOVED if moved else plan))
    rows = [renewed.get(row.video_id, row) for row in rows]
    by_uri = {row.uri: row for row in rows if row.status is not Status.DELETED}
    return Known(wanted, tuple(plans), tuple(renewed.values()), contents, by_id | renewed, by_uri, hashes.problem)


def _content_if(asset: VideoAsset, sizes: set[int | None], hashes: HashCache) -> Content | None:
    path = local_path(asset.uri)
    try:
        stat = os.stat(path)
        worth = os.path.isfile(path) and (stat.st_size in sizes or hashes.get(stat) is not None)
        return identify(path, hashes) if worth else None
    except (OSError, ValueError, VideoProblem):
        return None  # the worker meets it again and gives it its reason


def _plan_unknown(asset: VideoAsset, row: VideoRow | None, wanted: Wanted) -> Plan:
    """Of a source whose content the archive does not hold, by the row of its place."""
    if row is None:
        return Plan.NEW
    if row.video_id is not None:
        return Plan.CHANGED
    again = row.attempts < TRIES if row.problem.reason is Reason.UNKNOWN else not _is_still_unreadable(row)
    return Plan.RETRY if wanted.retry_failed or again else Plan.FAILED


def _is_still_unreadable(row: VideoRow) -> bool:
    try:
        os.close(open_source(local_path(row.uri)))
    except VideoProblem as problem:
        return problem.reason is row.problem.reason
    return False


def plan_known(row: VideoRow, wanted: Wanted) -> Plan:
    """Of a source whose content the archive holds: whether trying again would give the same rows."""
    if row.status is Status.DELETED:
        return Plan.NEW if wanted.restore_deleted else Plan.DELETED
    if not wanted.is_of(row):
        return Plan.SETTINGS
    if row.problem is None:
        return Plan.KNOWN
    again = wanted.retry_failed or (row.problem.reason.may_pass and row.attempts < TRIES)
    if row.problem.reason is Reason.TOO_LARGE:
        again |= f" {wanted.max_pixels} " not in row.problem.detail  # which names the limit that it was above
    return Plan.RETRY if again else Plan.FAILED


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
