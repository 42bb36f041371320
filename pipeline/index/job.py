"""job: sources -> committed, searchable videos. It gives work to the workers and commits the results."""

import contextlib
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.ask.thresholds import update_thresholds
from pipeline.index.archived import ArchivedVideos, WantedRows
from pipeline.index.config import IndexConfig
from pipeline.index.plan import Decision, IndexPlan, Update, decide_known, plan_sources
from pipeline.index.progress import FileAtWork, Meter, Progress, Report, VideoMeter
from pipeline.index.split import split
from storage.archive.archive import Archive
from storage.archive.claims import Job
from storage.care.clean import remove_stale_claims, remove_unnamed_files
from storage.errors import UsageError, VideoProblem, VidxError
from storage.files import file_path
from storage.processes import usable_cores
from storage.records import (
    CapturedFrom,
    Choice,
    Content,
    Probe,
    Problem,
    Reason,
    Receipt,
    Sampling,
    SegmentTask,
    Status,
    VideoAsset,
    VideoRow,
    is_whole,
)
from storage.vectors.vector_index import improve_index, update_index
from workers.actors import Examined, WorkerSettings
from workers.decode.client import check_choice, check_confined
from workers.llm.model_options import check_device
from workers.models.bundle import Bundle, find_bundle
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify

if TYPE_CHECKING:  # importing Ray takes a second, and a run with nothing to do does not need it
    from pipeline.cluster.executor import Executor, Outcome

ADMIT_SECONDS = 0.5  # between two commits of video numbers, while other videos are examined
COMMIT_SECONDS = 2.0  # between two commits; one costs tens of milliseconds, for any number of receipts
TRAINED_KEYS = 1 << 20  # up to so many, a job trains the search index at its end; beyond that `vidx maintain` does
INDEX_FRAMES = 1 << 14  # published frames that may be missing in the search index; a search compares them one by one
LATE_SECONDS = 1.0  # the duration in a header is replaced if frames end later than this after it
SHOW_PART_SECONDS = 10.0  # a video can be searched in part so long after its first committed segment
ELSEWHERE_SECONDS = 0.5  # between two looks at the videos of other jobs
READY_SEGMENTS = 64  # segments that wait for a worker; above that, no more videos are examined


@dataclass
class IndexResult:
    """What a job did; indexed, partial, failed and skipped add up to the number of sources.

    Attributes:
        indexed, partial, failed, skipped: numbers of videos.
        failed_before: skipped videos that failed in an earlier run.
        deleted_before: skipped videos that were deleted, before this run or during it.
        moved: videos whose files were moved or renamed; the archive has their new places.
        frame_count: frames that this run computed.
        frames_resumed: frames that earlier runs had committed of the videos of this run.
        frames_by_node: of frame_count, how many each node of the cluster decoded, by its name.
        seconds: duration of the run.
        decode_seconds, encode_seconds, store_seconds: waiting for the decoder, computing and writing, of all workers.
        failures: partial and failed videos of this run.
        updates: videos whose tags or capture times the sources change.
        notes: indexed videos with a remark.
        interrupted: whether Ctrl-C or SIGTERM stopped the job.
        cache_problem: why hashes cannot be kept for the next run; empty if they can.
        sandbox_missing: what a decoding process was not kept from (workers/sandbox.py).
        index_is_behind: whether the search index should be trained, which is left to `vidx maintain`.
    """

    indexed: int = 0
    partial: int = 0
    failed: int = 0
    skipped: int = 0
    failed_before: int = 0
    deleted_before: int = 0
    moved: int = 0
    frame_count: int = 0
    frames_resumed: int = 0
    frames_by_node: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    store_seconds: float = 0.0
    failures: list[VideoRow] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    notes: list[VideoRow] = field(default_factory=list)
    interrupted: bool = False
    cache_problem: str = ""
    sandbox_missing: set[str] = field(default_factory=set)
    index_is_behind: bool = False

    def count(self, row: VideoRow) -> None:
        """Adds a video that this run tried."""
        self.indexed += row.status is Status.INDEXED
        self.partial += row.status is Status.PARTIAL
        self.failed += row.status is Status.FAILED
        if not is_whole(row.problem):
            self.failures.append(row)
        elif row.problem is not None:
            self.notes.append(row)


