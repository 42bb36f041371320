"""The command `vidx`: the list of its commands, and the exit codes of errors.

The module of a command is imported when the command is called, so that --help is fast.
"""

import importlib
import sys
from collections.abc import Iterable

import click

COMMANDS = {
    "index": ("pipeline.cli.index", "Index videos: files, folders, globs and manifests."),
    "search": ("pipeline.cli.search", "Find the moments that a text describes."),
    "export": ("pipeline.cli.search", "Write the moments that a text describes to a file."),
    "clip": ("pipeline.cli.clip", "Copy a moment of a video into a new file."),
    "ask": ("pipeline.cli.ask", "Answer a question, and cite the moments."),
    "chat": ("pipeline.cli.chat", "Ask one question after another."),
    "status": ("pipeline.cli.status", "Show what an archive holds."),
    "list": ("pipeline.cli.list", "List the videos of an archive."),
    "sql": ("pipeline.cli.sql", "Query the views `videos` and `frames` with SQL."),
    "verify": ("pipeline.cli.care", "Check an archive against its checksums."),
    "repair": ("pipeline.cli.care", "Take out damaged frames and index their videos again."),
    "clean": ("pipeline.cli.care", "Remove files that an archive does not need any more."),
    "compact": ("pipeline.cli.care", "Join small files into larger ones."),
    "maintain": ("pipeline.cli.care", "Expire, compact, train the index and clean, in one."),
    "delete": ("pipeline.cli.delete", "Take videos out of an archive."),
    "expire": ("pipeline.cli.delete", "Take out old videos."),
    "evaluate": ("pipeline.cli.evaluate", "Measure how well search finds known moments."),
    "models": ("pipeline.cli.models", "List the available models, or download one."),
    "completion": ("pipeline.cli.completion", "Print a script for completion in a shell."),
}
FUNCTIONS = {"list": "list_videos"}  # functions that are not called like their command
ONE_TEXT = ("ask", "sql")  # commands whose argument is one text with spaces
# Ray can end the process of these commands, which have work to commit; see pipeline.cluster.supervise.
IN_OWN_PROCESS = ("index", "repair")


class LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of this name, imported."""
        if name not in COMMANDS:
            return None
        module, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), FUNCTIONS.get(name, name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """As click does; the error suggests similar commands."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}; `vidx --help` lists them")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for an error message: the known words that resemble a mistyped one."""
    import difflib

    alike = difflib.get_close_matches(word.lower(), known)
    return f" (did you mean {' or '.join(alike)}?)" if alike else ""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vidx")
def vidx() -> None:
    """Index video archives; search them and ask questions about them.

    \b
    vidx index ~/videos                  index a folder into ./vidx-archive
    vidx search "a white van"            list the moments that show it
    vidx ask "When does the van leave?"  an answer with its moments
    """


def main() -> None:
    """Runs a command and ends the process with its exit code."""
    from pipeline.cluster.supervise import continue_in_own_process, ignore_interrupts, interrupt_on_sigterm
    from pipeline.streams import ReaderGone, drop_output, guard_streams
    from storage.errors import VidxError

    guard_streams()
    if sys.argv[1:2] and sys.argv[1] in IN_OWN_PROCESS:
        continue_in_own_process()
    interrupt_on_sigterm()
    try:
        code = vidx.main(standalone_mode=False)
        sys.stdout.flush()
    except VidxError as error:
        from pipeline.cli.print import note

        note(f"vidx: {error}{error.advice}")
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        if "unexpected extra argument" in error.message and sys.argv[1:2] and sys.argv[1] in ONE_TEXT:
            click.echo("put a text of several words in quotes", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):  # click turns Ctrl-C at a question into Abort
        click.echo("vidx: interrupted", err=True)
        code = 130
    except ReaderGone:
        drop_output()
        code = 0
    ignore_interrupts()
    sys.exit(code)
