"""The index of large archives, made small: codes against brute force, and what is added, replaced, deleted, damaged."""

import contextlib
import multiprocessing
import os
import time

import numpy as np
import pytest
import small_archive
from small_archive import MODEL_ID, add_video, make_old, random_rows, receipt_for, reserve, row_for, rows_of
from test_vectors import assert_same, brute_force, index_folder, unit

from storage.archive.archive import create_archive, open_archive
from storage.care.clean import remove_unnamed_files
from storage.errors import ArchiveError
from storage.files import local_path
from storage.parts.read import read_keys
from storage.vectors import centroids, codes, nearest
from storage.vectors import vector_index as vectors
from storage.vectors.vector_index import improve_index, index_faults, open_index, update_index

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=[1, 20], ids=["no-two-alike", "shots-of-20"])
def archive(tmp_path, monkeypatch, request):
    """Empty; the frames of what is added look alike in shots of so many."""
    monkeypatch.setattr(small_archive, "SHOT_FRAMES", request.param)
    monkeypatch.setattr(vectors, "EXACT_KEYS", 500)
    monkeypatch.setattr(nearest, "NARROW_ROWS", 20)
    monkeypatch.setattr(centroids, "ROUTER_LISTS", 64)  # so that both steps of training and assigning run
    return create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")


def fill(archive, names, count=60):
    for name in names:
        add_video(archive, name, count)
    update_index(archive)
    improve_index(archive)


def suffixes(archive):
    return sorted(name.rsplit(".", 1)[1] for name in os.listdir(index_folder(archive)) if not name.endswith(".lock"))


def names(archive, *kinds):
    return sorted(name for name in os.listdir(index_folder(archive)) if name.rsplit(".", 1)[1] in kinds)


def recall(archive, index, k=10, rows=None, frames=None):
    """Share of the true best k that are found, over some queries."""
    shares = []
    for seed in range(20):
        wanted = {hit[:2] for hit in brute_force(archive, unit(seed), k, frames)}
        found = {(hit.video_number, hit.frame_index) for hit in index.search(unit(seed), k, rows)}
        shares.append(len(found & wanted) / len(wanted))
    return np.mean(shares)


def test_an_archive_that_grows_is_coded_and_found_as_before(archive):
    fill(archive, range(1, 9))
    assert suffixes(archive) == ["json", "keys", "parts"]
    fill(archive, [9])
    assert suffixes(archive) == ["centroids", "codes", "json", "parts", "rows", "runs"]
    index = open_index(archive)
    assert (index.frame_count, index.pending_count, index.rebuilt) == (540, 0, False)
    assert recall(archive, index) > 0.98
    hits = index.search(unit(3), 540)
    assert len({(hit.video_number, hit.frame_index) for hit in hits}) == len(hits) > 500
    keys = read_keys(archive.frames_uri, archive.frames.of_hits(hits)).astype(np.float32)
    assert np.allclose(keys @ unit(3), [hit.score for hit in hits], atol=1e-6)


def test_a_job_leaves_the_training_of_a_large_index_to_another(archive):
    fill(archive, range(1, 10))
    assert improve_index(archive, most_keys=100)
    for name in range(10, 40):
        add_video(archive, name, 60)
    update_index(archive)
    trained = names(archive, "centroids")
    assert not improve_index(archive, most_keys=1000)
    assert names(archive, "centroids") == trained
    assert open_index(archive).frame_count == 39 * 60
    assert improve_index(archive)
    assert names(archive, "centroids") != trained
    assert improve_index(archive, most_keys=1000)


def test_additions_are_exact_until_they_are_many_and_are_coded_by_the_same_lists_then(archive):
    fill(archive, range(1, 10))
    main = names(archive, "centroids", "codes", "runs", "rows")
    for name in range(10, 19):
        fill(archive, [name], count=50)
        assert names(archive, "centroids", "codes", "runs", "rows") == main
        assert len(names(archive, "keys")) == 1
        assert recall(archive, open_index(archive)) > 0.97
    fill(archive, range(19, 21), count=50)
    assert suffixes(archive) == ["centroids", "codes", "json", "parts", "rows", "runs"]
    assert names(archive, "centroids") == [name for name in main if name.endswith("centroids")]
    assert recall(archive, open_index(archive)) > 0.97
    assert list(index_faults(archive)) == []
    assert open_index(archive).frame_count == 1090


def test_an_index_that_is_built_a_few_videos_at_a_time_holds_what_one_built_at_once_holds(archive, monkeypatch):
    fill(archive, range(1, 10))
    wanted = [open_index(archive).search(unit(seed), 10) for seed in range(5)]
    vectors.drop_index(archive)
    monkeypatch.setattr(vectors, "BUILD_KEYS", 130)
    assert open_index(archive).rebuilt
    assert suffixes(archive) == ["centroids", "codes", "json", "parts", "rows", "runs"]
    assert list(index_faults(archive)) == []
    assert [open_index(archive).search(unit(seed), 10) for seed in range(5)] == wanted


