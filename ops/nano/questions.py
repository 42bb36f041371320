"""What nano can be asked, in which words, and the true answers.

A question is a kind and what it is about; `reply` answers it from what was in sight at the frames' instants, and gives
None where the truth is not clear: something half in sight, two things equally far left, a background that changes.
Such questions are neither trained nor counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ops.nano.pictograms import THINGS
from ops.nano.scenes import COLOURS, OUTSIDE, Sight

MOMENT_KINDS = ("exists", "what", "count", "where", "left", "right", "above", "below", "background")
TIME_KINDS = ("ever", "first", "after", "part", "different")
UNKNOWN = "unknown"  # a question from outside the world

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
CELLS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
PARTS = ("the beginning", "the middle", "the end")
NOTHING = "nothing"
OUTSIDE_ANSWER = "nothing that I know"
UNKNOWN_ANSWER = "I do not know that"

_CELL_MARGIN = 0.04  # a centre nearer than this to a border between cells is in neither
_SIDE_MARGIN = 0.06  # of two centres nearer than this along an axis, none is left of or above the other
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and direction
NOWHERE = -1
_LONGEST_LIST = 4


@dataclass(frozen=True)
class Question:
    """A kind and what it is about: numbers of things, or nothing."""

    kind: str
    about: tuple[int, ...] = ()


# --- the truth


def reply(question: Question, sights: Sequence[Sight]) -> str | None:
    """The true answer from frames in order of time, or None where it is not clear."""
    if question.kind == UNKNOWN:
        return UNKNOWN_ANSWER
    outside = [sight.background == OUTSIDE for sight in sights]
    if any(outside):
        return OUTSIDE_ANSWER if all(outside) else None
    if question.kind in ("exists", "ever"):
        return _exists(question.about[0], sights)
    if question.kind == "what":
        return _list(sights)
    if question.kind in TIME_KINDS:
        return _over_time(question, sights)
    answers = {_at_once(question, sight) for sight in sights}
    return answers.pop() if len(answers) == 1 else None


def _exists(thing: int, sights: Sequence[Sight]) -> str | None:
    if any(thing in sight.things for sight in sights):
        return "yes"
    return None if any(thing in sight.partial for sight in sights) else "no"


def _list(sights: Sequence[Sight]) -> str | None:
    most: Counter[int] = Counter()
    for sight in sights:
        most |= Counter(sight.things)
    if any(sight.partial - most.keys() for sight in sights):
        return None
    return list_things(most) if len(most) <= _LONGEST_LIST else None


def all_answers() -> list[str]:
    """Every short answer, and every thing as answers name it."""
    short = ["yes", "no", NOTHING, *NUMBERS, *CELLS, *PARTS, *COLOURS]
    lists = [f"{thing.one} and two {thing.plural}, {thing.one}" for thing in THINGS]
    return [*short, *lists, *(f"the {thing.word}" for thing in THINGS)]


def list_things(counts: Counter[int]) -> str:
    """Such as "a bus and two dogs", in alphabetical order."""
    names = [amount(thing, counts[thing]) for thing in sorted(counts)]
    if len(names) < 2:
        return names[0] if names else NOTHING
    return f"{', '.join(names[:-1])} and {names[-1]}"


def amount(thing: int, count: int) -> str:
    """Such as "a dog" or "two dogs"."""
    return THINGS[thing].one if count == 1 else f"{NUMBERS[count]} {THINGS[thing].plural}"


def _at_once(question: Question, sight: Sight) -> str | None:
    if question.kind == "background":
        return None if sight.background is None else COLOURS[sight.background]
    if sight.partial:
        return None
    if question.kind == "count":
        if question.about:
            return NUMBERS[sight.things.count(question.about[0])]
        return NUMBERS[len(sight.things)]
    thing = question.about[0]
    if sight.things.count(thing) != 1:
        return None
    place = sight.boxes[sight.things.index(thing), :2]
    if question.kind == "where":
        return _cell(place)
    there = beside(question.kind, thing, sight)
    return None if there is None else NOTHING if there == NOWHERE else THINGS[there].one


def _cell(place: np.ndarray) -> str | None:
    borders = np.array([1 / 3, 2 / 3])
    if (np.abs(place[:, None] - borders) < _CELL_MARGIN).any():
        return None
    column, row = (place[:, None] > borders).sum(axis=1)
    return CELLS[row * 3 + column]


def beside(side: str, thing: int, sight: Sight) -> int | None:
    """The nearest thing on a side of one that is there once, by centres along that axis alone.

    Returns:
        Its number, NOWHERE where there is nothing, None where that is not clear.
    """
    axis, direction = SIDES[side]
    place = sight.boxes[sight.things.index(thing)]
    distances = (sight.boxes[:, axis] - place[axis]) * direction
    others = [(distance, other) for distance, other in zip(distances, sight.things, strict=True) if other != thing]
    if any(abs(distance) < _SIDE_MARGIN for distance, _ in others):
        return None
    there = sorted((distance, other) for distance, other in others if distance > 0)
    if not there:
        return NOWHERE
    if len(there) > 1 and there[1][0] - there[0][0] < _SIDE_MARGIN and there[1][1] != there[0][1]:
        return None
    return there[0][1]


def _over_time(question: Question, sights: Sequence[Sight]) -> str | None:
    whole: dict[int, int] = {}  # first frame that shows a thing whole
    any_of: dict[int, int] = {}  # first frame that shows anything of it
    for number, sight in enumerate(sights):
        for thing in sight.things:
            whole.setdefault(thing, number)
        for thing in (*sight.things, *sight.partial):
            any_of.setdefault(thing, number)
    vague = any_of.keys() - whole.keys()
    if question.kind == "different":
        return NUMBERS[len(whole)] if not vague and len(whole) < len(NUMBERS) else None
    if any(thing not in whole for thing in question.about):
        return None
    first = [whole[thing] for thing in question.about]
    if question.kind == "first":
        one, other = question.about
        if first[0] < any_of[other]:
            return f"the {THINGS[one].word}"
        return f"the {THINGS[other].word}" if first[1] < any_of[one] else None
    thing, start = question.about[0], first[0]
    if question.kind == "part":
        parts = {3 * (2 * frame + 1) // (2 * len(sights)) for frame in (start, any_of[thing])}
        return PARTS[parts.pop()] if len(parts) == 1 and len(sights) >= 3 else None
    if vague or any(any_of[other] <= start < whole[other] for other in whole):
        return None
    later = sorted((frame, other) for other, frame in whole.items() if frame > start)
    if not later:
        return NOTHING
    return None if len(later) > 1 and later[1][0] == later[0][0] else THINGS[later[0][1]].one


# --- the words


_WORDS = {
    "exists": (
        "is there {a}?",
        "is there {a} in the {picture}?",
        "can you see {a}?",
        "do you see {a}?",
        "is {a} there?",
        "does the {picture} show {a}?",
        "are there any {s}?",
        "are there {s} in the {picture}?",
        "any {s}?",
    ),
    "what": (
        "what is there?",
        "what is in the {picture}?",
        "what can you see?",
        "what do you see?",
        "what is shown?",
        "what is visible in the {picture}?",
        "list the things in the {picture}.",
        "which things are there?",
    ),
    "count": (
        "how many things are there?",
        "how many things can you see?",
        "how many objects are in the {picture}?",
        "how many objects are there?",
        "count the things.",
    ),
    "count_of": (
        "how many {s} are there?",
        "how many {s} can you see?",
        "how many {s} are in the {picture}?",
        "how many {s}?",
        "count the {s}.",
    ),
    "where": (
        "where is the {x}?",
        "where is the {x} in the {picture}?",
        "where can you see the {x}?",
        "in which part of the {picture} is the {x}?",
        "where's the {x}?",
    ),
    "left": ("what is left of the {x}?", "what is to the left of the {x}?", "which thing is left of the {x}?"),
    "right": ("what is right of the {x}?", "what is to the right of the {x}?", "which thing is right of the {x}?"),
    "above": ("what is above the {x}?", "what is over the {x}?", "which thing is above the {x}?"),
    "below": ("what is below the {x}?", "what is under the {x}?", "which thing is below the {x}?"),
    "background": (
        "what {colour} is the background?",
        "which {colour} is the background?",
        "what is the background {colour}?",
        "what is the {colour} of the background?",
        "which {colour} does the background have?",
    ),
    "ever": (
        "is there ever {a}?",
        "is there ever {a} in the {video}?",
        "does {a} ever appear?",
        "does {a} appear in the {video}?",
        "do you ever see {a}?",
        "does the {video} ever show {a}?",
    ),
    "first": (
        "which comes first, the {x} or the {y}?",
        "what comes first, the {x} or the {y}?",
        "what appears first, the {x} or the {y}?",
        "does the {x} or the {y} come first?",
        "which appears earlier, the {x} or the {y}?",
    ),
    "after": (
        "what comes after the {x}?",
        "what appears after the {x}?",
        "what comes next after the {x}?",
        "which thing comes after the {x}?",
    ),
    "part": (
        "in which part does the {x} appear?",
        "in which part of the {video} does the {x} appear?",
        "when does the {x} appear?",
        "when does the {x} come in?",
    ),
    "different": (
        "how many different things appear?",
        "how many different things are there in the {video}?",
        "how many different things appear in the {video}?",
        "how many different objects appear?",
    ),
}
SYNONYMS = {
    "picture": ("picture", "image", "frame", "scene", "photo"),
    "video": ("video", "clip", "film", "movie"),
    "colour": ("colour", "color"),
}


def wordings() -> dict[str, tuple[str, ...]]:
    """Each kind of question in all its words, about the same two things."""
    one, other = (next(thing for thing in THINGS if thing.word == name) for name in ("dog", "cat"))
    words = {"x": one.word, "a": one.one, "s": one.plural, "y": other.word}
    words |= {name: choices[0] for name, choices in SYNONYMS.items()}
    return {kind: tuple(wording.format(**words) for wording in each) for kind, each in _WORDS.items()}


def word(question: Question, source: np.random.Generator, casual: float) -> str:
    """A question in one of its wordings.

    Args:
        casual: how often it is typed carelessly: no question mark, other case, articles left out.
    """
    kind = "count_of" if question.kind == "count" and question.about else question.kind
    wording = pick(source, _WORDS[kind])
    words = {name: pick(source, choices) for name, choices in SYNONYMS.items()}
    things = [THINGS[number] for number in question.about]
    if things:
        words |= {"x": things[0].word, "a": things[0].one, "s": things[0].plural, "y": things[-1].word}
    text = wording.format(**words)
    text = text[0].upper() + text[1:]
    return careless(text, source) if source.random() < casual else text


def careless(text: str, source: np.random.Generator) -> str:
    """As people type in a hurry: other case, no question mark, articles left out."""
    text = pick(source, (text, text.lower(), text.upper() if source.random() < 0.2 else text.lower()))
    if source.random() < 0.6:
        text = text.rstrip("?.")
    if source.random() < 0.15:
        text = text.replace(" the ", " ").replace(" a ", " ").replace(" an ", " ")
    if source.random() < 0.08:
        text = f"{text} please" if text[-1] not in "?." else f"Please: {text}"
    return text.replace(" is ", "  is ") if source.random() < 0.05 else text


def pick(source: np.random.Generator, choices: Sequence[str]) -> str:
    """One of them."""
    return choices[source.integers(len(choices))]


# --- choosing what to ask


def moment_questions(
    source: np.random.Generator, sights: Sequence[Sight], wanted: int, hard: bool = False
) -> list[tuple[Question, str]]:
    """Questions about a moment with clear answers, kinds and answers balanced as far as the moment allows.

    Args:
        hard: more of the kinds that are learned last.
    """
    shares = _HARD_MOMENT_SHARES if hard else _MOMENT_SHARES
    first = sights[0]
    there = sorted({thing for sight in sights for thing in sight.things})
    found: list[tuple[Question, str]] = []
    for _ in range(wanted * 4):
        if len(found) == wanted:
            break
        kind = MOMENT_KINDS[source.choice(len(MOMENT_KINDS), p=shares)]
        question = _draw(source, kind, there, first)
        answer = question and reply(question, sights)
        if answer is None or any(question == other for other, _ in found):
            continue
        if answer == NOTHING and kind in SIDES and source.random() < 0.75:
            continue  # with few things in sight most sides are empty
        found.append((question, answer))
    return found


_MOMENT_SHARES = np.array([0.10, 0.14, 0.14, 0.2, 0.09, 0.09, 0.09, 0.09, 0.06])
_HARD_MOMENT_SHARES = np.array([0.05, 0.19, 0.13, 0.11, 0.12, 0.12, 0.12, 0.12, 0.04])


def _draw(source: np.random.Generator, kind: str, there: list[int], sight: Sight) -> Question | None:
    if kind in ("what", "background"):
        return Question(kind)
    if kind == "count" and source.random() < 0.5:
        return Question(kind)
    if sight.background == OUTSIDE or (kind in ("exists", "count") and source.random() < (0.5, 0.25)[kind == "count"]):
        return Question(kind, (absent(source, there),))
    return Question(kind, (there[source.integers(len(there))],)) if there else None


def absent(source: np.random.Generator, there: Sequence[int]) -> int:
    """A thing that is not there."""
    while True:
        thing = int(source.integers(len(THINGS)))
        if thing not in there:
            return thing


def time_questions(
    source: np.random.Generator, sights: Sequence[Sight], wanted: int, hard: bool = False
) -> list[tuple[Question, str]]:
    """Questions over several frames with clear answers; hard: more of the kinds that are learned last."""
    shares = _HARD_TIME_SHARES if hard else _TIME_SHARES
    there = sorted({thing for sight in sights for thing in sight.things})
    outside = sights[0].background == OUTSIDE
    found: list[tuple[Question, str]] = []
    for _ in range(wanted * 5):
        if len(found) == wanted:
            break
        kind = TIME_KINDS[source.choice(len(TIME_KINDS), p=shares)]
        if kind == "different":
            question = Question(kind)
        elif outside or (kind == "ever" and source.random() < 0.5):
            question = Question(kind, tuple(absent(source, there) for _ in range(2 if kind == "first" else 1)))
        elif len(there) < (2 if kind == "first" else 1):
            continue
        else:
            count = 2 if kind == "first" else 1
            question = Question(kind, tuple(int(thing) for thing in source.choice(there, count, replace=False)))
        answer = reply(question, sights)
        if answer is None or any(question == other for other, _ in found):
            continue
        common = answer == PARTS[0] or (kind == "after" and answer == NOTHING)
        if common and source.random() < 0.7:
            continue  # these would be most of the answers
        found.append((question, answer))
    return found


_TIME_SHARES = np.array([0.2, 0.22, 0.22, 0.22, 0.14])
_HARD_TIME_SHARES = np.array([0.1, 0.26, 0.28, 0.18, 0.18])
