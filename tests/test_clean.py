"""clean removes what nothing names or shows any more, and nothing else."""

import os
import time
from pathlib import Path

import pytest
from small_archive import (
    MODEL_ID,
    add_video,
    partial_receipt,
    random_rows,
    receipt_for,
    reserve,
    row_for,
    video_id_of,
    write_part,
)

from storage import sweep as sweeping
from storage.archive import create_archive, open_archive
from storage.files import local_path
from storage.jobs import Job
from storage.sweep import Swept, sweep
from storage.vectors import open_index, update_index
from storage.verify import verify

WEEK_AND_A_DAY = 8 * 24 * 3600


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="a model")


@pytest.fixture
def no_margin(monkeypatch):
    monkeypatch.setattr(sweeping, "MARGIN_SECONDS", 0)


def held_files(archive):
    root = Path(os.fsdecode(local_path(archive.uri)))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def held_bytes(archive):
    root = Path(os.fsdecode(local_path(archive.uri)))
    return b"".join(Path(root, name).read_bytes() for name in held_files(archive))


def make_old(archive):
    then = time.time() - WEEK_AND_A_DAY
    for name in held_files(archive):
        os.utime(os.path.join(os.fsdecode(local_path(archive.uri)), name), (then, then))


def test_what_a_running_job_has_written_is_left_alone(archive, no_margin):
    add_video(archive, 1)
    before = held_files(archive)
    with Job(archive.uri):
        part = write_part(archive.frames_uri, random_rows(3, 5), video_id=video_id_of(2), number=2)
        assert sweep(archive, 0) == Swept(0, 0)
        assert f"frames/{part.path}" in held_files(archive)
    assert sweep(archive, 0) == Swept(0, 1)
    assert held_files(archive) == before


def test_files_that_nothing_names_for_a_week_go_and_no_others(archive):
    add_video(archive, 1, 20)
    archive.commit_frames([partial_receipt(archive, 2, random_rows(4))])
    archive.publish([row_for(archive, 2, 4)])
    update_index(archive)
    reader = open_archive(archive.uri)
    archive.commit_frames([receipt_for(archive, 2, random_rows(9))])
    archive.publish([row_for(archive, 2, 9)])
    update_index(archive)
    root = local_path(archive.uri).decode()
    orphans = {"frames/a.parquet", "frames/a.parquet.b.tmp", "videos/c.parquet", "numbers/d.parquet", "index/e.faiss"}
    for name in orphans:
        Path(root, name).write_bytes(b"x")
    make_old(archive)
    for name in ("frames/young.parquet", "index/young.faiss"):
        Path(root, name).write_bytes(b"x")
    before = held_files(archive)
    assert sweep(archive) == Swept(0, len(orphans))
    assert held_files(archive) == before - orphans  # also what was replaced just now, for readers of older versions
    assert len(reader.frames()) == 24
    assert open_archive(archive.uri).version == archive.version
    assert not open_index(open_archive(archive.uri)).rebuilt
    assert sweep(archive) == Swept(0, 0)


def test_no_byte_of_replaced_content_is_left(archive):
    kept = add_video(archive, 1, 50)
    gone = add_video(archive, 2, 6)
    update_index(archive)
    name = {"uri": "file:///clips/2.mp4"}
    assert archive.commit_frames([receipt_for(archive, 3, random_rows(7, 9))]) == [True]
    archive.publish([row_for(archive, 3, 7, **name)])
    update_index(archive)
    make_old(archive)

    def cells_left(rows):
        held = held_bytes(archive)
        tokens = (rows.tokens.token, rows.tokens.compressor_out, rows.tokens.search_key)
        cells = [cell.tobytes() for column in tokens for cell in column] + rows.thumbnails
        return [cell in held for cell in cells]

    assert all(cells_left(kept) + cells_left(gone))
    assert sweep(archive, 0).frames == 6
    assert all(cells_left(kept))
    assert not any(cells_left(gone))
    found = open_archive(archive.uri)
    assert len(found.frames()) == 57
    assert not open_index(found).rebuilt
    assert not verify(archive.uri).faults


def test_frames_that_a_killed_job_left_stay_for_a_week(archive):
    add_video(archive, 1)
    archive.commit_frames([receipt_for(archive, 2, random_rows(5))])
    number = reserve(archive, 2)
    assert sweep(archive) == Swept(0, 0)
    assert open_archive(archive.uri).committed_frame_count(number) == 5
    make_old(archive)
    assert sweep(archive).frames == 5
    assert open_archive(archive.uri).committed_frame_count(number) == 0
    assert archive.commit_frames([receipt_for(archive, 2, random_rows(5))]) == [True]  # and can come again
    archive.publish([row_for(archive, 2, 5)])
    assert not verify(archive.uri).faults


def test_frames_of_a_video_that_a_running_job_has_taken_stay(archive):
    archive.commit_frames([receipt_for(archive, 1, random_rows(5))])
    number = reserve(archive, 1)
    make_old(archive)
    with Job(archive.uri) as job:
        assert job.take(number)
        assert sweep(archive, 0).frames == 0
        archive.publish([row_for(archive, 1, 5)])
    assert sweep(archive, 0).frames == 0
    assert len(open_archive(archive.uri).frames()) == 5
