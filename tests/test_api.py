"""The library gives what the commands give."""

import ast
import inspect
import re
import subprocess
import sys
import tracemalloc
from datetime import datetime

import numpy as np
import pytest
from conftest import ROOT, SAMPLES, run_vidx
from PIL import Image
from small_archive import MODEL_ID, add_video, random_rows, receipt_for, row_for

from pipeline import vidx as package
from pipeline.api.open_archive import OpenArchive
from pipeline.api.parameters import in_parameters
from pipeline.ask.query import Term
from pipeline.cli.index import index as index_command
from storage.archive.archive import create_archive
from storage.errors import UsageError


@pytest.fixture(scope="module")
def archive(samples_archive):
    return OpenArchive.open(samples_archive[0])


def test_a_search_gives_the_moments_of_the_command(vidx, archive, samples_archive):
    command = ["search", "an apple^2", "a snake", "--not", "a cow", "--archive", str(samples_archive[0])]
    wanted = vidx(*command, "--where", "width > 100", "--min-score", "0.1", "--json").json["moments"]
    found = archive.search(Term("an apple", 2.0), "a snake", without=["a cow"], where="width > 100", min_score=0.1)
    assert len(found) == len(wanted) > 0
    assert [(moment.video_id, round(moment.start_seconds, 6)) for moment in found] == [
        (moment["video_id"], moment["start_seconds"]) for moment in wanted
    ]
    assert found[0] is next(iter(found))
    assert found[:1] == (found[0],)


def test_moments_are_tables_too(archive, tmp_path):
    found = archive.search("an apple", top=3, min_score=-1)
    table = found.to_arrow()
    assert table.column("score").to_pylist() == [moment.score for moment in found]
    assert table.column("source").to_pylist()[0].startswith(str(SAMPLES))
    assert archive.search("an apple", min_score=1).to_arrow().num_rows == 0
    found.contact_sheet(tmp_path / "found.html")
    assert (tmp_path / "found.html").read_text(encoding="utf-8").count("<img") == 3
    with pytest.raises(UsageError, match="html"):
        found.contact_sheet(tmp_path / "found.txt")


def test_an_answer_is_the_answer_of_the_command(vidx, archive, samples_archive):
    video = str(SAMPLES / "nano_scenes_1.mp4")
    place = ["--archive", str(samples_archive[0]), "--video", video, "--from", "8", "--to", "9", "--json"]
    wanted = vidx("ask", "How many apples are there?", *place).json
    found = archive.ask("How many apples are there?", video=video, start_seconds=8, end_seconds=9)
    assert (found.text, found.frame_count, found.fuse) == (wanted["answer"], wanted["frames_used"], wanted["fuse"])
    assert archive.ask("What?", where="false") is None


def test_pictures_and_moments_are_searched_as_by_the_command(vidx, archive, samples_archive, tmp_path):
    picture = tmp_path / "scene.jpg"
    Image.new("RGB", (64, 48), "purple").save(picture)
    command = ["search", "a cow", "--image", str(picture), "--like", "nano_scenes_1.mp4@2"]
    wanted = vidx(*command, "--archive", str(samples_archive[0]), "--min-score", "0.1", "--json").json
    found = archive.search("a cow", images=[picture], like=["nano_scenes_1.mp4@2"], min_score=0.1)
    assert [round(moment.score, 4) for moment in found] == [round(one["score"], 4) for one in wanted["moments"]]
    assert found
    assert found.threshold == 0.1
    assert archive.search("a cow").threshold > 0.1


def test_what_is_wrong_is_said_as_by_the_command(archive, tmp_path):
    with pytest.raises(UsageError, match="no archive"):
        OpenArchive.open(tmp_path)
    with pytest.raises(UsageError, match="no such video"):
        archive.search("x", video="no-such-file.mp4")
    with pytest.raises(UsageError, match="SQL"):
        archive.search("x", where="no such column")
    with pytest.raises(UsageError, match="empty"):
        archive.search(" ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top", 0),
        ("top", 2.5),
        ("per_video", 0),
        ("min_score", 1.5),
        ("min_score", float("nan")),
        ("start_seconds", "soon"),
        ("start_seconds", True),
        ("end_seconds", "0:99:00"),
        ("after", "yesterday"),
        ("before", datetime(2024, 5, 1)),
        ("tags", "camera=north"),
        ("without", "a cow"),
        ("images", "picture.jpg"),
    ],
)
def test_a_parameter_of_search_that_cannot_be_is_named_with_what_is_allowed(archive, name, value):
    with pytest.raises(UsageError, match=rf"^{name}={re.escape(repr(value))}: \S") as error:
        archive.search("an apple", **{name: value})
    assert "--" not in str(error.value)
    with pytest.raises(TypeError, match="colour"):
        archive.search("an apple", colour="red")


