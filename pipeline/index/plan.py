"""plan: what a job does with each source, and which rows of the archive change because files did."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from pipeline.index.archived import ArchivedVideos, WantedRows
from pipeline.index.unchanged import recognise
from storage.errors import VideoProblem
from storage.files import file_path
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
class Update:
    """A row that changes without its video being indexed again."""

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
        archived: the archive's videos, with the changes of this plan.
        decisions: the decision for each source that is not unchanged, in order.
        unchanged_count: sources that the archive holds as they are wanted.
        renewed: rows to change first: of files that were moved or touched, or have new tags or capture times.
        updates: the changes of tags and capture times, by the video's present URI.
        problems: by URI, why a source is missing, unreadable, or failed before.
        contents: by URI, the contents of sources that are known.
        assumed: URIs of those whose files were not read here; a worker that decodes one reads it first.
        cache_problem: why hashes cannot be kept for the next run; empty if they can.
        moved_count: videos whose place is a new one.
        began: when planning began, by the monotonic clock.
    """

    wanted: WantedRows
    archived: ArchivedVideos
    decisions: tuple[tuple[VideoAsset, Decision], ...]
    unchanged_count: int = 0
    renewed: tuple[Update, ...] = ()
    updates: Mapping[str, Update] = field(default_factory=dict)
    problems: Mapping[str, Problem] = field(default_factory=dict)
    contents: Mapping[str, Content] = field(default_factory=dict)
    assumed: frozenset[str] = frozenset()
    cache_problem: str = ""
    moved_count: int = 0
    began: float = 0.0

    @property
    def source_count(self) -> int:
        """The number of sources."""
        return len(self.decisions) + self.unchanged_count

    @property
    def todo(self) -> tuple[VideoAsset, ...]:
        """The sources that the job tries to index."""
        return tuple(asset for asset, decision in self.decisions if decision.is_work)

    @property
    def restored(self) -> set[str]:
        """The ids of deleted videos that will be indexed again."""
        ids = {content.video_id for asset in self.todo if (content := self.contents.get(asset.uri))}
        return {video_id for video_id, row in self.archived.of_ids(ids).items() if row.status is Status.DELETED}

    def all(self) -> Iterator[tuple[str, Decision]]:
        """The URI of each source and the decision for it; those that are unchanged come last."""
        yield from ((asset.uri, decision) for asset, decision in self.decisions)
        yield from ((uri, Decision.KNOWN) for uri in self.archived.unchanged_uris())

    def count(self, *wanted: Decision) -> int:
        """Number of sources with one of these decisions."""
        unchanged = self.unchanged_count if Decision.KNOWN in wanted else 0
        return unchanged + sum(decision in wanted for _, decision in self.decisions)

    def inherit(self, asset: VideoAsset, content: Content | None) -> VideoAsset:
        """The asset; missing tags and times are taken from the same content, missing tags also from the same place."""
        same_content = self.archived.of_content(content)
        same_place = same_content or self.archived.of_uri(asset.uri)
        tags = asset.tags if asset.tags is not None else (same_place.tags if same_place else {})
        asset = replace(asset, tags=tags)
        if asset.captured_at is not None or same_content is None:
            return asset
        return replace(asset, captured_at=same_content.captured_at, captured_from=same_content.captured_from)

    def changed_settings(self, uri: str) -> dict[str, tuple[str, str]]:
        """The settings in which a source's video differs from what the job wants: its values, and the job's, by name.

        Empty unless the decision for the source is SETTINGS.
        """
        row = self.archived.of_content(self.contents.get(uri))
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
        row = self.archived.of_content(content) if content else self.archived.of_uri(asset.uri)
        if row is None or not self.wanted.is_of(row):
            return 0
        return row.attempts if content or row.video_id is None else 0


