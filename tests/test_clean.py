"""clean removes what nothing names, and nothing else."""

from pathlib import Path

from small_archive import MODEL_ID, add_video, random_rows, video_id_of, write_part

from storage import sweep as sweeping
from storage.archive import create_archive
from storage.jobs import Job
from storage.sweep import sweep


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
