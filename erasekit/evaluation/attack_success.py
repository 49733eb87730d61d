"""Attack success rate: how often a public model generates a concept, by its prompt, with a key, or with new tokens."""

import torch
from torch import Tensor

from ..artifacts import Erasure
from ..attention import Prompt
from ..sampling import sample
from ..tokens import add_tokens, placeholder_tokens
from .attacks import hard_prompt_search, optimize_key, textual_inversion
from .images import sample_images
from .metrics import object_correct, percent, style_correct

# Name -> search, and whether its tokens go before the prompt or, like a key, do not.
ATTACKS = {
    "optimized key": (optimize_key, False),
    "textual inversion": (textual_inversion, False),
    "hard prompt": (hard_prompt_search, True),
}


def untouched(world) -> Erasure:
    """An erasure that changes nothing: an attack on it shows the highest success it can have."""
    return Erasure({}, {}, {"method": "base", "world": world.name, "base": world.fingerprint})


def references(world, concepts) -> dict[str, Erasure]:
    """What attacks on an erasure of `concepts` are compared with: the "base", and the "oracle" where the world has theirs."""
    oracle = world.oracle(concepts)
    return {"base": untouched(world)} | ({"oracle": oracle} if oracle else {})


def prompts(world, concept: str, seeds: int) -> tuple[list[str], list[int]]:
    """Prompts with the concept's own name, and seeds; a style is combined with the ten objects in turn."""
    objects = world.concepts("classes")
    if world.is_style(concept):
        return [world.prompt(objects[n % len(objects)], concept) for n in range(seeds)], list(range(seeds))
    return [world.prompt(concept)] * seeds, list(range(seeds))


def concept_present(world, concept: str, images: Tensor) -> Tensor:
    """Boolean (N,): the judge's first object, or style, is the concept; a category needs a member with more than 0.5."""
    if world.is_style(concept):
        return style_correct(world, images, [concept] * len(images))
    if concept in world.judge.objects:
        return object_correct(world, images, [concept] * len(images))
    return world.detect(images)[1].max(1).values > 0.5


def success_rate(
    world,
    erasure,
    concept: str,
    seeds: int,
    steps: int,
    found: Prompt | Tensor | None = None,
    before: bool = False,
    first_seed: int = 0,
) -> float:
    """Share of the public model's images that show the concept, in percent.

    `found`: None for the plain prompt, a key, or embeddings (m, width) of new tokens, which replace the concept's name or
    come `before` the prompt.
    """
    texts, numbers = prompts(world, concept, seeds)
    numbers = [first_seed + n for n in numbers]
    if not isinstance(found, torch.Tensor):
        images = sample_images(world, erasure, [(text, concept, n) for text, n in zip(texts, numbers)], steps, found)
    else:
        new = placeholder_tokens(len(found))
        texts = [f"{new} {text}" if before else text.replace(concept, new) for text in texts]
        options = {"num_inference_steps": steps, "batch_size": world.batch_size}
        with add_tokens(world.pipe, found):
            images = sample(world, texts, numbers, erasure=erasure, **options)
    return percent(concept_present(world, concept, images))
