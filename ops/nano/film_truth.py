"""The truth beside rendered videos: moments with their captions, and questions with their answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ops.nano.captions import whole_caption
from ops.nano.questions import (
    UNKNOWN,
    UNKNOWN_ANSWER,
    Question,
    moment_questions,
    reply,
    time_questions,
    word,
)
from ops.nano.scenes import Script, Sight, sight
from ops.nano.unknown import word_unknown

WINDOW_FRAMES = 8  # of a question over time, one a second
_LEAST_MOMENT = 1.0  # seconds
_STEP = 4  # seconds from one window to the next
_PER_MOMENT, _PER_WINDOW = 6, 4
_UNKNOWN_SHARE = 0.1
_CASUAL = 0.3


@dataclass(frozen=True)
class Moment:
    """Seconds in which the same things are whole and nothing comes or goes."""

    start: float
    end: float
    sight: Sight

    @property
    def text(self) -> str:
        """All that can be seen."""
        return whole_caption(self.sight)


@dataclass(frozen=True)
class Asked:
    """A question about a range of a video, in words, and its answer."""

    start: float
    end: float
    kind: str
    question: str
    answer: str


def moments(script: Script) -> Iterator[Moment]:
    """All of them that last at least a second, in order."""
    for shot in script.shots:
        edges = {shot.start + shot.fade_in, shot.end - shot.fade_out}
        for stay in shot.stays:
            edges |= {stay.enters, stay.settled, stay.leaves, stay.gone}
        ordered = sorted(edge for edge in edges if shot.start <= edge <= shot.end)
        for start, end in pairwise(ordered):
            seen = sight(script, (start + end) / 2)
            if end - start >= _LEAST_MOMENT and not seen.partial and seen.background is not None:
                yield Moment(start, end, seen)


def ask(script: Script, source: np.random.Generator) -> list[Asked]:
    """Questions about moments and over time whose answers hold whichever frames of their range are looked at.

    A range begins more than a second into its moment, so that of frames taken once a second even the one that is still
    shown at its start shows the moment. A window over time holds eight such frames.
    """
    asked = []
    for moment in moments(script):
        start, end = moment.start + 1.0 + 1 / script.rate, moment.end - 0.05
        if end - start >= 1.0:
            sights = [sight(script, time) for time in np.linspace(moment.start, moment.end - 0.01, 12)]
            asked += _worded(source, start, end, moment_questions(source, sights, _PER_MOMENT))
    for first in range(0, int(script.duration) - WINDOW_FRAMES, _STEP):
        shifted = [_samples(script, first - early) for early in (0.0, 0.5 / script.rate, 1 / script.rate)]
        found = time_questions(source, shifted[0], _PER_WINDOW)
        found = [(question, answer) for question, answer in found if {reply(question, s) for s in shifted} == {answer}]
        asked += _worded(source, first + 0.2, first + WINDOW_FRAMES - 0.2, found)
    return asked


def _samples(script: Script, first: float) -> list[Sight]:
    """What a frame a second shows, from an instant on."""
    return [sight(script, max(0.0, first + number)) for number in range(WINDOW_FRAMES)]


def _worded(
    source: np.random.Generator, start: float, end: float, found: Sequence[tuple[Question, str]]
) -> Iterator[Asked]:
    for question, answer in found:
        yield Asked(start, end, question.kind, word(question, source, _CASUAL), answer)
    if found and source.random() < _UNKNOWN_SHARE:
        yield Asked(start, end, UNKNOWN, word_unknown(source, _CASUAL, held_out=True), UNKNOWN_ANSWER)
