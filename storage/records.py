"""The nouns of the data's path: what one step hands to the next.

    VideoAsset -> Probe -> SegmentTask -> FrameBatch -> TokenBatch -> Receipt -> VideoRow
    question   -> Hit -> Moment -> Answer

Times are float64 seconds or integer ticks of the stream's time base; ranges are half-open.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from typing import TypeGuard, TypeVar

import numpy as np

Ticks = TypeVar("Ticks", np.ndarray, float)
FRAME_SIDE = 336  # every frame enters the model as 336 x 336 pixels (published code, load_video)


class Status(StrEnum):
    """How a video ended, or that it has not."""

    INDEXING = "indexing"  # its first segments can be searched; a job is at the others, or was interrupted
    INDEXED = "indexed"
    PARTIAL = "partial"
    FAILED = "failed"
    DELETED = "deleted"  # by a user; what is left says so, lest the next job index it again


class Reason(StrEnum):
    """Why a video is partial, failed or not whole yet, or what is to be known of one that is whole."""

    NOT_A_VIDEO = "not_a_video"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_FRAMES = "no_frames"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    ENCRYPTED = "encrypted"
    CLOCK_RESTARTED = "clock_restarted"  # every frame is there; an indexed video may have this reason
    UNSUPPORTED_CODEC = "unsupported_codec"
    OVERFLOW = "overflow"  # the model gives numbers of a frame that cannot be stored
    TOO_LARGE = "too_large"
    REFUSED_FORMAT = "refused_format"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    VANISHED = "vanished"
    CHANGED = "changed"
    PERMISSION = "permission"
    WORKER_LOST = "worker_lost"
    DAMAGED = "damaged"
    UNFINISHED = "unfinished"
    UNKNOWN = "unknown"

    @property
    def is_temporary(self) -> bool:
        """True where it lay with the machine or the moment, not with the bytes, so that the next run tries again."""
        return self in _MAY_PASS

    @property
    def is_note(self) -> bool:
        """True where nothing is missing or damaged, and the user should know about the video all the same."""
        return self is Reason.CLOCK_RESTARTED


_MAY_PASS = {
    Reason.VANISHED,
    Reason.CHANGED,
    Reason.PERMISSION,
    Reason.WORKER_LOST,
    Reason.DAMAGED,
    Reason.UNFINISHED,
    Reason.UNKNOWN,
}


@dataclass(frozen=True)
class Problem:
    """Why a video, or one segment of it, is not whole, or a note about a whole one."""

    reason: Reason
    detail: str


def is_damaged(problem: Problem | None) -> TypeGuard[Problem]:
    """Whether a video or segment with this problem lacks frames, or has damaged ones."""
    return problem is not None and not problem.reason.is_note


def is_whole(problem: Problem | None) -> bool:
    """Whether a video or segment with this problem has all its frames, undamaged."""
    return not is_damaged(problem)


class CapturedFrom(StrEnum):
    """Where the time of capture comes from: a manifest, which wins, or what the file says of its own creation."""

    MANIFEST = "manifest"
    FILE = "file"


@dataclass(frozen=True)
class VideoAsset:
    """A source as scan found it, not yet opened.

    Attributes:
        uri: where it is.
        captured_at: as a manifest says; None where it does not.
        tags: as a manifest says, all of them; None where it does not say, so that those that are known stay.
        captured_from: where captured_at comes from, where it is known.
    """

    uri: str
    captured_at: datetime | None = None
    tags: Mapping[str, str] | None = None
    captured_from: CapturedFrom = CapturedFrom.MANIFEST

    def __post_init__(self):
        if "://" not in self.uri:
            raise ValueError(f"VideoAsset.uri is no URI: {self.uri!r}")
        if self.captured_at is not None and self.captured_at.tzinfo is None:
            raise ValueError("VideoAsset.captured_at has no time zone")


@dataclass(frozen=True)
class Content:
    """The bytes of a source at one time: a video's identity, and how to notice that they changed."""

    video_id: str
    size_bytes: int
    mtime_ns: int

    def __post_init__(self):
        if not re.fullmatch(r"[0-9a-f]{64}", self.video_id):
            raise ValueError(f"Content.video_id is no SHA-256: {self.video_id!r}")


