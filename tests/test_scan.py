"""What a user names is what gets indexed: files, folders, links, globs, manifests."""

import json
import os
import re
import subprocess
import unicodedata
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from pipeline.index.scan import Scan
from storage.errors import UsageError
from storage.files import local_path, source_text


def scan(sources):
    """All that is found."""
    found = Scan(sources)
    whole = {"assets": tuple(found.videos()), "left_out": found.left_out, "unscanned": found.unscanned}
    return SimpleNamespace(**whole, without_video=found.without_video)


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
    assert found.left_out == {".txt": 1, ".srt": 1}


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


# Folders


def test_folders_are_walked_through_while_their_videos_are_taken(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.mp4").touch()
    videos = Scan([str(tmp_path)]).videos()
    next(videos)
    (tmp_path / "b" / "2.mp4").touch()
    assert [source_text(asset.uri) for asset in videos] == [str(tmp_path / "b" / name) for name in ("1.mp4", "2.mp4")]


def test_a_folder_without_videos_is_nothing_to_do(folder):
    (folder / "empty").mkdir()
    found = scan([str(folder / "empty"), str(folder)])
    assert found.without_video == (str(folder / "empty"),)
    assert len(found.assets) == 3
    assert scan([str(folder / "empt[y]")]).assets == ()


def test_what_is_no_video_is_counted_by_suffix(tmp_path):
    for name in ("a.jpg", "b.JPG", "c.txt", "README", ".DS_Store", "._clip.mp4", "d.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    found = scan([str(tmp_path)])
    assert found.assets == ()
    assert found.left_out == {".jpg": 2, "": 2, ".txt": 1, "._*": 1, ".gz": 1}


def test_a_folder_is_searched_for_every_suffix_that_ffmpeg_gives_its_video_formats(tmp_path):
    formats = [
        "mov",
        "matroska",
        "avi",
        "ogg",
        "flv",
        "nut",
        "dv",
        "yuv4mpegpipe",
        "h261",
        "h264",
        "hevc",
        "m4v",
        "mjpeg",
        "vc1",
        "obu",
        "av1",
        "cavsvideo",
    ]
    others = {"m4a", "m4b", "isma", "mka", "mks", "avif", "heic", "heif", "mpo", "ism"}  # sound, text, pictures, XML
    suffixes = set()
    for name in formats:
        told = subprocess.run(["ffmpeg", "-h", f"demuxer={name}"], capture_output=True, text=True, check=True).stdout
        suffixes |= set(re.search(r"Common extensions: ([\w,]+)", told)[1].split(","))
    assert len(suffixes) > 25
    for suffix in suffixes:
        (tmp_path / f"clip.{suffix}").write_bytes(b"\0\0\1\x67\x42 as video begins, with bytes that no text has")
    assert {name.split(".")[1] for name in names(scan([str(tmp_path)]))} == suffixes - others


def test_a_suffix_that_other_programs_share_is_taken_by_its_content(tmp_path):
    no_videos = {
        "code.ts": b"export const name = 'x';\n",
        "latin.MTS": "// caf\xe9\n".encode("latin-1"),
        "translation.tS": "<?xml version='1.0'?><TS>...".encode("utf-16"),
        "go.mod": b"module example.com/x\n",
        "fortran.mod": b"\x1f\x8b\x08\0\0\0\0\0\0\3",
        "song.mod": b" A song".ljust(1080, b"\0") + b"M.K.",
        "figure.mp": b"beginfig(1); draw (0,0)--(1,1); endfig;",
        "script.avs": b'AviSource("a.avi")',
    }
    for name, content in no_videos.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "stream.ts").write_bytes((b"\x47\x1f\xff\x10" + b"\xff" * 184) * 8)
    (tmp_path / "cut.ts").write_bytes(b"")  # a recording that failed, which the job tells
    os.mkfifo(tmp_path / "pipe.ts")
    found = scan([str(tmp_path)])
    assert names(found) == ["cut.ts", "pipe.ts", "stream.ts"]
    assert found.left_out == {".mod": 3, ".ts": 2, ".mts": 1, ".mp": 1, ".avs": 1}


def test_a_video_suffix_is_taken_whatever_its_content(tmp_path):
    (tmp_path / "page.mp4").write_bytes(b"<html>the server is busy</html>")
    assert names(scan([str(tmp_path)])) == ["page.mp4"]


# Links


@pytest.fixture
def linked(tmp_path):
    """A library with a link to a folder beside it."""
    for name in ("lib/a.mp4", "other/b.mp4", "other/deep/c.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "lib" / "linked").symlink_to("../other")
    return tmp_path


def places(found, folder):
    return [os.path.relpath(os.fsdecode(local_path(asset.uri)), folder) for asset in found.assets]


def test_a_linked_folder_is_searched_and_named_by_the_link(linked):
    found = scan([str(linked / "lib")])
    assert places(found, linked) == ["lib/a.mp4", "lib/linked/b.mp4", "lib/linked/deep/c.mkv"]
    assert found.unscanned == ()


def test_what_several_ways_lead_to_is_one_video_named_by_the_way_without_links(linked):
    (linked / "lib" / "again").symlink_to(linked / "other" / "deep")
    (linked / "lib" / "again.mp4").symlink_to("a.mp4")
    (linked / "lib" / "elsewhere.mp4").symlink_to(linked / "other" / "b.mp4")
    whole = ["lib/a.mp4", "other/b.mp4", "other/deep/c.mkv"]
    assert places(scan([str(linked / "lib"), str(linked / "other")]), linked) == whole
    assert places(scan([str(linked)]), linked) == whole
    assert len(scan([str(linked / "lib")]).assets) == 3
    assert len(scan([str(linked / "lib" / "a.mp4"), str(linked / "lib" / "again.mp4")]).assets) == 1


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_to_a_folder_around_it_ends(linked, target):
    for name in ("one", "two"):
        (linked / "lib" / name).symlink_to(target)
    (linked / "other" / "back").symlink_to("../lib")
    found = scan([str(linked / "lib")])
    assert places(found, linked) == ["lib/a.mp4", "lib/linked/b.mp4", "lib/linked/deep/c.mkv"]
    told = [] if target == "." else [str(linked / "lib" / name) for name in ("one", "two")]
    assert [place for place, why in found.unscanned if "a folder that contains it" in why] == told
    by_glob = scan([str(linked / "lib" / "**" / "*.m*")])
    assert sorted(places(by_glob, linked)) == ["lib/a.mp4", "lib/linked/b.mp4", "lib/linked/deep/c.mkv"]


def test_a_link_that_leads_nowhere_is_named(linked):
    (linked / "lib" / "gone").symlink_to("../nothing")
    (linked / "lib" / "itself").symlink_to("itself")
    (linked / "lib" / "gone.mp4").symlink_to("../nothing.mp4")  # a video that the job reports as vanished
    found = scan([str(linked / "lib")])
    assert [place for place, _ in found.unscanned] == [str(linked / "lib" / "gone"), str(linked / "lib" / "itself")]
    assert "lib/gone.mp4" in places(found, linked)


def test_a_row_of_a_manifest_says_more_than_any_other_way_to_the_file(linked):
    (linked / "m.csv").write_text("source,camera\nlib/linked/b.mp4,north\n")
    found = scan([str(linked / "other"), str(linked / "m.csv"), str(linked / "lib")])
    assert [asset.tags for asset in found.assets] == [{"camera": "north"}, None, None]


# Globs and names


def test_two_stars_stand_for_folders_at_any_depth(tmp_path):
    for name in ("x/a.mp4", "x/y/b.mp4", "x/y/z/c.mp4", "x/.hidden/d.mp4", "x/y/z/[1]/e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for pattern, found in (
        ("x/**/*.mp4", {"a.mp4", "b.mp4", "c.mp4", "e.mp4"}),
        ("x/**", {"a.mp4", "b.mp4", "c.mp4", "e.mp4"}),
        ("**/z/*.mp4", {"c.mp4"}),
        ("**/y/**/*.mp4", {"b.mp4", "c.mp4", "e.mp4"}),
        ("x/*/**/c.mp4", {"c.mp4"}),
    ):
        assert set(names(scan([str(tmp_path / pattern)]))) == found, pattern


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


@pytest.mark.parametrize(
    ("text", "hour"),
    [
        ("2024-05-01T12:00:00+02:00", 10),
        ("2024-05-01T12:00", 12),
        ("2024-05-01 12:00:00.25Z", 12),
        ("20240501T120000Z", 12),
        ("2024-W18-3T12", 12),
        ("2024-05-01", 0),
    ],
)
def test_times_of_a_manifest_are_of_iso_8601(folder, text, hour):
    (folder / "m.jsonl").write_text(json.dumps({"source": "z.mp4", "captured_at": text}))
    (asset,) = scan([str(folder / "m.jsonl")]).assets
    assert asset.captured_at.replace(microsecond=0) == datetime(2024, 5, 1, hour, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (1712010112, "seconds since 1970 would be 2024-04-01T22:21:52Z"),
        (1712010112000, "milliseconds since 1970 would be 2024-04-01T22:21:52Z"),
        (1712010112000000, "microseconds since 1970 would be 2024-04-01T22:21:52Z"),
        (171201011200000, ""),
        (1712010112.5, "2024-04-01T22:21:52Z"),
        (20240501, ""),
        (True, ""),
        ([2024, 5, 1], ""),
        ("2024/05/01", ""),
        ("01.05.2024 12:00", ""),
        ("May 1, 2024", ""),
        ("2024-05-01x12:00", ""),
        ("2024-05-01T1200", ""),
        ("2024-05-01T12:00 CEST", ""),
        ("2024-05-32", ""),
        ("\u0662\u0660\u0662\u0664-05-01", ""),
        ("9999-12-31T23:59-10:00", ""),
    ],
)
def test_every_other_form_of_a_time_is_refused(folder, value, meant):
    (folder / "m.jsonl").write_text(json.dumps({"source": "z.mp4", "captured_at": value}))
    with pytest.raises(UsageError, match="not a time; give ISO 8601") as caught:
        scan([str(folder / "m.jsonl")])
    assert meant in str(caught.value)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == 20240501:
        return
    (folder / "m.csv").write_text(f'source,captured_at\nz.mp4,"{value}"\n')
    with pytest.raises(UsageError, match=r"line 2: captured_at .*: not a time; give ISO 8601"):
        scan([str(folder / "m.csv")])


@pytest.mark.parametrize(("typed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_finds_the_file_that_looks_the_same(tmp_path, typed, stored):
    typed, stored = (unicodedata.normalize(form, "caf\u00e9") for form in (typed, stored))
    (tmp_path / stored).mkdir()
    (tmp_path / stored / f"{stored}.mp4").write_bytes(b"x")
    (tmp_path / "m.csv").write_text(f"source\n{typed}/{typed}.mp4\n")
    sources = (f"{typed}/{typed}.mp4", typed, f"{typed}/*.mp4", f"**/{typed}.mp4", "m.csv")
    for source in sources:
        (asset,) = scan([str(tmp_path / source)]).assets
        assert os.path.exists(local_path(asset.uri)), source
    (tmp_path / typed).mkdir()  # now the name is another folder's own
    assert scan([str(tmp_path / typed)]).assets == ()


def test_a_jsonl_manifest_gives_the_same(folder):
    rows = [{"source": "z.mp4", "captured_at": "2024-05-01T10:00:00Z", "camera": "north", "lane": 2}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (asset,) = scan([str(folder / "m.jsonl")]).assets
    assert (asset.captured_at, asset.tags) == (datetime(2024, 5, 1, 10, tzinfo=UTC), {"camera": "north", "lane": "2"})


def test_tags_of_a_manifest_win_over_the_bare_path(folder):
    (folder / "m.csv").write_text("source,camera\nz.mp4,north\n")
    tags = {os.path.basename(local_path(a.uri)): a.tags for a in scan([str(folder), str(folder / "m.csv")]).assets}
    assert tags == {b"a.MKV": None, b"z.mp4": {"camera": "north"}, b"c.webm": None}


def test_a_file_missing_from_a_manifest_is_left_for_the_job_to_report(folder):
    (folder / "m.csv").write_text("source\ngone.mp4\n")
    assert names(scan([str(folder / "m.csv")])) == ["gone.mp4"]


@pytest.mark.parametrize(
    ("make", "source", "says"),
    [
        (None, "gone.mp4", "gone.mp4: no such file"),
        (None, "b/*.mp4", "no video matches"),
        (("m.csv", "path\nz.mp4\n"), "m.csv", "no column `source`"),
        (("m.csv", "source\n"), "m.csv", "no rows"),
        (
            ("m.csv", "source,captured_at\nz.mp4,yesterday\n"),
            "m.csv",
            "line 2: captured_at yesterday: not a time; give ISO 8601",
        ),
        (("m.csv", "source,a\nz.mp4,1,2\n"), "m.csv", "line 2: more cells than columns"),
        (("m.jsonl", '{"source": "z.mp4"}\n{"source"\n'), "m.jsonl", "line 2: not JSON"),
        (("m.jsonl", '{"source": "z.mp4", "tag": "\\ud83d"}\n'), "m.jsonl", "line 1: a tag is not valid text"),
        (("m.csv", "source,captured_at\nz.mp4,0001-01-01T00:00:00+02:00\n"), "m.csv", "line 2: captured_at"),
        (("m.jsonl", "[1]\n"), "m.jsonl", "line 1: a line must be a JSON object"),
        (("m.jsonl", '{"x": 1}\n'), "m.jsonl", "line 1: `source` is missing"),
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


# The command


@pytest.mark.parametrize("option", [(), ("--json",), ("--dry-run",), ("--dry-run", "--json")])
def test_an_empty_inbox_is_nothing_to_do(vidx, tmp_path, option):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "list.txt").write_text("x")
    run = vidx("index", str(inbox), "--archive", str(tmp_path / "archive"), *option)
    assert run.code == 0, run.err
    assert "left out: 1 .txt" in run.err
    if "--json" in option:
        assert run.json["left_out"] == {".txt": 1}
        assert run.json["sources"] == [] if "--dry-run" in option else run.json["videos_indexed"] == 0
    else:
        assert f"there is no video in {inbox}" in run.out
    assert not (tmp_path / "archive").exists()


def test_a_glob_that_matches_nothing_and_a_file_that_is_not_there_are_wrong_usage(vidx, tmp_path):
    for source in ("nothing*.mp4", "nothing.mp4"):
        run = vidx("index", str(tmp_path / source), "--archive", str(tmp_path / "archive"))
        assert (run.code, run.out) == (2, "")
        assert source in run.err
    assert not (tmp_path / "archive").exists()


def test_videos_of_cameras_are_found_by_their_suffixes_and_other_files_beside_them_fail_nothing(vidx, tmp_path):
    folder = tmp_path / "card"
    folder.mkdir()
    kinds = {"a.m2t": "mpegts", "b.MOD": "vob", "c.MP": "mp4", "d.ts": "mpegts", "e.dav": "mpegts"}
    for color, (name, container) in zip(("red", "green", "blue", "white", "gray"), kinds.items(), strict=True):
        source = f"color={color}:s=64x48:r=5:d=1"
        command = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, "-c:v", "mpeg2video"]
        command[-1] = "mpeg4" if container == "mp4" else command[-1]
        subprocess.run([*command, "-f", container, folder / name], check=True)
    (folder / "._a.m2t").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    (folder / "code.ts").write_text("export const x = 1;\n")
    (folder / "x.jpg").write_bytes(b"\xff\xd8\xff")
    run = vidx("index", str(folder), "--archive", str(tmp_path / "archive"), "--json")
    assert (run.code, run.json["videos_indexed"], run.json["videos_failed"]) == (0, 5, 0), run.err
    assert run.json["left_out"] == {"._*": 1, ".ts": 1, ".jpg": 1}
    assert "left out: " in run.err
