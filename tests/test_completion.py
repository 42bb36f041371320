"""The scripts that `vidx completion` prints complete commands, options, their values and files, in a real shell."""

import os
import pty
import shutil
import subprocess
import threading

import pytest
from conftest import VIDX


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete -o"), ("zsh", "#compdef vidx"), ("fish", "complete --")]
)
def test_each_shell_has_a_script(vidx, shell, words):
    run = vidx("completion", shell)
    assert (run.code, words in run.out, run.err) == (0, True, "")


def test_another_shell_is_refused_with_those_that_there_are(vidx):
    run = vidx("completion", "tcsh")
    assert (run.code, "'bash', 'zsh', 'fish'" in run.err) == (2, True)


@pytest.fixture
def typed(tmp_path):
    """Types a line into a bash that has the script, and gives what it shows until the line has run."""

    def run(line):
        ours, theirs = pty.openpty()
        path = os.pathsep.join([str(VIDX.parent), os.environ["PATH"]])
        shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "PS1": "", "TERM": "dumb", "COLUMNS": "200"},
            start_new_session=True,
        )
        os.close(theirs)
        shown = bytearray()

        def read():
            while True:
                try:
                    shown.extend(os.read(ours, 4096))
                except OSError:  # how Linux says that the other end is closed
                    return

        reader = threading.Thread(target=read)
        reader.start()
        os.write(ours, b'eval "$(vidx completion bash)"\n' + line.encode() + b"\nexit\n")
        shell.wait(timeout=300)
        reader.join(timeout=300)
        os.close(ours)
        return shown.decode()

    return run


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_values_and_files(typed, tmp_path):
    (tmp_path / "only.csv").touch()
    (tmp_path / "a folder").mkdir()
    assert "Usage: vidx models" in typed("vidx mod\t--help")
    assert "--contact-sheet" in typed("vidx search --cont\t--help")
    assert "--fuse patches" in typed("vidx ask x --fuse pat\t--help")
    assert "only.csv" in typed("vidx export on\t--help")
    assert "a\\ folder" in typed("vidx status --archive a\t--help")
    assert "Usage: vidx evaluate retrieval" in typed("vidx eval\tretr\t--help")
