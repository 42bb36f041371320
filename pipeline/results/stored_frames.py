"""stored_frames: what an archive keeps of frames, batch after batch, as numpy arrays or Arrow."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from storage.archive.archive import Archive
from storage.archive.frames import Rows
from storage.parts.read import has_column, read_compressor_out, read_keys, read_thumbnails, read_tokens
from storage.records import FrameRef

_READERS: dict[str, Callable[[str, Sequence[FrameRef]], Any]] = {
    "token": read_tokens,
    "compressor_out": read_compressor_out,
    "search_key": read_keys,
    "thumbnail": read_thumbnails,
}
CELLS = tuple(_READERS)


@dataclass(frozen=True, repr=False)
class Frames:
    """T stored frames, of one video or several, in order of video and time.

    What was not asked for is None, and so is what the archive does not keep of all of them.

    Attributes:
        video_id: (T,) object, str.
        video_number: (T,) int32, as in the view `videos`.
        frame_index: (T,) int64, rank in presentation order among all frames of the video.
        time_seconds, duration_seconds: (T,) float64, position that a player shows, and how long the frame stands for.
        token: (T, C*C, H) float16, the vision token after pre-fusion, as the LLM receives it.
        compressor_out: (T, C*C, D) float16, before the projector.
        search_key: (T, E) float16, L2-normalised.
        thumbnail: T small JPEG files.
    """

    video_id: np.ndarray
    video_number: np.ndarray
    frame_index: np.ndarray
    time_seconds: np.ndarray
    duration_seconds: np.ndarray
    token: np.ndarray | None = None
    compressor_out: np.ndarray | None = None
    search_key: np.ndarray | None = None
    thumbnail: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.frame_index)

    def __repr__(self) -> str:
        cells = [name for name in CELLS if getattr(self, name) is not None]
        return f"Frames({len(self)} frames, {', '.join(cells) or 'no cells'})"

    def to_arrow(self) -> pa.RecordBatch:
        """The same as columns, without a copy of the arrays; those of more than one axis are fixed-shape tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return pa.RecordBatch.from_pydict(
            {name: _as_arrow(name, value) for name, value in values.items() if value is not None}
        )


def _as_arrow(name: str, value: np.ndarray | tuple[bytes, ...]) -> pa.Array:
    if name == "video_id":
        return pa.array(value, pa.string())
    if isinstance(value, tuple):
        return pa.array(value, pa.binary())
    return pa.array(value) if value.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(value)


def stored_frames(archive: Archive, rows: Rows, cells: Sequence[str], batch_frames: int) -> Iterator[Frames]:
    """Frames of an archive in order of video and time, so many at once; cells of one batch at a time are held.

    Args:
        archive: at the version that all batches are of.
        rows: which frames.
        cells: of CELLS, what to read of each frame.
        batch_frames: in each batch but the last.
    Raises:
        ArchiveError: a part is missing or damaged, or keeps no such cells.
    """
    for refs in _batches(archive.frames.refs_of(rows), batch_frames):
        yield _read(archive, refs, cells)


def _batches(groups: Iterable[list[FrameRef]], count: int) -> Iterator[list[FrameRef]]:
    waiting: list[FrameRef] = []
    for refs in groups:
        waiting += refs
        while len(waiting) >= count:
            yield waiting[:count]
            waiting = waiting[count:]
    if waiting:
        yield waiting


def _read(archive: Archive, refs: Sequence[FrameRef], cells: Sequence[str]) -> Frames:
    uri = archive.frames_uri
    found: dict[str, Any] = {name: _READERS[name](uri, refs) for name in cells if has_column(uri, name, refs)}
    if "thumbnail" in found:
        found["thumbnail"] = tuple(found["thumbnail"])
    found |= {name: np.array([getattr(ref, name) for ref in refs], kind) for name, kind in _KINDS.items()}
    return Frames(**found)


_KINDS = {
    "video_id": object,
    "video_number": np.int32,
    "frame_index": np.int64,
    "time_seconds": np.float64,
    "duration_seconds": np.float64,
}
