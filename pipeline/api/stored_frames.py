"""stored_frames: the stored data of frames in batches, as numpy arrays or Arrow."""

import itertools
from collections.abc import Callable, Iterator, Sequence
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
    """T stored frames of one or more videos, in order of video and time.

    A field is None if it was not asked for, or if the archive does not store it for all of these frames.

    Attributes:
        video_id: (T,) object, str.
        video_number: (T,) int32, as in the view `videos`.
        frame_index: (T,) int64, index among all frames of the video, in presentation order.
        time_seconds: (T,) float64, position that a player shows.
        duration_seconds: (T,) float64, how long the frame is shown, until the next stored one.
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
        """The fields as columns, without a copy; arrays with more than one axis are fixed-shape tensors."""
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
    """Batches of stored frames, in order of video and time; memory holds one batch at a time.

    Args:
        cells: what to read of each frame, of CELLS.
        batch_frames: frames per batch; the last one can be smaller.
    Raises:
        ArchiveError: a part is missing or damaged.
    """
    uri, found_refs = archive.frames_uri, itertools.chain.from_iterable(archive.frames.refs_of(rows))
    while refs := list(itertools.islice(found_refs, batch_frames)):
        found: dict[str, Any] = {name: _READERS[name](uri, refs) for name in cells if has_column(uri, name, refs)}
        if "thumbnail" in found:
            found["thumbnail"] = tuple(found["thumbnail"])
        found |= {name: np.array([getattr(ref, name) for ref in refs], kind) for name, kind in _KINDS.items()}
        yield Frames(**found)


_KINDS = {
    "video_id": object,
    "video_number": np.int32,
    "frame_index": np.int64,
    "time_seconds": np.float64,
    "duration_seconds": np.float64,
}