def test_ranges_are_refused_by_their_later_end(archive):
    with pytest.raises(UsageError, match=r"^end_seconds='0:00:03': must be more than start_seconds=5"):
        archive.search("x", start_seconds=5, end_seconds="0:00:03")
    with pytest.raises(UsageError, match=r"^before='2024-04-01': must be later than after='2024-05-01'"):
        archive.search("x", after="2024-05-01", before="2024-04-01")
    with pytest.raises(UsageError, match=r"^video='highway.avi@3-5': names a moment;"):
        archive.search("x", video="highway.avi@3-5", start_seconds=3)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("--like x: give one position", "like='x': give one position"),
        ("--from 0:00:x: not a time", "start_seconds='0:00:x': not a time"),
        ("torch finds no GPU here; use --device cpu", "torch finds no GPU here; use device='cpu'"),
        ("choose with --video, --from and --to", "choose with video, start_seconds and end_seconds"),
        ("128 tokens (--max-tokens) need more", "128 tokens (max_tokens) need more"),
        ("`vidx ask --all` takes all; give --not", "`vidx ask --all` takes all; give without"),
        ("a file a--b.mp4 of 3 -- 4", "a file a--b.mp4 of 3 -- 4"),
    ],
)
def test_messages_of_the_commands_are_told_in_parameters(message, wanted):
    assert in_parameters(message) == wanted


def test_every_option_that_an_error_may_name_is_a_parameter_here():
    """Errors are raised below the commands, with the names of options; these have to be parameters by another name."""
    functions = (
        package.index,
        OpenArchive.open,
        OpenArchive.search,
        OpenArchive.ask,
        OpenArchive.videos,
        OpenArchive.frames,
    )
    known = {name for function in functions for name in inspect.signature(function).parameters}
    # Of what Python does by calls of their own, and of a command that messages tell to run (`models --fetch`).
    of_commands = {"show", "contact_sheet", "format", "force", "fetch"}
    named = set()
    for path in (path for room in ("pipeline", "workers", "storage") for path in (ROOT / room).rglob("*.py")):
        if path.parent.name != "cli":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise):
                    named |= set(re.findall(r"--[a-z-]+", " ".join(strings_of(node))))
    assert len(named) > 15
    assert {in_parameters(option).split("=")[0] for option in named} - known - of_commands == set()


def strings_of(node):
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_every_setting_of_the_command_index_is_a_parameter_too():
    options = {option.name for option in index_command.params} - {"sources", "archive_dir", "dry_run", "as_json"}
    parameters = inspect.signature(package.index).parameters
    assert options == set(parameters) - {"sources", "archive", "progress"}
    assert {name: parameters[name].default for name in options} == dict.fromkeys(options) | {
        "rehash": False,
        "retry_failed": False,
        "restore_deleted": False,
        "strict_sandbox": False,
    }


def test_times_may_be_written_as_players_show_them(archive):
    found = archive.search("an apple", video="nano_scenes_1.mp4", start_seconds=10, end_seconds=16, min_score=-1)
    for times in (
        {"video": "nano_scenes_1.mp4", "start_seconds": "0:00:10", "end_seconds": "16"},
        {"video": "nano_scenes_1.mp4@0:00:10-0:00:16"},
    ):
        assert list(archive.search("an apple", min_score=-1, **times)) == list(found)
    assert found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", 0),
        ("fuse", "stored"),
        ("over", "all"),
        ("max_tokens", 0),
        ("max_words", 0),
        ("temperature", -0.1),
        ("seed", -1),
    ],
)
def test_an_option_of_ask_that_cannot_be_is_named_with_what_is_allowed(archive, name, value):
    with pytest.raises(UsageError, match=f"^{name}={value!r}: "):
        archive.ask("What is there?", **{name: value})


def test_videos_are_those_of_the_list(archive, samples_archive):
    wanted = run_vidx("list", "--archive", str(samples_archive[0]), "--where", "width > 500", "--json").json
    table = archive.videos(where="width > 500", status=["indexed", "partial"]).to_arrow()
    found = table.to_pylist(maps_as_pydicts="strict")
    for row in found:
        row |= {name: row[name] and row[name].isoformat() for name in ("captured_at", "indexed_at")}
    assert found == wanted
    videos = archive.videos(video="tractor.webm")
    assert (len(videos), videos[0]) == (1, archive.video("tractor.webm"))
    assert len(archive.videos(status="failed")) == len(archive.videos(tags={"camera": "x"})) == 0
    with pytest.raises(UsageError, match=r"^status='gone': must be one of indexing, indexed, partial, failed, deleted"):
        archive.videos(status="gone")


@pytest.fixture
def stored(tmp_path):
    """An archive of two videos of random frames, one a second, of a model that is not at hand; and what was written."""
    made = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="nowhere/no-such-model")
    rows = [add_video(made, name, count, tags={"camera": f"cam{name}"}) for name, count in ((1, 7), (2, 5))]
    return package.open(tmp_path / "archive"), rows


