"""Moments as other programs read them, read back by those programs' own libraries where there are such."""

import csv
import io
import json
from dataclasses import replace

import av
import numpy as np
import pytest
from small_archive import MODEL_ID, add_video, random_rows, receipt_for, row_for

from pipeline.results.edl import edl, timebase_of
from pipeline.results.export import check_place, export
from storage.archive.archive import create_archive
from storage.errors import UsageError
from storage.files import to_uri
from storage.records import Moment

TITLE = 'a "dog" --> & <b>'


@pytest.fixture
def exported(tmp_path):
    """Writes moments of one video, 25 frames a second, or of two; gives the file's text."""
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, uri="file:///clips/caf%E9%0A1.mp4")
    add_video(archive, 2)
    one, two = archive.videos.all()  # 2.mp4 comes before café
    moments = [
        Moment(row.video_id, row.video_number, row.uri, start, end, start, score)
        for row, start, end, score in ((two, 3, 3661.5, 0.5), (two, 1.0, 2.04, 0.4), (one, 0.0, 2.0, 0.3))
    ]

    def write(name, count=3):
        place = str(tmp_path / name)
        export(place, check_place(place), TITLE, archive, moments[:count])
        return (tmp_path / name).read_text(encoding="utf-8")

    return write


def test_a_row_for_each_moment(exported):
    rows = list(csv.DictReader(io.StringIO(exported("found.csv"))))
    entries = json.loads(exported("found.json"))
    assert len(rows) == len(entries) == 3
    for row, entry in zip(rows, entries, strict=True):
        assert row == {name: str(value) for name, value in entry.items()}
    last = entries[-1]
    assert (last["text"], last["start_seconds"], last["end_seconds"], last["score"]) == (TITLE, 0.0, 2.0, 0.3)
    assert {entry["source_uri"] for entry in entries} > {"file:///clips/caf%E9%0A1.mp4"}


def test_chapters_are_in_order_of_time_and_ffmpeg_reads_them(exported, tmp_path):
    text = exported("found.vtt", 2)
    assert text.splitlines() == [
        "WEBVTT",
        "",
        "00:00:01.000 --> 00:00:02.040",
        'a "dog" -> &amp; &lt;b>',
        "",
        "00:00:03.000 --> 01:01:01.500",
        'a "dog" -> &amp; &lt;b>',
    ]
    with av.open(str(tmp_path / "found.vtt")) as file:
        cues = [(packet.pts, packet.duration) for packet in file.demux() if packet.pts is not None]
    assert cues == [(1000, 1040), (3000, 3658500)]
    with pytest.raises(UsageError, match="--video"):
        exported("found.vtt")


def test_an_edit_list_names_the_media_and_the_frames(exported, tmp_path):
    otio = pytest.importorskip("opentimelineio")
    timeline = otio.adapters.from_name("otio_json").read_from_string(exported("found.otio"))
    clips = list(timeline.find_clips())
    assert [clip.media_reference.target_url for clip in clips[1:]] == [
        "file:///clips/caf%E9%0A1.mp4",
        to_uri("/clips/2.mp4"),
    ]
    source = clips[1].source_range
    assert (source.start_time.value, source.duration.value, source.start_time.rate) == (25, 26, 25.0)
    assert clips[0].metadata["vidx"]["score"] == 0.5
    assert timeline.name == TITLE


def test_an_edl_cuts_the_frames_one_after_the_other(exported):
    """At 25 frames a second: 1 s to 2.04 s is frame 25 to 51, and 3,661.5 s is 1:01:01 and 12.5 frames, rounded up."""
    assert exported("found.edl").splitlines() == [
        'TITLE: a "dog" --> & <b>',
        "FCM: NON-DROP FRAME",
        "",
        "001  AX       V     C        00:00:03:00 01:01:01:13 01:00:00:00 02:00:58:13",
        r"* FROM CLIP NAME: caf\xe9\n1.mp4",
        r"* SOURCE FILE: /clips/caf\xe9\n1.mp4",
        "",
        "002  AX       V     C        00:00:01:00 00:00:02:01 02:00:58:13 02:00:59:14",
        r"* FROM CLIP NAME: caf\xe9\n1.mp4",
        r"* SOURCE FILE: /clips/caf\xe9\n1.mp4",
        "",
        "003  AX       V     C        00:00:00:00 00:00:02:00 02:00:59:14 02:01:01:14",
        "* FROM CLIP NAME: 2.mp4",
        "* SOURCE FILE: /clips/2.mp4",
    ]


def moment_of(start, end):
    return Moment("ab" * 32, 1, "file:///clips/1.mp4", start, end, start, 0.5)


RATES = [24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60]


@pytest.mark.parametrize("rate", RATES)
def test_another_reader_of_edl_finds_the_same_frames(rate):
    adapter = pytest.importorskip("otio_cmx3600_adapter.cmx_3600")
    frames = [0, 1, 17, 59 * 30, 1798, 1800, 17981, 17982, 17983, 107891, 107892, 215784]
    spans = list(zip(frames, [frame + 31 for frame in frames], strict=True))
    text = edl("a dog", [moment_of(start / rate, end / rate) for start, end in spans], [rate] * len(spans))
    clips = list(adapter.read_from_string(text, rate=rate).find_clips())
    read = [(clip.source_range.start_time.value, clip.source_range.duration.value) for clip in clips]
    assert read == [(start, end - start) for start, end in spans]
    assert {clip.name for clip in clips} == {"1.mp4"}


