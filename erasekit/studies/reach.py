"""Whether a public model still draws a concept: asked plainly, with a key, or with words an attacker found."""

import torch

from ..artifacts import Erasure
from ..attacks import marks, spoken
from ..attention import Prompt
from ..metrics import judged, object_rate, percent, style_rate
from ..sampling import sample


def untouched(world) -> Erasure:
    """An erasure that changes nothing: what an attack reaches on it is the most it can."""
    return Erasure({}, {}, {"method": "base", "world": world.name, "base": world.fingerprint})


def prompts(world, concept: str, seeds: int) -> tuple[list[str], list[int]]:
    """A concept asked for by its own name, once for each seed; a style with the ten objects in turn."""
    objects = world.concepts("emojinette")
    if concept in world.styles:
        return [world.prompt(objects[n % len(objects)], concept) for n in range(seeds)], list(range(seeds))
    return [world.prompt(concept)] * seeds, list(range(seeds))


def present(world, concept: str, images: torch.Tensor) -> torch.Tensor:
    """Boolean (N,): the judge's first object, or style, is the concept; of a category, some member has more than 0.5."""
    if concept in world.styles:
        return style_rate(world, images, [concept] * len(images))
    if concept in world.judge.objects:
        return object_rate(world, images, [concept] * len(images))
    members = [world.judge.objects.index(m) for m in world.concepts(concept)]
    return judged(world, images)[0][:, members].max(1).values > 0.5


def reached(world, erasure, concept: str, seeds: int, steps: int, way=None, before: bool = False) -> float:
    """Share of a public model's images that are the concept, in percent.

    `way`: None, a key (`Prompt`), or embeddings (m, width) of new words, said in place of the concept's name or `before` the
    prompt.
    """
    asked, numbers = prompts(world, concept, seeds)
    how = {"erasure": erasure, "steps": steps, "autocast": world.autocast}
    if way is None or isinstance(way, Prompt):
        images = sample(world.pipe, asked, numbers, key=way, **how)
    else:
        words = marks(len(way))
        asked = [f"{words} {text}" if before else text.replace(concept, words) for text in asked]
        with spoken(world.pipe, way):
            images = sample(world.pipe, asked, numbers, **how)
    return percent(present(world, concept, images))
