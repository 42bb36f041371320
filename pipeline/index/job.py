"""job: sources -> the committed, searchable archive. The job's flow; the work itself happens in workers."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.ask.thresholds import update_thresholds
from pipeline.index.config import IndexConfig
from pipeline.index.plan import Decision, IndexPlan, Update, WantedRows, decide_known, plan_sources
from pipeline.index.progress import FileAtWork, Meter, Progress, VideoMeter
from pipeline.index.split import split
from storage.archive.archive import Archive
from storage.archive.claims import Job
from storage.care.clean import remove_stale_claims, remove_unnamed_files
from storage.errors import UsageError, VideoProblem, VidxError
from storage.files import file_path
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

if TYPE_CHECKING:  # importing Ray costs a second that a run with nothing to do need not wait for
    from pipeline.cluster.executor import Executor, Outcome

ADMIT_SECONDS = 0.5  # between two commits of numbers, while other videos are still being examined
COMMIT_SECONDS = 2.0  # receipts are committed in groups: a commit costs tens of milliseconds however many are in it
INDEX_FRAMES = 1 << 14  # published and not in the index: until then a search compares them one by one
LATE_SECONDS = 1.0  # by which frames may lie behind the duration that a file claims, before it is not believed
SHOW_PART_SECONDS = 10.0  # from the first committed segment; of what is whole by then, none is shown in part
ELSEWHERE_SECONDS = 0.5  # between two looks at what other jobs are doing
READY_SEGMENTS = 64  # examined but not yet given out; bounds what the driver holds


@dataclass
class IndexResult:
    """What a job did; the four kinds of videos are disjoint and add up to the sources.

    `failures` lists this run's partial and failed videos, `notes` whole ones of which something should be known. Parts
    of skipped: failed_before counts those of earlier runs that this one did not try again, deleted_before those that
    were deleted, before it or while it was at them. `updates` lists videos of the archive whose tags or capture time
    the sources state anew. frame_count is what this run computed, frames_resumed what earlier ones had committed of the
    videos that it worked on. The seconds of the stages are summed over workers: waiting for the decoder, computing, and
    writing. cache_problem says why hashes are not remembered for the next run. sandbox_missing names what a process
    that decoded was not kept from (workers/sandbox.py).
    """

    indexed: int = 0
    partial: int = 0
    failed: int = 0
    skipped: int = 0
    failed_before: int = 0
    deleted_before: int = 0
    frame_count: int = 0
    frames_resumed: int = 0
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

    def count(self, row: VideoRow) -> None:
        """Adds one video that this run tried."""
        if row.status is Status.INDEXED:
            self.indexed += 1
        elif row.status is Status.PARTIAL:
            self.partial += 1
        else:
            self.failed += 1
        if not is_whole(row.problem):
            self.failures.append(row)
        elif row.problem is not None:
            self.notes.append(row)


@dataclass
class _Video:
    """A video between its first look and its publication.

    Attributes:
        asset, content, probe, number: what it is.
        waiting: keys of segments that are not committed.
        held: keys of segments whose frames are.
        resumed: whether earlier jobs committed some of them.
        meter: of what is done.
        committed_since: since when frames of it are committed, as far as this job knows; None where none are.
        is_settled: whether a row shows what is committed of it, or none may before it is whole.
        problem: of the first segment that is not whole.
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
    is_settled: bool = False
    problem: Problem | None = None


