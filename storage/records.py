"""The data that one step hands to the next.

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
    """The state of a video in an archive."""

    INDEXING = "indexing"  # some segments can be searched; a job indexes the others, or was interrupted
    INDEXED = "indexed"
    PARTIAL = "partial"
    FAILED = "failed"
    DELETED = "deleted"  # by a user; the row stays, so that the next job does not index the video again


class Reason(StrEnum):
    """Why a video is partial, failed or not whole yet; or a note about a whole video."""

    NOT_A_VIDEO = "not_a_video"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_FRAMES = "no_frames"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    ENCRYPTED = "encrypted"
    CLOCK_RESTARTED = "clock_restarted"  # all frames are there; an indexed video may have this reason
    UNSUPPORTED_CODEC = "unsupported_codec"
    OVERFLOW = "overflow"  # the model's numbers for a frame are too large to be stored
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
        """Whether the machine or the moment is the cause, not the video's content, so that the next run tries again."""
        return self.name in ("VANISHED", "CHANGED", "PERMISSION", "WORKER_LOST", "DAMAGED", "UNFINISHED", "UNKNOWN")

    @property
    def is_note(self) -> bool:
        """Whether nothing is missing or damaged, but the user should know about it."""
        return self is Reason.CLOCK_RESTARTED


@dataclass(frozen=True)
class Problem:
    """Why a video or a segment is not whole, or a note about a whole one."""

    reason: Reason
    detail: str


def is_damaged(problem: Problem | None) -> TypeGuard[Problem]:
    """Whether a video or segment with this problem lacks frames, or has damaged ones."""
    return problem is not None and not problem.reason.is_note


def is_whole(problem: Problem | None) -> bool:
    """Whether a video or segment with this problem has all its frames, undamaged."""
    return not is_damaged(problem)


class CapturedFrom(StrEnum):
    """Where the time of capture comes from: a manifest, which has priority, or the creation time in the file."""

    MANIFEST = "manifest"
    FILE = "file"


@dataclass(frozen=True, slots=True)  # a job may have a million
class VideoAsset:
    """A source that scan has found and nobody has opened yet.

    Attributes:
        uri: the URI of the file.
        captured_at: the time of capture in the manifest, or None.
        tags: all tags in the manifest; None if it has none, and then the known tags of the video stay.
        captured_from: where captured_at comes from.
    """

    uri: str
    captured_at: datetime | None = None
    tags: Mapping[str, str] | None = None
    captured_from: CapturedFrom = CapturedFrom.MANIFEST

    def __post_init__(self):
        if "://" not in self.uri:
            raise ValueError(f"VideoAsset.uri is not a URI: {self.uri!r}")
        if self.captured_at is not None and self.captured_at.tzinfo is None:
            raise ValueError("VideoAsset.captured_at has no time zone")


@dataclass(frozen=True)
class Content:
    """The identity of a video's content, and the size and time by which a change of the file is noticed.

    Attributes:
        is_settled: whether the file had not changed for a while when it was read. One that had may change again without
            a new time, since the times of a file system are coarse.
    """

    video_id: str
    size_bytes: int
    mtime_ns: int
    is_settled: bool = True

    def __post_init__(self):
        if not re.fullmatch(r"[0-9a-f]{64}", self.video_id):
            raise ValueError(f"Content.video_id is not a SHA-256: {self.video_id!r}")


@dataclass(frozen=True)
class Probe:
    """The properties of a file's video stream; of several streams, the one that ffmpeg's best-stream rule picks.

    Attributes:
        decoder: the library that reads this file correctly: "decord" or "pyav".
        container, codec: FFmpeg's names.
        width, height: pixels as shown, after rotation.
        rotation_degrees: 0, 90, 180 or 270 counter-clockwise, applied by decode.
        time_base: seconds per tick.
        first_ticks: presentation time of the first frame that decodes; the origin of the sampling grid.
        clock_offset_seconds: the file's clock minus the position that a player shows.
        duration_seconds: as the container says, or None.
        cuts: ticks of keyframes at which a segment may begin, ascending, without the file's first, each with the
            rank of the frame in presentation order; empty if the file must be read in one piece.
        created_at: the creation time in the file; None if there is none, or an impossible one.
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
        """Seconds on the file's own clock."""
        return ticks * self.time_base.numerator / self.time_base.denominator

    def time_seconds(self, ticks: Ticks) -> Ticks:
        """The position that a player shows, in seconds."""
        return self.pts_seconds(ticks) - self.clock_offset_seconds

    def range_seconds(self, segment_key: str) -> tuple[float, float]:
        """Start and end of a segment as positions; the first segment starts at 0, the last one ends at infinity."""
        start, end = segment_range(segment_key)
        return self.time_seconds(start) if math.isfinite(start) else 0.0, float(self.time_seconds(end))