@pytest.mark.parametrize("rate", RATES)
def test_timecodes_count_every_frame_as_smpte_does(rate):
    """By counting: each number from 0 on but 0 and 1 (of 60: 0 to 3) of a minute that is no tenth, at 29.97 (59.94)."""
    nominal = round(rate)
    dropped = {30000 / 1001: 2, 60000 / 1001: 4}.get(rate, 0)
    labels = (
        f"{minute // 60:02d}:{minute % 60:02d}:{second:02d}{';' if dropped else ':'}{frame:02d}"
        for minute in range(122)
        for second in range(60)
        for frame in range(nominal)
        if not (second == 0 and minute % 10 and frame < dropped)
    )
    base = timebase_of(rate)
    for frame, label in enumerate(labels):
        assert base.timecode(frame) == label
        assert base.frame_at(frame / rate) == frame


@pytest.mark.parametrize(
    ("rate", "nominal"),
    [
        (12.5, 25),
        (15, 30),
        (14.985, 29.97),
        (10, 30),
        (5, 25),
        (1, 24),
        (120, 60),
        (100, 50),
        (119.88, 59.94),
        (27.3, 30),
    ],
)
def test_an_unusual_rate_is_counted_by_a_usual_one_in_step_with_it(rate, nominal):
    assert float(timebase_of(rate).rate) == pytest.approx(nominal, rel=1e-4)


def test_what_an_edl_cannot_hold_is_refused():
    with pytest.raises(UsageError, match=r"25 and 29.97 frames per second.*\.otio"):
        edl("x", [moment_of(0, 1)] * 2, [25.0, 30000 / 1001])
    with pytest.raises(UsageError, match="999"):
        edl("x", [moment_of(0, 1)] * 1000, [25.0] * 1000)
    for start in (86400, 23 * 3600 - 1):  # in the file, or in the programme, which begins at one o'clock
        with pytest.raises(UsageError, match="24 hours"):
            edl("x", [moment_of(start, start + 2)] * 2 + [moment_of(0, 82800)], [25.0] * 3)


@pytest.mark.parametrize("rate", [24, 30, 60])
def test_whole_rates_are_not_taken_for_those_of_television(tmp_path, rate):
    """24 and 23.976 frames a second lie one in a thousand apart: 3.6 seconds an hour."""
    otio = pytest.importorskip("opentimelineio")
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    rows = random_rows(10)
    columns = replace(rows.columns, frame_index=np.arange(10) * rate)
    archive.parts.commit([receipt_for(archive, 1, replace(rows, columns=columns))])
    archive.videos.publish([row_for(archive, 1, 10)])
    (row,) = archive.videos.all()
    moments = [Moment(row.video_id, row.video_number, row.uri, 0.0, 3.0, 0.0, 0.5)]
    export(str(tmp_path / "a.otio"), "otio", "x", archive, moments)
    (clip,) = otio.adapters.read_from_file(str(tmp_path / "a.otio")).find_clips()
    assert (clip.source_range.duration.rate, clip.source_range.duration.value) == (rate, 3 * rate)


@pytest.mark.parametrize(("name", "word"), [("found.txt", ".vtt or .otio or .edl"), ("no/such.csv", "no folder")])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name, word):
    with pytest.raises(UsageError, match=word):
        check_place(str(tmp_path / name))


def test_export_from_the_command_line(vidx, samples_archive, tmp_path):
    command = ["--archive", str(samples_archive[0]), "--video", "nano_scenes_1.mp4", "--top", "2", "--min-score", "-1"]
    found = vidx("search", "an apple", *command, "--json").json
    assert vidx("export", str(tmp_path / "found.json"), "an apple", *command).code == 0
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [entry["start_seconds"] for entry in entries] == [one["start_seconds"] for one in found["moments"]]
    nothing = vidx("export", str(tmp_path / "none.csv"), "an apple", *command[:-1], "1")
    assert (nothing.code, (tmp_path / "none.csv").exists()) == (4, False)


@pytest.mark.parametrize("name", ["csv", "json", "vtt", "otio", "edl"])
def test_export_to_standard_output_is_what_the_file_holds(vidx, samples_archive, tmp_path, name):
    command = ["--archive", str(samples_archive[0]), "--video", "nano_scenes_1.mp4", "--top", "2", "--min-score", "-1"]
    file = tmp_path / f"found.{name}"
    if name == "otio":
        pytest.importorskip("opentimelineio")
    assert vidx("export", str(file), "an apple", *command).code == 0
    piped = vidx("export", "-", "an apple", *command, "--format", name)
    assert (piped.code, piped.out) == (0, file.read_text(encoding="utf-8"))
    other = vidx("export", str(tmp_path / "found.txt"), "an apple", *command, "--format", name)
    assert (other.code, (tmp_path / "found.txt").read_text(encoding="utf-8")) == (0, piped.out)
    nothing = vidx("export", "-", "an apple", *command[:-1], "1", "--format", name)
    assert (nothing.code, nothing.out) == (4, "")


def test_standard_output_has_no_suffix_to_go_by(vidx, samples_archive, tmp_path):
    run = vidx("export", "-", "an apple", "--archive", str(samples_archive[0]), cwd=tmp_path)
    assert (run.code, "--format csv|json|vtt|otio|edl" in run.err, run.err.count("\n")) == (2, True, 1)
    assert not list(tmp_path.iterdir())
