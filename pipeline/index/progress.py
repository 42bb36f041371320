"""progress: how much of a job is done, in seconds of video, and how long the rest takes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from storage.records import Probe

MEMORY_SECONDS = 300.0  # work from longer ago than this counts little for the speed
LEAST_SECONDS = 2.0  # of work; before that, there is no estimate
LEAST_BYTES_PER_SECOND = 100  # of a video; a file that states a greater length is not believed


@dataclass(frozen=True)
class FileAtWork:
    """A source that workers work on.

    Attributes:
        uri: of the source.
        done_seconds: how much of it is done; None while it is examined.
        length_seconds: its length; None if it is unknown.
    """

    uri: str
    done_seconds: float | None
    length_seconds: float | None


@dataclass(frozen=True)
class Progress:
    """The state of a running job; all seconds except seconds_left are seconds of video.

    Attributes:
        videos_done, video_count: sources that are finished, and all that the job tries.
        frames_done: frames of finished segments, computed by this job; they stay if it is interrupted.
        frames_at_work: computed frames of unfinished segments.
        frames_resumed: frames that earlier jobs have committed.
        done_seconds: finished part of all sources, including what earlier jobs have done.
        total_seconds: length of all sources; estimated from file sizes if unknown; None without any known length.
        seconds_left: time until the job ends, at its present speed; None without an estimate.
        files: the sources that workers work on.
    """

    videos_done: int
    video_count: int
    frames_done: int
    frames_at_work: int
    frames_resumed: int
    done_seconds: float
    total_seconds: float | None
    seconds_left: float | None
    files: tuple[FileAtWork, ...]


Report = Callable[[Progress], None]  # is called a few times per second


class Speed:
    """The speed at which an amount grows, mostly in the last MEMORY_SECONDS."""

    def __init__(self):
        self._last: tuple[float, float] | None = None
        self._grown = self._span = 0.0

    def add(self, now: float, amount: float) -> None:
        """Adds the amount at a time; the first call is the start."""
        if self._last is not None:
            passed = now - self._last[0]
            fade = math.exp(-passed / MEMORY_SECONDS)
            self._grown = self._grown * fade + amount - self._last[1]
            self._span = self._span * fade + passed
        self._last = now, amount

    def seconds_for(self, amount: float) -> float | None:
        """How long it takes to grow by an amount; None if it has not grown, or not for long enough."""
        if self._grown <= 0 or self._span < LEAST_SECONDS:
            return None
        return amount * self._span / self._grown


class VideoMeter:
    """How much of one video is done: its finished segments, and the finished part of the others.

    Attributes:
        length_seconds: length that the file states, but no more than its size can hold; None if it states none.
        resumed_seconds: seconds that earlier jobs have committed.
    """

    def __init__(self, probe: Probe, size_bytes: int, resumed_keys: Iterable[str]):
        self.length_seconds = probe.duration_seconds
        if self.length_seconds is not None and size_bytes:
            self.length_seconds = min(self.length_seconds, size_bytes / LEAST_BYTES_PER_SECOND)
        self._probe = probe
        self._ended: dict[str, float] = {}  # seconds of each segment
        self._at_work: dict[str, tuple[float, int]] = {}  # seconds and frames
        for key in resumed_keys:
            self.finish(key, self.length_seconds)
        self.resumed_seconds = self.done_seconds

    @property
    def done_seconds(self) -> float:
        """Finished seconds of all segments."""
        return sum(self._ended.values()) + sum(seconds for seconds, _ in self._at_work.values())

    @property
    def frames_at_work(self) -> int:
        """Computed frames of unfinished segments."""
        return sum(frame_count for _, frame_count in self._at_work.values())

    def reach(self, key: str, position_seconds: float, frame_count: int) -> None:
        """Notes that a worker has reached a position in a segment; ignored if the segment is finished."""
        if key not in self._ended:
            start, end = self._probe.range_seconds(key)
            self._at_work[key] = max(0.0, min(position_seconds, end) - start), frame_count

    def finish(self, key: str, end_seconds: float | None) -> None:
        """Notes that a segment is finished or has failed; end_seconds is used for the last one, which has no end."""
        start, end = self._probe.range_seconds(key)
        self._at_work.pop(key, None)
        if math.isinf(end):
            end = start if end_seconds is None else end_seconds
        self._ended[key] = max(0.0, end - start)


class Meter:
    """Sums up what a job has done, and estimates how long the rest takes.

    The length of a video is the one that it states, unless its size cannot hold so much. The length of an unexamined
    video, or of one that states none, is estimated from its size and the average of the others.
    """

    def __init__(self, size_bytes: Mapping[str, int]):
        """Begins with unexamined sources; `size_bytes` has their sizes by URI."""
        self._unseen = dict(size_bytes)
        self._unseen_bytes = sum(self._unseen.values())
        self._at_work: dict[str, tuple[VideoMeter, int]] = {}
        self._finished_seconds = 0.0
        self._measured_seconds, self._measured_bytes = 0.0, 0
        self._resumed_seconds = 0.0
        self._speed = Speed()

    def leave_out(self, uri: str) -> None:
        """Notes that a source needs no work: it cannot be read, or the archive already holds it."""
        self._unseen_bytes -= self._unseen.pop(uri, 0)

    def begin(self, uri: str, probe: Probe, resumed_keys: Iterable[str]) -> VideoMeter:
        """Notes that a source is examined, and which of its segments earlier jobs have committed."""
        size = self._unseen.pop(uri, 0)
        self._unseen_bytes -= size
        video = VideoMeter(probe, size, resumed_keys)
        self._at_work[uri] = video, size
        self._resumed_seconds += video.resumed_seconds
        if video.length_seconds:
            self._measured_seconds += video.length_seconds
            self._measured_bytes += size
        return video

    def end(self, uri: str) -> None:
        """Notes that all segments of a source are finished."""
        video, _ = self._at_work.pop(uri)
        self._finished_seconds += video.done_seconds  # may be less than the file states

    @property
    def done_seconds(self) -> float:
        """Finished seconds of all sources, including what earlier jobs have done."""
        return self._finished_seconds + sum(video.done_seconds for video, _ in self._at_work.values())

    @property
    def total_seconds(self) -> float | None:
        """Seconds of all sources; None if the length of the rest cannot be estimated."""
        lengths = [(video.length_seconds, video.done_seconds, size) for video, size in self._at_work.values()]
        guessed_bytes = self._unseen_bytes + sum(size for length, _, size in lengths if length is None)
        if guessed_bytes and not self._measured_bytes:
            return None
        each_byte = self._measured_seconds / self._measured_bytes if guessed_bytes else 0.0
        known = sum(max(size * each_byte if length is None else length, done) for length, done, size in lengths)
        return self._finished_seconds + known + self._unseen_bytes * each_byte

    def look(self, now: float) -> None:
        """Notes how much is done now; the first call is the start."""
        self._speed.add(now, self.done_seconds - self._resumed_seconds)

    @property
    def seconds_left(self) -> float | None:
        """Time until all is done, at the speed of this job; None without an estimate."""
        total = self.total_seconds
        return None if total is None else self._speed.seconds_for(total - self.done_seconds)
