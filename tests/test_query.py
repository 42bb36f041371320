"""Filters and combined queries, against the stored rows and keys themselves."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from small_archive import MODEL_ID, add_video, failed_row, random_rows, receipt_for

from pipeline.filter import Filter
from pipeline.query import Query, Term, embed, parse_term
from pipeline.search import Wanted, search
from storage.archive import create_archive, open_archive
from storage.cells import read_keys
from storage.errors import UsageError
from workers.bundle import find_bundle
from workers.clip_text import TextEncoder

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Videos of 5 s: 1 at noon, 2 a minute later, 3 of an unknown time; 4 is not published, 5 could not be read."""
    place = tmp_path_factory.mktemp("filter") / "archive"
    archive = create_archive(str(place), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, captured_at=NOON, tags={"camera": "north", "lens": "wide"})
    add_video(archive, 2, captured_at=NOON + timedelta(minutes=1), tags={"camera": "south"})
    add_video(archive, 3, captured_at=None, tags={})
    archive.commit_frames([receipt_for(archive, 4, random_rows(5))])
    archive.publish([failed_row(archive, "file:///clips/secret.mp4")])
    return archive


def frames_of(archive, **filters):
    """(video, second) of every frame that passes."""
    frames = Filter(**filters).frames(archive)
    names = {number: int(video_id[:8], 16) for number, video_id in archive.published().items()}
    return [(names[frame.video_number], frame.time_seconds) for frame in frames]


ALL = [(video, float(second)) for video in (1, 2, 3) for second in range(5)]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, ALL),
        ({"tags": {"camera": ("north",)}}, ALL[:5]),
        ({"tags": {"camera": ("north", "south")}}, ALL[:10]),
        ({"tags": {"camera": ("north",), "lens": ("narrow",)}}, []),
        ({"after": NOON + timedelta(seconds=2)}, [*ALL[2:5], *ALL[5:10]]),
        ({"after": NOON + timedelta(seconds=2.5)}, [*ALL[2:5], *ALL[5:10]]),  # the frame that is shown then
        ({"before": NOON + timedelta(seconds=62)}, ALL[:7]),
        ({"before": NOON}, []),
        ({"after": NOON + timedelta(minutes=1), "before": NOON + timedelta(minutes=2)}, ALL[5:10]),
        ({"after": NOON + timedelta(seconds=2), "start_seconds": 4.0}, [ALL[4], ALL[9]]),
        ({"before": NOON + timedelta(seconds=2), "end_seconds": 1.0}, [ALL[0]]),
        ({"where": "tags['camera'] = 'south'"}, ALL[5:10]),
        ({"where": "time_seconds >= 3"}, [*ALL[3:5], *ALL[8:10], *ALL[13:15]]),
        ({"where": "time_seconds >= 3 AND tags['lens'] = 'wide'"}, ALL[3:5]),
        ({"where": "duration_seconds > 5"}, ALL),  # the videos', 5.25; each frame's is 1
        ({"where": "frames.duration_seconds > 5"}, []),
        ({"where": "true -- a remark"}, ALL),
        ({"where": "captured_at IS NULL", "end_seconds": 2.0}, ALL[10:12]),
        ({"where": "false"}, []),
    ],
)
def test_a_filter_passes_the_frames_that_it_describes(archive, filters, wanted):
    assert frames_of(archive, **filters) == wanted
    assert Filter(**filters).is_everything == (filters == {})


def test_one_video_can_be_filtered_further(archive):
    row = next(row for row in archive.videos() if row.tags.get("camera") == "south")
    assert frames_of(archive, video=row, where="time_seconds = 3") == [(2, 3.0)]
    assert frames_of(archive, video=row, tags={"camera": ("north",)}) == []


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        ("no_such_column = 1", "no_such_column"),
        ("1 = ", "syntax"),
        ("true); DROP VIEW videos; SELECT (1", "one SQL statement at a time"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "nothing else"),
        ("duration_seconds > time_seconds", "mbiguous"),
    ],
)
def test_a_wrong_condition_is_refused_in_a_line(archive, condition, word):
    with pytest.raises(UsageError, match=word) as caught:
        frames_of(archive, where=condition)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("a red bus", Term("a red bus")),
        ("a red bus^2", Term("a red bus", 2.0)),
        ("rain ^0.5", Term("rain", 0.5)),
        ("x^y", Term("x^y")),
        ("^3", Term("^3")),
    ],
)
def test_a_text_may_end_in_its_weight(text, term):
    assert parse_term(text) == term


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(UsageError, match="--not"):
        parse_term("a bus^0")


@pytest.fixture(scope="module")
def clips(samples_archive):
    archive = open_archive(str(samples_archive[0]))
    frames = archive.frames()
    return archive, frames, read_keys(archive.frames_uri, frames).astype(np.float32)


