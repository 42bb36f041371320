"""A frame that is decoded again is the one that was indexed, byte for byte, and little else of the file is read."""

import itertools
import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from storage.errors import VideoProblem
from storage.records import Segment, Status, VideoRow
from workers.decode.client import Decoder
from workers.decode.picture import nearest_index
from workers.sources.identity import check_still_there, identify

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg makes these videos")
WIDTH, HEIGHT, RATE = 96, 64, 25
SOURCE = ["-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate={RATE}:duration=6,noise=alls=8:allf=t"]
SHORT = ["-g", "25", "-q:v", "4"]  # a key frame a second
X264 = ["-c:v", "libx264", "-preset", "veryfast", "-sc_threshold", "0", "-g", "25"]
OPEN = [*X264, "-x264-params", "open-gop=1:bframes=3"]
DEEP = [*X264, "-x264-params", "bframes=8:b-pyramid=normal:ref=8"]
REFRESH = [*X264, "-x264-params", "intra-refresh=1"]
FIELDS = [*X264, "-vf", "tinterlace=interleave_top", "-flags", "+ildct+ilme"]
X265 = ["-c:v", "libx265", "-preset", "veryfast", "-x265-params", "log-level=none:keyint=25:min-keyint=25:open-gop=1"]
VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "25"]
VP8 = ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-g", "25"]
MPEG4 = ["-c:v", "mpeg4", *SHORT]
MPEG2 = ["-c:v", "mpeg2video", *SHORT, "-bf", "2"]
PIECES = "frag_keyframe+empty_moov"
KINDS = {
    "open.mp4": OPEN,
    "open.mkv": OPEN,
    "open.ts": OPEN,
    "open.flv": OPEN,
    "open.avi": OPEN,
    "closed.ts": [*X264, "-bf", "2"],
    "late_clock.ts": [*X264, "-bf", "2", "-output_ts_offset", "5000"],
    # The 33 bits of a transport stream's clock run over after 95443.7 s.
    "wrapped.ts": [*X264, "-bf", "2", "-output_ts_offset", "95439"],
    "gap.ts": [*X264, "-vf", "setpts='PTS+gt(N,90)*70/TB'", "-fps_mode", "passthrough"],
    "deep.ts": DEEP,
    "deep.avi": DEEP,
    "refresh.mp4": REFRESH,
    "refresh.ts": REFRESH,
    "fields.ts": FIELDS,
    "one_group.mp4": [*X264, "-g", "1000", "-bf", "2"],
    "one_group.ts": [*X264, "-g", "1000", "-bf", "2"],
    "stills.ts": [*X264, "-g", "1"],
    "no_edit_list.mp4": [*X264, "-bf", "2", "-use_editlist", "0"],
    "late_start.mp4": [*X264, "-bf", "2", "-output_ts_offset", "10"],
    "pieces.mp4": [*X264, "-bf", "2", "-movflags", PIECES],
    "pieces_no_index.mp4": [*OPEN, "-movflags", f"{PIECES}+skip_trailer"],
    "pieces_one_index.mp4": [*X264, "-bf", "2", "-movflags", f"dash+{PIECES}+global_sidx"],
    "live.mkv": [*X264, "-bf", "2", "-live", "1"],
    "uneven.mkv": [*OPEN, "-vf", "select='lt(n,60)+not(mod(n,3))'", "-fps_mode", "vfr"],
    "raw.h264": [*X264, "-bf", "2"],
    "h264.nut": OPEN,
    "h264.mxf": OPEN,
    "hevc.mp4": X265,
    "hevc.ts": X265,
    "mpeg4.mp4": [*MPEG4, "-bf", "2"],
    "mpeg4.avi": [*MPEG4, "-bf", "2"],
    "packed.avi": ["-c:v", "libxvid", *SHORT, "-bf", "2"],
    "quarter_pixels.mkv": [*MPEG4, "-bf", "2", "-flags", "+qpel+mv4"],
    "raw.m4v": [*MPEG4, "-bf", "2"],
    "msmpeg4.avi": ["-c:v", "msmpeg4", *SHORT],
    "mpeg2.ts": MPEG2,
    "mpeg2.mpg": [*MPEG2, "-f", "vob"],
    "mpeg2.mkv": MPEG2,
    "mpeg2_fields.ts": [*MPEG2, "-flags", "+ildct+ilme", "-top", "1"],
    "vp8.webm": [*VP8, "-auto-alt-ref", "1", "-lag-in-frames", "16"],
    "vp8.ivf": VP8,
    "vp9.webm": VP9,
    "vp9.mp4": VP9,
    "av1.mkv": ["-c:v", "libsvtav1", "-preset", "12", "-g", "25"],
    "theora.ogv": ["-c:v", "libtheora", *SHORT],
    "sorenson.flv": ["-c:v", "flv", *SHORT],
    "wmv2.wmv": ["-c:v", "wmv2", *SHORT],
    "rv20.rm": ["-c:v", "rv20", *SHORT],
    "stills.avi": ["-c:v", "mjpeg", "-q:v", "4", "-pix_fmt", "yuvj420p"],
    "ffv1.mkv": ["-c:v", "ffv1", "-g", "25"],
}


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as decoder:
        yield decoder


