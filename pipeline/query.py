"""query: what a moment is to show, and what not, as keys in the space of the frames' search keys."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.errors import UsageError
from storage.files import is_text
from workers.bundle import Bundle
from workers.clip_text import TextEncoder


@dataclass(frozen=True)
class Term:
    """A text and how much it counts among the others."""

    text: str
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"{self.text}^{self.weight:g}: a weight has to be above 0; to leave out what shows something use --not"
            )


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Attributes:
        terms: a frame's score is the weighted mean of its cosines with them.
        without: texts; a frame whose cosine with one of them reaches the model's own floor is no hit.
    """

    terms: tuple[Term, ...]
    without: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.terms:
            raise UsageError("nothing to search for: give at least one text")

    def __str__(self) -> str:
        return " + ".join(term.text for term in self.terms) + "".join(f" - {text}" for text in self.without)


@dataclass(frozen=True, repr=False)
class QueryKeys:
    """A query as keys of width E.

    Attributes:
        wanted: (E,) float32, whose product with a frame's key is the frame's score.
        unwanted: (W, E) float32, L2-normalised.
    """

    wanted: np.ndarray
    unwanted: np.ndarray

    def __repr__(self) -> str:
        return f"QueryKeys(unwanted={self.unwanted.shape})"


def parse_term(text: str) -> Term:
    """`a red bus^2` counts twice as much as `a dog`.

    Raises:
        UsageError: the weight is not above zero.
    """
    match = re.fullmatch(r"(.*\S)\s*\^(\d+(?:\.\d*)?)", text, re.DOTALL)
    if not match:
        return Term(text)
    return Term(match[1], float(match[2]))


def check_query(query: Query, bundle: Bundle) -> None:
    """Refuses what cannot be searched.

    Raises:
        UsageError: an empty text, or a model without text tower.
    """
    for text in (*(term.text for term in query.terms), *query.without):
        check_text("text to search", text)
    if not bundle.has_text_search:
        raise UsageError(
            f"model {bundle.name} has no text tower, so text cannot be searched; "
            "`vidx ask --all` takes frames without a search"
        )


def embed(query: Query, encoder: TextEncoder) -> QueryKeys:
    """The keys of a query; what the text tower cannot take in is cut at a text's end."""
    weights = np.array([term.weight for term in query.terms], np.float32)
    keys = np.stack([encoder.embed(term.text) for term in query.terms])  # (N, E)
    unwanted = [encoder.embed(text) for text in query.without]
    return QueryKeys(weights / weights.sum() @ keys, np.array(unwanted, np.float32).reshape(-1, keys.shape[1]))


def check_text(what: str, text: str) -> None:
    """Refuses what no tokenizer takes.

    Raises:
        UsageError: the text is empty, or not text.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty; say what the videos show")
    if not is_text(text):
        raise UsageError(f"the {what} holds bytes that are no UTF-8; type it as text")


def query_of(texts: Sequence[str], without: Sequence[str]) -> Query:
    """The query that a user types: texts that may end in a weight, and texts of what is not to be seen."""
    for text in without:
        if parse_term(text).text != text:
            raise UsageError(f"--not {text}: what is left out has no weight")
    return Query(tuple(parse_term(text) for text in texts), tuple(without))
