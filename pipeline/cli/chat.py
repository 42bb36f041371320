"""`vidx chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.ask import answer_json, ask_options, asked_of, asker_of, checked_model
from pipeline.cli.empty_filter import why_nothing
from pipeline.cli.models import hint_of
from pipeline.cli.options import (
    archive_option,
    archive_uri,
    check_sheet,
    filter_of,
    filter_options,
    json_option,
    model_option,
    model_options,
    tell_unfinished,
    write_sheet,
)
from pipeline.cli.print import json_text, note, print_moments
from pipeline.results.json_values import moment_json
from pipeline.text import counted, printable
from pipeline.times import clock
from storage.errors import DamagedError, UsageError
from storage.files import source_text

if TYPE_CHECKING:
    from pipeline.ask.chat import Conversation
    from storage.archive.archive import Archive
    from storage.records import Answer
    from workers.models.bundle import Bundle

HELP = """\
/video VIDEO   ask about one video; /video alone: about all videos
/time FROM TO  ask about a range of positions; /time alone: about whole videos
/sources       list the moments of the last answer; /sources FILE.html writes them as a page with pictures
/reset         forget the conversation
/quit          end the conversation; the end of the input does this too"""

COMMANDS = ("/video", "/time", "/sources", "/reset", "/quit", "/exit", "/help")


@click.command()
@archive_option
@filter_options
@ask_options
@model_option
@model_options
@json_option
def chat(archive_dir: str, as_json: bool, **options: Any) -> None:
    """Ask one question after another. The model stays loaded and sees the earlier questions and answers.

    The first question is answered from the moments that fit it best. Later questions are about the same moments until
    one fits other moments better. Ctrl-C stops an answer. /help lists the commands.

    Questions can come from a file or a pipe, one per line. --json prints one line of JSON per answer.

    \b
    vidx chat
    vidx chat --video bottles.mp4 --from 12 --to 30
    vidx chat --json < questions.txt

    Exit code 4: the questions come from a file or a pipe, and the chosen part of the archive has no frames.
    """
    from io import TextIOWrapper

    from storage.archive.archive import open_archive

    signal.signal(signal.SIGTERM, _end)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # only a line that is no text is refused
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
            note(f"{bundle.name} was trained on single questions: it does not see earlier ones")
    code = 0
    for line in _lines():
        try:
            if not turns.take(line.strip()):
                break
        except UsageError as error:
            note(str(error))
        except DamagedError as error:  # another question may not need the damaged file
            note(f"{error}{error.advice}")
            code = error.exit_code
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
            note("stopped")
    if not (code or sys.stdin.isatty() or talk.within.rows(archive)):
        if not turns.question_count:
            note(f"nothing found: {why_nothing(archive, talk.within)}")
        code = 4
    if code:
        sys.exit(code)


def _end(*_: object) -> None:
    """Ends the conversation on SIGTERM; Ctrl-C only stops an answer."""
    sys.exit(128 + signal.SIGTERM)


def _lines() -> Iterator[str]:
    """The lines that are typed on a terminal, or those of standard input."""
    if not sys.stdin.isatty():
        yield from iter(sys.stdin.readline, "")  # to end a `yield from sys.stdin` early would close it
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()


class _Turns:
    """Answers questions and carries out commands.

    Attributes:
        question_count: questions so far.
    """

    def __init__(self, archive: Archive, bundle: Bundle, talk: Conversation, options: dict[str, Any], as_json: bool):
        self._archive = archive
        self._bundle = bundle
        self._talk = talk
        self._options = options
        self._as_json = as_json
        self.question_count = 0

    def take(self, line: str) -> bool:
        """Handles one line; False ends the conversation."""
        from pipeline.cli.main import did_you_mean

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
            raise UsageError(f"{command}: no such command{did_you_mean(command, COMMANDS)}; /help lists all")
        return True

    def _narrow(self, **changes: str | None) -> None:
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
        def stream(text: str) -> None:
            if not self._as_json:
                click.echo(text, nl=False)
                sys.stdout.flush()

        self.question_count += 1
        if not sys.stdin.isatty() and not self._as_json:
            click.echo(f"> {question}")
        answer = self._talk.ask(question, stream, note)
        if self._as_json:
            click.echo(json_text(answer_json(question, answer, self._bundle.model_id, self._bundle)))
        elif answer is None and not self._talk.within.rows(self._archive):
            note(f"nothing found: {why_nothing(self._archive, self._talk.within)}")
        elif answer is None:
            note("not found in this archive: no frame fits the question; choose a part of it with /video and /time")
        else:
            click.echo()
            self._cite(answer)

    def _cite(self, answer: Answer) -> None:
        first, others = answer.moments[0], len(answer.moments) - 1
        place = f"{source_text(first.uri).rsplit('/', 1)[-1]} {clock(first.start_seconds)}-{clock(first.end_seconds)}"
        more = f" and {counted(others, 'more moment')}; /sources lists them" if others else ""
        note(f"[{printable(place)}{more}; {counted(answer.frame_count, 'frame')}, {answer.fuse}]")
        if answer.fuse_note:
            note(answer.fuse_note)
        if hint := hint_of(self._bundle, answer):
            note(hint)

    def _sources(self, file: str) -> None:
        answer = self._talk.last
        if answer is None:
            note("there is no answer yet")
        elif file:
            options = {"show": False, "contact_sheet": file}
            check_sheet(options)
            write_sheet(options, answer.question, self._archive, answer.moments)
        elif self._as_json:
            click.echo(json_text({"moments": [moment_json(moment) for moment in answer.moments]}))
        else:
            print_moments(answer.moments)