def ffmpeg(*arguments):
    command = [FFMPEG, "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout


def make(folder, name, arguments, source=SOURCE):
    path = folder / name
    ffmpeg(*source, "-pix_fmt", "yuv420p", "-an", *arguments, path)
    return path


def from_start(decoder, path):
    """The probe, and every frame's picture by its time, decoded in one go."""
    probe = decoder.probe(path)
    batches = decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(1000), 50)
    pictures = {}
    try:
        for frames in batches:
            pictures.update(zip(frames.ticks.tolist(), (picture.tobytes() for picture in frames.pixels), strict=True))
    except VideoProblem:
        pass  # what came before it is valid
    return probe, pictures


def check_every_way(decoder, path, probe, pictures):
    """Single frames, some together, and all."""
    ticks, choose = list(pictures), random.Random(4)
    asked = [[tick] for tick in (ticks[0], ticks[1], ticks[-2], ticks[-1], *choose.sample(ticks, 8))]
    asked += [choose.sample(ticks, count) for count in (3, 12)]
    asked += [ticks[::5], ticks]
    probes = {probe, replace(probe, cuts=())}  # an archive keeps no cuts
    for known, some in itertools.product(probes, asked):
        got = decoder.frames_at(path, known, some, times_rise=True)
        for tick, picture in zip(some, got, strict=True):
            assert picture.tobytes() == pictures[tick], (tick, len(some))


@pytest.mark.parametrize("name", KINDS)
def test_exact_frames_are_those_of_decoding_from_the_start(decoder, tmp_path, name):
    path = make(tmp_path, name, KINDS[name])
    probe, pictures = from_start(decoder, path)
    assert len(pictures) > 60
    check_every_way(decoder, path, probe, pictures)


@pytest.mark.parametrize("name", ["open.ts", "mpeg4.avi", "mpeg2.mpg", "open.flv", "theora.ogv", "hevc.ts", "gap.ts"])
def test_exact_frames_are_ffmpegs(decoder, tmp_path, name):
    path = make(tmp_path, name, KINDS[name])
    probe, pictures = from_start(decoder, path)
    shown = np.frombuffer(ffmpeg("-i", path, "-vsync", "0", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"), np.uint8)
    rows, columns = nearest_index(HEIGHT)[::8], nearest_index(WIDTH)[::8]
    shown = shown.reshape(-1, HEIGHT, WIDTH, 3)[:, rows[:, None], columns[None]]
    assert len(shown) == len(pictures)
    ticks = list(pictures)
    for rank in random.Random(5).sample(range(len(ticks)), 6):
        (picture,) = decoder.frames_at(path, probe, [ticks[rank]])
        distance = np.abs(shown.astype(np.int16) - picture[::8, ::8]).mean(axis=(1, 2, 3))
        assert distance.argmin() == rank  # the noise differs from frame to frame
        assert distance[rank] < 0.5
        assert np.delete(distance, rank).min() > 2


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "mpeg4.mp4"])
def test_exact_frames_behind_an_edit_list(decoder, tmp_path, name):
    whole = make(tmp_path, f"whole_{name}", {**KINDS, "closed.mp4": [*X264, "-bf", "2"]}[name])
    path = tmp_path / name
    ffmpeg("-ss", 1.3, "-i", whole, "-c", "copy", path)
    probe, pictures = from_start(decoder, path)
    assert 110 < len(pictures) < 135
    check_every_way(decoder, path, probe, pictures)


