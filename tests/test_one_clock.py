"""Recordings whose clock begins anew are indexed whole, on one clock, as a player shows them."""

import json
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import VideoProblem
from storage.records import Reason, Segment
from workers.decode.client import Decoder
from workers.decode.clock import OneClock, TimedFrame

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg makes these")
RED, BLUE = (np.array([254, 0, 0]), np.array([0, 0, 254]))
KINDS = {
    "h264.ts": ["-c:v", "libx264", "-bf", "2", "-g", "25"],
    "mpeg2.ts": ["-c:v", "mpeg2video", "-bf", "2"],
    "hevc.ts": ["-c:v", "libx265", "-x265-params", "log-level=0"],
    "camcorder.vob": ["-c:v", "mpeg2video", "-f", "vob"],
    "mpeg1.mpg": ["-c:v", "mpeg1video"],
    "chained.ogv": ["-c:v", "libtheora"],
    "vp8.webm": ["-c:v", "libvpx"],
    "vp9.webm": ["-c:v", "libvpx-vp9"],
    "h264.mkv": ["-c:v", "libx264", "-bf", "2"],
    "camera.flv": ["-c:v", "libx264", "-bf", "2"],
}


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout_seconds=60) as decoder:
        yield decoder


def recording(folder, name, colour, seconds, *options):
    path = folder / name
    source = f"testsrc2=s=96x64:r=25:d={seconds},drawbox=x=16:y=12:w=64:h=40:color={colour}:t=fill"
    subprocess.run([FFMPEG, "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, path], check=True)
    return path.read_bytes()


def frame_count(path):
    """By ffprobe, which decodes them all."""
    command = ["ffprobe", "-v", "quiet", "-count_frames", "-select_streams", "v:0", "-show_entries"]
    out = subprocess.run([*command, "stream=nb_read_frames", "-of", "json", path], capture_output=True, check=True)
    return int(json.loads(out.stdout)["streams"][0]["nb_read_frames"])


def decode(decoder, path, fps=Fraction(1000)):
    """Ticks, ends and pixels of the frames, the probe, and the problem."""
    probe, problem, batches = decoder.probe(path), None, []
    try:
        batches.extend(decoder.decode(path, probe, Segment("a" * 64, None, None, 0), fps, 8))
    except VideoProblem as error:
        problem = error
        if not batches:
            raise
    return (
        np.concatenate([batch.ticks for batch in batches]),
        np.concatenate([batch.end_ticks for batch in batches]),
        np.concatenate([batch.pixels for batch in batches]),
        probe,
        problem,
    )


@needs_ffmpeg
@pytest.mark.parametrize("name", KINDS)
def test_what_follows_a_restart_is_kept_behind_what_comes_before(decoder, tmp_path, name):
    first, second = (recording(tmp_path, f"{colour}_{name}", colour, 3, *KINDS[name]) for colour in ("red", "blue"))
    if name.endswith(".flv"):
        second = second[13:]  # a server that goes on after a reconnect writes no header again
    path = tmp_path / name
    path.write_bytes(first + second)
    ticks, end_ticks, pixels, probe, problem = decode(decoder, path)
    assert problem.reason is Reason.CLOCK_RESTARTED
    assert len(ticks) == frame_count(path) == 150
    assert np.all(np.diff(ticks) > 0)
    assert probe.time_seconds(int(end_ticks[-1])) - probe.time_seconds(int(ticks[0])) == pytest.approx(6, abs=0.05)
    middle = pixels[:, 168, 168].astype(int)
    assert np.abs(middle[:75] - RED).max() < 12
    assert np.abs(middle[75:] - BLUE).max() < 12
    # The exact frames of an answer are found again by their times.
    chosen = [int(ticks[place]) for place in (10, 80, 149)]
    assert np.array_equal(decoder.frames_at(path, probe, chosen), pixels[[10, 80, 149]])


@needs_ffmpeg
def test_a_transport_clock_that_begins_anew_far_below_is_no_gap_of_a_day(decoder, tmp_path):
    """FFmpeg takes a clock that goes back by hours for one that has overrun its 33 bits."""
    late = recording(tmp_path, "late.ts", "red", 3, *KINDS["h264.ts"], "-output_ts_offset", "36000")
    early = recording(tmp_path, "early.ts", "blue", 3, *KINDS["h264.ts"])
    path = tmp_path / "both.ts"
    path.write_bytes(late + early)
    ticks, end_ticks, pixels, probe, problem = decode(decoder, path)
    assert problem.reason is Reason.CLOCK_RESTARTED
    assert len(ticks) == 150
    assert probe.time_seconds(int(end_ticks[-1])) == pytest.approx(6, abs=0.05)
    assert np.abs(pixels[75:, 168, 168].astype(int) - BLUE).max() < 12


@needs_ffmpeg
def test_a_transport_clock_that_overruns_is_no_restart(decoder, tmp_path):
    """2^33 ticks of 90 kHz are 95,443.7 s."""
    recording(tmp_path, "overrun.ts", "red", 6, *KINDS["h264.ts"], "-output_ts_offset", "95440")
    ticks, end_ticks, _, probe, problem = decode(decoder, tmp_path / "overrun.ts")
    assert problem is None
    assert len(ticks) == 150
    assert probe.time_seconds(int(end_ticks[-1])) == pytest.approx(6, abs=0.05)


@needs_ffmpeg
def test_several_restarts_and_a_low_rate(decoder, tmp_path):
    parts = [recording(tmp_path, f"{i}.ts", colour, 3, *KINDS["h264.ts"]) for i, colour in enumerate(("red", "blue"))]
    path = tmp_path / "four.ts"
    path.write_bytes(b"".join(parts * 2))
    _, _, pixels, _, problem = decode(decoder, path, Fraction(1))
    assert "at 3.0 s, 6.0 s, 9.0 s" in problem.detail
    assert [int(colour) for colour in pixels[:, 168, 168].argmax(axis=1)] == [0, 0, 0, 2, 2, 2] * 2


def placed(ticks, container="avi", duration=10):
    clock = OneClock(Fraction(1, 100), container)
    frames = [TimedFrame(at, duration, number) for number, at in enumerate(ticks)]
    return [(frame.ticks, frame.picture) for frame in clock.place(iter(frames))], clock.restarts


def test_a_single_frame_with_a_wrong_time_is_no_restart():
    ahead = [0, 10, 20, 90_000, 30, 40, 50]
    behind = [1000, 1010, 1020, 0, 1040, 1050]
    for ticks in (ahead, behind):
        assert placed(ticks) == (list(zip(ticks, range(len(ticks)))), [])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(3, 12)), min_size=1, max_size=5))
def test_recordings_behind_one_another_are_one_recording(parts):
    """Each begins at least a second and two frames before the end of the one before."""
    ticks, start, last = [], 0, 10_000
    for step_back, count in parts:
        start = last - 200 - 13 * step_back if ticks else 0
        ticks += [start + 10 * place for place in range(count)]
        last = ticks[-1]
    found, restarts = placed(ticks)
    assert [at for at, _ in found] == list(range(0, 10 * len(ticks), 10))
    assert [number for _, number in found] == list(range(len(ticks)))
    assert len(restarts) == len(parts) - 1
