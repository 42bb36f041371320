"""Filters and combined queries, against the stored rows and keys themselves."""

import json
from datetime import UTC, datetime, timedelta

import av
import numpy as np
import pytest
from conftest import SAMPLES
from PIL import Image
from small_archive import MODEL_ID, add_video, failed_row, random_rows, receipt_for

from pipeline.ask.filter import Filter
from pipeline.ask.query import Kind, Query, Term, parse_term
from pipeline.ask.search import Searcher, SearchLimits, search
from pipeline.ask.thresholds import Threshold, Thresholds, picture_threshold, text_threshold
from storage.archive.archive import create_archive, open_archive
from storage.errors import UsageError
from storage.parts.read import read_keys
from storage.vectors.vector_index import index_faults, open_index
from workers.models.bundle import find_bundle
from workers.vision.clip_text import TextEncoder

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Videos of 5 s: 1 at noon, 2 a minute later, 3 of an unknown time; 4 is not published, 5 could not be read."""
    place = tmp_path_factory.mktemp("filter") / "archive"
    archive = create_archive(str(place), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, captured_at=NOON, tags={"camera": "north", "lens": "wide"})
    add_video(archive, 2, captured_at=NOON + timedelta(minutes=1), tags={"camera": "south"})
    add_video(archive, 3, captured_at=None, tags={})
    archive.parts.commit([receipt_for(archive, 4, random_rows(5))])
    archive.videos.publish([failed_row(archive, "file:///clips/secret.mp4")])
    return archive


def frames_of(archive, **filters):
    """(video, second) of every frame that passes."""
    frames = Filter(**filters).frames(archive)
    names = {number: int(video_id[:8], 16) for number, video_id in archive.videos.published().items()}
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
    row = next(row for row in archive.videos.all() if row.tags.get("camera") == "south")
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
        ("a car^2 ", Term("a car", 2.0)),
        ("a car^.5", Term("a car", 0.5)),
        ("the words up^down on a wall", Term("the words up^down on a wall")),
        ("up^down^1", Term("up^down", 1.0)),
    ],
)
def test_a_text_may_end_in_its_weight(text, term):
    assert parse_term(text) == term


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(UsageError, match="--not"):
        parse_term("a bus^0")


@pytest.mark.parametrize("weight", ["x", "", "-1", "2x", "1e3", "0,5", "inf", "nan", "\u0662"])
def test_what_is_no_weight_behind_a_text_is_refused_and_says_what_one_is(weight):
    for text, kind in (("a car", Kind.TEXT), ("car.jpg", Kind.IMAGE), ("cars.mp4@0:12", Kind.MOMENT)):
        with pytest.raises(UsageError, match="must be a number above 0") as caught:
            parse_term(f"{text}^{weight}", kind)
        assert f"{text}^{weight}" in str(caught.value)


def test_a_caret_in_a_file_name_is_no_weight():
    assert parse_term("a^b.jpg", Kind.IMAGE) == Term("a^b.jpg", kind=Kind.IMAGE)
    assert parse_term("a^b.mp4@5^2", Kind.MOMENT) == Term("a^b.mp4@5", 2.0, Kind.MOMENT)
    assert parse_term("a^b.mp4@5", Kind.MOMENT) == Term("a^b.mp4@5", kind=Kind.MOMENT)


@pytest.fixture(scope="module")
def clips(samples_archive):
    archive = open_archive(str(samples_archive[0]))
    frames = archive.frames.find()
    return archive, frames, read_keys(archive.frames_uri, frames).astype(np.float32)


def test_the_score_of_several_texts_is_their_weighted_mean(clips):
    archive, frames, keys = clips
    bundle = find_bundle("nano")
    encoder = TextEncoder(bundle)
    query = Query((Term("a snake", 3.0), Term("a strawberry")))
    scores = keys @ (0.75 * encoder.embed("a snake") + 0.25 * encoder.embed("a strawberry"))
    result = search(archive, bundle, query, Filter(), SearchLimits(3, -1.0))
    best = frames[int(np.argmax(scores))]
    assert result.moments[0].score == pytest.approx(scores.max(), abs=1e-3)
    assert (result.moments[0].video_id, result.moments[0].best_seconds) == (best.video_id, best.time_seconds)


def test_frames_that_show_what_is_not_wanted_are_no_hits(clips):
    archive, frames, keys = clips
    bundle = find_bundle("nano")
    query, threshold = Query((Term("an apple"),), without=("a strawberry", "a snake")), 0.1
    encoder = TextEncoder(bundle)
    shows, unwanted = (
        keys @ encoder.embed("an apple"),
        keys @ np.stack([encoder.embed(text) for text in query.without]).T,
    )
    hits = [
        (frame.video_id, frame.time_seconds)
        for frame, score, others in zip(frames, shows, unwanted, strict=True)
        if score >= threshold and (others < bundle.card.search_floor).all()
    ]
    assert 0 < len(hits) < (shows >= threshold).sum()
    result = search(archive, bundle, query, Filter(), SearchLimits(1000, threshold))
    moments = result.moments
    assert result.frames_left_out == (shows >= threshold).sum() - len(hits)
    found = [
        (frame.video_id, frame.time_seconds)
        for moment in moments
        for frame in frames
        if frame.video_id == moment.video_id and moment.start_seconds <= frame.time_seconds < moment.end_seconds
    ]
    assert sorted(found) == sorted(hits)


def test_what_is_not_wanted_goes_by_the_threshold_of_the_model(clips):
    archive, frames, _ = clips
    query = Query((Term("an apple"),), without=("a cow",))
    low = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1000, -1.0))
    assert low.moments
    assert 0 < low.frames_left_out < len(frames)


def test_a_search_goes_on_until_it_has_the_moments_or_there_are_no_more(clips, monkeypatch):
    archive, _, _ = clips
    monkeypatch.setattr("pipeline.ask.search.HITS_PER_MOMENT", 1)
    found = search(archive, find_bundle("nano"), Query((Term("a bus"),)), Filter(), SearchLimits(7, -1.0, per_video=1))
    assert len({moment.video_id for moment in found.moments}) == 7


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Query(()),
        lambda: Term("x", 0),
        lambda: Term("x", float("inf")),
        lambda: SearchLimits(0, 0.1),
        lambda: SearchLimits(1, 0.1, per_video=0),
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
    many = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1000, -1.0)).moments
    some = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1000, -1.0, per_video=1)).moments
    first = {moment.video_id: moment for moment in reversed(many)}
    assert sorted(some, key=str) == sorted(first.values(), key=str)
    assert len(some) < len(many)


def test_filters_and_terms_from_the_command_line(vidx, samples_archive):
    command = ["search", "an apple^2", "a snake", "--archive", str(samples_archive[0]), "--min-score", "-1", "--json"]
    where = ["--where", "source LIKE '%nano_scenes_1%' AND time_seconds < 10", "--top", "2", "--per-video", "1"]
    found = vidx(*command, *where).json
    assert found["terms"] == [
        {"text": "an apple", "weight": 2.0, "kind": "text"},
        {"text": "a snake", "weight": 1.0, "kind": "text"},
    ]
    assert found["frames_searched"] == 10
    assert len(found["moments"]) == 1
    assert vidx(*command, "--tag", "camera=north").code == 4
    wrong = (
        ("--tag", "no pair", "KEY=VALUE"),
        ("--after", "someday", "ISO 8601"),
        ("--before", "", "ISO 8601"),
        ("--where", "no such thing", "SQL"),
        ("--not", "a cow^2", "cannot have a weight"),
    )
    for option, value, word in wrong:
        run = vidx(*command, option, value)
        assert (run.code, word in run.err) == (2, True), run.err


def test_a_range_of_times_that_ends_before_it_starts_is_refused(vidx, samples_archive):
    run = vidx("search", "x", "--archive", str(samples_archive[0]), "--after", "2024-05-02", "--before", "2024-05-01")
    assert run.code == 2
    assert "must end after it starts" in run.err


def key_at(archive, name, seconds):
    """The frame of a video that is shown then, and its key."""
    number = archive.videos.find(name).video_number
    frame = archive.frames.find(number, seconds, seconds + 1e-6)[-1]
    return frame, read_keys(archive.frames_uri, [frame])[0].astype(np.float32)


def test_moments_like_one_of_the_archive_are_found_elsewhere(clips):
    archive, frames, keys = clips
    own, example = key_at(archive, "nano_scenes_1.mp4", 9.0)
    query = Query((Term("nano_scenes_1.mp4@9", kind=Kind.MOMENT),))
    result = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1000, 0.2))
    assert result.moments
    cosines = {(frame.video_id, frame.time_seconds): key @ example for frame, key in zip(frames, keys, strict=True)}
    for moment in result.moments:
        is_own = moment.video_id == own.video_id
        assert not (is_own and moment.start_seconds <= own.time_seconds < moment.end_seconds)
        inside = [
            float(cosine)
            for (video_id, seconds), cosine in cosines.items()
            if video_id == moment.video_id and moment.start_seconds <= seconds < moment.end_seconds - 1e-6
        ]
        assert moment.score == pytest.approx(np.mean(inside), abs=1e-3)
        assert max(inside) == pytest.approx(float(cosines[moment.video_id, moment.best_seconds]), abs=1e-6)
    assert result.threshold.source == "as asked for"


def test_a_picture_is_found_where_it_was_taken_from(clips, tmp_path):
    archive, _, _ = clips
    pixels = decoded(SAMPLES / "nano_scenes_1.mp4", 9.0)
    Image.fromarray(pixels).save(tmp_path / "scene^1.png")
    query = Query((Term(str(tmp_path / "scene^1.png"), kind=Kind.IMAGE),))
    (moment,) = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1, -1.0)).moments
    assert moment.start_seconds <= 9.0 < moment.end_seconds
    assert "nano_scenes_1" in moment.uri
    assert moment.score > 0.999
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    query = Query((Term(str(tmp_path / "turned.jpg"), kind=Kind.IMAGE),))
    (again,) = search(archive, find_bundle("nano"), query, Filter(), SearchLimits(1, -1.0)).moments
    assert again.best_seconds == moment.best_seconds
    assert again.score > 0.99


def decoded(path, seconds):
    """(height, width, 3) uint8 of the frame that is shown then."""
    with av.open(str(path)) as file:
        frames = [frame for frame in file.decode(video=0) if frame.time <= seconds + 1e-6]
    return frames[-1].to_ndarray(format="rgb24")


def test_texts_and_pictures_count_by_their_thresholds(clips):
    archive, _, keys = clips
    bundle = find_bundle("nano")
    terms = (Term("two apples", 3.0), Term("nano_scenes_1.mp4@1", kind=Kind.MOMENT))
    result = search(archive, bundle, Query(terms), Filter(), SearchLimits(1, -1.0))
    searcher = Searcher(archive, bundle)
    alone = [searcher.search(Query((term,)), Filter(), SearchLimits(1)).threshold.score for term in terms]
    both = searcher.search(Query(terms), Filter(), SearchLimits(1)).threshold
    assert both.score == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])
    _, example = key_at(archive, "nano_scenes_1.mp4", 1.0)
    text = TextEncoder(bundle).embed("two apples")
    scores = both.score * (0.75 * (keys @ text) / alone[0] + 0.25 * (keys @ example) / alone[1])
    assert max(scores) >= result.moments[0].score - 1e-3
    assert min(abs(scores - result.moments[0].score)) < 1e-3


def test_the_threshold_of_an_archive_lets_few_unrelated_texts_through(clips):
    archive, _, _ = clips
    bundle = find_bundle("nano")
    index = open_index(archive)
    threshold = text_threshold(bundle, index)
    encoder = TextEncoder(bundle)
    unrelated = ("a lobster", "two cellists", "rain")
    assert sum(index.search(encoder.embed(text), 1)[0].score >= threshold.score for text in unrelated) <= 1
    assert index.search(encoder.embed("two apples"), 1)[0].score > threshold.score
    assert picture_threshold(archive).score < 1.0


def test_thresholds_are_kept_with_the_archive_and_made_anew_when_damaged(archive_copy):
    archive, bundle = open_archive(str(archive_copy)), find_bundle("nano")
    path = archive_copy / "index" / "floors.json"
    text = path.read_text()
    kept = json.loads(text.split("\n", 1)[1])
    assert kept["model_id"] == archive.model_id
    thresholds = Thresholds(archive, bundle, open_index(archive))
    assert (thresholds.text.score, thresholds.text.source) == (bundle.card.search_floor, "stated by the model")
    assert thresholds.picture == Threshold(**kept["picture"])
    assert not [*index_faults(archive)]
    for other in ("", text[:-9], text.replace("0.", "1."), "[]"):
        path.write_text(other)
        assert [fault.endswith("floors.json") for fault, _ in index_faults(archive)] == [True]
        assert Thresholds(archive, bundle, open_index(archive)).picture == thresholds.picture


def test_explain_says_where_the_threshold_comes_from_and_what_is_near(vidx, samples_archive):
    command = ["search", "two apples", "--archive", str(samples_archive[0]), "--min-score", "0.99", "--explain"]
    run = vidx(*command)
    assert run.code == 4
    assert "as asked for" in run.err
    assert "nano_scenes_1.mp4" in run.err
    assert run.out == ""
    found = vidx(*command, "--json").json
    assert (found["moments"], found["floor"], found["floor_source"]) == ([], 0.99, "as asked for")
    assert len(found["near_misses"]) == 3
    assert found["near_misses"][0]["source"].endswith("nano_scenes_1.mp4")
    assert found["method"] == "each frame was compared"


def test_pictures_and_moments_that_cannot_be_searched_are_refused_in_a_line(vidx, samples_archive, tmp_path):
    (tmp_path / "not.jpg").write_text("no picture")
    wrong = (
        ((), "--image or --like"),
        (("--image", str(tmp_path / "not.jpg")), "no picture that Pillow can read"),
        (("--image", str(tmp_path / "missing.jpg")), "No such file"),
        (("--image", str(tmp_path)), "directory"),
        (("--like", "nano_scenes_1.mp4"), "one position"),
        (("--like", "nano_scenes_1.mp4@1-2"), "one position"),
        (("--like", "nano_scenes_1.mp4@1:00:00"), "no frame at this time"),
        (("--like", "unknown.mp4@1"), "no such video"),
    )
    for options, words in wrong:
        run = vidx("search", *options, "--archive", str(samples_archive[0]))
        assert (run.code, words in run.err, run.err.count("\n")) == (2, True, 1), run.err
