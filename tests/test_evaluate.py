"""Scores of moment retrieval, on cases that can be worked out by hand."""

import json

import pytest
from small_archive import MODEL_ID, add_video, failed_row, video_id_of

from pipeline.evaluate.retrieval import Annotated, Truth, judge, overlap, read_annotations, score
from storage.archive.archive import create_archive
from storage.errors import UsageError
from storage.records import Moment


def moment(video, start, end, value=0.5):
    return Moment(video, 1, f"file:///{video}", start, end, start, value)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (("a", 0.0, 10.0), 1.0),
        (("a", 5.0, 15.0), 5 / 15),
        (("a", 2.0, 4.0), 0.2),
        (("a", -10.0, 30.0), 0.25),
        (("a", 10.0, 12.0), 0.0),  # half-open: they touch
        (("a", 20.0, 30.0), 0.0),
        (("b", 0.0, 10.0), 0.0),
    ],
)
def test_overlap_is_intersection_over_union(found, wanted):
    assert overlap(moment(*found), Truth("a", 0.0, 10.0)) == pytest.approx(wanted)


def test_scores_worked_out_by_hand():
    truth = (Truth("a", 0.0, 10.0), Truth("b", 100.0, 110.0))
    judged = [
        # second: 4 of 10 s; third: all of the other truth
        judge(Annotated("one", truth, None), [moment("a", 20, 30), moment("a", 6, 10), moment("b", 100, 110)]),
        # first: 6 of 10 s
        judge(Annotated("two", truth[:1], None), [moment("a", 4, 10)]),
        # never
        judge(Annotated("three", truth[:1], None), [moment("b", 0, 10)] * 12),
        # nothing found, though it is there
        judge(Annotated("four", truth[1:], None), []),
        # not there, and found all the same
        judge(Annotated("five", (), None), [moment("a", 0, 10)]),
        # not there, and not found
        judge(Annotated("six", (), None), []),
    ]
    assert judged[0].ranks == {0.3: 2, 0.5: 3, 0.7: 3}
    assert judged[1].ranks == {0.3: 1, 0.5: 1, 0.7: None}
    assert judged[2].ranks == judged[3].ranks == {0.3: None, 0.5: None, 0.7: None}
    found = score(judged)
    assert found.recall == {
        (1, 0.3): 0.25,
        (1, 0.5): 0.25,
        (1, 0.7): 0.0,
        (5, 0.3): 0.5,
        (5, 0.5): 0.5,
        (5, 0.7): 0.25,
        (10, 0.3): 0.5,
        (10, 0.5): 0.5,
        (10, 0.7): 0.25,
    }
    assert found.reciprocal_rank == pytest.approx((1 / 3 + 1) / 4)
    assert (found.there, found.absent, found.found, found.found_wrongly) == (4, 2, 3, 1)
    assert found.found_f1 == pytest.approx(2 * 0.75 * 0.75 / 1.5)  # 3 of 4 that are there, 3 of 4 that were found


def test_a_truth_after_the_tenth_moment_is_not_met():
    late = [moment("b", 0, 1)] * 10 + [moment("a", 0, 10)]
    assert judge(Annotated("x", (Truth("a", 0.0, 10.0),), None), late).ranks[0.3] is None


@pytest.fixture
def archive(tmp_path):
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, uri="file:///clips/AO8RW.mp4")
    add_video(archive, 2, uri="file:///clips/abc_60.0_210.0.mp4")
    archive.videos.publish([failed_row(archive, "file:///clips/secret.mp4")])
    return archive


