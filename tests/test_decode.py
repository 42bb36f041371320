"""Frames come out at the right times, with the right pixels, each once; a decoder that hangs costs one video."""

import csv
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from storage.errors import VideoProblem
from storage.records import Choice, Reason, Segment
from workers.decode.client import FRAMES_AHEAD, Decoder
from workers.decode.clock import TimedFrame
from workers.decode.picture import nearest_index
from workers.decode.sample import Grid, Tally, sample

VIDEOS = Path(__file__).parent / "videos"
SHARED = Path(__file__).parent.parent.parent / "shared" / "videos"
FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg makes or checks this one")
CLIPS = sorted(
    path for folder in (VIDEOS, SAMPLES) for path in folder.iterdir() if path.suffix in (".webm", ".mp4", ".mkv")
)
if (SHARED / "FRAMES.csv").exists():
    own = {path.name for path in CLIPS}
    CLIPS += sorted(
        p for p in SHARED.iterdir() if p.is_file() and p.suffix not in (".csv", ".md") and p.name not in own
    )
HDR = ["-pix_fmt", "yuv420p10le", "-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"]
RATES = [Fraction(1), Fraction(1, 2), Fraction(2), Fraction("29.97"), Fraction(1, 3)]


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout_seconds=60) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def decoders(decoder):
    with Decoder(timeout_seconds=60, library="decord") as decord:
        yield {"decord": decord, "pyav": decoder}


def frame_table(path):
    """Frame times in seconds, exactly as listed; the first 600 of a clip."""
    table = (SHARED if path.parent == SHARED else VIDEOS) / "FRAMES.csv"
    with open(table, newline="") as file:
        return [Fraction(row["pts_seconds"]) for row in csv.DictReader(file) if row["file"] == path.name]