@dataclass(frozen=True)
class Probe:
    """What the video stream that ffmpeg's best-stream rule picks says about itself.

    Attributes:
        decoder: the library that reads this file right: "decord" or "pyav".
        container, codec: FFmpeg's names.
        width, height: pixels as shown, after rotation.
        rotation_degrees: 0, 90, 180 or 270 counter-clockwise, applied by decode.
        time_base: seconds per tick.
        first_ticks: presentation time of the first frame that decodes; the origin of the sampling grid.
        clock_offset_seconds: file clock minus the position a player shows.
        duration_seconds: the container's, or None where it does not say.
        cuts: ticks of keyframes at which a segment may begin, ascending, the file's first excluded, each
            with the rank of that frame in presentation order; empty where the file must be read in one piece.
        created_at: when the file says that it was made; None where it says nothing that can be.
    """

    decoder: str
    container: str
    codec: str
    stream_index: int
    width: int
    height: int
    rotation_degrees: int
    time_base: Fraction
    first_ticks: int
    clock_offset_seconds: float
    duration_seconds: float | None
    cuts: tuple[tuple[int, int], ...]
    created_at: datetime | None = None

    def __post_init__(self):
        if self.rotation_degrees not in (0, 90, 180, 270):
            raise ValueError(f"Probe.rotation_degrees is {self.rotation_degrees}")
        if self.time_base <= 0:
            raise ValueError(f"Probe.time_base is {self.time_base}")
        if self.created_at is not None and self.created_at.tzinfo is None:
            raise ValueError("Probe.created_at has no time zone")

    def pts_seconds(self, ticks: Ticks) -> Ticks:
        """The file's own clock."""
        return ticks * self.time_base.numerator / self.time_base.denominator

    def time_seconds(self, ticks: Ticks) -> Ticks:
        """The position a player shows."""
        return self.pts_seconds(ticks) - self.clock_offset_seconds

    def range_seconds(self, segment_key: str) -> tuple[float, float]:
        """Positions between which a segment lies; the first one begins at 0, the end of the last one is infinite."""
        start, end = segment_range(segment_key)
        return self.time_seconds(start) if math.isfinite(start) else 0.0, float(self.time_seconds(end))


@dataclass(frozen=True)
class Segment:
    """The unit of work: the frames of one video with start_ticks <= ticks < end_ticks.

    None is an open end: before the first frame, after the last. first_index is the rank, in presentation
    order, of the segment's first frame among all of the video's.
    """

    video_id: str
    start_ticks: int | None
    end_ticks: int | None
    first_index: int

    @property
    def key(self) -> str:
        """The time range as text, the same however the file was read."""
        start = "" if self.start_ticks is None else self.start_ticks
        end = "" if self.end_ticks is None else self.end_ticks
        return f"{start}..{end}"


SEGMENT_KEY = r"(?:-?[0-9]{1,19})?\.\.(?:-?[0-9]{1,19})?"


def segment_range(key: str) -> tuple[float, float]:
    """Start and end of a segment, in ticks, by its key, which fits SEGMENT_KEY; infinite where it is open."""
    start, end = key.split("..")
    return int(start) if start else -math.inf, int(end) if end else math.inf


def joined_key(keys: Sequence[str]) -> str:
    """The key of the segment that reaches from the start of the first to the end of the last."""
    return f"{keys[0].split('..')[0]}..{keys[-1].split('..')[1]}"


def lies_within(key: str, other: str) -> bool:
    """Whether a segment is the other one or a piece of it, by their keys."""
    (start, end), (other_start, other_end) = segment_range(key), segment_range(other)
    return other_start <= start and end <= other_end