@dataclass
class _Video:
    """A video that was examined and is not published yet.

    Attributes:
        asset, content, probe, number: the video.
        waiting: keys of segments that are not committed.
        held: keys of segments whose frames are committed.
        resumed: whether earlier jobs committed some of them.
        meter: how much of it is done.
        committed_since: when this job first knew of committed frames; None if there are none.
        is_shown: whether the video need not be published in part (any more).
        problem: of the first segment that is not complete.
    """

    asset: VideoAsset
    content: Content
    probe: Probe
    number: int
    waiting: set[str]
    held: set[str]
    resumed: bool
    meter: VideoMeter
    committed_since: float | None
    is_shown: bool = False
    problem: Problem | None = None


def sampling_of(config: IndexConfig, bundle: Bundle) -> Sampling:
    """The choice of frames and patch rows that the settings ask for.

    Raises:
        UsageError: there are more patches than the model has, or a library for --sample is missing.
    """
    sampling = Sampling(
        config.fps, bundle.default_patch_rows if config.patches is None else config.patches, config.sample
    )
    bundle.check_patch_rows(sampling.patches)
    check_choice(sampling.choice)
    return sampling


def plan_index(
    assets: Iterable[VideoAsset], archive: Archive | None, bundle: Bundle, sampling: Sampling, config: IndexConfig
) -> IndexPlan:
    """What a job would do with each source; changes nothing. The archive is None if it does not exist yet."""
    wanted = WantedRows(bundle.model_id, sampling, config.max_pixels, config.retry_failed, config.restore_deleted)
    archived = ArchivedVideos(archive.videos.stored(), archive.videos.read) if archive else ArchivedVideos()
    return plan_sources(assets, archived, wanted, HashCache(), rehash=config.rehash)


def check_machine(config: IndexConfig) -> None:
    """Checks what this machine has, before Ray is started.

    Raises:
        UsageError: there is no GPU, there are fewer cores than workers, or the sandbox is not complete and must be.
    """
    check_device(config.device)
    if config.strict_sandbox:
        check_confined()
    cores = usable_cores()
    if config.workers is not None and config.workers > cores and not _on_gpu(config):
        raise UsageError(f"--workers {config.workers}: there are {cores} CPUs; give at most {cores}")


def run_index(
    plan: IndexPlan,
    archive: Archive,
    bundle: Bundle,
    config: IndexConfig,
    report: Report,
    announce: Callable[[str], None] = lambda line: None,
) -> IndexResult:
    """Indexes the videos that the archive does not hold yet.

    A KeyboardInterrupt stops the job after a last commit of finished work; the result says so.

    Args:
        plan: what to do with each source, as plan_index makes it.
        archive: where their rows go.
        bundle: the model.
        config: the settings of the plan.
        report: is told how far the job is, about twice a second.
        announce: is told what the job waits for on a cluster, and which nodes it does without.
    Raises:
        ArchiveError: the archive cannot be written.
        UsageError: there is no cluster at the address.
        ClusterError: Ray died.
        UnavailableError: the cluster was lost, or lacks what the job needs.
    """
    result = IndexResult()
    if plan.renewed:
        # First: a new video may have the old name of one that was moved.
        archive.videos.update([(update.before, update.after) for update in plan.renewed])
    result.updates = list(plan.updates.values())
    result.cache_problem = plan.cache_problem
    result.failed_before = plan.count(Decision.FAILED)
    result.deleted_before = plan.count(Decision.DELETED)
    result.moved = plan.moved_count
    result.skipped = plan.source_count - len(plan.todo)
    if plan.todo:
        from pipeline.cluster.executor import Executor

        remove_stale_claims(archive)
        with Job(archive.uri) as job:
            run = _Run(plan, archive, job, result, report)
            try:
                settings = worker_settings(archive, bundle, config, plan.wanted.sampling.choice)
                sources = [asset.uri for asset in plan.todo]
                with Executor(
                    settings,
                    archive.uri,
                    job.uri,
                    sources,
                    address=config.address,
                    workers=config.workers,
                    gpus_each=config.gpus_per_worker,
                    wait_seconds=math.inf if config.wait_for_resources is None else config.wait_for_resources,
                    announce=announce,
                ) as executor:
                    run.run(executor)
            except KeyboardInterrupt:
                result.interrupted = True
                run.commit(is_last=True)
            except VidxError:
                with contextlib.suppress(VidxError):  # commits finished work, unless the disk is full
                    run.commit(is_last=True)
                raise
    update_index(archive)
    if plan.todo:
        if not result.interrupted:
            result.index_is_behind = not improve_index(archive, TRAINED_KEYS)
            update_thresholds(archive, bundle)
        remove_unnamed_files(archive, in_opened=True)
    result.seconds = time.monotonic() - plan.began
    return result


