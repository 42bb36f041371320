"""What the vector index finds, against brute force over the stored keys, and how it mends itself."""

import json
import multiprocessing
import os
import subprocess
import time

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_archive import MODEL_ID, add_video, partial_receipt, random_rows, receipt_for, reserve, row_for, rows_of

from storage.archive.archive import create_archive, open_archive
from storage.errors import ArchiveError
from storage.files import local_path
from storage.parts import read as cells
from storage.parts.read import read_keys
from storage.records import Status
from storage.vectors.vector_index import named_files, open_index, update_index

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def archive(tmp_path):
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")


def unit(seed, width=16):
    query = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return query / np.linalg.norm(query)


def brute_force(archive, query, k, frames=None):
    """(video number, frame index, score) of the best k, from the stored keys alone."""
    frames = archive.frames.find() if frames is None else frames
    scores = read_keys(archive.frames_uri, frames).astype(np.float32) @ query
    best = np.argsort(-scores, kind="stable")[:k]
    return [(frames[place].video_number, frames[place].frame_index, float(scores[place])) for place in best]


def assert_same(hits, wanted):
    assert [(hit.video_number, hit.frame_index) for hit in hits] == [hit[:2] for hit in wanted]
    assert np.allclose([hit.score for hit in hits], [hit[2] for hit in wanted], atol=1e-6)


def index_folder(archive):
    return local_path(archive.index_uri).decode()


def data_files(archive):
    return sorted(name for name in os.listdir(index_folder(archive)) if name.endswith(".keys"))


def test_search_finds_what_brute_force_finds(archive):
    for name in range(1, 6):
        add_video(archive, name, 40 * name)
    assert update_index(archive) == 600
    index = open_index(archive)
    assert (index.frame_count, index.pending_count, index.rebuilt) == (600, 0, False)
    for seed in range(5):
        assert_same(index.search(unit(seed), 20), brute_force(archive, unit(seed), 20))
    assert len(index.search(unit(0), 10_000)) == 600


def test_the_score_is_the_cosine_of_the_stored_keys(archive):
    rows = add_video(archive, 1, 30)
    update_index(archive)
    query = rows.tokens.search_key[17].astype(np.float32)
    (hit,) = open_index(archive).search(query, 1)
    assert hit.frame_index == 17 * 25
    assert hit.score == pytest.approx(float(query @ query), abs=1e-6)
    assert hit.score == pytest.approx(1.0, abs=2e-3)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    archive = create_archive(str(tmp_path_factory.mktemp("v") / "archive"), model_id=MODEL_ID, model_name="tiny")
    for name in range(1, 7):
        add_video(archive, name, 20 + name)
        if name % 2:
            update_index(archive)
    update_index(archive)
    return archive, open_index(archive)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 200),
    videos=st.none() | st.sets(st.integers(1, 8)),
    span=st.none() | st.tuples(st.floats(0, 30), st.floats(0, 30)),
)
def test_a_filter_leaves_what_brute_force_leaves(indexed, seed, k, videos, span):
    archive, index = indexed
    frames = archive.frames.find(videos, *(sorted(span) if span else (None, None)))
    rows = None if videos is None and span is None else rows_of(frames)
    hits = index.search(unit(seed), k, rows)
    wanted = brute_force(archive, unit(seed), k, frames) if frames else []
    assert_same(hits, wanted)


def test_frames_not_yet_in_the_index_are_found_all_the_same(archive):
    add_video(archive, 1, 10)
    update_index(archive)
    add_video(archive, 2, 7)
    (file,) = data_files(archive)
    index = open_index(archive)
    assert (index.frame_count, index.pending_count, index.rebuilt) == (17, 0, False)
    assert all(index.covers(part.path) for part in archive.frames.parts())
    assert_same(index.search(unit(2), 17), brute_force(archive, unit(2), 17))
    rows = rows_of(archive.frames.find(reserve(archive, 2), 2, 5))
    assert_same(index.search(unit(2), 17, rows), brute_force(archive, unit(2), 17, archive.frames.find(2, 2, 5)))
    assert data_files(archive) == [file]
    assert update_index(archive) == 7
    assert update_index(archive) == 0


