"""`vidx sql` as a user runs it: rows come as they are found, within limits of time and memory."""

import csv
import json
import os
import subprocess
import sys

import pytest
from conftest import VIDX
from small_archive import MODEL_ID, add_video, folder_of

import vidx
from pipeline.sizes import parse_size
from storage.archive.archive import create_archive
from storage.errors import UsageError

ENDLESS = "SELECT * FROM range(1000000000000)"  # rows
COUNTLESS = "SELECT sum(range % 7) FROM range(1000000000000000)"  # none before its end
HUGE_SORT = "SELECT range AS r, random() AS x FROM range(1000000000) ORDER BY x"
HUGE_LIST = "SELECT list(range) FROM range(1000000000)"
HUGE_TEXT = "SELECT repeat('x', 4000000000)"  # a single call, which DuckDB cannot interrupt
MIB = 1 << 20


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    made = create_archive(str(tmp_path_factory.mktemp("sql") / "archive"), model_id=MODEL_ID, model_name="tiny")
    for name in (1, 2, 3):
        add_video(made, name, 5)
    return folder_of(made)


# A process's peak of memory counts from before its exec, so it holds what its parent had. A small process between this
# one and the command keeps the memory of the tests out of the figure.
MEASURE = """
import os, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
os.write(int(sys.argv[1]), b"%d" % resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def start(archive, *arguments):
    ours, theirs = os.pipe()
    command = [sys.executable, "-I", "-S", "-c", MEASURE, str(theirs), VIDX, "sql", *arguments]
    command += ["--archive", str(archive)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pass_fds": [theirs]}
    process = subprocess.Popen(command, text=True, **pipes)
    os.close(theirs)
    process.memory = ours
    return process


def end(process):
    """Exit code, output, errors, and the most memory that the command had."""
    out = "" if process.stdout.closed else process.stdout.read()
    err = process.stderr.read()
    code = process.wait()
    with os.fdopen(process.memory) as memory:
        return code, out, err, int(memory.read()) << 10


@pytest.mark.parametrize("statement", [ENDLESS, COUNTLESS, "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL FROM t) FROM t"])
@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_a_statement_that_would_run_for_ever_is_stopped(archive, statement, form):
    code, _, err, memory = end(start(archive, statement, "--timeout", "1", *([form] if form else [])))
    assert (code, err) == (2, "vidx: SQL: not done after 1 s; allow more with --timeout, or ask for less\n")
    assert memory < 600 * MIB


@pytest.mark.parametrize("statement", [HUGE_SORT, HUGE_LIST, HUGE_TEXT])
def test_a_statement_that_takes_too_much_memory_is_stopped_before_it_has_it(archive, statement):
    code, out, err, memory = end(start(archive, statement, "--memory", "200MB"))
    assert (code, out) == (2, "")
    assert err == "vidx: SQL: takes more than 200 MB of memory; allow more with --memory, or ask for less\n"
    assert memory < 800 * MIB


@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_rows_come_as_they_are_found(archive, form):
    process = start(archive, ENDLESS, "--timeout", "100", *([form] if form else []))
    first = [process.stdout.readline() for _ in range(5000)]  # while the statement goes on
    assert any("1200" in line for line in first)
    process.stdout.close()  # as `| head` does
    code, _, err, memory = end(process)
    assert (code, err) == (0, "")
    assert memory < 600 * MIB


def test_csv_json_and_table_hold_the_same_rows(archive):
    statement = "SELECT video_id, frame_index, tags, captured_at, NULL AS nothing, 'a,\"b' AS odd FROM frames"
    statement += " JOIN videos USING (video_id, video_number) ORDER BY ALL"
    rows = vidx.open(archive).sql(statement)
    assert len(rows) == 15
    assert json.loads(end(start(archive, statement, "--json"))[1]) == [
        {**row, "captured_at": row["captured_at"].isoformat()} for row in rows
    ]
    found = list(csv.DictReader(end(start(archive, statement, "--csv"))[1].splitlines()))
    assert found == [
        {
            **row,
            "frame_index": str(row["frame_index"]),
            "tags": json.dumps(row["tags"]),
            "captured_at": row["captured_at"].isoformat(),
            "nothing": "",
        }
        for row in rows
    ]
    assert len(end(start(archive, statement))[1].splitlines()) == 2 + len(rows)
    assert end(start(archive, "SELECT 1 WHERE false", "--json"))[1] == "[]\n"
    assert end(start(archive, "SELECT 1 AS x WHERE false", "--csv"))[1] == "x\n"
    assert end(start(archive, "SELECT 1", "--csv", "--json"))[0] == 2


def test_a_long_table_keeps_its_columns(archive):
    lines = end(start(archive, "SELECT range AS number, 'x' AS x FROM range(2500)"))[1].splitlines()
    assert len(lines) == 2502
    assert {line.index("x") for line in lines[2:]} == {lines[0].rindex("x")}
    assert [int(line.split()[0]) for line in lines[2:]] == list(range(2500))


def test_an_error_in_a_late_row_is_told_as_one_of_the_statement(archive):
    statement = "SELECT CAST(CASE WHEN range = 5000 THEN 'x' ELSE '1' END AS INTEGER) FROM range(9000)"
    code, _, err, _ = end(start(archive, statement, "--csv"))
    assert (code, err.count("\n"), "Could not convert" in err) == (2, 1, True)


def test_the_python_interface_has_the_same_limits_and_streams(archive):
    opened = vidx.open(archive)
    rows = opened.sql_rows(ENDLESS)
    assert [next(rows)["range"] for _ in range(3)] == [0, 1, 2]
    rows.close()
    with pytest.raises(UsageError, match=r"not done after 0\.5 s; allow more with timeout_seconds"):
        opened.sql(COUNTLESS, timeout_seconds=0.5)
    with pytest.raises(UsageError, match=r"not done after 0\.5 s; allow more with timeout_seconds"):
        list(opened.sql_rows(COUNTLESS, timeout_seconds=0.5))
    with pytest.raises(UsageError, match="takes more than 100 MB of memory; allow more with memory"):
        opened.sql(HUGE_LIST, memory="100MB")
    for wrong in ({"timeout_seconds": 0}, {"timeout_seconds": "1"}, {"memory": "x"}, {"memory": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            opened.sql("SELECT 1", **wrong)
    assert opened.sql("SELECT 1 AS one", timeout_seconds=5, memory=10**9) == [{"one": 1}]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512 * 10**6), ("1.5 GiB", 3 << 29), ("4gb", 4 * 10**9), ("100", 100), ("7 B", 7), ("2kb", 2000)],
)
def test_a_size_is_read(text, size):
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "x", "1 XB", "1e9", "nan", "9" * 30, "1000000TB", "1.5.2MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size("--memory", text)


# The thread that watches the limits ends a second late here, when Python exits unless it waits for the thread.
SLOW_WATCH = """
import sys, threading, time
from storage.archive.archive import open_archive
from storage.errors import UsageError
from storage.sql import run_sql
def delay(frame, event, _):
    if event == "return" and "sql.py" in frame.f_code.co_filename and frame.f_back.f_code.co_name == "run":
        print("late")
        time.sleep(1)
threading.setprofile(delay)
archive = open_archive(sys.argv[1])
try:
    run_sql(archive, sys.argv[2])
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(("statement", "said"), [("SELECT 1", ""), ("SELEKT 1", "SELEKT")])
def test_nothing_of_duckdb_is_left_when_python_exits(archive, statement, said):
    command = [sys.executable, "-c", SLOW_WATCH, archive, statement]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (said in done.stdout, "late" in done.stdout, done.stderr) == (True, True, "")


def test_a_table_that_is_not_there_is_told_with_the_views(archive):
    for statement in ("SELECT * FROM video", "SELECT * FROM stored"):
        run = end(start(archive, statement))
        assert run[0] == 2
        name = statement.rpartition(" ")[2]
        assert f"there is no table {name}; the views are videos and frames" in run[2]
