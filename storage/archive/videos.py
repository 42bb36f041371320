"""The videos table: one row per video, whose publication makes the video's frames visible.

A row of the status `indexing` is written once, as its video is shown in part. How many frames that is by now, and how
far it reaches, is worked out from the log of the frames whenever the row is read.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.archive.frames import PartBounds
from storage.checked import INT32, INT64, LINE, VIDEO_ID, Wrong, check_range, check_texts, check_values
from storage.records import CapturedFrom, Probe, Problem, Reason, Sampling, Status, VideoRow

# `cuts` of a Probe are not kept: they serve the job that splits the video, and there are thousands in a long one.
SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string()),  # null where the file could not be read
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
        pa.field("decoder", pa.string()),  # this and the next are null where no video stream was found
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
        pa.field("indexed_at", pa.timestamp("us", tz="UTC")),  # null in rows of a vidx that did not keep it
        pa.field("sandbox_missing", pa.string()),  # steps with commas between; null of a vidx that did not keep it
        pa.field("captured_from", pa.string()),  # null where captured_at is, and of a vidx that read manifests alone
    ]
)
MOST_FRAMES, MOST_SIDE, MOST_SECONDS = 1 << 40, 1 << 16, 1e12
_YEARS = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # 1 to 9999, in microseconds, as Python knows them
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
_NEEDED = {  # by column, in videos of which status
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
    """Raises Wrong where a row is none that vidx writes."""
    column = rows.column
    check_texts("video_id", column("video_id"), VIDEO_ID)
    check_texts("uri", column("uri"), r"file:///[!-~]*")
    check_texts("model_id", column("model_id"), LINE)
    check_values("status", column("status"), Status)
    check_values("reason", column("reason"), Reason)
    check_values("captured_from", column("captured_from"), CapturedFrom)
    check_texts("sandbox_missing", column("sandbox_missing"), "(?:[a-z]+(?:,[a-z]+)*)?")
    for sampling in column("sampling").unique().to_pylist():
        Sampling.from_text(sampling)
    for name, (least, most) in _RANGES.items():
        check_range(name, column(name), least, most)
    for name in ("captured_at", "indexed_at"):
        check_range(name, column(name).cast(pa.int64()), *_YEARS)
    check_values("decoder", column("decoder"), ("decord", "pyav"))
    check_values("rotation_degrees", column("rotation_degrees"), (0, 90, 180, 270))
    probed = rows.filter(pc.is_valid(column("decoder")))
    for name in (*_PROBED, "time_base_num", "time_base_den"):
        if name != "duration_seconds" and probed.column(name).null_count:
            raise Wrong(f"a video that was read has no {name}")
    for name, statuses in _NEEDED.items():
        if rows.filter(pc.is_in(column("status"), pa.array(statuses))).column(name).null_count:
            raise Wrong(f"a video that is {' or '.join(statuses)} has no {name}")
    numbered = rows.filter(pc.or_(pc.greater(column("frame_count"), 0), pc.is_valid(column("video_number"))))
    if any(numbered.column(name).null_count for name in ("video_number", "video_id", "decoder")):
        raise Wrong("a video with frames or a number has no number, no id or no stream")
    if rows.filter(pc.is_valid(column("reason"))).column("detail").null_count:
        raise Wrong("a reason has no detail")


def to_arrow(rows: Sequence[VideoRow]) -> pa.Table:
    """Rows as they are stored."""
    return pa.Table.from_pylist([_as_dict(row) for row in rows], SCHEMA)


def to_rows(table: pa.Table) -> list[VideoRow]:
    """Rows as they were published, but for the cuts of their probes, which are empty."""
    return [_as_row(values) for values in table.to_pylist()]


def still_current(table: pa.Table, rows: Sequence[VideoRow]) -> list[VideoRow]:
    """Those of the rows whose content still has a row in the table, with the same frames; growing ones with any."""
    names = ("model_id", "video_id", "video_number", "status", "attempts", "frame_count")
    there = {_but_for_growth(*values) for values in zip(*(table.column(name).to_pylist() for name in names))}
    return [row for row in rows if _but_for_growth(*(getattr(row, name) for name in names)) in there]


def _but_for_growth(*values: object) -> tuple:
    *others, status, attempts, frame_count = values
    return *others, status, attempts, None if status == Status.INDEXING else frame_count


def with_stored_frames(table: pa.Table, bounds: PartBounds) -> pa.Table:
    """The rows, those of videos that jobs are at with the frames that are committed by now, and how far that is."""
    is_growing = pc.equal(table.column("status"), str(Status.INDEXING))
    growing = table.filter(is_growing)
    if growing.num_rows == 0:
        return table
    rows = to_rows(growing)
    stored = [int(bounds.row_count[bounds.of(row.known_number)].sum()) for row in rows]
    values = {
        "frame_count": [max(row.frame_count, count) for row, count in zip(rows, stored)],  # fewer, where some are lost
        "reason": [str(Reason.UNFINISHED)] * len(rows),
        "detail": [f"{_so_far(row, bounds)}; `vidx index` goes on where no job is at it" for row in rows],
    }
    for name, column in values.items():
        field = table.schema.field(name)
        growing = growing.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type))
    return pa.concat_tables([table.filter(pc.invert(is_growing)), growing])


def _so_far(row: VideoRow, bounds: PartBounds) -> str:
    """How much of a video is committed."""
    if row.probe is None:
        return "a part of it is indexed"
    places = bounds.of(row.known_number)
    end_seconds = float((bounds.last_seconds + bounds.longest_seconds)[places].max(initial=0.0))
    ranges = [row.probe.range_seconds(key) for key in set(bounds.segment[places])]
    done = sum(min(end, end_seconds) - start for start, end in ranges)
    of_all = f" of {_clock(row.probe.duration_seconds)}" if row.probe.duration_seconds else ""
    return f"{_clock(done)}{of_all} is indexed"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0.0)))) if abs(seconds) < 1e9 else "?"


def plan_delete(table: pa.Table, wanted: np.ndarray) -> tuple[np.ndarray, pa.Table]:
    """What to keep of the table, and what to add, so that nothing shows the wanted rows any more.

    A row of known content leaves one that says so; of a file that could not be read nothing is left.
    """
    rows = to_rows(table.filter(pa.array(wanted)))
    nothing: dict[str, Any] = {"video_number": None, "problem": None, "frame_count": 0, "attempts": 0}
    return ~wanted, to_arrow([replace(row, status=Status.DELETED, **nothing) for row in rows if row.video_id])


def plan_publish(
    table: pa.Table, rows: Sequence[VideoRow], restored: Collection[str] = ()
) -> tuple[np.ndarray, pa.Table]:
    """What to keep of the table, and what to add, so that each row takes the place of those it renews.

    A row renews, within its model's rows, the one of the same content (whatever its sampling or uri) and the one of
    the same uri (whatever its content). Nothing searchable is lost to a file that could not be read this time: a row
    of unknown content, or without frames, does not take the place of a row of the same uri with known content, or of
    the same content with frames. Deleted content stays deleted, but for the ids that are restored, and does not keep
    its uri from another one. A row of a video that is being indexed takes the place of nothing that can be searched but
    what it said before.
    """
    names = ("model_id", "video_id", "uri", "frame_count", "status", "video_number")
    known = list(zip(*(table.column(name).to_pylist() for name in names)))
    known += [tuple(getattr(row, name) for name in names) for row in rows]
    alive = np.arange(len(known)) < table.num_rows
    by_content: dict[tuple, int] = {}
    by_uri: dict[tuple, int] = {}
    for place, (model_id, video_id, uri, _, status, _) in enumerate(known):
        same_content = None if video_id is None else by_content.get((model_id, video_id))
        same_uri = by_uri.get((model_id, uri))
        if place >= table.num_rows:
            rivals = [rival for rival in (same_content, same_uri) if rival is not None and alive[rival]]
            if any(_outlasts(known[rival], known[place], restored) for rival in rivals):
                continue
            alive[rivals] = False
            alive[place] = True
        if status != Status.DELETED:
            by_uri[model_id, uri] = place
        if video_id is not None:
            by_content[model_id, video_id] = place
    added = [row for row, stays in zip(rows, alive[table.num_rows :], strict=True) if stays]
    return alive[: table.num_rows], to_arrow(added)


def _outlasts(rival: tuple, new: tuple, restored: Collection[str]) -> bool:
    """Whether a row stays though a new one is of the same content or uri."""
    _, rival_id, _, rival_frames, rival_status, rival_number = rival
    _, video_id, _, frame_count, status, number = new
    if video_id is None:
        return rival_id is not None
    if rival_status == Status.DELETED:
        return rival_id == video_id and video_id not in restored
    if status == Status.INDEXING and rival_frames > 0:
        return (rival_status, rival_number) != (Status.INDEXING, number)
    return rival_id == video_id and frame_count == 0 and rival_frames > 0


def _as_dict(row: VideoRow) -> dict:
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


def _as_row(values: dict) -> VideoRow:
    probe = problem = None
    if values["decoder"] is not None:
        time_base = Fraction(values["time_base_num"], values["time_base_den"])
        probe = Probe(time_base=time_base, cuts=(), **{name: values[name] for name in _PROBED})
    if values["reason"] is not None:
        problem = Problem(Reason(values["reason"]), values["detail"])
    missing = values["sandbox_missing"]
    return VideoRow(
        video_id=values["video_id"],
        video_number=values["video_number"],
        uri=values["uri"],
        status=Status(values["status"]),
        problem=problem,
        model_id=values["model_id"],
        sampling=values["sampling"],
        frame_count=values["frame_count"],
        size_bytes=values["size_bytes"],
        mtime_ns=values["mtime_ns"],
        probe=probe,
        captured_at=values["captured_at"],
        tags=dict(values["tags"] or ()),
        attempts=values["attempts"],
        indexed_at=values["indexed_at"],
        captured_from=CapturedFrom(values["captured_from"] or CapturedFrom.MANIFEST),
        sandbox_missing=None if missing is None else tuple(missing.split(",")) if missing else (),
    )
