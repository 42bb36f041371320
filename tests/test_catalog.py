"""What SQL sees of an archive, and what it cannot reach."""

import os
from datetime import datetime

import pytest
from small_archive import MODEL_ID, add_video, failed_row, random_rows, receipt_for, reserve, row_for, video_id_of

from storage.archive.archive import create_archive
from storage.errors import ArchiveError, UsageError
from storage.files import local_path
from storage.records import Problem, Reason, Status
from storage.sql import run_sql


@pytest.fixture
def archive(tmp_path):
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, 5)
    add_video(archive, 2, 3, uri="file:///clips/caf%E9%20%C3%BC.mp4", tags={}, captured_at=None)
    problem = Problem(Reason.TRUNCATED, "ends early")
    archive.parts.commit([receipt_for(archive, 3, random_rows(4, 3))])
    archive.videos.publish([row_for(archive, 3, 4, status=Status.PARTIAL, problem=problem)])
    archive.videos.publish([failed_row(archive, "file:///clips/secret.mp4")])
    archive.parts.commit([receipt_for(archive, 4, random_rows(9, 4))])  # not published
    return archive


def rows_of(archive, statement):
    columns, rows = run_sql(archive, statement)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_videos_shows_what_the_documentation_names(archive):
    first, *_ = rows_of(archive, "SELECT * FROM videos ORDER BY video_number")
    assert first == {
        "video_id": video_id_of(1),
        "video_number": reserve(archive, 1),
        "source": "/clips/1.mp4",
        "source_uri": "file:///clips/1.mp4",
        "status": "indexed",
        "reason": None,
        "detail": None,
        "decoder": "pyav",
        "container": "mov,mp4",
        "codec": "h264",
        "width": 640,
        "height": 360,
        "rotation_degrees": 90,
        "duration_seconds": 5.25,
        "clock_offset_seconds": 1.5,
        "frames": 5,
        "size_bytes": 1234,
        "captured_at": datetime(2024, 5, 1, 12),
        "captured_from": "manifest",
        "tags": {"camera": "cam1"},
        "model_id": MODEL_ID,
        "sampling": "fps=1,patches=0",
        "attempts": 1,
        "indexed_at": datetime(2024, 5, 2, 6, 30),
        "sandbox_missing": None,
    }


def test_sources_are_readable_and_uris_exact(archive):
    (row,) = rows_of(archive, r"SELECT source, source_uri FROM videos WHERE source LIKE '%caf%'")
    assert row == {"source": r"/clips/caf\xe9 ü.mp4", "source_uri": "file:///clips/caf%E9%20%C3%BC.mp4"}


def test_status_reason_and_tags_can_be_asked_for(archive):
    assert rows_of(archive, "SELECT status, reason, count(*) AS n FROM videos GROUP BY ALL ORDER BY ALL") == [
        {"status": "failed", "reason": "permission", "n": 1},
        {"status": "indexed", "reason": None, "n": 2},
        {"status": "partial", "reason": "truncated", "n": 1},
    ]
    assert run_sql(archive, "SELECT source FROM videos WHERE tags['camera'] = 'cam3'")[1] == [("/clips/3.mp4",)]
    assert run_sql(archive, "SELECT count(*) FROM videos WHERE captured_at > '2024-05-01 11:59'")[1] == [(2,)]


def test_frames_of_published_videos_are_seen_and_no_others(archive):
    query = "SELECT video_id, count(*) AS n, sum(frame_index) AS total FROM frames GROUP BY ALL ORDER BY ALL"
    assert rows_of(archive, query) == [
        {"video_id": video_id_of(1), "n": 5, "total": 250},
        {"video_id": video_id_of(2), "n": 3, "total": 75},
        {"video_id": video_id_of(3), "n": 4, "total": 150},
    ]
    add_video(archive, 5, 2, uri="file:///clips/1.mp4")  # retires the first
    assert video_id_of(1) not in {row["video_id"] for row in rows_of(archive, query)}
    joined = "SELECT v.source FROM frames f JOIN videos v USING (video_number) WHERE f.time_seconds >= 3"
    assert run_sql(archive, joined)[1] == [("/clips/3.mp4",)]


def test_times_of_frames_come_back_exactly(archive):
    row = rows_of(archive, f"SELECT * FROM frames WHERE video_id = '{video_id_of(1)}' AND frame_index = 50")[0]
    wanted = {"ticks": 20, "time_base_num": 1, "time_base_den": 10, "pts_seconds": 3.5, "time_seconds": 2.0}
    wanted |= {"duration_seconds": 1.0, "segment": "..", "model_id": MODEL_ID, "row": 2, "stand_in_ticks": None}
    assert {name: row[name] for name in wanted} == wanted