class Choice(StrEnum):
    """Which frames of a video are kept: those shown at even instants, keyframes, or the first of each scene."""

    RATE = "rate"
    KEYFRAMES = "keyframes"
    SCENES = "scenes"


@dataclass(frozen=True)
class Sampling:
    """The settings besides the model that decide which rows an archive holds of a video.

    Attributes:
        fps: frames kept per second; of keyframes and scenes, at most so many.
        patches: rows of the patch tier, per picture.
        choice: which frames.
    """

    fps: Fraction
    patches: int
    choice: Choice = Choice.RATE

    def __post_init__(self):
        if self.fps <= 0:
            raise ValueError(f"Sampling.fps is {self.fps}")
        if self.patches < 0:
            raise ValueError(f"Sampling.patches is {self.patches}")

    def __str__(self) -> str:
        choice = "" if self.choice is Choice.RATE else f",sample={self.choice}"
        return f"fps={self.fps},patches={self.patches}{choice}"

    @classmethod
    def from_text(cls, text: str) -> "Sampling":
        """The settings that a row names, as str gives them.

        Raises:
            ValueError: the text is none that str gives.
        """
        number = r"[1-9][0-9]{0,39}"  # "1e999999999" would be worked out
        match = re.fullmatch(rf"fps=({number})(?:/({number}))?,patches=([0-9]{{1,9}})(?:,sample=([a-z]+))?", text)
        if match is None:
            raise ValueError(f"sampling {text[:60]!a} is none that vidx writes")
        fps, per, patches, choice = match.groups()
        return cls(Fraction(int(fps), int(per or 1)), int(patches), Choice(choice or Choice.RATE))


@dataclass(frozen=True)
class SegmentTask:
    """All that a worker must know to index one segment."""

    uri: str
    content: Content
    probe: Probe
    segment: Segment
    video_number: int
    sampling: Sampling


def _check(name: str, array: np.ndarray, dtype: type, shape: tuple[int | None, ...]) -> None:
    wrong_shape = array.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=False)
    )
    if array.dtype != dtype or wrong_shape:
        raise ValueError(f"{name} is {array.dtype}{array.shape}, wanted {np.dtype(dtype)}{shape}")


@dataclass(frozen=True, repr=False)
class FrameBatch:
    """T frames in presentation order, each with the span it stands for.

    Attributes:
        pixels: (T, 336, 336, 3) uint8, RGB, upright.
        ticks: (T,) int64, the frame's own presentation time.
        end_ticks: (T,) int64, where the next stored frame, or nothing, takes over.
        frame_index: (T,) int64, rank in presentation order among all of the video's frames.
        thumbnails: T small JPEG files, upright, aspect ratio kept.
    """

    pixels: np.ndarray
    ticks: np.ndarray
    end_ticks: np.ndarray
    frame_index: np.ndarray
    thumbnails: tuple[bytes, ...]

    def __post_init__(self):
        count = len(self.pixels)
        _check("FrameBatch.pixels", self.pixels, np.uint8, (count, FRAME_SIDE, FRAME_SIDE, 3))
        for name in ("ticks", "end_ticks", "frame_index"):
            _check(f"FrameBatch.{name}", getattr(self, name), np.int64, (count,))
        if len(self.thumbnails) != count:
            raise ValueError(f"FrameBatch.thumbnails has {len(self.thumbnails)} entries, wanted {count}")
        if np.any(self.end_ticks < self.ticks):
            raise ValueError("FrameBatch.end_ticks lies before ticks")

    def take(self, places: np.ndarray) -> "FrameBatch":
        """Some of the frames."""
        thumbnails = tuple(self.thumbnails[place] for place in places.tolist())
        pixels, ticks, end_ticks = self.pixels[places], self.ticks[places], self.end_ticks[places]
        return FrameBatch(pixels, ticks, end_ticks, self.frame_index[places], thumbnails)

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        return f"FrameBatch({len(self)} frames)"