@dataclass(frozen=True)
class Segment:
    """The unit of work: the frames of one video with start_ticks <= ticks < end_ticks; None means no limit.

    first_index is the rank, in presentation order, of the segment's first frame among all frames of the video.
    """

    video_id: str
    start_ticks: int | None
    end_ticks: int | None
    first_index: int

    @property
    def key(self) -> str:
        """The time range as text; it does not depend on how the file was read."""
        start = "" if self.start_ticks is None else self.start_ticks
        end = "" if self.end_ticks is None else self.end_ticks
        return f"{start}..{end}"


SEGMENT_KEY = r"(?:-?[0-9]{1,19})?\.\.(?:-?[0-9]{1,19})?"


def segment_range(key: str) -> tuple[float, float]:
    """Start and end of a segment in ticks, from its key (see SEGMENT_KEY); infinite if there is no limit."""
    start, end = key.split("..")
    return int(start) if start else -math.inf, int(end) if end else math.inf


def joined_key(keys: Sequence[str]) -> str:
    """The key of the segment from the start of the first to the end of the last."""
    return f"{keys[0].split('..')[0]}..{keys[-1].split('..')[1]}"


def lies_within(key: str, other: str) -> bool:
    """Whether a segment is the other one or a part of it, by their keys."""
    (start, end), (other_start, other_end) = segment_range(key), segment_range(other)
    return other_start <= start and end <= other_end


class Choice(StrEnum):
    """Which frames of a video are kept: frames at a constant rate, keyframes, or the first frame of each scene."""

    RATE = "rate"
    KEYFRAMES = "keyframes"
    SCENES = "scenes"


@dataclass(frozen=True)
class Sampling:
    """The settings, besides the model, that determine the rows of a video in an archive.

    Attributes:
        fps: frames kept per second; the maximum for keyframes and scenes.
        patches: the number of patch rows per frame.
        choice: which frames are kept.
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
        """The settings from a text that str has made.

        Raises:
            ValueError: the text is another one.
        """
        number = r"[1-9][0-9]{0,39}"  # Fraction would compute "1e999999999"
        match = re.fullmatch(rf"fps=({number})(?:/({number}))?,patches=([0-9]{{1,9}})(?:,sample=([a-z]+))?", text)
        if match is None:
            raise ValueError(f"sampling {text[:60]!a} is not a text that vidx writes")
        fps, per, patches, choice = match.groups()
        return cls(Fraction(int(fps), int(per or 1)), int(patches), Choice(choice or Choice.RATE))


@dataclass(frozen=True)
class SegmentTask:
    """All that a worker needs to index one segment; folder is that of the video's shard in the folder of frames."""

    uri: str
    content: Content
    probe: Probe
    segment: Segment
    video_number: int
    sampling: Sampling
    folder: str = ""


def check_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError if an array has another dtype or shape; None: any length of this dimension."""
    wrong_shape = array.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=False)
    )
    if array.dtype != dtype or wrong_shape:
        raise ValueError(f"{name} is {array.dtype}{array.shape}, wanted {np.dtype(dtype)}{shape}")


@dataclass(frozen=True, repr=False)
class FrameBatch:
    """T frames in presentation order, each with the time span for which it is shown.

    Attributes:
        pixels: (T, 336, 336, 3) uint8, RGB, upright.
        ticks: (T,) int64, the presentation time.
        end_ticks: (T,) int64, the time at which the next stored frame, or nothing, is shown.
        frame_index: (T,) int64, rank in presentation order among all frames of the video.
        thumbnails: T small JPEG files, upright, aspect ratio kept.
    """

    pixels: np.ndarray
    ticks: np.ndarray
    end_ticks: np.ndarray
    frame_index: np.ndarray
    thumbnails: tuple[bytes, ...]

    def __post_init__(self):
        count = len(self.pixels)
        check_array("FrameBatch.pixels", self.pixels, np.uint8, (count, FRAME_SIDE, FRAME_SIDE, 3))
        for name in ("ticks", "end_ticks", "frame_index"):
            check_array(f"FrameBatch.{name}", getattr(self, name), np.int64, (count,))
        if len(self.thumbnails) != count:
            raise ValueError(f"FrameBatch.thumbnails has {len(self.thumbnails)} entries, wanted {count}")
        if np.any(self.end_ticks < self.ticks):
            raise ValueError("FrameBatch.end_ticks lies before ticks")

    def take(self, places: np.ndarray) -> "FrameBatch":
        """The frames at these places."""
        thumbnails = tuple(self.thumbnails[place] for place in places.tolist())
        pixels, ticks, end_ticks = self.pixels[places], self.ticks[places], self.end_ticks[places]
        return FrameBatch(pixels, ticks, end_ticks, self.frame_index[places], thumbnails)

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        return f"FrameBatch({len(self)} frames)"


def join_frames(batches: Sequence[FrameBatch]) -> FrameBatch:
    """The frames of several batches, one after the other."""
    if len(batches) == 1:
        return batches[0]
    arrays = ("pixels", "ticks", "end_ticks", "frame_index")
    joined = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in arrays}
    return FrameBatch(**joined, thumbnails=tuple(picture for batch in batches for picture in batch.thumbnails))


@dataclass(frozen=True, repr=False)
class PatchRows:
    """The patch rows of T frames: for each, K rows of the vision tower's layer -2, quantised.

    Attributes:
        values: (T, K, D) int8.
        scales: (T, K) float32; a row's features are values * scale.
        positions: (T, K) uint16, ascending: index of the row among all patches of the frame's pre-fusion input.
    """

    values: np.ndarray
    scales: np.ndarray
    positions: np.ndarray

    def __post_init__(self):
        frames, rows = self.values.shape[:2]
        check_array("PatchRows.values", self.values, np.int8, (frames, rows, None))
        check_array("PatchRows.scales", self.scales, np.float32, (frames, rows))
        check_array("PatchRows.positions", self.positions, np.uint16, (frames, rows))

    def take(self, places: np.ndarray) -> "PatchRows":
        """The patch rows of the frames at these places."""
        return PatchRows(self.values[places], self.scales[places], self.positions[places])

    def __repr__(self) -> str:
        return f"PatchRows(values={self.values.shape})"


@dataclass(frozen=True, repr=False)
class TokenBatch:
    """The model's outputs for T frames, as they are stored.

    Attributes:
        token: (T, C*C, H) float16, the vision token after pre-fusion, as the LLM receives it.
        compressor_out: (T, C*C, D) float16, before the projector.
        search_key: (T, E) float16, L2-normalised; None if the model has no joint embedding.
        patches: the patch rows, or None.
    """

    token: np.ndarray
    compressor_out: np.ndarray
    search_key: np.ndarray | None
    patches: PatchRows | None

    def __post_init__(self):
        count = len(self.token)
        check_array("TokenBatch.token", self.token, np.float16, (count, None, None))
        check_array("TokenBatch.compressor_out", self.compressor_out, np.float16, (count, self.token.shape[1], None))
        if self.search_key is not None:
            check_array("TokenBatch.search_key", self.search_key, np.float16, (count, None))
        if self.patches is not None and len(self.patches.values) != count:
            raise ValueError(f"TokenBatch.patches holds {len(self.patches.values)} frames, wanted {count}")

    def take(self, places: np.ndarray) -> "TokenBatch":
        """The outputs for the frames at these places."""
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
    """Several batches as one."""
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
    """The result of indexing a segment: its part, and its problem.

    part is None if the segment has no frame; problem is None if it is whole. end_seconds is the position at which its
    last frame ends, None if no frame was decoded. sandbox_missing lists the protections that the decoder ran without.
    node is the id of the cluster's node that decoded.
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
    node: str = ""


