"""What an archive keeps and shows: commits, races, publication, and what happens when the disk does not play along."""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from small_archive import (
    MODEL_ID,
    PROBE,
    SAMPLING,
    add_video,
    failed_row,
    new_writer,
    partial_receipt,
    random_rows,
    receipt_for,
    reserve,
    row_for,
    video_id_of,
)

from storage.archive import delta
from storage.archive.archive import archive_exists, create_archive, open_archive
from storage.archive.row_table import NONE, RowTable
from storage.archive.settings import FORMAT_VERSION
from storage.errors import ArchiveError, UsageError
from storage.files import join, local_path, source_text, to_uri
from storage.parts.read import read_tokens
from storage.records import Hit, Problem, Reason, Sampling, Segment, Status

SPAWN = multiprocessing.get_context("spawn")  # deltalake does not survive a fork


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")


def again(archive):
    """The archive as another process sees it now."""
    return open_archive(archive.uri)


def frame_files(archive):
    return sorted(name for name in os.listdir(local_path(archive.frames_uri).decode()) if name != "_delta_log")


# Places


@pytest.mark.parametrize("name", [b"a b.mp4", b"\xff\xfe.mp4", "ü日.mp4".encode(), b"100%.mp4", b"a#b?c", b"new\nline"])
def test_a_uri_holds_the_bytes_of_any_path(name):
    uri = to_uri(b"/clips/" + name)
    assert uri.isascii()
    assert uri.startswith("file:///clips/")
    assert local_path(uri) == b"/clips/" + name
    assert to_uri(uri) == uri
    assert to_uri(os.fsdecode(b"/clips/" + name)) == uri


def test_a_place_is_shown_as_readable_text(tmp_path, monkeypatch):
    assert source_text(to_uri(b"/clips/caf\xe9.mp4")) == r"/clips/caf\xe9.mp4"
    assert source_text(to_uri("/clips/café.mp4")) == "/clips/café.mp4"
    assert source_text("s3://bucket/a%20b.mp4") == "s3://bucket/a%20b.mp4"
    assert local_path("s3://bucket/a.mp4") is None
    monkeypatch.chdir(tmp_path)
    assert to_uri("./x/../a.mp4") == to_uri(str(tmp_path / "a.mp4"))


# Opening


def test_an_archive_is_opened_as_it_was_created(archive, tmp_path):
    found = open_archive(str(tmp_path / "archive"), write=True)
    assert (found.uri, found.model_id, found.model_name) == (archive.uri, MODEL_ID, "tiny")
    assert archive_exists(str(tmp_path / "archive"))
    assert not archive_exists(str(tmp_path))
    again_created = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    assert again_created.videos.frame_count() == 0


@pytest.mark.parametrize("name", ["a b", "100%", "ü日", "a#b?c=d", "q'\"", "[x]*"])
def test_an_archive_may_lie_in_a_folder_of_any_name(tmp_path, name):
    archive = create_archive(str(tmp_path / name / "archive"), model_id=MODEL_ID, model_name="tiny")
    rows = add_video(archive, 1)
    frames = again(archive).frames.find()
    assert np.array_equal(read_tokens(archive.frames_uri, frames), rows.tokens.token)
    assert (tmp_path / name / "archive" / "archive.json").is_file()


@pytest.mark.parametrize("name", [b"new\nline", b"\xff", b"a%20b"])
def test_a_folder_that_delta_cannot_open_is_refused_by_name(tmp_path, name):
    with pytest.raises(UsageError, match=r"--archive .*the path of an archive must") as error:
        create_archive(to_uri(os.fsencode(tmp_path) + b"/" + name), model_id=MODEL_ID, model_name="tiny")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_without_archive_is_wrong_usage(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"no archive at .* run `vidx index` first"):
            open_archive(str(place))


def test_an_archive_does_not_settle_among_videos(tmp_path):
    (tmp_path / "lost+found").mkdir()
    create_archive(str(tmp_path), model_id=MODEL_ID, model_name="tiny")
    (tmp_path / "videos2").mkdir()
    (tmp_path / "videos2" / "a.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"videos2: no archive, and not empty \(it holds 'a\.mp4'\)"):
        create_archive(str(tmp_path / "videos2"), model_id=MODEL_ID, model_name="tiny")


def test_an_archive_does_not_settle_in_a_folder_of_other_files(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match="`videos` holds other files"):
        create_archive(str(tmp_path), model_id=MODEL_ID, model_name="tiny")
    assert os.listdir(tmp_path) == ["videos"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        create_archive(str(tmp_path / "file"), model_id=MODEL_ID, model_name="tiny")


def test_an_archive_of_another_model_or_another_format_is_refused_by_name(archive, tmp_path):
    add_video(archive, 1)
    with pytest.raises(UsageError, match=r"model tiny \(a1a1a1a1a1a1\), not of big \(b2b2b2b2b2b2\)"):
        create_archive(archive.uri, model_id="b2" * 32, model_name="big")
    settings = tmp_path / "archive" / "archive.json"
    for version, what in ((FORMAT_VERSION + 1, "update vidx"), (1, "made by an older vidx")):
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "format_version": version}))
        with pytest.raises(ArchiveError, match=f"format version {version}.*{what}"):
            open_archive(archive.uri)