def test_the_score_of_several_texts_is_their_weighted_mean(clips):
    archive, frames, keys = clips
    bundle = find_bundle("nano")
    encoder = TextEncoder(bundle)
    query = Query((Term("a snake", 3.0), Term("a strawberry")))
    scores = keys @ (0.75 * encoder.embed("a snake") + 0.25 * encoder.embed("a strawberry"))
    result = search(archive, bundle, query, Filter(), Wanted(3, -1.0))
    best = frames[int(np.argmax(scores))]
    assert result.moments[0].score == pytest.approx(scores.max(), abs=1e-3)
    assert (result.moments[0].video_id, result.moments[0].best_seconds) == (best.video_id, best.time_seconds)


def test_frames_that_show_what_is_not_wanted_are_no_hits(clips):
    archive, frames, keys = clips
    bundle = find_bundle("nano")
    query, floor = Query((Term("an apple"),), without=("a strawberry", "a snake")), 0.1
    wanted = embed(query, TextEncoder(bundle))
    shows, unwanted = keys @ wanted.wanted, keys @ wanted.unwanted.T
    hits = [
        (frame.video_id, frame.time_seconds)
        for frame, score, others in zip(frames, shows, unwanted, strict=True)
        if score >= floor and (others < bundle.search_floor).all()
    ]
    assert 0 < len(hits) < (shows >= floor).sum()
    result = search(archive, bundle, query, Filter(), Wanted(1000, floor))
    moments = result.moments
    assert result.frames_left_out == (shows >= floor).sum() - len(hits)
    found = [
        (frame.video_id, frame.time_seconds)
        for moment in moments
        for frame in frames
        if frame.video_id == moment.video_id and moment.start_seconds <= frame.time_seconds < moment.end_seconds
    ]
    assert sorted(found) == sorted(hits)


def test_what_is_not_wanted_goes_by_the_floor_of_the_model(clips):
    archive, frames, _ = clips
    query = Query((Term("an apple"),), without=("a strawberry",))
    low = search(archive, find_bundle("nano"), query, Filter(), Wanted(1000, -1.0))
    assert low.moments
    assert 0 < low.frames_left_out < len(frames)


def test_a_search_goes_on_until_it_has_the_moments_or_there_are_no_more(clips, monkeypatch):
    archive, _, _ = clips
    monkeypatch.setattr("pipeline.search.MOST_HITS", 1)
    monkeypatch.setattr("pipeline.search.HITS_PER_MOMENT", 1)
    found = search(archive, find_bundle("nano"), Query((Term("a bus"),)), Filter(), Wanted(7, -1.0, per_video=1))
    assert len({moment.video_id for moment in found.moments}) == 7


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Query(()),
        lambda: Term("x", 0),
        lambda: Term("x", float("inf")),
        lambda: Wanted(0, 0.1),
        lambda: Wanted(1, 0.1, per_video=0),
        lambda: Filter(after=datetime(2024, 5, 1)),
        lambda: Filter(start_seconds=2, end_seconds=1),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(UsageError):
        wrong()


def test_no_more_moments_of_a_video_than_asked_for(clips):
    archive, _, _ = clips
    query = Query((Term("a bus"),))
    many = search(archive, find_bundle("nano"), query, Filter(), Wanted(1000, -1.0)).moments
    some = search(archive, find_bundle("nano"), query, Filter(), Wanted(1000, -1.0, per_video=1)).moments
    first = {moment.video_id: moment for moment in reversed(many)}
    assert sorted(some, key=str) == sorted(first.values(), key=str)
    assert len(some) < len(many)


def test_filters_and_terms_from_the_command_line(vidx, samples_archive):
    command = ["search", "an apple^2", "a snake", "--archive", str(samples_archive[0]), "--min-score", "-1", "--json"]
    where = ["--where", "source LIKE '%nano_scenes_1%' AND time_seconds < 10", "--top", "2", "--per-video", "1"]
    found = vidx(*command, *where).json
    assert found["terms"] == [{"text": "an apple", "weight": 2.0}, {"text": "a snake", "weight": 1.0}]
    assert found["frames_searched"] == 10
    assert len(found["moments"]) == 1
    assert vidx(*command, "--tag", "camera=north").code == 4
    wrong = (
        ("--tag", "no pair", "KEY=VALUE"),
        ("--after", "someday", "ISO 8601"),
        ("--before", "", "ISO 8601"),
        ("--where", "no such thing", "SQL"),
        ("--not", "a cow^2", "no weight"),
    )
    for option, value, word in wrong:
        run = vidx(*command, option, value)
        assert (run.code, word in run.err) == (2, True), run.err


def test_a_range_of_times_that_ends_before_it_starts_is_refused(vidx, samples_archive):
    run = vidx("search", "x", "--archive", str(samples_archive[0]), "--after", "2024-05-02", "--before", "2024-05-01")
    assert run.code == 2
    assert "must end after it starts" in run.err
