"""chat: a conversation about an archive, in which the model sees earlier frames, questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from pipeline.ask.answer import Asked, Chosen, Say
from pipeline.ask.filter import Filter
from pipeline.ask.query import check_text
from storage.records import Answer, FrameRef
from workers.llm.prompt import Turns
from workers.models.bundle import Bundle

TOPIC_SHARE = 0.25  # of the threshold; moments that fit a question better by this much are a new topic


class AnyAsker(Protocol):
    """An Asker on this machine, or one on a cluster (pipeline/cluster/remote.py)."""

    def choose(self, question: str, within: Filter, asked: Asked) -> Chosen: ...
    def answer(
        self, question: str, chosen: Chosen, asked: Asked, *, history: Turns, stream: Say, announce: Say
    ) -> Answer: ...
    def fits(self, question: str, chosen: Chosen, asked: Asked, history: Turns) -> bool: ...
    def best_score(self, question: str, frames: Sequence[FrameRef]) -> tuple[float, float]: ...


class Conversation:
    """A conversation about a part of an archive.

    A question is about the same frames as the one before, unless it finds moments that fit it clearly better
    (TOPIC_SHARE). "How many are there?", for example, does not. If all frames of the part are shown, they are never
    replaced.

    Attributes:
        within: the part of the archive.
        last: the last answer.
    """

    def __init__(self, asker: AnyAsker, bundle: Bundle, within: Filter, asked: Asked):
        """Loads nothing before the first question. A model trained on single questions does not see earlier ones."""
        self.within = within
        self.last: Answer | None = None
        self._asker = asker
        self._bundle = bundle
        self._asked = asked
        self._turns: list[tuple[str, str]] = []
        self._shown: Chosen | None = None

    def narrow(self, within: Filter) -> None:
        """Chooses another part of the archive, and forgets the conversation."""
        self.within = within
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, and which frames were shown."""
        self._turns, self._shown, self.last = [], None, None

    def ask(self, question: str, stream: Say, announce: Say) -> Answer | None:
        """The answer; None if nothing is found and nothing was shown before.

        If an answer is interrupted, the streamed part of it belongs to the conversation.

        Args:
            stream: gets the text of the answer, piece by piece.
            announce: gets notes before the answer.
        Raises:
            UsageError: the question is empty, or does not fit the model's context.
        """
        check_text("question", question, "ask something")
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
            if stays:  # their scores belong to an earlier question
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
            return shown  # all frames of the part
        found = self._asker.choose(question, self.within, self._asked)
        if shown is not None and not (found and self._is_better(question, found, shown)):
            return shown
        return found

    def _is_better(self, question: str, found: Chosen, shown: Chosen) -> bool:
        (score, threshold), (other, _) = (self._asker.best_score(question, each.frames) for each in (shown, found))
        return other - score > TOPIC_SHARE * abs(threshold)

    def _history(self, question: str, chosen: Chosen, announce: Say) -> list[tuple[str, str]]:
        """The earlier turns, without the oldest ones if the context is full."""
        if not self._bundle.card.takes_history:
            return []
        history = list(self._turns)
        while history and not self._asker.fits(question, chosen, self._asked, history):
            history.pop(0)
        forgotten = len(self._turns) - len(history)
        if forgotten and self._asker.fits(question, chosen, self._asked, history):
            announce(f"the context is full: the model does not see the first {forgotten} of {len(self._turns)} turns")
            self._turns = history
        return history
