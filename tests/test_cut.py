"""`vidx clip`: what is cut out is the moment, with its sound, copied and not encoded again."""

import json
import subprocess

import numpy as np
import pytest
from conftest import SAMPLES


def ffprobe(path, *options):
    command = ["ffprobe", "-v", "error", *options, "-of", "json", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def frames_of(path):
    return ffprobe(path, "-select_streams", "v", "-show_entries", "frame=pts_time")["frames"]


def shown(path, seconds):
    """The picture that ffmpeg shows at a position."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-ss", str(seconds), "-frames:v", "1", "-vf", "scale=64:64"]
    data = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).astype(int)


@pytest.mark.parametrize(
    ("name", "start", "end", "suffix"),
    [
        ("bottles_on_table.mp4", 12.3, 15.0, ".mp4"),
        ("bottles_on_table.mp4", 12.3, 15.0, ".mkv"),
        ("bird_first_frame_at_10s.mp4", 11.0, 13.0, ".mp4"),
        ("highway.avi", 3.0, 6.0, ".avi"),
        ("highway.avi", 3.0, 6.0, ".mp4"),
        ("tractor.webm", 3.0, 6.0, ".webm"),
        ("cars_overhead_vfr.mkv", 20.0, 24.0, ".mkv"),
        ("cars_overhead_vfr.mkv", 3.0, 9.0, ".mp4"),  # begins and ends within pictures that are shown for long
        ("highway.avi", 4.0, 6.0, ".ts"),
    ],
)
def test_a_clip_shows_the_moment(vidx, samples_archive, tmp_path, name, start, end, suffix):
    out = tmp_path / f"out{suffix}"
    run = vidx("clip", f"{name}@{start}-{end}", str(out), "--archive", str(samples_archive[0]), "--json")
    assert run.code == 0, run.err
    said = run.json
    hides = suffix == ".mp4"
    assert said["start_seconds"] <= start + 1e-6
    if hides:
        frames = [float(frame["pts_time"]) for frame in frames_of(SAMPLES / name)]
        assert said["start_seconds"] == pytest.approx(max(at for at in frames if at <= start + 1e-6))
    assert said["end_seconds"] == pytest.approx(end, abs=0.2)
    found = ffprobe(out, "-show_entries", "stream=codec_name,codec_type:format=duration")
    source = ffprobe(SAMPLES / name, "-show_entries", "stream=codec_name,codec_type")
    copied = [stream["codec_name"] for stream in source["streams"] if stream["codec_type"] in ("video", "audio")]
    assert [stream["codec_name"] for stream in found["streams"]] == copied
    length = said["end_seconds"] - said["start_seconds"]
    assert float(found["format"]["duration"]) == pytest.approx(length, abs=0.25)
    for offset in (0.1, end - start - 0.5):
        at = start - said["start_seconds"] + offset
        # the file's own clock: a player of the bird begins at 10 seconds, ffmpeg counts from there as well
        origin = 10.0 if name.startswith("bird") else 0.0
        assert np.abs(shown(out, at) - shown(SAMPLES / name, start + offset - origin)).mean() < 6


def test_sound_is_cut_with_the_picture(vidx, tmp_path):
    video = tmp_path / "beep.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=8:r=10:s=128x96", "-f", "lavfi", "-i"]
    command += ["sine=d=8", "-c:v", "mpeg4", "-g", "20", "-c:a", "aac", str(video)]
    subprocess.run(command, check=True)
    assert vidx("index", str(video), "--archive", str(tmp_path / "a")).code == 0
    run = vidx("clip", "beep.mp4@3.5-6", "--archive", str(tmp_path / "a"), cwd=tmp_path)
    assert run.code == 0, run.err
    out = tmp_path / run.out.strip()
    assert out.name == "beep_0.00.03.5-0.00.06.0.mp4"
    found = ffprobe(out, "-show_entries", "stream=codec_type,start_time,duration")
    assert [stream["codec_type"] for stream in found["streams"]] == ["video", "audio"]
    for stream in found["streams"]:
        assert float(stream["start_time"]) == pytest.approx(0, abs=0.1)
        assert float(stream["duration"]) == pytest.approx(2.5, abs=0.3)
    again = vidx("clip", "beep.mp4@3.5-6", "out.webm", "--archive", str(tmp_path / "a"), cwd=tmp_path)
    assert (again.code, ".mkv" in again.err, again.err.count("\n")) == (2, True, 1), again.err
    assert not list(tmp_path.glob("out.webm*"))
    video.write_bytes(video.read_bytes() + b"x")
    changed = vidx("clip", "beep.mp4@3.5-6", "--archive", str(tmp_path / "a"), cwd=tmp_path)
    assert (changed.code, "changed since it was indexed" in changed.err) == (2, True), changed.err


def test_what_cannot_be_cut_is_refused_in_a_line(vidx, samples_archive, tmp_path):
    wrong = (
        (("highway.avi",), "VIDEO@START-END"),
        (("highway.avi@3",), "VIDEO@START-END"),
        (("highway.avi@3-5", str(tmp_path / "out.txt")), ".mkv"),
        (("highway.avi@3-5", str(tmp_path / "no" / "out.avi")), "no folder"),
        (("highway.avi@900-905", str(tmp_path / "out.avi")), "no picture"),
        (("bird_first_frame_at_10s.mp4@1-3", str(tmp_path / "out.mp4")), "no picture"),
        (("highway.avi@3-5", str(SAMPLES / "highway.avi")), "the video itself"),
        (("unknown.avi@3-5", str(tmp_path / "out.avi")), "no such video"),
    )
    for arguments, words in wrong:
        run = vidx("clip", *arguments, "--archive", str(samples_archive[0]))
        assert (run.code, words in run.err, run.err.count("\n")) == (2, True, 1), run.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_written_over_by_force_alone(vidx, samples_archive, tmp_path):
    archive = ("--archive", str(samples_archive[0]))
    named, unnamed = tmp_path / "out.avi", tmp_path / "highway_0.00.03.0-0.00.05.0.avi"
    for path, arguments in ((named, ("highway.avi@3-5", str(named))), (unnamed, ("highway.avi@3-5",))):
        path.write_bytes(b"another's")
        refused = vidx("clip", *arguments, *archive, cwd=tmp_path)
        assert (refused.code, "--force" in refused.err, refused.err.count("\n")) == (2, True, 1), refused.err
        assert path.read_bytes() == b"another's"
        assert vidx("clip", *arguments, "--force", *archive, cwd=tmp_path).code == 0
        assert path.read_bytes()[:4] == b"RIFF"
        assert vidx("clip", *arguments, *archive, cwd=tmp_path).code == 2
        path.unlink()
        path.symlink_to(tmp_path / "nowhere.avi")  # what a link leads to is not written either
        assert vidx("clip", *arguments, *archive, cwd=tmp_path).code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((named.name, unnamed.name))
    video = vidx("clip", "highway.avi@3-5", str(SAMPLES / "highway.avi"), "--force", *archive)
    assert (video.code, "the video itself" in video.err) == (2, True)


@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_a_source_without_an_index_is_cut_from_a_keyframe_before(vidx, tmp_path, suffix):
    video, out = tmp_path / f"long{suffix}", tmp_path / "out.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=40:r=10:s=128x96", "-c:v", "mpeg2video"]
    subprocess.run([*command, "-g", "100", "-bf", "2", "-b:v", "1M", str(video)], check=True)
    assert vidx("index", str(video), "--archive", str(tmp_path / "a"), "--fps", "0.5").code == 0
    run = vidx("clip", f"long{suffix}@25.5-28", str(out), "--archive", str(tmp_path / "a"), "--json")
    assert run.code == 0, run.err
    assert run.json["start_seconds"] == pytest.approx(25.5)
    assert np.abs(shown(out, 0.5) - shown(video, 26.0)).mean() < 6
