"""answer: a question -> the frames to show -> the model's answer, with the moments of these frames."""

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from pipeline.ask.filter import Filter
from pipeline.ask.moments import adjoin
from pipeline.ask.query import Query, Term, check_text
from pipeline.ask.search import FRAMES_SHOWN, Searcher, SearchLimits
from pipeline.ask.showing import Showing
from pipeline.times import clock
from storage.archive.archive import Archive
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Answer, FrameRef, Moment, WindowAnswer
from workers.llm.engine import ModelOptions, SamplingParams
from workers.llm.memory import answer_bytes
from workers.llm.model import LlavaMini, load_model
from workers.llm.prompt import Turns, context_needed, frames_that_fit, load_tokenizer, prompt_ids, stream_text
from workers.models.bundle import Bundle

MOMENTS = 8  # minimum number that the search is asked for
FRAMES_PER_MOMENT = 16  # the search is asked for one moment per so many frames
EDGE_SECONDS = 5e-4  # taken off a moment, so that rounding of ticks to seconds adds no neighbouring frame
CACHE_BYTES = 1 << 30  # limit of what is kept of shown frames for further questions
LENIENCY = 0.1  # lowers the threshold of the search; the model that sees the frames can still answer "no"
ANYTHING = -1.0  # a threshold that every frame reaches
MANY_FRAMES = 1000  # from this number on, the memory that the answer needs is announced
HEARD = "These are the answers for each stretch of time:"
Say = Callable[[str], None]  # gets pieces of an answer, or notes


class Over(StrEnum):
    """What to show if the context cannot hold all frames: the best ones, evenly spaced ones, or all, in windows."""

    RETRIEVE = "retrieve"
    STRIDE = "stride"
    WINDOWS = "windows"


@dataclass(frozen=True)
class Asked:
    """The settings of an answer.

    Attributes:
        frame_limit: maximum number of frames to show. If a filter leaves no more frames, all of them are shown;
            otherwise those of the best moments. None shows all frames.
        fuse: the source of pre-fusion; None for the best available, or the best stored one if all frames are shown.
        over: what to do if the context cannot hold all frames; None refuses.
        anyway: show the best frames even if none fits the question.
        most_tokens: maximum length of the answer in tokens.
        most_words: maximum length of the answer in words; None for no limit.
        sampling: how each token is chosen.
    """

    frame_limit: int | None = FRAMES_SHOWN
    fuse: str | None = None
    over: Over | None = None
    anyway: bool = False
    most_tokens: int = 128
    most_words: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Chosen:
    """The frames to show.

    Attributes:
        frames: in order of video and time.
        moments: the moments that the frames are from, best first, or in order of time if there was no search.
        within: the part of the archive.
        over: how the frames were chosen, if the context could not hold all.
    """

    frames: tuple[FrameRef, ...]
    moments: tuple[Moment, ...]
    within: Filter = field(default_factory=Filter)
    over: Over | None = None

    def __bool__(self) -> bool:
        return bool(self.frames)


def silent(text: str) -> None:
    """Ignores pieces of an answer, or notes."""


