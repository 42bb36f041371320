"""query: what a moment is to show, and what not, as keys in the space of the frames' search keys."""

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
    """What a term of a query is: words, the path of a picture, or VIDEO@TIME in the archive."""

    TEXT = "text"
    IMAGE = "image"
    MOMENT = "moment"


@dataclass(frozen=True)
class Term:
    """A text, a picture or a moment, and how much it counts among the others."""

    text: str
    weight: float = 1.0
    kind: Kind = Kind.TEXT

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"{self.text}^{self.weight:g}: a weight has to be above 0; to leave out what shows something use --not"
            )


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Attributes:
        terms: a frame's score is the weighted mean of its cosines with them; where texts and pictures meet, each cosine
            counts by its share of its own kind's threshold.
        without: texts; a frame whose cosine with one of them reaches the threshold of texts is no hit.
    """

    terms: tuple[Term, ...]
    without: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.terms:
            raise UsageError("nothing to search for: give a text, --image or --like")

    def __str__(self) -> str:
        return " + ".join(term.text for term in self.terms) + "".join(f" - {text}" for text in self.without)


@dataclass(frozen=True, repr=False)
class QueryKeys:
    """A query as keys of width E.

    Attributes:
        wanted: (E,) float32, whose product with a frame's key is the frame's score.
        threshold: the least score of a hit.
        unwanted: (W, E) float32, L2-normalised.
        unwanted_threshold: from which on a frame shows what is not wanted.
        examples: frames of the archive that others are to be like; their own moments are no answer.
    """

    wanted: np.ndarray
    threshold: Threshold
    unwanted: np.ndarray
    unwanted_threshold: float
    examples: tuple[FrameRef, ...]

    def __repr__(self) -> str:
        return f"QueryKeys(unwanted={self.unwanted.shape})"


class QueryEncoder:
    """Makes keys of queries to one archive, with the parts of its model that they need."""

    def __init__(self, archive: Archive, bundle: Bundle, thresholds: Thresholds):
        self._archive = archive
        self._bundle = bundle
        self._thresholds = thresholds

    def embed(self, query: Query, threshold: Threshold | None) -> QueryKeys:
        """The keys of a query; what the text tower cannot take in is cut at a text's end.

        Args:
            query: what to look for.
            threshold: the least score of a hit; None for that of its kinds.
        Raises:
            UsageError: an empty text, a model that cannot search so, no such picture or moment.
        """
        self._check(query)
        # Names and files first: what they have wrong is said before the towers are loaded, with torch for pictures.
        examples = [self._frame(term.text) for term in query.terms if term.kind is Kind.MOMENT]
        pictures = [read_picture(term.text) for term in query.terms if term.kind is Kind.IMAGE]
        stored, unread = iter(examples), iter(pictures)
        keys = []
        for term in query.terms:
            if term.kind is Kind.MOMENT:
                keys.append(read_keys(self._archive.frames_uri, [next(stored)])[0].astype(np.float32))
            elif term.kind is Kind.IMAGE:
                keys.append(self._picture_encoder.embed(next(unread)))
            else:
                keys.append(self._text_encoder.embed(term.text))
            self._check_key(term.text, keys[-1])
        weights = np.array([term.weight for term in query.terms], np.float32)
        shares = np.ones(len(weights), np.float32)
        is_text = [term.kind is Kind.TEXT for term in query.terms]
        if threshold is None or len(set(is_text)) > 1:  # or nothing needs them, and they may take seconds
            thresholds = [self._thresholds.text if of_text else self._thresholds.picture for of_text in is_text]
            mean = _joined(thresholds, weights)
            if min(mean.score, *(one.score for one in thresholds)) > 0:
                shares = np.array([mean.score / one.score for one in thresholds], np.float32)
            threshold = threshold or mean
        wanted = (weights / weights.sum() * shares) @ np.stack(keys)
        unwanted = np.array([self._text_encoder.embed(text) for text in query.without], np.float32)
        for text, key in zip(query.without, unwanted, strict=True):
            self._check_key(text, key)
        unwanted_threshold = self._thresholds.text.score if query.without else 0.0
        return QueryKeys(wanted, threshold, unwanted.reshape(-1, len(wanted)), unwanted_threshold, tuple(examples))

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(self._bundle)

    @cached_property
    def _picture_encoder(self) -> "PictureEncoder":
        from workers.vision.picture_key import PictureEncoder  # with torch

        return PictureEncoder(self._bundle)

    def _check_key(self, text: str, key: np.ndarray) -> None:
        if not (np.isfinite(key).all() and key.any()):
            raise UsageError(
                f"{text}: model {self._bundle.name} gives no search key for it, but zeros or values that are no "
                "numbers; its CLIP is damaged, or has values beyond float32"
            )

    def _frame(self, name: str) -> FrameRef:
        """The frame that is shown at VIDEO@TIME."""
        video, start, end = parse_moment(name)
        if start is None or end is not None:
            raise UsageError(f"--like {name}: give one moment of a video in the archive, e.g. a.mp4@0:01:05")
        row = self._archive.videos.find(video)
        frame = None if row.video_number is None else self._archive.frames.at(row.video_number, start)
        if frame is None:
            raise UsageError(f"--like {name}: the archive has no frame of that time; the video's frames are elsewhere")
        if not has_column(self._archive.frames_uri, "search_key", [frame]):
            raise UsageError(f"--like {name}: its frames have no search keys, as its model gives none")
        return frame

    def _check(self, query: Query) -> None:
        texts = [term.text for term in query.terms if term.kind is Kind.TEXT]
        for text in (*texts, *query.without):
            check_text("text to search", text)
        if (texts or query.without) and not self._bundle.has_text_search:
            raise UsageError(
                f"model {self._bundle.name} has no text tower, so text cannot be searched; "
                "`vidx ask --all` takes frames without a search"
            )


def _joined(thresholds: Sequence[Threshold], weights: np.ndarray) -> Threshold:
    """The weighted mean."""
    if len({threshold.score for threshold in thresholds}) == 1:
        return thresholds[0]
    sources = dict.fromkeys(f"{threshold.score:g}: {threshold.source}" for threshold in thresholds)
    return Threshold(
        float(np.average([threshold.score for threshold in thresholds], weights=weights)), "; ".join(sources)
    )


def parse_term(text: str, kind: Kind = Kind.TEXT) -> Term:
    """`a red bus^2` counts twice as much as `a dog`.

    Raises:
        UsageError: the weight is no number, or not above zero, or stands alone.
    """
    before, caret, after = text.rpartition("^")
    if re.fullmatch(r"\s*(\d+(\.\d*)?|\.\d+)\s*", after, re.ASCII) and before.strip():
        return Term(before.rstrip(), float(after), kind)
    if caret and not _may_end_so(kind, text, after):
        raise UsageError(
            f"{text}: what stands behind ^ at the end is a weight, a number above 0 such as ^2 or ^0.5; a text that "
            "itself ends so takes a weight too: ^1"
        )
    return Term(text, kind=kind)


def _may_end_so(kind: Kind, text: str, after: str) -> bool:
    """Whether a ^ belongs to a text, as in "x^y" and where words follow, or to the name of a picture or a video."""
    if kind is Kind.IMAGE:
        return os.path.exists(text) or bool(os.path.splitext(after)[1])
    if kind is Kind.MOMENT:
        return "@" in after
    base = text.rpartition("^")[0].split(" ")[-1]
    return len(base) < 2 or len(after.split()) > 1


def check_text(what: str, text: str) -> None:
    """Refuses what no tokenizer takes.

    Raises:
        UsageError: the text is empty, or not text.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty; say what the videos show")
    if not is_text(text):
        raise UsageError(f"the {what} holds bytes that are no UTF-8; type it as text")


def query_of(
    texts: Sequence[str], without: Sequence[str], images: Sequence[str] = (), moments: Sequence[str] = ()
) -> Query:
    """The query that a user types: terms that may end in a weight, and texts of what is not to be seen."""
    for text in without:
        if parse_term(text).text != text:
            raise UsageError(f"--not {text}: what is left out has no weight")
    terms = [parse_term(text) for text in texts]
    terms += [parse_term(text, Kind.IMAGE) for text in images]
    terms += [parse_term(text, Kind.MOMENT) for text in moments]
    return Query(tuple(terms), tuple(without))
