"""`vidx chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.ask import answer_json, ask_options, asked_of, asker_of, checked_model
from pipeline.cli.options import (
    archive_option,
    archive_uri,
    filter_of,
    filter_options,
    json_option,
    model_option,
    model_options,
    tell_unfinished,
)

if TYPE_CHECKING:
    from pipeline.ask.chat import Conversation
    from storage.archive.archive import Archive
    from storage.records import Answer
    from workers.models.bundle import Bundle

HELP = """\
/video VIDEO   ask about one video; /video alone: about all
/time FROM TO  ask about these positions of it; /time alone: about all of it
/sources       the moments that the last answer rests on; /sources FILE.html: with pictures, as a page
/reset         forget what was said
/quit          end; so does the end of the input"""

COMMANDS = ("/video", "/time", "/sources", "/reset", "/quit", "/exit", "/help")


@click.command()
@archive_option
@filter_options
@ask_options
@model_option
@model_options
@json_option
def chat(archive_dir: str, as_json: bool, **options: Any) -> None:
    """Ask one question after another; the model stays loaded, and sees what was said before.

    A question is answered from the moments that fit it best. What comes after it is about the same moments until it
    finds others. Ctrl-C stops an answer; /help lists the commands. Questions may come from a file or a pipe, one a
    line; --json gives a line of JSON for each answer.

    \b
    vidx chat
    vidx chat --video bottles.mp4 --from 12 --to 30
    vidx chat --json < questions.txt
    """
    from io import TextIOWrapper

    from pipeline.cli.print import note
    from pipeline.results.text import counted
    from storage.archive.archive import open_archive
    from storage.errors import DamagedError, UsageError

    signal.signal(signal.SIGTERM, _end)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that what is no text is refused by its line
    archive = open_archive(archive_uri(archive_dir))
    within = filter_of(archive, options)
    tell_unfinished(archive, within)
    asker, bundle = asker_of(archive, options, *checked_model(archive, options), keeps=True)
    from pipeline.ask.chat import Conversation  # with torch

    talk = Conversation(asker, bundle, within, asked_of(options))
    turns = _Turns(archive, bundle, talk, options, as_json)
    if sys.stdin.isatty():
        note(f"{counted(archive.videos.frame_count(), 'frame')}, model {bundle.name}; /help lists the commands")
        if not bundle.card.takes_history:
            note(f"{bundle.name} was trained on single questions: it does not see those before")
    code = 0
    for line in _lines():
        try:
            if not turns.take(line.strip()):
                break
        except UsageError as error:
            note(str(error))
        except DamagedError as error:  # which another question may not meet
            note(f"{error}{error.advice}")
            code = error.exit_code
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
            note("stopped")
    if code:
        sys.exit(code)


def _end(*_: object) -> None:
    """A SIGTERM ends a conversation, where Ctrl-C stops an answer alone."""
    sys.exit(128 + signal.SIGTERM)


def _lines() -> Iterator[str]:
    """What is typed, with the terminal's editing, or else the lines of the standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - makes input() edit and remember
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()


class _Turns:
    """Carries out what is typed."""

    def __init__(self, archive: Archive, bundle: Bundle, talk: Conversation, options: dict[str, Any], as_json: bool):
        self._archive = archive
        self._bundle = bundle
        self._talk = talk
        self._options = options
        self._as_json = as_json

    def take(self, line: str) -> bool:
        """One line; False ends the conversation."""
        from pipeline.cli.main import did_you_mean
        from storage.errors import UsageError

        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._ask(line)
        elif command in ("/quit", "/exit"):
            return False
        elif command == "/help":
            click.echo(HELP, err=True)
        elif command == "/reset":
            self._talk.reset()
        elif command == "/video":
            self._narrow(video=rest or None, from_text=None, to_text=None)
        elif command == "/time":
            times = rest.split()
            if len(times) not in (0, 2):
                raise UsageError(f"{line}: give two positions, as in /time 0:10:00 0:12:30, or none")
            start, end = times or (None, None)
            self._narrow(from_text=start, to_text=end)
        elif command == "/sources":
            self._sources(rest)
        else:
            raise UsageError(f"{command}: no such command{did_you_mean(command, COMMANDS)}; /help lists them")
        return True

    def _narrow(self, **changes: str | None) -> None:
        from pipeline.cli.empty_filter import why_nothing
        from pipeline.cli.print import note
        from pipeline.results.text import counted

        options = self._options | changes
        self._talk.narrow(filter_of(self._archive, options))
        tell_unfinished(self._archive, self._talk.within)
        self._options = options
        frames = self._talk.within.frames(self._archive)
        if frames:
            note(counted(len(frames), "frame"))
        else:
            note(f"nothing there: {why_nothing(self._archive, self._talk.within)}; choose another /video or /time")

    def _ask(self, question: str) -> None:
        from pipeline.cli.empty_filter import why_nothing
        from pipeline.cli.print import json_line, note

        def stream(text: str) -> None:
            if not self._as_json:
                click.echo(text, nl=False)
                sys.stdout.flush()

        if not sys.stdin.isatty() and not self._as_json:
            click.echo(f"> {question}")
        answer = self._talk.ask(question, stream, note)
        if self._as_json:
            click.echo(json_line(answer_json(question, answer, self._bundle.model_id, self._bundle)))
        elif answer is None and not self._talk.within.rows(self._archive):
            note(f"nothing found: {why_nothing(self._archive, self._talk.within)}")
        elif answer is None:
            note("not found in this archive: no frame fits the question; /video and /time say what it is about")
        else:
            click.echo()
            self._cite(answer)

    def _cite(self, answer: Answer) -> None:
        from pipeline.cli.models import hint_of
        from pipeline.cli.print import note
        from pipeline.results.text import counted, printable
        from pipeline.times import clock
        from storage.files import source_text

        first, others = answer.moments[0], len(answer.moments) - 1
        place = f"{source_text(first.uri).rsplit('/', 1)[-1]} {clock(first.start_seconds)}-{clock(first.end_seconds)}"
        more = f" and {counted(others, 'more moment')}, /sources lists them" if others else ""
        note(f"[{printable(place)}{more}; {counted(answer.frame_count, 'frame')}, {answer.fuse}]")
        if answer.fuse_note:
            note(answer.fuse_note)
        if hint := hint_of(self._bundle, answer):
            note(hint)

    def _sources(self, file: str) -> None:
        from pipeline.cli.print import json_line, note, print_moments
        from pipeline.results.json_values import moment_json

        answer = self._talk.last
        if answer is None:
            note("nothing has been answered yet")
        elif file:
            from pipeline.results.contact_sheet import SUFFIXES, write_contact_sheet
            from pipeline.results.output import check_output

            check_output(file, SUFFIXES)
            write_contact_sheet(file, answer.question, self._archive, answer.moments)
            note(f"contact sheet: {file}")
        elif self._as_json:
            click.echo(json_line({"moments": [moment_json(moment) for moment in answer.moments]}))
        else:
            print_moments(answer.moments)
