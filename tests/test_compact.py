"""compact joins the parts of a video; nothing that was stored, found or shown changes, whoever reads meanwhile."""

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_archive import (
    MODEL_ID,
    add_video,
    cells_left,
    folder_of,
    make_old,
    partial_receipt,
    random_rows,
    receipt_for,
    row_for,
    video_id_of,
)

from pipeline.cli.main import vidx
from storage.archive.archive import create_archive, open_archive
from storage.archive.part_table import PartTable
from storage.care.clean import clean
from storage.care.compact import compact
from storage.care.verify import verify
from storage.errors import ArchiveError
from storage.files import local_path
from storage.parts.read import read_compressor_out, read_keys, read_patches, read_thumbnails, read_tokens
from storage.records import Reason, Status
from storage.vectors.vector_index import open_index, update_index


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="small")


def add_in_pieces(archive, name, pieces=4, frames=5):
    """A video of several segments, the last open; returns its rows."""
    rows = random_rows(pieces * frames, seed=name, patches=(3, 4))
    cuts = [None, *(10 * frames * piece for piece in range(1, pieces)), None]
    for piece in range(pieces):
        own = rows.cut(frames * piece, frames * (piece + 1))
        assert archive.parts.commit([receipt_for(archive, name, own, (cuts[piece], cuts[piece + 1]))]) == [True]
    archive.videos.publish([row_for(archive, name, pieces * frames)])
    update_index(archive)
    return rows


def parts_of(archive):
    return sorted(open_archive(archive.uri).parts.bounds().path.tolist())


def stored(archive, name):
    """All that an archive says of the frames of a video, cells included."""
    frames = archive.frames.find(row_for(archive, name, 1).video_number)
    uri = archive.frames_uri
    patches = read_patches(uri, frames)
    times = [replace(frame, part="", row=0) for frame in frames]
    tokens = (read_tokens(uri, frames), read_compressor_out(uri, frames), read_keys(uri, frames))
    cells = [cell.tobytes() for cell in (*tokens, patches.values, patches.scales, patches.positions)]
    return times, cells, read_thumbnails(uri, frames)


def narrow(archive):
    """The rows of an archive's parts but for what says in which of them they lie."""
    tables = [pq.read_table(local_path(f"{archive.frames_uri}/{path}").decode()) for path in parts_of(archive)]
    rows = [row for table in tables for row in table.drop_columns(["row", "segment"]).to_pylist()]
    return sorted(rows, key=lambda row: (row["video_number"], row["ticks"]))


def test_each_video_becomes_one_part_and_every_cell_stays(archive):
    rows = {name: add_in_pieces(archive, name) for name in (1, 2)}
    before = {name: stored(archive, name) for name in rows}, narrow(archive)
    done = compact(archive)
    assert (done.videos, done.parts_joined, done.parts_written) == (2, 8, 2)
    found = open_archive(archive.uri)
    assert len(found.parts.bounds()) == 2
    assert set(found.parts.bounds().segment.tolist()) == {".."}
    assert ({name: stored(found, name) for name in rows}, narrow(found)) == before
    assert verify(found.uri).faults == ()
    again = compact(found)
    assert (again.videos, again.parts_joined, again.parts_written) == (0, 0, 0)


def test_parts_grow_up_to_the_target(archive):
    add_in_pieces(archive, 1, pieces=6)
    size = int(archive.parts.bounds().size_bytes.max())
    done = compact(archive, target_bytes=3 * size)
    assert (done.parts_joined, done.parts_written) == (6, 2)
    bounds = open_archive(archive.uri).parts.bounds()
    assert sorted(bounds.segment.tolist()) == ["..150", "150.."]
    assert compact(archive, target_bytes=size).parts_joined == 0  # none is split or grows


def test_search_finds_the_same_while_and_after(archive):
    rows = {name: add_in_pieces(archive, name) for name in (1, 2, 3)}
    open_before = open_index(archive)
    queries = [each.tokens.search_key[7].astype(np.float32) for each in rows.values()]
    wanted = [open_before.search(query, 12) for query in queries]
    compact(open_archive(archive.uri))
    assert [open_before.search(query, 12) for query in queries] == wanted  # by the files of its version
    index = open_index(open_archive(archive.uri))
    assert [index.search(query, 12) for query in queries] == wanted
    assert not index.rebuilt
    assert index.count(dict.fromkeys(parts_of(archive))) == 60


def test_old_files_go_when_they_are_old_enough(archive):
    rows = add_in_pieces(archive, 1)
    old = parts_of(archive)
    compact(archive)
    clean(open_archive(archive.uri), 3600)
    assert all((folder_of(archive) / "frames" / path).exists() for path in old)
    make_old(archive)
    clean(open_archive(archive.uri), 3600)  # they are old, but it is not an hour since they were replaced
    assert all((folder_of(archive) / "frames" / path).exists() for path in old)
    clean(open_archive(archive.uri), 0)
    assert not any((folder_of(archive) / "frames" / path).exists() for path in old)
    assert all(cells_left(archive, rows))


def test_what_is_not_whole_or_shown_is_left_alone(archive):
    rows = random_rows(8)
    part = partial_receipt(archive, 1, rows.cut(0, 4), Reason.CORRUPT)
    archive.parts.commit([part])
    archive.videos.publish([row_for(archive, 1, 4, status=Status.PARTIAL, problem=part.problem)])
    for piece, cut in enumerate([(None, 40), (40, None)]):  # of a job that still runs
        archive.parts.commit([receipt_for(archive, 2, rows.cut(4 * piece, 4 * piece + 4), cut)])
    before = parts_of(archive)
    assert compact(archive).parts_joined == 0
    assert parts_of(archive) == before