@pytest.mark.parametrize("name", ["closed.mp4", "closed.ts", "open.mkv", "mpeg4.avi", "mpeg2.mpg", "open.flv"])
def test_exact_frames_of_a_damaged_video_are_those_that_were_indexed(decoder, tmp_path, name):
    path = make(tmp_path, name, {**KINDS, "closed.mp4": [*X264, "-bf", "2"]}[name])
    data, choose = bytearray(path.read_bytes()), random.Random(6)
    for _ in range(5):
        place = choose.randrange(len(data) // 8, len(data) * 7 // 8)
        data[place : place + 40] = choose.randbytes(40)
    path.write_bytes(data)
    probe, pictures = from_start(decoder, path)
    assert len(pictures) > 110
    check_every_way(decoder, path, probe, pictures)


def test_a_recording_that_begins_inside_a_group_of_pictures(decoder, tmp_path):
    whole = make(tmp_path, "whole.ts", KINDS["open.ts"])
    path = tmp_path / "begins_late.ts"
    path.write_bytes(whole.read_bytes()[188 * 40 :])
    probe, pictures = from_start(decoder, path)
    assert len(pictures) > 80
    check_every_way(decoder, path, probe, pictures)


HOUR = {
    "open.mp4": OPEN,
    "open.ts": OPEN,
    "open.mkv": OPEN,
    "mpeg4.avi": [*MPEG4, "-bf", "2"],
    "mpeg2.mpg": [*MPEG2, "-f", "vob"],
    "theora.ogv": ["-c:v", "libtheora", *SHORT],
    "wmv2.wmv": ["-c:v", "wmv2", *SHORT],
    "open.flv": OPEN,
    "sorenson.flv": ["-c:v", "flv", *SHORT],
    "live.mkv": [*X264, "-bf", "2"],
    "pieces_no_index.mp4": [*X264, "-bf", "2", "-crf", "8"],
}
REWRITE = {
    "mpeg2.mpg": ["-f", "vob"],
    "live.mkv": ["-live", "1"],
    "pieces_no_index.mp4": ["-movflags", f"{PIECES}+skip_trailer"],
}


@pytest.mark.parametrize("name", HOUR)
def test_one_frame_at_the_end_of_an_hour_reads_a_twentieth_of_the_file_at_most(decoder, tmp_path, name):
    piece = make(tmp_path, f"piece_{name}".replace(".flv", ".mkv"), HOUR[name])
    path = tmp_path / name
    ffmpeg("-stream_loop", 599, "-i", piece, "-c", "copy", *REWRITE.get(name, []), path)
    probe = decoder.probe(path)
    _, pictures = from_start(decoder, piece)
    ticks = packet_ticks(path)[-2000]
    assert probe.time_seconds(ticks) > 3500
    for known in {probe, replace(probe, cuts=())}:  # an archive keeps no cuts
        before = decoder.bytes_read
        (picture,) = decoder.frames_at(path, known, [ticks], times_rise=True)
        assert 0 < decoder.bytes_read - before <= 0.05 * path.stat().st_size
        assert picture.tobytes() in pictures.values()
    path.unlink()


def packet_ticks(path):
    """The times of a video's packets, ascending, as ffprobe has them."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "packet=pts,dts"]
    out = subprocess.run([*command, "-of", "csv=p=0", path], check=True, capture_output=True, text=True).stdout
    times = [[word for word in line.split(",") if word not in ("", "N/A")] for line in out.splitlines()]
    return sorted(int(words[0]) for words in times if words)


def test_frames_of_many_batches_are_decoded_once(decoder, tmp_path):
    path = make(tmp_path, "raw.h264", KINDS["raw.h264"])  # can only be read from its start
    probe, pictures = from_start(decoder, path)
    before = decoder.bytes_read
    batches = list(decoder.batches_at(path, probe, list(pictures), 16))
    assert [len(batch) for batch in batches[:-1]] == [16] * (len(batches) - 1)
    assert [picture.tobytes() for batch in batches for picture in batch] == list(pictures.values())
    assert decoder.bytes_read - before < 3 * path.stat().st_size
    with pytest.raises(ValueError, match="ascend"):
        next(decoder.batches_at(path, probe, list(pictures)[::-1], 16))


def test_a_time_of_no_frame_is_refused(decoder, tmp_path):
    path = make(tmp_path, "closed.ts", KINDS["closed.ts"])
    probe, pictures = from_start(decoder, path)
    with pytest.raises(VideoProblem, match="there is no frame at"):
        decoder.frames_at(path, probe, [list(pictures)[100] + 1])


def test_a_video_that_was_touched_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "clip.bin"
    path.write_bytes(random.Random(7).randbytes(1 << 22))
    content = identify(path)
    row = VideoRow(
        video_id=content.video_id,
        video_number=1,
        uri=path.as_uri(),
        status=Status.INDEXED,
        problem=None,
        model_id=None,
        sampling=None,
        frame_count=1,
        size_bytes=content.size_bytes,
        mtime_ns=content.mtime_ns,
        probe=None,
        captured_at=None,
        tags={},
        attempts=1,
    )
    os.utime(path, ns=(content.mtime_ns - 10**12, content.mtime_ns - 10**12))
    time.sleep(2.5)  # a file that changed just now is not remembered
    read = []
    for _ in range(2):
        before = bytes_read_so_far()
        check_still_there(row)
        read.append(bytes_read_so_far() - before)
    assert read[0] > 1 << 22 > 2 * read[1]
    path.write_bytes(random.Random(8).randbytes(1 << 22))
    with pytest.raises(VideoProblem, match="changed"):
        check_still_there(row)


def bytes_read_so_far():
    """By this process, as the kernel counts."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
