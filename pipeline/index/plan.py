"""plan: which sources the archive holds already, and what of their rows has to follow the files."""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from storage.errors import VideoProblem
from storage.files import file_path
from storage.records import Content, Problem, Reason, Sampling, Status, VideoAsset, VideoRow, is_damaged
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify, open_source

TRIES = 3  # runs that try, unasked, what failed for a reason that may pass


class Decision(StrEnum):
    """What a job does with a source, and why."""

    NEW = "new"
    CHANGED = "changed"
    SETTINGS = "settings"
    RETRY = "retry"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    UNFINISHED = "unfinished"
    MOVED = "moved"
    UPDATED = "updated"
    KNOWN = "known"
    FAILED = "failed before"
    DELETED = "deleted before"

    @property
    def is_work(self) -> bool:
        """Whether the job tries it; what is missing or unreadable becomes a failure, unless it comes in time."""
        tried = (
            Decision.NEW,
            Decision.CHANGED,
            Decision.SETTINGS,
            Decision.RETRY,
            Decision.MISSING,
            Decision.UNREADABLE,
            Decision.UNFINISHED,
        )
        return self in tried


@dataclass(frozen=True)
class WantedRows:
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
class Update:
    """A video whose tags or capture time a manifest states anew."""

    before: VideoRow
    after: VideoRow

    @property
    def changes(self) -> dict[str, tuple[object, object]]:
        """What it was and what it is, by tag and for captured_at; None for nothing."""
        old, new = ({**row.tags, "captured_at": row.captured_at} for row in (self.before, self.after))
        return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


@dataclass(frozen=True)
class IndexPlan:
    """What is to be done, and what is known of it.

    Attributes:
        wanted: of the sources.
        decisions: of each source, in order.
        renewed: rows to publish before anything else: of sources that moved, were touched, retagged or redated.
        updates: those of them that were retagged or redated, by the uri that they have now.
        problems: why a source is missing or unreadable, or failed before, by uri.
        contents: of sources that have been hashed, by uri.
        cache_problem: why hashes are not remembered from run to run; empty where they are.
        by_id, by_uri: the archive's rows, renewed.
    """

    wanted: WantedRows
    decisions: tuple[tuple[VideoAsset, Decision], ...]
    renewed: tuple[VideoRow, ...]
    updates: Mapping[str, Update]
    problems: Mapping[str, Problem]
    contents: Mapping[str, Content]
    by_id: Mapping[str, VideoRow]
    by_uri: Mapping[str, VideoRow]
    cache_problem: str = ""

    @property
    def todo(self) -> tuple[VideoAsset, ...]:
        """Sources that need work."""
        return tuple(asset for asset, decision in self.decisions if decision.is_work)

    @property
    def restored(self) -> set[str]:
        """Ids of deleted content that is to be indexed again."""
        ids = {content.video_id for asset in self.todo if (content := self.contents.get(asset.uri))}
        return {video_id for video_id in ids & self.by_id.keys() if self.by_id[video_id].status is Status.DELETED}

    def count(self, *wanted: Decision) -> int:
        """Number of sources with one of these decisions."""
        return sum(decision in wanted for _, decision in self.decisions)

    def inherit(self, asset: VideoAsset, content: Content | None) -> VideoAsset:
        """The asset with tags and capture time of the same content, or tags of the same place, where it has none."""
        same_content = self.by_id.get(content.video_id) if content else None
        same_place = same_content or self.by_uri.get(asset.uri)
        tags = asset.tags if asset.tags is not None else (same_place.tags if same_place else {})
        asset = replace(asset, tags=tags)
        if asset.captured_at is not None or same_content is None:
            return asset
        return replace(asset, captured_at=same_content.captured_at, captured_from=same_content.captured_from)

    def attempts(self, asset: VideoAsset, content: Content | None) -> int:
        """How many runs have tried this content, or this place where the content cannot be read, as it is wanted."""
        row = self.by_id.get(content.video_id) if content else self.by_uri.get(asset.uri)
        if row is None or not self.wanted.is_of(row):
            return 0
        return row.attempts if content or row.video_id is None else 0