@dataclass(frozen=True, repr=False)
class PatchRows:
    """The patch tier of T frames: K kept rows of the vision tower's layer -2 each, quantised.

    Attributes:
        values: (T, K, D) int8.
        scales: (T, K) float32; a row's features are values * scale.
        positions: (T, K) uint16, ascending: place of the row among all patches of the frame's pre-fusion input.
    """

    values: np.ndarray
    scales: np.ndarray
    positions: np.ndarray

    def __post_init__(self):
        frames, rows = self.values.shape[:2]
        _check("PatchRows.values", self.values, np.int8, (frames, rows, None))
        _check("PatchRows.scales", self.scales, np.float32, (frames, rows))
        _check("PatchRows.positions", self.positions, np.uint16, (frames, rows))

    def take(self, places: np.ndarray) -> "PatchRows":
        """Those of some frames."""
        return PatchRows(self.values[places], self.scales[places], self.positions[places])

    def __repr__(self) -> str:
        return f"PatchRows(values={self.values.shape})"


@dataclass(frozen=True, repr=False)
class TokenBatch:
    """What is stored of T frames.

    Attributes:
        token: (T, C*C, H) float16, the vision token after pre-fusion, as the LLM receives it.
        compressor_out: (T, C*C, D) float16, before the projector.
        search_key: (T, E) float16, L2-normalised; None where the model has no joint embedding.
        patches: the patch tier, or None.
    """

    token: np.ndarray
    compressor_out: np.ndarray
    search_key: np.ndarray | None
    patches: PatchRows | None

    def __post_init__(self):
        count = len(self.token)
        _check("TokenBatch.token", self.token, np.float16, (count, None, None))
        _check("TokenBatch.compressor_out", self.compressor_out, np.float16, (count, self.token.shape[1], None))
        if self.search_key is not None:
            _check("TokenBatch.search_key", self.search_key, np.float16, (count, None))
        if self.patches is not None and len(self.patches.values) != count:
            raise ValueError(f"TokenBatch.patches holds {len(self.patches.values)} frames, wanted {count}")

    def take(self, places: np.ndarray) -> "TokenBatch":
        """What is stored of some of the frames."""
        key, patches = self.search_key, self.patches
        return TokenBatch(
            self.token[places],
            self.compressor_out[places],
            None if key is None else key[places],
            None if patches is None else patches.take(places),
        )

    def __len__(self) -> int:
        return len(self.token)

    def __repr__(self) -> str:
        return f"TokenBatch(token={self.token.shape}, patches={self.patches!r})"


def join_tokens(batches: Sequence[TokenBatch]) -> TokenBatch:
    """What is stored of the frames of several batches, as one."""
    first, joined = batches[0], np.concatenate
    patches = None
    if first.patches is not None:
        columns = [vars(batch.patches) for batch in batches]
        patches = PatchRows(**{name: joined([each[name] for each in columns]) for name in columns[0]})
    return TokenBatch(
        joined([batch.token for batch in batches]),
        joined([batch.compressor_out for batch in batches]),
        None if first.search_key is None else joined([batch.search_key for batch in batches]),
        patches,
    )


@dataclass(frozen=True)
class Part:
    """A written Parquet file of frames, not yet committed.

    Attributes:
        path: relative to the frames table.
        row_count, size_bytes: of the file.
        stats_json: column bounds in Delta's form.
    """

    path: str
    row_count: int
    size_bytes: int
    stats_json: str


