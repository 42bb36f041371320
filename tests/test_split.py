"""Segments tile a video."""

from fractions import Fraction

from pipeline.index.split import split
from storage.records import Probe

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
