"""Segments tile a video; moments group the hits that belong together."""

from fractions import Fraction

from pipeline.moments import moments_of
from pipeline.split import split
from storage.records import FrameRef, Hit, Probe

VIDEO = "a" * 64


def probe(cuts, first_ticks=0, time_base=Fraction(1, 10)):
    return Probe("pyav", "matroska,webm", "h264", 0, 64, 48, 0, time_base, first_ticks, 0.0, 60.0, tuple(cuts))


def test_segments_are_cut_at_keyframes_once_they_are_long_enough():
    segments = split(VIDEO, probe([(40, 4), (110, 11), (150, 15), (215, 21)]), segment_seconds=10)
    assert [(s.start_ticks, s.end_ticks, s.first_index) for s in segments] == [
        (None, 110, 0),
        (110, 215, 11),
        (215, None, 21),
    ]
    assert [s.key for s in segments] == ["..110", "110..215", "215.."]


def test_a_video_without_cuts_is_one_segment():
    (segment,) = split(VIDEO, probe([]), segment_seconds=10)
    assert (segment.start_ticks, segment.end_ticks, segment.first_index) == (None, None, 0)


def test_segments_follow_the_keyframes_and_not_a_jump_in_time():
    assert len(split(VIDEO, probe([(1_000_000, 5), (1_000_004, 9)]), segment_seconds=10)) == 2


def test_the_length_counts_from_the_first_frame():
    assert len(split(VIDEO, probe([(7050, 4)], first_ticks=7000), segment_seconds=10)) == 1


def frames(number, count):
    return {(number, 10 * i): FrameRef(VIDEO, number, 10 * i, 10 * i, float(i), 1.0, "p", i) for i in range(count)}


def test_neighbouring_hits_are_one_moment_with_its_best_frame():
    hits = [Hit(1, 20, 0.30), Hit(1, 10, 0.28), Hit(1, 30, 0.29)]
    (moment,) = moments_of(hits, frames(1, 6), {1: "file:///a.mp4"})
    assert (moment.start_seconds, moment.end_seconds, moment.best_seconds, moment.score) == (1.0, 4.0, 2.0, 0.30)


def test_a_gap_or_another_video_starts_a_new_moment_and_the_best_comes_first():
    hits = [Hit(1, 0, 0.20), Hit(1, 20, 0.25), Hit(2, 10, 0.30)]
    found = moments_of(hits, frames(1, 6) | frames(2, 6), {1: "file:///a.mp4", 2: "file:///b.mp4"})
    assert [(m.video_number, m.start_seconds, m.end_seconds) for m in found] == [
        (2, 1.0, 2.0),
        (1, 2.0, 3.0),
        (1, 0.0, 1.0),
    ]


def test_a_moment_ends_where_the_score_has_fallen():
    hits = [Hit(1, 0, 0.10), Hit(1, 10, 0.30), Hit(1, 20, 0.28), Hit(1, 30, 0.11)]
    found = moments_of(hits, frames(1, 6), {1: "file:///a.mp4"})
    assert [(m.start_seconds, m.end_seconds, m.score) for m in found] == [
        (1.0, 3.0, 0.30),
        (3.0, 4.0, 0.11),
        (0.0, 1.0, 0.10),
    ]


def test_scores_below_zero_group_too():
    found = moments_of([Hit(1, 0, -0.1), Hit(1, 10, -0.105)], frames(1, 3), {1: "file:///a.mp4"})
    assert [(m.start_seconds, m.end_seconds) for m in found] == [(0.0, 2.0)]