def index_again(archive: Archive, rows: Sequence[VideoRow], report: Report) -> list[VideoRow]:
    """Indexes videos again, each with the settings of its row.

    Videos whose files are gone or have another content stay as they are.

    Returns:
        The rows of videos that are still not complete, with the problem.
    Raises:
        UsageError: the archive's model is not available.
        KeyboardInterrupt: finished work has been committed.
    """
    bundle, away = _own_bundle(archive), _away(rows)
    there = [row for row in rows if row.video_id not in away]
    for text in sorted({row.sampling for row in there}):
        rows_alike = [row for row in there if row.sampling == text]
        assets = [VideoAsset(row.uri, row.captured_at, row.tags, row.captured_from) for row in rows_alike]
        largest = max(row.probe.width * row.probe.height for row in rows_alike if row.probe)
        config = IndexConfig(model=archive.model_name, tower=archive.model_tower or None)
        config = config.model_copy(update={"max_pixels": max(config.max_pixels, largest)})
        plan = plan_index(assets, archive, bundle, Sampling.from_text(text), config)
        if run_index(plan, archive, bundle, config, report).interrupted:
            raise KeyboardInterrupt
    present = archive.videos.of_ids(row.known_id for row in rows)
    problems = {row.video_id: row.problem for row in (*rows, *present)} | away
    return [replace(row, problem=problem) for row in rows if (problem := problems[row.video_id]) is not None]


def why_not_again(archive: Archive, rows: Sequence[VideoRow]) -> dict[str, Problem]:
    """By video_id, why videos cannot be indexed again; those that can are left out."""
    try:
        _own_bundle(archive)
    except UsageError as error:
        return {row.known_id: Problem(Reason.UNKNOWN, str(error)) for row in rows}
    return _away(rows)


def _own_bundle(archive: Archive) -> Bundle:
    bundle = find_bundle(archive.model_name, archive.model_tower or None)
    archive.check_model(bundle.model_id, bundle.name)
    return bundle


def _away(rows: Sequence[VideoRow]) -> dict[str, Problem]:
    """By video_id, why the files of videos cannot be read; those that can be read are left out."""
    hashes, found = HashCache(), {}
    for row in rows:
        try:
            if identify(file_path(row.uri), hashes).video_id != row.video_id:
                found[row.known_id] = Problem(Reason.CHANGED, "the file has another content now")
        except VideoProblem as problem:
            found[row.known_id] = Problem(problem.reason, problem.detail)
    return found


def worker_settings(archive: Archive, bundle: Bundle, config: IndexConfig, choice: Choice) -> WorkerSettings:
    """The settings of the workers; a device of "auto" is decided here, because Ray must know it."""
    return WorkerSettings(
        frames_uri=archive.frames_uri,
        model=bundle.name,
        tower=bundle.tower_name or None,
        device="cuda" if _on_gpu(config) else "cpu",
        dtype=config.dtype,
        batch=config.batch,
        max_pixels=config.max_pixels,
        decode_threads=config.decode_threads,
        timeout_seconds=config.timeout_seconds,
        choice=choice,
        thumbnails=config.thumbnails,
        decoder=config.decoder,
        strict_sandbox=config.strict_sandbox,
    )


