"""Wrong pictures that decord left in archives are found, and their videos indexed again."""

import subprocess

import numpy as np
import pytest
from conftest import run_vidx
from test_decode import COLOURS, FFMPEG

from storage.archive.archive import open_archive
from storage.parts.read import cell_shape, read_cells, read_patches, read_thumbnails
from storage.parts.write import FrameColumns, PartWriter
from storage.records import TokenBatch

pytestmark = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg makes the videos")


@pytest.fixture
def indexed(tmp_path):
    """A video of six colours that decord decoded, another that PyAV did, and their archive."""
    sources = [argument for name in COLOURS for argument in ("-f", "lavfi", "-i", f"color={name}:s=128x96:r=25:d=1")]
    video, other, archive = tmp_path / "colours.mp4", tmp_path / "other.mp4", tmp_path / "archive"
    command = [FFMPEG, "-v", "error", *sources, "-filter_complex", "concat=n=6", "-c:v", "libx264", "-g", "25"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", "-use_editlist", "0", video], check=True)
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", "testsrc=d=3", other], check=True)
    assert run_vidx("index", str(other), "--archive", str(archive)).code == 0
    assert run_vidx("index", str(video), "--archive", str(archive), "--decoder", "decord").code == 0
    return video, archive


def shift_pictures(archive, source):
    """Gives each frame of a video from the second on the picture of the next one, as decord did."""
    opened = open_archive(str(archive))
    row = opened.videos.find(str(source))
    assert row.probe.decoder == "decord"
    refs = opened.frames.find(row.video_number)
    wrong = [0, *range(2, len(refs)), len(refs) - 1]
    cells = {
        name: read_cells(opened.frames_uri, name, refs)
        .view(np.float16)
        .reshape(len(refs), *cell_shape(opened.frames_uri, name, refs[0]))
        for name in ("token", "compressor_out", "search_key")
    }
    thumbnails = read_thumbnails(opened.frames_uri, refs)
    ticks = np.array([ref.ticks for ref in refs])
    writer = PartWriter(
        opened.frames_uri, video_id=row.video_id, video_number=row.video_number, segment_key="..",
        time_base=row.probe.time_base, model_id=row.model_id, sampling=row.sampling, dtype="float32",
    )  # fmt: skip
    writer.append(
        FrameColumns(
            ticks,
            np.array([ref.frame_index for ref in refs]),
            row.probe.pts_seconds(ticks),
            np.array([ref.time_seconds for ref in refs]),
            np.array([ref.duration_seconds for ref in refs]),
        ),
        TokenBatch(
            **{name: rows[wrong] for name, rows in cells.items()}, patches=read_patches(opened.frames_uri, refs)
        ),
        [thumbnails[place] for place in wrong],
    )
    old = [part.path for part in opened.frames.parts() if part.video_number == row.video_number]
    assert opened.parts.join([(writer.close(), old)]) == [True]


def test_right_pictures_are_said_to_be(indexed):
    video, archive = indexed
    done = run_vidx("verify", "--pictures", "--archive", str(archive), "--json")
    assert (done.code, done.json["ok"]) == (0, True)
    assert done.json["pictures"] == [
        {"source": str(video), "checked": 6, "wrong": 0, "first_wrong_seconds": None, "problem": None}
    ]


def test_wrong_pictures_are_found_and_their_video_indexed_again(indexed):
    video, archive = indexed
    query = ("sql", "SELECT ticks, video_id FROM frames ORDER BY ALL", "--archive", str(archive), "--json")
    before = run_vidx(*query).json
    shift_pictures(archive, video)
    assert run_vidx("verify", "--archive", str(archive)).code == 0  # every byte is as it was written
    done = run_vidx("verify", "--pictures", "--archive", str(archive), "--json")
    assert (done.code, done.json["ok"], done.json["faults"]) == (5, False, [])
    (found,) = done.json["pictures"]
    assert (found["checked"], found["wrong"], found["first_wrong_seconds"]) == (6, 4, pytest.approx(1.0, abs=0.1))
    shown = run_vidx("verify", "--pictures", "--archive", str(archive))
    assert shown.code == 5
    assert "4 of 6" in shown.out
    assert "vidx repair --pictures" in shown.out

    mended = run_vidx("repair", "--pictures", "--archive", str(archive), "--json")
    assert (mended.code, mended.json["videos_damaged"], mended.json["videos_incomplete"]) == (0, 1, [])
    assert run_vidx(*query).json == before
    assert run_vidx("verify", "--pictures", "--archive", str(archive)).code == 0
    assert "picture" not in run_vidx("repair", "--archive", str(archive)).out  # nobody asked about them
    opened = open_archive(str(archive))
    assert opened.videos.find(str(video)).probe.decoder == "pyav"


def test_a_video_that_is_away_is_told_and_stays(indexed):
    video, archive = indexed
    video.rename(video.with_name("away.mp4"))
    done = run_vidx("verify", "--pictures", "--archive", str(archive))
    assert done.code == 3
    assert str(video) in done.err
    assert run_vidx("repair", "--pictures", "--archive", str(archive)).code == 0
    assert len(open_archive(str(archive)).frames.find()) == 9