def test_an_empty_archive_takes_another_model(archive):
    assert create_archive(archive.uri, model_id="b2" * 32, model_name="big").model_name == "big"
    assert again(archive).model_id == "b2" * 32


def test_an_archive_in_which_a_job_has_reserved_numbers_keeps_its_model(archive):
    reserve(archive, 1)
    assert not again(archive).is_empty
    with pytest.raises(UsageError, match="model tiny"):
        create_archive(archive.uri, model_id="b2" * 32, model_name="big")


@pytest.mark.parametrize("place", ["s3://bucket/x", "foo://x", "file://host/x", "foo://x\ny"])
def test_only_a_local_folder_can_hold_an_archive(place):
    for use in (archive_exists, open_archive, lambda uri: create_archive(uri, model_id=MODEL_ID, model_name="tiny")):
        with pytest.raises(UsageError, match=r"--archive .*only local folders \(or file:// URIs\)") as error:
            use(place)
        assert "\n" not in str(error.value)


def test_a_half_created_archive_is_created_whole_by_the_next_job(archive, tmp_path):
    os.remove(tmp_path / "archive" / "archive.json")
    shutil.rmtree(tmp_path / "archive" / "numbers")
    whole = create_archive(archive.uri, model_id=MODEL_ID, model_name="tiny")
    add_video(whole, 1)
    assert whole.videos.frame_count() == 5


# Numbers


def test_a_number_is_given_once(archive):
    other = Sampling(Fraction(2), 0)
    first = archive.reserve([(video_id_of(1), SAMPLING), (video_id_of(2), SAMPLING), (video_id_of(1), SAMPLING)])
    assert first == {(video_id_of(1), str(SAMPLING)): 1, (video_id_of(2), str(SAMPLING)): 2}
    second = again(archive).reserve([(video_id_of(3), SAMPLING), (video_id_of(2), SAMPLING), (video_id_of(1), other)])
    assert list(second.values()) == [3, 2, 4]


# Commits


def test_frames_are_seen_once_their_video_is_published(archive):
    rows = random_rows(5)
    assert archive.parts.commit([receipt_for(archive, 1, rows)]) == [True]
    assert archive.parts.frame_count(reserve(archive, 1)) == 5
    assert (again(archive).frames.find(), again(archive).videos.frame_count(), again(archive).frames.parts()) == (
        [],
        0,
        [],
    )
    archive.videos.publish([row_for(archive, 1, 5)])
    frames = again(archive).frames.find()
    assert [frame.ticks for frame in frames] == rows.columns.ticks.tolist()
    assert [frame.time_seconds for frame in frames] == rows.columns.time_seconds.tolist()
    assert np.array_equal(read_tokens(archive.frames_uri, frames), rows.tokens.token)


def test_a_committed_segment_remembers_why_it_is_not_whole(archive):
    problem = Problem(Reason.CORRUPT, "damaged in 3 places")
    whole = receipt_for(archive, 1, random_rows(3), (None, 100))
    rows = random_rows(3, start=10)
    writer = new_writer(archive.frames_uri, video_id=video_id_of(1), number=whole.video_number, key="100..")
    writer.append(rows.columns, rows.tokens, rows.thumbnails)
    damaged = replace(whole, segment=Segment(video_id_of(1), 100, None, 3), part=writer.close(problem), problem=problem)
    assert archive.parts.commit([whole, damaged]) == [True, True]
    assert again(archive).parts.problems(whole.video_number) == [problem]


def test_a_segment_is_committed_once(archive):
    first, second = (receipt_for(archive, 1, random_rows(5, seed), (None, 50)) for seed in (1, 2))
    other = receipt_for(archive, 1, random_rows(5, 3, start=5), segment=(50, 100))
    empty = receipt_for(archive, 1, None, segment=(100, None))
    assert archive.parts.commit([first, second, other, empty]) == [True, False, True, False]
    late = receipt_for(archive, 1, random_rows(5, 4), (None, 50))
    assert again(archive).parts.commit([late]) == [False]
    keys = ["..50", "50..100", "100..", ".."]
    assert archive.parts.committed(first.video_number, keys) == {"..50", "50..100"}
    assert archive.parts.committed(first.video_number + 1, keys) == set()
    assert frame_files(archive) == sorted([first.part.path, other.part.path])  # the losers' are gone


