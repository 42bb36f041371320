"""What a user names is what gets indexed: files, folders, globs, manifests."""

import json
import os
from datetime import UTC, datetime

import pytest

from pipeline.scan import scan
from storage.errors import UsageError
from storage.files import local_path, source_text


def names(found):
    return [os.path.basename(local_path(asset.uri)).decode("utf-8", "backslashreplace") for asset in found.assets]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.mp4", "a.MKV", "b/c.webm", "notes.txt", "b/d.srt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_is_searched_recursively_for_files_named_like_videos(folder):
    found = scan([str(folder)])
    assert names(found) == ["a.MKV", "z.mp4", "c.webm"]
    assert found.passed_over == 2


def test_a_file_named_by_itself_is_taken_whatever_its_suffix(folder):
    assert names(scan([str(folder / "notes.txt")])) == ["notes.txt"]


def test_a_file_named_twice_is_one_video(folder):
    assert names(scan([str(folder / "z.mp4"), str(folder), str(folder / "b" / ".." / "z.mp4")])) == [
        "z.mp4",
        "a.MKV",
        "c.webm",
    ]


def test_a_glob_names_files_and_folders(folder):
    assert names(scan([str(folder / "*.mp4")])) == ["z.mp4"]
    assert names(scan([str(folder / "**" / "*.webm")])) == ["c.webm"]
    assert names(scan([str(folder / "[bx]")])) == ["c.webm"]


def test_a_name_with_glob_characters_is_first_of_all_a_name(tmp_path):
    (tmp_path / "take[1].mp4").write_bytes(b"x")
    assert names(scan([str(tmp_path / "take[1].mp4")])) == ["take[1].mp4"]


@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"-a \"q\" 'n'\nl \xf0\x9f\x8e\xa5.mp4", b"100%25.mp4", b"a?b#c.mp4"])
def test_any_bytes_in_a_name_survive_in_the_uri(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb"):
        pass
    (asset,) = scan([str(tmp_path)]).assets
    assert local_path(asset.uri) == path
    assert source_text(asset.uri) == path.decode("utf-8", "backslashreplace")


def test_a_csv_manifest_gives_capture_times_and_tags(folder):
    (folder / "m.csv").write_text(
        "source,captured_at,camera,note\nz.mp4,2024-05-01T12:00:00+02:00,north,\nb/c.webm,,south,wet\n"
    )
    first, second = scan([str(folder / "m.csv")]).assets
    assert (first.captured_at, first.tags) == (datetime(2024, 5, 1, 10, tzinfo=UTC), {"camera": "north"})
    assert (second.captured_at, second.tags) == (None, {"camera": "south", "note": "wet"})
    assert local_path(second.uri) == os.fsencode(folder / "b" / "c.webm")


def test_a_jsonl_manifest_gives_the_same(folder):
    rows = [{"source": "z.mp4", "captured_at": "2024-05-01T10:00:00Z", "camera": "north", "lane": 2}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (asset,) = scan([str(folder / "m.jsonl")]).assets
    assert (asset.captured_at, asset.tags) == (datetime(2024, 5, 1, 10, tzinfo=UTC), {"camera": "north", "lane": "2"})


def test_tags_of_a_manifest_win_over_the_bare_path(folder):
    (folder / "m.csv").write_text("source,camera\nz.mp4,north\n")
    tags = {os.path.basename(local_path(a.uri)): a.tags for a in scan([str(folder), str(folder / "m.csv")]).assets}
    assert tags == {b"a.MKV": {}, b"z.mp4": {"camera": "north"}, b"c.webm": {}}


def test_a_file_missing_from_a_manifest_is_left_for_the_job_to_report(folder):
    (folder / "m.csv").write_text("source\ngone.mp4\n")
    assert names(scan([str(folder / "m.csv")])) == ["gone.mp4"]


@pytest.mark.parametrize(
    ("make", "source", "says"),
    [
        (None, "gone.mp4", "gone.mp4: no such file"),
        (None, "b/*.mp4", "matches no video"),
        (("empty/readme.md", "x"), "empty", "no video in this folder"),
        (("m.csv", "path\nz.mp4\n"), "m.csv", "no column `source`"),
        (("m.csv", "source\n"), "m.csv", "no rows"),
        (
            ("m.csv", "source,captured_at\nz.mp4,yesterday\n"),
            "m.csv",
            "line 2: captured_at 'yesterday' is not ISO 8601",
        ),
        (("m.csv", "source,a\nz.mp4,1,2\n"), "m.csv", "line 2: more cells than columns"),
        (("m.jsonl", '{"source": "z.mp4"}\n{"source"\n'), "m.jsonl", "line 2: no JSON"),
        (("m.jsonl", '{"source": "z.mp4", "tag": "\\ud83d"}\n'), "m.jsonl", "line 1: a tag is no valid text"),
        (("m.csv", "source,captured_at\nz.mp4,0001-01-01T00:00:00+02:00\n"), "m.csv", "line 2: captured_at"),
        (("m.jsonl", "[1]\n"), "m.jsonl", "line 1: a line must be a JSON object"),
        (("m.jsonl", '{"x": 1}\n'), "m.jsonl", "line 1: no `source`"),
    ],
)
def test_what_cannot_be_a_source_is_refused_in_one_line(folder, monkeypatch, make, source, says):
    monkeypatch.chdir(folder)
    if make:
        os.makedirs(os.path.dirname(make[0]) or ".", exist_ok=True)
        (folder / make[0]).write_text(make[1])
    with pytest.raises(UsageError) as error:
        scan([source])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_remote_source_is_refused_by_name():
    with pytest.raises(UsageError, match=r"s3://bucket/a\.mp4: only local files"):
        scan(["s3://bucket/a.mp4"])
