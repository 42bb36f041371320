"""progress: how far a job is, in seconds of video, and how long the rest takes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from storage.records import Probe

MEMORY_SECONDS = 300.0  # what was done longer ago than this counts little for the speed: steady, and not deaf
LEAST_SECONDS = 2.0  # of work, before its speed says anything


@dataclass(frozen=True)
class FileAtWork:
    """A source that workers are at.

    Attributes:
        uri: of the source.
        done_seconds: how much of it is done; None while it is only being looked at.
        length_seconds: how long it is, where that is known.
    """

    uri: str
    done_seconds: float | None
    length_seconds: float | None


@dataclass(frozen=True)
class Progress:
    """Where a running job stands; all seconds but seconds_left are seconds of video.

    Attributes:
        videos_done, video_count: sources that have ended, of all that need work.
        frames_done: computed by this job, of segments that have ended, so that they stay where it is interrupted.
        frames_at_work: computed of segments that have not ended.
        frames_resumed: which earlier jobs had committed.
        done_seconds: of all sources together, what was resumed included.
        total_seconds: how long they all are, as far as known, else as their sizes suggest; None where nothing is known.
        seconds_left: until the job ends, at its present speed; None where that cannot be told yet.
        files: what workers are at.
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


class Speed:
    """How fast something grows, over the last minutes: exact at first, then fading with MEMORY_SECONDS."""

    def __init__(self):
        self._last: tuple[float, float] | None = None
        self._grown = self._span = 0.0

    def add(self, now: float, amount: float) -> None:
        """The amount at a time; the first call is the start."""
        if self._last is not None:
            passed = now - self._last[0]
            fade = math.exp(-passed / MEMORY_SECONDS)
            self._grown = self._grown * fade + amount - self._last[1]
            self._span = self._span * fade + passed
        self._last = now, amount

    def seconds_for(self, amount: float) -> float | None:
        """How long it takes to grow by an amount; None where it has not grown, or not for long enough."""
        if self._grown <= 0 or self._span < LEAST_SECONDS:
            return None
        return amount * self._span / self._grown


class VideoMeter:
    """How much of one video is done: segments that have ended, and of those at work what workers have reached.

    Attributes:
        length_seconds: what the file says; None where it does not.
        resumed_seconds: of what earlier jobs have committed.
    """

    def __init__(self, probe: Probe, resumed_keys: Iterable[str]):
        self.length_seconds = probe.duration_seconds
        self._probe = probe
        self._ended: dict[str, float] = {}  # seconds of each segment
        self._at_work: dict[str, tuple[float, int]] = {}  # seconds and frames
        for key in resumed_keys:
            self.finish(key, self.length_seconds)
        self.resumed_seconds = self.done_seconds

    @property
    def done_seconds(self) -> float:
        """Of all segments."""
        return sum(self._ended.values()) + sum(seconds for seconds, _ in self._at_work.values())

    @property
    def frames_at_work(self) -> int:
        """Computed of segments that have not ended."""
        return sum(frame_count for _, frame_count in self._at_work.values())

    def reach(self, key: str, position_seconds: float, frame_count: int) -> None:
        """A worker has come to a position in a segment, with so many frames; nothing where that has ended since."""
        if key not in self._ended:
            start, end = self._probe.range_seconds(key)
            self._at_work[key] = max(0.0, min(position_seconds, end) - start), frame_count

    def finish(self, key: str, end_seconds: float | None) -> None:
        """A segment has ended, well or not.

        Args:
            key: of the segment.
            end_seconds: where its last frame ends, which is what counts where the segment has no end of its own.
        """
        start, end = self._probe.range_seconds(key)
        self._at_work.pop(key, None)
        if math.isinf(end):
            end = start if end_seconds is None else end_seconds
        self._ended[key] = max(0.0, end - start)


class Meter:
    """Adds up what a job has done, and foretells how long the rest takes.

    A video counts as long as it says. One that nobody has looked at yet, or that does not say, counts by its bytes, as
    the others do on average.
    """

    def __init__(self, size_bytes: Mapping[str, int]):
        """Begins with sources that nobody has looked at; size_bytes: of each uri."""
        self._unseen = dict(size_bytes)
        self._unseen_bytes = sum(self._unseen.values())
        self._at_work: dict[str, tuple[VideoMeter, int]] = {}
        self._finished_seconds = 0.0
        self._measured_seconds, self._measured_bytes = 0.0, 0
        self._resumed_seconds = 0.0
        self._speed = Speed()

    def leave_out(self, uri: str) -> None:
        """A source that gives no work after all: it cannot be read, or the archive holds it."""
        self._unseen_bytes -= self._unseen.pop(uri, 0)

    def begin(self, uri: str, probe: Probe, resumed_keys: Iterable[str]) -> VideoMeter:
        """A source that workers will be given; of which earlier jobs have committed some segments."""
        size = self._unseen.pop(uri, 0)
        self._unseen_bytes -= size
        video = VideoMeter(probe, resumed_keys)
        self._at_work[uri] = video, size
        self._resumed_seconds += video.resumed_seconds
        if probe.duration_seconds:
            self._measured_seconds += probe.duration_seconds
            self._measured_bytes += size
        return video

    def end(self, uri: str) -> None:
        """All segments of a source have ended."""
        video, _ = self._at_work.pop(uri)
        self._finished_seconds += video.done_seconds  # which may be less than the file says

    @property
    def done_seconds(self) -> float:
        """Of all sources, with what was resumed."""
        return self._finished_seconds + sum(video.done_seconds for video, _ in self._at_work.values())

    @property
    def total_seconds(self) -> float | None:
        """Of all sources; None where nothing is known of those that are left."""
        lengths = [(video.length_seconds, video.done_seconds, size) for video, size in self._at_work.values()]
        guessed_bytes = self._unseen_bytes + sum(size for length, _, size in lengths if length is None)
        if guessed_bytes and not self._measured_bytes:
            return None
        each_byte = self._measured_seconds / self._measured_bytes if guessed_bytes else 0.0
        known = sum(max(size * each_byte if length is None else length, done) for length, done, size in lengths)
        return self._finished_seconds + known + self._unseen_bytes * each_byte

    def look(self, now: float) -> None:
        """Notes how much is done at a time; the first call is the start."""
        self._speed.add(now, self.done_seconds - self._resumed_seconds)

    @property
    def seconds_left(self) -> float | None:
        """Until all is done, at the speed of this job alone; None where that cannot be told."""
        total = self.total_seconds
        return None if total is None else self._speed.seconds_for(total - self.done_seconds)
