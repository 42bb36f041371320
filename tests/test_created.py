"""The time of capture that a file gives itself: taken where it can be one, and a manifest wins over it."""

import json
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from workers.decode.client import Decoder
from workers.decode.creation_time import creation_time

NOW = datetime(2024, 6, 1, tzinfo=UTC)
MAY = datetime(2024, 5, 1, 12, 34, 56, tzinfo=UTC)


def make(path, codec, *metadata, color="red"):
    command = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", f"color={color}:s=64x48:r=25:d=1", "-c:v", codec]
    subprocess.run([*command, *metadata, path], check=True)
    return path


def told_by_ffprobe(path):
    command = ["ffprobe", "-v", "error", "-show_entries", "format_tags:stream_tags", "-of", "json", path]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    tables = [said["format"].get("tags", {}), *(stream.get("tags", {}) for stream in said["streams"])]
    return next((table["creation_time"] for table in tables if "creation_time" in table), None)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mov", "mpeg4"),
        ("a.mp4", "mpeg4"),
        ("a.mkv", "mpeg4"),
        ("a.webm", "libvpx"),
        ("a.flv", "flv"),
        ("a.ogv", "libtheora"),
        ("a.nut", "mpeg4"),
        ("a.wtv", "mpeg2video"),
        ("a.avi", "mpeg4"),  # these two do not keep it
        ("a.ts", "mpeg2video"),
    ],
)
def test_a_probe_tells_the_time_that_ffprobe_tells(tmp_path, name, codec):
    path = make(tmp_path / name, codec, "-metadata", "creation_time=2024-05-01T12:34:56Z")
    said = told_by_ffprobe(path)
    with Decoder() as decoder:
        found = decoder.probe(str(path).encode()).created_at
    assert found == (None if said is None else datetime.fromisoformat(said))
    assert (found is None) == (name in ("a.avi", "a.ts"))


def test_apples_time_with_its_zone_comes_before_that_of_the_container(tmp_path):
    times = "com.apple.quicktime.creationdate=2024-05-01T14:34:56+0200", "creation_time=2024-05-20T00:00:00Z"
    metadata = [word for time in times for word in ("-metadata", time)]
    path = make(tmp_path / "a.mov", "mpeg4", "-movflags", "use_metadata_tags", *metadata)
    with Decoder() as decoder:
        assert decoder.probe(str(path).encode()).created_at == MAY


@pytest.mark.parametrize(
    "text",
    [
        "1904-01-01T00:00:00.000000Z",
        "1903-12-31T23:00:00+0000",
        "1970-01-01T00:00:00Z",
        "1970-01-01T09:00:00Z",
        "1980-01-01 00:00:00",
        "0000-00-00T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "2024-06-03T00:00:00Z",
        "2040-02-06T06:28:15Z",
        "9999-12-31T23:59:59-12:00",
        "1712010112000",
        "",
        "yesterday",
    ],
)
def test_what_can_be_no_time_of_capture_is_not_taken(text):
    assert creation_time([{"creation_time": text}], NOW) is None
    good = {"creation_time": "2024-05-01T12:34:56Z"}
    assert creation_time([{"creation_time": text}, good], NOW) == MAY
    assert creation_time([{"com.apple.quicktime.creationdate": text, **good}], NOW) == MAY


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1985-07-14 20:15:00", datetime(1985, 7, 14, 20, 15, tzinfo=UTC)),  # a tape, digitised
        ("2024-06-01T11:00:00Z", NOW + timedelta(hours=11)),  # the local time of a camera in New Zealand
        ("2024-05-01T14:34:56,5+02:00", MAY + timedelta(seconds=0.5)),
    ],
)
def test_what_can_be_one_is_taken_in_utc(text, time):
    assert creation_time([{"CREATION_TIME": text}], NOW) == time


def test_an_archive_says_where_a_capture_time_comes_from_and_a_manifest_wins(vidx, tmp_path):
    videos, archive = tmp_path / "videos", str(tmp_path / "archive")
    videos.mkdir()
    for name, color, time in (
        ("dated", "red", "2024-05-01T12:34:56Z"),
        ("listed", "green", "2024-05-02T12:00:00Z"),
        ("undated", "blue", "1970-01-01T00:00:00Z"),
    ):
        make(videos / f"{name}.mkv", "mpeg4", "-metadata", f"creation_time={time}", color=color)
    (tmp_path / "m.csv").write_text("source,captured_at\nvideos/listed.mkv,2020-01-01\n")
    assert vidx("index", str(videos), str(tmp_path / "m.csv"), "--archive", archive).code == 0
    query = "SELECT parse_filename(source) AS name, captured_at, captured_from FROM videos ORDER BY 1"

    def told():
        rows = vidx("sql", query, "--archive", archive, "--json").json
        return {row["name"].split(".")[0]: (row["captured_at"], row["captured_from"]) for row in rows}

    expected = {
        "dated": ("2024-05-01T12:34:56", "file"),
        "listed": ("2020-01-01T00:00:00", "manifest"),
        "undated": (None, None),
    }
    assert told() == expected
    search = ("search", "x", "--min-score", "-1", "--archive", archive, "--json")
    found = vidx(*search, "--after", "2024-05-01", "--before", "2024-05-02").json["moments"]
    assert [moment["source"] for moment in found] == [str(videos / "dated.mkv")]
    listed = {
        row["source"].split("/")[-1]: row["captured_from"] for row in vidx("list", "--archive", archive, "--json").json
    }
    assert listed == {"dated.mkv": "file", "listed.mkv": "manifest", "undated.mkv": None}
    expiring = vidx("expire", "--older-than", "1d", "--archive", archive, "--dry-run").out
    ages = {line.split("/")[-1].strip(): line for line in expiring.splitlines() if ".mkv" in line}
    assert "capture time given by the file" in ages["dated.mkv"]
    assert "capture time " in ages["listed.mkv"]
    assert "given by the file" not in ages["listed.mkv"]
    missed = vidx(*search, "--after", "2025-01-01")
    assert "2 of 3 videos have a capture time, from 2020-01-01T00:00:00Z to 2024-05-01T12:34:56Z" in missed.err

    (tmp_path / "m.csv").write_text("source,captured_at\nvideos/dated.mkv,2024-05-01T12:34:56Z\n")  # it says the same
    assert vidx("index", str(videos), str(tmp_path / "m.csv"), "--archive", archive).code == 0
    assert told() == expected | {"dated": ("2024-05-01T12:34:56", "manifest")}
    assert vidx("index", str(videos), "--archive", archive, "--fps", "2").code == 0  # anew, and what was told stays
    assert told() == expected | {"dated": ("2024-05-01T12:34:56", "manifest")}
