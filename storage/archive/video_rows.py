"""The rows of the videos table: their columns, how they are checked, and their conversion to VideoRow and back."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.archive.row_table import Check
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
        pa.field("is_settled", pa.bool_()),  # null in rows of an older vidx
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


def _check_sampling(rows: pa.Table) -> None:
    for sampling in rows.column("sampling").unique().to_pylist():
        Sampling.from_text(sampling)


def _check_probed(rows: pa.Table, name: str) -> None:
    if rows.filter(pc.is_valid(rows.column("decoder"))).column(name).null_count:
        raise InvalidValue(f"a video that was read has no {name}")


def _check_required(rows: pa.Table, name: str, statuses: list[str]) -> None:
    if rows.filter(pc.is_in(rows.column("status"), pa.array(statuses))).column(name).null_count:
        raise InvalidValue(f"a video that is {' or '.join(statuses)} has no {name}")


def _check_numbered(rows: pa.Table, name: str) -> None:
    has_frames = pc.greater(rows.column("frame_count"), 0)
    if rows.filter(pc.or_(has_frames, pc.is_valid(rows.column("video_number")))).column(name).null_count:
        raise InvalidValue("a video with frames or a number has no number, no id or no stream")


def _check_detail(rows: pa.Table) -> None:
    if rows.filter(pc.is_valid(rows.column("reason"))).column("detail").null_count:
        raise InvalidValue("a reason has no detail")


def _one(name: str, check: Callable[..., None], *limits: Any) -> Check:
    return Check((name,), lambda rows: check(name, rows.column(name), *limits))


def _instant(name: str) -> Check:
    return Check((name,), lambda rows: check_column_range(name, rows.column(name).cast(pa.int64()), *_YEARS))


def _probed(name: str) -> Check:
    return Check(("decoder", name), lambda rows: _check_probed(rows, name))


def _required(name: str, statuses: list[str]) -> Check:
    return Check(("status", name), lambda rows: _check_required(rows, name, statuses))


def _numbered(name: str) -> Check:
    return Check(("frame_count", "video_number", name), lambda rows: _check_numbered(rows, name))


SAMPLING_CHECK = Check(("sampling",), _check_sampling)
CHECKS = (
    _one("video_id", check_column_text, VIDEO_ID),
    _one("uri", check_column_text, r"file:///[!-~]*"),
    _one("model_id", check_column_text, LINE),
    _one("status", check_column_values, Status),
    _one("reason", check_column_values, Reason),
    _one("captured_from", check_column_values, CapturedFrom),
    _one("sandbox_missing", check_column_text, "(?:[a-z]+(?:,[a-z]+)*)?"),
    _one("decoder", check_column_values, ("decord", "pyav")),
    _one("rotation_degrees", check_column_values, (0, 90, 180, 270)),
    SAMPLING_CHECK,
    *(_one(name, check_column_range, least, most) for name, (least, most) in _RANGES.items()),
    *(_instant(name) for name in ("captured_at", "indexed_at")),
    *(_probed(name) for name in (*_PROBED, "time_base_num", "time_base_den") if name != "duration_seconds"),
    *(_required(name, statuses) for name, statuses in _REQUIRED.items()),
    *(_numbered(name) for name in ("video_number", "video_id", "decoder")),
    Check(("reason", "detail"), _check_detail),
)


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
    row["is_settled"] = bool(values["is_settled"])
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
