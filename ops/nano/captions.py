"""Texts that a search may use for a picture, and which pictures each of them is true of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ops.nano.pictograms import THINGS
from ops.nano.questions import list_things
from ops.nano.scenes import COLOURS, OUTSIDE, Sight

_SIDE_WORDS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
_SIDE_MARGIN = 0.08


@dataclass(frozen=True)
class Claim:
    """What a caption says.

    Attributes:
        counts: things that are there, each with its least number.
        exact: nothing else is there, and the numbers are exact.
        background: index into COLOURS, or None where it is not named.
        relation: (one, other, axis, direction): one lies before the other along an axis; or None.
        outside: the picture is not of this world.
        never: it names something that no picture shows.
    """

    counts: tuple[tuple[int, int], ...] = ()
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
    return f"{list_things(Counter(sight.things))} on {_article(colour)} {colour} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def word_caption(sight: Sight, source: np.random.Generator, whole: float) -> tuple[str, Claim]:
    """A text that fits a picture, most of them naming only a part of it.

    Args:
        whole: how often everything is named.
    """
    if sight.background == OUTSIDE:
        return _pick(source, ("a photo", "something else", "real footage", "none of these")), Claim(outside=True)
    counts = Counter(sight.things)
    colour = COLOURS[sight.background]
    if source.random() < whole or not counts:
        if not counts and source.random() < 0.5:
            text = _pick(source, ("nothing", "an empty scene", "empty background", "empty"))
            return text, Claim(exact=True)
        if source.random() < 0.4:
            return list_things(counts) if counts else "nothing", Claim(tuple(counts.items()), exact=True)
        return whole_caption(sight), Claim(tuple(counts.items()), exact=True, background=sight.background)
    draw = source.random()
    if draw < 0.12:
        forms = ("{c} background", "{c}", "{d} {c} background", "something on {c}", "{c} scene")
        return _pick(source, forms).format(c=colour, d=_article(colour)), Claim(background=sight.background)
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
        forms = ("{a} on {d} {c} background", "{x} on {c}", "{a} on {c}", "{c} background with {a}")
        text = _pick(source, forms).format(x=THINGS[thing].word, a=THINGS[thing].one, c=colour, d=_article(colour))
        return text, Claim(((thing, 1),), background=sight.background)
    forms = ("{x}", "{x}", "{a}", "{a}", "the {x}", "{s}", "a picture of {a}", "where is the {x}", "there is {a}")
    return _format(source, forms, thing, thing), Claim(((thing, 1),))


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
    return _pick(source, forms).format(x=first.word, y=second.word, a=first.one, b=second.one, s=first.plural)


def _pick(source: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[source.integers(len(choices))]
