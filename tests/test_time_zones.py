"""An archive answers the same whatever the machine's time zone and locale: all times are UTC unless they say else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLES

MACHINES = [
    {"TZ": "UTC", "LC_ALL": "C.UTF-8"},
    {"TZ": "Asia/Tokyo", "LC_ALL": "C"},
    {"TZ": "America/New_York", "LC_ALL": "POSIX"},
    {"TZ": "IST-5:30", "LC_ALL": "C.UTF-8"},  # in POSIX's form, which no table of zones is needed for
]
# Of an instant that clocks in New York leave out, and that is another day in Tokyo's evening and New York's.
MANIFEST = """source,captured_at,camera
{samples}/highway.avi,2024-03-10T02:30:00,south
{samples}/nano_scenes_1.mp4,2024-03-10T11:30:00+09:00,north
{samples}/tractor.webm,2024-03-09T18:30:00-08:00,south
"""
INSTANT = "2024-03-10T02:30:00"
EPOCH_SECONDS = 1710037800  # date -u -d 2024-03-10T02:30:00Z +%s
STATEMENT = """
SELECT captured_at,
    epoch(captured_at)::BIGINT AS seconds,
    strftime(captured_at::TIMESTAMPTZ, '%Y-%m-%d %H:%M') AS written,
    epoch('2024-03-10 02:30:00'::TIMESTAMPTZ)::BIGINT AS cast_seconds,
    captured_at = TIMESTAMPTZ '2024-03-09 21:30:00-05' AS is_equal,
    TIMESTAMPTZ '2024-03-10 02:30:00+00'::DATE AS day,
    date_diff('minute', now()::TIMESTAMP, to_timestamp({now})::TIMESTAMP) AS minutes_off
FROM videos WHERE captured_at IS NOT NULL
"""


@pytest.fixture(scope="module", params=MACHINES, ids=lambda machine: machine["TZ"])
def machine(request):
    return request.param


@pytest.fixture(scope="module")
def dated(samples_archive, vidx, machine, tmp_path_factory):
    """A copy of the samples' archive, three of its videos dated by a manifest, on that machine."""
    folder = tmp_path_factory.mktemp("dated")
    archive, manifest = folder / "archive", folder / "cameras.csv"
    shutil.copytree(samples_archive[0], archive)
    manifest.write_text(MANIFEST.format(samples=SAMPLES))
    run = vidx("index", str(manifest), "--archive", str(archive), env=machine)
    assert run.code == 0, run.err
    return str(archive)


def test_sql_is_utc(dated, vidx, machine):
    now = os.stat(dated).st_mtime  # about now, by the file system's clock
    rows = vidx("sql", STATEMENT.format(now=now), "--archive", dated, "--json", env=machine).json
    assert len(rows) == 3
    for row in rows:
        assert abs(row.pop("minutes_off")) < 20
        assert row == {
            "captured_at": INSTANT,
            "seconds": EPOCH_SECONDS,
            "written": "2024-03-10 02:30",
            "cast_seconds": EPOCH_SECONDS,
            "is_equal": True,
            "day": "2024-03-10",
        }
    table = vidx(
        "sql", "SELECT captured_at FROM videos WHERE tags['camera'] = 'north'", "--archive", dated, env=machine
    )
    assert table.out.splitlines()[-1].strip() == "2024-03-10 02:30:00"


def test_sql_from_python_is_utc(dated, machine):
    code = (
        "import sys, vidx; "
        '(row,) = vidx.open(sys.argv[1]).sql("SELECT captured_at AS a, captured_at::TIMESTAMPTZ AS b FROM videos '
        "WHERE tags['camera'] = 'north'\"); print(row['a'].isoformat(), row['b'].isoformat())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, dated], capture_output=True, text=True, check=True, env={**os.environ, **machine}
    )
    assert done.stdout.split() == [INSTANT, f"{INSTANT}+00:00"]


@pytest.mark.parametrize(
    ("options", "is_found"),
    [
        (["--where", "captured_at < '2024-03-10 02:30:01'"], True),
        (["--where", "captured_at < '2024-03-10 02:30:00'"], False),
        (["--where", "captured_at > TIMESTAMPTZ '2024-03-10 02:29:59+00'"], True),
        (["--where", "captured_at > '2024-03-10 02:30:00'"], False),
        (["--where", "captured_at::DATE = '2024-03-10' AND time_seconds < 5"], True),
        (["--before", "2024-03-10T02:30"], False),
        (["--before", "2024-03-10T02:30:01"], True),
        (["--after", "2024-03-10T02:29:59", "--before", "2024-03-10T11:30:01+09:00"], True),
    ],
)
def test_filters_are_utc(dated, vidx, machine, options, is_found):
    run = vidx("search", "x", "--min-score", "-1", *options, "--archive", dated, "--json", env=machine)
    assert (run.code, bool(json.loads(run.out)["moments"])) == ((0, True) if is_found else (4, False)), run.err


def test_ages_are_counted_in_utc(dated, vidx, machine):
    """An hour on either side of the videos' age, less than any of these zones is away from UTC."""
    hours = (os.stat(dated).st_mtime - EPOCH_SECONDS) / 3600
    for older_than, wanted in ((hours - 1, {"highway.avi", "nano_scenes_1.mp4", "tractor.webm"}), (hours + 1, set())):
        run = vidx(
            "expire", "--older-than", f"{older_than:.2f}h", "--dry-run", "--archive", dated, "--json", env=machine
        )
        assert {Path(video["source"]).name for video in run.json["videos"]} == wanted
