"""export: moments -> CSV, JSON, WebVTT chapters, or edit lists of OpenTimelineIO and CMX 3600."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.results.edl import SAME_RATE, TIMEBASES, edl
from pipeline.results.json_values import moment_json
from pipeline.results.output import check_output, write_output
from pipeline.text import encodable
from storage.archive.archive import Archive
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Moment

STDOUT = "-"
_UNKNOWN_RATE = 1000.0  # of a video with one stored frame: milliseconds


def check_place(place: str, name: str | None = None) -> str:
    """The format in which moments will be written; checks it before any work is done.

    Args:
        place: a file, or - for standard output.
        name: a key of FORMATS; None for the format of the file's suffix.
    Raises:
        UsageError: there is no such format or folder, or a library is missing.
    """
    if place != STDOUT:
        check_output(place, [f".{suffix}" for suffix in FORMATS] if name is None else [Path(place).suffix.lower()])
        name = name or Path(place).suffix.lower()[1:]
    if name is None:
        raise UsageError(f"{STDOUT}: standard output needs --format {'|'.join(FORMATS)}")
    if name == "otio" and find_spec("opentimelineio") is None:
        raise UsageError(f"{place}: OpenTimelineIO is not installed; install it with pip install 'vidx[otio]'")
    return name


def export(place: str, name: str, title: str, archive: Archive, moments: Sequence[Moment]) -> None:
    """Writes moments (at least one) to a file, or to standard output for `-`, in the format from `check_place`.

    Raises:
        UsageError: the file cannot be written, or the format cannot hold these moments.
    """
    text = FORMATS[name](title, archive, moments)
    if place == STDOUT:
        sys.stdout.buffer.write(text.encode())  # UTF-8 as in a file, even if the terminal has another encoding
        sys.stdout.flush()
    else:
        write_output(place, text.encode())


def _csv(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """One row per moment, best first."""
    file = io.StringIO()
    rows = [_row(title, moment) for moment in moments]
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _json(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """A list of these rows."""
    return json.dumps([_row(title, moment) for moment in moments], ensure_ascii=False, indent=2) + "\n"


def _row(title: str, moment: Moment) -> dict:
    row = {"text": title, **moment_json(moment), "source_uri": moment.uri}
    return {name: encodable(value) if isinstance(value, str) else value for name, value in row.items()}


def _vtt(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """WebVTT chapters of one video, in order of time."""
    if len({moment.uri for moment in moments}) > 1:
        raise UsageError("WebVTT chapters are of one video, but these moments are of several; choose one with --video")
    words = " ".join(encodable(title).replace("&", "&amp;").replace("<", "&lt;").replace("-->", "->").split())
    cues = [
        f"{_vtt_time(moment.start_seconds)} --> {_vtt_time(moment.end_seconds)}\n{words}\n"
        for moment in sorted(moments, key=lambda moment: moment.start_seconds)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _vtt_time(seconds: float) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def _otio(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """An OpenTimelineIO timeline: one track with a clip per moment, best first."""
    import opentimelineio as otio

    track = otio.schema.Track(name=encodable(title), kind=otio.schema.TrackKind.Video)
    for moment in moments:
        rate = _frame_rate(archive, moment.video_number)
        start = otio.opentime.RationalTime.from_seconds(max(0.0, moment.start_seconds), rate).round()
        end = otio.opentime.RationalTime.from_seconds(moment.end_seconds, rate).round()
        media = otio.schema.ExternalReference(target_url=moment.uri)
        name = encodable(source_text(moment.uri).rsplit("/", 1)[-1])
        found = {"score": moment.score, "best_seconds": moment.best_seconds, "video_id": moment.video_id}
        clip = otio.schema.Clip(
            name=name,
            media_reference=media,
            source_range=otio.opentime.range_from_start_end_time(start, end),
            metadata={"vidx": found},
        )
        track.append(clip)
    timeline = otio.schema.Timeline(name=encodable(title))
    timeline.tracks.append(track)
    return otio.adapters.write_to_string(timeline, "otio_json")


def _edl(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    return edl(title, moments, [_frame_rate(archive, moment.video_number) for moment in moments])


def _frame_rate(archive: Archive, video_number: int) -> float:
    """Frames per second, from the indexes and times of stored frames; a usual rate if it is almost equal."""
    bounds = archive.parts.bounds([video_number])
    places = bounds.of(video_number)
    seconds = bounds.last_seconds[places].max() - bounds.first_seconds[places].min()
    frames = bounds.last_index[places].max() - bounds.first_index[places].min()
    if seconds <= 0 or frames <= 0:
        return _UNKNOWN_RATE
    rate = float(frames / seconds)
    usual = min((float(base.rate) for base in TIMEBASES), key=lambda usual: abs(usual / rate - 1))
    return usual if abs(usual / rate - 1) < SAME_RATE else rate


FORMATS = {"csv": _csv, "json": _json, "vtt": _vtt, "otio": _otio, "edl": _edl}