def test_retired_videos_are_never_found(archive):
    for name in (1, 2, 3, 4, 5, 6):
        add_video(archive, name, 20)
    update_index(archive)
    retired = reserve(archive, 2)
    add_video(archive, 9, 5, uri="file:///clips/2.mp4")  # other content in the same file
    for _ in range(2):  # as the index was, and after its next update
        index = open_index(open_archive(archive.uri))
        hits = index.search(unit(3), 1000)
        assert retired not in {hit.video_number for hit in hits}
        assert index.frame_count == len(hits)
        update_index(archive)
    assert index.frame_count == 105


def test_keys_of_a_replaced_part_are_never_found(archive):
    add_video(archive, 2, 50)
    old, new = random_rows(6, seed=1), random_rows(9, seed=77, start=3)
    part = partial_receipt(archive, 1, old)
    archive.parts.commit([part])
    archive.videos.publish([row_for(archive, 1, 6, status=Status.PARTIAL, problem=part.problem)])
    update_index(archive)
    assert open_index(archive).frame_count == 56
    assert archive.parts.commit([receipt_for(archive, 1, new)]) == [True]
    for published in (False, True):
        index = open_index(open_archive(archive.uri))  # of which no file has the new part yet
        assert (index.frame_count, index.pending_count, index.covers(part.part.path)) == (59, 0, False)
        for row in (0, 4):  # only in the old part; in both, with another key
            hits = index.search(old.tokens.search_key[row].astype(np.float32), 100)
            assert len(open_archive(archive.uri).frames.of_hits(hits)) == 59
            assert hits[0].score < 0.999
        if not published:
            archive.videos.publish([row_for(archive, 1, 9)])
    assert update_index(archive) == 9
    found = open_archive(archive.uri)
    index = open_index(found)
    assert (index.frame_count, index.pending_count) == (59, 0)
    assert_same(index.search(unit(4), 100), brute_force(found, unit(4), 100))
    rows = rows_of(found.frames.find(reserve(archive, 1)))
    assert len(index.search(unit(4), 100, rows)) == len(found.frames.of_hits(index.search(unit(4), 100, rows))) == 9


def test_a_file_of_mostly_retired_keys_is_written_again(archive):
    add_video(archive, 1, 100)
    update_index(archive)
    (before,) = data_files(archive)
    add_video(archive, 2, 5, uri="file:///clips/1.mp4")
    update_index(archive)
    (after,) = data_files(archive)
    size = os.path.getsize(os.path.join(index_folder(archive), after))
    assert before != after
    assert size < 2000  # 5 keys, not 105