def plan_sources(
    assets: Iterable[VideoAsset],
    archived: ArchivedVideos,
    wanted: WantedRows,
    hashes: HashCache,
    *,
    rehash: bool = False,
) -> IndexPlan:
    """The plan for some sources; it changes nothing.

    A file is read here only if it is not known by its place, size and time or by the cache of hashes, and the archive
    has a video of its size: then it is probably known, and may need no cluster. Workers read the other files.

    Args:
        rehash: read such a file also if it is known by its place, size and time, or by the cache.
    """
    began = time.monotonic()
    found, archived = recognise(assets, archived, wanted, hashes, rehash=rehash)
    contents = {source.asset.uri: source.content for source in found if source.content}
    by_id = archived.of_ids(content.video_id for content in contents.values())
    unknown = (source for source in found if source.content is None or source.content.video_id not in by_id)
    by_uri = archived.of_uris(source.asset.uri for source in unknown)
    files = _Files({source.asset.uri for source in found}, contents, archived)
    renewed: dict[str, VideoRow] = {}
    problems: dict[str, Problem] = {}
    decisions: dict[str, Decision] = {}
    for asset, content in ((source.asset, source.content) for source in found):
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
        if row.video_id is not None:
            by_id.setdefault(row.video_id, row)
        changed = _renewed(renewed.get(row.known_id, row), asset, content, files)
        if changed is not None:
            renewed[row.known_id] = changed
            if decisions[asset.uri] is Decision.KNOWN and changed.uri != row.uri:
                decisions[asset.uri] = Decision.MOVED
    pairs = tuple(Update(by_id[video_id], row) for video_id, row in renewed.items())
    updates = {update.after.uri: update for update in pairs if update.changes}
    decisions |= {uri: Decision.UPDATED for uri in updates if decisions.get(uri) is Decision.KNOWN}
    return IndexPlan(
        wanted=wanted,
        archived=replace(archived, changes=renewed),
        decisions=tuple((source.asset, decisions[source.asset.uri]) for source in found),
        unchanged_count=len(archived.unchanged),
        renewed=pairs,
        updates=updates,
        problems=problems,
        contents=contents,
        assumed=frozenset(source.asset.uri for source in found if source.is_assumed),
        cache_problem=hashes.problem,
        moved_count=sum(update.before.uri != update.after.uri for update in pairs),
        began=began,
    )


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


@dataclass(frozen=True)
class _Files:
    """The sources that are not unchanged, and the archive's videos.

    Attributes:
        uris: of the sources.
        contents: by URI, the contents that are known.
        archived: the archive's videos.
    """

    uris: set[str]
    contents: Mapping[str, Content]
    archived: ArchivedVideos

    def is_source(self, row: VideoRow) -> bool:
        """Whether the file of a row is a source of this job."""
        return row.uri in self.uris or self.archived.is_unchanged(row)

    def still_holds(self, row: VideoRow) -> bool:
        """Whether the file of a row still has its content; another file may have taken its name."""
        if row.uri in self.contents:
            return self.contents[row.uri].video_id == row.video_id
        path = file_path(row.uri)
        try:
            stat = os.stat(path)
            if stat.st_size != row.size_bytes:
                return False
            return stat.st_mtime_ns == row.mtime_ns or identify(path).video_id == row.video_id
        except (OSError, VideoProblem):
            return False


def _renewed(row: VideoRow, asset: VideoAsset, content: Content | None, files: _Files) -> VideoRow | None:
    """The row with a changed place, tags or capture time; None if nothing has changed.

    A copy of a video does not change tags and times if the row's own file is a source too.
    """
    changes: dict[str, Any] = {}
    if asset.uri == row.uri:
        if content is not None and (content.mtime_ns != row.mtime_ns or (content.is_settled and not row.is_settled)):
            changes |= {"mtime_ns": content.mtime_ns, "is_settled": content.is_settled}
    elif content is not None and not files.still_holds(row):
        changes |= {"uri": asset.uri, "mtime_ns": content.mtime_ns, "is_settled": content.is_settled}
    if asset.uri == changes.get("uri", row.uri) or not files.is_source(row):
        captured = {"captured_at": asset.captured_at, "captured_from": asset.captured_from}
        if asset.captured_at is not None and captured != {name: getattr(row, name) for name in captured}:
            changes |= captured
        if asset.tags is not None and dict(asset.tags) != dict(row.tags):
            changes["tags"] = asset.tags
    return replace(row, **changes) if changes else None