def test_a_job_knows_the_segments_of_a_joined_part_again(archive):
    rows = add_in_pieces(archive, 1)
    compact(archive)
    found = open_archive(archive.uri)
    keys = ["..50", "50..100", "100..150", "150.."]
    assert found.parts.committed(row_for(archive, 1, 1).video_number, keys) == set(keys)
    assert found.parts.holds(row_for(archive, 1, 1).video_number, keys)
    late = receipt_for(archive, 1, rows.cut(5, 10), (50, 100))
    assert found.parts.commit([late]) == [False]
    assert found.parts.frame_count(late.video_number) == 20


def test_parts_that_went_meanwhile_are_not_brought_back(archive, monkeypatch):
    add_in_pieces(archive, 1)
    add_in_pieces(archive, 2)
    gone = row_for(archive, 1, 1).video_number
    join = PartTable.join

    def slow_join(self, joined):
        other = open_archive(archive.uri)
        bounds = other.parts.bounds()
        other.parts.drop(bounds.path[bounds.of(gone)][:1].tolist())
        return join(self, joined)

    monkeypatch.setattr(PartTable, "join", slow_join)
    done = compact(archive)
    assert (done.videos, done.parts_joined, done.parts_written) == (1, 4, 1)
    found = open_archive(archive.uri)
    assert found.parts.frame_count(gone) == 15
    assert len(list((folder_of(archive) / "frames").glob("*.parquet"))) == 9  # 8 old ones, 1 new


def test_videos_are_added_and_deleted_at_the_same_time(archive):
    for name in range(1, 9):
        add_in_pieces(archive, name)
    problems = []

    def others():
        try:
            own = open_archive(archive.uri)
            for name in range(9, 13):
                add_in_pieces(own, name)
            own.videos.delete([row_for(own, 3, 20), row_for(own, 9, 20)])
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=others)
    thread.start()
    compact(archive)
    thread.join()
    assert problems == []
    compact(archive)
    found = open_archive(archive.uri)
    assert verify(found.uri).faults == ()
    assert found.videos.frame_count() == 200
    assert {part.row_count for part in found.frames.parts()} == {20}


def test_a_damaged_part_is_named_and_nothing_is_lost(archive):
    add_in_pieces(archive, 1)
    bounds = archive.parts.bounds()
    path = folder_of(archive) / "frames" / bounds.path[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    before = parts_of(archive)
    add_in_pieces(archive, 2)
    done = compact(archive)
    (problem,) = done.problems
    assert path.name in problem
    assert (done.videos, done.parts_joined) == (1, 4)
    assert set(before) < set(parts_of(archive))
    result = CliRunner().invoke(vidx, ["compact", "--archive", str(folder_of(archive))])
    assert result.exit_code == 5
    assert path.name in result.stderr


def test_a_hole_is_not_joined_over(archive):
    add_in_pieces(archive, 1)
    bounds = archive.parts.bounds()
    hole = bounds.path[bounds.segment == "50..100"].tolist()
    archive.parts.drop(hole)  # as by a repair that was killed before it said so
    assert compact(open_archive(archive.uri)).parts_joined == 0
    assert open_archive(archive.uri).parts.committed(row_for(archive, 1, 1).video_number, ["50..100"]) == set()


def test_what_is_written_and_not_committed_yet_is_not_cleaned_away(archive, monkeypatch):
    add_in_pieces(archive, 1)
    join = PartTable.join

    def beside_clean(self, joined):
        make_old(archive)
        clean(open_archive(archive.uri), 0)
        return join(self, joined)

    monkeypatch.setattr(PartTable, "join", beside_clean)
    with pytest.raises(ArchiveError, match="removed before it was committed"):
        compact(archive)  # its files were made to look old
    found = open_archive(archive.uri)
    assert verify(found.uri).faults == ()
    assert found.videos.frame_count() == 20


def test_the_command_says_what_it_joined(archive):
    add_video(archive, 5)
    add_in_pieces(archive, 1)
    result = CliRunner().invoke(vidx, ["compact", "--archive", str(folder_of(archive)), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"videos": 1, "files_joined": 4, "files_written": 1, "problems": []}
    result = CliRunner().invoke(vidx, ["compact", "--archive", str(folder_of(archive))])
    assert result.stdout == "nothing to join\n"


def test_regular_care_in_one_command(archive):
    add_in_pieces(archive, 1)
    add_video(archive, 2, captured_at=datetime.now(UTC))
    command = ["maintain", "--archive", str(folder_of(archive)), "--clean-older-than", "0"]
    result = CliRunner().invoke(vidx, [*command, "--expire", "soon"])
    assert (result.exception.exit_code, str(result.exception)[:22]) == (2, "--expire soon: not an ")
    make_old(archive)
    result = CliRunner().invoke(vidx, [*command, "--expire", "90d", "--json"])  # the first is of 2024
    assert result.exit_code == 0
    done = json.loads(result.stdout)
    assert (done["videos_expired"], done["frames_removed"], done["index_frames"], done["problems"]) == (1, 20, 5, [])
    assert [row.video_id for row in open_archive(archive.uri).videos.all() if row.frame_count] == [video_id_of(2)]
    add_in_pieces(open_archive(archive.uri), 3)
    result = CliRunner().invoke(vidx, command)
    assert result.stdout.splitlines()[:2] == ["4 files joined into 1", "the search index finds 25 frames"]
    assert verify(archive.uri).faults == ()
