"""The command `vidx`: which commands there are, and how errors become exit codes.

Commands live in cli_*.py and are imported when they are called, so that --help is instant.
"""

import importlib
import signal
import sys
from collections.abc import Iterable

import click

COMMANDS = {
    "index": ("pipeline.cli.index", "Index videos: files, folders, globs and manifests."),
    "search": ("pipeline.cli.search", "Find the moments that a text describes."),
    "export": ("pipeline.cli.search", "Write the moments that a text describes for other programs."),
    "clip": ("pipeline.cli.clip", "Cut a moment out of its video."),
    "ask": ("pipeline.cli.ask", "Answer a question, citing the moments it was answered from."),
    "chat": ("pipeline.cli.chat", "Ask one question after another."),
    "status": ("pipeline.cli.status_sql", "Show what an archive holds."),
    "list": ("pipeline.cli.list", "List the videos of an archive."),
    "sql": ("pipeline.cli.status_sql", "Query the views `videos` and `frames` with SQL."),
    "verify": ("pipeline.cli.care", "Check that every byte of an archive is what was written."),
    "repair": ("pipeline.cli.care", "Take out what is damaged and index it again."),
    "clean": ("pipeline.cli.care", "Remove what an archive shows no more."),
    "compact": ("pipeline.cli.care", "Join small files into larger ones."),
    "delete": ("pipeline.cli.delete", "Take videos out of an archive."),
    "expire": ("pipeline.cli.delete", "Take out videos that were recorded long ago."),
    "evaluate": ("pipeline.cli.evaluate", "Measure how well what is known is found."),
    "models": ("pipeline.cli.models", "List the models at hand."),
    "completion": ("pipeline.cli.completion", "Print a shell's script that completes commands."),
}
FUNCTIONS = {"list": "list_videos"}  # where a command's function has another name, as Python's own is taken
# Ray may end these from C++; `ask` and `chat --address` have nothing to commit, and read the terminal.
IN_OWN_PROCESS = ("index", "repair")


class LazyGroup(click.Group):
    """A group whose commands are imported on use; the short helps stand here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports the one command that is called."""
        if name not in COMMANDS:
            return None
        module, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), FUNCTIONS.get(name, name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """As click does, naming the command that was probably meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}; `vidx --help` lists them")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that a mistyped one resembles, to be added to the error about it."""
    import difflib

    alike = difflib.get_close_matches(word.lower(), known)
    return f" (did you mean {' or '.join(alike)}?)" if alike else ""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vidx")
def vidx() -> None:
    """Index video archives once; search and ask them ever after.

    \b
    vidx index ~/videos                  index a folder into ./vidx-archive
    vidx search "a white van"            list the moments that show it
    vidx ask "When does the van leave?"  an answer with its moments
    """


def main() -> None:
    """Runs a command and ends the process with its exit code."""
    from pipeline.streams import ReaderGone, drop_output, guard_streams
    from storage.errors import VidxError

    guard_streams()
    if sys.argv[1:2] and sys.argv[1] in IN_OWN_PROCESS:
        from pipeline.cluster.supervise import continue_in_own_process

        continue_in_own_process()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = vidx.main(standalone_mode=False)
        sys.stdout.flush()
    except VidxError as error:
        from pipeline.cli.print import note

        note(f"vidx: {error}{error.advice}")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("vidx: interrupted", err=True)
        code = 130
    except ReaderGone:
        drop_output()
        code = 0
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray ends its processes now; another Ctrl-C would only be noise
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _terminate(*_: object) -> None:
    """A scheduler's SIGTERM stops a job as cleanly as Ctrl-C does; some send it twice, to a process and its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
