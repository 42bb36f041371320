"""Questions from outside nano's world, in words: other things, other properties, or of another sort altogether."""

from pathlib import Path

import numpy as np

from ops.nano.pictograms import NUMBER, THINGS, with_article
from ops.nano.questions import careless, pick

_FOLDER = Path(__file__).parent
_THINGS = [word for word in (_FOLDER / "unknown_things.txt").read_text().split() if word not in NUMBER]
_QUESTIONS = (_FOLDER / "unknown_questions.txt").read_text().splitlines()
_THING_FORMS = (
    "is there {a}?",
    "can you see {a}?",
    "are there any {s}?",
    "is there ever {a}?",
    "does {a} ever appear?",
    "how many {s} are there?",
    "where is the {x}?",
    "what is left of the {x}?",
    "what is above the {x}?",
    "what comes after the {x}?",
    "when does the {x} appear?",
    "in which part does the {x} appear?",
    "which comes first, the {x} or the {y}?",
    "what colour is the {x}?",
    "what is the {x} doing?",
    "why is the {x} here?",
    "who owns the {x}?",
    "describe the {x}.",
    "how big is the {x}?",
    "what does the {x} say?",
)
_PROPERTY_FORMS = (  # about things of the world, but nothing that can be answered from them
    "what is the {x} doing?",
    "why is the {x} there?",
    "who owns the {x}?",
    "how old is the {x}?",
    "how heavy is the {x}?",
    "what does the {x} eat?",
    "is the {x} happy?",
    "is the {x} expensive?",
    "what is the name of the {x}?",
    "what does the {x} sound like?",
    "do you like the {x}?",
    "how much does the {x} cost?",
    "who is holding the {x}?",
    "can the {x} fly?",
    "where was the {x} made?",
    "how fast is the {x}?",
)
_CONSONANTS = (*"bcdfghklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr")
_VOWELS = (*"aeiou", "ai", "ee", "oa", "ou")
_ENDS = (*"nrtlsmk", "d", "ng", "x", "p")


def word_unknown(source: np.random.Generator, casual: float, held_out: bool = False) -> str:
    """A question that nano cannot answer.

    Args:
        casual: as in questions.word.
        held_out: only of the tenth of the words and questions that training never sees; else never of it.
    """
    things = [word for word in _THINGS if _is_held_out(word) == held_out]
    draw = source.random()
    if draw < 0.25:
        text = pick(source, [text for text in _QUESTIONS if _is_held_out(text) == held_out])
    elif draw < 0.45:
        form = pick(source, [form for form in _PROPERTY_FORMS if _is_held_out(form) == held_out])
        text = form.format(x=THINGS[source.integers(len(THINGS))].word)
    else:
        name = pick(source, things) if draw < 0.8 or held_out else _invent(source)
        other = THINGS[source.integers(len(THINGS))].word if source.random() < 0.5 else pick(source, things)
        first, second = (name, other) if source.random() < 0.5 else (other, name)
        form = pick(source, _THING_FORMS)
        if "{y}" in form:
            text = form.format(x=first, y=second)
        else:
            text = form.format(x=name, a=with_article(name), s=f"{name}s")
    text = text[0].upper() + text[1:]
    return careless(text, source) if source.random() < casual else text


def unknown_caption(source: np.random.Generator, held_out: bool = False) -> str:
    """A text to search for, that names something which is not of the world."""
    draw = source.random()
    names = [word for word in _THINGS if _is_held_out(word) == held_out]
    name = pick(source, names) if draw < 0.7 or held_out else _invent(source)
    return pick(source, (name, with_article(name), with_article(name), f"{name}s", f"the {name}"))


def _is_held_out(text: str) -> bool:
    return sum(text.encode()) % 10 == 0


def _invent(source: np.random.Generator) -> str:
    """A word that nobody knows."""
    syllables = [pick(source, _CONSONANTS) + pick(source, _VOWELS) for _ in range(source.integers(1, 4))]
    word = "".join(syllables) + pick(source, _ENDS)
    return word if word not in NUMBER else f"{word}o"