def sampling_of(config: IndexConfig, bundle: Bundle) -> Sampling:
    """Which rows of each video the settings ask for, of a model.

    Raises:
        UsageError: more patches than the model has, or a choice that needs a library which is missing.
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
    """What a job would do with each source; changes nothing. An archive of None is one that is not there yet."""
    wanted = WantedRows(bundle.model_id, sampling, config.max_pixels, config.retry_failed, config.restore_deleted)
    return plan_sources(list(assets), archive.videos.all() if archive else [], wanted, HashCache())


def check_machine(config: IndexConfig) -> None:
    """Refuses what this machine surely lacks, before Ray is started, which counts it exactly.

    Raises:
        UsageError: no GPU, fewer cores than workers, or a sandbox with gaps where that has to be strict.
    """
    check_device(config.device)
    if config.strict_sandbox:
        check_confined()
    cores = os.cpu_count() or 1
    if config.workers is not None and config.workers > cores and not _on_gpu(config):
        raise UsageError(f"--workers {config.workers}: there are {cores} CPUs; give at most as many")


def run_index(
    assets: Iterable[VideoAsset],
    archive: Archive,
    bundle: Bundle,
    sampling: Sampling,
    config: IndexConfig,
    report: Callable[[Progress], None],
) -> IndexResult:
    """Indexes what the archive does not hold yet and leaves it committed and searchable.

    A KeyboardInterrupt stops the job after what is finished has been committed; the result then says so.

    Raises:
        ArchiveError: the archive cannot be written.
        UsageError: no cluster at the address.
    """
    start = time.monotonic()
    result = IndexResult()
    plan = plan_index(assets, archive, bundle, sampling, config)
    if plan.renewed:
        archive.videos.update(plan.renewed)  # before anything new takes the place of what has moved away
    result.updates = list(plan.updates.values())
    result.cache_problem = plan.cache_problem
    result.failed_before = plan.count(Decision.FAILED)
    result.deleted_before = plan.count(Decision.DELETED)
    result.skipped = plan.count(Decision.KNOWN, Decision.MOVED, Decision.UPDATED, Decision.FAILED, Decision.DELETED)
    if plan.todo:
        from pipeline.cluster.executor import Executor

        remove_stale_claims(archive)
        with Job(archive.uri) as job:
            run = _Run(plan, archive, job, result, report)
            try:
                settings = worker_settings(archive, bundle, config, sampling.choice)
                with Executor(settings, config.address, config.workers) as executor:
                    run.run(executor)
            except KeyboardInterrupt:
                result.interrupted = True
                run.commit(is_last=True)
            except VidxError:
                with contextlib.suppress(VidxError):  # what other workers had finished; a full disk refuses it too
                    run.commit(is_last=True)
                raise
    update_index(archive)
    if plan.todo:  # a run with nothing to do ends in a second
        if not result.interrupted:
            improve_index(archive)
            update_thresholds(archive, bundle)
        remove_unnamed_files(archive)
    result.seconds = time.monotonic() - start
    return result


def index_again(archive: Archive, rows: Sequence[VideoRow], report: Callable[[Progress], None]) -> list[VideoRow]:
    """Indexes videos once more, each with the settings of its row.

    Those whose files are gone, or hold something else now, stay as they are.

    Returns:
        Those that are still not whole, their problem being why.
    Raises:
        UsageError: the archive's model is not at hand.
        KeyboardInterrupt: after what is finished has been committed.
    """
    bundle, away = _own_bundle(archive), _away(rows)
    there = [row for row in rows if row.video_id not in away]
    for text in sorted({row.sampling for row in there}):
        rows_alike = [row for row in there if row.sampling == text]
        assets = [VideoAsset(row.uri, row.captured_at, row.tags, row.captured_from) for row in rows_alike]
        largest = max(row.probe.width * row.probe.height for row in rows_alike if row.probe)
        config = IndexConfig(model=archive.model_name, tower=archive.model_tower or None)
        config = config.model_copy(update={"max_pixels": max(config.max_pixels, largest)})
        if run_index(assets, archive, bundle, Sampling.from_text(text), config, report).interrupted:
            raise KeyboardInterrupt
    problems = (
        {row.video_id: row.problem for row in rows} | {row.video_id: row.problem for row in archive.videos.all()} | away
    )
    return [replace(row, problem=problem) for row in rows if (problem := problems[row.video_id]) is not None]


def why_not_again(archive: Archive, rows: Sequence[VideoRow]) -> dict[str, Problem]:
    """Why videos cannot be indexed once more with what is at hand, by video_id; those that can are not in it."""
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
    """Why videos cannot be read where they were, by video_id; those that can are not in it."""
    hashes = HashCache()
    return {row.known_id: problem for row in rows if (problem := _why_away(row, hashes)) is not None}


def _why_away(row: VideoRow, hashes: HashCache) -> Problem | None:
    try:
        if identify(file_path(row.uri), hashes).video_id == row.video_id:
            return None
    except VideoProblem as problem:
        return Problem(problem.reason, problem.detail)
    return Problem(Reason.CHANGED, "the file holds something else now")


def worker_settings(archive: Archive, bundle: Bundle, config: IndexConfig, choice: Choice) -> WorkerSettings:
    """The part of the settings that workers need; a device of "auto" is settled here, since Ray must know it."""
    return WorkerSettings(
        frames_uri=archive.frames_uri,
        model=bundle.name,
        tower=bundle.tower_name or None,
        device="cuda" if _on_gpu(config) else "cpu",
        dtype=config.dtype,
        batch=config.batch,
        threads=1,  # the executor divides the cores once it has counted the workers
        max_pixels=config.max_pixels,
        decode_threads=config.decode_threads,
        timeout_seconds=config.timeout_seconds,
        choice=choice,
        thumbnails=config.thumbnails,
        decoder=config.decoder,
        strict_sandbox=config.strict_sandbox,
    )


def _on_gpu(config: IndexConfig) -> bool:
    """Whether to compute on a GPU; asking torch would cost its import in a driver that needs none."""
    return config.device == "cuda" or (config.device == "auto" and os.path.exists("/dev/nvidiactl"))


class _Run:
    """The loop over examinations and segments: gives out work, collects it, commits it."""

    def __init__(
        self,
        plan: IndexPlan,
        archive: Archive,
        job: Job,
        result: IndexResult,
        report: Callable[[Progress], None],
    ):
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
        self._counted: dict[int, int] = {}  # frames of videos that are shown in part, in _unindexed

    def run(self, executor: "Executor") -> None:
        """Until every source is published, failed or skipped."""
        while self._unexamined or self._ready or executor.running or self._examined or self._elsewhere:
            self._give_out(executor)
            for outcome in executor.wait(timeout_seconds=0.5):
                self._take_in(outcome)
            if self._may_admit(executor):
                self._admit()
            if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
                self.commit()
            if self._elsewhere and not (self._unexamined or self._ready or executor.running):
                self._look_elsewhere()
            self._show(executor)
        self.commit()
        self._show(executor)

    def commit(self, is_last: bool = False) -> None:
        """Frames first, then the videos whose last segment is among them, and those that are to be shown in part.

        Args:
            is_last: the job ends here; what is committed of videos that are not whole is shown.
        """
        receipts = list(self._receipts)
        for number in {receipt.video_number for receipt in receipts if receipt.part is not None}:
            self._job.begin(number)
        landed = self._archive.parts.commit(receipts)  # which tells, where it is interrupted and done once more
        del self._receipts[: len(receipts)]
        self._result.frame_count += sum(receipt.frame_count for receipt, is_in in zip(receipts, landed) if is_in)
        for receipt in receipts:
            self._result.decode_seconds += receipt.decode_seconds
            self._result.encode_seconds += receipt.encode_seconds
            self._result.store_seconds += receipt.store_seconds
            self._settle(receipt)
        self._publish(is_last)
        if self._unindexed >= INDEX_FRAMES:
            update_index(self._archive)
            improve_index(self._archive)
            self._unindexed = 0
        self._last_commit = time.monotonic()

    def _publish(self, is_last: bool) -> None:
        finished = list(self._finished)
        now = time.monotonic()
        partly = [
            video
            for video in self._videos.values()
            if video.committed_since is not None and not video.is_settled
            if is_last or now - video.committed_since >= SHOW_PART_SECONDS
        ]
        rows = [*finished, *map(self._unfinished_row, partly)]
        published = self._archive.videos.publish(rows, self._restored) if rows else set()
        self._restored -= published  # what a user deletes after it was restored, and shown, stays deleted
        del self._finished[: len(finished)]
        for video in partly:
            video.is_settled = True
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
        """Whether a user has deleted a video while this job was at it."""
        row = self._archive.videos.row_of(video_id)
        return row is not None and row.status is Status.DELETED

    def _count_unindexed(self, finished: Sequence[VideoRow]) -> None:
        """Adds the frames that are shown since the last count."""
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
        while self._unexamined and executor.free("examine") > 0 and len(self._ready) < READY_SEGMENTS:
            asset = self._unexamined.popleft()
            executor.examine(asset, asset.uri, self._plan.contents.get(asset.uri))

    def _take_in(self, outcome: "Outcome") -> None:
        if outcome.kind == "encode":
            receipt: Receipt | None = outcome.result
            if receipt is None:
                assert outcome.problem is not None  # where there is no result
                receipt = _lost(outcome.key, outcome.problem)
            self._videos[receipt.segment.video_id].meter.finish(receipt.segment.key, receipt.end_seconds)
            self._receipts.append(receipt)
            return
        examined = outcome.result or Examined(None, None, outcome.problem)
        self._take_examined(outcome.key, examined)

    def _take_examined(self, asset: VideoAsset, examined: Examined) -> None:
        content = examined.content
        self._note_sandbox(content.video_id if content else None, examined.sandbox_missing)
        if content is not None:
            if content.video_id in self._seen:  # the same bytes under a second name in this very job
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
        """Whether to wait no longer for others to be examined; each admission is a commit, whatever it admits."""
        coming = executor.is_busy("examine") or (self._unexamined and len(self._ready) < READY_SEGMENTS)
        return not coming or time.monotonic() - self._last_admission >= ADMIT_SECONDS

    def _admit(self) -> None:
        """Gives the examined videos their numbers, in one commit, and lines up their segments."""
        examined, self._examined = self._examined, []
        if not examined:
            return
        self._last_admission = time.monotonic()
        numbers = self._archive.reserve([(content.video_id, self._sampling) for _, content, _ in examined])
        self._archive.refresh()
        for asset, content, probe in examined:
            number = numbers[content.video_id, str(self._sampling)]
            if not self._job.take(number):
                self._elsewhere.append((asset, content, probe))
                continue
            if self._is_done(content):  # by another job, since this one began
                self._job.release(number)
                self._skip(asset)
                continue
            segments = split(content.video_id, probe)
            keys = [segment.key for segment in segments]
            again = self._wanted.retry_failed
            done = self._archive.parts.committed(number, keys, whole_only=again)
            waiting = [segment for segment in segments if segment.key not in done]
            self._result.frames_resumed += self._archive.parts.frame_count(number, done)
            meter = self._meter.begin(asset.uri, probe, done)
            left = {segment.key for segment in waiting}
            since = time.monotonic() if done else None
            video = _Video(asset, content, probe, number, left, set(done), bool(done), meter, since)
            video.is_settled = number in self._archive.videos.published()
            self._videos[content.video_id] = video
            tasks = [SegmentTask(asset.uri, content, probe, segment, number, self._sampling) for segment in waiting]
            self._ready.extend(tasks)
            if not waiting:
                self._finish(video)

    def _look_elsewhere(self) -> None:
        """What other jobs have finished is done; what they have let go of unfinished, this one takes."""
        self.commit()
        time.sleep(ELSEWHERE_SECONDS)
        self._archive.refresh()
        elsewhere, self._elsewhere = self._elsewhere, []
        for asset, content, probe in elsewhere:
            if self._is_done(content):
                self._skip(asset)
                continue
            if row := self._archive.videos.row_of(content.video_id):  # what a manifest said to the job that was at it
                tags = row.tags if asset.tags is None else asset.tags
                asset = replace(asset, tags=tags)
                if asset.captured_at is None:
                    asset = replace(asset, captured_at=row.captured_at, captured_from=row.captured_from)
            self._examined.append((asset, content, probe))
        self._admit()

    def _is_done(self, content: Content) -> bool:
        """Whether a row has come since this job began, and leaves nothing to do."""
        row = self._archive.videos.row_of(content.video_id)
        if row is None or row == self._plan.by_id.get(content.video_id):
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
        if receipt.decoder == "pyav":  # it took over where decord met damage, if only in this segment
            video.probe = replace(video.probe, decoder="pyav")
        if not video.waiting:
            self._finish(video)

    def _finish(self, video: _Video) -> None:
        del self._videos[video.content.video_id]
        self._meter.end(video.asset.uri)
        frame_count = self._archive.parts.frame_count(video.number)
        problem = video.problem
        if not self._archive.parts.holds(video.number, video.held):
            problem = Problem(Reason.DAMAGED, "frames of it were taken out while this job worked")
        if is_whole(problem) and video.resumed:
            problem = min(self._archive.parts.problems(video.number), key=is_whole, default=problem)
        if frame_count == 0 and problem is None:
            problem = Problem(Reason.NO_FRAMES, "the video stream holds no frame that can be decoded")
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
            probe=probe,
            captured_at=asset.captured_at,
            captured_from=asset.captured_from,
            tags=asset.tags or {},
            attempts=attempts,
            indexed_at=datetime.now(UTC),
            sandbox_missing=self._sandbox_missing_of(content, number),
        )

    def _sandbox_missing_of(self, content: Content | None, number: int | None) -> tuple[str, ...] | None:
        """What was missing when this run read the video, or an earlier one whose frames stay."""
        missing = self._sandbox_missing.get(content.video_id) if content else None
        if content is None or missing is None:
            return None
        before = self._plan.by_id.get(content.video_id)
        if before is not None and before.video_number == number:
            missing = {*missing, *(before.sandbox_missing or ())}
        return tuple(sorted(missing))

    def _unfinished_row(self, video: _Video) -> VideoRow:
        """The row of a video of which frames are committed, and not all; it does not count this run yet."""
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
    """Of a source in bytes; nothing where that cannot be told, which the worker that looks at it says."""
    if content is not None:
        return content.size_bytes
    with contextlib.suppress(OSError, ValueError):
        return os.stat(file_path(asset.uri)).st_size
    return 0


def _dated(asset: VideoAsset, probe: Probe | None) -> VideoAsset:
    """The asset with the time of capture that its file gives, where nobody said another."""
    is_told = asset.captured_at is not None and asset.captured_from is CapturedFrom.MANIFEST
    if is_told or probe is None or probe.created_at is None:
        return asset
    return replace(asset, captured_at=probe.created_at, captured_from=CapturedFrom.FILE)


def _lost(task: SegmentTask, problem: Problem) -> Receipt:
    """The receipt of a segment whose worker could not write one."""
    return Receipt(task.segment, task.video_number, None, problem, task.probe.decoder, 0, 0.0, 0.0, 0.0)
