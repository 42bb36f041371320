"""Small archives with random rows, written by the real writers; every row is kept beside them to compare with."""

import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import numpy as np

from storage.archive.archive import Archive
from storage.care.clean import UNNAMED_KEPT_SECONDS
from storage.files import local_path
from storage.parts.write import FrameColumns, PartWriter
from storage.records import (
    FrameRef,
    Part,
    PatchRows,
    Probe,
    Problem,
    Reason,
    Receipt,
    Sampling,
    Segment,
    Status,
    TokenBatch,
    VideoRow,
)

MODEL_ID = "a1" * 32
SAMPLING = Sampling(Fraction(1), 0)
TIME_BASE = Fraction(1, 10)
SHOT_FRAMES = 1  # of so many frames after each other the search keys are alike
PROBE = Probe("pyav", "mov,mp4", "h264", 0, 640, 360, 90, TIME_BASE, 0, 1.5, 5.25, ())


@dataclass(frozen=True)
class Rows:
    """What was written of T frames."""

    columns: FrameColumns
    tokens: TokenBatch
    thumbnails: list[bytes]

    def cut(self, start: int, end: int) -> "Rows":
        """Rows start to end."""
        rows = slice(start, end)
        columns = FrameColumns(*(getattr(self.columns, name)[rows] for name in FrameColumns.__dataclass_fields__))
        key, patches = self.tokens.search_key, self.tokens.patches
        if patches is not None:
            patches = PatchRows(patches.values[rows], patches.scales[rows], patches.positions[rows])
        key = None if key is None else key[rows]
        tokens = TokenBatch(self.tokens.token[rows], self.tokens.compressor_out[rows], key, patches)
        return Rows(columns, tokens, self.thumbnails[rows])


