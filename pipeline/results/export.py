"""export: moments for other programs: CSV, JSON, WebVTT chapters, or edit lists of OpenTimelineIO and CMX 3600."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.results.edl import edl
from pipeline.results.json_values import moment_json
from pipeline.results.output import check_output, write_output
from pipeline.results.text import encodable
from storage.archive.archive import Archive
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Moment

STDOUT = "-"
_RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)
_SAME = 5e-4  # of a rate and the usual one that is meant: 24 and 23.976, or 30 and 29.97, lie twice as far apart
_UNKNOWN_RATE = 1000.0  # milliseconds, of a video with one stored frame


def check_place(place: str, name: str | None = None) -> str:
    """The format in which moments are written to a file, or to standard output for `-`; told before any work is done.

    Args:
        place: a file, or -.
        name: of the format, one of FORMATS; None takes it from the file's suffix.
    Raises:
        UsageError: no such format, no such folder, or a library is missing.
    """
    if place != STDOUT:
        check_output(place, [f".{suffix}" for suffix in FORMATS] if name is None else [Path(place).suffix.lower()])
        name = name or Path(place).suffix.lower()[1:]
    if name is None:
        raise UsageError(f"{STDOUT}: name the format for standard output with --format {'|'.join(FORMATS)}")
    if name == "otio" and find_spec("opentimelineio") is None:
        raise UsageError(f"{place}: needs OpenTimelineIO; install it with pip install 'vidx[otio]'")
    return name


def export(place: str, name: str, title: str, archive: Archive, moments: Sequence[Moment]) -> None:
    """Writes moments to a file, or to standard output for `-`.

    Args:
        place: a file, or -.
        name: of the format, as `check_place` gives it.
        title: what was searched for.
        archive: what it was searched in.
        moments: at least one.
    Raises:
        UsageError: the file cannot be written, or the format cannot hold these moments.
    """
    text = FORMATS[name](title, archive, moments)
    if place == STDOUT:
        sys.stdout.buffer.write(text.encode())  # the same bytes as in a file, whatever the terminal's encoding
        sys.stdout.flush()
    else:
        write_output(place, text.encode())


def _csv(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """A row for each moment, best first."""
    file = io.StringIO()
    rows = [_row(title, moment) for moment in moments]
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _json(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """A list of the same rows."""
    return json.dumps([_row(title, moment) for moment in moments], ensure_ascii=False, indent=2) + "\n"


def _row(title: str, moment: Moment) -> dict:
    row = {"text": title, **moment_json(moment), "source_uri": moment.uri}
    return {name: encodable(value) if isinstance(value, str) else value for name, value in row.items()}


def _vtt(title: str, archive: Archive, moments: Sequence[Moment]) -> str:
    """Chapters of one video, in order of time, as the W3C's WebVTT has them."""
    if len({moment.uri for moment in moments}) > 1:
        raise UsageError("chapters are of one video, and the moments are of several; choose one with --video")
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
    """One track with a clip for each moment, best first, of the media that it lies in."""
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
    """Frames a second, from the ranks and times of the stored ones; a usual rate where it is within a thousandth."""
    bounds = archive.parts.bounds()
    places = bounds.of(video_number)
    seconds = bounds.last_seconds[places].max() - bounds.first_seconds[places].min()
    frames = bounds.last_index[places].max() - bounds.first_index[places].min()
    if seconds <= 0 or frames <= 0:
        return _UNKNOWN_RATE
    rate = float(frames / seconds)
    usual = min(_RATES, key=lambda usual: abs(usual / rate - 1))
    return usual if abs(usual / rate - 1) < _SAME else rate


FORMATS = {"csv": _csv, "json": _json, "vtt": _vtt, "otio": _otio, "edl": _edl}