class Asker:
    """Answers questions about one version of an archive, with its model loaded.

    What was computed of shown frames is kept, up to a limit, so that another question about these frames is faster. The
    least recently used frames are dropped first.
    """

    def __init__(
        self,
        archive: Archive,
        bundle: Bundle,
        options: ModelOptions = ModelOptions(),
        cache_bytes: int = CACHE_BYTES,
        searcher: Searcher | None = None,
    ):
        """Loads nothing before the first question.

        Args:
            cache_bytes: limit of what is kept of shown frames.
            searcher: for the same archive and model, if there is one already.
        Raises:
            UsageError: a library that the options need is not installed.
        """
        self._archive = archive
        self._bundle = bundle
        options.check_installed()
        self._options = options
        self._cache_bytes = cache_bytes
        self._searcher = searcher or Searcher(archive, bundle)
        self._showings: OrderedDict[tuple, Showing] = OrderedDict()

    def of(self, archive: Archive, searcher: Searcher) -> "Asker":
        """An asker for another version of the archive, which uses the same loaded model."""
        other = copy(self)
        other._archive, other._searcher, other._showings = archive, searcher, OrderedDict()
        return other

    @cached_property
    def _model(self) -> LlavaMini:
        return load_model(self._bundle, self._options, self._cache_bytes)

    @cached_property
    def _held(self) -> Bundle:
        """The bundle; its context is shorter if the engine has reserved memory for a shorter one."""
        if not self._options.reserves_memory:
            return self._bundle
        most, rows = self._model.engine.most_rows, self._bundle.context_length
        rows = rows if most is None else min(rows, most)
        return replace(self._bundle, config=replace(self._bundle.config, context_length=rows))

    @cached_property
    def _tokenizer(self):
        return load_tokenizer(self._bundle)

    def ask(
        self, question: str, within: Filter, asked: Asked, *, stream: Say = silent, announce: Say = silent
    ) -> Answer | None:
        """The model's answer from the frames that fit the question best.

        Args:
            stream: gets the text of the answer, piece by piece.
            announce: gets notes before long steps.
        Returns:
            The answer; None if there are no frames, or none fits the question.
        Raises:
            UsageError: the question is empty, or the model's context cannot hold all frames.
        """
        check_text("question", question, "ask something")
        chosen = self.choose(question, within, asked)
        return self.answer(question, chosen, asked, stream=stream, announce=announce) if chosen else None

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """The frames to show for a question.

        If all frames of a chosen part can be shown, there is no search: it would only lose frames, and a question such
        as "how many are there?" does not describe any frame.
        """
        if asked.frame_limit is None or not within.is_everything:
            frames = within.frames(self._archive)
            if asked.frame_limit is None or len(frames) <= asked.frame_limit:
                return Chosen(tuple(frames), self._stretches(frames), within)
        most = self._bundle.card.most_frames or asked.frame_limit
        return self._retrieve(question, within, min(asked.frame_limit, most), asked.anyway)

    def answer(
        self,
        question: str,
        chosen: Chosen,
        asked: Asked,
        *,
        history: Turns = (),
        stream: Say = silent,
        announce: Say = silent,
    ) -> Answer:
        """The model's answer from the chosen frames (at least one).

        Args:
            history: earlier questions and answers, which the model sees too.
            stream, announce: as for `ask`.
        Raises:
            UsageError: the model's context cannot hold all frames.
        """
        ids = prompt_ids(self._tokenizer, question, history)
        room, count, over = frames_that_fit(self._held, ids, asked.most_tokens), len(chosen.frames), asked.over
        if count <= room:
            return self._answer(question, ids, chosen, asked, stream, announce)
        if over is None and asked.frame_limit is not None and self._holds(ids, count, asked):
            over = Over.STRIDE  # --frames is a maximum, and the model was trained on fewer frames
        if over is None or room == 0:
            raise UsageError(self._too_many(ids, count, asked.most_tokens, chosen.within))
        if over is Over.WINDOWS:
            return self._answer_by_windows(question, chosen, room, asked, stream, announce)
        if over is Over.RETRIEVE:
            fewer = self._retrieve(question, chosen.within, room, True)
        else:
            fewer = replace(chosen, frames=tuple(_evenly(chosen.frames, room)))
        fewer = replace(fewer, over=over)
        why = f"--over {over}" if asked.over else f"evenly spread; {self._bundle.name} was trained on at most {room}"
        announce(f"{len(fewer.frames)} of {count} frames are shown ({why})")
        return self._answer(question, ids, fewer, asked, stream, announce)

    def fits(self, question: str, chosen: Chosen, asked: Asked, history: Turns) -> bool:
        """Whether the model's context can hold the frames, the history and the question."""
        ids = prompt_ids(self._tokenizer, question, history)
        return len(chosen.frames) <= frames_that_fit(self._held, ids, asked.most_tokens)

    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]:
        """The best score of some frames for a question, and the lowest score of a hit."""
        score, threshold = self._searcher.best_score(Query((Term(question),)), frames)
        return score, threshold.score

    # --- choosing

    def _retrieve(self, question: str, within: Filter, frame_limit: int, anyway: bool) -> Chosen:
        query = Query((Term(question),))
        moments = max(MOMENTS, -(-frame_limit // FRAMES_PER_MOMENT))
        wanted = SearchLimits(moments, ANYTHING) if anyway else SearchLimits(moments, leniency=LENIENCY)
        found = self._searcher.search(query, within, wanted).moments
        return replace(self._of_moments(found, frame_limit), within=within)

    def _of_moments(self, found: Sequence[Moment], frame_limit: int) -> Chosen:
        """Frames of the best moments, up to the limit; of the last moment, evenly spaced ones if not all fit."""
        moments: list[Moment] = []
        frames: list[FrameRef] = []
        for moment in found:
            room = frame_limit - len(frames)
            if room == 0:
                break
            start, end = moment.start_seconds + EDGE_SECONDS, moment.end_seconds - EDGE_SECONDS
            end = max(end, start + EDGE_SECONDS)
            frames += _evenly(self._archive.frames.find([moment.video_number], start, end), room)
            moments.append(moment)
        frames.sort(key=lambda frame: (frame.video_number, frame.ticks))
        return Chosen(tuple(frames), tuple(moments))

    def _stretches(self, frames: Sequence[FrameRef]) -> tuple[Moment, ...]:
        """Moments without a score: the runs of neighbouring frames, in order of video and time."""
        uris = self._archive.videos.uris({frame.video_number for frame in frames})
        runs: list[list[FrameRef]] = []
        for frame in frames:
            if runs and runs[-1][-1].video_number == frame.video_number and adjoin(runs[-1][-1], frame):
                runs[-1].append(frame)
            else:
                runs.append([frame])
        moments = []
        for run in runs:
            first, last = run[0], run[-1]
            uri, end = uris[first.video_number], last.time_seconds + last.duration_seconds
            moments.append(
                Moment(first.video_id, first.video_number, uri, first.time_seconds, end, first.time_seconds, None)
            )
        return tuple(moments)

    # --- answering

    def _answer(
        self, question: str, ids: Sequence[int], chosen: Chosen, asked: Asked, stream: Say, announce: Say
    ) -> Answer:
        rows = context_needed(self._bundle, ids, len(chosen.frames), asked.most_tokens)
        needed = answer_bytes(self._bundle, rows, is_reserved=self._options.reserves_memory)
        if len(chosen.frames) >= MANY_FRAMES:
            announce(f"{len(chosen.frames)} frames need about {needed / 1e9:.2g} GB of memory besides the model")
        showing = self._showing(chosen.frames, asked)
        bytes_read = showing.video_bytes_read
        reply = showing.reply(ids, asked.most_tokens, asked.sampling)
        text, unknown = self._tell(stream_text(self._tokenizer, reply), asked.most_words, stream)
        self._forget()
        return Answer(
            question=question,
            text=text,
            moments=chosen.moments,
            fuse=showing.source,
            fuse_note=showing.note,
            frame_count=len(chosen.frames),
            video_bytes_read=showing.video_bytes_read - bytes_read,
            over=str(chosen.over or ""),
            memory_bytes=needed,
            unknown=unknown,
        )

    def _tell(self, said: Iterable[str], most_words: int | None, stream: Say) -> tuple[str, str]:
        """The answer, cut to `most_words`; and the reason if the answer means "I do not know", else an empty text.

        The model continues beyond the cut while its text may still become such an answer.
        """
        card, told = self._bundle.card, []
        heard: list[str] = []
        with closing(_listened(said, heard)) as pieces:
            for piece in _words(pieces, most_words):
                stream(piece)
                told.append(piece)
            while card.begins_unknown("".join(heard)) and next(pieces, None) is not None:
                pass
        return "".join(told), card.why_unknown("".join(heard)) or ""

    def _answer_by_windows(
        self, question: str, chosen: Chosen, room: int, asked: Asked, stream: Say, announce: Say
    ) -> Answer:
        """An answer for each window of frames, and a last one that the model gives from these answers."""
        cuts = _windows(chosen.frames, room)
        uris = self._archive.videos.uris({each.video_number for each in chosen.frames})
        announce(f"{len(chosen.frames)} frames are shown in {len(cuts)} windows (--over {Over.WINDOWS})")
        ids = prompt_ids(self._tokenizer, question)
        windows, answers, lines = [], [], []
        for frames in cuts:
            one = self._answer(question, ids, Chosen(frames, self._stretches(frames)), asked, silent, announce)
            first, last = frames[0], frames[-1]
            uri, end = uris[first.video_number], last.time_seconds + last.duration_seconds
            windows.append(WindowAnswer(uri, first.time_seconds, end, one.text, one.unknown))
            answers.append(one)
            lines += _told(windows[-1:], uris)
            announce(lines[-1])
        if self._bundle.card.takes_history:
            whole = self._answer_from_answers(question, lines, chosen, asked, stream, announce)
        else:  # the model was trained on single questions, and cannot read the answers
            text = "\n".join(_told(windows, uris))
            stream(text)
            whole = replace(answers[-1], text=text, moments=chosen.moments, over=str(Over.WINDOWS), unknown="")
        answers.append(whole)
        return replace(
            whole,
            question=question,
            frame_count=len(chosen.frames),
            windows=tuple(windows),
            fuse_note=next((each.fuse_note for each in answers if each.fuse_note), ""),
            video_bytes_read=sum(each.video_bytes_read for each in answers),
            memory_bytes=max(each.memory_bytes for each in answers),
            unknown=windows[0].unknown if all(each.unknown for each in windows) else whole.unknown,
        )

    def _answer_from_answers(
        self, question: str, lines: Sequence[str], chosen: Chosen, asked: Asked, stream: Say, announce: Say
    ) -> Answer:
        """The model's answer from the answers of the windows and a few frames of all of them."""
        heard = "\n".join(lines)
        last_question = f"{question}\n{HEARD}\n{heard}"
        ids = prompt_ids(self._tokenizer, last_question)
        room = frames_that_fit(self._held, ids, asked.most_tokens)
        if not room:
            raise UsageError(
                f"the answers of {len(lines)} windows, the question and an answer of {asked.most_tokens} tokens "
                f"(--max-tokens) do not fit the {self._held.context_length} tokens of {self._bundle.name}'s context; "
                "choose a smaller part with --video, --from and --to, or ask for shorter answers with --max-words"
            )
        fewer = _evenly(chosen.frames, min(room, FRAMES_SHOWN))
        final = replace(chosen, frames=tuple(fewer), over=Over.WINDOWS)
        return self._answer(last_question, ids, final, asked, stream, announce)

    def _showing(self, frames: Sequence[FrameRef], asked: Asked) -> Showing:
        """The frames for the model, from the cache if they were shown before."""
        wanted = asked.fuse or ("stored" if asked.frame_limit is None else "exact")
        key = (wanted, *((frame.part, frame.row) for frame in frames))
        showing = self._showings.pop(key, None)
        if showing is None:
            showing = Showing(self._archive, self._model, frames, wanted, self._cache_bytes)
        self._showings[key] = showing
        return showing

    def _forget(self) -> None:
        """Drops the least recently used frames until the limit holds; the last used ones always stay."""
        while len(self._showings) > 1 and sum(each.size_bytes for each in self._showings.values()) > self._cache_bytes:
            self._showings.popitem(last=False)

    def _holds(self, ids: Sequence[int], frame_count: int, asked: Asked) -> bool:
        """Whether the context can hold all frames, even if the model was trained on fewer."""
        return context_needed(self._held, ids, frame_count, asked.most_tokens) <= self._held.context_length

    def _too_many(self, ids: Sequence[int], frame_count: int, most_tokens: int, within: Filter) -> str:
        bundle = self._held
        fit = frames_that_fit(bundle, ids, most_tokens)
        options = "--from and --to" if within.video is not None else "--video, --from and --to"
        narrow = f"choose a smaller part with {options}, or give --over retrieve, stride or windows"
        if fit == bundle.card.most_frames:
            return (
                f"{frame_count} frames are too many for one answer: {bundle.name} was trained on at most {fit} frames "
                f"(its context could hold more); {narrow}"
            )
        needed = context_needed(bundle, ids, frame_count, most_tokens)
        return (
            f"{frame_count} frames, the question and an answer of {most_tokens} tokens (--max-tokens) need {needed} "
            f"tokens of context, but {bundle.name} has {bundle.context_length}, enough for {fit} frames; {narrow}"
        )


def _told(windows: Sequence[WindowAnswer], uris: Mapping[int, str]) -> list[str]:
    """One line per window, with its times and answer; neighbouring windows with the same answer share a line."""
    joined: list[WindowAnswer] = []
    for window in windows:
        last = joined[-1] if joined else None
        is_same = last is not None and (last.uri, last.text) == (window.uri, window.text)
        if last is not None and is_same and window.start_seconds <= last.end_seconds + EDGE_SECONDS:
            joined[-1] = replace(last, end_seconds=window.end_seconds)
        else:
            joined.append(window)
    names = {uri: f"{source_text(uri).rsplit('/', 1)[-1]} " if len(uris) > 1 else "" for uri in uris.values()}
    return [
        f"{names[each.uri]}{clock(each.start_seconds)} to {clock(each.end_seconds)}: {each.text}" for each in joined
    ]


def _evenly(frames: Sequence[FrameRef], count: int) -> list[FrameRef]:
    if len(frames) <= count:
        return list(frames)
    return [frames[(2 * i + 1) * len(frames) // (2 * count)] for i in range(count)]


def _listened(pieces: Iterable[str], heard: list[str]) -> Generator[str, None, None]:
    """The pieces; each is appended to `heard` when it comes."""
    for piece in pieces:
        heard.append(piece)
        yield piece


def _words(pieces: Iterable[str], most: int | None) -> Iterator[str]:
    """The text, piece by piece, up to a number of words; a space comes with the word after it."""
    if most is None:
        yield from pieces
        return
    count, in_word, held = 0, False, ""
    for piece in pieces:
        for run in re.findall(r"\s+|\S+", piece):
            if run.isspace():
                in_word, held = False, held + run
                continue
            count += not in_word
            if count > most:
                return
            yield held + run
            in_word, held = True, ""
    if held:
        yield held


def _windows(frames: Sequence[FrameRef], most: int) -> list[tuple[FrameRef, ...]]:
    """The frames in windows of at most `most`, each within one video; windows of a video have about the same size."""
    cuts = []
    for _, group in itertools.groupby(frames, key=lambda frame: frame.video_number):
        own = tuple(group)
        count = -(-len(own) // most)
        bounds = [number * len(own) // count for number in range(count + 1)]
        cuts += [own[start:end] for start, end in itertools.pairwise(bounds)]
    return cuts
