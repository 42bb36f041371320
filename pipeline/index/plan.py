"""plan: what a job does with each source, and which rows of the archive change because files did."""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from storage.errors import VideoProblem
from storage.files import file_path
from storage.processes import usable_cores
from storage.records import Content, Problem, Reason, Sampling, Status, VideoAsset, VideoRow, is_damaged
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify, open_source

TRIES = 3  # runs that try a video again that failed for a temporary reason


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
        """Whether the job tries to index the source; a missing or unreadable one then becomes a failed video."""
        skipped = (Decision.MOVED, Decision.UPDATED, Decision.KNOWN, Decision.FAILED, Decision.DELETED)
        return self not in skipped


@dataclass(frozen=True)
class WantedRows:
    """The rows that a job wants for every source: of this model, with these settings.

    Attributes:
        retry_failed: try all failed and partial videos again.
        restore_deleted: index deleted videos again.
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
    """A video whose tags or capture time are changed by a manifest."""

    before: VideoRow
    after: VideoRow

    @property
    def changes(self) -> dict[str, tuple[datetime | str | None, datetime | str | None]]:
        """The values before and after, by tag and for `captured_at`; None for no value."""
        old: dict[str, datetime | str | None] = {**self.before.tags, "captured_at": self.before.captured_at}
        new: dict[str, datetime | str | None] = {**self.after.tags, "captured_at": self.after.captured_at}
        return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


@dataclass(frozen=True)
class IndexPlan:
    """What a job will do.

    Attributes:
        wanted: the rows that the job wants.
        decisions: the decision for each source, in order.
        renewed: changed rows to publish first: of files that were moved or touched, or have new tags or capture times.
        updates: the changes of tags and capture times, by the video's present URI.
        problems: by URI, why a source is missing, unreadable, or failed before.
        contents: by URI, the contents of sources that have been hashed.
        cache_problem: why hashes cannot be kept for the next run; empty if they can.
        by_id, by_uri: the archive's rows, after these changes.
        moved_count: videos whose place is a new one.
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
    moved_count: int = 0

    @property
    def todo(self) -> tuple[VideoAsset, ...]:
        """The sources that the job tries to index."""
        return tuple(asset for asset, decision in self.decisions if decision.is_work)

    @property
    def restored(self) -> set[str]:
        """The ids of deleted videos that will be indexed again."""
        ids = {content.video_id for asset in self.todo if (content := self.contents.get(asset.uri))}
        return {video_id for video_id in ids & self.by_id.keys() if self.by_id[video_id].status is Status.DELETED}

    def count(self, *wanted: Decision) -> int:
        """Number of sources with one of these decisions."""
        return sum(decision in wanted for _, decision in self.decisions)

    def inherit(self, asset: VideoAsset, content: Content | None) -> VideoAsset:
        """The asset; missing tags and times are taken from the same content, missing tags also from the same place."""
        same_content = self.by_id.get(content.video_id) if content else None
        same_place = same_content or self.by_uri.get(asset.uri)
        tags = asset.tags if asset.tags is not None else (same_place.tags if same_place else {})
        asset = replace(asset, tags=tags)
        if asset.captured_at is not None or same_content is None:
            return asset
        return replace(asset, captured_at=same_content.captured_at, captured_from=same_content.captured_from)

    def changed_settings(self, uri: str) -> dict[str, tuple[str, str]]:
        """The settings in which a source's video differs from what the job wants: its values, and the job's, by name.

        Empty unless the decision for the source is SETTINGS.
        """
        content = self.contents.get(uri)
        row = self.by_id.get(content.video_id) if content else None
        if row is None or row.status is Status.DELETED:
            return {}
        old, new = Sampling.from_text(row.sampling), self.wanted.sampling
        values = {
            "model": (row.model_id[:12], self.wanted.model_id[:12]),
            "fps": (str(old.fps), str(new.fps)),
            "patches": (str(old.patches), str(new.patches)),
            "sample": (str(old.choice), str(new.choice)),
        }
        return {name: pair for name, pair in values.items() if pair[0] != pair[1]}

    def attempts(self, asset: VideoAsset, content: Content | None) -> int:
        """How many runs with these settings tried this content, or this place if the content cannot be read."""
        row = self.by_id.get(content.video_id) if content else self.by_uri.get(asset.uri)
        if row is None or not self.wanted.is_of(row):
            return 0
        return row.attempts if content or row.video_id is None else 0