@pytest.mark.parametrize("batch_frames", [1, 4, 7, 100])
def test_frames_are_what_was_stored_in_order(stored, batch_frames):
    archive, rows = stored
    cells = ["token", "compressor_out", "search_key", "thumbnail"]
    batches = list(archive.frames(cells=cells, batch_frames=batch_frames))
    assert {len(batch) for batch in batches[:-1]} <= {batch_frames}
    assert sum(map(len, batches)) == 12
    for name in ("token", "compressor_out", "search_key"):
        written = np.concatenate([getattr(row.tokens, name) for row in rows])
        found = np.concatenate([getattr(batch, name) for batch in batches])
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, written)
    assert [cell for batch in batches for cell in batch.thumbnail] == [cell for row in rows for cell in row.thumbnails]
    times = [(number, time) for batch in batches for number, time in zip(batch.video_number, batch.time_seconds)]
    assert times == [(1, second) for second in range(7)] + [(2, second) for second in range(5)]
    assert [id_[:8] for batch in batches for id_ in batch.video_id] == ["00000001"] * 7 + ["00000002"] * 5


def test_frames_are_narrowed_as_a_search_is(stored):
    archive, _ = stored

    def found(**within):
        batches = list(archive.frames(cells=["token"], **within))
        assert all(batch.search_key is None for batch in batches)
        return [(int(number), float(time)) for b in batches for number, time in zip(b.video_number, b.time_seconds)]

    assert found(video="1.mp4", start_seconds="0:00:02", end_seconds=4) == [(1, 2), (1, 3)]
    assert found(tags={"camera": ["cam2", "cam3"]}, where="time_seconds >= 3") == [(2, 3), (2, 4)]
    assert found(video="2.mp4@4") == [(2, 4)]
    assert found(after="2024-05-01T12:00:06") == [(1, 6)]
    assert found(where="false") == []
    with pytest.raises(UsageError, match="SQL"):
        archive.frames(where="no such column")  # now, and not when the first batch is asked for
    with pytest.raises(UsageError, match=r"^cells='keys': must be one of token, compressor_out, search_key, thumbnail"):
        archive.frames(cells=["keys"])


def test_frames_are_arrow_too(stored):
    archive, rows = stored
    (batch,) = archive.frames(cells=["token", "search_key", "thumbnail"], video="2.mp4")
    table = batch.to_arrow()
    np.testing.assert_array_equal(table.column("token").to_numpy_ndarray(), rows[1].tokens.token)
    np.testing.assert_array_equal(table.column("search_key").to_numpy_ndarray(), rows[1].tokens.search_key)
    assert table.column("thumbnail").to_pylist() == rows[1].thumbnails
    assert table.column("time_seconds").to_pylist() == [0, 1, 2, 3, 4]


def test_frames_are_read_in_bounded_memory(tmp_path):
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    for name in range(1, 9):
        rows = random_rows(500, seed=name, token_shape=(1, 4096))
        archive.parts.commit([receipt_for(archive, name, rows)])
        archive.videos.publish([row_for(archive, name, 500)])
    opened = package.open(tmp_path / "archive")
    total = sum(batch.token.nbytes for batch in opened.frames(cells=["token"]))
    assert total == 8 * 500 * 8192
    tracemalloc.start()
    try:
        for batch in opened.frames(cells=["token"], batch_frames=64):
            assert len(batch)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < total / 8


def test_an_archive_is_read_without_its_model(stored):
    archive, _ = stored
    assert len(archive.videos()) == 2
    assert archive.sql("SELECT count(*) AS n FROM frames") == [{"n": 12}]
    with pytest.raises(UsageError, match="no-such-model"):
        archive.search("a dog")


def test_rows_counts_and_videos(archive):
    (row,) = archive.sql("SELECT count(*) AS frames FROM frames")
    assert archive.status().frames == row["frames"]
    assert archive.video("tractor.webm").uri.endswith("tractor.webm")


def test_the_example_of_the_documentation_runs(archive_copy, tmp_path):
    """Of the README, with the archive of the samples."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("./vidx-archive", str(archive_copy)).replace("found.html", str(tmp_path / "found.html"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found.html").exists()
    lines = done.stdout.splitlines()
    assert lines[0] == "0 7 []"
    assert "[{'videos': 7}]" in lines
    first_seconds = "SELECT f.frame_index FROM frames f JOIN videos v USING (video_number) WHERE time_seconds < 10 AND "
    rows = run_vidx("sql", first_seconds + "source LIKE '%nano_scenes_1.mp4'", "--archive", str(archive_copy), "--json")
    assert any(f"({len(rows.json)}, 1, 160) float16 {len(rows.json)}" in line for line in lines)