def test_more_keys_than_are_written_at_once_go_into_the_codes(archive, monkeypatch):
    fill(archive, range(1, 10))
    monkeypatch.setattr(vectors, "MOST_EXACT_KEYS", 100)
    for name in range(10, 14):
        add_video(archive, name, 60)
    update_index(archive)
    assert suffixes(archive) == ["centroids", "codes", "json", "parts", "rows", "runs"]
    assert open_index(archive).frame_count == 780
    assert recall(archive, open_index(archive)) > 0.97


def test_lists_are_made_anew_when_the_archive_has_outgrown_them(archive, monkeypatch):
    fill(archive, range(1, 10))
    (before,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(".centroids")]
    monkeypatch.setattr(vectors, "GROWTH", 1.5)
    fill(archive, range(10, 16))
    (after,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(".centroids")]
    assert before != after
    assert suffixes(archive).count("codes") == 1
    assert recall(archive, open_index(archive)) > 0.98


def test_filters_are_exact_where_few_frames_are_left_and_nearly_so_elsewhere(archive):
    fill(archive, range(1, 11))
    index = open_index(archive)
    narrow = archive.frames.find(reserve(archive, 4), 10, 25)
    for seed in range(5):
        hits = index.search(unit(seed), 10, rows_of(narrow))
        assert_same(hits, brute_force(archive, unit(seed), 10, narrow))
    wide = archive.frames.find([reserve(archive, name) for name in (2, 5, 9)])
    assert recall(archive, index, rows=rows_of(wide), frames=wide) > 0.98
    whole = archive.frames.rows([reserve(archive, name) for name in (2, 5, 9)])
    assert set(whole.values()) == {None}
    assert index.count(whole) == index.count(rows_of(wide)) == 180
    assert index.search(unit(1), 10, whole) == index.search(unit(1), 10, rows_of(wide))
    assert index.search(unit(1), 10, {}) == []


def test_what_is_retired_is_never_found_and_goes_when_asked(archive):
    fill(archive, range(1, 11))
    gone = archive.videos.find("3.mp4")
    archive.videos.delete([gone])
    index = open_index(open_archive(archive.uri))
    assert gone.video_number not in {hit.video_number for hit in index.search(unit(1), 600)}
    assert index.frame_count == 540
    codes = [name for name in os.listdir(index_folder(archive)) if name.endswith(".codes")]
    update_index(archive)
    assert codes == [name for name in os.listdir(index_folder(archive)) if name.endswith(".codes")]
    update_index(archive, max_retired=0)
    assert codes != [name for name in os.listdir(index_folder(archive)) if name.endswith(".codes")]
    index = open_index(archive)
    assert index.frame_count == 540
    assert recall(archive, index) > 0.98
    assert list(index_faults(archive)) == []


def test_frames_newer_than_the_index_are_searched_on_top(archive):
    fill(archive, range(1, 10))
    rows = add_video(archive, 30, 40)
    index = open_index(archive)
    assert (index.frame_count, index.pending_count) == (580, 0)
    query = rows.tokens.search_key[7].astype(np.float32)
    (hit,) = index.search(query, 1)
    assert (hit.video_number, hit.frame_index) == (reserve(archive, 30), 7 * 25)


def test_an_archive_that_shrinks_is_searched_exactly_again(archive):
    fill(archive, range(1, 11))
    archive.videos.delete([archive.videos.find(f"{name}.mp4") for name in range(1, 9)])
    update_index(archive, max_retired=0)
    improve_index(archive)
    assert suffixes(archive) == ["json", "keys", "parts"]
    assert_same(open_index(archive).search(unit(1), 120), brute_force(archive, unit(1), 120))


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def rebuild(archive):
    vectors.drop_index(archive)
    assert open_index(archive).rebuilt
    assert list(index_faults(archive)) == []
    make_old(archive)
    remove_unnamed_files(archive)


def test_a_search_that_meets_a_damaged_place_says_so_and_blames_no_part(archive):
    fill(archive, range(1, 10))
    for field in ("row_id", "key", "checksum", "crc"):
        best = open_index(archive).search(unit(0), 1)[0]
        (name,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(".rows")]
        path = os.path.join(index_folder(archive), name)
        rows = np.memmap(path, np.dtype([("row_id", "<i8"), ("key", "<i8"), ("checksum", "<i8"), ("crc", "<u4")]), "r+")
        (place,) = np.flatnonzero(rows["row_id"] == (best.video_number << 32) | best.frame_index)
        rows[field][place] ^= 1
        rows.flush()
        with pytest.raises(ArchiveError, match="index: damaged; `vidx repair`"):
            open_index(archive).search(unit(0), 1)
        rebuild(archive)


def train_at(uri, start_at):
    """One of several processes that find the index lost."""
    time.sleep(max(0.0, start_at - time.time()))
    vectors.EXACT_KEYS = 500
    index = open_index(open_archive(uri))
    assert index.frame_count == 540
    assert len(index.search(unit(1), 10)) == 10