def test_a_missing_or_damaged_index_is_built_again_and_says_so(archive):
    for name in (1, 2):
        add_video(archive, name, 10)
    wanted = brute_force(archive, unit(1), 5)
    index = open_index(archive)  # never made
    assert index.rebuilt
    assert_same(index.search(unit(1), 5), wanted)

    def damage(name, change):
        path = os.path.join(index_folder(archive), name)
        with open(path, "rb") as file:
            data = bytearray(file.read())
        with open(path, "wb") as file:
            file.write(change(data))

    def flip(data):
        data[len(data) // 2] ^= 1
        return data

    for name in ("index.json", "data"):
        for change in (flip, lambda data: data[:-7], lambda data: b"", lambda data: os.urandom(99)):
            damage(data_files(archive)[0] if name == "data" else name, change)
            index = open_index(archive)
            assert index.rebuilt
            assert_same(index.search(unit(1), 5), wanted)
            assert not open_index(archive).rebuilt
            for stray in set(data_files(archive)) - named_files(archive):  # `vidx clean` does so
                os.remove(os.path.join(index_folder(archive), stray))
            assert len(data_files(archive)) == 1
    os.remove(os.path.join(index_folder(archive), data_files(archive)[0]))
    assert open_index(archive).rebuilt


def test_a_read_only_archive_without_index_is_searched_all_the_same(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        archive = create_archive(str(place / "archive"), model_id=MODEL_ID, model_name="tiny")
        add_video(archive, 1, 30)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        index = open_index(open_archive(archive.uri))
        assert (index.rebuilt, index.frame_count) == (True, 30)
        assert_same(index.search(unit(1), 5), brute_force(archive, unit(1), 5))
        cells._open_part.cache_clear()  # or the mapped part keeps the disk busy
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_damaged_file_is_written_again_from_the_parts_and_not_copied(archive):
    add_video(archive, 1, 20)
    update_index(archive)
    (name,) = data_files(archive)
    path = os.path.join(index_folder(archive), name)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) - 3)
        file.write(b"\x55\x55")
    add_video(archive, 2, 10)
    update_index(archive)
    index = open_index(archive)
    assert (index.frame_count, index.rebuilt) == (30, False)
    assert_same(index.search(unit(2), 30), brute_force(archive, unit(2), 30))


def test_an_index_of_another_model_is_not_used(archive):
    add_video(archive, 1, 10)
    update_index(archive)
    path = os.path.join(index_folder(archive), "index.json")
    with open(path, "rb") as file:
        _, _, text = file.read().partition(b"\n")
    assert json.loads(text)["model_id"] == MODEL_ID
    text = json.dumps({**json.loads(text), "model_id": "ff" * 32}).encode()
    with open(path, "wb") as file:
        file.write(b"%08x\n" % google_crc32c.value(text) + text)
    assert open_index(archive).rebuilt


def test_an_empty_archive_has_an_empty_index(archive):
    assert update_index(archive) == 0
    index = open_index(archive)
    assert (index.frame_count, index.pending_count, index.rebuilt) == (0, 0, False)
    assert index.search(unit(0), 5) == []


def test_frames_without_search_key_stay_pending(archive):
    archive.parts.commit([receipt_for(archive, 1, random_rows(5, key_width=None))])
    archive.videos.publish([row_for(archive, 1, 5)])
    add_video(archive, 2, 3)
    assert update_index(archive) == 3
    assert update_index(archive) == 0
    index = open_index(archive)
    assert (index.frame_count, index.pending_count) == (3, 5)
    assert [index.covers(part.path) for part in sorted(archive.frames.parts(), key=lambda part: part.row_count)] == [
        True,
        False,
    ]


def test_a_damaged_part_is_named_when_the_index_is_built(archive):
    rows = add_video(archive, 1, 10)
    (part,) = archive.frames.parts()
    path = os.path.join(local_path(archive.frames_uri).decode(), part.path)
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[data.index(rows.tokens.search_key[4].tobytes())] ^= 1
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(ArchiveError, match=r"damaged: search_key of row 4"):
        update_index(archive)


def test_a_query_of_another_width_is_refused(archive):
    add_video(archive, 1)
    update_index(archive)
    with pytest.raises(ArchiveError, match="query is"):
        open_index(archive).search(unit(0, 8), 3)


def update_at(uri, name, start_at):
    """One of several jobs that end together."""
    archive = open_archive(uri)
    time.sleep(max(0.0, start_at - time.time()))
    add_video(archive, name, 10)
    update_index(archive)


def test_jobs_that_end_together_leave_every_frame_searchable(archive):
    start_at = time.time() + 4
    jobs = [SPAWN.Process(target=update_at, args=(archive.uri, name, start_at)) for name in (1, 2, 3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    found = open_archive(archive.uri)
    index = open_index(found)
    assert (index.frame_count, index.pending_count, index.rebuilt) == (30, 0, False)
    assert_same(index.search(unit(5), 30), brute_force(found, unit(5), 30))