def commit_at(uri, names, start_at, results):
    """One of several jobs that index the same videos at the same time."""
    archive = open_archive(uri)
    receipts = [receipt_for(archive, name, random_rows(5, name)) for name in names]
    time.sleep(max(0.0, start_at - time.time()))
    landed = archive.parts.commit(receipts)
    archive.videos.publish([row_for(archive, name, 5) for name in names])
    results.put([name for name, is_in in zip(names, landed, strict=True) if is_in])


def test_of_racing_commits_of_a_segment_exactly_one_lands(archive):
    results, start_at = SPAWN.Queue(), time.time() + 4
    shared, own = [1, 2, 3], [[10], [20], [30]]
    jobs = [SPAWN.Process(target=commit_at, args=(archive.uri, shared + mine, start_at, results)) for mine in own]
    for job in jobs:
        job.start()
    landed = sorted(name for _ in jobs for name in results.get(timeout=300))
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert landed == [1, 2, 3, 10, 20, 30]
    found = again(archive)
    assert [row.video_id for row in found.videos.all()] == [video_id_of(name) for name in sorted(landed, key=str)]
    assert len({row.video_number for row in found.videos.all()}) == 6
    assert (len(found.frames.find()), found.videos.frame_count(), len(frame_files(archive))) == (30, 30, 6)


# Commits that fail after they have landed


class Interrupted:
    """Lets a commit land, or not, and then raises."""

    def __init__(self, monkeypatch, error, lands=True):
        self._commit, self._error, self._lands = DeltaTable.create_write_transaction, error, lands
        monkeypatch.setattr(delta.DeltaTable, "create_write_transaction", lambda *a, **k: self.commit(*a, **k))

    def commit(self, *arguments, **named):
        error, self._error = self._error, None
        if error is None or self._lands:
            self._commit(*arguments, **named)
        if error is not None:
            raise error


LATE_ERRORS = [KeyboardInterrupt(), OSError(28, "No space left on device"), DeltaError("checkpoint failed")]


@pytest.mark.parametrize("error", LATE_ERRORS, ids=lambda error: type(error).__name__)
def test_a_row_change_that_fails_after_it_has_landed_loses_nothing(archive, monkeypatch, error):
    with monkeypatch.context() as patch:
        Interrupted(patch, error)
        with pytest.raises((KeyboardInterrupt, ArchiveError)):
            reserve(archive, 1)
    number = reserve(archive, 2)
    assert (reserve(again(archive), 1), reserve(again(archive), 2)) == (1, number)


