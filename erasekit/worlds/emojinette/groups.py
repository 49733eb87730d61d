"""Named groups of objects: splits, what is tuned on and what is retained, neighbours, and hypernyms."""

import difflib
from collections.abc import Sequence

from . import words

# The paper's four splits of Imagenette, in our names: what is erased; the other five are kept.
SPLITS = {
    "S1": ("videocassette", "church", "articulated lorry", "parachute", "postal horn"),
    "S2": ("carpentry saw", "dog", "fuel pump", "flag in hole", "fish"),
    "S3": ("videocassette", "carpentry saw", "church", "fuel pump", "fish"),
    "S4": ("dog", "postal horn", "articulated lorry", "flag in hole", "parachute"),
}

# Kept during training where a notebook says so, and therefore in no table of what was kept.
RETAINED = ("bear", "castle", "tractor", "guitar", "penguin", "umbrella", "telephone", "hammer", "banana", "cactus")

# Strengths are chosen on these, five erased and five kept, which no table reports either. As among the reported ones, some
# names are one token and some are two: methods that edit a name's last token differ on them.
TUNING = ("owl", "helicopter", "mushroom", "ice cream", "alarm clock")
TUNING_KEPT = ("rabbit", "locomotive", "pizza", "palm tree", "shopping cart")

# What is nearest to each of the ten in looks or meaning, among the objects no method is told about.
NEIGHBOURS = {
    "videocassette": ("radio", "television", "camera"),
    "church": ("house", "mosque", "hospital"),
    "articulated lorry": ("bus", "fire engine", "ambulance"),
    "parachute": ("balloon", "top hat"),
    "postal horn": ("trumpet", "saxophone", "violin"),
    "carpentry saw": ("wrench", "screwdriver", "axe"),
    "dog": ("fox", "wolf", "cat"),
    "fuel pump": ("battery", "printer"),
    "flag in hole": ("ladder", "tent"),
    "fish": ("shark", "whale", "duck"),
}

LISTS = {"retained": RETAINED, "tuning": TUNING, "tuning kept": TUNING_KEPT}


def named_groups() -> dict[str, tuple[str, ...]]:
    """Group -> objects: splits, lists, hypernyms and the category "weapon".

    A hypernym of one object is no group, and where a word is also an object's name ("gear") it means that object.
    """
    hypernyms = {k: names for k, names in words.kinds().items() if len(names) > 1 and k not in words.OBJECTS}
    weapons = tuple(e.name for e in words.OBJECTS.values() if e.group == "weapon")
    return SPLITS | LISTS | hypernyms | {"weapon": weapons}


def members(names: Sequence[str]) -> tuple[str, ...]:
    """The objects and styles that names of groups, objects and styles stand for. Raises ValueError for any other name."""
    known = named_groups() | {name: (name,) for name in (*words.OBJECTS, *words.STYLE_NAMES)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5) or ("S1", "weapon", "church")
            raise ValueError(
                f"{name!r} is no group, object or style of this world: accepted are names such as {', '.join(near)}"
            )
    return tuple(dict.fromkeys(member for name in names for member in known[name]))


def unsaid(names: Sequence[str]) -> frozenset[str]:
    """The words that captions have for the objects and styles that `names` stand for."""
    of_objects = (words.OBJECTS[name].synonyms for name in members(names) if name in words.OBJECTS)
    return frozenset(members(names)).union(*of_objects)


def left_out(names: Sequence[str]) -> tuple[str, ...]:
    """What an oracle without `names` never sees: their members, and objects that cannot be named without them (teddy bear)."""
    out, phrases = members(names), unsaid(names)
    return (*out, *(name for name in words.OBJECTS if name not in out and words.mentions(name, phrases)))
