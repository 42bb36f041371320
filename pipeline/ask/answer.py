"""answer: a question -> frames -> the model that is shown them -> its answer, with the moments it rests on."""

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
from pipeline.ask.fuse import Showing
from pipeline.ask.moments import adjoin
from pipeline.ask.query import Query, Term, check_text
from pipeline.ask.search import FRAMES_SHOWN, Searcher, SearchLimits
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

MOMENTS = 8  # asked of the search at least; the best ones fill the frames
FRAMES_PER_MOMENT = 16  # more frames than so many for each, and more moments are asked for
EDGE_SECONDS = 5e-4  # shrinks a moment, so that the rounding of ticks to seconds takes in no neighbour
CACHE_BYTES = 1 << 30  # of what was computed of frames, kept for further questions
LENIENCY = 0.1  # below the threshold of a search: the model that is shown the frames may still say no
ANYTHING = -1.0  # a threshold that every frame reaches
MANY_FRAMES = 1000  # and the memory that they take is announced
HEARD = "These are the answers for each stretch of time:"
Say = Callable[[str], None]  # is told what the model says, or what is to be noted


class Over(StrEnum):
    """Which of more frames than the model's context holds it is shown: the best, every so manyth, or all in windows."""

    RETRIEVE = "retrieve"
    STRIDE = "stride"
    WINDOWS = "windows"