def _on_gpu(config: IndexConfig) -> bool:
    """Whether to compute on a GPU; this avoids importing torch here."""
    return config.device == "cuda" or (config.device == "auto" and os.path.exists("/dev/nvidiactl"))


class _Run:
    """The main loop of a job: gives out work, collects results, commits them."""

    def __init__(self, plan: IndexPlan, archive: Archive, job: Job, result: IndexResult, report: Report):
        self._plan = plan
        self._restored = set(plan.restored)
        self._unexamined = deque(plan.todo)
        self._archive = archive
        self._job = job
        self._wanted = plan.wanted
        self._sampling = plan.wanted.sampling
        self._result = result
        self._report = report
        self._examined: list[tuple[VideoAsset, Content, Probe]] = []
        self._elsewhere: list[tuple[VideoAsset, Content, Probe]] = []  # other jobs have taken them
        self._ready: deque[SegmentTask] = deque()
        self._videos: dict[str, _Video] = {}
        self._receipts: list[Receipt] = []
        self._finished: list[VideoRow] = []
        self._last_commit = time.monotonic()
        self._last_admission = -ADMIT_SECONDS
        self._video_count = len(plan.todo)
        self._seen: dict[str, str] = {}
        self._sandbox_missing: dict[str, set[str]] = {}
        self._meter = Meter({asset.uri: _size(asset, plan.contents.get(asset.uri)) for asset in plan.todo})
        self._unindexed = 0
        self._node_names: Mapping[str, str] = {}
        self._frames_by_node: Counter[str] = Counter()  # by the node's id
        self._counted: dict[int, int] = {}  # frames of videos that are shown in part, in _unindexed

    def run(self, executor: "Executor") -> None:
        """Works until every source is published, failed or skipped."""
        self._node_names = executor.node_names
        while self._unexamined or self._ready or executor.running or self._examined or self._elsewhere:
            executor.is_wanted = bool(self._unexamined or self._ready or executor.running or self._examined)
            self._give_out(executor)
            for outcome in executor.wait(timeout_seconds=0.5):
                self._take_in(outcome)
            if self._examined and self._may_admit(executor):
                self._admit()
            if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
                self.commit()
            if self._elsewhere and not executor.is_wanted:
                self._look_elsewhere()
            self._show(executor)
        self.commit()
        self._show(executor)

    def commit(self, is_last: bool = False) -> None:
        """Commits new frames, then publishes videos that are complete now or can be shown in part.

        Args:
            is_last: the job ends here, so all incomplete videos are shown in part.
        """
        receipts = list(self._receipts)
        for number in {receipt.video_number for receipt in receipts if receipt.part is not None}:
            self._job.begin(number)
        landed = self._archive.parts.commit(receipts)  # can be repeated after an interruption
        del self._receipts[: len(receipts)]
        self._count_frames([receipt for receipt, is_in in zip(receipts, landed) if is_in])
        for receipt in receipts:
            self._result.decode_seconds += receipt.decode_seconds
            self._result.encode_seconds += receipt.encode_seconds
            self._result.store_seconds += receipt.store_seconds
            self._settle(receipt)
        self._publish(is_last)
        if self._unindexed >= INDEX_FRAMES:
            update_index(self._archive)
            self._unindexed = 0
        self._last_commit = time.monotonic()

    def _count_frames(self, receipts: Sequence[Receipt]) -> None:
        """Adds committed frames, in all and for each node."""
        for receipt in receipts:
            self._frames_by_node[receipt.node] += receipt.frame_count
        by_name: Counter[str] = Counter()  # a node that left and came back has another id
        for node, count in self._frames_by_node.items():
            by_name[self._node_names.get(node, node)] += count
        self._result.frames_by_node = dict(sorted(by_name.items()))
        self._result.frame_count = by_name.total()

    def _publish(self, is_last: bool) -> None:
        finished = list(self._finished)
        now = time.monotonic()
        partly = [
            video
            for video in self._videos.values()
            if video.committed_since is not None and not video.is_shown
            if is_last or now - video.committed_since >= SHOW_PART_SECONDS
        ]
        rows = [*finished, *map(self._unfinished_row, partly)]
        published = self._archive.videos.publish(rows, self._restored) if rows else set()
        self._restored -= published  # if a user deletes it again, it stays deleted
        del self._finished[: len(finished)]
        for video in partly:
            video.is_shown = True
        for row in finished:
            if row.video_id is not None and row.video_id not in published and self._is_deleted(row.video_id):
                self._result.skipped += 1
                self._result.deleted_before += 1
                self._video_count -= 1
            else:
                self._result.count(row)
            if row.video_number is not None:
                self._job.release(row.video_number)
        self._count_unindexed(finished)

    def _is_deleted(self, video_id: str) -> bool:
        """Whether a user has deleted a video during this job."""
        row = self._archive.videos.row_of(video_id)
        return row is not None and row.status is Status.DELETED

    def _count_unindexed(self, finished: Sequence[VideoRow]) -> None:
        """Adds the frames that were published since the last call."""
        shown = self._archive.videos.published()
        at_work = {video.number for video in self._videos.values() if video.number in shown}
        counts = {number: self._archive.parts.frame_count(number) for number in at_work}
        counts |= {row.video_number: row.frame_count for row in finished if row.video_number is not None}
        self._unindexed += sum(count - self._counted.get(number, 0) for number, count in counts.items())
        self._counted = {number: counts[number] for number in at_work}

    def _give_out(self, executor: "Executor") -> None:
        while self._ready and executor.free("encode") > 0:
            task = self._ready.popleft()
            executor.encode(task, task)
        while self._unexamined and executor.free("examine") > 0 and self._has_room():
            asset = self._unexamined.popleft()
            content = None if asset.uri in self._plan.assumed else self._plan.contents.get(asset.uri)
            executor.examine(asset, asset.uri, content)

    def _take_in(self, outcome: "Outcome") -> None:
        if outcome.kind == "encode":
            task = outcome.key
            receipt: Receipt = outcome.result or Receipt(  # the worker died or failed
                task.segment, task.video_number, None, outcome.problem, task.probe.decoder, 0, 0.0, 0.0, 0.0
            )
            self._videos[receipt.segment.video_id].meter.finish(receipt.segment.key, receipt.end_seconds)
            self._receipts.append(receipt)
            return
        asset, examined = outcome.key, outcome.result or Examined(None, None, outcome.problem)
        content = examined.content
        self._note_sandbox(content.video_id if content else None, examined.sandbox_missing)
        if content is not None:
            if content.video_id in self._seen:  # a second file with the same content
                self._skip(asset)
                return
            self._seen[content.video_id] = asset.uri
        if content is None or examined.probe is None:
            self._meter.leave_out(asset.uri)
            self._finished.append(self._row(asset, content, None, None, 0, examined.problem))
            return
        self._examined.append((asset, content, examined.probe))

    def _note_sandbox(self, video_id: str | None, missing: Iterable[str]) -> None:
        self._result.sandbox_missing |= set(missing)
        if video_id is not None:
            self._sandbox_missing.setdefault(video_id, set()).update(missing)

    def _may_admit(self, executor: "Executor") -> bool:
        """Whether to admit the examined videos now; waiting for more of them saves commits.

        None is admitted before an encoder is ready: another job could index them meanwhile.
        """
        if executor.is_loading:
            return False
        coming = executor.is_busy("examine") or (self._unexamined and self._has_room())
        return not coming or time.monotonic() - self._last_admission >= ADMIT_SECONDS

    def _has_room(self) -> bool:
        """Whether more sources may be examined."""
        return len(self._ready) + len(self._examined) < READY_SEGMENTS

    def _admit(self) -> None:
        """Gives the examined videos their numbers, in one commit, and queues their segments."""
        examined, self._examined = self._examined, []
        self._last_admission = time.monotonic()
        numbers = self._archive.reserve([(content.video_id, self._sampling) for _, content, _ in examined])
        self._archive.refresh()
        for asset, content, probe in examined:
            number = numbers[content.video_id, str(self._sampling)]
            if not self._job.take(number):
                self._elsewhere.append((asset, content, probe))
                continue
            if self._is_done(content):  # another job was faster
                self._job.release(number)
                self._skip(asset)
                continue
            segments, folder = split(content.video_id, probe), self._archive.parts.folder_of(number)
            keys = [segment.key for segment in segments]
            again = self._wanted.retry_failed
            done = self._archive.parts.committed(number, keys, whole_only=again)
            waiting = [segment for segment in segments if segment.key not in done]
            self._result.frames_resumed += self._archive.parts.frame_count(number, done)
            meter = self._meter.begin(asset.uri, probe, done)
            left = {segment.key for segment in waiting}
            since = time.monotonic() if done else None
            video = _Video(asset, content, probe, number, left, set(done), bool(done), meter, since)
            video.is_shown = number in self._archive.videos.published()
            self._videos[content.video_id] = video
            for segment in waiting:
                own = replace(probe, cuts=tuple(cut for cut in probe.cuts if cut[0] == segment.end_ticks))
                self._ready.append(SegmentTask(asset.uri, content, own, segment, number, self._sampling, folder))
            if not waiting:
                self._finish(video)

    def _look_elsewhere(self) -> None:
        """Skips videos that other jobs have finished, and takes over those that they gave up."""
        self.commit()
        time.sleep(ELSEWHERE_SECONDS)
        self._archive.refresh()
        elsewhere, self._elsewhere = self._elsewhere, []
        numbers = self._archive.reserve([(content.video_id, self._sampling) for _, content, _ in elsewhere])
        for asset, content, probe in elsewhere:
            if self._is_done(content):
                self._skip(asset)
                continue
            if self._job.is_taken(numbers[content.video_id, str(self._sampling)]):
                self._elsewhere.append((asset, content, probe))
                continue
            if row := self._archive.videos.row_of(content.video_id):  # keep what a manifest stated in the other job
                tags = row.tags if asset.tags is None else asset.tags
                asset = replace(asset, tags=tags)
                if asset.captured_at is None:
                    asset = replace(asset, captured_at=row.captured_at, captured_from=row.captured_from)
            self._examined.append((asset, content, probe))

    def _is_done(self, content: Content) -> bool:
        """Whether another job has published this video since this job began."""
        row = self._archive.videos.row_of(content.video_id)
        if row is None or row == self._plan.archived.of_content(content):
            return False
        return decide_known(row, replace(self._wanted, retry_failed=False)) not in (
            Decision.SETTINGS,
            Decision.UNFINISHED,
        )

    def _skip(self, asset: VideoAsset) -> None:
        self._meter.leave_out(asset.uri)
        self._result.skipped += 1
        self._video_count -= 1

    def _settle(self, receipt: Receipt) -> None:
        video = self._videos[receipt.segment.video_id]
        self._note_sandbox(receipt.segment.video_id, receipt.sandbox_missing)
        video.waiting.discard(receipt.segment.key)
        if receipt.part is not None:
            video.held.add(receipt.segment.key)
            video.committed_since = video.committed_since or time.monotonic()
        if is_whole(video.problem):
            video.problem = receipt.problem or video.problem
        said = video.probe.duration_seconds
        if said is not None and receipt.end_seconds is not None and receipt.end_seconds > said + LATE_SECONDS:
            video.probe = replace(video.probe, duration_seconds=receipt.end_seconds)
        if receipt.decoder == "pyav":  # it replaced decord in a damaged segment
            video.probe = replace(video.probe, decoder="pyav")
        if not video.waiting:
            self._finish(video)

    def _finish(self, video: _Video) -> None:
        del self._videos[video.content.video_id]
        self._meter.end(video.asset.uri)
        frame_count = self._archive.parts.frame_count(video.number)
        problem = video.problem
        if not self._archive.parts.holds(video.number, video.held):
            problem = Problem(Reason.DAMAGED, "its frames were taken out during this job")
        if is_whole(problem) and video.resumed:
            problem = min(self._archive.parts.problems(video.number), key=is_whole, default=problem)
        if frame_count == 0 and problem is None:
            problem = Problem(Reason.NO_FRAMES, "the video stream has no frame that can be decoded")
        row = self._row(video.asset, video.content, video.probe, video.number, frame_count, problem)
        self._finished.append(row)

    def _row(
        self,
        asset: VideoAsset,
        content: Content | None,
        probe: Probe | None,
        number: int | None,
        frame_count: int,
        problem: Problem | None,
    ) -> VideoRow:
        attempts = self._plan.attempts(asset, content) + 1
        asset = _dated(self._plan.inherit(asset, content), probe)
        damaged = Status.PARTIAL if frame_count else Status.FAILED
        return VideoRow(
            video_id=content.video_id if content else None,
            video_number=number,
            uri=asset.uri,
            status=Status.INDEXED if is_whole(problem) else damaged,
            problem=problem,
            model_id=self._wanted.model_id,
            sampling=str(self._sampling),
            frame_count=frame_count,
            size_bytes=content.size_bytes if content else None,
            mtime_ns=content.mtime_ns if content else None,
            is_settled=content is not None and content.is_settled,
            probe=probe,
            captured_at=asset.captured_at,
            captured_from=asset.captured_from,
            tags=asset.tags or {},
            attempts=attempts,
            indexed_at=datetime.now(UTC),
            sandbox_missing=self._sandbox_missing_of(content, number),
        )

    def _sandbox_missing_of(self, content: Content | None, number: int | None) -> tuple[str, ...] | None:
        """What the decoders were not kept from, in this run and in earlier ones whose frames stay."""
        missing = self._sandbox_missing.get(content.video_id) if content else None
        if content is None or missing is None:
            return None
        before = self._plan.archived.of_content(content)
        if before is not None and before.video_number == number:
            missing = {*missing, *(before.sandbox_missing or ())}
        return tuple(sorted(missing))

    def _unfinished_row(self, video: _Video) -> VideoRow:
        """The row of a video that is shown in part; it does not count this run as an attempt yet."""
        count = self._archive.parts.frame_count(video.number)
        problem = Problem(Reason.UNFINISHED, "it is being indexed, or its job was interrupted")
        row = self._row(video.asset, video.content, video.probe, video.number, count, problem)
        return replace(row, status=Status.INDEXING, attempts=row.attempts - 1, indexed_at=None)

    def _show(self, executor: "Executor") -> None:
        by_number = {video.number: video for video in self._videos.values()}
        for (number, key), reached in executor.reached().items():
            if number in by_number:
                by_number[number].meter.reach(key, *reached)
        if not executor.is_loading:
            self._meter.look(time.monotonic())
        tried = self._result.indexed + self._result.partial + self._result.failed
        frames = self._result.frame_count + sum(receipt.frame_count for receipt in self._receipts)
        self._report(
            Progress(
                videos_done=tried,
                video_count=self._video_count,
                frames_done=frames,
                frames_at_work=sum(video.meter.frames_at_work for video in self._videos.values()),
                frames_resumed=self._result.frames_resumed,
                done_seconds=self._meter.done_seconds,
                total_seconds=self._meter.total_seconds,
                seconds_left=self._meter.seconds_left,
                files=tuple(self._at_work(executor)),
            )
        )

    def _at_work(self, executor: "Executor") -> Iterator[FileAtWork]:
        for video_id in dict.fromkeys(task.segment.video_id for task in executor.at_work("encode")):
            video = self._videos[video_id]
            yield FileAtWork(video.asset.uri, video.meter.done_seconds, video.meter.length_seconds)
        for asset in executor.at_work("examine"):
            yield FileAtWork(asset.uri, None, None)


def _size(asset: VideoAsset, content: Content | None) -> int:
    """The size of a source in bytes; 0 if it is unknown."""
    if content is not None:
        return content.size_bytes
    with contextlib.suppress(OSError, ValueError):
        return os.stat(file_path(asset.uri)).st_size
    return 0


def _dated(asset: VideoAsset, probe: Probe | None) -> VideoAsset:
    """The asset with the capture time that its file states, unless a manifest states one."""
    is_told = asset.captured_at is not None and asset.captured_from is CapturedFrom.MANIFEST
    if is_told or probe is None or probe.created_at is None:
        return asset
    return replace(asset, captured_at=probe.created_at, captured_from=CapturedFrom.FILE)
