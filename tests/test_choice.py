"""Keyframes and first frames of scenes instead of an even rate; and a decoder that works without end is stopped."""

import dataclasses
import itertools
import subprocess
from fractions import Fraction

import pytest
from conftest import SAMPLES, needs_scenes, run_vidx
from test_decode import decode_all, ffprobe_ticks, make, needs_ffmpeg

from storage.errors import VideoProblem
from storage.records import Choice, Reason, Sampling, Segment
from workers.decode.client import Decoder

ALL = Fraction(1000)
WHOLE = Segment("a" * 64, None, None, 0)


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as decoder:
        yield decoder


@pytest.fixture(scope="module")
def cut_film(tmp_path_factory):
    """Three shots of 2, 3 and 2 seconds at 10 frames a second, with keyframes every 2.5 seconds."""
    folder = tmp_path_factory.mktemp("film")
    shots = [("testsrc2", 2), ("mandelbrot", 3), ("smptebars", 2)]
    inputs = [word for name, length in shots for word in ("-f", "lavfi", "-t", length, "-i", f"{name}=s=160x120:r=10")]
    codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "25", "-sc_threshold", "0", "-bf", "2"]
    join = ["-filter_complex", "concat=n=3", *codec]
    return {suffix: make(folder, f"film.{suffix}", *inputs, *join) for suffix in ("mp4", "ts")}


