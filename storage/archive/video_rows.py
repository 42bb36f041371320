"""The rows of the videos table: their columns, how they are checked, and their conversion to VideoRow and back."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.checks import (
    INT32,
    INT64,
    LINE,
    VIDEO_ID,
    InvalidValue,
    check_column_range,
    check_column_text,
    check_column_values,
)
from storage.records import CapturedFrom, Probe, Problem, Reason, Sampling, Status, VideoRow

# The cuts of a Probe are not stored: only the job that splits the video needs them, and a long video has thousands.
SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string()),  # null if the file could not be read
        pa.field("video_number", pa.int32()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("frame_count", pa.int64(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("decoder", pa.string()),  # this and the next are null if no video stream was found
        pa.field("container", pa.string()),
        pa.field("codec", pa.string()),
        pa.field("stream_index", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("rotation_degrees", pa.int32()),
        pa.field("time_base_num", pa.int64()),
        pa.field("time_base_den", pa.int64()),
        pa.field("first_ticks", pa.int64()),
        pa.field("clock_offset_seconds", pa.float64()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("captured_at", pa.timestamp("us", tz="UTC")),
        pa.field("tags", pa.map_(pa.string(), pa.string())),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("indexed_at", pa.timestamp("us", tz="UTC")),  # null in rows of an older vidx
        pa.field("sandbox_missing", pa.string()),  # steps, comma-separated; null in rows of an older vidx
        pa.field("captured_from", pa.string()),  # null if captured_at is null, and in rows of an older vidx
    ]
)
MOST_FRAMES, MOST_SIDE, MOST_SECONDS = 1 << 40, 1 << 16, 1e12
_YEARS = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # 1 to 9999, in microseconds: Python's range
_RANGES = {
    "video_number": (1, INT32),
    "frame_count": (0, MOST_FRAMES),
    "size_bytes": (0, INT64),
    "stream_index": (0, INT32),
    "width": (1, MOST_SIDE),
    "height": (1, MOST_SIDE),
    "time_base_num": (1, INT64),
    "time_base_den": (1, INT64),
    "clock_offset_seconds": (-MOST_SECONDS, MOST_SECONDS),
    "duration_seconds": (-MOST_SECONDS, MOST_SECONDS),
    "attempts": (0, INT32),
}
_REQUIRED = {  # statuses of the videos that must have a value, by column
    "video_number": ["indexing", "indexed", "partial"],
    "reason": ["partial", "failed"],
    "video_id": ["deleted"],
}
_PROBED = (
    "decoder",
    "container",
    "codec",
    "stream_index",
    "width",
    "height",
    "rotation_degrees",
    "first_ticks",
    "clock_offset_seconds",
    "duration_seconds",
)


def check(rows: pa.Table) -> None:
    """Raises InvalidValue if vidx cannot have written the rows."""
    column = rows.column
    check_column_text("video_id", column("video_id"), VIDEO_ID)
    check_column_text("uri", column("uri"), r"file:///[!-~]*")
    check_column_text("model_id", column("model_id"), LINE)
    check_column_values("status", column("status"), Status)
    check_column_values("reason", column("reason"), Reason)
    check_column_values("captured_from", column("captured_from"), CapturedFrom)
    check_column_text("sandbox_missing", column("sandbox_missing"), "(?:[a-z]+(?:,[a-z]+)*)?")
    for sampling in column("sampling").unique().to_pylist():
        Sampling.from_text(sampling)
    for name, (least, most) in _RANGES.items():
        check_column_range(name, column(name), least, most)
    for name in ("captured_at", "indexed_at"):
        check_column_range(name, column(name).cast(pa.int64()), *_YEARS)
    check_column_values("decoder", column("decoder"), ("decord", "pyav"))
    check_column_values("rotation_degrees", column("rotation_degrees"), (0, 90, 180, 270))
    probed = rows.filter(pc.is_valid(column("decoder")))
    for name in (*_PROBED, "time_base_num", "time_base_den"):
        if name != "duration_seconds" and probed.column(name).null_count:
            raise InvalidValue(f"a video that was read has no {name}")
    for name, statuses in _REQUIRED.items():
        if rows.filter(pc.is_in(column("status"), pa.array(statuses))).column(name).null_count:
            raise InvalidValue(f"a video that is {' or '.join(statuses)} has no {name}")
    numbered = rows.filter(pc.or_(pc.greater(column("frame_count"), 0), pc.is_valid(column("video_number"))))
    if any(numbered.column(name).null_count for name in ("video_number", "video_id", "decoder")):
        raise InvalidValue("a video with frames or a number has no number, no id or no stream")
    if rows.filter(pc.is_valid(column("reason"))).column("detail").null_count:
        raise InvalidValue("a reason has no detail")


def to_arrow(rows: Sequence[VideoRow]) -> pa.Table:
    """The rows as a table with the columns of SCHEMA."""
    return pa.Table.from_pylist([_to_dict(row) for row in rows], SCHEMA)


def to_rows(table: pa.Table) -> list[VideoRow]:
    """The rows of a table with the columns of SCHEMA; the cuts of their probes are empty."""
    return [_to_row(values) for values in table.to_pylist()]


def _to_dict(row: VideoRow) -> dict:
    values = {name: getattr(row, name) for name in SCHEMA.names if hasattr(row, name)}
    values["status"] = str(row.status)
    for name in ("captured_at", "indexed_at"):
        if values[name] is not None:
            values[name] = values[name].astimezone(UTC)
    values["captured_from"] = None if row.captured_at is None else str(row.captured_from)
    values["sandbox_missing"] = None if row.sandbox_missing is None else ",".join(row.sandbox_missing)
    values["tags"] = list(row.tags.items())
    if row.problem is not None:
        values |= {"reason": str(row.problem.reason), "detail": row.problem.detail}
    if row.probe is not None:
        values |= {name: getattr(row.probe, name) for name in _PROBED}
        values |= {"time_base_num": row.probe.time_base.numerator, "time_base_den": row.probe.time_base.denominator}
    return values


def _to_row(values: dict) -> VideoRow:
    row: dict[str, Any] = {field.name: values.get(field.name) for field in fields(VideoRow)}
    row["status"] = Status(values["status"])
    row["tags"] = dict(values["tags"] or ())
    row["captured_from"] = CapturedFrom(values["captured_from"] or CapturedFrom.MANIFEST)
    if values["sandbox_missing"] is not None:
        row["sandbox_missing"] = tuple(filter(None, values["sandbox_missing"].split(",")))
    if values["reason"] is not None:
        row["problem"] = Problem(Reason(values["reason"]), values["detail"])
    if values["decoder"] is not None:
        time_base = Fraction(values["time_base_num"], values["time_base_den"])
        row["probe"] = Probe(time_base=time_base, cuts=(), **{name: values[name] for name in _PROBED})
    return VideoRow(**row)
