"""The whole path on real clips: index, skip, search, ask, query, by the command line."""

import csv
import json
import os
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SAMPLES, VIDX

from storage.archive.archive import open_archive

SAMPLE_NAMES = sorted(path.name for path in SAMPLES.iterdir() if path.suffix not in (".md", ".png"))


def sql(vidx, archive, statement):
    run = vidx("sql", statement, "--archive", str(archive), "--json")
    assert run.code == 0, run.err
    return run.json


def test_indexing_reports_every_source(samples_archive):
    _, result = samples_archive
    assert result["videos_indexed"] == len(SAMPLE_NAMES)
    assert (result["videos_partial"], result["videos_failed"], result["videos_skipped"]) == (0, 0, 0)
    assert result["failures"] == []


def test_every_stored_time_is_a_frame_of_the_file(vidx, samples_archive):
    """The times are ffprobe's, read off the files apart from our decoders."""
    expected = {}
    with open(Path(__file__).parent / "videos" / "FRAMES.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            expected.setdefault(row["file"], []).append(float(row["pts_seconds"]))
    rows = sql(
        vidx,
        samples_archive[0],
        "SELECT v.source, f.frame_index, f.pts_seconds, f.time_seconds, f.duration_seconds "
        "FROM frames f JOIN videos v USING (video_id) ORDER BY 1, 2",
    )
    by_name = {}
    for row in rows:
        by_name.setdefault(os.path.basename(row["source"]), []).append(row)
    assert sorted(by_name) == SAMPLE_NAMES
    for name, found in by_name.items():
        times = expected[name]
        first = times[0]
        shown = []  # at the instants first + k, the frame then shown, each once: by hand from the list of times
        for k in range(int(times[-1] - first) + 1):
            index = max(i for i, t in enumerate(times) if t <= first + k + 1e-6)
            if index not in shown:
                shown.append(index)
        covered = [row for row in found if row["frame_index"] < len(times)]  # the list holds 600 frames a clip
        assert [row["frame_index"] for row in covered][: len(shown)] == shown, name
        for row in covered:
            assert abs(row["pts_seconds"] - times[row["frame_index"]]) < 1e-3, name
        for row, after in pairwise(found):
            assert abs(row["time_seconds"] + row["duration_seconds"] - after["time_seconds"]) < 1e-3, name


def test_the_position_is_what_a_player_shows(vidx, samples_archive):
    rows = sql(
        vidx,
        samples_archive[0],
        "SELECT min(time_seconds) AS first FROM frames JOIN videos USING (video_id) WHERE source LIKE '%bird_first%'",
    )
    assert rows == [{"first": 10.0}]


def test_a_second_run_indexes_nothing_and_says_so(vidx, samples_archive):
    run = vidx("index", str(SAMPLES), "--archive", str(samples_archive[0]))
    assert run.code == 0
    assert "Nothing to index" in run.out
    assert f"already knows all {len(SAMPLE_NAMES)} videos" in run.out


def test_search_cites_moments_and_scores_them_by_the_cosine_of_the_keys(vidx, samples_archive):
    run = vidx(
        "search", "a car on a road", "--archive", str(samples_archive[0]), "--limit", "3", "--floor", "-1", "--json"
    )
    assert run.code == 0, run.err
    found = run.json
    assert found["frames_searched"] == samples_archive[1]["frames"]
    scores = [moment["score"] for moment in found["moments"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)

    import numpy as np

    from workers.models.bundle import find_bundle
    from workers.vision.clip_text import TextEncoder

    query = TextEncoder(find_bundle("nano")).embed("a car on a road")
    rows = sql(
        vidx, samples_archive[0], "SELECT source, time_seconds, search_key FROM frames JOIN videos USING (video_id)"
    )
    keys = np.stack([np.frombuffer(bytes.fromhex(row["search_key"]), np.float16) for row in rows]).astype(np.float32)
    cosines = keys @ query / np.linalg.norm(keys, axis=1)
    best = int(np.argmax(cosines))
    assert abs(scores[0] - cosines[best]) < 1e-3
    assert found["moments"][0]["source"] == rows[best]["source"]
    assert abs(found["moments"][0]["best_seconds"] - rows[best]["time_seconds"]) < 1e-6
    assert found["moments"][0]["start_seconds"] <= rows[best]["time_seconds"] < found["moments"][0]["end_seconds"]


def test_video_and_time_narrow_a_search(vidx, samples_archive):
    archive = str(samples_archive[0])
    source = str(SAMPLES / "bottles_on_table.mp4")
    run = vidx(
        "search",
        "a hand",
        "--archive",
        archive,
        "--video",
        source,
        "--from",
        "0:00:10",
        "--to",
        "12.5",
        "--floor",
        "-1",
        "--json",
    )
    assert run.code == 0, run.err
    assert run.json["frames_searched"] == 3  # of 29.83 frames/s: those at 9.989, 10.994 and 12.000
    assert {moment["source"] for moment in run.json["moments"]} == {source}
    assert all(9 < m["start_seconds"] < 12.5 and m["end_seconds"] < 13.5 for m in run.json["moments"])
    moment = vidx("search", "a hand", "--archive", archive, "--video", f"{source}@11.5", "--floor", "-1", "--json")
    assert moment.json["frames_searched"] == 1


def test_a_video_is_named_by_path_uri_or_digits_of_its_id(vidx, samples_archive):
    archive = str(samples_archive[0])
    (row,) = sql(vidx, archive, "SELECT video_id, source, source_uri FROM videos WHERE source LIKE '%tractor%'")
    for name in (row["source"], row["source_uri"], row["video_id"], row["video_id"][:6]):
        run = vidx("search", "x", "--archive", archive, "--video", name, "--floor", "-1", "--json")
        assert {moment["video_id"] for moment in run.json["moments"]} == {row["video_id"]}, name


@pytest.mark.parametrize("fuse", ["exact", "patches", "tokens"])
def test_a_question_is_answered_from_each_source_of_pre_fusion(vidx, samples_archive, fuse):
    run = vidx("ask", "two apples", "--archive", str(samples_archive[0]), "--fuse", fuse, "--json")
    assert run.code == 0, run.err
    answer = run.json
    assert answer["found"] is True
    assert answer["fuse"] == fuse
    assert 0 < answer["frames_used"] <= 32
    assert answer["moments"]
    assert (answer["video_bytes_read"] > 0) == (fuse == "exact")


def test_all_frames_of_a_range_are_used_without_a_search(vidx, samples_archive):
    source = str(SAMPLES / "highway.avi")
    where = ["--video", source, "--to", "7.5", "--all"]
    run = vidx("ask", "What happens?", "--archive", str(samples_archive[0]), *where, "--json")
    assert run.code == 0, run.err
    assert run.json["frames_used"] == 8
    assert run.json["video_bytes_read"] == 0
    assert [moment["source"] for moment in run.json["moments"]] == [source]


def test_a_chosen_range_is_shown_whole_where_it_fits_and_searched_where_not(vidx, samples_archive):
    source = str(SAMPLES / "bottles_on_table.mp4")
    ask = ["ask", "How many are there?", "--archive", str(samples_archive[0]), "--max-tokens", "1", "--json", "--video"]
    part = vidx(*ask, f"{source}@10-12.5").json  # of 29.83 frames/s: those at 9.989, 10.994 and 12.000, up to 12.972
    (moment,) = part["moments"]
    assert (part["frames_used"], part["fuse"], moment["score"]) == (3, "exact", None)
    assert (moment["start_seconds"], moment["end_seconds"]) == pytest.approx((9.989, 12.972), abs=1e-3)
    whole = vidx(*ask, source, "--frames", "40").json  # all in order, as many as nano was trained on
    assert (whole["frames_used"], whole["over"], whole["moments"][0]["score"]) == (8, "stride", None)
    searched = vidx(*ask, source).json  # 40 frames are more than 32
    assert searched["frames_used"] <= 8
    assert None not in [moment["score"] for moment in searched["moments"]]
    ask[1] = "two apples"
    found = vidx(*ask, str(SAMPLES / "nano_scenes_1.mp4"), "--frames", "29").json  # of 30
    assert 0 < found["frames_used"] <= 8
    assert None not in [moment["score"] for moment in found["moments"]]


def test_an_answer_cites_the_frames_that_it_was_given_and_nothing_between_them(vidx, samples_archive):
    where = "source LIKE '%nano_scenes_1%' AND (time_seconds < 1.5 OR time_seconds BETWEEN 19.5 AND 20.5)"
    run = vidx("ask", "What?", "--archive", str(samples_archive[0]), "--where", where, "--max-tokens", "1", "--json")
    stretches = [(moment["start_seconds"], moment["end_seconds"]) for moment in run.json["moments"]]
    assert run.json["frames_used"] == 3
    assert [(round(start), round(end)) for start, end in stretches] == [(0, 2), (20, 21)]


def test_exact_takes_pictures_whose_sides_ffmpeg_pads(vidx, samples_archive):
    """800 x 640 is 832 x 640 to FFmpeg's limit on pixels, which was that of the largest picture asked for."""
    video = str(SAMPLES / "bird_first_frame_at_10s.mp4")
    run = vidx("ask", "What?", "--archive", str(samples_archive[0]), "--video", video, "--max-tokens", "1", "--json")
    assert (run.json["fuse"], run.json["fuse_note"]) == ("exact", "")


def test_the_same_question_gets_the_same_answer(vidx, samples_archive):
    answers = {vidx("ask", "two apples", "--archive", str(samples_archive[0]), "--json").out for _ in range(2)}
    assert len(answers) == 1


def test_exact_falls_back_and_says_so_when_the_video_is_gone(vidx, tmp_path):
    video = tmp_path / "tractor.webm"
    shutil.copy(SAMPLES / "tractor.webm", video)
    archive = str(tmp_path / "archive")
    assert vidx("index", str(video), "--archive", archive).code == 0
    video.unlink()
    for fuse in ([], ["--fuse", "exact"]):
        run = vidx("ask", "What?", "--archive", archive, "--video", "tractor.webm", "--json", *fuse)
        assert run.code == 0, run.err
        assert run.json["fuse"] == "patches"
        assert run.json["video_bytes_read"] == 0
        assert str(video) in run.json["fuse_note"]


def test_status_counts_what_is_there(vidx, samples_archive):
    run = vidx("status", "--archive", str(samples_archive[0]), "--json")
    found = run.json
    assert found["videos"] == {"indexed": len(SAMPLE_NAMES), "partial": 0, "failed": 0, "deleted": 0}
    assert found["frames"] == found["frames_searchable"] == samples_archive[1]["frames"]
    assert found["frames_pending"] == 0
    assert found["model_ids"] == [samples_archive[1]["model_id"]]
    disk = sum(path.stat().st_size for path in Path(samples_archive[0]).rglob("*") if path.is_file())
    assert 0.5 * disk < found["size_bytes"] <= disk


def test_a_moved_video_is_not_indexed_again_and_changed_content_is(vidx, tmp_path):
    folder, archive = tmp_path / "videos", str(tmp_path / "archive")
    folder.mkdir()
    shutil.copy(SAMPLES / "tractor.webm", folder / "a.webm")
    assert vidx("index", str(folder), "--archive", archive).code == 0
    (folder / "a.webm").rename(folder / "c.webm")
    told = vidx("index", str(folder), "--archive", archive).out
    assert "1 video has moved; the archive has the new place" in told
    assert f"Nothing to index: {archive} already knows the video" in told
    assert "has moved" not in vidx("index", str(folder), "--archive", archive).out
    (folder / "c.webm").rename(folder / "b.webm")
    moved = vidx("index", str(folder), "--archive", archive, "--json").json
    assert (moved["videos_indexed"], moved["videos_skipped"], moved["frames"]) == (0, 1, 0)
    assert [row["source"] for row in sql(vidx, archive, "SELECT source FROM videos")] == [str(folder / "b.webm")]
    shutil.copy(SAMPLES / "highway.avi", folder / "b.webm")
    changed = vidx("index", str(folder), "--archive", archive, "--json").json
    assert (changed["videos_indexed"], changed["frames"]) == (1, 9)
    assert sql(vidx, archive, "SELECT codec, frames FROM videos") == [{"codec": "mpeg4", "frames": 9}]
    assert sql(vidx, archive, "SELECT count(*) AS n FROM frames") == [{"n": 9}]
    assert vidx("search", "x", "--archive", archive, "--json").json["frames_searched"] == 9


def test_a_renamed_video_keeps_its_row_when_another_file_takes_its_name(vidx, tmp_path):
    folder, archive = tmp_path / "videos", str(tmp_path / "archive")
    folder.mkdir()
    shutil.copy(SAMPLES / "tractor.webm", folder / "cam1.webm")
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"source,captured_at,camera\n{folder / 'cam1.webm'},2024-05-01T12:00:00Z,north\n")
    assert vidx("index", str(manifest), "--archive", archive).code == 0
    (folder / "cam1.webm").rename(folder / "cam2.webm")
    shutil.copy(SAMPLES / "highway.avi", folder / "cam1.webm")
    run = vidx("index", str(folder), "--archive", archive, "--fps", "2", "--json").json
    assert run["videos_indexed"] == 2
    rows = sql(vidx, archive, "SELECT parse_filename(source) AS file, codec, tags, captured_at FROM videos ORDER BY 1")
    assert [(row["file"], row["codec"]) for row in rows] == [("cam1.webm", "mpeg4"), ("cam2.webm", "vp9")]
    assert rows[1]["tags"] == {"camera": "north"}  # what a plain folder does not say stays as the manifest said it
    assert rows[1]["captured_at"].startswith("2024-05-01T12:00:00")


def test_other_settings_index_again_and_replace(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    source = str(SAMPLES / "highway.avi")
    assert vidx("index", source, "--archive", archive, "--json").json["frames"] == 9
    assert vidx("index", source, "--archive", archive, "--fps", "2", "--json").json["frames"] == 18
    assert sql(vidx, archive, "SELECT count(*) AS n FROM frames") == [{"n": 18}]


def test_a_manifest_brings_tags_and_capture_times_to_the_views(vidx, tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"source,captured_at,camera\n{SAMPLES / 'highway.avi'},2024-05-01T12:00:00+02:00,dash\n")
    archive = str(tmp_path / "archive")
    assert vidx("index", str(manifest), "--archive", archive).code == 0
    (row,) = sql(vidx, archive, "SELECT captured_at, tags, tags['camera'] AS camera FROM videos")
    assert row["captured_at"].startswith("2024-05-01T10:00:00")
    assert row["tags"] == {"camera": "dash"}
    assert row["camera"] == "dash"
    manifest.write_text(manifest.read_text().replace("dash", "front"))
    assert vidx("index", str(manifest), "--archive", archive, "--json").json["videos_skipped"] == 1
    assert sql(vidx, archive, "SELECT tags['camera'] AS camera FROM videos") == [{"camera": "front"}]


def test_no_patch_tier_when_none_is_asked_for(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    assert vidx("index", str(SAMPLES / "highway.avi"), "--archive", archive, "--patches", "0").code == 0
    command = ["ask", "What?", "--archive", archive, "--to", "7.5", "--all", "--json"]
    assert vidx(*command).json["fuse"] == "tokens"
    run = vidx(*command, "--fuse", "patches")
    assert run.code == 0
    assert run.json["fuse"] == "tokens"
    assert "patch" in run.json["fuse_note"]


def test_a_video_of_several_segments_is_whole(vidx, tmp_path):
    """Six minutes make two segments; the times run through without a seam."""
    archive = str(tmp_path / "archive")
    run = vidx("index", str(Path(__file__).parent / "videos" / "blank_six_minutes.mp4"), "--archive", archive, "--json")
    assert run.code == 0, run.err
    assert run.json["frames"] == 363
    rows = sql(vidx, archive, "SELECT time_seconds, frame_index, segment FROM frames ORDER BY frame_index")
    assert len({row["segment"] for row in rows}) == 2
    assert [row["frame_index"] for row in rows] == [30 * k for k in range(363)]
    assert max(abs(row["time_seconds"] - k) for k, row in enumerate(rows)) < 1e-3
    moments = vidx("search", "nothing", "--archive", archive, "--limit", "1", "--floor", "-1", "--json").json["moments"]
    assert (moments[0]["start_seconds"], round(moments[0]["end_seconds"])) == (0.0, 363)  # one picture, one moment


def test_an_interrupted_job_keeps_what_is_finished_and_goes_on(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("highway.avi", "tractor.webm"):
        shutil.copy(SAMPLES / name, videos / name)
    shutil.copy(Path(__file__).parent / "videos" / "blank_six_minutes.mp4", videos / "z.mp4")
    job = subprocess.Popen(
        [VIDX, "index", str(videos), "--archive", archive, "--fps", "5", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in job.stderr:  # interrupted as soon as a short one is committed, or both are
            if line.startswith(("1/3 videos", "2/3 videos")):
                break
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to the whole group
        out, heard = job.communicate(timeout=300)
    finally:
        if job.poll() is None:
            job.kill()
    assert job.returncode == 130, heard
    result = json.loads(out)
    done = result["videos_indexed"]
    assert (done in (1, 2), result["interrupted"]) == (True, True)
    assert vidx("status", "--archive", archive, "--json").json["frames_pending"] == 0
    again = vidx("index", str(videos), "--archive", archive, "--fps", "5", "--json").json
    assert (again["videos_indexed"], again["videos_skipped"]) == (3 - done, done)
    assert sql(vidx, archive, "SELECT count(*) AS n, count(DISTINCT (video_id, ticks)) AS distinct_n FROM frames") == [
        {"n": 45 + 50 + 1814, "distinct_n": 45 + 50 + 1814}
    ]


def test_a_killed_job_leaves_no_process_and_resumes_without_duplicates(vidx, tmp_path):
    archive = str(tmp_path / "archive")
    command = [VIDX, "index", str(SAMPLES), "--archive", archive, "--json"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if line.startswith(("1/", "2/", "3/", "4/")):
            break
    job.kill()
    job.communicate()
    again = vidx("index", str(SAMPLES), "--archive", archive, "--json")
    assert again.code == 0, again.err
    counts = sql(vidx, archive, "SELECT count(*) AS n, count(DISTINCT (video_id, ticks)) AS d FROM frames")
    assert counts[0]["n"] == counts[0]["d"] == sum(r["frames"] for r in sql(vidx, archive, "SELECT frames FROM videos"))
    assert len(sql(vidx, archive, "SELECT 1 FROM videos WHERE status = 'indexed'")) == len(SAMPLE_NAMES)


def test_videos_that_are_examined_together_get_their_numbers_in_one_commit(vidx, tmp_path):
    script = "import pipeline.index.job; pipeline.index.job.ADMIT_SECONDS = 1e6"
    assert vidx("index", str(SAMPLES), "--archive", str(tmp_path), script=script).code == 0
    commits = list((tmp_path / "numbers" / "_delta_log").glob("*.json"))
    assert len(commits) <= 3  # the table, the first video where an encoder was ready by then, all the others
    assert len(open_archive(str(tmp_path)).numbers.known()) == len(SAMPLE_NAMES)