def plan_sources(
    assets: Sequence[VideoAsset], rows: Sequence[VideoRow], wanted: WantedRows, hashes: HashCache
) -> IndexPlan:
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
    named = {asset.uri for asset in assets}
    renewed: dict[str, VideoRow] = {}
    problems: dict[str, Problem] = {}
    decisions: dict[str, Decision] = {}
    for asset, content in zip(assets, found, strict=True):
        row, place = by_id.get(content.video_id) if content else None, by_uri.get(asset.uri)
        if row is None:
            decisions[asset.uri], problem = _decide_unknown(asset, place, wanted)
        else:
            decisions[asset.uri], problem = decide_known(row, wanted), row.problem
        if problem is not None:
            problems[asset.uri] = problem
        if decisions[asset.uri] in (Decision.MISSING, Decision.UNREADABLE) and place is not None:
            row = place  # what it holds cannot be looked at, and it is the video of this place as far as is known
        if row is None or row.status is Status.DELETED:
            continue
        changed = _renewed(renewed.get(row.known_id, row), asset, content, contents, named)
        if changed is not None:
            renewed[row.known_id] = changed
            if decisions[asset.uri] is Decision.KNOWN and changed.uri != row.uri:
                decisions[asset.uri] = Decision.MOVED
    updates = {row.uri: Update(by_id[video_id], row) for video_id, row in renewed.items()}
    updates = {uri: update for uri, update in updates.items() if update.changes}
    decisions |= {uri: Decision.UPDATED for uri in updates if decisions.get(uri) is Decision.KNOWN}
    rows = [row if row.video_id is None else renewed.get(row.video_id, row) for row in rows]
    by_uri = {row.uri: row for row in rows if row.status is not Status.DELETED}
    planned = tuple((asset, decisions[asset.uri]) for asset in assets)
    rows_to_publish = tuple(renewed.values())
    return IndexPlan(
        wanted, planned, rows_to_publish, updates, problems, contents, by_id | renewed, by_uri, hashes.problem
    )


def _content_if(asset: VideoAsset, sizes: set[int | None], hashes: HashCache) -> Content | None:
    path = file_path(asset.uri)
    try:
        stat = os.stat(path)
        worth = os.path.isfile(path) and (stat.st_size in sizes or hashes.get(stat) is not None)
        return identify(path, hashes) if worth else None
    except (OSError, ValueError, VideoProblem):
        return None  # the worker meets it again and gives it its reason


def _decide_unknown(asset: VideoAsset, row: VideoRow | None, wanted: WantedRows) -> tuple[Decision, Problem | None]:
    """Of a source whose content the archive does not hold, by the row of its place; and what is wrong with it."""
    problem = _why_unreadable(asset)
    if row is None or row.video_id is not None:
        if problem is None:
            return (Decision.NEW if row is None else Decision.CHANGED), None
        return (Decision.MISSING if problem.reason is Reason.VANISHED else Decision.UNREADABLE), problem
    before = row.known_problem.reason
    is_the_same = problem is not None and problem.reason is before
    again = row.attempts < TRIES if before is Reason.UNKNOWN else not is_the_same
    return (Decision.RETRY if wanted.retry_failed or again else Decision.FAILED), problem or row.problem


def _why_unreadable(asset: VideoAsset) -> Problem | None:
    try:
        os.close(open_source(file_path(asset.uri)))
    except VideoProblem as problem:
        return Problem(problem.reason, problem.detail)
    return None


def decide_known(row: VideoRow, wanted: WantedRows) -> Decision:
    """Of a source whose content the archive holds: whether trying again would give the same rows."""
    if row.status is Status.DELETED:
        return Decision.NEW if wanted.restore_deleted else Decision.DELETED
    if not wanted.is_of(row):
        return Decision.SETTINGS
    if row.status is Status.INDEXING:
        return Decision.UNFINISHED
    problem = row.problem
    if not is_damaged(problem):
        return Decision.KNOWN
    again = wanted.retry_failed or (problem.reason.is_temporary and row.attempts < TRIES)
    if problem.reason is Reason.TOO_LARGE:
        again |= f" {wanted.max_pixels} " not in problem.detail  # which names the limit that it was above
    return Decision.RETRY if again else Decision.FAILED


def _renewed(
    row: VideoRow, asset: VideoAsset, content: Content | None, contents: Mapping[str, Content], named: Collection[str]
) -> VideoRow | None:
    """The row with what the source says differently now: moved, retagged, redated; None where nothing is.

    A copy says nothing of tags and times where the place that the row names is a source too.
    """
    changes: dict[str, Any] = {}
    if asset.uri == row.uri:
        if content is not None and content.mtime_ns != row.mtime_ns:
            changes["mtime_ns"] = content.mtime_ns
    elif content is not None and not _still_there(row, contents):
        changes |= {"uri": asset.uri, "mtime_ns": content.mtime_ns}
    if asset.uri == changes.get("uri", row.uri) or row.uri not in named:
        captured = {"captured_at": asset.captured_at, "captured_from": asset.captured_from}
        if asset.captured_at is not None and captured != {name: getattr(row, name) for name in captured}:
            changes |= captured
        if asset.tags is not None and dict(asset.tags) != dict(row.tags):
            changes["tags"] = asset.tags
    return replace(row, **changes) if changes else None


def _still_there(row: VideoRow, contents: Mapping[str, Content]) -> bool:
    """Whether the place that a row names still holds its content; another file may have taken the name."""
    if row.uri in contents:
        return contents[row.uri].video_id == row.video_id
    path = file_path(row.uri)
    try:
        stat = os.stat(path)
        if stat.st_size != row.size_bytes:
            return False
        return stat.st_mtime_ns == row.mtime_ns or identify(path).video_id == row.video_id
    except (OSError, VideoProblem):
        return False
