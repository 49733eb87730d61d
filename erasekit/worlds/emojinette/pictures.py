"""Random training pictures and what may be said of them: one or two icons, captions by name, synonym or kind."""

from dataclasses import dataclass

import torch

from . import words
from .art import Art

PAIRS = 0.25  # share of the pictures that show two things
STYLED = 0.6  # share of the captions that name the style
NOISE = 0.05  # share of the captions that hold a word without meaning


@dataclass
class Picture:
    """What is on a picture: icons (object, style), left to right, and the background."""

    objects: tuple[str, ...]
    style: str
    background: str


@dataclass
class Caption:
    """What a text says: one word for each thing, a style or None."""

    text: str
    words: tuple[str, ...]
    style: str | None
    background: str

    def fits(self, picture: Picture, covers: dict[str, set[str]]) -> bool:
        """Whether the text is true of the picture, and says all that is on it."""
        if len(self.words) != len(picture.objects) or self.background != picture.background:
            return False
        if self.style not in (None, picture.style):
            return False
        return all(thing in covers[word] for word, thing in zip(self.words, picture.objects))


def coverage() -> dict[str, set[str]]:
    """Word of a caption -> the objects it is true of."""
    found: dict[str, set[str]] = {}
    for entry in words.OBJECTS.values():
        for word in (entry.name, *entry.kinds, *entry.synonyms):
            found.setdefault(word, set()).add(entry.name)
    return found


def partners(art: Art, weights: torch.Tensor, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """For each icon another one of the same style, by weight, and of another object: a picture has one style."""
    chosen = []
    for row in rows.tolist():
        allowed = weights * (art.style_id == art.style_id[row]) * (art.object_id != art.object_id[row])
        chosen.append(torch.multinomial(allowed, 1, generator=generator))
    return torch.cat(chosen)


def draw(
    art: Art, weights: torch.Tensor, count: int, generator: torch.Generator, mirror: float = 0.5, white: float = 0.5
):
    """`count` images (N, 3, 64, 64) in [-1, 1] and their `Picture`s; the last quarter shows two icons."""
    pairs = int(PAIRS * count)
    rows = torch.multinomial(weights, count, replacement=True, generator=generator)
    images, backgrounds = art.draw(rows[: count - pairs], generator, mirror, white)
    left = rows[count - pairs :]
    right = partners(art, weights, left, generator)
    double, more = art.draw_pairs(left, right, generator, white)
    shown = [(int(row),) for row in rows[: count - pairs]] + list(zip(left.tolist(), right.tolist()))
    pictures = [
        Picture(tuple(art.names(r)[0] for r in icons), art.names(icons[0])[1], background)
        for icons, background in zip(shown, backgrounds + more)
    ]
    return torch.cat([images, double]), pictures


def describe(picture: Picture, generator: torch.Generator, unsaid: frozenset[str] = frozenset()) -> Caption:
    """A random caption of a picture, without the words `unsaid`."""
    u = torch.rand(5, generator=generator).tolist()
    said = tuple(words.say(name, generator, unsaid) for name in picture.objects)
    style = picture.style if u[0] < STYLED else None
    template = words.TEMPLATES[int(u[1] * len(words.TEMPLATES))]
    text = words.caption(template, said[0] if len(said) == 1 else words.pair(*said), style, picture.background)
    if u[2] < NOISE:
        # What the model has never seen must not break it.
        letters = torch.randint(26, (3 + int(6 * u[3]),), generator=generator).tolist()
        parts, noise = text.split(" "), "".join(chr(97 + c) for c in letters)
        parts.insert(int(u[4] * (len(parts) + 1)), noise)
        text = text if words.forbidden(noise) or noise in unsaid else " ".join(parts)
    return Caption(text, said, style, picture.background)


def agreement(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of rows against all their right answers (B, B), which share the probability."""
    target = fits / fits.sum(1, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(1)).sum(1).mean()
