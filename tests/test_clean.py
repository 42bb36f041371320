"""clean removes what nothing names, to the last byte, and nothing else."""

import shutil
from pathlib import Path

from conftest import SAMPLES, run_vidx
from small_archive import MODEL_ID, add_video, random_rows, video_id_of, write_part

from storage import sweep as sweeping
from storage.archive import create_archive, open_archive
from storage.jobs import Job
from storage.settings import archive_uri
from storage.sweep import sweep

COLUMNS = ("token", "compressor_out", "search_key", "patches", "thumbnail")


def stored_cells(archive):
    """The bytes of every wide cell of an archive."""
    names = ", ".join(f"hex({name}) AS {name}" for name in COLUMNS)
    found = run_vidx("sql", f"SELECT {names} FROM frames", "--archive", archive, "--json")
    assert found.code == 0, found.err
    return {bytes.fromhex(cell) for row in found.json for cell in row.values()}


def held(archive, cells):
    """How many of the cells are in a file below the archive."""
    files = [path.read_bytes() for path in Path(archive).rglob("*") if path.is_file()]
    return sum(any(cell in data for data in files) for cell in cells)


def test_of_replaced_content_no_byte_is_left(tmp_path):
    archive, video = str(tmp_path / "archive"), tmp_path / "video.mp4"
    shutil.copy(SAMPLES / "nano_scenes_1.mp4", video)
    assert run_vidx("index", str(video), "--archive", archive).code == 0
    old = stored_cells(archive)
    assert len(old) > 100
    assert held(archive, old) == len(old)
    shutil.copy(SAMPLES / "nano_scenes_2.mp4", video)
    assert run_vidx("index", str(video), "--archive", archive).code == 0
    new = stored_cells(archive)
    assert held(archive, old) > 0  # a reader may still have them open
    cleaned = run_vidx("clean", "--older-than", "0", "--archive", archive, "--json")
    assert cleaned.code == 0
    assert held(archive, old - new) == 0
    assert held(archive, new) == len(new)
    assert run_vidx("verify", "--archive", archive).code == 0
    assert len(open_archive(archive_uri(archive)).videos()) == 1


def test_what_a_running_job_has_written_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "MARGIN_SECONDS", 0)
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="a model")
    add_video(archive, 1)
    before = held_files(tmp_path)
    with Job(archive.uri):
        part = write_part(archive.frames_uri, random_rows(3, 5), video_id=video_id_of(2), number=2)
        assert sweep(archive, 0) == 0
        assert Path(tmp_path, "archive", "frames", part.path).exists()
    assert sweep(archive, 0) == 1
    assert held_files(tmp_path) == before


def held_files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}