def test_binary_columns_are_there_only_when_named(archive):
    columns, _ = run_sql(archive, "SELECT * FROM frames LIMIT 1")
    assert not {"token", "compressor_out", "search_key", "patches", "thumbnail", "checksums"} & set(columns)
    rows = random_rows(5, 1)
    query = "SELECT Token, search_key, thumbnail, patches FROM frames WHERE video_number = 1 ORDER BY ticks"
    assert run_sql(archive, query)[1] == [
        (token.tobytes(), key.tobytes(), thumbnail, None)
        for token, key, thumbnail in zip(rows.tokens.token, rows.tokens.search_key, rows.thumbnails, strict=True)
    ]


def test_values_are_plain_python_values(archive):
    query = "SELECT sum(frames) AS total, avg(frames) AS mean, now() IS NULL AS nothing, 1 AS a, 2 AS a FROM videos"
    assert run_sql(archive, query) == (["total", "mean", "nothing", "a", "a_1"], [(12, 3.0, False, 1, 2)])
    total = run_sql(archive, query)[1][0][0]
    assert type(total) is int
    assert run_sql(archive, "SELECT TIMESTAMPTZ '2024-05-01 12:00:00+00' AS t")[1][0][0].utcoffset() is not None


@pytest.mark.parametrize("names", [["a", "a"], ["a", "A", "a"], ["a", "a", "A", "a_1"], ["a", "a_1", "a"], ["b", "a"]])
def test_repeated_column_names_are_numbered_as_in_a_subquery(archive, names):
    statement = "SELECT " + ", ".join(f"{value} AS {name}" for value, name in enumerate(names))
    columns, rows = run_sql(archive, statement)
    assert columns == run_sql(archive, f"SELECT * FROM ({statement})")[0]
    assert len(set(columns)) == len(names)
    assert rows == [tuple(range(len(names)))]


def test_a_statement_of_bytes_that_are_no_text_is_refused_in_one_line(archive):
    with pytest.raises(UsageError, match="holds bytes that are no UTF-8"):
        run_sql(archive, os.fsdecode(b"SELECT '\xff'"))


def test_both_views_are_there_in_an_empty_archive(tmp_path):
    empty = create_archive(str(tmp_path / "empty"), model_id=MODEL_ID, model_name="tiny")
    assert run_sql(empty, "SELECT count(*) FROM frames")[1] == [(0,)]
    assert run_sql(empty, "SELECT * FROM videos")[1] == []
    assert {"videos", "frames"} <= {row[0] for row in run_sql(empty, "SHOW TABLES")[1]}


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_blob('{file}')",
        "SELECT * FROM read_parquet('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM sniff_csv('{file}')",
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "COPY videos FROM '{file}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{folder}/out.csv'",
        "EXPORT DATABASE '{folder}/out'",
        "IMPORT DATABASE '{folder}'",
        "ATTACH '{folder}/out.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET threads = 1",
        "RESET threads",
        "PRAGMA memory_limit = '1GB'",
        "CREATE SECRET (TYPE s3)",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW videos",
        "DELETE FROM videos",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{folder}/out.csv'",
        "SELECT * FROM archive",
        "SELEC 1",
        "SELECT nothing FROM videos",
        "SELECT 'unfinished",
        "SELECT ?",
        "SELECT CAST('x' AS INTEGER)",
        "",
        "   ;  ",
    ],
)
def test_a_statement_that_reaches_out_or_is_wrong_is_refused_in_one_line(archive, tmp_path, statement):
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError) as error:
        run_sql(archive, statement.format(file=tmp_path / "secret.csv", folder=tmp_path))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == before


def test_a_missing_or_damaged_part_is_the_archives_fault(archive):
    folder = local_path(archive.frames_uri).decode()
    path = os.path.join(folder, archive.frames.parts()[0].path)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ArchiveError) as error:
        run_sql(archive, "SELECT sum(ticks) FROM frames")
    assert "\n" not in str(error.value)
    os.remove(path)
    with pytest.raises(ArchiveError):
        run_sql(archive, "SELECT sum(ticks) FROM frames")
    assert run_sql(archive, "SELECT count(*) FROM videos")[1] == [(4,)]
