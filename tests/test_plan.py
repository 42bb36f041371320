"""What a job does with each source: known ones are recognised without being read, failures are not tried for ever."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SAMPLES, VIDX
from small_archive import PROBE

from pipeline.index.archived import ArchivedVideos, WantedRows
from pipeline.index.plan import TRIES, Decision, plan_sources
from storage.archive.row_table import Rows
from storage.archive.video_rows import to_arrow
from storage.files import to_uri
from storage.records import Problem, Reason, Sampling, Status, VideoAsset, VideoRow
from workers.sources.hash_cache import HashCache
from workers.sources.identity import identify

SAMPLING = Sampling(Fraction(1), 7)
WANTED = WantedRows("m" * 64, SAMPLING, max_pixels=1000)
BROKEN = Path(__file__).parent / "videos" / "broken"
TRACTOR = SAMPLES / "tractor.webm"


def old_file(path, data=b"some bytes"):
    """A file that was last changed a while ago."""
    path.write_bytes(data)
    os.utime(path, (1.7e9, 1.7e9))
    return path


@pytest.fixture
def settled(monkeypatch):
    """Files that were made just now count as old: nothing but time makes a change time old."""
    monkeypatch.setattr("workers.sources.hash_cache.SETTLED_SECONDS", -1.0)


# The cache of hashes


def test_a_cache_that_cannot_be_used_is_told_and_does_no_harm(vidx, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    archive = str(tmp_path / "archive")
    done = vidx("index", str(TRACTOR), "--archive", archive, env={"VIDX_CACHE": str(tmp_path / "file")})
    assert done.code == 0
    assert "file hashes are not kept" in done.err
    assert str(tmp_path / "file") in done.err


def test_a_file_whose_hash_is_remembered_is_not_read(tmp_path, settled, monkeypatch):
    path = old_file(tmp_path / "a.mp4")
    content = identify(path, HashCache(tmp_path / "hashes"))
    cache = HashCache(tmp_path / "hashes")
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", None)
        assert identify(path, cache) == content
    os.chmod(path, 0o400)  # changes its change time, and nothing else
    assert cache.get(path.stat()) is None
    assert identify(path, cache) == content
    assert cache.get(path.stat()) == content.video_id


def test_changed_bytes_show_though_size_and_modification_time_are_the_same(tmp_path, settled):
    cache = HashCache(tmp_path / "hashes")
    path = old_file(tmp_path / "a.mp4")
    first = identify(path, cache)
    old_file(path, b"other byte")
    second = identify(path, cache)
    assert (first.size_bytes, first.mtime_ns) == (second.size_bytes, second.mtime_ns)
    assert first.video_id != second.video_id


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path):
    cache = HashCache(tmp_path / "hashes")
    path = tmp_path / "a.mp4"
    path.write_bytes(b"being written")
    identify(path, cache)
    assert cache.get(path.stat()) is None


def test_a_damaged_cache_is_begun_anew(tmp_path, settled):
    place = tmp_path / "hashes"
    place.write_bytes(b"no database" * 1000)
    path = old_file(tmp_path / "a.mp4")
    cache = HashCache(place)
    assert cache.problem == ""
    content = identify(path, cache)
    assert HashCache(place).get(path.stat()) == content.video_id


def test_a_cache_that_cannot_be_written_says_why_and_is_empty(tmp_path, settled):
    (tmp_path / "file").write_bytes(b"")
    cache = HashCache(tmp_path / "file" / "hashes")
    assert str(tmp_path / "file") in cache.problem
    path = old_file(tmp_path / "a.mp4")
    assert identify(path, cache).size_bytes == 10
    assert cache.get(path.stat()) is None


def test_inode_numbers_may_fill_64_bits(tmp_path):
    cache = HashCache(tmp_path / "hashes")
    stat = SimpleNamespace(st_dev=1, st_ino=2**64 - 5, st_size=9, st_mtime_ns=10**18, st_ctime_ns=10**18)
    cache.put(stat, "f" * 64, 2 * 10**18)
    assert cache.get(stat) == "f" * 64


# Plans


def asset(path):
    return VideoAsset(to_uri(path))


def row(path, content=None, problem=None, **changes):
    """The row of a source."""
    values = {
        "video_id": content and content.video_id,
        "video_number": 1,
        "uri": to_uri(path),
        "status": Status.FAILED if problem else Status.INDEXED,
        "problem": problem and Problem(problem, "above the 1000 pixels allowed"),
        "model_id": WANTED.model_id,
        "sampling": str(SAMPLING),
        "frame_count": 0 if problem else 5,
        "size_bytes": content and content.size_bytes,
        "mtime_ns": content and content.mtime_ns,
        "probe": PROBE,
        "captured_at": None,
        "tags": {},
        "attempts": 1,
    }
    return VideoRow(**values | changes)


def planned(assets, rows, *others, **options):
    return plan_sources(assets, ArchivedVideos(Rows.of(to_arrow(rows))), *others, **options)


def decisions(known):
    return [found for _, found in known.all()]


def plan(path, rows, wanted=WANTED):
    known = planned([asset(path)], rows, wanted, HashCache(Path(path).parent / "hashes"))
    (found,) = decisions(known)
    assert (known.todo == (asset(path),)) == found.is_work
    return found


def test_a_source_is_new_changed_known_or_moved(tmp_path):
    path = old_file(tmp_path / "a.mp4")
    content = identify(path)
    assert plan(path, []) is Decision.NEW
    assert plan(path, [row(path, content)]) is Decision.KNOWN
    assert plan(path, [row(path, replace(content, video_id="a" * 64))]) is Decision.CHANGED
    gone = tmp_path / "gone.mp4"
    known = planned([asset(path)], [row(gone, content)], WANTED, HashCache(tmp_path / "hashes"))
    assert decisions(known) == [Decision.MOVED]
    assert [renewed.after.uri for renewed in known.renewed] == [to_uri(path)]


def test_a_missing_or_unreadable_source_is_told_from_a_new_one(tmp_path):
    path, gone, fifo = old_file(tmp_path / "a.mp4"), tmp_path / "gone.mp4", tmp_path / "pipe.mp4"
    os.mkfifo(fifo)
    assert plan(path, []) is Decision.NEW
    assert plan(gone, []) is Decision.MISSING
    assert plan(fifo, []) is Decision.UNREADABLE
    content = identify(path)
    path.unlink()
    assert plan(path, [row(path, content)]) is Decision.MISSING  # not changed: nothing is known to be different
    path.symlink_to(gone)
    assert plan(path, []) is Decision.MISSING


NORTH, SOUTH = {"camera": "north"}, {"camera": "south"}
MAY, JUNE = (datetime(2024, month, 1, tzinfo=UTC) for month in (5, 6))


@pytest.mark.parametrize(
    ("said", "tags", "captured_at"),
    [
        ({}, NORTH, MAY),
        ({"tags": SOUTH}, SOUTH, MAY),
        ({"tags": {**NORTH, "shift": "day"}}, {**NORTH, "shift": "day"}, MAY),
        ({"tags": {}}, {}, MAY),
        ({"captured_at": JUNE}, NORTH, JUNE),
        ({"captured_at": MAY, "tags": NORTH}, NORTH, MAY),
    ],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_manifest_says_anew_of_a_known_video_is_taken_up(tmp_path, said, tags, captured_at, is_there):
    path = old_file(tmp_path / "a.mp4")
    before = row(path, identify(path), tags=NORTH, captured_at=MAY)
    if not is_there:  # what is known of its place is changed all the same
        path.unlink()
    known = planned([replace(asset(path), **said)], [before], WANTED, HashCache(tmp_path / "hashes"))
    after = known.renewed[0].after if known.renewed else before
    assert (after.tags, after.captured_at) == (tags, captured_at)
    is_new = (tags, captured_at) != (NORTH, MAY)
    assert list(known.updates) == ([to_uri(path)] if is_new else [])
    (found,) = decisions(known)
    assert found is (Decision.MISSING if not is_there else Decision.UPDATED if is_new else Decision.KNOWN)


def test_of_a_video_and_its_copy_the_place_that_the_archive_knows_has_the_say(tmp_path):
    path, copy = old_file(tmp_path / "a.mp4"), old_file(tmp_path / "b.mp4")
    assets = [replace(asset(path), tags=NORTH), replace(asset(copy), tags=SOUTH)]
    rows, hashes = [row(path, identify(path), tags=NORTH)], HashCache(tmp_path / "hashes")
    for order in (assets, assets[::-1]):  # else it would change at each run
        assert planned(order, rows, WANTED, hashes).renewed == ()
    (alone,) = planned(assets[1:], rows, WANTED, hashes).renewed
    assert (alone.after.uri, alone.after.tags) == (to_uri(path), SOUTH)


def test_other_settings_or_another_model_are_work(tmp_path):
    path = old_file(tmp_path / "a.mp4")
    content = identify(path)
    assert plan(path, [row(path, content, sampling="fps=2,patches=7")]) is Decision.SETTINGS
    assert plan(path, [row(path, content, model_id="other")]) is Decision.SETTINGS


@pytest.mark.parametrize("reason", [Reason.CORRUPT, Reason.TIMEOUT, Reason.CRASHED, Reason.NOT_A_VIDEO])
def test_what_failed_by_its_bytes_is_tried_again_when_asked_alone(tmp_path, reason):
    path = old_file(tmp_path / "a.mp4")
    rows = [row(path, identify(path), reason)]
    assert plan(path, rows) is Decision.FAILED
    assert plan(path, rows, replace(WANTED, retry_failed=True)) is Decision.RETRY


def test_what_lay_with_the_machine_is_tried_a_few_times(tmp_path):
    path = old_file(tmp_path / "a.mp4")
    for attempts in (1, TRIES - 1):
        assert plan(path, [row(path, identify(path), Reason.WORKER_LOST, attempts=attempts)]) is Decision.RETRY
    assert plan(path, [row(path, identify(path), Reason.WORKER_LOST, attempts=TRIES)]) is Decision.FAILED


def test_a_larger_limit_tries_what_was_too_large(tmp_path):
    path = old_file(tmp_path / "a.mp4")
    rows = [row(path, identify(path), Reason.TOO_LARGE)]
    assert plan(path, rows) is Decision.FAILED
    assert plan(path, rows, replace(WANTED, max_pixels=2000)) is Decision.RETRY


def test_what_cannot_be_opened_is_tried_when_that_changes(tmp_path):
    path = tmp_path / "a.mp4"
    rows = [row(path, None, Reason.VANISHED)]
    assert plan(path, rows) is Decision.FAILED
    assert plan(path, rows, replace(WANTED, retry_failed=True)) is Decision.RETRY
    old_file(path)
    assert plan(path, rows) is Decision.RETRY
    path.unlink()
    os.mkfifo(path)
    assert plan(path, rows) is Decision.RETRY  # it fails for another reason now


def test_attempts_count_runs_with_the_same_content_and_settings(tmp_path):
    path = old_file(tmp_path / "a.mp4")
    content = identify(path)
    known = planned([asset(path)], [row(path, content, attempts=2)], WANTED, HashCache(tmp_path / "hashes"))
    assert known.attempts(asset(path), content) == 2
    assert known.attempts(asset(path), replace(content, video_id="a" * 64)) == 0
    other = replace(WANTED, sampling=Sampling(Fraction(2), 7))
    known = planned([asset(path)], [row(path, content, attempts=2)], other, HashCache(tmp_path / "hashes"))
    assert known.attempts(asset(path), content) == 0


# Files that are not read


def seen_before(path, **changes):
    """The row of a file that had not changed for a while when it was read."""
    return row(path, identify(path), **{"is_settled": True} | changes)


@pytest.fixture
def unread(monkeypatch):
    """Reading a file fails."""
    monkeypatch.setattr("hashlib.file_digest", None)


@pytest.mark.parametrize(
    ("said", "changes", "wanted", "found"),
    [
        ({}, {}, {}, Decision.KNOWN),
        ({"tags": NORTH, "captured_at": MAY}, {"tags": NORTH, "captured_at": MAY}, {}, Decision.KNOWN),
        ({"tags": SOUTH}, {"tags": NORTH}, {}, Decision.UPDATED),
        ({"captured_at": JUNE}, {"captured_at": MAY}, {}, Decision.UPDATED),
        ({}, {}, {"model_id": "other"}, Decision.SETTINGS),
        ({}, {"problem": Reason.CLOCK_RESTARTED, "status": Status.INDEXED}, {}, Decision.KNOWN),
        ({}, {"problem": Reason.CORRUPT, "status": Status.PARTIAL}, {}, Decision.FAILED),
        ({}, {"status": Status.DELETED}, {}, Decision.DELETED),
    ],
)
def test_on_a_new_machine_place_size_and_time_are_enough(tmp_path, request, said, changes, wanted, found):
    path = old_file(tmp_path / "a.mp4")
    rows = [seen_before(path, **changes)]
    request.getfixturevalue("unread")
    known = planned([replace(asset(path), **said)], rows, replace(WANTED, **wanted), HashCache(tmp_path / "hashes"))
    assert decisions(known) == [found]
    assert known.source_count == known.count(found) == 1
    assert known.unchanged_count == (found is Decision.KNOWN)


@pytest.mark.parametrize("changed", [{"size_bytes": 11}, {"mtime_ns": 1}, {"is_settled": False}])
def test_another_size_or_time_or_one_that_says_nothing_is_read(tmp_path, changed):
    path, other = old_file(tmp_path / "a.mp4"), old_file(tmp_path / "b.mp4", b"other byte")
    rows = [seen_before(path, **changed), seen_before(other)]
    path.write_bytes(b"third data")
    os.utime(path, (1.7e9, 1.7e9))
    assert decisions(planned([asset(path)], rows, WANTED, HashCache(tmp_path / "hashes"))) == [Decision.CHANGED]


def test_what_has_changed_behind_its_time_is_found_by_rehash_and_where_it_was_read_before(tmp_path, settled):
    path, hashes = old_file(tmp_path / "a.mp4"), HashCache(tmp_path / "hashes")
    rows = [seen_before(path)]
    identify(path, hashes)
    old_file(path, b"other byte")
    for cache, options in ((hashes, {}), (HashCache(tmp_path / "empty"), {"rehash": True})):
        assert decisions(planned([asset(path)], rows, WANTED, cache, **options)) == [Decision.CHANGED]
    assert decisions(planned([asset(path)], rows, WANTED, HashCache(tmp_path / "new"))) == [Decision.KNOWN]


def test_rehash_does_not_believe_the_cache_either(tmp_path, settled, monkeypatch):
    path, hashes = old_file(tmp_path / "a.mp4"), HashCache(tmp_path / "hashes")
    rows = [seen_before(path)]
    identify(path, hashes)
    read = []
    monkeypatch.setattr(
        "hashlib.file_digest", lambda file, name: read.append(file.name) or hashlib.sha256(b"some bytes")
    )
    assert decisions(planned([asset(path)], rows, WANTED, hashes)) == [Decision.KNOWN]
    assert not read
    assert decisions(planned([asset(path)], rows, WANTED, hashes, rehash=True)) == [Decision.KNOWN]
    assert len(read) == 1


def test_a_row_learns_that_its_file_has_settled(tmp_path, settled):
    path = old_file(tmp_path / "a.mp4")
    known = planned([asset(path)], [row(path, identify(path))], WANTED, HashCache(tmp_path / "hashes"))
    (renewed,) = known.renewed
    assert (decisions(known), renewed.after.is_settled) == ([Decision.KNOWN], True)
    again = planned([asset(path)], [renewed.after], WANTED, HashCache(tmp_path / "new"))
    assert (again.unchanged_count, again.renewed) == (1, ())


def test_a_copy_of_an_unchanged_file_changes_nothing(tmp_path):
    path, copy = old_file(tmp_path / "a.mp4"), old_file(tmp_path / "b.mp4")
    assets = [replace(asset(copy), tags=SOUTH), asset(path)]
    known = planned(assets, [seen_before(path, tags=NORTH)], WANTED, HashCache(tmp_path / "hashes"))
    assert (known.renewed, known.unchanged_count, decisions(known)) == ((), 1, [Decision.KNOWN] * 2)


def test_of_two_videos_one_moves_to_the_place_of_the_other(tmp_path):
    path, other = old_file(tmp_path / "a.mp4"), old_file(tmp_path / "b.mp4", b"more than ten")
    rows = [seen_before(path), seen_before(other, tags=NORTH)]
    other.replace(path)
    known = planned([asset(path)], rows, WANTED, HashCache(tmp_path / "hashes"))
    assert [(moved.after.uri, moved.after.tags) for moved in known.renewed] == [(to_uri(path), NORTH)]
    assert known.inherit(asset(path), None).tags == NORTH  # the row of the content that was there has lost its place
    assert known.archived.of_uri(to_uri(other)) is None


# The commands


def test_what_is_decoded_is_what_its_row_says_though_its_place_size_and_time_are_known(vidx, tmp_path):
    path, archive = tmp_path / "a.mp4", str(tmp_path / "archive")
    first, second = ((SAMPLES / f"nano_scenes_{number}.mp4").read_bytes() for number in (1, 2))
    size = max(len(first), len(second))
    for data, fps in ((first, "1"), (second, "0.5")):
        old_file(path, data.ljust(size, b"\0"))
        cache = {"VIDX_CACHE": str(tmp_path / fps)}
        assert vidx("index", str(path), "--archive", archive, "--fps", fps, env=cache).code == 0
        (video,) = vidx("list", "--archive", archive, "--json").json
        assert video["video_id"] == identify(path).video_id


def test_a_failure_is_listed_and_not_tried_until_asked(vidx, tmp_path):
    videos, archive = tmp_path / "videos", str(tmp_path / "archive")
    videos.mkdir()
    shutil.copy(BROKEN / "text.mp4", videos)
    first = vidx("index", str(videos), "--archive", archive, "--json")
    assert (first.code, first.json["videos_failed"]) == (3, 1)
    second = vidx("index", str(videos), "--archive", archive, "--json")
    counts = [second.json[name] for name in ("videos_failed", "videos_skipped", "videos_failed_before")]
    assert (second.code, counts) == (0, [0, 1, 1])
    said = vidx("index", str(videos), "--archive", archive)
    assert "1 of the skipped videos failed" in said.out
    assert "--retry-failed" in said.out
    again = vidx("index", str(videos), "--archive", archive, "--retry-failed", "--json")
    assert (again.code, again.json["videos_failed"]) == (3, 1)
    (listed,) = vidx("status", "--failed", "--archive", archive, "--json").json
    assert listed["attempts"] == 2
    assert listed["source"] == str(videos / "text.mp4")
    assert listed["reason"] == first.json["failures"][0]["reason"]
    out = vidx("status", "--failed", "--archive", archive).out
    assert listed["source"] in out
    assert listed["detail"] in out


def test_a_dry_run_tells_and_changes_nothing(vidx, archive_copy, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(SAMPLES, videos, ignore=shutil.ignore_patterns("nano*", "*.png", "*.md"))
    moved, new = videos / "moved.webm", videos / "new.mp4"
    (videos / "tractor.webm").rename(moved)
    new.write_bytes(TRACTOR.read_bytes() + b"more")
    before = sorted((path, path.stat().st_mtime_ns) for path in archive_copy.rglob("*"))
    run = vidx("index", str(videos), "--archive", str(archive_copy), "--dry-run", "--json")
    plans = {os.path.basename(entry["source"]): entry["plan"] for entry in run.json["sources"]}
    assert (run.code, plans["new.mp4"]) == (0, "new")
    assert set(plans.values()) <= {"new", "known"}  # the samples themselves are still where they were
    assert run.json["counts"]["new"] == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in archive_copy.rglob("*")) == before
    shown = vidx("index", str(videos), "--archive", str(archive_copy), "--dry-run", "--fps", "2").out
    assert f"{len(plans)} of {len(plans)} videos would be tried; nothing was changed" in shown
    assert "settings" in shown
    assert "fps 1 -> 2" in shown
    options = ("--sample", "keyframes", "--patches", "0", "--dry-run", "--json")
    changed = vidx("index", str(TRACTOR), "--archive", str(archive_copy), *options).json["sources"][0]["settings"]
    assert (sorted(changed), changed["sample"]) == (["patches", "sample"], ["rate", "keyframes"])
    assert changed["patches"][1] == "0"
    nowhere = tmp_path / "none"
    assert vidx("index", str(videos), "--archive", str(nowhere), "--dry-run", "--json").json["counts"]["known"] == 0
    assert not nowhere.exists()


def test_new_tags_and_capture_times_are_taken_up_and_said(vidx, archive_copy, tmp_path):
    place, manifest = ("--archive", str(archive_copy)), tmp_path / "cameras.csv"
    listed = ("list", "--video", "tractor.webm", *place, "--json")

    def index(text, *options):
        manifest.write_text(text)
        return vidx("index", str(manifest), *place, *options)

    first = f"source,captured_at,camera,shift\n{TRACTOR},2024-05-01T12:00:00+02:00,north,day\n"
    trial = index(first, "--dry-run", "--json").json
    changes = {"camera": [None, "north"], "shift": [None, "day"], "captured_at": [None, "2024-05-01T10:00:00+00:00"]}
    assert trial["counts"]["updated"] == 1
    assert trial["sources"][0]["changes"] == changes
    assert vidx(*listed).json[0]["tags"] == {}
    done = index(first, "--json").json
    assert (done["videos_updated"], done["videos_indexed"], done["videos_skipped"]) == (1, 0, 1)
    assert [update["changes"] for update in done["updates"]] == [changes]
    (entry,) = vidx(*listed).json
    assert (entry["tags"], entry["captured_at"]) == ({"camera": "north", "shift": "day"}, "2024-05-01T10:00:00+00:00")
    assert index(first, "--json").json["videos_updated"] == 0
    second = f"source,camera,shift\n{TRACTOR},south,\n"
    assert "camera: north -> south, shift: day -> none" in index(second, "--dry-run").out
    said = index(second).out
    assert "1 video with changed tags or capture times" in said
    assert "camera: north -> south, shift: day -> none" in said
    (entry,) = vidx(*listed).json
    assert (entry["tags"], entry["captured_at"]) == ({"camera": "south"}, "2024-05-01T10:00:00+00:00")
    assert vidx("index", str(TRACTOR), *place, "--json").json["videos_updated"] == 0  # a path says nothing of tags
    index(f"source,camera\n{TRACTOR},\n")
    assert vidx(*listed).json[0]["tags"] == {}


def test_a_dry_run_says_what_is_missing_and_why(vidx, archive_copy, tmp_path):
    manifest = tmp_path / "cameras.csv"
    manifest.write_text(f"source\ngone.mp4\nnew.webm\n{TRACTOR}\n.\n")
    (tmp_path / "new.webm").write_bytes(TRACTOR.read_bytes() + b"more")
    command = ("index", str(manifest), "--archive", str(archive_copy), "--dry-run")
    entries = {os.path.basename(entry["source"]): entry for entry in vidx(*command, "--json").json["sources"]}
    folder = entries.pop(tmp_path.name)
    assert {name: entry["plan"] for name, entry in entries.items()} == {
        "gone.mp4": "missing",
        "new.webm": "new",
        "tractor.webm": "known",
    }
    assert (entries["gone.mp4"]["reason"], "no such file" in entries["gone.mp4"]["detail"]) == ("vanished", True)
    assert (folder["plan"], "a folder" in folder["detail"]) == ("unreadable", True)
    assert "3 of 4 videos would be tried, 2 of them missing or unreadable; nothing was changed" in vidx(*command).out


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count what processes read")
def test_an_unchanged_archive_is_recognised_without_reading_it(vidx, tmp_path):
    path = tmp_path / "large.mp4"
    shutil.copy(SAMPLES / "bottles_on_table.mp4", path)
    with open(path, "r+b") as file:
        file.truncate(200 << 20)
    time.sleep(2.5)  # younger files are not remembered
    command = ["index", str(path), "--archive", str(tmp_path / "archive"), "--json"]
    env = {"VIDX_CACHE": str(tmp_path / "cache")}
    assert vidx(*command, env=env).json["videos_skipped"] == 0
    script = '"$@" >&2; grep rchar /proc/$$/io'  # with what its children read
    shell = ["bash", "-c", script, "bash", VIDX, *command]
    run = subprocess.run(shell, env=os.environ | env, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(run.stderr[run.stderr.index("{") :])["videos_skipped"] == 1
    assert int(run.stdout.split()[1]) < path.stat().st_size