def ffprobe_ticks(path):
    """Every frame's time in ticks, by ffprobe; None where it knows none (the last ones of an AVI)."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "frame=best_effort_timestamp"]
    out = subprocess.run([*command, "-of", "csv=p=0", path], capture_output=True, text=True, check=True).stdout
    words = [line.strip(",") for line in out.split()]
    return [None if word == "N/A" else int(word) for word in words if word]


def expected_frames(times, step):
    """Ranks of the frames shown at the instants, by trying every instant."""
    kept, instant = [], times[0]
    while instant <= times[-1]:
        shown = max(i for i, at in enumerate(times) if at <= instant)
        if not kept or kept[-1] != shown:
            kept.append(shown)
        instant += step
    return kept


def decode_all(decoder, path, probe, fps, segment=None, batch=7, choice=Choice.RATE):
    """Columns of all frames: ticks, end_ticks, frame_index, pixels, thumbnails."""
    segment = segment or Segment("a" * 64, None, None, 0)
    batches = list(decoder.decode(path, probe, segment, fps, batch, choice))
    rows = []
    for frames in batches:
        columns = frames.ticks.tolist(), frames.end_ticks.tolist(), frames.frame_index.tolist()
        rows += zip(*columns, [p.tobytes() for p in frames.pixels], frames.thumbnails)
    assert all(len(frames) == batch for frames in batches[:-1])
    return rows


def make(folder, name, *arguments):
    """A video made by ffmpeg."""
    path = folder / name
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments), path], check=True, stdin=subprocess.DEVNULL)
    return path


@pytest.mark.parametrize("fps", RATES, ids=str)
@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_frames_are_those_shown_at_the_instants(decoder, path, fps):
    if fps != 1 and (path.name == "blank_six_minutes.mp4" or (path.parent == SHARED and fps != RATES[-2])):
        pytest.skip("the long one at one rate and the whole collection at two are enough")
    probe = decoder.probe(path)
    times = frame_table(path)
    rows = decode_all(decoder, path, probe, fps)
    ticks, end_ticks, ranks = ([row[i] for row in rows] for i in range(3))
    assert end_ticks[:-1] == ticks[1:]
    assert end_ticks[-1] > ticks[-1]
    listed = [round(at / probe.time_base) for at in times]  # ticks: the table rounds to microseconds
    step = 1 / (fps * probe.time_base)
    if len(times) == 600:  # the table ends here, the clip may go on
        expected = expected_frames(listed, step)[:-1]
        ranks = ranks[: len(expected)]
    else:  # an instant may fall into the last frame's duration
        expected = [rank for rank in expected_frames([*listed, end_ticks[-1]], step) if rank < len(listed)]
    assert ranks == expected
    for tick, rank in zip(ticks, ranks):
        assert abs(probe.pts_seconds(tick) - float(times[rank])) <= 0.001


def test_the_position_is_what_a_player_shows(decoder):
    bird = decoder.probe(SAMPLES / "bird_first_frame_at_10s.mp4")
    assert bird.time_seconds(bird.first_ticks) == 10
    menu = decoder.probe(VIDEOS / "pie_menu_screen.webm")
    assert menu.time_seconds(menu.first_ticks) == pytest.approx(0.007)


@needs_ffmpeg
@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_pixels_are_ffmpegs(decoder, path):
    difference = difference_to_ffmpeg(decoder, path)
    assert difference.mean() < 0.5
    assert difference.max() <= 16


def difference_to_ffmpeg(decoder, path):
    """By which the first pictures differ from those of the ffmpeg command line, whose version is another."""
    probe = decoder.probe(path)
    rows = decode_all(decoder, path, probe, Fraction(1))[:3]
    choice = "+".join(f"eq(n,{row[2]})" for row in rows)
    command = [FFMPEG, "-v", "error", "-i", path, "-map", f"0:{probe.stream_index}", "-vf", f"select='{choice}'"]
    command += ["-vsync", "0", "-frames:v", str(len(rows)), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout
    shown = np.frombuffer(out, np.uint8).reshape(-1, probe.height, probe.width, 3)
    small = shown[:, nearest_index(probe.height)[:, None], nearest_index(probe.width)[None]]
    ours = np.stack([np.frombuffer(row[3], np.uint8).reshape(336, 336, 3) for row in rows])
    return np.abs(ours.astype(int) - small)


@needs_ffmpeg
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_turned_videos_come_out_upright(decoder, tmp_path, turn):
    path = make(tmp_path, "turned.mp4", "-t", 1, "-i", SAMPLES / "bottles_on_table.mp4", "-c", "copy",
                "-metadata:s:v", f"rotate={turn}")  # fmt: skip
    probe = decoder.probe(path)
    assert (probe.width, probe.height) == ((640, 360) if turn == 180 else (360, 640))
    assert probe.rotation_degrees == turn  # as ffprobe says of the file that this option makes
    test_pixels_are_ffmpegs(decoder, path)


def test_thumbnails_are_small_upright_jpegs(decoder):
    path = VIDEOS / "window_to_rooftop_av1.mp4"
    frames = next(decoder.decode(path, decoder.probe(path), Segment("a" * 64, None, None, 0), Fraction(1), 2))
    for picture, pixels in zip(frames.thumbnails, frames.pixels):
        with Image.open(io.BytesIO(picture)) as image:
            assert (image.format, image.size) == ("JPEG", (90, 160))
            assert np.abs(np.asarray(image.resize((8, 8))).mean() - pixels.mean()) < 4


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("b_frames.ts", ["-c:v", "libx264", "-bf", "3", "-output_ts_offset", "5000"]),
        ("fields.ts", ["-vf", "tinterlace=interleave_top", "-c:v", "libx264", "-flags", "+ildct+ilme"]),
        ("mpeg2.mpg", ["-c:v", "mpeg2video", "-bf", "2", "-f", "vob"]),
        ("packed.avi", ["-c:v", "mpeg4", "-bf", "2"]),
        ("h264.avi", ["-c:v", "libx264", "-bf", "2"]),
        ("alt_ref.webm", ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-b:v", "300k"]),
        ("open_gop.mkv", ["-c:v", "libx265", "-x265-params", "log-level=none:keyint=20:open-gop=1:bframes=4"]),
        ("trimmed.mp4", ["-c:v", "libx264", "-bf", "2", "-g", "25", "-ss", "0.5"]),
        ("theora.ogv", ["-c:v", "libtheora"]),
        ("old.flv", ["-c:v", "flv"]),
        ("old.wmv", ["-c:v", "wmv2"]),
        # The 33 bits of a transport stream's clock run over after 95443.7 s.
        ("wrapped.ts", ["-c:v", "libx264", "-bf", "2", "-output_ts_offset", "95441"]),
        ("gap.mkv", ["-c:v", "libx264", "-vf", "setpts='PTS+gt(N,40)*7/TB'", "-fps_mode", "passthrough"]),
        ("uneven.mp4", ["-c:v", "libx264", "-vf", "select='lt(n,30)+not(mod(n,7))'", "-fps_mode", "vfr"]),
        ("live.mkv", ["-c:v", "libx264", "-live", "1"]),
        ("pieces.mp4", ["-c:v", "libx264", "-g", "30", "-movflags", "frag_keyframe+empty_moov"]),
        ("mpeg2_fields.ts", ["-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-top", "1"]),
        ("fields.mp4", ["-c:v", "libx264", "-x264-params", "tff=1", "-vf", "tinterlace=interleave_top"]),
        ("dark.mp4", ["-c:v", "libx265", "-x265-params", "log-level=none", *HDR]),
    ],
)
def test_times_and_ranks_are_ffprobes_in_every_container(decoder, tmp_path, name, arguments):
    path = make(tmp_path, name, "-i", SAMPLES / "tractor.webm", "-t", 5, "-s", "320x180", *arguments)
    probe = decoder.probe(path)
    listed = ffprobe_ticks(path)
    rows = decode_all(decoder, path, probe, Fraction(1000))
    assert [row[2] for row in rows] == list(range(len(listed)))
    assert all(want in (None, row[0]) for want, row in zip(listed, rows))
    if path.suffix in (".ts", ".mpg", ".ogv"):
        assert probe.time_seconds(probe.first_ticks) == pytest.approx(0, abs=0.1)
    if name == "live.mkv":
        assert probe.duration_seconds is None


@needs_ffmpeg
@pytest.mark.parametrize(
    "arguments",
    [["-c:v", "mpeg2video", "-flags", "+ildct+ilme"], ["-c:v", "libx265", "-x265-params", "log-level=none", *HDR]],
    ids=["interlaced", "hdr"],
)
def test_fields_stay_woven_and_hdr_is_not_toned(decoder, tmp_path, arguments):
    clip = ("-i", SAMPLES / "tractor.webm", "-t", 2, "-vf", "scale=320:180", *arguments)
    difference = difference_to_ffmpeg(decoder, make(tmp_path, "made.mkv", *clip))
    assert difference.mean() < 1.5  # toned pictures differ by tens


@needs_ffmpeg
def test_an_edit_list_hides_frames(decoder, tmp_path):
    whole = make(tmp_path, "whole.mp4", "-i", SAMPLES / "tractor.webm", "-c:v", "libx264", "-g", 50, "-bf", 2)
    path = make(tmp_path, "cut.mp4", "-ss", 1.2, "-i", whole, "-c", "copy")
    rows = decode_all(decoder, path, decoder.probe(path), Fraction(1000))
    listed = ffprobe_ticks(path)
    assert [row[0] for row in rows] == listed
    assert len(rows) < 248 - 25


def cut_anywhere(decoder, path, probe, fps, cuts):
    """The frames of all segments between these cuts, joined."""
    starts = [(None, 0), *cuts]
    ends = [*(ticks for ticks, _ in cuts), None]
    rows = []
    for (start, first_index), end in zip(starts, ends):
        rows += decode_all(decoder, path, probe, fps, Segment("a" * 64, start, end, first_index))
    return rows


@pytest.fixture(scope="module")
def cut_videos(tmp_path_factory):
    """Videos of several codecs with keyframes to cut at."""
    folder = tmp_path_factory.mktemp("cut")
    videos = [SAMPLES / "bottles_on_table.mp4", SAMPLES / "cars_overhead_vfr.mkv", VIDEOS / "pie_menu_screen.webm"]
    if FFMPEG:
        clip = ["-i", SAMPLES / "tractor.webm", "-vf", "scale=320:180"]
        x265 = "log-level=none:keyint=30:min-keyint=30:open-gop=1:bframes=4"
        videos += [
            make(folder, "open_gop.mkv", *clip, "-c:v", "libx265", "-x265-params", x265),
            make(folder, "b_frames.mp4", *clip, "-c:v", "libx264", "-bf", 3, "-g", 30),
            make(folder, "open_gop.mp4", *clip, "-c:v", "libx264", "-x264-params", "open-gop=1:bframes=3:keyint=30"),
            make(folder, "refresh.mp4", *clip, "-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=30"),
            make(folder, "b_frames.ts", *clip, "-c:v", "libx264", "-bf", 3, "-g", 30),
            make(folder, "alt_ref.webm", *clip, "-c:v", "libvpx", "-auto-alt-ref", 1, "-lag-in-frames", 16, "-g", 30),
            make(folder, "stills.avi", *clip, "-c:v", "mjpeg"),
        ]
    return videos


@pytest.mark.parametrize("library", ["decord", "pyav"])
@pytest.mark.parametrize("fps", [Fraction(1), Fraction(1, 7), Fraction(31, 3)], ids=str)
def test_any_cut_gives_the_same_frames(decoders, cut_videos, fps, library):
    choose = random.Random(7)
    cut, decoder = 0, decoders[library]
    for path in cut_videos:
        probe = decoder.probe(path)
        if probe.decoder != library:
            continue
        whole = decode_all(decoder, path, probe, fps)
        for count in (len(probe.cuts), (len(probe.cuts) + 1) // 2):
            cuts = sorted(choose.sample(probe.cuts, count))
            assert cut_anywhere(decoder, path, probe, fps, cuts) == whole, (path.name, cuts)
        cut += bool(probe.cuts)
    assert cut >= 2


def test_decord_and_pyav_agree_to_the_last_bit(decoders):
    compared = 0
    for path in CLIPS:
        probe = decoders["decord"].probe(path)
        if probe.decoder == "decord" and path.name != "blank_six_minutes.mp4":
            rows = decode_all(decoders["decord"], path, probe, Fraction(5))
            assert decoders["decord"].library == "decord"
            assert rows == decode_all(decoders["pyav"], path, probe, Fraction(5))
            assert decoders["pyav"].library == "pyav"
            compared += 1
    assert compared >= 4


COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A second of each colour, each from a keyframe on, with first presentation times above the decoding ones."""
    folder = tmp_path_factory.mktemp("coloured")
    sources = [argument for name in COLOURS for argument in ("-f", "lavfi", "-i", f"color={name}:s=128x96:r=25:d=1")]
    joined = [*sources, "-filter_complex", "concat=n=6", "-c:v", "libx264", "-g", 25, "-bf", 2, "-pix_fmt", "yuv420p"]
    return [
        make(folder, "with_edit_list.mp4", *joined),
        make(folder, "no_edit_list.mp4", *joined, "-use_editlist", 0),
        make(folder, "no_edit_list.mov", *joined, "-use_editlist", 0),
        make(folder, "fragmented.mp4", *joined, "-movflags", "frag_keyframe+empty_moov"),
        make(folder, "late.mp4", *joined, "-use_editlist", 0, "-output_ts_offset", 10),
        make(folder, "long_groups.mp4", *joined, "-g", 50, "-use_editlist", 0),
        make(folder, "matroska.mkv", *joined),
    ]


