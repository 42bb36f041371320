"""A process that has imported large libraries, and forks for every command of `vidx`, which then begins at once.

Torch and transformers take seconds to import, and the tests run hundreds of commands. A command is still a process of
its own, with its own arguments, folder, streams and exit code. It imports vidx's own modules itself, and those
libraries that start threads when they are imported.
"""

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

VIDX = Path(sys.executable).parent / "vidx"
LIBRARIES = (
    "av",
    "click",
    "faiss",
    "PIL.Image",
    "pydantic",
    "ray",
    "rich.progress",
    "rich.table",
    "tokenizers",
    "torch",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
)
OWN_VARIABLES = "VIDX_"  # read by vidx alone, so after the fork


class CommandServer:
    """Starts the process, and has commands run by its children. It ends with the process that started it."""

    def __init__(self, more: dict[str, str]) -> None:
        """Starts it.

        Args:
            more: variables that it has besides those of this process.
        """
        self._environment, self._own = _environment(os.environ), _own(os.environ)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, __file__, str(there.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | more,
            )
        self._requests = here

    def can_run(self, environment: dict[str, str]) -> bool:
        """Whether a command may run with these variables: libraries read some of them when they are imported."""
        return _environment(environment) == self._environment

    def is_at_home(self, environment: dict[str, str]) -> bool:
        """Whether these variables are those with which it was started, VIDX's own too."""
        return self.can_run(environment) and _own(environment) == self._own

    def run(
        self,
        arguments: Sequence[str | bytes],
        script: str,
        environment: dict[str, str],
        cwd: str,
        stdout: int,
        stderr: int,
        timeout: float,
    ) -> int:
        """The exit code of a command; below zero where a signal ended it, as subprocess has it.

        Args:
            script: is run in the command's process before it begins.

        Raises:
            subprocess.TimeoutExpired: it did not end in time. It has been killed.
        """
        own = _own(environment)
        request = pickle.dumps((script, [os.fsencode(word) for word in arguments], own, os.fsencode(cwd)))
        here, there = socket.socketpair()
        with here:
            with there, open(os.devnull, "rb") as stdin:
                socket.send_fds(self._requests, [request], [stdin.fileno(), stdout, stderr, there.fileno()])
            here.settimeout(timeout)
            try:
                answer = here.recv(4, socket.MSG_WAITALL)
            except TimeoutError:
                here.settimeout(None)
                here.shutdown(socket.SHUT_WR)
                here.recv(4)
                raise subprocess.TimeoutExpired([VIDX, *arguments], timeout) from None
        assert len(answer) == 4, "the process that runs the commands has died"
        return struct.unpack("i", answer)[0]


def _own(variables: "dict[str, str] | os._Environ[str]") -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(OWN_VARIABLES)}


def _environment(variables: "dict[str, str] | os._Environ[str]") -> dict[str, str]:
    left_out = ("PYTEST_CURRENT_TEST", OWN_VARIABLES)
    return {name: value for name, value in variables.items() if not name.startswith(left_out)}


def serve(requests: socket.socket) -> str:
    """Takes commands, and returns in a child that is to run one; the script to be run before it.

    The process ends when no more can come.
    """
    while True:
        request, handles, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return _begin(pickle.loads(request), handles)
        for handle in handles:
            os.close(handle)
        with contextlib.suppress(ChildProcessError):  # there are none left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _begin(request: tuple, handles: list[int]) -> str:
    """Forks once more: the parent waits for the command and says how it ended, the child goes on as the command."""
    script, arguments, variables, cwd = request
    *streams, answer = handles
    pid = os.fork()
    if pid:
        _wait(pid, socket.socket(fileno=answer))
    os.close(answer)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for name in [name for name in os.environ if name.startswith(OWN_VARIABLES)]:
        del os.environ[name]
    os.environ |= variables
    os.chdir(cwd)
    sys.argv = [str(VIDX), *map(os.fsdecode, arguments)]
    sys.path[0] = str(VIDX.parent)
    return script


def _wait(pid: int, answer: socket.socket) -> None:
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, answer], [], [])
    if ended not in ready:  # whoever asked has no more time, or is gone
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        answer.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    finally:
        os._exit(0)


def _run_to_end(script: str) -> None:
    """Runs the script and the command, and ends as Python does, but frees no objects, which are many here."""
    from pipeline.cli.main import main

    code = 1
    try:
        exec(script, {})
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # then the command that needs it says so
            importlib.import_module(library)
    gc.freeze()
    _run_to_end(serve(socket.socket(fileno=int(sys.argv[1]))))
