"""chat: questions about an archive, one after another, with the frames and the words of those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from pipeline.ask.answer import Asked, Chosen, Say, silent
from pipeline.ask.filter import Filter
from pipeline.ask.query import check_text
from storage.records import Answer, FrameRef
from workers.llm.prompt import Turns
from workers.models.bundle import Bundle

TOPIC_SHARE = 0.25  # of the threshold: what else fits a question by so much better is another topic


class AnyAsker(Protocol):
    """What answers: an Asker here, or one on a cluster (pipeline/cluster/remote.py)."""

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen:
        """As Asker.choose."""

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
        """As Asker.answer."""

    def fits(self, question: str, chosen: Chosen, asked: Asked, history: Turns) -> bool:
        """As Asker.fits."""

    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]:
        """As Asker.best_score."""


class Conversation:
    """A conversation about a part of an archive.

    The model is shown what it was shown before for as long as the topic stays: where a chosen range is shown whole,
    while a question finds nothing, and while what it finds fits it hardly better than what is shown (TOPIC_SHARE), as
    it is with "how many are there?". Else the moments that it finds take their place.

    Attributes:
        within: what is asked about.
        last: the answer given last.
    """

    def __init__(self, asker: AnyAsker, bundle: Bundle, within: Filter, asked: Asked):
        """Nothing is loaded before the first question.

        Args:
            asker: the archive and its model.
            bundle: the model; one that takes single questions alone does not see those before.
            within: the part of the archive.
            asked: how to answer.
        """
        self.within = within
        self.last: Answer | None = None
        self._asker = asker
        self._bundle = bundle
        self._asked = asked
        self._turns: list[tuple[str, str]] = []
        self._shown: Chosen | None = None

    def narrow(self, within: Filter) -> None:
        """Asks about another part of the archive from now on, and forgets what was said of this one."""
        self.within = within
        self.reset()

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self._turns, self._shown, self.last = [], None, None

    def ask(self, question: str, stream: Callable[[str], None], announce: Callable[[str], None]) -> Answer | None:
        """The answer; None where nothing is found, and nothing has been shown before.

        What was streamed of an answer that is broken off stays part of the conversation.

        Args:
            question: any text.
            stream: gets the answer's text piece by piece.
            announce: gets what is worth knowing before it.
        Raises:
            UsageError: an empty question, or one that does not fit the model's context by itself.
        """
        check_text("question", question)
        chosen = self._choose(question)
        if not chosen:
            return None
        history = self._history(question, chosen, announce)
        stays = chosen is self._shown
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            stream(piece)

        try:
            answer = self._asker.answer(question, chosen, self._asked, history=history, stream=hear, announce=announce)
            if stays:  # the scores are those of the question that found them
                answer = replace(answer, moments=tuple(replace(moment, score=None) for moment in answer.moments))
            self.last = answer
        finally:
            if said:
                self._shown = chosen
                self._turns.append((question, "".join(said)))
        return self.last

    def _choose(self, question: str) -> Chosen | None:
        shown = self._shown
        if shown is not None and all(moment.score is None for moment in shown.moments):
            return shown  # a chosen range, whole
        found = self._asker.choose(question, self.within, self._asked)
        if shown is not None and not (found and self._is_better(question, found, shown)):
            return shown
        return found

    def _is_better(self, question: str, found: Chosen, shown: Chosen) -> bool:
        (score, threshold), (other, _) = (self._asker.best_score(question, each.frames) for each in (shown, found))
        return other - score > TOPIC_SHARE * abs(threshold)

    def _history(self, question: str, chosen: Chosen, announce: Callable[[str], None]) -> list[tuple[str, str]]:
        """What was said before, without the oldest of it where the context is full."""
        if not self._bundle.card.takes_history:
            return []
        history = list(self._turns)
        while history and not self._asker.fits(question, chosen, self._asked, history):
            history.pop(0)
        forgotten = len(self._turns) - len(history)
        if forgotten and self._asker.fits(question, chosen, self._asked, history):
            announce(f"the context is full: the model no longer sees the first {forgotten} of {len(self._turns)} turns")
            self._turns = history
        return history