@needs_ffmpeg
@pytest.mark.parametrize("library", ["decord", "pyav"])
@pytest.mark.parametrize("fps", [Fraction(25, 27), Fraction(1), Fraction(5)], ids=str)
def test_no_picture_is_that_of_another_keyframe(decoders, coloured, library, fps):
    """Decord lands one keyframe late where it seeks in files whose first frame is shown after it is decoded."""
    by_decord = 0
    for path in coloured:
        decoder = decoders[library]
        probe = decoder.probe(path)
        by_decord += probe.decoder == "decord"
        for cuts in ([], [probe.cuts[1]], list(probe.cuts)):
            for row in cut_anywhere(decoder, path, probe, fps, cuts):
                second = int((row[0] - probe.first_ticks) * probe.time_base)
                pixel = np.frombuffer(row[3], np.uint8).reshape(336, 336, 3)[168, 168].astype(int)
                assert np.abs(pixel - ImageColor.getrgb(COLOURS[second])).max() < 12, (path.name, second)
    assert by_decord >= (4 if library == "decord" else 0)


def test_threads_change_nothing(decoders):
    path = SAMPLES / "bottles_on_table.mp4"
    for library, decoder in decoders.items():
        probe = decoder.probe(path)
        assert probe.decoder == library
        with Decoder(threads=3, library=library) as threaded:
            assert decode_all(threaded, path, probe, Fraction(1)) == decode_all(decoder, path, probe, Fraction(1))