@dataclass(frozen=True)
class Receipt:
    """What comes back from a segment: where its rows lie, and what went wrong on the way.

    part is None where the segment gave no frame; problem is None where it is whole. end_seconds is the position at
    which its last frame ends, None where no frame was decoded. sandbox_missing names what the decoder was not kept
    from.
    """

    segment: Segment
    video_number: int
    part: Part | None
    problem: Problem | None
    decoder: str
    frame_count: int
    decode_seconds: float
    encode_seconds: float
    store_seconds: float
    end_seconds: float | None = None
    sandbox_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoRow:
    """One row of the videos table; publishing it makes the video's frames visible.

    Fields that only an opened file can tell are None where it could not be opened; known_* give them where they are
    there. attempts counts the runs that tried this content with these settings; indexed_at is when the last of them
    ended, None where none has, or where an older vidx did not say. captured_from means something where captured_at is
    known. sandbox_missing names what the processes that decoded it were not kept from (workers/sandbox.py), None where
    that is not known.
    """

    video_id: str | None
    video_number: int | None
    uri: str
    status: Status
    problem: Problem | None
    model_id: str
    sampling: str
    frame_count: int
    size_bytes: int | None
    mtime_ns: int | None
    probe: Probe | None
    captured_at: datetime | None
    tags: Mapping[str, str]
    attempts: int
    indexed_at: datetime | None = None
    captured_from: CapturedFrom = CapturedFrom.MANIFEST
    sandbox_missing: tuple[str, ...] | None = None

    @property
    def known_id(self) -> str:
        """video_id, of a video whose file could be opened."""
        assert self.video_id is not None
        return self.video_id

    @property
    def known_number(self) -> int:
        """video_number, of a video with frames or of one that is being indexed."""
        assert self.video_number is not None
        return self.video_number

    @property
    def known_probe(self) -> Probe:
        """probe, of a video with frames."""
        assert self.probe is not None
        return self.probe

    @property
    def known_problem(self) -> Problem:
        """problem, of a video that is not whole."""
        assert self.problem is not None
        return self.problem


@dataclass(frozen=True)
class Hit:
    """One frame that answers a search, with the cosine of the search keys."""

    video_number: int
    frame_index: int
    score: float


@dataclass(frozen=True)
class Moment:
    """A stretch of one video that answers a search; times are positions that a player shows.

    score is the mean of its frames' cosines, or None where every frame was taken without a search.
    """

    video_id: str
    video_number: int
    uri: str
    start_seconds: float
    end_seconds: float
    best_seconds: float
    score: float | None

    @property
    def known_score(self) -> float:
        """score, of a moment that a search found."""
        assert self.score is not None
        return self.score


@dataclass(frozen=True)
class FrameRef:
    """One stored frame and where its cells lie: row `row` of the Parquet file `part`."""

    video_id: str
    video_number: int
    frame_index: int
    ticks: int
    time_seconds: float
    duration_seconds: float
    part: str
    row: int


@dataclass(frozen=True)
class WindowAnswer:
    """What the model says of one stretch of the frames, from one position to another.

    unknown says why the model does not know, where its files list the text as an answer that says so; else it is empty.
    """

    uri: str
    start_seconds: float
    end_seconds: float
    text: str
    unknown: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model says, and the moments it was shown.

    Attributes:
        question, text: what was asked and answered.
        moments: what the frames are of.
        fuse, fuse_note: what pre-fusion read, and why not something better.
        frame_count: frames that the model was shown.
        video_bytes_read: of video files.
        over: how they were chosen where there were more than the context holds: "retrieve", "stride" or "windows".
        windows: the answers that the last one was made from, where it was.
        memory_bytes: that the answer takes besides the model, as reckoned beforehand.
        unknown: why the model does not know, where its files list the text as an answer that says so; of windows, where
            it knows nothing of any of them. Else empty.
    """

    question: str
    text: str
    moments: tuple[Moment, ...]
    fuse: str
    fuse_note: str
    frame_count: int
    video_bytes_read: int
    over: str = ""
    windows: tuple[WindowAnswer, ...] = ()
    memory_bytes: int = 0
    unknown: str = ""
