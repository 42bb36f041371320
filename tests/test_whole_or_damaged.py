"""A damaged or encrypted video is never called whole, and a whole one never damaged."""

import io
import json
import random
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from conftest import SAMPLES
from PIL import Image, ImageOps, features

from storage.errors import VideoProblem
from storage.records import Reason, Segment
from workers.decode.client import Decoder

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg makes these")
CLIP = ["-f", "lavfi", "-i", "testsrc2=s=128x96:r=25:d=3"]


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout_seconds=60) as decoder:
        yield decoder


def make(path, *arguments):
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments), path], check=True, stdin=subprocess.DEVNULL)
    return path


def decode(decoder, path):
    """All frames by their ticks, and the problem or None."""
    frames, problem = {}, None
    try:
        probe = decoder.probe(path)
        for batch in decoder.decode(path, probe, Segment("a" * 64, None, None, 0), Fraction(1000), 8):
            frames |= {int(at): pixels.tobytes() for at, pixels in zip(batch.ticks, batch.pixels)}
    except VideoProblem as error:
        problem = error
    return frames, problem


def packets(path):
    """Place and size in the file of each video packet, by ffprobe."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "packet=pos,size", "-of", "json"]
    out = subprocess.run([*command, path], capture_output=True, check=True)
    return [(int(entry["pos"]), int(entry["size"])) for entry in json.loads(out.stdout)["packets"]]


def damage(path, chosen, into):
    """A copy of a file with noise in the chosen packets' middles."""
    data, noise = bytearray(path.read_bytes()), random.Random(3)
    for place, size in chosen:
        count = min(60, size // 2)
        start = place + size // 2 - count // 2
        data[start : start + count] = noise.randbytes(count)
    into.write_bytes(data)
    return into


# Damaged


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", ["-c:v", "libx264", "-x264-params", "cabac=0"]),
        ("h264.mkv", ["-c:v", "libx264", "-x264-params", "cabac=0"]),
        ("mpeg4.avi", ["-c:v", "mpeg4"]),
        ("mpeg2.mpg", ["-c:v", "mpeg2video"]),
    ],
)
def test_a_video_without_one_whole_picture_fails(decoder, tmp_path, name, options):
    whole = make(tmp_path / f"whole_{name}", *CLIP, "-g", 1, "-b:v", "2M", *options)
    assert decode(decoder, whole)[1] is None
    noise = damage(whole, packets(whole), tmp_path / name)
    errors = subprocess.run([FFMPEG, "-v", "error", "-i", noise, "-f", "null", "-"], capture_output=True, check=False)
    frames, problem = decode(decoder, noise)
    assert errors.stderr
    assert (len(frames), problem.reason) == (0, Reason.CORRUPT)
    assert "every frame is damaged" in problem.detail or "no frame can be decoded" in problem.detail


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_pictures_of_noise_are_never_called_whole(decoder, tmp_path, codec):
    """Of such noise some decodes without a complaint."""
    options = ["-x265-params", "log-level=0"] if codec == "libx265" else []
    whole = make(tmp_path / "whole.mp4", *CLIP, "-g", 1, "-b:v", "2M", "-c:v", codec, *options)
    assert decode(decoder, whole)[1] is None
    assert decode(decoder, damage(whole, packets(whole), tmp_path / "noise.mp4"))[1].reason is Reason.CORRUPT


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "mpeg4.avi"])
def test_a_damaged_first_keyframe_is_told(decoder, tmp_path, name):
    options = ["-c:v", "mpeg4"] if name.endswith("avi") else ["-c:v", "libx264", "-x264-params", "cabac=0"]
    whole = make(tmp_path / f"whole_{name}", *CLIP, "-g", 25, *options)
    broken = damage(whole, packets(whole)[:1], tmp_path / name)
    frames, problem = decode(decoder, broken)
    assert len(frames) > 60
    assert problem.reason is Reason.CORRUPT


