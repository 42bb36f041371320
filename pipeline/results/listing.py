"""listing: the row of a video in `vidx list` and in the Python interface."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from storage.files import source_text
from storage.records import VideoRow

# The fields of the probe are null if the file could not be opened.
_FIELDS: dict[str, tuple[pa.DataType, Callable[[VideoRow], Any]]] = {
    "video_id": (pa.string(), lambda row: row.video_id),
    "source": (pa.string(), lambda row: source_text(row.uri)),
    "source_uri": (pa.string(), lambda row: row.uri),
    "status": (pa.string(), lambda row: str(row.status)),
    "reason": (pa.string(), lambda row: row.problem and str(row.problem.reason)),
    "detail": (pa.string(), lambda row: row.problem and row.problem.detail),
    "frames": (pa.int64(), lambda row: row.frame_count),
    "duration_seconds": (pa.float64(), lambda row: row.probe and row.probe.duration_seconds),
    "captured_at": (pa.timestamp("us", "UTC"), lambda row: row.captured_at),
    "indexed_at": (pa.timestamp("us", "UTC"), lambda row: row.indexed_at),
    "tags": (pa.map_(pa.string(), pa.string()), lambda row: dict(row.tags)),
    "container": (pa.string(), lambda row: row.probe and row.probe.container),
    "codec": (pa.string(), lambda row: row.probe and row.probe.codec),
    "width": (pa.int32(), lambda row: row.probe and row.probe.width),
    "height": (pa.int32(), lambda row: row.probe and row.probe.height),
    "size_bytes": (pa.int64(), lambda row: row.size_bytes),
    "sampling": (pa.string(), lambda row: row.sampling),
    "model_id": (pa.string(), lambda row: row.model_id),
    "captured_from": (pa.string(), lambda row: row.captured_at and str(row.captured_from)),
}
COLUMNS = tuple(_FIELDS)
SCHEMA = pa.schema([(name, kind) for name, (kind, _) in _FIELDS.items()])


def listed(row: VideoRow) -> dict[str, Any]:
    """The row of a video, with the keys COLUMNS."""
    return {name: value_of(row) for name, (_, value_of) in _FIELDS.items()}