@dataclass(frozen=True)
class VideoRow:
    """One row of the videos table; publishing it makes the video's frames visible.

    Fields that come from the opened file are None if it could not be opened; the known_* properties assert that they
    are not None. attempts is the number of runs that tried this content with these settings. indexed_at is the end of
    the last run, None if no run has ended, or in rows of an older vidx. captured_from is used only with captured_at.
    sandbox_missing lists the protections that the decoders ran without (workers/sandbox.py), None if that is unknown.
    mtime_ns and is_settled are of the file as in Content; is_settled is False in rows of an older vidx.
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
    is_settled: bool = False

    @property
    def known_id(self) -> str:
        """The video_id of a video whose file could be opened."""
        assert self.video_id is not None
        return self.video_id

    @property
    def known_number(self) -> int:
        """The video_number of a video that has frames or is being indexed."""
        assert self.video_number is not None
        return self.video_number

    @property
    def known_probe(self) -> Probe:
        """The probe of a video with frames."""
        assert self.probe is not None
        return self.probe

    @property
    def known_problem(self) -> Problem:
        """The problem of a video that is not whole."""
        assert self.problem is not None
        return self.problem


@dataclass(frozen=True)
class Hit:
    """One frame that a search has found, with the cosine of the search keys."""

    video_number: int
    frame_index: int
    score: float


@dataclass(frozen=True)
class Moment:
    """A time range of one video that a search has found; times are positions that a player shows.

    score is the mean of its frames' cosines, or None if there was no search.
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
        """The score of a moment that a search found."""
        assert self.score is not None
        return self.score


@dataclass(frozen=True)
class FrameRef:
    """One stored frame; its cells are in row `row` of the Parquet file `part`."""

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
    """The model's answer for the frames between two positions.

    unknown says why the model does not know the answer, if its files list this text as such an answer; else it is
    empty.
    """

    uri: str
    start_seconds: float
    end_seconds: float
    text: str
    unknown: str = ""


@dataclass(frozen=True)
class Answer:
    """The model's answer, and the moments that it was shown.

    Attributes:
        question, text: the question and the answer.
        moments: the moments of the frames.
        fuse, fuse_note: what pre-fusion has read, and why nothing better.
        frame_count: the number of frames that the model was shown.
        video_bytes_read: the number of bytes read from video files.
        over: how the frames were chosen, if the context is too small for all: "retrieve", "stride" or "windows".
        windows: the answers from which the last one was made, if any.
        memory_bytes: the estimated memory that the answer needs besides the model.
        unknown: why the model does not know the answer, if its files list this text as such an answer; with windows, if
            this is so for all of them. Else empty.
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