def test_a_recording_that_begins_between_keyframes_is_whole(decoder, tmp_path):
    """As every receiver writes that is switched on at some time; what ffmpeg shows of it is there."""
    long = make(tmp_path / "long.ts", "-f", "lavfi", "-i", "testsrc2=s=128x96:r=25:d=8", "-c:v", "libx264", "-bf", 2,
                "-g", 50)  # fmt: skip
    data = long.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[len(data) // 3 // 188 * 188 :])
    frames, problem = decode(decoder, cut)
    assert problem is None
    assert len(frames) >= 100


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
def test_every_loss_of_transport_packets_that_shows_is_told(decoder, tmp_path, codec):
    """HEVC's decoder has nothing to say about a picture of which the middle is missing."""
    options = ["-x265-params", "log-level=0"] if codec == "libx265" else []
    clip = ["-t", 3, "-i", SAMPLES / "tractor.webm", "-an", "-c:v", codec, "-b:v", "500k", "-bf", 2, "-g", 25]
    path = make(tmp_path / "whole.ts", *clip, *options)
    whole, problem = decode(decoder, path)
    assert problem is None
    data = path.read_bytes()
    cells = [data[place : place + 188] for place in range(0, len(data), 188)]
    video = [number for number, cell in enumerate(cells) if (cell[1] & 0x1F) << 8 | cell[2] == 0x100]
    seen = 0
    for seed in range(8):
        choose = random.Random(seed)
        first, count = choose.randrange(len(video)), choose.choice([1, 1, 2, 5, 20])
        lost = set(video[first : first + count])
        (tmp_path / "lost.ts").write_bytes(b"".join(cell for number, cell in enumerate(cells) if number not in lost))
        frames, problem = decode(decoder, tmp_path / "lost.ts")
        if frames != whole:
            assert problem is not None, (seed, first, count)
            seen += 1
    assert seen >= 5


# Encrypted


@pytest.mark.parametrize("options", [[], ["-movflags", "frag_keyframe+empty_moov"], ["-g", 1], ["-bf", 0]])
def test_an_encrypted_mp4_fails_as_such(decoder, tmp_path, options):
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "76a6c65c5ea762046bd749a2e632ccbb"]
    key += ["-encryption_kid", "a7e61c373e219033c21091fa607bf3b8"]
    path = make(tmp_path / "locked.mp4", *CLIP, "-c:v", "libx264", *options, *key)
    frames, problem = decode(decoder, path)
    assert (len(frames), problem.reason) == (0, Reason.ENCRYPTED)
    # Without the boxes that say how, nothing but the name of the sample entry tells.
    data = path.read_bytes()
    for box in (b"senc", b"tenc", b"saiz", b"saio"):
        data = data.replace(box, b"free")
    path.write_bytes(data)
    frames, problem = decode(decoder, path)
    assert (len(frames), problem.reason) == (0, Reason.ENCRYPTED)


def test_a_scrambled_broadcast_fails_as_encrypted(decoder, tmp_path):
    path = make(tmp_path / "clear.ts", *CLIP, "-c:v", "libx264")
    data, noise = bytearray(path.read_bytes()), random.Random(1)
    for place in range(0, len(data), 188):
        pid = (data[place + 1] & 0x1F) << 8 | data[place + 2]
        start = 4 + (1 + data[place + 4] if data[place + 3] & 0x20 else 0)
        if pid == 0x100 and start < 188:  # headers in the clear, payloads not; PES headers too are scrambled
            data[place + 3] |= 0x80
            data[place + start : place + 188] = noise.randbytes(188 - start)
    path.write_bytes(data)
    frames, problem = decode(decoder, path)
    assert (len(frames), problem.reason) == (0, Reason.ENCRYPTED)


def test_a_clear_video_with_encrypted_sound_is_indexed(decoder, tmp_path):
    path = make(tmp_path / "song.mp4", *CLIP, "-f", "lavfi", "-i", "sine=d=3", "-c:v", "libx264", "-c:a", "aac")
    path.write_bytes(path.read_bytes().replace(b"mp4a", b"enca"))
    frames, problem = decode(decoder, path)
    assert (len(frames), problem) == (75, None)


# Whole


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
def test_joined_transport_streams_with_one_clock_are_whole(decoder, tmp_path, codec):
    options = ["-x265-params", "log-level=0"] if codec == "libx265" else []
    path = tmp_path / "joined.ts"
    with open(path, "wb") as joined:
        for part in range(3):
            offset = ["-output_ts_offset", 3 * part, "-muxdelay", 0]
            joined.write(make(tmp_path / "part.ts", *CLIP, "-c:v", codec, "-bf", 0, *options, *offset).read_bytes())
    command = ["ffprobe", "-v", "error", "-show_entries", "frame=best_effort_timestamp", "-of", "csv=p=0", path]
    times = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace(",", "").split()
    frames, problem = decode(decoder, path)
    assert problem is None
    assert sorted(frames) == sorted({int(at) for at in times})
    assert len(frames) >= 224


