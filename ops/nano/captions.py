"""Texts that a search may use for a picture, and which pictures each of them is true of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ops.nano.pictograms import THINGS, with_article
from ops.nano.questions import MOMENT_KINDS, TIME_KINDS, Question, absent, list_things, pick, word
from ops.nano.scenes import COLOURS, OUTSIDE, Sight

_SIDE_WORDS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
_SIDE_MARGIN = 0.08
CASUAL = 0.35  # share of questions that are typed carelessly


@dataclass(frozen=True)
class Claim:
    """What a caption says.

    Attributes:
        counts: things that are there, each with its least number.
        either: at least one of these things is there, where any is named.
        exact: nothing else is there, and the numbers are exact.
        background: index into COLOURS, or None where it is not named.
        relation: (one, other, axis, direction): one lies before the other along an axis; or None.
        outside: the picture is not of this world.
        never: it names something that no picture shows.
    """

    counts: tuple[tuple[int, int], ...] = ()
    either: tuple[int, ...] = ()
    exact: bool = False
    background: int | None = None
    relation: tuple[int, int, int, int] | None = None
    outside: bool = False
    never: bool = False


def whole_caption(sight: Sight) -> str:
    """Everything that is in sight, in alphabetical order, and the background."""
    colour = COLOURS[sight.background]
    if not sight.things:
        return f"an empty {colour} background"
    return f"{list_things(Counter(sight.things))} on {with_article(colour)} background"


def word_caption(sight: Sight, source: np.random.Generator, whole: float) -> tuple[str, Claim]:
    """A text that fits a picture, most of them naming only a part of it.

    Args:
        whole: how often everything is named.
    """
    if sight.background == OUTSIDE:
        return pick(source, ("a photo", "something else", "real footage", "none of these")), Claim(outside=True)
    counts = Counter(sight.things)
    colour = COLOURS[sight.background]
    if source.random() < whole or not counts:
        if not counts and source.random() < 0.5:
            text = pick(source, ("nothing", "an empty scene", "empty background", "empty"))
            return text, Claim(exact=True)
        if source.random() < 0.4:
            return list_things(counts) if counts else "nothing", Claim(tuple(counts.items()), exact=True)
        return whole_caption(sight), Claim(tuple(counts.items()), exact=True, background=sight.background)
    draw = source.random()
    if draw < 0.12:
        forms = ("{c} background", "{c}", "{d} background", "something on {c}", "{c} scene")
        return pick(source, forms).format(c=colour, d=with_article(colour)), Claim(background=sight.background)
    things = [int(thing) for thing in source.permutation(sorted(counts))]
    if draw < 0.27 and len(things) > 1:
        return _relation(sight, source, things)
    if draw < 0.45 and len(things) > 1:
        one, other = things[:2]
        forms = (
            "{a} and {b}",
            "{x} and {y}",
            "{a} next to {b}",
            "{x} next to {y}",
            "{x} {y}",
            "{x}, {y}",
            "{x} with {y}",
        )
        return _format(source, forms, one, other), Claim(((one, 1), (other, 1)))
    thing = things[0]
    if draw < 0.6 and counts[thing] > 1:
        return list_things(Counter({thing: counts[thing]})), Claim(((thing, counts[thing]),))
    if draw < 0.62:
        forms = ("{a} on {d} background", "{x} on {c}", "{a} on {c}", "{c} background with {a}")
        names = {"x": THINGS[thing].word, "a": THINGS[thing].one, "c": colour, "d": with_article(colour)}
        return pick(source, forms).format(**names), Claim(((thing, 1),), background=sight.background)
    forms = ("{x}", "{x}", "{a}", "{a}", "the {x}", "{s}", "a picture of {a}", "where is the {x}", "there is {a}")
    return _format(source, forms, thing, thing), Claim(((thing, 1),))


def question_caption(sight: Sight, source: np.random.Generator) -> tuple[str, Claim]:
    """A question to be searched with, as `ask` does: it fits the pictures that show what it is about."""
    kind = pick(source, (*MOMENT_KINDS, *TIME_KINDS))
    if kind in ("what", "background", "different") or not sight.things or (kind == "count" and source.random() < 0.3):
        kind = kind if kind in ("what", "background", "different", "count") else "what"
        return word(Question(kind), source, CASUAL), Claim(outside=sight.background == OUTSIDE)
    about = (int(source.choice(sight.things)),)
    if kind == "first":
        about = tuple(int(thing) for thing in source.permutation([*about, absent(source, about)]))
    return word(Question(kind, about), source, CASUAL), Claim(either=about)


def truth_table(claims: Sequence[Claim], sights: Sequence[Sight]) -> np.ndarray:
    """Which claims hold for which pictures: (claims, pictures) bool."""
    counts = np.zeros((len(sights), len(THINGS)), np.int8)
    for row, sight in enumerate(sights):
        np.add.at(counts[row], list(sight.things), 1)
    totals = counts.sum(axis=1)
    backgrounds = np.array([-2 if sight.background is None else sight.background for sight in sights])
    table = np.empty((len(claims), len(sights)), bool)
    for row, claim in enumerate(claims):
        holds = ((backgrounds == OUTSIDE) == claim.outside) & (not claim.never)
        for thing, least in claim.counts:
            holds &= counts[:, thing] == least if claim.exact else counts[:, thing] >= least
        if claim.exact:
            holds &= totals == sum(count for _, count in claim.counts)
        if claim.either:
            holds &= (counts[:, list(claim.either)] > 0).any(axis=1)
        if claim.background is not None:
            holds &= backgrounds == claim.background
        if claim.relation is not None:
            for picture in np.flatnonzero(holds):
                holds[picture] = _related(claim.relation, sights[picture])
        table[row] = holds
    return table


def _relation(sight: Sight, source: np.random.Generator, things: list[int]) -> tuple[str, Claim]:
    one, other = things[:2]
    words = list(_SIDE_WORDS)
    for number in source.permutation(len(words)):
        axis, direction = _SIDE_WORDS[words[number]]
        relation = (one, other, axis, direction)
        if _related(relation, sight):
            text = _format(source, (f"{{a}} {words[number]} {{b}}", f"{{x}} {words[number]} {{y}}"), one, other)
            return text, Claim(((one, 1), (other, 1)), relation=relation)
    return _format(source, ("{a} and {b}",), one, other), Claim(((one, 1), (other, 1)))


def _related(relation: tuple[int, int, int, int], sight: Sight) -> bool:
    one, other, axis, direction = relation
    places = {thing: sight.boxes[np.array(sight.things) == thing, axis] for thing in (one, other)}
    distances = (places[other][:, None] - places[one]) * direction
    return bool((distances > _SIDE_MARGIN).all())


def _format(source: np.random.Generator, forms: Sequence[str], one: int, other: int) -> str:
    first, second = THINGS[one], THINGS[other]
    return pick(source, forms).format(x=first.word, y=second.word, a=first.one, b=second.one, s=first.plural)