def test_processes_that_find_the_index_lost_leave_one_that_is_whole(archive):
    fill(archive, range(1, 10))
    vectors.drop_index(archive)
    start_at = time.time() + 4
    jobs = [SPAWN.Process(target=train_at, args=(archive.uri, start_at)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert not open_index(archive).rebuilt
    assert list(index_faults(archive)) == []
    assert open_index(archive).frame_count == 540


def test_an_update_without_anything_new_changes_nothing(archive):
    for names in (range(1, 3), range(3, 11)):  # compared one by one, then coded
        archive.parts.commit([receipt_for(archive, 40, random_rows(5, key_width=None))])
        archive.videos.publish([row_for(archive, 40, 5)])
        fill(archive, names)
        before = {name: os.stat(os.path.join(index_folder(archive), name)).st_mtime_ns for name in suffixed(archive)}
        update_index(archive)
        improve_index(archive)
        assert before == {
            name: os.stat(os.path.join(index_folder(archive), name)).st_mtime_ns for name in suffixed(archive)
        }


def suffixed(archive):
    return [name for name in os.listdir(index_folder(archive)) if not name.endswith(".lock")]


def test_damage_in_any_file_is_named_or_made_good(archive):
    fill(archive, range(1, 10))
    random = np.random.default_rng(1)
    for suffix in ("codes", "runs", "rows", "centroids"):
        for _ in range(4):
            (name,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(suffix)]
            path = os.path.join(index_folder(archive), name)
            flip(path, int(random.integers(os.path.getsize(path))))
            faults = list(index_faults(archive))
            assert faults
            assert faults[0][0].endswith(name)
            with contextlib.suppress(ArchiveError):  # which says what is damaged; else whatever is found is true
                hits = open_index(archive).search(unit(0), 5)
                keys = read_keys(archive.frames_uri, archive.frames.of_hits(hits)).astype(np.float32)
                assert np.allclose(keys @ unit(0), [hit.score for hit in hits], atol=1e-6)
            rebuild(archive)


def test_a_lost_file_is_written_again_from_the_parts(archive):
    fill(archive, range(1, 10))
    for suffix in ("codes", "runs", "rows", "centroids"):
        (name,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(suffix)]
        os.remove(os.path.join(index_folder(archive), name))
        assert open_index(archive).rebuilt
        assert recall(archive, open_index(archive)) > 0.98
        assert suffixes(archive) == ["centroids", "codes", "json", "parts", "rows", "runs"]


def test_a_search_that_meets_a_damaged_key_says_so(archive):
    rows = add_video(archive, 1, 60)
    fill(archive, range(2, 10))
    (part,) = [part for part in archive.frames.parts() if part.video_number == reserve(archive, 1)]
    path = os.path.join(local_path(archive.frames_uri).decode(), part.path)
    key = rows.tokens.search_key[7]
    with open(path, "rb") as file:
        flip(path, file.read().index(key.tobytes()))
    with pytest.raises(ArchiveError, match=r"damaged: search_key of row 7"):
        open_index(archive).search(key.astype(np.float32), 1)


def test_parts_without_keys_stay_pending_in_a_coded_index(archive):
    fill(archive, range(1, 10))
    archive.parts.commit([receipt_for(archive, 40, random_rows(5, key_width=None))])
    archive.videos.publish([row_for(archive, 40, 5)])
    update_index(archive)
    index = open_index(archive)
    assert (index.frame_count, index.pending_count) == (540, 5)
    assert update_index(archive) == 0


def test_lists_that_find_too_little_are_made_anew(archive, monkeypatch):
    fill(archive, range(1, 10))
    (before,) = [name for name in os.listdir(index_folder(archive)) if name.endswith(".centroids")]
    fill(archive, range(10, 13))
    assert os.path.exists(os.path.join(index_folder(archive), before))
    monkeypatch.setattr(codes, "PROBES", 1)
    assert open_index(archive).recall() < 0.9
    fill(archive, range(13, 17))
    assert not os.path.exists(os.path.join(index_folder(archive), before))


def test_a_list_of_unlike_keys_is_looked_into_before_one_of_alike_keys_that_lies_as_near():
    random = np.random.default_rng(0)
    alike, unlike = np.eye(16)[0], np.eye(16)[1]
    keys = [
        direction + noise * random.standard_normal((400, 16)) for direction, noise in ((alike, 0.02), (unlike, 0.2))
    ]
    keys = [group / np.linalg.norm(group, axis=1, keepdims=True) for group in keys]
    lists = centroids.Centroids.train(np.concatenate(keys).astype(np.float32), 2)
    first, second = (np.bincount(lists.assign(lists.rotate(group))).argmax() for group in keys)
    assert first != second
    assert lists.reaches[second] > 3 * lists.reaches[first]
    rotated = lists.rotated.astype(np.float32)
    between = np.linalg.solve(np.stack([rotated[first], rotated[second]])[:, :2], [0.5, 0.5])
    query = np.zeros(16, np.float32)
    query[:2] = between  # its products with both centroids are the same
    products, order = lists.probe(query, 2)
    assert products[0][0] == pytest.approx(products[0][1], abs=1e-3)
    assert order[0].tolist() == [second, first]