def random_rows(
    count: int,
    seed: int = 0,
    token_shape: tuple[int, int] = (1, 24),
    width: int = 6,
    key_width: int | None = 16,
    patches: tuple[int, int] | None = None,
    start: int = 0,
) -> Rows:
    """Rows of one frame a second, the rank counting 25 frames a second, the first shown at `start` seconds."""
    random = np.random.default_rng(seed)
    seconds = np.arange(start, start + count, dtype=np.int64)
    key = None
    if key_width is not None:
        shots = random.standard_normal((count // SHOT_FRAMES + 1, key_width)).repeat(SHOT_FRAMES, axis=0)[:count]
        key = shots if SHOT_FRAMES == 1 else shots + 0.15 * random.standard_normal((count, key_width))
        key = (key / np.linalg.norm(key, axis=1, keepdims=True)).astype(np.float16)
    kept = None
    if patches is not None:
        rows, patch_width = patches
        kept = PatchRows(
            random.integers(-128, 128, (count, rows, patch_width), dtype=np.int8),
            random.random((count, rows), dtype=np.float32),
            np.sort(random.integers(0, 576, (count, rows), dtype=np.uint16), axis=1),
        )
    tokens = TokenBatch(
        random.standard_normal((count, *token_shape)).astype(np.float16),
        random.standard_normal((count, token_shape[0], width)).astype(np.float16),
        key,
        kept,
    )
    columns = FrameColumns(seconds * 10, seconds * 25, seconds + 1.5, seconds * 1.0, np.ones(count))
    return Rows(columns, tokens, [random.bytes(int(size)) for size in random.integers(8, 40, count)])


def write_part(
    frames_uri: str, rows: Rows, *, video_id: str, number: int, key: str = "..", batch: int = 7, folder: str = ""
) -> Part:
    """The rows as one part, appended a few at a time."""
    writer = new_writer(frames_uri, video_id=video_id, number=number, key=key, folder=folder)
    for start in range(0, len(rows.columns), batch):
        piece = rows.cut(start, start + batch)
        writer.append(piece.columns, piece.tokens, piece.thumbnails)
    return writer.close()


def new_writer(frames_uri: str, *, video_id: str, number: int, key: str = "..", folder: str = "") -> PartWriter:
    """A writer for one segment."""
    return PartWriter(
        frames_uri,
        video_id=video_id,
        video_number=number,
        segment_key=key,
        time_base=TIME_BASE,
        model_id=MODEL_ID,
        sampling=str(SAMPLING),
        dtype="float32",
        folder=folder,
    )


def video_id_of(name: int) -> str:
    """A content id that differs in its first digits."""
    return f"{name:08x}".ljust(64, "0")


def reserve(archive: Archive, name: int, sampling: Sampling = SAMPLING) -> int:
    """The video's number."""
    return archive.reserve([(video_id_of(name), sampling)])[video_id_of(name), str(sampling)]


def receipt_for(archive: Archive, name: int, rows: Rows | None, segment: tuple = (None, None)) -> Receipt:
    """A written segment of a video, not yet committed."""
    number = reserve(archive, name)
    cut = Segment(video_id_of(name), *segment, 0)
    part = None
    if rows is not None:
        folder = archive.parts.folder_of(number)
        part = write_part(archive.frames_uri, rows, video_id=cut.video_id, number=number, key=cut.key, folder=folder)
    return Receipt(cut, number, part, None, "pyav", 0 if rows is None else len(rows.columns), 0.0, 0.0, 0.0)


def partial_receipt(archive: Archive, name: int, rows: Rows, reason: Reason = Reason.TIMEOUT) -> Receipt:
    """A written segment that is not whole, not yet committed."""
    problem, number = Problem(reason, "gave up"), reserve(archive, name)
    folder = archive.parts.folder_of(number)
    writer = new_writer(archive.frames_uri, video_id=video_id_of(name), number=number, folder=folder)
    writer.append(rows.columns, rows.tokens, rows.thumbnails)
    return replace(receipt_for(archive, name, None), part=writer.close(problem), problem=problem)


def row_for(archive: Archive, name: int, frame_count: int, **changes) -> VideoRow:
    """A row of the videos table."""
    values = {
        "video_id": video_id_of(name),
        "video_number": reserve(archive, name),
        "uri": f"file:///clips/{name}.mp4",
        "status": Status.INDEXED,
        "problem": None,
        "model_id": archive.model_id,
        "sampling": str(SAMPLING),
        "frame_count": frame_count,
        "size_bytes": 1234,
        "mtime_ns": 5678,
        "probe": PROBE,
        "captured_at": datetime(2024, 5, 1, 12, tzinfo=UTC),
        "tags": {"camera": f"cam{name}"},
        "attempts": 1,
        "indexed_at": datetime(2024, 5, 2, 6, 30, tzinfo=UTC),
    }
    return VideoRow(**{**values, **changes})


def failed_row(archive: Archive, uri: str, reason: Reason = Reason.PERMISSION) -> VideoRow:
    """The row of a file that could not be read."""
    problem = Problem(reason, "no permission")
    nothing = dict.fromkeys(("video_id", "video_number", "size_bytes", "mtime_ns", "probe", "captured_at"))
    return row_for(archive, 1, 0, **nothing, uri=uri, status=Status.FAILED, problem=problem, tags={})


def add_video(archive: Archive, name: int, count: int = 5, **changes) -> Rows:
    """Commits and publishes a video of one segment."""
    rows = random_rows(count, seed=name)
    assert archive.parts.commit([receipt_for(archive, name, rows)]) == [True]
    archive.videos.publish([row_for(archive, name, count, **changes)])
    return rows


def folder_of(archive: Archive) -> Path:
    """Where it lies."""
    return Path(os.fsdecode(local_path(archive.uri)))


def held_files(archive: Archive) -> set[str]:
    """All its files but locks, from its folder on."""
    files = (path for path in folder_of(archive).rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder_of(archive))) for path in files}


def make_old(archive: Archive) -> None:
    """As if all files had been written so long ago that remove_unnamed_files removes those that nothing names."""
    then = time.time() - UNNAMED_KEPT_SECONDS - 3600
    for name in held_files(archive):
        os.utime(folder_of(archive) / name, (then, then))


def cells_left(archive: Archive, rows: Rows) -> list[bool]:
    """Whether each token, key and thumbnail is in any file of the archive."""
    held = b"".join((folder_of(archive) / name).read_bytes() for name in held_files(archive))
    tokens = (rows.tokens.token, rows.tokens.compressor_out, rows.tokens.search_key)
    return [cell in held for cell in [*(cell.tobytes() for column in tokens for cell in column), *rows.thumbnails]]


def rows_of(frames: list[FrameRef]) -> dict[str, np.ndarray]:
    """The rows that hold the given frames, by part."""
    found: dict[str, list[int]] = {}
    for frame in frames:
        found.setdefault(frame.part, []).append(frame.row)
    return {path: np.unique(np.array(rows, np.int64)) for path, rows in found.items()}
