"""What a running job says: the files at work, how much of them is done, and how long the rest takes."""

import fcntl
import os
import re
import shutil
import struct
import sys
import termios
from dataclasses import replace
from pathlib import Path
from pty import openpty

import pytest
from conftest import SAMPLES, process_of
from small_archive import PROBE

from pipeline.index.progress import Meter

SIX_MINUTES = Path(__file__).parent / "videos" / "blank_six_minutes.mp4"  # 363 s, cut once, at 300 s


def probe_of(seconds, *cut_seconds):
    """Of a video of ten ticks a second that begins at position 0."""
    cuts = tuple((10 * second, second) for second in cut_seconds)
    return replace(PROBE, clock_offset_seconds=0.0, duration_seconds=seconds, cuts=cuts)


# What is left


def test_time_left_goes_by_seconds_of_video_and_not_by_what_earlier_jobs_did():
    meter = Meter({"file:///a.mp4": 1_000_000_000, "file:///b.mp4": 500_000_000})
    meter.look(0.0)
    first = meter.begin("file:///a.mp4", probe_of(1000.0, 300, 600), ["..3000"])
    assert meter.total_seconds == 1000 + 500  # b has half of a's bytes
    assert meter.done_seconds == 300
    assert meter.seconds_left is None
    first.reach("3000..6000", 400.0, 100)
    meter.look(10.0)
    assert meter.seconds_left == pytest.approx(1100 / 10)  # 100 s of video in 10 s
    first.finish("3000..6000", 600.0)
    meter.begin("file:///b.mp4", probe_of(2000.0), [])  # longer than its bytes suggested
    assert meter.total_seconds == 3000
    first.finish("6000..", 1000.0)
    meter.end("file:///a.mp4")
    assert meter.done_seconds == 1000