HEADER = "file,start_seconds,end_seconds,text\n"
CSV = HEADER + "AO8RW.mp4,1,2.5,a dog\nAO8RW,3,4,a dog\n/clips/abc_60.0_210.0.mp4,0,1,a dog\n"
ONE, TWO = video_id_of(1), video_id_of(2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            CSV + "AO8RW,0,1,a bus\n,,,a whale\n",
            {
                "a dog": ([(ONE, 1.0, 2.5), (ONE, 3.0, 4.0), (TWO, 0.0, 1.0)], None),
                "a bus": ([(ONE, 0.0, 1.0)], None),
                "a whale": ([], None),
            },
        ),
        (
            json.dumps({"qid": 1, "query": "a dog", "vid": "abc_60.0_210.0", "relevant_windows": [[0, 2], [4, 6]]}),
            {"a dog": ([(TWO, 0.0, 2.0), (TWO, 4.0, 6.0)], None)},
        ),
        ("AO8RW 0.0 6.9##a person sits down.\n", {"a person sits down.": ([(ONE, 0.0, 6.9)], None)}),
        (HEADER + '"AO8RW",0,1,"two\nlines\u2028here"\n', {"two\nlines\u2028here": ([(ONE, 0.0, 1.0)], None)}),
    ],
)
def test_annotations_are_read_in_the_forms_that_are_in_use(archive, tmp_path, text, wanted):
    path = tmp_path / "queries"
    path.write_text(text)
    found = read_annotations(str(path), archive)
    assert {
        one.text: (
            [(truth.video_id, truth.start_seconds, truth.end_seconds) for truth in one.truths],
            one.video and one.video.video_id,
        )
        for one in found
    } == wanted


def test_a_text_may_be_a_query_for_each_video_that_it_is_said_of(archive, tmp_path):
    path = tmp_path / "queries"
    nothing = json.dumps({"query": "a bus", "vid": "abc_60.0_210.0", "relevant_windows": []})
    for text, wanted in ((CSV, {("a dog", ONE): 2, ("a dog", TWO): 1}), (nothing, {("a bus", TWO): 0})):
        path.write_text(text)
        found = read_annotations(str(path), archive, by_video=True)
        assert {(one.text, one.video.video_id): len(one.truths) for one in found} == wanted
    path.write_text(CSV + ",,,a whale\n")
    with pytest.raises(UsageError, match="names no video"):
        read_annotations(str(path), archive, by_video=True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "has no queries"),
        ("file,text\nAO8RW,a dog\n", "start_seconds"),
        (HEADER + "AO8RW,0,1\n", "query 1 has no text"),
        (CSV.replace("2.5", "soon"), "soon"),
        (CSV.replace("2.5", "0.5"), "ends before it starts"),
        (CSV.replace("AO8RW.mp4", "other.mp4"), "query 1: other.mp4: no such video"),
        (CSV.replace("AO8RW.mp4", "secret.mp4"), "no frames"),
        ('{"query": "a dog"}', "relevant_windows"),
        ("AO8RW 0.0##a dog", "ID START END"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(archive, tmp_path, text, word):
    path = tmp_path / "queries"
    path.write_text(text)
    with pytest.raises(UsageError, match=word) as caught:
        read_annotations(str(path), archive)
    assert str(path) in str(caught.value)


def test_the_built_in_world_is_scored_from_the_command_line(vidx, samples_archive, tmp_path):
    """Two apples are in nano_scenes_1 from 7 to 16 seconds, and never in nano_scenes_2."""
    queries = tmp_path / "queries.csv"
    queries.write_text(HEADER + "nano_scenes_1,7,16,two apples\nnano_scenes_2,0,1,two apples\n")
    command = ["evaluate", "retrieval", str(queries), "--archive", str(samples_archive[0]), "--json"]
    whole = vidx(*command)
    assert whole.code == 0, whole.err
    assert whole.json["counts"] == {"there": 1, "absent": 0, "found": 1, "found_wrongly": 0}
    assert whole.json["recall"]["R@1 IoU=0.5"] == 1.0
    (query,) = whole.json["queries"]
    assert (query["text"], query["rank"]["IoU=0.5"]) == ("two apples", 1)
    within = vidx(*command, "--within-video")
    assert [one["rank"]["IoU=0.5"] for one in within.json["queries"]] == [1, None]
