"""Named groups of objects: as in the first edition, so that no study has to change."""

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

# Strengths are chosen on these, five erased and five kept, which no table reports either.
TUNING = ("owl", "bicycle", "hamburger", "helicopter", "mushroom")
TUNING_KEPT = ("rabbit", "locomotive", "pizza", "sailboat", "tulip")

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


def named(names: Sequence[str]) -> tuple[str, ...]:
    """The objects and styles that `names` stand for: splits, lists, the category "weapon", hypernyms, objects, styles.

    Raises ValueError for any other name.
    """
    groups = SPLITS | LISTS | words.kinds()
    groups |= {"weapon": tuple(e.name for e in words.OBJECTS.values() if e.group == "weapon")}
    groups |= {name: (name,) for name in (*words.OBJECTS, *words.STYLE_NAMES)}
    for name in names:
        if name not in groups:
            raise ValueError(f"{name!r} is no split, list, kind, object or style of this world")
    return tuple(dict.fromkeys(member for name in names for member in groups[name]))