def test_a_row_change_whose_log_cannot_be_read_or_synced_afterwards_loses_nothing(archive, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(delta, "_sync_log", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(ArchiveError, match="Input/output error"):
            reserve(archive, 1)
    assert reserve(again(archive), 1) == 1


def test_a_row_change_that_landed_and_seemed_to_lose_its_race_is_made_once(archive, monkeypatch):
    with monkeypatch.context() as patch:
        Interrupted(patch, CommitFailedError("ambiguous"))
        assert reserve(archive, 1) == 1
    assert reserve(again(archive), 1) == 1
    assert DeltaTable(join(archive.uri, "numbers")).to_pyarrow_table().num_rows == 1


def test_a_row_change_that_did_not_land_leaves_no_file(archive, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        Interrupted(patch, OSError(28, "No space left on device"), lands=False)
        with pytest.raises(ArchiveError, match="No space left"):
            reserve(archive, 1)
    assert list((tmp_path / "archive" / "numbers").glob("*.parquet")) == []


def test_a_part_that_is_gone_is_not_committed(archive):
    receipt = receipt_for(archive, 1, random_rows(4))
    os.unlink(local_path(join(archive.frames_uri, receipt.part.path)))
    with pytest.raises(ArchiveError, match="was removed before it was committed"):
        archive.parts.commit([receipt])
    assert archive.videos.frame_count() == 0


@pytest.mark.parametrize(
    "error", [*LATE_ERRORS, CommitFailedError("ambiguous")], ids=lambda error: type(error).__name__
)
def test_parts_whose_commit_landed_and_failed_are_never_removed(archive, monkeypatch, error):
    receipt = receipt_for(archive, 1, random_rows(5))
    with monkeypatch.context() as patch:
        Interrupted(patch, error)
        with contextlib.suppress(KeyboardInterrupt, ArchiveError):
            assert archive.parts.commit([receipt]) == [True]
    assert archive.parts.commit([receipt, receipt]) == [True, True]  # and again: it is in, once
    archive.videos.publish([row_for(archive, 1, 5)])
    assert len(again(archive).frames.find()) == 5
    assert frame_files(archive) == [receipt.part.path]


# Segments that another try makes whole


def test_a_segment_that_is_not_whole_makes_way_for_one_that_is(archive):
    rows = random_rows(9)
    part = partial_receipt(archive, 1, rows.cut(0, 4))
    assert archive.parts.commit([part]) == [True]
    archive.videos.publish([row_for(archive, 1, 4, status=Status.PARTIAL, problem=part.problem)])
    before = again(archive)
    assert before.parts.committed(part.video_number, [".."]) == {".."}
    assert before.parts.committed(part.video_number, [".."], whole_only=True) == set()
    assert len(before.frames.find()) == 4
    whole = receipt_for(archive, 1, rows)
    assert archive.parts.commit([whole]) == [True]
    archive.videos.publish([row_for(archive, 1, 9)])
    found = again(archive)
    assert found.parts.committed(whole.video_number, [".."]) == {".."}
    assert found.parts.problems(whole.video_number) == []
    assert np.array_equal(read_tokens(found.frames_uri, found.frames.find()), rows.tokens.token)
    assert len(before.frames.find()) == 4  # a reader of the version before is not disturbed
    actions = [json.loads(line) for line in newest_commit(archive).splitlines()]
    assert [action["add"]["path"] for action in actions if "add" in action] == [whole.part.path]
    assert [action["remove"]["path"] for action in actions if "remove" in action] == [part.part.path]
    assert [action["txn"]["version"] for action in actions if "txn" in action] == [2]
    assert archive.parts.commit([receipt_for(archive, 1, rows)]) == [False]


def newest_commit(archive):
    folder = Path(local_path(archive.frames_uri).decode()) / "_delta_log"
    return max(folder.glob("*.json")).read_text()


def test_a_segment_that_lay_with_the_machine_is_not_done(archive):
    lost = partial_receipt(archive, 1, random_rows(4), Reason.WORKER_LOST)
    archive.parts.commit([lost])
    assert archive.parts.committed(lost.video_number, [".."]) == set()
    corrupt = partial_receipt(archive, 1, random_rows(3), Reason.CORRUPT)
    assert archive.parts.commit([corrupt]) == [True]  # fewer rows, but what is wrong is known now
    assert archive.parts.committed(lost.video_number, [".."]) == {".."}
    assert archive.parts.commit([partial_receipt(archive, 1, random_rows(3), Reason.CORRUPT)]) == [False]
    assert archive.parts.frame_count(lost.video_number) == 3


def test_a_second_try_that_gave_up_too_replaces_fewer_rows_alone(archive):
    rows = random_rows(9)
    tries = [partial_receipt(archive, 1, rows.cut(0, count)) for count in (4, 3, 4, 7)]
    assert [archive.parts.commit([receipt]) for receipt in tries] == [[True], [False], [False], [True]]
    assert archive.parts.frame_count(tries[0].video_number) == 7


def replace_at(uri, start_at, results):
    """One of several jobs that make a segment whole at the same time."""
    archive = open_archive(uri)
    receipt = receipt_for(archive, 1, random_rows(9))
    time.sleep(max(0.0, start_at - time.time()))
    results.put(archive.parts.commit([receipt]))


def test_of_racing_replacements_exactly_one_lands(archive):
    part = partial_receipt(archive, 1, random_rows(4))
    archive.parts.commit([part])
    results, start_at = SPAWN.Queue(), time.time() + 4
    jobs = [SPAWN.Process(target=replace_at, args=(archive.uri, start_at, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert sorted(results.get(timeout=300) for _ in jobs) == [[False], [False], [True]]
    for job in jobs:
        job.join(60)
    assert again(archive).parts.frame_count(part.video_number) == 9
    assert len(frame_files(archive)) == 2  # what was replaced stays for readers of the versions before


def test_a_replacement_worked_out_from_an_older_version_conflicts(archive, monkeypatch):
    archive.parts.commit([partial_receipt(archive, 1, random_rows(4))])
    other, late, fast = again(archive), receipt_for(archive, 1, random_rows(9)), receipt_for(archive, 1, random_rows(9))
    commit, tries = delta.commit, []

    def overtaken(*arguments):
        tries.append(arguments)
        if len(tries) == 1:
            monkeypatch.setattr(delta, "commit", commit)
            assert other.parts.commit([fast]) == [True]
            monkeypatch.setattr(delta, "commit", overtaken)
        return commit(*arguments)

    monkeypatch.setattr(delta, "commit", overtaken)
    assert archive.parts.commit([late]) == [False]
    assert len(tries) == 1
    assert again(archive).parts.frame_count(late.video_number) == 9


def index_for_ever(uri):
    """A job that adds one video after the other until it is killed."""
    archive = open_archive(uri)
    for name in range(1, 10_000):
        add_video(archive, name)


def test_a_killed_job_leaves_a_whole_archive_that_goes_on(archive):
    for pause in (0.0, 0.037, 0.081):
        before = again(archive).version
        job = SPAWN.Process(target=index_for_ever, args=(archive.uri,))
        if before:
            shutil.rmtree(local_path(archive.uri).decode())
            create_archive(archive.uri, model_id=MODEL_ID, model_name="tiny")
            before = 0
        job.start()
        deadline = time.time() + 300
        while again(archive).version < before + 3 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        os.kill(job.pid, signal.SIGKILL)
        job.join(10)
        found = again(archive)
        assert found.videos.frame_count() == len(found.frames.find()) == 5 * len(found.videos.all()) >= 15
        for row in found.videos.all():
            name = int(row.video_id[:8], 16)
            tokens = read_tokens(found.frames_uri, found.frames.find(row.video_number))
            assert np.array_equal(tokens, random_rows(5, seed=name).tokens.token)
        add_video(found, 50_000)
        assert again(archive).videos.frame_count() == found.videos.frame_count()


# Publication


def test_a_video_row_comes_back_as_it_was_published(archive):
    add_video(archive, 1, tags={"camera": "north", "a b": "ü'\""}, captured_at=datetime(2024, 5, 1, 1, 2, 3, 456, UTC))
    problem = Problem(Reason.TRUNCATED, "ends early")
    archive.parts.commit([receipt_for(archive, 2, random_rows(3))])
    rows = [
        row_for(archive, 2, 3, status=Status.PARTIAL, problem=problem, captured_at=None, tags={}),
        failed_row(archive, "file:///clips/secret%FF.mp4"),
    ]
    archive.videos.publish(rows)
    found = {row.uri: row for row in again(archive).videos.all()}
    assert [found[row.uri] for row in rows] == rows
    first = found["file:///clips/1.mp4"]
    assert first.video_id == video_id_of(1)
    assert first.tags == {"camera": "north", "a b": "ü'\""}
    assert first.captured_at == datetime(2024, 5, 1, 1, 2, 3, 456, UTC)
    assert first.probe == PROBE


def test_changed_content_retires_what_the_file_held_before(archive):
    add_video(archive, 1, uri="file:///clips/a.mp4")
    add_video(archive, 2, uri="file:///clips/a.mp4")
    found = again(archive)
    assert [row.video_id for row in found.videos.all()] == [video_id_of(2)]
    assert {frame.video_id for frame in found.frames.find()} == {video_id_of(2)}
    assert {part.video_number for part in found.frames.parts()} == {reserve(found, 2)}
    assert found.videos.frame_count() == 5


def test_another_sampling_takes_the_place_of_the_first(archive):
    add_video(archive, 1)
    twice = Sampling(Fraction(2), 0)
    number = archive.reserve([(video_id_of(1), twice)])[video_id_of(1), str(twice)]
    archive.videos.publish([row_for(archive, 1, 7, video_number=number, sampling=str(twice))])
    assert [(row.video_number, row.sampling) for row in again(archive).videos.all()] == [(number, str(twice))]
    archive.videos.publish([row_for(archive, 1, 5)])  # and back: the frames of the first are still there
    assert len(again(archive).frames.find()) == 5


def test_a_moved_and_retagged_video_keeps_its_frames(archive):
    add_video(archive, 1)
    archive.videos.publish([row_for(archive, 1, 5, uri="file:///new/1.mp4", tags={"camera": "south"})])
    (row,) = again(archive).videos.all()
    assert (row.uri, row.tags) == ("file:///new/1.mp4", {"camera": "south"})
    assert len(again(archive).frames.find(row.video_number)) == 5


def test_a_file_that_cannot_be_read_today_loses_nothing(archive):
    add_video(archive, 1)
    archive.videos.publish([failed_row(archive, "file:///clips/1.mp4"), failed_row(archive, "file:///clips/2.mp4")])
    crashed = Problem(Reason.CRASHED, "the decoder died")
    archive.videos.publish([row_for(archive, 1, 0, status=Status.FAILED, problem=crashed, uri="file:///copy.mp4")])
    found = again(archive)
    assert [(row.uri, row.status) for row in found.videos.all()] == [
        ("file:///clips/1.mp4", Status.INDEXED),
        ("file:///clips/2.mp4", Status.FAILED),
    ]
    assert len(found.frames.find()) == 5
    add_video(archive, 2)  # readable again: the row without content makes way
    assert [row.status for row in again(archive).videos.all()] == [Status.INDEXED, Status.INDEXED]


def made_before(archive, column):
    """The archive as an older vidx left it, which did not keep this column of videos."""
    uri, rows = join(archive.uri, "videos"), archive.videos.arrow().drop_columns([column])
    shutil.rmtree(local_path(uri))
    delta.create_table(uri, rows.schema)
    RowTable(uri).change(lambda there: (NONE, rows))
    return again(archive)


def test_an_archive_of_an_older_vidx_is_read_and_goes_on(archive):
    for name in (1, 2, 3):
        add_video(archive, name)
    uri, old = join(archive.uri, "videos"), made_before(archive, "indexed_at")
    before = [replace(row, indexed_at=None) for row in archive.videos.all()]
    assert old.videos.all() == before
    assert "indexed_at" not in DeltaTable(uri).to_pyarrow_table().column_names  # reading changes nothing
    add_video(old, 4)
    assert again(old).videos.all() == old.videos.all() == [*before, row_for(old, 4, 5)]
    kept = DeltaTable(uri).to_pyarrow_table().column("indexed_at").to_pylist()
    assert sorted(kept, key=str) == [datetime(2024, 5, 2, 6, 30, tzinfo=UTC), None, None, None]
    for path in DeltaTable(uri).file_uris():  # as a reader that knows no schema but the files' own sees them
        assert "indexed_at" in pq.read_schema(path).names


def test_a_change_of_a_row_leaves_what_others_have_changed_meanwhile(archive):
    add_video(archive, 1, 5)
    (seen,) = again(archive).videos.all()
    again(archive).videos.update([(seen, replace(seen, tags={"camera": "north"}))])
    again(archive).videos.update([(seen, replace(seen, is_settled=True, mtime_ns=7))])
    (row,) = again(archive).videos.all()
    assert (row.tags, row.is_settled, row.mtime_ns) == ({"camera": "north"}, True, 7)


def test_of_two_jobs_that_add_a_column_to_an_older_table_none_loses_a_row(tmp_path):
    uri = to_uri(tmp_path / "table")
    os.makedirs(tmp_path / "table")
    delta.create_table(uri, pa.schema([("name", pa.string())]))
    newer = pa.schema([("name", pa.string()), ("size", pa.int64())])
    first, second = RowTable(uri, newer), RowTable(uri, newer)
    seen = []

    def add(table, name, size):
        def plan(rows):
            if name == "slow" and not seen:
                add(second, "fast", 2)
            seen.append(len(rows))
            return NONE, pa.table({"name": [name], "size": [size]}, schema=newer)

        table.change(plan)

    add(first, "slow", 1)
    assert seen == [0, 0, 1]  # the fast one's, the slow one's that lost the race, and its second try
    assert sorted(RowTable(uri).rows().table().to_pylist(), key=str) == [
        {"name": "fast", "size": 2},
        {"name": "slow", "size": 1},
    ]


def test_many_publications_keep_the_table_in_few_files(archive):
    numbers = archive.reserve([(video_id_of(name), SAMPLING) for name in range(60)])
    for name in range(60):
        number = numbers[video_id_of(name), str(SAMPLING)]
        archive.videos.publish([row_for(archive, name, 0, video_number=number, tags={"round": "1"})])
    folder = Path(os.fsdecode(local_path(join(archive.uri, "videos"))))
    live = again(archive)
    from storage.archive.delta import live_files, open_table

    files = live_files(open_table(join(archive.uri, "videos"))).column("path").to_pylist()
    assert len(files) <= 7
    assert sum(pq.read_metadata(folder / file).num_rows for file in files) == 60
    assert sorted(row.video_id for row in live.videos.all()) == sorted(video_id_of(name) for name in range(60))


# Looking up


def test_frames_of_a_time_range_are_those_whose_span_meets_it(archive):
    rows = random_rows(300)
    archive.parts.commit([receipt_for(archive, 1, rows.cut(0, 120), (None, 1200))])
    archive.parts.commit([receipt_for(archive, 1, rows.cut(120, 300), (1200, None))])
    archive.videos.publish([row_for(archive, 1, 300)])
    add_video(archive, 2)
    number = reserve(archive, 1)
    seconds, spans = rows.columns.time_seconds, rows.columns.duration_seconds
    for start, end in (
        (None, None),
        (119.5, 121),
        (119, 120),
        (0, 0.25),
        (None, 3),
        (298.5, None),
        (300, None),
        (5, 5),
    ):
        wanted = [
            index
            for index in range(300)
            if (end is None or seconds[index] < end) and (start is None or seconds[index] + spans[index] > start)
        ]
        found = archive.frames.find(number, start, end)
        assert [frame.frame_index for frame in found] == [25 * index for index in wanted], (start, end)
    assert np.array_equal(read_tokens(archive.frames_uri, archive.frames.find(number)), rows.tokens.token)
    assert [(frame.video_number, frame.frame_index) for frame in archive.frames.find(None, 3.5, 4.5)] == [
        (number, 75),
        (number, 100),
        (reserve(archive, 2), 75),
        (reserve(archive, 2), 100),
    ]
    assert archive.frames.find(999) == []


def test_hits_lead_to_their_frames_in_order(archive):
    for name in (1, 2):
        add_video(archive, name)
    hits = [Hit(reserve(archive, 2), 50, 0.9), Hit(reserve(archive, 1), 100, 0.8), Hit(reserve(archive, 2), 0, 0.7)]
    found = archive.frames.of_hits(hits)
    assert [(frame.video_number, frame.frame_index) for frame in found] == [
        (hit.video_number, hit.frame_index) for hit in hits
    ]
    with pytest.raises(ArchiveError, match="in the index but not among the frames"):
        archive.frames.of_hits([Hit(reserve(archive, 1), 1, 0.5)])


def test_a_video_is_named_by_path_uri_or_the_first_digits_of_its_id(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (0xAB000001, 0xAB000002, 0xCD000003):
        add_video(archive, name, uri=to_uri(str(tmp_path / f"{name:x}.mp4")))
    for text in ("cd000003.mp4", str(tmp_path / "cd000003.mp4"), to_uri("cd000003.mp4"), "cd0000", "CD000003"):
        assert archive.videos.find(text).video_id == video_id_of(0xCD000003), text
    with pytest.raises(UsageError, match=r"more than one .*ab000001.*ab000002"):
        archive.videos.find("ab0000")
    for text in ("cd000", "none.mp4", "ffffff"):
        with pytest.raises(UsageError, match="no such video"):
            archive.videos.find(text)


def test_a_video_is_named_in_any_spelling_that_looks_like_its_name(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    add_video(archive, 1, uri=to_uri(str(tmp_path / decomposed / f"{decomposed}.mp4")))
    add_video(archive, 2, uri=to_uri(str(tmp_path / f"a {composed}.mp4")))
    for text in (f"{composed}.mp4", f"{decomposed}.mp4", str(tmp_path / composed / f"{composed}.mp4")):
        assert archive.videos.find(text).video_id == video_id_of(1), text
    assert archive.videos.find(to_uri(str(tmp_path / composed / f"{decomposed}.mp4"))).video_id == video_id_of(1)
    assert archive.videos.find(f"a {decomposed}.mp4").video_id == video_id_of(2)
    add_video(archive, 3, uri=to_uri(str(tmp_path / composed / f"{composed}.mp4")))  # another one of the same look
    assert archive.videos.find(str(tmp_path / composed / f"{composed}.mp4")).video_id == video_id_of(3)
    assert archive.videos.find(f"{decomposed}.mp4").video_id == video_id_of(1)
    with pytest.raises(UsageError, match="more than one"):
        archive.videos.find(str(tmp_path / composed / f"{decomposed}.mp4"))


def test_the_status_counts_what_is_published(archive):
    assert archive.status().model_ids == (MODEL_ID,)
    add_video(archive, 1)
    archive.parts.commit([receipt_for(archive, 2, random_rows(3))])
    problem = Problem(Reason.CORRUPT, "bad packet")
    archive.videos.publish([row_for(archive, 2, 3, status=Status.PARTIAL, problem=problem)])
    archive.videos.publish([failed_row(archive, "file:///clips/x.mp4")])
    archive.parts.commit([receipt_for(archive, 3, random_rows(9))])  # not published
    status = again(archive).status()
    assert (status.videos_indexed, status.videos_partial, status.videos_failed, status.frames) == (1, 1, 1, 8)
    assert (status.version, status.format_version, status.model_ids) == (3, FORMAT_VERSION, (MODEL_ID,))
    on_disk = sum(file.stat().st_size for file in Path(local_path(archive.uri).decode()).rglob("*") if file.is_file())
    assert status.size_bytes == on_disk


def test_any_delta_reader_and_plain_parquet_see_the_same_rows(archive):
    rows = add_video(archive, 1)
    for name in ("frames", "videos", "numbers"):
        table = DeltaTable(join(archive.uri, name))
        protocol = table.protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2), name
    frames = DeltaTable(archive.frames_uri).to_pyarrow_table()
    assert frames.column("token").to_pylist() == [token.tobytes() for token in rows.tokens.token]
    assert frames.column("patches").null_count == 5


# Trouble


def one_line(error):
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert error.value.exit_code == 5


def test_a_damaged_log_is_named(archive, tmp_path):
    add_video(archive, 1)
    log = tmp_path / "archive" / "frames" / "_delta_log" / f"{1:020}.json"
    whole = log.read_bytes()
    for damaged in (whole[:-50], b"", os.urandom(300)):
        log.write_bytes(damaged)
        with pytest.raises(ArchiveError, match=rf"{log.name}: damaged") as error:
            again(archive)
        one_line(error)
    log.write_bytes(whole)
    shutil.rmtree(tmp_path / "archive" / "videos")
    with pytest.raises(ArchiveError, match="videos: damaged"):
        again(archive)


def test_damaged_settings_and_rows_are_named(archive, tmp_path):
    add_video(archive, 1)
    (file,) = (tmp_path / "archive" / "videos").glob("*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArchiveError, match=rf"{file.name}: damaged") as error:
        again(archive)
    one_line(error)
    file.unlink()
    with pytest.raises(ArchiveError, match=rf"{file.name}: missing"):
        again(archive)
    (tmp_path / "archive" / "archive.json").write_text("{")
    with pytest.raises(ArchiveError, match=r"archive\.json: damaged") as error:
        again(archive)
    one_line(error)


def test_a_missing_part_is_named(archive, tmp_path):
    add_video(archive, 1)
    os.remove(tmp_path / "archive" / "frames" / frame_files(archive)[0])
    with pytest.raises(ArchiveError, match=r"\.parquet: missing, though the archive names it"):
        again(archive).frames.find()


AS_NOBODY = """
import os
import sys
from storage.archive.archive import create_archive, open_archive
from storage.errors import VidxError
open_archive(sys.argv[3]).frames.find()  # what is imported late lies where nobody else may look
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    if sys.argv[1] == "create":
        create_archive(sys.argv[2], model_id="a1" * 32, model_name="tiny")
    else:
        archive = open_archive(sys.argv[2], write=sys.argv[1] == "write")
        print(archive.videos.frame_count(), len(archive.frames.find()))
except VidxError as error:
    print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without permission")
def test_no_permission_is_one_clear_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        archive = create_archive(folder + "/archive", model_id=MODEL_ID, model_name="tiny")
        add_video(archive, 1)

        def run(*arguments):
            command = [sys.executable, "-c", AS_NOBODY, *arguments, folder + "/archive"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.stderr == ""
            return done.stdout.strip()

        assert run("read", folder + "/archive") == "5 5"
        assert run("write", folder + "/archive") == (
            f"ArchiveError 5 {folder}/archive/frames: cannot be written: Permission denied"
        )
        assert run("create", folder + "/other") == (
            f"ArchiveError 5 {folder}/other: cannot be written: Permission denied"
        )


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 512 kB, full but for what is asked."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield place
    gc.collect()  # an open archive keeps files open, and errors keep the archives of a test alive
    subprocess.run(["umount", place], check=True)


def fill(place):
    """Takes all the space that is left."""
    with open(place / "ballast", "wb", buffering=0) as file:
        for size in (4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_full_disk_loses_nothing_that_was_committed(tiny_disk):
    archive = create_archive(str(tiny_disk / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1)
    receipt = receipt_for(archive, 2, random_rows(5))
    row = row_for(archive, 2, 5)
    fill(tiny_disk)
    for write in (lambda: archive.parts.commit([receipt]), lambda: archive.videos.publish([row])):
        with pytest.raises(ArchiveError, match="No space left on device") as error:
            write()
        one_line(error)
        assert str(tiny_disk) in str(error.value)
    assert len(again(archive).frames.find()) == 5
    os.remove(tiny_disk / "ballast")
    assert archive.parts.commit([receipt]) == [True]
    archive.videos.publish([row])
    assert len(again(archive).frames.find()) == 10


def test_a_read_only_disk_can_be_read_but_not_written(tiny_disk):
    archive = create_archive(str(tiny_disk / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    assert len(again(archive).frames.find()) == 5
    with pytest.raises(ArchiveError, match="cannot be written: Read-only file system"):
        open_archive(archive.uri, write=True)
    with pytest.raises(ArchiveError, match="Read-only file system") as error:
        archive.reserve([(video_id_of(9), SAMPLING)])
    one_line(error)


def test_a_damaged_table_of_numbers_stops_no_search(archive):
    add_video(archive, 1)
    for log in Path(local_path(join(archive.uri, "numbers", "_delta_log")).decode()).iterdir():
        log.unlink()
    found = open_archive(archive.uri)
    assert (found.videos.frame_count(), len(found.frames.find()), found.status().videos_indexed) == (5, 5, 1)
    with pytest.raises(ArchiveError):
        found.numbers.known()
