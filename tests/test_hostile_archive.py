"""An archive from a stranger: whatever its files say, nothing outside it changes, and commands end in one line."""

import contextlib
import io
import json
import os
import shutil
import subprocess
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import VIDX
from PIL import Image
from small_archive import MODEL_ID, add_video, folder_of, random_rows, receipt_for, row_for
from test_vectors import unit

from ops.damage import hostile_names
from ops.sealed import SealedArchive
from pipeline.cli.main import vidx
from pipeline.results.contact_sheet import write_contact_sheet
from storage.archive.archive import create_archive, open_archive
from storage.archive.claims import Job, remove_ended_jobs
from storage.errors import ArchiveError, VidxError
from storage.records import Moment
from storage.vectors import vector_index as vectors
from storage.vectors.vector_index import improve_index, open_index, update_index
from workers.sources.hash_cache import HashCache

NUMBERS = (-1, 2**31, 2**62, 2**64, 0.5, float("nan"), True, None, "7", [])
TEXTS = (7, None, [], "", "../../outside/victim.txt", "x\0", "9" * 5000)
READING = (("status",), ("status", "--failed"), ("sql", "SELECT * FROM videos"), ("verify",))
CHANGING = (("clean", "--older-than", "0"), ("compact",), ("repair", "--no-index"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """For the disk: nobody cuts the power here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two archives of three videos: one that is searched exactly, and one through codes."""
    found = {}
    for kind in ("exact", "coded"):
        archive = create_archive(str(tmp_path_factory.mktemp(kind) / "archive"), model_id=MODEL_ID, model_name="tiny")
        for name in (1, 2, 3):
            add_video(archive, name, 6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vectors, "EXACT_KEYS", 10 if kind == "coded" else 1000)
            update_index(archive)
            improve_index(archive)
        found[kind] = folder_of(archive)
    return found


@pytest.fixture
def outside(tmp_path):
    """Files beside the archive, all old, that its names may point at."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("victim.txt", "a.parquet", "b.tmp", f"{'c' * 32}.job", "7.claim"):
        (folder / name).write_text("nobody's business")
        os.utime(folder / name, (10**9, 10**9))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A function that gives a fresh copy of an archive, always at the same place."""

    def copied(kind="exact"):
        shutil.rmtree(tmp_path / "in" / "archive", ignore_errors=True)
        return SealedArchive(Path(shutil.copytree(made[kind], tmp_path / "in" / "archive")))

    return copied


def state(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def end_of(sealed, *command):
    """The exit code of a command, and what it says where that is an error; any exception but ours is passed on."""
    result = CliRunner().invoke(vidx, [*command, "--archive", str(sealed.folder)])
    if isinstance(result.exception, VidxError):
        assert "\n" not in str(result.exception)
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def found_in(sealed):
    """What three searches find."""
    index = open_index(open_archive(str(sealed.folder)))
    return [[(hit.video_number, hit.frame_index) for hit in index.search(unit(seed), 5)] for seed in range(3)]


def ends(sealed, outside, commands=(*READING, *CHANGING)):
    """How commands end; nothing outside may change."""
    before = state(outside)
    found = [end_of(sealed, *command) for command in commands]
    assert state(outside) == before
    assert {code for code, _ in found} <= {0, 3, 5}, found
    return found


def holders(document, at=()):
    """Where the values of a document are: of alike ones in a list, the first."""
    items = document.items() if isinstance(document, dict) else list(enumerate(document))[:1]
    for key, value in items:
        if isinstance(value, dict | list):
            yield from holders(value, (*at, key))
        else:
            yield (*at, key)


def value_at(document, at):
    for key in at:
        document = document[key]
    return document


def changed(document, at, value):
    document = deepcopy(document)
    value_at(document, at[:-1])[at[-1]] = value
    return document


def names_for(outside):
    return hostile_names(str(outside / "victim.txt"), "../../outside/victim.txt")


def test_a_name_in_the_index_that_leads_outside_is_not_followed(copy, outside):
    for kind in ("exact", "coded"):
        sealed = copy(kind)
        wanted, before = found_in(sealed), state(outside)
        manifest = sealed.checked_json("index.json")
        for name in names_for(outside):
            entry = manifest[kind]["files"][0]
            sealed = copy(kind)
            sealed.write_checked_json("index.json", changed(manifest, (kind, "files", 0), {**entry, "name": name}))
            assert end_of(sealed, "status")[0] == 0
            assert found_in(sealed) == wanted
            assert state(outside) == before


@pytest.mark.parametrize("kind", ["exact", "coded"])
def test_whatever_the_index_says_it_is_built_again_or_found_right(copy, outside, kind):
    sealed = copy(kind)
    wanted, manifest = found_in(sealed), sealed.checked_json("index.json")
    for at in holders(manifest):
        if kind == "coded" and at[0] == "coded" and at[-1] not in ("name", "size_bytes", 0):
            continue  # is read like the same in the other
        for value in TEXTS if isinstance(value_at(manifest, at), str) else NUMBERS:
            sealed = copy(kind)
            sealed.write_checked_json("index.json", changed(manifest, at, value))
            assert found_in(sealed) == wanted, (at, value)
    ends(sealed, outside)
    for text in (b"", b"[" * 10**5, b"null", b'"x"', b"{}"):
        sealed = copy(kind)
        sealed.write_checked_json("index.json", text)
        assert found_in(sealed) == wanted


def test_an_index_that_names_codes_without_their_lists_is_built_again(copy):
    sealed = copy("coded")
    wanted, manifest = found_in(sealed), sealed.checked_json("index.json")
    sealed.write_checked_json("index.json", {**manifest, "centroids": None})
    assert found_in(sealed) == wanted


def test_an_index_that_claims_keys_of_a_part_without_any_is_called_damaged(copy):
    sealed = copy("coded")
    archive = open_archive(str(sealed.folder), write=True)
    archive.parts.commit([receipt_for(archive, 4, random_rows(6, key_width=None))])
    archive.videos.publish([row_for(archive, 4, 6)])
    paths = {part.video_number: part.path for part in archive.frames.parts()}
    sealed.rename_in_index(paths[3], paths[4])
    with pytest.raises(ArchiveError, match=r"`vidx repair` makes the index anew .*keeps no search keys"):
        open_index(open_archive(archive.uri)).search(unit(0), 5, {paths[4]: None})


@pytest.mark.parametrize("kind", ["exact", "coded"])
def test_whatever_stands_in_the_head_of_an_index_file_finds_what_is_right_or_says_so(copy, outside, kind):
    sealed = copy(kind)
    wanted = found_in(sealed)
    files = [file for file in (sealed.folder / "index").iterdir() if file.suffix not in (".json", ".lock")]
    for name, data in {file.name: file.read_bytes() for file in files}.items():
        heads = {"keys": (), "codes": range(0, 176, 4)}  # of keys the whole file is data
        for place in heads.get(name.rsplit(".", 1)[1], (0, 8)):
            sealed = copy(kind)
            sealed.write_index_file(name, data[:place] + b"\xfe\xff\xff\x7f" + data[place + 4 :])
            with contextlib.suppress(ArchiveError):  # said by a search that comes by a row
                assert found_in(sealed) == wanted, (name, place)
                continue
            assert end_of(sealed, "repair", "--no-index")[0] == 0
            assert found_in(sealed) == wanted
        sealed = copy(kind)
        sealed.write_index_file(name, data[:-3])
        assert found_in(sealed) == wanted
    ends(sealed, outside)


def test_whatever_archive_json_says_is_an_error_in_one_line(copy, outside):
    for name in ("format_version", "model_id", "model_name"):
        for value in (*NUMBERS, "a\nb", "\x1b[2J", "\ud800", "x" * 10**6):
            sealed = copy()
            document = json.loads(sealed.settings().read_text())
            if document[name] == value and type(document[name]) is type(value):
                continue
            sealed.settings().write_text(json.dumps({**document, name: value}))
            code, said = ends(sealed, outside, [("status",)])[0]
            harmless = name != "format_version" and value == "7"
            assert (code, "archive" in said) == (0 if harmless else 5, True), (name, value)
    for text in ("", "[" * 10**5, "null", "[]", "\0"):
        sealed = copy()
        sealed.settings().write_text(text)
        assert ends(sealed, outside, [("status",)])[0][0] == 5


@pytest.mark.parametrize("table", ["frames", "videos", "numbers"])
def test_a_log_that_names_what_is_outside_is_refused(copy, outside, table):
    for name in names_for(outside):
        for kind in ("add", "remove"):
            sealed = copy()
            log = sealed.logs(table)[-1]
            actions = sealed.actions(log)
            path = next(action["add"]["path"] for action in actions if "add" in action)
            if kind == "add":
                actions = json.loads(json.dumps(actions).replace(json.dumps(path), json.dumps(name)))
            else:
                actions.append({"remove": {"path": name, "deletionTimestamp": 1, "dataChange": True, "size": 17}})
            sealed.write_actions(log, actions)
            found = ends(sealed, outside, [("verify",), ("status",), ("clean", "--older-than", "0")])
            if kind == "add":
                assert found[0][0] == 5, (name, found)
                assert found[1][0] == (0 if table == "numbers" else 5)  # status reads no numbers


def test_bounds_of_a_part_that_cannot_be_are_refused(copy, outside):
    sealed = copy()
    actions = sealed.actions(sealed.logs("frames")[-1])
    (place,) = [place for place, action in enumerate(actions) if "add" in action]
    wrong = {
        ("size",): (-1, 0, 2**63 - 1),
        ("stats", "numRecords"): (-1, 0, 2**31, 2**62, 2**63 - 1),
        ("stats", "minValues", "video_number"): (-1, 0, 2, 2**31 - 1),
        ("stats", "minValues", "segment"): ("", "x", "1e9..", "9" * 5000 + "..", "..\n"),
        ("stats", "minValues", "frame_index"): (-1, 2**62),
        ("stats", "maxValues", "frame_index"): (-1, 0, 2**32, 2**63 - 1),
        ("stats", "minValues", "time_seconds"): (1e300, -1e300),
        ("stats", "maxValues", "time_seconds"): (1e300, -1e300),
        ("stats", "maxValues", "duration_seconds"): (-1.0, 1e300),
    }
    for at, values in wrong.items():
        for value in values:
            sealed = copy()
            log = sealed.logs("frames")[-1]
            sealed.write_actions(log, changed(sealed.actions(log), (place, "add", *at), value))
            found = ends(sealed, outside, [("status",), ("verify",), ("clean",)])
            assert found[1][0] == 5, (at, value, found)


def test_bounds_that_could_be_and_are_not_are_found_by_verify_and_what_they_lead_to_is_not_believed(copy, outside):
    sealed = copy()
    log = sealed.logs("frames")[-1]
    (place,) = [place for place, action in enumerate(sealed.actions(log)) if "add" in action]
    for count in (1, 5):  # of six rows
        for rebuilt in (False, True):
            sealed = copy()
            sealed.write_actions(log, changed(sealed.actions(log), (place, "add", "stats", "numRecords"), count))
            if rebuilt:
                (sealed.folder / "index" / "index.json").unlink()
            assert ends(sealed, outside, [("verify",)])[0][0] == 5
            with pytest.raises(ArchiveError, match=f"{count} by the log"):
                found_in(sealed)
            assert end_of(sealed, "repair", "--no-index")[0] in (0, 3)
            assert end_of(sealed, "verify")[0] == 0


def with_values(number, field, values, rows):
    return rows.set_column(number, field.with_nullable(True), pa.array(values, field.type))


VALUES = {
    "string": ("../../outside/victim.txt", "x\0y", "9" * 5000, "fps=1e999999999,patches=0", "fps=1/0,patches=0", None),
    "int32": (-1, 0, 2**31 - 1, None),
    "int64": (-1, 0, 2**62, None),
    "double": (float("nan"), 1e300, None),
    "timestamp": (2**62, -(2**62), None),
    "map": ([("a", "1"), ("a", "2")], None),
    "bool": (True, None),
}


@pytest.mark.parametrize("table", ["videos", "numbers"])
def test_rows_that_vidx_does_not_write_are_refused_by_name(copy, outside, table):
    sealed = copy()
    fields = pq.read_schema(sealed.files(table)[0])
    for number, field in enumerate(fields):
        for value in VALUES[str(field.type).partition("<")[0].partition("[")[0]]:
            sealed = copy()
            column = [value] * pq.read_metadata(sealed.files(table)[0]).num_rows
            change = partial(with_values, number, field, column)
            sealed.rewrite(table, sealed.files(table)[0], change)
            for code, said in ends(sealed, outside, [("status", "--failed"), (*CHANGING, ("verify",))[number % 4]]):
                assert code != 5 or ".parquet" in said or "fault" in said, (field.name, value, said)
    for column in ("uri", "video_id"):
        if column in fields.names:
            sealed = copy()
            sealed.rewrite(table, sealed.files(table)[0], lambda rows, column=column: rows.drop_columns([column]))
            assert ends(sealed, outside, [("verify",)])[0][0] == 5


LACKING = [("failed", "reason"), ("partial", "reason"), ("partial", "detail"), ("deleted", "video_id")]


@pytest.mark.parametrize(("status", "lacking"), [*LACKING, ("indexed", "decoder"), ("indexing", "video_number")])
def test_a_row_that_lacks_what_videos_of_its_status_have_is_refused(copy, outside, status, lacking):
    sealed = copy()

    def change(rows):
        for name, value in {"status": status, "reason": "corrupt", "detail": "x"}.items():
            rows = with_column(name, value, rows)
        number = rows.schema.get_field_index(lacking)
        return with_values(number, rows.schema.field(number), [None] * rows.num_rows, rows)

    for path in sealed.files("videos"):
        sealed.rewrite("videos", path, change)
    assert {code for code, _ in ends(sealed, outside, [("list",), ("verify",)])} == {5}  # they read whole rows
    ends(sealed, outside, [("status", "--failed"), ("status", "--deleted"), ("compact",)])


def with_metadata(key, text, rows):
    return rows.replace_schema_metadata({**rows.schema.metadata, key: text})


def with_column(name, value, rows):
    """The same in all rows; a value of None leaves the column out."""
    if value is None:
        return rows.drop_columns([name])
    field = rows.schema.field(name)
    column = pa.array([value] * rows.num_rows, field.type)
    return rows.set_column(rows.schema.get_field_index(name), field.with_nullable(True), column)


def test_cells_and_metadata_of_a_part_that_vidx_does_not_write_are_refused_by_name(copy, outside):
    sealed = copy()
    path = sealed.files("frames")[0]
    metadata = {key: json.loads(text) for key, text in pq.read_schema(path).metadata.items() if b"vidx" in key}
    cases = [
        partial(with_metadata, key, json.dumps(changed(document, at, value)))
        for key, document in metadata.items()
        for at in holders(document)
        for value in (-1, 2**40, "x", float("nan"))
    ]
    cases += [partial(with_metadata, key, text) for key in metadata for text in (b"[", b"null", b"[" * 10**5)]
    cases += [
        partial(with_column, name, value)
        for name, values in {
            "time_seconds": (float("nan"), 1e300, None),
            "frame_index": (-1, 2**62, None),
            "duration_seconds": (float("inf"), -1.0, None),
            "search_key": (b"", b"x" * 33),
            "checksums": (b"", b"x" * 10**5),
        }.items()
        for value in values
    ]
    for change in cases:
        sealed = copy()
        new = sealed.rewrite("frames", path, change)
        (sealed.folder / "index" / "index.json").unlink()
        with pytest.raises(ArchiveError, match=new.name):
            found_in(sealed)
        ends(sealed, outside, [("status",), ("verify",), ("sql", "SELECT * FROM frames"), ("compact",)])


def test_a_text_that_a_small_file_gives_to_all_rows_is_not_laid_out(copy, outside):
    sealed = copy()
    path = sealed.files("videos")[0]

    def change(rows):
        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows.num_rows * 50, pa.int32()), ["x" * 10**7])
        rows = pa.concat_tables([rows] * 50)
        return rows.set_column(rows.schema.get_field_index("detail"), "detail", column)

    sealed.rewrite("videos", path, change, compression="zstd")
    before = pa.default_memory_pool().max_memory()
    code, said = ends(sealed, outside, [("status",)])[0]
    assert (code, ".parquet: damaged" in said) == (5, True)
    assert pa.default_memory_pool().max_memory() < before + (100 << 20)  # of 1.5 GB


@pytest.mark.parametrize("name", ["frames", "videos", "numbers", "index", "jobs", "frames/_delta_log"])
def test_a_folder_that_is_a_link_is_not_followed(copy, outside, name):
    for target in (outside, outside / "moved"):
        sealed = copy()
        if (sealed.folder / name).exists():
            shutil.copytree(sealed.folder / name, outside / "moved", dirs_exist_ok=True)
            shutil.rmtree(sealed.folder / name)
        (outside / "moved").mkdir(exist_ok=True)
        (sealed.folder / name).symlink_to(target)
        before = {path: path.lstat().st_mtime_ns for path in outside.rglob("*")}
        for command in (*READING, *CHANGING):
            code, said = end_of(sealed, *command)
            assert (code, "link" in said) == (5, True), (command, said)
        assert {path: path.lstat().st_mtime_ns for path in outside.rglob("*")} == before


def test_files_that_are_links_or_pipes_are_not_opened(copy, outside):
    sealed = copy()
    wanted = found_in(sealed)
    places = [Path("archive.json"), Path("index/index.json")]
    places += [Path(file.parent.name, file.name) for file in (sealed.folder / "index").glob("*.keys")]
    for table in ("frames", "videos", "numbers"):
        places += [path.relative_to(sealed.folder) for path in (sealed.logs(table)[-1], sealed.files(table)[0])]
    for place in places:
        for is_pipe in (True, False):
            sealed = copy()
            path = sealed.folder / place
            path.unlink()
            os.mkfifo(path) if is_pipe else path.symlink_to(outside / "victim.txt")
            if is_pipe:  # on which whoever reads waits for ever
                assert run(sealed, "verify").returncode == 5
            elif place.parts[0] == "index":
                assert found_in(sealed) == wanted
            else:
                assert ends(sealed, outside, [("verify",)])[0][0] == 5


def run(sealed, *command):
    """A command as a process, which a pipe would stop for ever."""
    command = [VIDX, *command, "--archive", str(sealed.folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("table", ["frames", "videos", "numbers"])
def test_a_sweep_goes_through_no_link(copy, outside, table):
    sealed = copy()
    (sealed.folder / table / "more").symlink_to(outside)
    (code, said), *_ = ends(sealed, outside, [("clean", "--older-than", "0")])
    assert (code, "a link or a pipe" in said) == (5, True)


def test_a_lock_that_is_another_file_by_a_second_name_keeps_what_it_holds(copy, outside):
    for name in ("index.lock", "training.lock"):
        sealed = copy()
        (sealed.folder / "index" / name).unlink(missing_ok=True)
        os.link(outside / "victim.txt", sealed.folder / "index" / name)
        (sealed.folder / "index" / "index.json").unlink()
        ends(sealed, outside)
        (sealed.folder / "index" / name).unlink()
        (sealed.folder / "index" / name).symlink_to(outside / "victim.txt")
        (sealed.folder / "index" / "index.json").unlink(missing_ok=True)
        ends(sealed, outside)


def test_jobs_and_claims_of_a_stranger_hold_nothing_up_and_lead_nowhere(copy, outside):
    holders_of = ["", "x", "../../../outside/" + "c" * 32, str(outside / ("c" * 32)), "\0", "é", "a" * 10**6]
    document = {"started": 1.0, "host": "h", "boot": "b", "pid": 1, "process_started": None}
    for value in (*NUMBERS, "../../victim", "9" * 5000):
        for name in document:
            sealed = copy()
            jobs = sealed.folder / "jobs"
            jobs.mkdir(exist_ok=True)
            (jobs / f"{'a' * 32}.job").write_text(json.dumps({**document, name: value}))
            for number, holder in enumerate(holders_of):
                (jobs / f"{number}.claim").write_text(holder)
            (jobs / "folder.job").mkdir()
            (jobs / "link.claim").symlink_to(outside / "7.claim")
            os.mkfifo(jobs / "pipe.job")
            started = remove_ended_jobs(f"file://{sealed.folder}")
            assert started is None or 0 <= started < float("inf")
            with Job(f"file://{sealed.folder}") as job:
                assert all(job.take(number) for number in range(len(holders_of)))
    ends(sealed, outside)


def test_a_thumbnail_that_is_no_small_jpeg_is_refused(tmp_path):
    big, png = io.BytesIO(), io.BytesIO()
    Image.new("L", (5000, 5000)).save(big, "JPEG")
    Image.new("L", (5, 5)).save(png, "PNG")
    moment = Moment(f"{1:08x}".ljust(64, "0"), 1, "file:///clips/1.mp4", 1.5, 3.5, 1.5, None)
    for number, thumbnail in enumerate((big.getvalue(), png.getvalue(), b"x", b"\xff\xd8\xff\xe0" + b"\0" * 100)):
        archive = create_archive(str(tmp_path / f"{number}"), model_id=MODEL_ID, model_name="tiny")
        rows = replace(random_rows(2), thumbnails=[thumbnail] * 2)
        archive.parts.commit([receipt_for(archive, 1, rows)])
        archive.videos.publish([row_for(archive, 1, 2)])
        with pytest.raises(ArchiveError, match="not a small JPEG"):
            write_contact_sheet(str(tmp_path / "sheet.png"), "x", archive, [moment])


def test_what_an_archive_says_cannot_write_the_terminal(copy):
    sealed = copy()
    archive = open_archive(str(sealed.folder))
    archive.videos.publish([row_for(archive, 1, 6, uri="file:///clips/%1b%5d0;title%07%0aa.mp4")])
    for command in (("sql", "SELECT source FROM videos"), ("delete", "--dry-run", "00000001"), ("status",)):
        said = run(sealed, *command)
        assert "\x1b" not in said.stdout + said.stderr
    sealed = copy()
    log = sealed.logs("frames")[-1]
    actions = json.loads(json.dumps(sealed.actions(log)).replace(sealed.files("frames")[-1].name, "\\u001b[2J\\nx"))
    sealed.write_actions(log, actions)
    said = run(sealed, "status")
    assert (said.returncode, "\x1b" in said.stderr, said.stderr.count("\n")) == (5, False, 1)


def test_a_hash_that_is_none_is_not_remembered(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"x")
    cache = HashCache(tmp_path / "hashes.sqlite")
    for wrong in ("", "../../x", "A" * 64, "0" * 63):
        cache.put(path.stat(), wrong, path.stat().st_ctime_ns + 10**11)
        assert cache.get(path.stat()) is None
    cache.put(path.stat(), "0" * 64, path.stat().st_ctime_ns + 10**11)
    assert cache.get(path.stat()) == "0" * 64


def test_the_largest_number_is_given_to_nobody(copy, outside):
    sealed = copy()

    def change(rows):
        place = rows.schema.get_field_index("video_number")
        return rows.set_column(place, rows.schema.field(place), pa.array([2**31 - 1] * rows.num_rows, pa.int32()))

    sealed.rewrite("numbers", sealed.files("numbers")[0], change)
    archive = open_archive(str(sealed.folder))
    with pytest.raises(ArchiveError, match="all its numbers"):
        row_for(archive, 9, 1)
    assert np.all([code in (0, 3, 5) for code, _ in ends(sealed, outside)])
