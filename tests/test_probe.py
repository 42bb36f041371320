"""What a video says about itself: stream, clock, size as shown, and where it may be cut."""

import csv
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import SAMPLES

from workers.decode.client import Decoder
from workers.decode.picture import Orientation
from workers.protocol import probe_from_json, probe_to_json

VIDEOS = Path(__file__).parent / "videos"
SHARED = Path(__file__).parent.parent.parent / "shared" / "videos"


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as decoder:
        yield decoder


def test_a_clip_says_what_it_is(decoder):
    probe = decoder.probe(SAMPLES / "bottles_on_table.mp4")
    assert probe.container.startswith("mov,")
    assert (probe.codec, probe.width, probe.height, probe.rotation_degrees) == ("h264", 640, 360, 0)
    assert probe.time_base == Fraction(1, 11456)
    assert probe.duration_seconds == pytest.approx(39.855, abs=0.001)
    # ffprobe -show_entries packet=pts,flags: keyframes 250 frames apart, 384 ticks each.
    assert probe.cuts == tuple((rank * 384, rank) for rank in (250, 500, 750, 1000))


def test_an_empty_edit_delays_the_first_frame(decoder):
    probe = decoder.probe(SAMPLES / "bird_first_frame_at_10s.mp4")
    assert probe.first_ticks * probe.time_base == 10
    assert probe.clock_offset_seconds == 0
    assert probe.duration_seconds == pytest.approx(14)


def test_a_probe_survives_its_way_between_processes(decoder):
    probe = decoder.probe(SAMPLES / "cars_overhead_vfr.mkv")
    assert probe_from_json(probe_to_json(probe)) == probe


def test_pyav_decodes_unless_decord_is_asked_for_and_reads_the_file_right(decoder):
    paths = (VIDEOS / "bear_odd_size.webm", VIDEOS / "window_to_rooftop_av1.mp4", SAMPLES / "bottles_on_table.mp4")
    assert {decoder.probe(path).decoder for path in paths} == {"pyav"}
    with Decoder(library="decord") as decord:
        decoders = {path.name: decord.probe(path).decoder for path in paths}
    assert decoders == {
        "bear_odd_size.webm": "pyav",
        "window_to_rooftop_av1.mp4": "pyav",
        "bottles_on_table.mp4": "decord",
    }


@pytest.mark.skipif(not (SHARED / "MANIFEST.csv").exists(), reason="the whole collection is not here")
def test_every_clip_of_the_collection_is_as_its_manifest_says(decoder):
    with open(SHARED / "MANIFEST.csv", newline="") as file:
        for row in csv.DictReader(file):
            probe = decoder.probe(SHARED / row["file"])
            turned = int(row["rotation_degrees"]) % 360
            size = int(row["width"]), int(row["height"])
            assert (probe.width, probe.height) == (size[::-1] if turned in (90, 270) else size), row["file"]
            assert probe.rotation_degrees == turned, row["file"]
            assert (probe.codec, probe.container.split(",")[0]) == (row["video_codec"], row["container"].split(",")[0])
            first = probe.pts_seconds(probe.first_ticks)
            assert first == pytest.approx(float(row["start_time_seconds"]), abs=0.001), row["file"]
            if row["file"] == "telescope_mirror.mp4":
                assert probe.stream_index == 3


@pytest.mark.parametrize(
    ("matrix", "degrees"),
    [((1, 0, 0, 0, 1), 0), ((0, -1, 0, 1, 0), 90), ((-1, 0, 0, 0, -1), 180), ((0, 1, 0, -1, 0), 270)],
)
def test_display_matrices_turn_counter_clockwise(matrix, degrees):
    # av_display_rotation_get of FFmpeg: counter-clockwise degrees of these matrices.
    assert Orientation.of_display_matrix(matrix).rotation_degrees == degrees
