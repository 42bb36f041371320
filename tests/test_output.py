"""What a command prints arrives whole: on narrow terminals, in other encodings; or an error says that it did not."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import SAMPLES, VIDX, process_of

READING = [
    ("status",),
    ("status", "--json"),
    ("sql", "SELECT source, codec FROM videos"),
    ("sql", "SELECT source FROM videos", "--json"),
    ("search", "apple", "--min-score", "-1"),
    ("search", "apple", "--min-score", "-1", "--json"),
    ("export", "-", "apple", "--min-score", "-1", "--format", "csv"),
    ("list",),
    ("list", "--csv"),
    ("models",),
    ("verify",),
    ("delete", "highway.avi", "--dry-run"),
    ("expire", "--older-than", "1d", "--dry-run", "--json"),
    ("index", str(SAMPLES / "highway.avi"), "--dry-run"),
    ("--help",),
    ("search", "--help"),
    ("--version",),
]


def by_shell(command, redirections, env=None):
    """The command with redirections as a shell makes them."""
    words = ["sh", "-c", f'exec "$@" {redirections}', "sh", VIDX, *command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **(env or {})}
    )


def on(command, archive):
    return [
        *command,
        *([] if command[-1].startswith("--help") or command[0] == "--version" else ["--archive", archive]),
    ]


@pytest.mark.parametrize("command", READING, ids=" ".join)
@pytest.mark.parametrize(
    ("to", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")], ids=["full", "closed"]
)
def test_an_output_that_cannot_be_written_is_one_line_and_an_error(samples_archive, command, to, why):
    run = by_shell(on(command, str(samples_archive[0])), to)
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if "cannot be written" in line] == [
        f"vidx: standard output cannot be written: {why}"
    ]
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr


@pytest.mark.parametrize("command", [one for one in READING if one[0] != "expire"], ids=" ".join)  # ages grow
def test_a_standard_error_that_cannot_be_written_changes_no_result(samples_archive, command):
    command = on(command, str(samples_archive[0]))
    whole = by_shell(command, "")
    for to in ("2>&-", "2>/dev/full", "<&- 2>&-"):
        run = by_shell(command, to)
        assert (run.returncode, run.stdout) == (whole.returncode, whole.stdout), to
        assert run.stdout


def test_an_index_with_all_streams_closed_writes_nothing_but_its_archive(tmp_path):
    """A file that is opened where a stream was closed would get what is printed."""
    archive = str(tmp_path / "archive")
    run = by_shell(("index", str(SAMPLES / "highway.avi"), "--archive", archive), "<&- >&- 2>&-")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")  # its last words found no place
    assert by_shell(("verify", "--archive", archive), "").returncode == 0
    found = by_shell(("status", "--archive", archive, "--json"), "")
    assert json.loads(found.stdout)["frames"] == 9


def test_a_reader_that_has_seen_enough_is_no_error(samples_archive):
    run = by_shell(on(READING[4], str(samples_archive[0])), "| true")
    assert "Traceback" not in run.stderr


# Encodings


@pytest.fixture(scope="module")
def far_names(tmp_path_factory, vidx):
    """An archive of a video whose name few encodings hold."""
    folder = tmp_path_factory.mktemp("far")
    name = "\u65e5\u672c\U0001f3a5 \u00e9.avi"
    (folder / name).write_bytes((SAMPLES / "highway.avi").read_bytes())
    archive = str(folder / "archive")
    assert vidx("index", str(folder / name), "--archive", archive).code == 0
    return folder / name, archive


POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, POSIX], ids=["latin-1", "ascii", "posix"]
)
def test_names_that_an_encoding_lacks_are_escaped_and_json_stays_json(far_names, tmp_path, env):
    video, archive = far_names
    environment = {**os.environ, **env}

    def run(*command):
        words = [VIDX, *command, "--archive", archive]
        done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    search = ("search", "apple", "--min-score", "-1")
    assert json.loads(run(*search, "--json").decode())["moments"][0]["source"] == str(video)
    assert json.loads(run("sql", "SELECT source FROM videos", "--json").decode()) == [{"source": str(video)}]
    assert json.loads(run("export", "-", *search[1:], "--format", "json"))[0]["source"] == str(video)
    for command in (search, ("sql", "SELECT source FROM videos"), ("delete", video.name, "--dry-run")):
        text = run(*command)
        assert rb"\u65e5\u672c\U0001f3a5" in text, text
        assert b"--------" in text or command[0] == "delete"
    assert run("clip", f"{video}@1-2")
    assert [path.suffix for path in tmp_path.iterdir()] == [".avi"]


# Terminals


def on_terminal(columns, command):
    """What the command prints on a terminal of so many columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with process_of([VIDX, *command], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 1 << 16):
                seen += piece
        except OSError:  # the other end is closed
            pass
        process.stderr.read()
        assert process.wait(300) == 0
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_narrow_terminal_shows_every_column_and_the_whole_of_it(vidx, samples_archive, columns):
    archive = str(samples_archive[0])
    command = ("search", "apple", "--min-score", "-1", "--top", "3", "--archive", archive)
    moments = vidx(*command, "--json").json["moments"]
    assert len(moments) == 3
    shown = on_terminal(columns, command)
    unfolded = re.sub(r"\s+", "", shown)
    for name in ("score", "start", "end", "best", "video", "source"):
        assert name in shown
    for moment in moments:
        assert f"{moment['score']:.3f}" in shown
        assert moment["video_id"][:8] in shown
        if columns in (20, 40, 200):  # a folded column stands beside others
            assert moment["source"] in unfolded
    if columns == 40:
        assert f"start: 0:00:{moments[0]['start_seconds']:04.1f}\n" in shown
    assert "\u2026" not in shown