@dataclass(frozen=True)
class Asked:
    """How a question is to be answered.

    Attributes:
        frame_limit: at most so many frames. A narrowed range that holds no more is taken whole, without a search; of
            anything else, those of the best moments. None takes every frame within the range.
        fuse: the source of pre-fusion; None takes the best at hand for found frames, the best stored for all.
        over: what becomes of more frames than the context holds; None refuses.
        anyway: take the best frames even where none fits the question.
        most_tokens: length of the answer at most.
        most_words: the same in words; None for no such limit.
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
    """Frames to be shown.

    Attributes:
        frames: in order of video and time.
        moments: what they are of, the best first, or in order of time where nothing was searched for.
        within: the part of the archive that they are from.
        over: why these, where there were more than the context holds.
    """

    frames: tuple[FrameRef, ...]
    moments: tuple[Moment, ...]
    within: Filter = field(default_factory=Filter)
    over: Over | None = None

    def __bool__(self) -> bool:
        return bool(self.frames)


def silent(text: str) -> None:
    """Hears what is streamed or announced, and does nothing."""


class Asker:
    """An archive at one version and its model, held for any number of questions.

    What was computed of shown frames is kept, up to a limit, the last used for longest: the next question about them
    pays for its own words alone.
    """

    def __init__(
        self,
        archive: Archive,
        bundle: Bundle,
        options: ModelOptions = ModelOptions(),
        cache_bytes: int = CACHE_BYTES,
        searcher: Searcher | None = None,
    ):
        """Nothing is loaded before the first question.

        Args:
            archive: what is asked.
            bundle: its model.
            options: how the model is held.
            cache_bytes: how much to keep of shown frames.
            searcher: of the same archive and model, where there is one already.
        Raises:
            UsageError: what the options need is not installed.
        """
        self._archive = archive
        self._bundle = bundle
        options.check_installed()
        self._options = options
        self._cache_bytes = cache_bytes
        self._searcher = searcher or Searcher(archive, bundle)
        self._showings: OrderedDict[tuple, Showing] = OrderedDict()

    def of(self, archive: Archive, searcher: Searcher) -> "Asker":
        """For the same archive at another version, with the model that is loaded."""
        other = copy(self)
        other._archive, other._searcher, other._showings = archive, searcher, OrderedDict()
        return other

    @cached_property
    def _model(self) -> LlavaMini:
        return load_model(self._bundle, self._options, self._cache_bytes)

    @cached_property
    def _held(self) -> Bundle:
        """The bundle, with the context that there is memory for where its engine reserves it."""
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
            question: any text.
            within: the part of the archive that is asked.
            asked: how.
            stream: gets the answer's text piece by piece.
            announce: gets what is worth knowing before something long begins.
        Returns:
            The answer, or None where the range has no frames or none of them fits the question.
        Raises:
            UsageError: an empty question, or more frames than the model's context holds.
        """
        check_text("question", question)
        chosen = self.choose(question, within, asked)
        return self.answer(question, chosen, asked, stream=stream, announce=announce) if chosen else None

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """The frames to show.

        A search would only lose frames where all of a chosen range can be shown, and many a question ("how many are
        there?") says nothing of what a frame shows.
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
        """The model's answer from some frames.

        Args:
            question: any text.
            chosen: the frames; at least one.
            asked: how to answer.
            history: what was asked and answered before, which the model sees too.
            stream, announce: as `ask` takes them.
        Raises:
            UsageError: more frames than the model's context holds.
        """
        ids = prompt_ids(self._tokenizer, question, history)
        room, count, over = frames_that_fit(self._held, ids, asked.most_tokens), len(chosen.frames), asked.over
        if count <= room:
            return self._answer(question, ids, chosen, asked, stream, announce)
        if over is None and asked.frame_limit is not None and self._holds(ids, count, asked):
            over = Over.STRIDE  # so many frames at most were wanted, and the model was trained on fewer
        if over is None or room == 0:
            raise UsageError(self._too_many(ids, count, asked.most_tokens))
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
        """Whether the model's context holds all of it."""
        ids = prompt_ids(self._tokenizer, question, history)
        return len(chosen.frames) <= frames_that_fit(self._held, ids, asked.most_tokens)

    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]:
        """How well a question fits the best of some frames, and from what score on it counts as found."""
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
        """The best moments until the frames are full, the last one thinned out evenly."""
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
        """Moments without a score: the runs of adjoining frames, in order of video and time."""
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
            announce(f"{len(chosen.frames)} frames: about {needed / 1e9:.2g} GB of memory besides the model")
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
        """What is told of what the model says, and why it does not know, where it says so.

        Where the answer is cut, the model is heard out for as long as it may be saying that.
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
        """An answer for each stretch of the frames, and one that the model gives when it has read those."""
        cuts, uris = (
            _windows(chosen.frames, room),
            self._archive.videos.uris({each.video_number for each in chosen.frames}),
        )
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
        else:  # it was trained on single questions, and would not read the answers
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
        """What the model says when it has read the windows' answers, and sees a few frames of all of them."""
        heard = "\n".join(lines)
        last_question = f"{question}\n{HEARD}\n{heard}"
        ids = prompt_ids(self._tokenizer, last_question)
        room = frames_that_fit(self._held, ids, asked.most_tokens)
        if not room:
            raise UsageError(
                f"the answers of {len(lines)} windows with the question and an answer of {asked.most_tokens} tokens "
                f"(--max-tokens) do not fit the {self._held.context_length} tokens of {self._bundle.name}'s context; "
                "narrow with --video, --from and --to, or ask for shorter answers with --max-words"
            )
        fewer = _evenly(chosen.frames, min(room, FRAMES_SHOWN))
        final = replace(chosen, frames=tuple(fewer), over=Over.WINDOWS)
        return self._answer(last_question, ids, final, asked, stream, announce)

    def _showing(self, frames: Sequence[FrameRef], asked: Asked) -> Showing:
        """The frames as they are kept, or shown anew."""
        wanted = asked.fuse or ("stored" if asked.frame_limit is None else "exact")
        key = (wanted, *((frame.part, frame.row) for frame in frames))
        showing = self._showings.pop(key, None)
        if showing is None:
            showing = Showing(self._archive, self._model, frames, wanted, self._cache_bytes)
        self._showings[key] = showing
        return showing

    def _forget(self) -> None:
        """Lets go of what has not been used for longest, down to the limit; the last one stays whatever it takes."""
        while len(self._showings) > 1 and sum(each.size_bytes for each in self._showings.values()) > self._cache_bytes:
            self._showings.popitem(last=False)

    def _holds(self, ids: Sequence[int], frame_count: int, asked: Asked) -> bool:
        """Whether the context does, whatever the model was trained on."""
        return context_needed(self._held, ids, frame_count, asked.most_tokens) <= self._held.context_length

    def _too_many(self, ids: Sequence[int], frame_count: int, most_tokens: int) -> str:
        bundle = self._held
        fit = frames_that_fit(bundle, ids, most_tokens)
        narrow = "narrow with --video, --from and --to, or say with --over which to show: retrieve, stride or windows"
        if fit == bundle.card.most_frames:
            return (
                f"{frame_count} frames are too many at once: {bundle.name} was trained on at most {fit} frames of one "
                f"answer (that is the limit, not its context); {narrow}"
            )
        needed = context_needed(bundle, ids, frame_count, most_tokens)
        return (
            f"{frame_count} frames with the question and an answer of {most_tokens} tokens (--max-tokens) need "
            f"{needed} tokens of context, and {bundle.name} has {bundle.context_length}, room for {fit} frames; "
            f"{narrow}"
        )


def _told(windows: Sequence[WindowAnswer], uris: Mapping[int, str]) -> list[str]:
    """Lines of windows' answers with their times; those that adjoin and say the same are one."""
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
    """The pieces, each added to what was heard."""
    for piece in pieces:
        heard.append(piece)
        yield piece


def _words(pieces: Iterable[str], most: int | None) -> Iterator[str]:
    """Text piece by piece, up to so many words; a space comes with the word after it."""
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
    """Frames in order as stretches of one video each and of about one length, none of more than so many."""
    cuts = []
    for _, group in itertools.groupby(frames, key=lambda frame: frame.video_number):
        own = tuple(group)
        count = -(-len(own) // most)
        bounds = [number * len(own) // count for number in range(count + 1)]
        cuts += [own[start:end] for start, end in itertools.pairwise(bounds)]
    return cuts
