"""query: texts, pictures and moments -> keys that are compared with the frames' search keys."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.ask.thresholds import Threshold, Thresholds
from pipeline.times import parse_moment
from storage.archive.archive import Archive
from storage.errors import UsageError
from storage.files import is_text
from storage.parts.read import has_column, read_keys
from storage.records import FrameRef
from workers.models.bundle import Bundle
from workers.vision.clip_text import TextEncoder
from workers.vision.picture_file import read_picture

if TYPE_CHECKING:
    from workers.vision.picture_key import PictureEncoder


class Kind(StrEnum):
    """The kind of a term: a text, the path of a picture, or VIDEO@TIME in the archive."""

    TEXT = "text"
    IMAGE = "image"
    MOMENT = "moment"


@dataclass(frozen=True)
class Term:
    """A text, a picture or a moment to search for, and its weight among the others."""

    text: str
    weight: float = 1.0
    kind: Kind = Kind.TEXT

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"{self.text}^{self.weight:g}: a weight must be above 0; to exclude what shows something, use --not"
            )


@dataclass(frozen=True)
class Query:
    """What to search for.

    Attributes:
        terms: a frame's score is the weighted mean of its cosines with the terms. If there are both texts and pictures,
            each cosine is first divided by the threshold of its kind.
        without: texts; a frame whose cosine with one of them reaches the threshold for texts is no hit.
    """

    terms: tuple[Term, ...]
    without: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.terms:
            raise UsageError("there is nothing to search for: give a text, --image or --like")

    def __str__(self) -> str:
        return " + ".join(term.text for term in self.terms) + "".join(f" - {text}" for text in self.without)


@dataclass(frozen=True, repr=False)
class QueryKeys:
    """A query as keys of width E.

    Attributes:
        wanted: (E,) float32; its product with a frame's key is the frame's score.
        threshold: the lowest score of a hit.
        unwanted: (W, E) float32, L2-normalised keys of what hits must not show.
        unwanted_threshold: the cosine with an unwanted key from which a frame is excluded.
        examples: frames of the archive that hits should look like; their own moments are not returned.
    """

    wanted: np.ndarray
    threshold: Threshold
    unwanted: np.ndarray
    unwanted_threshold: float
    examples: tuple[FrameRef, ...]

    def __repr__(self) -> str:
        return f"QueryKeys(unwanted={self.unwanted.shape})"


class QueryEncoder:
    """Computes the keys of queries to one archive; loads the parts of its model when they are needed."""

    def __init__(self, archive: Archive, bundle: Bundle, thresholds: Thresholds):
        self._archive = archive
        self._bundle = bundle
        self._thresholds = thresholds

    def embed(self, query: Query, threshold: Threshold | None) -> QueryKeys:
        """The keys of a query; a text that is too long for the text tower is cut.

        Args:
            threshold: the lowest score of a hit; None for the threshold of its kinds.
        Raises:
            UsageError: a text is empty, the model cannot search this way, or there is no such picture or moment.
        """
        self._check(query)
        # Names and files are checked before the towers are loaded, which takes seconds.
        examples = {term: self._frame(term.text) for term in query.terms if term.kind is Kind.MOMENT}
        pictures = {term: read_picture(term.text) for term in query.terms if term.kind is Kind.IMAGE}

        def key_of(term: Term) -> np.ndarray:
            if term in examples:
                return read_keys(self._archive.frames_uri, [examples[term]])[0].astype(np.float32)
            if term in pictures:
                return self._picture_encoder.embed(pictures[term])
            return self._text_encoder.embed(term.text)

        keys = [self._checked(term.text, key_of(term)) for term in query.terms]
        weights = np.array([term.weight for term in query.terms], np.float32)
        shares = np.ones(len(weights), np.float32)
        is_text = [term.kind is Kind.TEXT for term in query.terms]
        if threshold is None or len(set(is_text)) > 1:  # measuring them can take seconds
            thresholds = [self._thresholds.text if of_text else self._thresholds.picture for of_text in is_text]
            mean = _joined(thresholds, weights)
            if min(mean.score, *(one.score for one in thresholds)) > 0:
                shares = np.array([mean.score / one.score for one in thresholds], np.float32)
            threshold = threshold or mean
        wanted = (weights / weights.sum() * shares) @ np.stack(keys)
        unwanted = np.array([self._checked(text, self._text_encoder.embed(text)) for text in query.without], np.float32)
        unwanted_threshold = self._thresholds.text.score if query.without else 0.0
        shown = tuple(examples.values())
        return QueryKeys(wanted, threshold, unwanted.reshape(-1, len(wanted)), unwanted_threshold, shown)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(self._bundle)

    @cached_property
    def _picture_encoder(self) -> "PictureEncoder":
        from workers.vision.picture_key import PictureEncoder  # with torch

        return PictureEncoder(self._bundle)

    def _checked(self, text: str, key: np.ndarray) -> np.ndarray:
        if not (np.isfinite(key).all() and key.any()):
            raise UsageError(
                f"{text}: the search key from model {self._bundle.name} is zero or not finite; its CLIP is damaged, or "
                "has values beyond float32"
            )
        return key

    def _frame(self, name: str) -> FrameRef:
        """The stored frame that is shown at VIDEO@TIME."""
        video, start, end = parse_moment(name)
        if start is None or end is not None:
            raise UsageError(f"--like {name}: give one position in a video of the archive, e.g. a.mp4@0:01:05")
        row = self._archive.videos.find(video)
        frame = None if row.video_number is None else self._archive.frames.at(row.video_number, start)
        if frame is None:
            raise UsageError(f"--like {name}: the archive has no frame at this time; choose another one")
        if not has_column(self._archive.frames_uri, "search_key", [frame]):
            raise UsageError(f"--like {name}: its frames have no search keys, because the archive's model gives none")
        return frame

    def _check(self, query: Query) -> None:
        texts = [term.text for term in query.terms if term.kind is Kind.TEXT]
        for text in (*texts, *query.without):
            check_text("text to search", text)
        if (texts or query.without) and not self._bundle.has_text_search:
            raise UsageError(
                f"model {self._bundle.name} has no text tower, so text cannot be searched; "
                "`vidx ask --all` answers without a search"
            )


def _joined(thresholds: Sequence[Threshold], weights: np.ndarray) -> Threshold:
    """The weighted mean of several thresholds."""
    if len({threshold.score for threshold in thresholds}) == 1:
        return thresholds[0]
    sources = dict.fromkeys(f"{threshold.score:g}: {threshold.source}" for threshold in thresholds)
    return Threshold(
        float(np.average([threshold.score for threshold in thresholds], weights=weights)), "; ".join(sources)
    )


def parse_term(text: str, kind: Kind = Kind.TEXT) -> Term:
    """A term whose text may end in a weight: `a red bus^2` counts twice as much as `a dog`.

    Raises:
        UsageError: the weight is not a number above 0, or there is nothing before it.
    """
    before, caret, after = text.rpartition("^")
    if re.fullmatch(r"\s*(\d+(\.\d*)?|\.\d+)\s*", after, re.ASCII) and before.strip():
        return Term(before.rstrip(), float(after), kind)
    if caret and not _may_end_so(kind, text, after):
        raise UsageError(
            f"{text}: the weight after ^ must be a number above 0, such as ^2 or ^0.5; if the ^ belongs to the text, "
            "add ^1"
        )
    return Term(text, kind=kind)


def _may_end_so(kind: Kind, text: str, after: str) -> bool:
    """Whether a ^ belongs to the text, as in "x^y", or to the name of a picture or video."""
    if kind is Kind.IMAGE:
        return os.path.exists(text) or bool(os.path.splitext(after)[1])
    if kind is Kind.MOMENT:
        return "@" in after
    base = text.rpartition("^")[0].split(" ")[-1]
    return len(base) < 2 or len(after.split()) > 1


def check_text(what: str, text: str, advice: str = "give a text") -> None:
    """Checks a text that a tokenizer will get; `advice` says what to do if it is empty.

    Raises:
        UsageError: the text is empty, or not valid text.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty; {advice}")
    if not is_text(text):
        raise UsageError(f"the {what} contains bytes that are not UTF-8; give a text in UTF-8")


def query_of(
    texts: Sequence[str], without: Sequence[str], images: Sequence[str] = (), moments: Sequence[str] = ()
) -> Query:
    """The query of a command line; texts, images and moments may end in a weight.

    Raises:
        UsageError: there is nothing to search for, or a weight is wrong.
    """
    for text in without:
        if parse_term(text).text != text:
            raise UsageError(f"--not {text}: an excluded text cannot have a weight; leave out the ^ and the number")
    kinds = ((Kind.TEXT, texts), (Kind.IMAGE, images), (Kind.MOMENT, moments))
    return Query(tuple(parse_term(text, kind) for kind, values in kinds for text in values), tuple(without))