def test_a_narrow_terminal_shows_all_of_a_wide_table(samples_archive):
    columns = "source, codec, width, height, frames, size_bytes, container, decoder"
    shown = on_terminal(40, ("sql", f"SELECT {columns} FROM videos", "--archive", str(samples_archive[0])))
    assert len(re.findall(r"^codec: \w+$", shown, re.MULTILINE)) == 7
    assert f"size_bytes: {(SAMPLES / 'highway.avi').stat().st_size}\n" in shown
    status = on_terminal(12, ("status", "--archive", str(samples_archive[0])))
    assert "videos: 7 indexed, 0 partial, 0 failed" in status.replace("\n", " ").replace("  ", " ")


# Users without a home


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")


@pytest.mark.skipif(sys.platform != "linux", reason="setpriv is of Linux")
@needs_root
@pytest.mark.parametrize(
    ("home", "temporary"),
    [(None, "long"), ("/", "read-only"), ("/nonexistent", "missing"), ("", None)],
    ids=["none", "root", "nonexistent", "empty"],
)
def test_a_user_without_a_home_or_a_usable_tmpdir_can_do_everything(tmp_path_factory, home, temporary):
    folder = tmp_path_factory.mktemp("homeless")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # pytest makes them private
    folder.chmod(0o777)
    (folder / "a.avi").write_bytes((SAMPLES / "highway.avi").read_bytes())
    places = {"long": folder / ("x" * 100), "read-only": folder / "ro", "missing": folder / "no"}
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "TMPDIR", "VIDX_CACHE", "HF_HOME")}
    env |= {} if home is None else {"HOME": home}
    env |= {"HF_HUB_OFFLINE": "1", "VIDX_ARCHIVE": str(folder / "archive")}
    if temporary is not None:
        env["TMPDIR"] = str(places[temporary])
    places["long"].mkdir(mode=0o777)
    places["read-only"].mkdir(mode=0o555)
    # This user can read everything, as the interpreter may lie in root's home, and write no more than others.
    can_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    become = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *can_read]

    def run(*command, code=0):
        words = [*become, VIDX, *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, env=env, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        return done

    said = run("index", "a.avi").stderr
    assert "file hashes are not kept" in said
    assert "set VIDX_CACHE to a folder" in said
    for command in (
        ("status",),
        ("models",),
        ("sql", "SELECT source FROM videos"),
        ("search", "apple", "--min-score", "-1"),
        ("ask", "What is there?", "--video", "a.avi"),
        ("verify",),
        ("clip", "a.avi@1-2", "out.avi"),
    ):
        run(*command)
    refused = run("index", "a.avi", "--model", "someone/some-model", "--archive", "other", code=2).stderr
    assert refused.splitlines()[-1].startswith("vidx: no model named someone/some-model: ")
    assert ("set HOME" in refused) == (home is None)
    if home is None:
        assert "set HOME" in run("status", "--archive", "~/archive", code=2).stderr
    assert not (folder / "~").exists()
