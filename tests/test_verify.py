"""verify finds every damaged byte and names it; repair leaves a whole archive, of which nothing sound is lost."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES
from small_archive import MODEL_ID, SAMPLING, add_video, random_rows, receipt_for, row_for, video_id_of

from storage.archive.archive import create_archive, open_archive
from storage.archive.delta import live_files, open_table
from storage.archive.row_table import drop_file
from storage.archive.settings import TABLES
from storage.care.repair import repair
from storage.care.verify import verify
from storage.errors import ArchiveError
from storage.files import join, local_path
from storage.parts.read import read_tokens
from storage.records import Problem, Reason, Status
from storage.vectors.vector_index import open_index, update_index


@pytest.fixture
def archive(tmp_path):
    """Three videos, one of them in two segments, and their index."""
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="a model")
    add_video(archive, 1)
    add_video(archive, 2)
    halves = [
        receipt_for(archive, 3, random_rows(4, 30), (None, 40)),
        receipt_for(archive, 3, random_rows(4, 31, start=4), (40, 80)),
    ]
    assert archive.parts.commit(halves) == [True, True]
    archive.videos.publish([row_for(archive, 3, 8)])
    update_index(archive)
    return archive


def folder(archive, *names):
    return Path(local_path(archive.uri).decode(), *names)


def flip(path, seed):
    """Turns over one bit somewhere."""
    random = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << random.integers(8)
    path.write_bytes(data)


def test_nothing_is_wrong_with_a_sound_archive(archive):
    found = verify(archive.uri)
    assert found.faults == ()
    assert found.frames == 18
    assert found.files == sum(len(named_files(archive, name)) for name in TABLES)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("where", ["frames", "videos", "numbers", "index"])
def test_a_flipped_bit_anywhere_in_a_file_is_found_and_the_file_named(archive, where, seed):
    live = [Path(fault) for fault in named_files(archive, where)]
    path = live[seed % len(live)]
    flip(path, seed)
    faults = verify(archive.uri).faults
    assert [fault.path for fault in faults] == [str(path)]


def named_files(archive, where):
    """The files of a table or of the index that are in use."""
    if where == "index":
        return sorted(str(path) for path in folder(archive, "index").iterdir() if path.suffix != ".lock")
    paths = live_files(open_table(join(archive.uri, where))).column("path").to_pylist()
    return [str(folder(archive, where, path)) for path in sorted(paths)]


def test_a_missing_and_a_shortened_file_are_named_with_their_videos(archive):
    first, second, *_ = (Path(path) for path in named_files(archive, "frames"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    faults = {fault.path: fault for fault in verify(archive.uri).faults}
    assert faults.keys() == {str(first), str(second)}
    assert "missing" in faults[str(first)].detail
    assert all(fault.sources[0].startswith("/clips/") for fault in faults.values())


def test_rows_that_say_other_frames_than_are_stored_are_found(archive):
    archive.videos.publish([row_for(archive, 1, 77)])
    (fault,) = verify(archive.uri).faults
    assert "77 frames, and 5 are stored" in fault.detail


def test_damaged_frames_are_taken_out_and_the_rest_stays(archive):
    before = {frame.ticks for frame in archive.frames.find(3)}
    (path, *_) = [Path(path) for path in named_files(archive, "frames") if holds(archive, path, 3)]
    flip(path, 1)
    done = repair(archive.uri)
    assert [fault.path for fault in done.found.faults] == [str(path)]
    (row,) = done.to_index
    assert (row.status, row.problem.reason, row.frame_count) == (Status.PARTIAL, Reason.DAMAGED, 4)
    after = open_archive(archive.uri)
    assert {frame.ticks for frame in after.frames.find(3)} < before
    assert len(after.frames.find([1, 2])) == 10
    assert verify(archive.uri).faults == ()
    assert open_index(after).pending_count == 0
    again = receipt_for(after, 3, random_rows(4, 30), (None, 40))
    late = receipt_for(after, 3, random_rows(4, 31, start=4), (40, 80))
    assert sorted(after.parts.commit([again, late])) == [False, True]  # only the gap takes rows


def test_damaged_files_stay_where_nothing_can_take_their_place(archive):
    (path, *_) = [Path(path) for path in named_files(archive, "frames") if holds(archive, path, 3)]
    before = archive.frames.find(3)
    in_part = [frame for frame in before if frame.part == path.name]
    cell = read_tokens(archive.frames_uri, in_part[1:2]).tobytes()
    data = path.read_bytes()
    assert data.count(cell) == 1
    path.write_bytes(data.replace(cell, bytes([cell[0] ^ 1]) + cell[1:]))
    asked = []

    def why_not(_, rows):
        asked.extend(row.video_number for row in rows)
        return away(_, rows)

    done = repair(archive.uri, why_not)
    assert [row.video_number for row in done.spared] == asked == [before[0].video_number]
    assert (done.to_index, done.left) == ((), ())
    after = open_archive(archive.uri)
    assert after.frames.find(3) == before
    read_tokens(after.frames_uri, in_part[:1] + in_part[2:])
    with pytest.raises(ArchiveError):
        read_tokens(after.frames_uri, in_part[1:2])
    assert open_index(after).pending_count == 0
    assert repair(archive.uri).spared == ()
    assert verify(archive.uri).faults == ()


def test_files_of_no_use_are_taken_out_though_nothing_can_take_their_place(archive):
    (path, *_) = [Path(path) for path in named_files(archive, "frames") if holds(archive, path, 3)]
    path.write_bytes(path.read_bytes()[:-100])
    done = repair(archive.uri, away)
    assert (len(done.to_index), done.spared, done.left) == (1, (), ())
    again = repair(archive.uri, away)  # until it is indexed
    assert [row.video_id for row in again.to_index] == [row.video_id for row in done.to_index]
    assert again.found.faults == ()


def away(archive, rows):
    return {row.video_id: Problem(Reason.VANISHED, "away") for row in rows}


def holds(archive, path, name):
    number = next(row.video_number for row in archive.videos.all() if row.uri.endswith(f"/{name}.mp4"))
    bounds = archive.parts.bounds()
    return Path(path).name in bounds.path[bounds.of(number)]


def test_a_video_whose_every_frame_was_damaged_is_failed(archive):
    (path,) = [path for path in named_files(archive, "frames") if holds(archive, path, 1)]
    flip(Path(path), 2)
    (row,) = repair(archive.uri).to_index
    assert (row.status, row.frame_count) == (Status.FAILED, 0)
    assert verify(archive.uri).faults == ()


def test_lost_numbers_come_back_from_the_frames(archive):
    given = archive.numbers.known()
    for path in named_files(archive, "numbers"):
        flip(Path(path), 3)
    done = repair(archive.uri)
    assert done.to_index == ()
    assert open_archive(archive.uri).numbers.known() == given
    assert verify(archive.uri).faults == ()


def test_a_damaged_part_does_not_keep_numbers_from_coming_back(archive):
    given = archive.numbers.known()
    for path in named_files(archive, "numbers"):
        flip(Path(path), 3)
    (part,) = [Path(path) for path in named_files(archive, "frames") if holds(archive, path, 2)]
    part.write_bytes(part.read_bytes()[:-9])
    done = repair(archive.uri)
    assert [row.uri for row in done.to_index] == ["file:///clips/2.mp4"]
    assert (open_archive(archive.uri).numbers.known(), done.left) == (given, ())


def test_a_number_in_use_is_never_given_twice_however_its_table_was_lost(archive):
    given = archive.numbers.known()
    for path in named_files(archive, "numbers"):
        drop_file(join(archive.uri, "numbers"), Path(path).name)  # where a repair was stopped
    after = open_archive(archive.uri)
    assert after.numbers.known() == {}
    key = (video_id_of(9), SAMPLING)
    (number,) = after.reserve([key]).values()
    assert number not in given.values()
    repair(archive.uri)
    assert open_archive(archive.uri).numbers.known() == given | {(key[0], str(SAMPLING)): number}


def test_frames_that_are_stored_twice_are_taken_out_and_indexed_again(archive):
    """Two jobs with other cuts of the same video, which no guard sees as one."""
    again = receipt_for(archive, 3, random_rows(6, 33), (None, 60))
    assert archive.parts.commit([again]) == [True]
    assert any("6 frames are stored twice" in fault.detail for fault in verify(archive.uri).faults)
    done = repair(archive.uri)
    assert [(row.uri, row.frame_count) for row in done.to_index] == [("file:///clips/3.mp4", 0)]
    assert done.left == ()


def test_frames_that_a_job_has_not_published_yet_are_no_damage(archive):
    late = receipt_for(archive, 3, random_rows(4, 32, start=8), (80, None))
    assert archive.parts.commit([late]) == [True]
    assert verify(archive.uri).faults == ()
    assert repair(archive.uri).to_index == ()


def test_a_part_that_the_log_gives_to_another_video_is_found(archive):
    log = min(folder(archive, "frames", "_delta_log").glob("*1.json"))
    text = log.read_text()
    number = next(row.video_number for row in archive.videos.all() if row.uri.endswith("/1.mp4"))
    changed, count = re.subn(rf'(video_number\\": ?){number}\b', r"\g<1>77", text)
    assert count == 2
    log.write_text(changed)
    assert any("another video" in fault.detail for fault in verify(archive.uri).faults)


def test_a_damaged_checkpoint_is_set_aside_where_the_commits_are_there(archive):
    log = folder(archive, "frames", "_delta_log")
    open_table(archive.frames_uri).create_checkpoint()
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    with pytest.raises(ArchiveError, match="damaged archive"):
        open_archive(archive.uri).frames.find()
    done = repair(archive.uri)
    assert any(checkpoint.name in note for note in done.notes)
    assert len(open_archive(archive.uri).frames.find()) == 18
    assert verify(archive.uri).faults == ()


def test_lost_rows_are_told_and_their_frames_kept(archive):
    for path in named_files(archive, "videos"):
        Path(path).unlink()
    done = repair(archive.uri)
    assert done.rows_lost == 3
    assert any("the rows of 3 videos are lost" in note and "deleted" in note for note in done.notes)
    after = open_archive(archive.uri)
    after.videos.publish([row_for(after, 1, after.parts.frame_count(1))])
    assert len(after.frames.find()) == 5


def test_a_repair_that_lost_rows_does_not_end_as_if_all_were_well(archive, vidx):
    for path in named_files(archive, "videos"):
        flip(Path(path), 2)
    done = vidx("repair", "--archive", str(folder(archive)), "--json")
    assert (done.code, done.json["rows_lost"], done.json["faults_left"]) == (3, 3, [])
    assert "tags" in done.err


def test_a_damaged_index_is_built_anew(archive):
    (path,) = folder(archive, "index").glob("*.keys")
    flip(path, 4)
    assert repair(archive.uri).to_index == ()
    assert verify(archive.uri).faults == ()
    assert open_index(archive).frame_count == 18


@pytest.mark.parametrize("length", [0, 40])
def test_a_commit_that_a_power_cut_left_cut_short_is_rolled_back(archive, length):
    add_video(archive, 4)
    newest = max(folder(archive, "frames", "_delta_log").glob("*.json"))
    newest.write_bytes(newest.read_bytes()[:length])
    with pytest.raises(ArchiveError, match="damaged archive"):
        open_archive(archive.uri).frames.find()
    assert any(str(newest) in fault.path for fault in verify(archive.uri).faults)
    done = repair(archive.uri)
    assert any("cut short" in note for note in done.notes)
    assert [(row.uri, row.status) for row in done.to_index] == [("file:///clips/4.mp4", Status.FAILED)]
    after = open_archive(archive.uri)
    assert len(after.frames.find([1, 2, 3])) == 18
    assert verify(archive.uri).faults == ()


def test_a_log_that_is_damaged_in_the_middle_cannot_be_repaired(archive):
    oldest = min(folder(archive, "frames", "_delta_log").glob("*.json"))
    oldest.write_bytes(b"{")
    with pytest.raises(ArchiveError, match="cannot be repaired: restore the archive from a copy"):
        repair(archive.uri)


# The commands


def test_a_sound_archive_is_said_to_be(vidx, samples_archive):
    run = vidx("verify", "--archive", str(samples_archive[0]))
    assert (run.code, run.err) == (0, "")
    assert "nothing is wrong" in run.out


def test_every_command_that_meets_damage_says_what_to_do_about_it(archive, vidx):
    place = str(folder(archive))
    logs = sorted(folder(archive, "frames", "_delta_log").glob("*.json"))
    kept = logs[-1].read_bytes()
    logs[-1].write_bytes(kept[:-20])  # as a power cut leaves it
    met = vidx("status", "--archive", place)
    assert (met.code, "`vidx repair` repairs what it can" in met.err) == (5, True), met.err
    listed = vidx("verify", "--archive", place)
    assert (listed.code, listed.out.splitlines()[-1].startswith("1 fault; `vidx repair` takes out")) == (5, True)
    logs[-1].write_bytes(kept)
    logs[0].write_bytes(b"{")
    listed = vidx("verify", "--archive", place)
    assert (listed.code, "1 fault; this cannot be repaired: restore" in listed.out) == (5, True)


def test_settings_that_are_damaged_can_be_copied(archive, vidx):
    (folder(archive) / "archive.json").write_text("{")
    met = vidx("status", "--archive", str(folder(archive)))
    assert (met.code, "restore this file from a copy" in met.err) == (5, True)


def test_what_is_damaged_is_indexed_again(vidx, tmp_path):
    video, archive = tmp_path / "clip.webm", tmp_path / "archive"
    shutil.copy(SAMPLES / "tractor.webm", video)
    assert vidx("index", str(video), "--archive", str(archive)).code == 0
    frames = vidx("sql", "SELECT ticks FROM frames ORDER BY ticks", "--archive", str(archive), "--json").json
    (part,) = (archive / "frames").glob("*.parquet")
    flip(part, 5)
    found = vidx("verify", "--archive", str(archive), "--json")
    assert (found.code, found.json["ok"]) == (5, False)
    assert [(fault["path"], fault["sources"]) for fault in found.json["faults"]] == [(str(part), [str(video)])]
    done = vidx("repair", "--archive", str(archive), "--json")
    assert (done.code, done.json["videos_damaged"], done.json["videos_incomplete"]) == (0, 1, [])
    assert vidx("verify", "--archive", str(archive)).code == 0
    assert vidx("sql", "SELECT ticks FROM frames ORDER BY ticks", "--archive", str(archive), "--json").json == frames


@pytest.mark.parametrize(("as_json", "reason"), [(False, "vanished"), (True, "changed")])
def test_what_cannot_be_indexed_again_is_mended_once_it_can(vidx, tmp_path, as_json, reason):
    video, archive = tmp_path / "clip.webm", tmp_path / "archive"
    shutil.copy(SAMPLES / "tractor.webm", video)
    vidx("index", str(video), "--archive", str(archive))
    frames = vidx("sql", "SELECT ticks FROM frames ORDER BY ticks", "--archive", str(archive), "--json").json
    (part,) = (archive / "frames").glob("*.parquet")
    flip(part, 6)
    video.rename(tmp_path / "elsewhere.webm")
    if reason == "changed":
        shutil.copy(SAMPLES / "highway.avi", video)
    done = vidx("repair", "--archive", str(archive), *["--json"] * as_json)
    assert done.code == 3
    if as_json:
        (problem,) = done.json["problems"]
        assert (problem["source"], problem["reason"]) == (str(video), reason)
        assert done.json["videos_incomplete"] == [video.as_uri()]
    else:
        assert done.err.startswith(f"{video}: ")
        assert f": {reason}: " in done.err
        assert done.err.endswith(" completes the video\n")
    (tmp_path / "elsewhere.webm").rename(video)
    assert vidx("repair", "--archive", str(archive)).code == 0
    assert vidx("verify", "--archive", str(archive)).code == 0
    assert vidx("sql", "SELECT ticks FROM frames ORDER BY ticks", "--archive", str(archive), "--json").json == frames