def test_what_a_writer_into_a_pipe_leaves_is_whole(decoder, tmp_path):
    for kind, codec in (("avi", "mjpeg"), ("avi", "mpeg4"), ("flv", "flv"), ("matroska", "libx264"), ("asf", "wmv2")):
        path = tmp_path / f"piped_{codec}.{kind}"
        command = [FFMPEG, "-v", "error", *CLIP, "-c:v", codec, "-f", kind, "-"]
        path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
        frames, problem = decode(decoder, path)
        assert (len(frames), problem) == (75, None), path.name


@pytest.mark.parametrize("suffix", ["flv", "ts", "avi", "mkv", "mpg", "mp4", "ogv", "asf"])
@pytest.mark.parametrize("count", [1, 16, 188, 70_000])
def test_zeros_behind_a_recording_are_no_damage(decoder, tmp_path, suffix, count):
    codecs = {"ogv": "libtheora", "flv": "flv", "asf": "wmv2", "mpg": "mpeg2video", "avi": "mpeg4"}
    codec = codecs.get(suffix, "libx264")
    path = make(tmp_path / f"padded.{suffix}", *CLIP, "-c:v", codec)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(count))
    frames, problem = decode(decoder, path)
    assert (len(frames), problem) == (75, None)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert decode(decoder, path)[1] is not None


# Pictures


def jpegs(count, size=(160, 120), **options):
    files = []
    for number in range(count):
        file = io.BytesIO()
        picture = Image.new("RGB", size, (10 * number, 90, 200))
        picture.paste((255, 255, 255), (0, 0, size[0] // 2, 10))  # so that a turned picture shows
        picture.save(file, "JPEG", **options)
        files.append(file.getvalue())
    return files


def test_jpegs_behind_one_another_are_a_video_and_a_single_one_is_not(decoder, tmp_path):
    pictures = jpegs(30)
    video = tmp_path / "camera.mjpeg"
    video.write_bytes(b"".join(pictures))
    frames, problem = decode(decoder, video)
    assert (len(frames), problem) == (30, None)
    parts = (b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(p), p) for p in pictures)
    video.write_bytes(b"".join(parts))  # as a web camera sends them
    frames, problem = decode(decoder, video)
    assert (len(frames), problem) == (30, None)

    exif = Image.Exif()
    exif[0x0112] = 6
    with_thumbnail = jpegs(1, exif=exif.tobytes()[:-2] + jpegs(1, (32, 24))[0])[0]
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(data)) for data in jpegs(2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    for data in (pictures[0], with_thumbnail, file.getvalue(), pictures[0] + b"\xff\xd9" + bytes(100)):
        (tmp_path / "still.mjpeg").write_bytes(data)
        frames, problem = decode(decoder, tmp_path / "still.mjpeg")
        assert (len(frames), problem.reason) == (0, Reason.NOT_A_VIDEO)
        assert "JPEG" in problem.detail


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_heif_pictures_are_no_videos(decoder, tmp_path):
    pictures = {"still.avif": Image.new("RGB", (64, 48), "red"), "large.mp4": Image.effect_noise((640, 480), 50)}
    for name, picture in pictures.items():
        path = tmp_path / name
        picture.convert("RGB").save(path, "AVIF")
        for data in (path.read_bytes(), path.read_bytes()[:-20]):
            path.write_bytes(data)
            frames, problem = decode(decoder, path)
            assert (len(frames), problem.reason, problem.detail) == (
                0,
                Reason.NOT_A_VIDEO,
                "this is a HEIF picture, not a video",
            )


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mov"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_what_cameras_write_beside_a_picture_costs_no_frame(decoder, tmp_path, suffix, orientation):
    """EXIF comes with each frame, as side data of a kind that PyAV 18.1 does not know; Pillow turns the same one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    for number, data in enumerate(jpegs(10, exif=exif)):
        (tmp_path / f"{number:02}.jpg").write_bytes(data)
    path = make(tmp_path / f"lapse.{suffix}", "-framerate", 5, "-i", tmp_path / "%02d.jpg", "-c", "copy")
    frames, problem = decode(decoder, path)
    assert (len(frames), problem) == (10, None)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "00.jpg"))
    probe = decoder.probe(path)
    assert (probe.width, probe.height) == upright.size
    shown = np.frombuffer(next(iter(frames.values())), np.uint8).reshape(336, 336, 3)
    wanted = np.asarray(upright.resize((336, 336), Image.Resampling.NEAREST))
    assert np.abs(shown.astype(int) - wanted).mean() < 4