def test_time_left_is_steady_where_work_comes_in_lumps():
    """Of 7,200 s of video 40 s are done every 20 s, seen each second: from the first lump on, 2 s of video a second."""
    meter, said = Meter({"file:///a.mp4": 1_000_000_000}), []
    video = meter.begin("file:///a.mp4", probe_of(7200.0), [])
    for second in range(1201):
        video.reach("..", second // 20 * 40.0, 0)
        meter.look(float(second))
        if second >= 300:
            said.append((meter.seconds_left, 3600 - second))
    assert all(left == pytest.approx(true, abs=0.08 * true) for left, true in said)


def test_time_left_follows_a_change_of_speed():
    meter = Meter({"file:///a.mp4": 1_000_000_000})
    video = meter.begin("file:///a.mp4", probe_of(100_000.0), [])
    for second in range(600):
        video.reach("..", 10.0 * second, 0)
        meter.look(float(second))
    for second in range(600, 2400):
        video.reach("..", 6000.0 + second - 600, 0)
        meter.look(float(second))
    assert meter.seconds_left == pytest.approx(100_000 - 7800, rel=0.05)  # 1 s of video a second for half an hour


def test_a_video_that_says_nothing_or_too_much_of_its_length_counts_what_it_held():
    meter = Meter({"file:///a.mp4": 100_000_000, "file:///b.mp4": 300_000_000, "file:///c.mp4": 100_000_000})
    assert meter.total_seconds is None
    silent = meter.begin("file:///b.mp4", probe_of(None), [])
    assert meter.total_seconds is None
    liar = meter.begin("file:///a.mp4", probe_of(1000.0), [])
    assert meter.total_seconds == pytest.approx(1000 + 3000 + 1000)
    liar.finish("..", 10.0)
    meter.end("file:///a.mp4")
    silent.finish("..", 30.0)
    meter.end("file:///b.mp4")
    meter.leave_out("file:///c.mp4")
    assert (meter.done_seconds, meter.total_seconds) == (40, 40)


def test_a_length_that_the_size_cannot_hold_is_not_believed():
    meter = Meter({"file:///a.mp4": 10_000_000, "file:///b.mp4": 20_000, "file:///c.mp4": 10_000_000})
    meter.begin("file:///a.mp4", probe_of(1000.0), [])
    meter.begin("file:///b.mp4", probe_of(100_000.0), [])
    assert meter.total_seconds < 2500  # a and c have 1,000 s each
    meter.begin("file:///c.mp4", probe_of(1000.0), [])
    assert 2000 < meter.total_seconds < 2500


def test_a_segment_that_is_tried_again_or_gives_nothing_ends_once():
    meter = Meter({"file:///a.mp4": 100_000_000})
    video = meter.begin("file:///a.mp4", probe_of(900.0, 300, 600), [])
    video.reach("..3000", 200.0, 20)
    video.reach("..3000", 100.0, 10)
    assert (video.done_seconds, video.frames_at_work) == (100, 10)
    video.finish("..3000", 290.0)  # has an end of its own
    video.reach("..3000", 250.0, 25)  # said before it ended, heard after
    video.finish("6000..", None)  # its worker was lost
    assert (video.done_seconds, video.frames_at_work) == (300, 0)


# What is shown


def on_terminal(command, columns=100):
    """What a command writes on a terminal so wide, without control sequences, and its exit code."""
    here, there = openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with process_of(command, stdin=there, stdout=there, stderr=there, env={**os.environ, "TERM": "xterm"}) as job:
        os.close(there)
        said = b""
        while True:
            try:
                said += os.read(here, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(here)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode().replace("\r", "\n"))
    return job.returncode, text


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_shows_the_files_at_work_and_their_times(tmp_path, columns):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(SIX_MINUTES, videos / "cam1.mp4")
    script = (
        "import pipeline.cli.main, pipeline.cluster.executor\n"
        "pipeline.cluster.executor.REACHED_SECONDS = 0.1; pipeline.cli.main.main()"
    )
    archive = str(tmp_path / "archive")
    command = [sys.executable, "-c", script, "index", str(videos), "--archive", archive, "--fps", "2"]
    code, text = on_terminal(command, columns)
    assert code == 0, text
    assert re.search(r"^0/1 videos", text, re.MULTILINE)
    positions = re.findall(r"cam1\.mp4 +0:0(\d):(\d\d) of 0:06:03", text)
    seconds = [60 * int(minutes) + int(rest) for minutes, rest in positions]
    assert seconds == sorted(seconds)
    assert len({*seconds} - {0, 300, 363}) >= 3  # more than whole segments
    assert "Traceback" not in text


def test_lines_name_the_files_and_resumed_frames_are_told_apart(vidx, tmp_path):
    archive, videos = str(tmp_path / "archive"), tmp_path / "videos"
    videos.mkdir()
    shutil.copy(SIX_MINUTES, videos / "cam1.mp4")
    shutil.copy(SAMPLES / "highway.avi", videos / "cam2.avi")
    script = (
        "import os, signal, pipeline.cli.progress_bar, pipeline.index.job\n"
        "from storage.archive.part_table import PartTable\n"
        "pipeline.cli.progress_bar.LINE_SECONDS = 0.2\n"
        "pipeline.index.job.COMMIT_SECONDS, commit, stopped = 0.0, PartTable.commit, []\n"
        "def stop(self, receipts):\n"
        "    landed = commit(self, receipts)\n"
        "    if any(receipt.segment.start_ticks for receipt in receipts) and not stopped:\n"  # the last 63 s of cam1
        "        stopped.append(1)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return landed\n"
        "PartTable.commit = stop"
    )
    done = vidx("index", str(videos), "--archive", archive, "--json", script=script)
    assert done.code == 130, done.err
    status = vidx("status", "--archive", archive, "--json").json
    assert (status["videos_in_progress"], "in progress" in vidx("status", "--archive", archive).out) == (1, True)
    again = vidx("index", str(videos), "--archive", archive, "--json")
    assert again.code == 0, again.err
    resumed = again.json["frames_resumed"]
    assert 60 <= resumed <= 63  # from the key frame at which it was cut
    assert status["frames_in_progress"] == status["frames_in_progress_searchable"] == resumed
    assert vidx("status", "--archive", archive, "--json").json["frames_in_progress"] == 0
    total = vidx("sql", "SELECT count(*) AS n FROM frames", "--archive", archive, "--json").json[0]["n"]
    assert done.json["frames"] + again.json["frames"] == total == 363 + 9
    assert f"{resumed} frames from an earlier run" in again.err
    assert re.search(r"^([12])/\1 videos, 0:06:\d\d of 0:06:\d\d, ", again.err, re.MULTILINE)
    assert "cam1.mp4 " in done.err
