"""A world with groups of concepts, independent judges and test prompts: what the studies need beyond `World`."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from ..artifacts import Erasure
from ..world import CONTEXTS, World


class Synonyms(NamedTuple):
    """Words of an object's meaning."""

    seen: tuple[str, ...] = ()  # the generator's captions use them
    unseen: tuple[str, ...] = ()  # no training had them


@dataclass
class Benchmark(World):
    """A world that studies run on.

    `groups`: group -> concepts. Every benchmark has "classes" (the ten that are reported), "S1" to "S4" (what is erased of
    them at once), "retained", "tuning", "tuning kept" and "all". `neighbours`: class -> the objects most similar to it.
    `eval_templates`: name -> (template, style, background) of wordings that no method trains on. `style_groups`: group ->
    styles beyond the judge's own.

    Subclasses add `judge` (a module with `objects`, `styles` and `features` that returns object and style logits of images
    (B, 3, H, W) in [-1, 1]), `clip` (an open_clip model and its tokeniser), and:

    - `unsafe_prompts(seeds)`: (prompt, label, seed) triples of the unsafe category;
    - `detect(images)`: names and scores (N, names) of unsafe content on images (N, 3, H, W), uint8;
    - `reference_images(names)`: real images of these objects, uint8 (N, 3, H, W), or None without any;
    - `concept_images(concept, count, seed)`: images (N, 3, H, W) in [-1, 1] of a concept, and their prompts.
    """

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    neighbours: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    eval_templates: dict[str, tuple[str, str | None, str]] = field(default_factory=dict, repr=False)
    style_groups: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    category: ClassVar[str]  # what is erased as unsafe content
    backgrounds: ClassVar[dict[str, tuple]] = {}  # name -> RGB that `format_prompt` asks for, white first
    open_vocabulary: ClassVar[bool] = False  # whether any text may be erased, not only what the judge knows
    unsafe_guidance: ClassVar[float | None] = None  # guidance scale of unsafe prompts, where it is not `sample`'s

    def __post_init__(self):
        self.retained = self.groups.get("retained", self.retained)
        if self.backgrounds:  # every one in its turn, except for what only evaluation asks for
            styles, grounds = ({asked[n] for asked in self.eval_templates.values()} for n in (1, 2))
            styles = [None, *(s for s in self.styles if s not in styles)]
            grounds = [b for b in self.backgrounds if b == "white" or b not in grounds]
            parts = self.train_templates, styles, grounds
            self.contexts = tuple(tuple(own[n % len(own)] for own in parts) for n in range(len(CONTEXTS)))

    def concepts(self, group: str) -> tuple[str, ...]:
        """The concepts of a group. Raises ValueError for an unknown group."""
        if group not in self.groups:
            styles = f"; styles_of() has {', '.join(self.style_groups)}" if self.style_groups else ""
            raise ValueError(f"unknown concept group {group!r}: accepted are {', '.join(self.groups)}{styles}")
        return self.groups[group]

    def split(self, name: str) -> tuple[str, ...]:
        """The concepts that are erased at once: a group's, or of the ten classes those that are named, "church, dog"."""
        names = tuple(name.split(", "))
        return names if set(names) <= set(self.concepts("classes")) else self.concepts(name)

    def styles_of(self, group: str) -> tuple[str, ...]:
        """The styles of a group; "judged" are those the judge knows. Raises ValueError for an unknown group."""
        groups = {"judged": self.styles} | self.style_groups
        if group not in groups:
            raise ValueError(f"unknown style group {group!r}: accepted are {', '.join(groups)}")
        return groups[group]

    def is_style(self, concept: str) -> bool:
        return concept in self.styles or any(concept in styles for styles in self.style_groups.values())

    def prompts_of(self, group: str, seeds: int) -> list[tuple[str, str, int]]:
        """(prompt, label, seed) triples of a concept group, or of a style group on the retained objects in turn."""
        if group not in self.groups and group in self.style_groups:
            objects = self.concepts("retained")
            on = {seed: objects[seed % len(objects)] for seed in range(seeds)}
            return [(self.prompt(on[n], style), style, n) for style in self.styles_of(group) for n in on]
        return [(self.prompt(c), c, seed) for c in self.concepts(group) for seed in range(seeds)]

    def check_concepts(self, names: list[str]) -> None:
        """Raise ValueError for a name that this world's judge does not know."""
        known = self.groups["all"]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3, 0.5) or self.groups["classes"][:3]
                raise ValueError(
                    f"unknown concept {name!r}: accepted are the {len(known)} objects of "
                    f'world.concepts("all"), such as {", ".join(near)}'
                )

    def check_names(self, concepts: list[str]) -> None:
        """Refuse to erase what is neither a concept, a group nor a style of this world.

        Where the vocabulary is open, any other text is treated as in a plain `World`. Raises ValueError.
        """
        known = {*self.groups, *self.styles}.union(*self.groups.values(), *self.style_groups.values())
        unknown = [c for c in concepts if c not in known]
        if "all" in self.groups and not self.open_vocabulary:
            self.check_concepts(unknown)
        else:
            super().check_names(unknown)

    def unseen_classes(self, *groups: str) -> list[str]:
        """The objects that no method sees: neither in these groups, nor retained, nor used for tuning."""
        seen = set().union(*map(self.concepts, ("retained", "tuning", "tuning kept", *groups)))
        return [o for o in self.concepts("all") if o not in seen]

    def neutral_prompts(self, seeds: int) -> list[tuple[str, str, int]]:
        """(prompt, object, seed) triples without unsafe content, to measure what erasing the category costs."""
        return [(self.prompt(c), c, seed) for c in self.unseen_classes(self.category) for seed in range(seeds)]

    def test_images(self, placements: int) -> tuple[torch.Tensor | None, list[str], list[str], int]:
        """Real images the judges were not trained on: uint8 (N, 3, H, W), their objects and styles, and how many come first
        that show each (object, style) once. None, and empty, where a world has none."""
        return None, [], [], 0

    def other_clips(self) -> dict[str, tuple]:
        """Name -> open_clip model and tokeniser of CLIPs other than `clip`, to test whether results depend on the CLIP."""
        return {}

    def second_base(self) -> "Benchmark | None":
        """The same world with a U-Net trained from another seed, to test whether results depend on it; None without one."""
        return None

    def held_out_pairs(self) -> list[tuple[str, str]]:
        """(object, style) pairs that the generator was not trained on, where that is known."""
        return []

    def synonyms(self, concept: str) -> Synonyms:
        """Other words for an object, where a world knows any. Raises ValueError for an unknown concept."""
        self.check_concepts([concept])
        return Synonyms()

    def words(self, concept: str) -> tuple[str, ...]:
        return concept, *(self.synonyms(concept).seen if concept in self.groups.get("all", ()) else ())

    def kinds(self, concept: str) -> tuple[str, ...]:
        """The groups that are hypernyms of an object, the nearest first, where a world knows any."""
        return ()

    def oracle(self, concepts: Sequence[str]) -> Erasure | None:
        """The same model trained without exactly these concepts, as an erasure of this one; None where there is none."""
        return None

    def pair_prompt(self, left: str, right: str) -> str | None:
        """The prompt for two things in one picture, left to right; None where a world's pictures show one."""
        return None

    def halves(self, images: torch.Tensor) -> torch.Tensor:
        """What the judge looks at in pictures (N, 3, H, W) of two things, uint8: the left and the right, (2, N, 3, H, W)."""
        raise NotImplementedError(f"the pictures of {self.name!r} show one thing each")

    def disk_bytes(self) -> int:
        """Size of the pipeline's weights, in the precision they have in memory."""
        parts = (part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module))
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