def keyframe_ranks(path):
    """Ranks of the keyframes, by ffprobe."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "frame=key_frame", "-of", "csv=p=0"]
    out = subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
    return [rank for rank, line in enumerate(filter(None, out.split())) if line.startswith("1")]


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_keyframes_are_ffprobes(decoder, cut_film, suffix):
    path = cut_film[suffix]
    rows = decode_all(decoder, path, decoder.probe(path), ALL, choice=Choice.KEYFRAMES)
    ticks = ffprobe_ticks(path)
    assert [row[2] for row in rows] == keyframe_ranks(path) == [0, 25, 50]
    assert [row[0] for row in rows] == [ticks[0], ticks[25], ticks[50]]
    assert [row[1] for row in rows][:2] == [ticks[25], ticks[50]]
    assert rows[2][1] > ticks[-1]


@needs_ffmpeg
@pytest.mark.parametrize("name", ["film.mp4", "bottles_on_table.mp4", "cars_overhead_vfr.mkv", "tractor.webm"])
def test_keyframes_look_as_in_a_full_decoding(decoder, cut_film, name):
    path = cut_film["mp4"] if name == "film.mp4" else SAMPLES / name
    probe = decoder.probe(path)
    pixels = {row[0]: row[3] for row in decode_all(decoder, path, probe, ALL)}
    rows = decode_all(decoder, path, probe, ALL, choice=Choice.KEYFRAMES)
    assert all(row[3] == pixels[row[0]] for row in rows)
    assert [row[2] for row in rows] == keyframe_ranks(path)


@needs_ffmpeg
def test_keyframes_of_segments_join_to_those_of_the_whole(decoder, cut_film):
    path = cut_film["mp4"]
    probe = decoder.probe(path)
    borders = [(None, 0), *probe.cuts, (None, 0)]
    assert len(borders) == 4
    parts = []
    for (start, first_index), (end, _) in itertools.pairwise(borders):
        part = Segment("a" * 64, start, end, first_index)
        parts += decode_all(decoder, path, probe, ALL, part, choice=Choice.KEYFRAMES)
    assert parts == decode_all(decoder, path, probe, ALL, choice=Choice.KEYFRAMES)


@needs_ffmpeg
@pytest.mark.parametrize("x264", ["open-gop=1:bframes=3:keyint=10:min-keyint=10", "intra-refresh=1:keyint=10"])
def test_keyframes_that_lean_on_others_are_kept_too(decoder, tmp_path, x264):
    clip = ("-f", "lavfi", "-t", 4, "-i", "testsrc2=s=160x120:r=10", "-c:v", "libx264", "-x264-params", x264)
    path = make(tmp_path, "film.mp4", *clip)
    rows = decode_all(decoder, path, decoder.probe(path), ALL, choice=Choice.KEYFRAMES)
    assert [row[2] for row in rows] == keyframe_ranks(path)


@needs_ffmpeg
def test_a_rate_is_the_most_there_may_be(decoder, tmp_path):
    still = make(tmp_path, "still.mkv", "-f", "lavfi", "-t", 4, "-i", "testsrc=s=64x48:r=10", "-c:v", "mjpeg")
    rows = decode_all(decoder, still, decoder.probe(still), Fraction(1), choice=Choice.KEYFRAMES)
    assert [row[2] for row in rows] == [0, 10, 20, 30]


@needs_ffmpeg
@needs_scenes
def test_scenes_begin_at_the_cuts(cut_film):
    path = cut_film["mp4"]
    with Decoder(choice=Choice.SCENES) as decoder:
        probe = decoder.probe(path)
        rows = decode_all(decoder, path, probe, ALL, choice=Choice.SCENES)
        assert [row[2] for row in rows] == [0, 20, 50]
        assert [row[1] for row in rows[:-1]] == [row[0] for row in rows[1:]]
        # At most one in four seconds: the second shot begins too early and is kept when the time has come.
        rows = decode_all(decoder, path, probe, Fraction(1, 4), choice=Choice.SCENES)
        assert [row[2] for row in rows] == [0, 40]


def test_a_sampling_is_written_as_it_is_read():
    for choice in Choice:
        sampling = Sampling(Fraction(30000, 1001), 7, choice)
        assert Sampling.from_text(str(sampling)) == sampling
    assert str(Sampling(Fraction(1), 7)) == "fps=1,patches=7"  # as archives hold it


def test_choices_are_kept_apart(tmp_path):
    clip, archive = str(SAMPLES / "nano_scenes_1.mp4"), str(tmp_path / "archive")
    assert run_vidx("index", clip, "--archive", archive).code == 0
    done = run_vidx("index", clip, "--archive", archive, "--sample", "keyframes", "--json")
    assert (done.code, done.json["videos_indexed"]) == (0, 1)
    rows = run_vidx("sql", "SELECT sampling, frames FROM videos", "--archive", archive, "--json").json
    assert [row["sampling"] for row in rows] == ["fps=1,patches=7,sample=keyframes"]
    stored = run_vidx("sql", "SELECT count(*) AS n FROM frames", "--archive", archive, "--json").json
    assert stored == [{"n": done.json["frames"]}]


def test_an_unknown_choice_is_told(tmp_path):
    done = run_vidx("index", str(SAMPLES), "--archive", str(tmp_path / "archive"), "--sample", "some")
    assert done.code == 2
    assert "'some' is not one of 'rate', 'keyframes', 'scenes'" in done.err


def test_work_without_end_is_stopped_and_what_came_is_kept(monkeypatch):
    """A real decoding, for which next to no processor time is allowed, stands for the endless one."""
    path = SAMPLES / "bottles_on_table.mp4"
    with Decoder(timeout_seconds=60) as decoder:
        probe = decoder.probe(path)
        monkeypatch.setattr(Decoder, "busy_per_second", lambda *_: 0)
        decoder.grace_seconds = 0.2
        ticks = []
        batches = (ticks.extend(frames.ticks.tolist()) for frames in decoder.decode(path, probe, WHOLE, ALL, 1))
        with pytest.raises(VideoProblem, match="processor time") as caught:
            list(batches)
        assert caught.value.reason is Reason.TIMEOUT
        assert 0 < len(ticks) < 1189


def test_the_limit_on_work_follows_the_length_and_not_a_header():
    decoder = Decoder(threads=2)
    probe = decoder.probe(SAMPLES / "bottles_on_table.mp4")
    allowed = decoder._busy_seconds
    minute = Segment("a" * 64, 0, round(60 / probe.time_base), 0)
    assert allowed(probe, minute, 10**9) == pytest.approx(2 * 600)
    assert allowed(dataclasses.replace(probe, width=7680, height=4320), minute, 10**9) == pytest.approx(2 * 9600)
    endless = dataclasses.replace(probe, duration_seconds=1e9)
    assert allowed(endless, WHOLE, 20_000) == pytest.approx(2 * 100)
    assert allowed(dataclasses.replace(probe, duration_seconds=None), WHOLE, 20_000) == pytest.approx(2 * 100)
    decoder.close()