def test_exact_frames_come_back_in_the_order_asked_for(decoder):
    path = SAMPLES / "bottles_on_table.mp4"
    probe = decoder.probe(path)
    rows = decode_all(decoder, path, probe, Fraction(1))
    chosen = [rows[35], rows[2], rows[36], rows[2]]
    before = decoder.bytes_read
    pixels = decoder.frames_at(path, probe, [row[0] for row in chosen])
    bytes_read = decoder.bytes_read - before
    assert [frame.tobytes() for frame in pixels] == [row[3] for row in chosen]
    assert 0 < bytes_read < 2 * path.stat().st_size
    with pytest.raises(VideoProblem, match="no frame"):
        decoder.frames_at(path, probe, [rows[1][0] + 1])


# Sampling alone, against trying every instant.
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.fractions(Fraction(1, 3), Fraction(50)),
    st.integers(-50, 50),
    st.sets(st.integers(1, 29), max_size=4),
)
def test_sampling_is_exact_for_any_times_and_cuts(gaps, step, first, cut_ranks):
    times = [first]
    for gap in gaps:
        times.append(times[-1] + gap)
    frames = [TimedFrame(at, 5, at) for at in times]
    grid = Grid(first, step)
    borders = [None, *(times[rank] for rank in sorted(cut_ranks) if rank < len(times)), None]
    kept = []
    for start, end in itertools.pairwise(borders):
        first_index = 0 if start is None else times.index(start)
        later = [frame for frame in frames if start is None or frame.ticks >= start]
        kept += sample(later, grid.takes, Segment("", start, end, first_index), lambda picture: picture, Tally())
    # The last frame lasts 5 ticks, so instants after it count too.
    expected = expected_frames([*times, times[-1] + 5], step)
    expected = [rank for rank in expected if rank < len(times)]
    assert [frame.frame_index for frame in kept] == expected
    assert [frame.ticks for frame in kept] == [times[rank] for rank in expected]
    assert [frame.end_ticks for frame in kept] == [*(times[rank] for rank in expected[1:]), times[-1] + 5]