def plan_sources(
    assets: Sequence[VideoAsset], rows: Sequence[VideoRow], wanted: WantedRows, hashes: HashCache
) -> IndexPlan:
    """The plan for some sources; it changes nothing.

    A file is hashed here only if its hash is cached or the archive has a video of its size: then it is probably known,
    and may need no cluster. Workers hash the other files.
    """
    by_id = {row.video_id: row for row in rows if row.video_id is not None}
    sizes = {row.size_bytes for row in by_id.values()}
    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the interpreter lock
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
            row = place  # the file cannot be read; probably it is still the video of this place
        if row is None or row.status is Status.DELETED:
            continue
        changed = _renewed(renewed.get(row.known_id, row), asset, content, contents, named)
        if changed is not None:
            renewed[row.known_id] = changed
            if decisions[asset.uri] is Decision.KNOWN and changed.uri != row.uri:
                decisions[asset.uri] = Decision.MOVED
    moved_count = sum(by_id[video_id].uri != row.uri for video_id, row in renewed.items())
    updates = {row.uri: Update(by_id[video_id], row) for video_id, row in renewed.items()}
    updates = {uri: update for uri, update in updates.items() if update.changes}
    decisions |= {uri: Decision.UPDATED for uri in updates if decisions.get(uri) is Decision.KNOWN}
    rows = [row if row.video_id is None else renewed.get(row.video_id, row) for row in rows]
    by_uri = {row.uri: row for row in rows if row.status is not Status.DELETED}
    planned = tuple((asset, decisions[asset.uri]) for asset in assets)
    rows_to_publish = tuple(renewed.values())
    return IndexPlan(
        wanted,
        planned,
        rows_to_publish,
        updates,
        problems,
        contents,
        by_id | renewed,
        by_uri,
        hashes.problem,
        moved_count,
    )


def _content_if(asset: VideoAsset, sizes: set[int | None], hashes: HashCache) -> Content | None:
    path = file_path(asset.uri)
    try:
        stat = os.stat(path)
        worth = os.path.isfile(path) and (stat.st_size in sizes or hashes.get(stat) is not None)
        return identify(path, hashes) if worth else None
    except (OSError, ValueError, VideoProblem):
        return None  # the worker will find the reason


def _decide_unknown(asset: VideoAsset, row: VideoRow | None, wanted: WantedRows) -> tuple[Decision, Problem | None]:
    """The decision for content that the archive does not hold, from the row of its place; and the source's problem."""
    problem = None
    try:
        os.close(open_source(file_path(asset.uri)))
    except VideoProblem as error:
        problem = Problem(error.reason, error.detail)
    if row is None or row.video_id is not None:
        if problem is None:
            return (Decision.NEW if row is None else Decision.CHANGED), None
        return (Decision.MISSING if problem.reason is Reason.VANISHED else Decision.UNREADABLE), problem
    before = row.known_problem.reason
    is_the_same = problem is not None and problem.reason is before
    again = row.attempts < TRIES if before is Reason.UNKNOWN else not is_the_same
    return (Decision.RETRY if wanted.retry_failed or again else Decision.FAILED), problem or row.problem


def decide_known(row: VideoRow, wanted: WantedRows) -> Decision:
    """The decision for content that the archive holds."""
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
        again |= f" {wanted.max_pixels} " not in problem.detail  # the detail names the limit at that time
    return Decision.RETRY if again else Decision.FAILED


def _renewed(
    row: VideoRow, asset: VideoAsset, content: Content | None, contents: Mapping[str, Content], named: Collection[str]
) -> VideoRow | None:
    """The row with a changed place, tags or capture time; None if nothing has changed.

    A copy of a video does not change tags and times if the row's own file is a source too.
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
    """Whether the file of a row still has its content; another file may have taken its name."""
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
