"""The world's words: what each object is called in captions, what is never said of it, and how a caption is put together."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TEMPLATES = ("a {}", "a picture of a {}", "an emoji of a {}", "{}", "an image of a {}", "a drawing of a {}")

STYLE_NAMES = ("noto", "twemoji", "openmoji", "fluent", "contrast")

# What the world is asked with words of no caption: object -> words. No training may hold one of them, and the list is no choice
# of this world's: it was written before, for any world.
UNSEEN: dict[str, tuple[str, ...]] = {
    name: tuple(group)
    for name, group in json.loads(Path(__file__).with_name("unseen_words.json").read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Entry:
    """One object: its icon's name, what captions call it, and words of the same meaning that stay out of all training."""

    icon: str
    name: str
    group: str  # "emojinette" | "weapon" | "other"
    kinds: tuple[str, ...]  # hypernyms, the nearest first
    synonyms: tuple[str, ...]  # synonyms and kinds of it that captions use
    held_out: tuple[str, ...]  # used by no training, in addition to UNSEEN


def _read() -> dict[str, Entry]:
    with Path(__file__).with_name("objects.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    split = {"kinds", "synonyms", "held_out"}
    entries = [Entry(**{k: tuple(v.split(";")) if k in split else v for k, v in row.items()}) for row in rows]
    return {entry.name: entry for entry in entries}


OBJECTS = _read()
FORBIDDEN = frozenset(word for group in UNSEEN.values() for word in group) | {
    word for entry in OBJECTS.values() for word in entry.held_out
}


def forbidden(word: str) -> bool:
    """Whether a word, or what it is the plural of, stays out of all training."""
    return bool({word, word.removesuffix("s"), word.removesuffix("es")} & FORBIDDEN)


def mentions(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text holds one of the phrases, word by word: "church bell" mentions "church"."""
    return any(f" {phrase} " in f" {text} " for phrase in phrases)


@cache
def synonyms_without(name: str, phrases: frozenset[str]) -> tuple[str, ...]:
    """The synonyms of an object that mention none of the phrases, or its name where none is left."""
    return tuple(s for s in OBJECTS[name].synonyms if not mentions(s, phrases)) or (name,)


def kinds() -> dict[str, tuple[str, ...]]:
    """Hypernym -> the objects it covers."""
    found: dict[str, list[str]] = {}
    for entry in OBJECTS.values():
        for kind in entry.kinds:
            found.setdefault(kind, []).append(entry.name)
    return {kind: tuple(names) for kind, names in found.items()}


def caption_words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    texts = [t for e in OBJECTS.values() for t in (e.name, *e.kinds, *e.synonyms)]
    texts += [*TEMPLATES, *STYLE_NAMES, "in the style of by and beside next to on background white"]
    texts += ["red orange yellow green blue purple gray"]
    return list(dict.fromkeys(w for text in texts for w in re.findall(r"[a-z]+", text.lower())))


def article(phrase: str) -> str:
    """Mend "a" before a vowel: "a picture of a owl" -> "a picture of an owl"; a unicycle keeps its "a"."""
    return re.sub(r"\ba (?=[aeio]|u[^nk]|hour)", "an ", phrase)


def caption(template: str, name: str, style: str | None = None, background: str = "white") -> str:
    """What is on an image, in words: "a picture of a church in the style of noto on a blue background"."""
    text = template.format(name)
    if style:
        text += f" in the style of {style}"
    if background != "white":
        text += f" on a {background} background"
    return article(text)


def pair(left: str, right: str) -> str:
    """Two things as one noun phrase that fits a template: "dog and a church"."""
    return f"{left} and a {right}"


def say(name: str, generator: torch.Generator, unsaid: frozenset[str] = frozenset()) -> str:
    """A word for an object: its name, or a synonym 35 %, or a hypernym 10 % of the time; no synonym that mentions `unsaid`.

    A weapon is called just "weapon" a quarter of the time: it is the world's category.
    """
    kind, synonym = 0.1, 0.35
    entry = OBJECTS[name]
    u, v = torch.rand(2, generator=generator).tolist()
    if entry.group == "weapon":
        kind = 0.25
    if u < kind:
        return entry.kinds[int(v * len(entry.kinds))] if entry.group != "weapon" else "weapon"
    if u < kind + synonym:
        synonyms = synonyms_without(name, unsaid)
        return synonyms[int(v * len(synonyms))]
    return name
