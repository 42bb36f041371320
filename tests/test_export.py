"""Moments as other programs read them, read back by those programs' own libraries where there are such."""

import csv
import io
import json

import av
import pytest
from small_archive import MODEL_ID, add_video

from pipeline.export import check_place, export
from storage.archive import create_archive
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
    one, two = archive.videos()  # 2.mp4 comes before café
    moments = [
        Moment(row.video_id, row.video_number, row.uri, start, end, start, score)
        for row, start, end, score in ((two, 3, 3661.5, 0.5), (two, 1.0, 2.04, 0.4), (one, 0.0, 2.0, 0.3))
    ]

    def write(name, count=3):
        export(str(tmp_path / name), TITLE, archive, moments[:count])
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


@pytest.mark.parametrize(("name", "word"), [("found.txt", ".csv, .json, .vtt, .otio"), ("no/such.csv", "no folder")])
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
