"""A moment is a stretch of frames that look alike and fit the query; it ends where one of both does."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from small_archive import MODEL_ID, Rows, random_rows, receipt_for, reserve, row_for

from pipeline.ask.moments import CHANGE, FALL, LEAST_SECONDS, MomentFinder
from pipeline.ask.query import QueryKeys
from pipeline.ask.thresholds import Threshold
from storage.archive.archive import create_archive, open_archive
from storage.parts.write import FrameColumns
from storage.vectors.vector_index import open_index, update_index

WIDTH = 16
QUERY = np.eye(WIDTH, dtype=np.float32)[0]


def key(score, look=1, turn=0.0):
    """A key with that cosine to the query; `look` and `turn` say where it points otherwise."""
    rest = np.zeros(WIDTH)
    rest[look], rest[look + 1] = np.cos(turn), np.sin(turn)
    return (score * QUERY + np.sqrt(1 - score**2) * rest).astype(np.float16)


class Footage:
    """An archive of videos given by the keys of their frames, one a second or as many as `fps`."""

    def __init__(self, folder):
        self.archive = create_archive(str(folder / "archive"), model_id=MODEL_ID, model_name="small")

    def add(self, name, keys, cuts=(), fps=1, gap_after=None):
        count = len(keys)
        rows = random_rows(count, seed=name, key_width=WIDTH)
        seconds = np.arange(count) / fps
        if gap_after is not None:
            seconds[gap_after + 1 :] += 5
        ticks = np.arange(count, dtype=np.int64) * 10
        columns = FrameColumns(ticks, ticks // 10, seconds, seconds, np.full(count, 1 / fps))
        rows = Rows(columns, replace(rows.tokens, search_key=np.stack(keys)), rows.thumbnails)
        bounds = [0, *cuts, count]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            ends = (None if number == 0 else start * 10, None if end == count else end * 10)
            receipt = receipt_for(self.archive, name, rows.cut(start, end), ends)
            assert self.archive.parts.commit([receipt]) == [True]
        self.archive.videos.publish([row_for(self.archive, name, count)])
        update_index(self.archive)

    def find(self, rows=None, unwanted=(), least=0.3, below=np.inf):
        archive = open_archive(self.archive.uri)
        hits = [hit for hit in open_index(archive).search(QUERY, 1000, rows) if least <= hit.score < below]
        others = np.array(unwanted, np.float32).reshape(-1, WIDTH)
        keys = QueryKeys(QUERY, Threshold(least, "a test"), others, 0.9, ())
        return MomentFinder(archive, keys, rows).find(hits, least, below)

    def spans(self, **how):
        return [(moment.start_seconds, moment.end_seconds) for moment in self.find(**how)[0]]


@pytest.fixture
def footage(tmp_path):
    return Footage(tmp_path)


def test_frames_that_look_alike_are_one_moment_with_its_best_frame_and_mean_score(footage):
    scores = [0.1, 0.6, 0.62, 0.64, 0.62, 0.1]
    looks = [5, 1, 1, 1, 1, 7]
    footage.add(1, [key(score, look) for score, look in zip(scores, looks, strict=True)])
    (moment,), left_out = footage.find()
    assert (moment.start_seconds, moment.end_seconds, moment.best_seconds) == (1.0, 5.0, 3.0)
    assert moment.score == pytest.approx(np.mean(scores[1:5]), abs=2e-3)
    assert (moment.video_number, left_out) == (reserve(footage.archive, 1), 0)


def test_a_moment_ends_where_the_picture_changes_though_both_fit(footage):
    footage.add(1, [key(0.6, 1)] * 4 + [key(0.6, 5)] * 3)
    assert sorted(footage.spans()) == [(0.0, 4.0), (4.0, 7.0)]


def test_a_moment_ends_where_the_score_has_fallen_though_nothing_changes_at_once(footage):
    scores = np.linspace(0.9, 0.5, 41)
    footage.add(1, [key(score) for score in scores])
    first = min(footage.spans())
    count = int((scores >= 0.9 * (1 - FALL)).sum())
    assert first == (0.0, pytest.approx(count, abs=1))
    spans = sorted(footage.spans())
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))  # no frame twice


def test_a_camera_that_moves_all_the_time_does_not_cut_itself(footage):
    turns = np.arange(30) * 0.5  # neighbours are three times as far apart as CHANGE
    moving = [key(0.6, 1, turn) for turn in turns]
    distance = 1 - float(moving[0].astype(np.float32) @ moving[1].astype(np.float32))
    assert 2 * CHANGE < distance < 4 * CHANGE
    footage.add(1, moving + [key(0.6, 9)] * 2)
    assert sorted(footage.spans()) == [(0.0, 30.0), (30.0, 32.0)]


def test_moments_go_on_over_the_ends_of_parts(footage):
    footage.add(1, [key(0.6)] * 9 + [key(0.6, 5)] * 3, cuts=(3, 6, 9))
    assert sorted(footage.spans()) == [(0.0, 9.0), (9.0, 12.0)]


def test_a_gap_in_time_and_another_video_end_a_moment(footage):
    footage.add(1, [key(0.6)] * 6, gap_after=2)
    footage.add(2, [key(0.7)] * 2)
    assert footage.spans() == [(0.0, 2.0), (0.0, 3.0), (8.0, 11.0)]


def test_a_flash_comes_after_all_that_lasts(footage):
    footage.add(1, [key(0.1, 9)] * 2 + [key(0.9, 1)] + [key(0.1, 9)] * 2 + [key(0.5, 5)] * 4, fps=4)
    assert 1 / 4 < LEAST_SECONDS <= 4 / 4
    assert footage.spans() == [(1.25, 2.25), (0.5, 0.75)]


def test_a_filter_and_what_is_unwanted_end_a_moment(footage):
    footage.add(1, [key(0.6)] * 8)
    (path,) = open_archive(footage.archive.uri).parts.bounds().path.tolist()
    assert sorted(footage.spans(rows={path: np.array([1, 2, 3, 6])})) == [(1.0, 4.0), (6.0, 7.0)]
    footage.add(2, [key(0.6, 3)] * 2)
    unwanted = key(0.6, 3).astype(np.float32)
    moments, left_out = footage.find(unwanted=[unwanted])
    assert ([moment.video_number for moment in moments], left_out) == ([reserve(footage.archive, 1)], 2)


def test_only_frames_between_the_limits_belong_to_a_moment(footage):
    footage.add(1, [key(0.5)] * 2 + [key(0.48)] * 3 + [key(0.46)] * 2)
    assert footage.spans(least=0.47) == [(0.0, 5.0)]
    assert footage.spans(least=0.3, below=0.49) == [(2.0, 7.0)]


def test_scores_below_zero_group_too(footage):
    footage.add(1, [key(-0.1), key(-0.105), key(-0.2)])
    assert sorted(footage.spans(least=-1.0)) == [(0.0, 2.0), (2.0, 3.0)]