def test_a_frame_with_a_wild_time_is_left_out():
    times = [0, 10, 90_000, 20, 30]
    frames = [TimedFrame(at, 10, at) for at in times]
    kept = list(
        sample(frames, Grid(0, Fraction(1)).takes, Segment("", None, None, 0), lambda picture: picture, Tally())
    )
    assert [frame.ticks for frame in kept] == [0, 10, 20, 30]
    assert [frame.frame_index for frame in kept] == [0, 1, 3, 4]


def child_pid():
    """The decoder process of this test's own decoder: the newest child of ours that is one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == os.getpid() and b"workers.decode.child" in command:
                found.append(int(entry.name))
    return found


def new_child(before):
    (pid,) = set(child_pid()) - set(before)
    return pid


def test_a_hang_ends_in_timeout_and_the_decoder_goes_on():
    path = SAMPLES / "bottles_on_table.mp4"
    before = child_pid()
    with Decoder() as decoder:
        probe = decoder.probe(path)
        patient, decoder._timeout_seconds = decoder._timeout_seconds, 3  # of the next call alone
        batches = decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(30), 1)
        first = next(batches)
        decoder._timeout_seconds = patient
        os.kill(new_child(before), signal.SIGSTOP)
        with pytest.raises(VideoProblem) as caught:
            list(batches)
        assert caught.value.reason is Reason.TIMEOUT
        assert "no progress for 3 s" in caught.value.detail
        assert first.ticks[0] == 0
        assert len(decode_all(decoder, path, probe, Fraction(1))) == 40


def test_a_crash_is_reported_and_the_decoder_goes_on():
    path = SAMPLES / "bottles_on_table.mp4"
    before = child_pid()
    with Decoder() as decoder:
        probe = decoder.probe(path)
        batches = decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(30), 1)
        next(batches)
        os.kill(new_child(before), signal.SIGKILL)
        with pytest.raises(VideoProblem) as caught:
            list(batches)
        assert caught.value.reason is Reason.CRASHED
        assert "SIGKILL" in caught.value.detail
        assert len(decode_all(decoder, path, probe, Fraction(1))) == 40


def test_a_process_killed_between_two_calls_is_replaced():
    path = SAMPLES / "tractor.webm"
    before = child_pid()
    with Decoder() as decoder:
        decoder.probe(path)
        os.kill(new_child(before), signal.SIGKILL)
        time.sleep(0.1)
        assert decoder.probe(path).width == 512


def test_an_abandoned_iterator_leaves_nothing_behind():
    path = SAMPLES / "bottles_on_table.mp4"
    before, threads = child_pid(), threading.active_count()
    with Decoder() as decoder:
        probe = decoder.probe(path)
        batches = decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(30), 4)
        next(batches)
        batches.close()
        assert set(child_pid()) == set(before)
        assert len(decode_all(decoder, path, probe, Fraction(1))) == 40
    end = time.monotonic() + 300
    while set(child_pid()) != set(before) or threading.active_count() > threads:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_decoding_runs_ahead_but_not_without_end():
    path = SAMPLES / "bottles_on_table.mp4"  # 1189 frames
    before = child_pid()
    with Decoder() as decoder:
        probe = decoder.probe(path)
        batches = decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(30), 1)
        next(batches)
        pid = new_child(before)
        waiting = cpu_time_at_rest(pid)
        os.kill(pid, signal.SIGSTOP)
        for _ in range(FRAMES_AHEAD - 1):
            next(batches)  # these were there already
        os.kill(pid, signal.SIGCONT)
        assert sum(1 for _ in batches) == 1189 - FRAMES_AHEAD
        assert cpu_time(pid) > 2 * waiting  # it had waited for us, far from the end


def cpu_time(pid):
    """Clock ticks that a process has used."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))


