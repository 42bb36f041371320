"""Frames in several shards: what an archive of a million videos does, with few videos in each shard."""

import json
from collections import Counter

import pytest
from small_archive import MODEL_ID, add_video, folder_of, random_rows, receipt_for, row_for
from test_vectors import unit

from storage.archive import archive as archives
from storage.archive import part_table
from storage.archive.archive import create_archive, open_archive
from storage.archive.shard import Shard
from storage.care.clean import clean
from storage.care.compact import compact
from storage.care.repair import repair
from storage.care.verify import verify
from storage.errors import ArchiveError
from storage.sql import run_sql
from storage.vectors.vector_index import open_index, update_index


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes an archive of seven videos with so many in each shard."""

    def made(per_shard):
        monkeypatch.setattr(archives, "VIDEOS_PER_SHARD", per_shard)
        place = str(tmp_path / f"archive_{per_shard}")
        archive = create_archive(place, model_id=MODEL_ID, model_name="tiny")
        for name in range(1, 8):
            add_video(archive, name)
        update_index(archive)
        return archive

    return made


def found(archive, seed=0, k=9):
    return [(hit.video_number, hit.frame_index, hit.score) for hit in open_index(archive).search(unit(seed), k)]


def shards(archive):
    return sorted(path.parent.name for path in folder_of(archive).glob("frames/*/_delta_log"))


def test_shards_change_nothing_that_a_user_sees(make):
    one, many = make(4096), make(2)
    assert (shards(one), shards(many)) == ([], ["_000001", "_000002", "_000003"])
    assert {part.path.partition("/")[0] for part in many.frames.parts() if part.video_number >= 6} == {"_000003"}
    assert found(many) == found(one) != []
    statement = "SELECT video_id, count(*) FROM frames GROUP BY ALL ORDER BY ALL"
    assert [*run_sql(many, statement)[1]] == [*run_sql(one, statement)[1]]
    assert many.frames.at(7, 2.5).ticks == one.frames.at(7, 2.5).ticks
    assert (many.status().frames, verify(many.uri).frames, verify(many.uri).faults) == (35, 35, ())
    assert found(open_archive(many.uri)) == found(one)


@pytest.fixture
def opened(monkeypatch):
    """The shards that were opened, each with how often."""
    counts = Counter()

    class Counted(Shard):
        def __init__(self, frames_uri, folder):
            counts[folder] += 1
            super().__init__(frames_uri, folder)

    monkeypatch.setattr(part_table, "Shard", Counted)
    return counts


def test_only_the_shards_that_matter_are_opened(make, opened):
    archive = make(2)
    opened.clear()
    again = open_archive(archive.uri)
    again.status()
    index = open_index(again)
    assert (index.frame_count, index.pending_count) == (35, 0)
    best = index.search(unit(3), 1)
    assert opened.keys() == {""}
    again.frames.of_hits(best)
    assert opened.keys() == {"", again.parts.folder_of(best[0].video_number)}
    opened.clear()
    again = open_archive(archive.uri)
    rows = random_rows(5, seed=8)
    assert again.parts.commit([receipt_for(again, 8, rows)]) == [True]
    again.videos.publish([row_for(again, 8, 5)])
    assert update_index(again) == 5
    assert opened.keys() <= {"", "_000003", "_000004"}
    assert open_index(open_archive(archive.uri)).frame_count == 40


def test_what_is_published_later_or_deleted_is_noticed_though_its_shard_is_as_before(make):
    archive = make(2)
    assert archive.parts.commit([receipt_for(archive, 8, random_rows(5, seed=8))]) == [True]
    update_index(archive)
    archive.videos.publish([row_for(archive, 8, 5)])
    assert {number for number, _, _ in found(open_archive(archive.uri), k=40)} == set(range(1, 9))
    update_index(archive)
    archive.videos.delete([archive.videos.find("3.mp4")])
    assert {number for number, _, _ in found(open_archive(archive.uri), k=40)} == {1, 2, 4, 5, 6, 7, 8}


def test_parts_that_are_joined_or_gone_are_found_or_not(make):
    archive = make(2)
    for start, segment in ((0, (None, 50)), (5, (50, None))):
        rows = random_rows(5, seed=8, start=start)
        assert archive.parts.commit([receipt_for(archive, 8, rows, segment)]) == [True]
    archive.videos.publish([row_for(archive, 8, 10)])
    update_index(archive)
    before = found(archive, k=45)
    assert compact(archive).parts_joined == 2
    assert found(open_archive(archive.uri), k=45) == before
    archive.videos.delete([archive.videos.find("2.mp4")])
    clean(archive, 0)
    left = open_archive(archive.uri)
    assert {number for number, _, _ in found(left, k=45)} == {1, 3, 4, 5, 6, 7, 8}
    assert verify(archive.uri).faults == ()


def test_a_shard_with_a_damaged_log_is_named_and_a_cut_commit_is_repaired(make):
    archive = make(2)
    log = sorted((folder_of(archive) / "frames" / "_000002" / "_delta_log").glob("*.json"))[-1]
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    faults = verify(archive.uri).faults
    assert [(str(log) in fault.path, fault.is_mendable) for fault in faults] == [(True, True)]
    with pytest.raises(ArchiveError, match="_000002"):
        open_archive(archive.uri).frames.find(5)
    assert str(log) in repair(archive.uri).notes[0]
    assert verify(archive.uri).faults == ()
    assert open_archive(archive.uri).status().frames == 30


def test_an_archive_of_the_older_format_stays_in_one_shard(make):
    archive = make(4096)
    settings = folder_of(archive) / "archive.json"
    values = json.loads(settings.read_text())
    assert values.pop("videos_per_shard") == 4096
    settings.write_text(json.dumps({**values, "format_version": 2}))
    older = open_archive(archive.uri)
    assert {older.parts.folder_of(number) for number in (1, 4096, 10**6)} == {""}
    add_video(older, 8)
    update_index(older)
    assert (open_index(open_archive(archive.uri)).frame_count, shards(older)) == (40, [])