def cpu_time_at_rest(pid):
    """The same once it uses no more."""
    used = [-1, cpu_time(pid)]
    while used[-1] != used[-2]:
        time.sleep(1.5)
        used.append(cpu_time(pid))
    return used[-1]


def test_the_process_dies_with_its_owner(tmp_path):
    script = f"""
import os, signal, sys, time
from workers.decode.client import Decoder
decoder = Decoder()
decoder.probe({os.fspath(SAMPLES / "tractor.webm")!r})
print(open(f"/proc/self/task/{{os.getpid()}}/children").read(), flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    os.kill(pid, signal.SIGSTOP)  # a child that hangs for good
    owner.kill()
    owner.wait()
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the decoder process outlived its owner")


def test_the_process_is_light():
    script = "import sys, workers.decode.child; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "duckdb", "pyarrow", "faiss"} & set(loaded)
    script = "import sys, workers.decode.client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"av", "decord", "torch", "PIL"} & set(loaded)


@pytest.mark.skipif(not (SHARED / "eight_k_short.mp4").exists(), reason="the 8K clip is too large to copy")
def test_8k_stays_below_a_gigabyte():
    path = SHARED / "eight_k_short.mp4"
    before = child_pid()
    with Decoder() as decoder:
        probe = decoder.probe(path)
        assert len(decode_all(decoder, path, probe, Fraction(30))) == 8
        status = Path(f"/proc/{new_child(before)}/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < 1e9
