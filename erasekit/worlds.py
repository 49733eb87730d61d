"""A world: a base pipeline, the concepts in it, how to ask for them, and judges that were trained apart from it."""

import copy
import difflib
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from diffusers import StableDiffusionPipeline

from .artifacts import fingerprint
from .paths import MODELS
from .text import encode

WORLDS = ("emojinette",)
PRECISIONS = ("auto", "fp32", "bf16")

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

# The wordings methods that work on sentences are given. Others ("an emoji of a ...", with a style, on a colour) are only tested.
TOLD = ("a picture of a {}", "a {}", "{}")

LISTS = {"retained": RETAINED, "tuning": TUNING, "tuning kept": TUNING_KEPT}


@dataclass
class World:
    """See `load`. `groups`: name of a group -> its concepts."""

    name: str
    pipe: StableDiffusionPipeline
    groups: dict[str, tuple[str, ...]]
    styles: tuple[str, ...]
    precision: str
    template: str = "a picture of a {}"
    trajectories: dict = field(default_factory=dict, repr=False)  # what `trajectories.roll` has rolled
    before: "World | None" = field(
        default=None, repr=False
    )  # the world that earlier erasures were made on, see `after`

    @property
    def origin(self) -> "World":
        """The world no erasure was made on yet."""
        return self.before.origin if self.before else self

    def after(self, erasure) -> "World":
        """The same world with an erasure's public model for its own, for the next erasure to start from; this one stays.

        Raises ValueError for an erasure that is more than weights.
        """
        if not erasure.delta:
            raise ValueError(f"{erasure.info['method']!r} does not end in weights: no other erasure can start from it")
        parts = self.pipe.components | {"unet": copy.deepcopy(self.pipe.unet)}
        erasure.apply(parts["unet"])
        erasure._originals = None  # it stays applied to the copy, and can be applied elsewhere
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return replace(self, pipe=pipe, trajectories={}, before=self)

    @property
    def fingerprint(self) -> str:
        """Hash of the U-Net as it is now; artefacts carry that of their base."""
        return fingerprint(self.pipe.unet)

    @cached_property
    def judge(self):
        """The object and style classifier."""
        from .emojinette.judges import Judge

        return Judge.load(MODELS / "emojinette-judge").to(self.pipe.device)

    @cached_property
    def clip(self):
        """The open_clip model and its tokeniser."""
        from .emojinette.judges import load_clip

        return load_clip(MODELS / "emojinette-clip")

    def concepts(self, group: str) -> tuple[str, ...]:
        """The concepts of a group. Raises ValueError naming the groups there are."""
        if group not in self.groups:
            raise ValueError(f"unknown concept group {group!r}: accepted are {', '.join(self.groups)}")
        return self.groups[group]

    def check(self, names: list[str]) -> None:
        """Raise ValueError for a name that this world's judge does not know."""
        for name in names:
            if name not in self.groups["all"]:
                near = difflib.get_close_matches(name, self.groups["all"], 3, 0.5) or self.groups["emojinette"][:3]
                raise ValueError(
                    f"unknown concept {name!r}: accepted are the {len(self.groups['all'])} objects of "
                    f'world.concepts("all"), such as {", ".join(near)}'
                )

    def prompt(self, concept: str, style: str | None = None) -> str:
        """How this world asks for a concept: "a picture of a church"."""
        return self.wording(self.template, concept, style)

    def subjects(self, concept: str) -> list[tuple[str, str]]:
        """The texts a concept is erased by, each with the text it is erased towards.

        An object, or a category: its prompt, towards "". A style: retained objects in that style, towards the same objects
        in no style, so that the style goes and the object stays.
        """
        if concept not in self.styles:
            return [(self.prompt(concept), "")]
        return [(self.prompt(o, concept), self.prompt(o)) for o in self.groups["retained"]]

    def sentences(self, concept: str) -> list[tuple[str, str]]:
        """The same for methods that work on text alone: more wordings, with the concept and without."""
        if concept not in self.styles:
            return [(self.wording(t, concept), "") for t in TOLD]
        return self.subjects(concept)

    def unsafe_text(self, concepts: list[str]) -> str:
        """Several concepts in one text, for methods that steer away from one: "church, dog"."""
        styles = [c for c in concepts if c in self.styles]
        return "in the style of " + ", ".join(styles) if styles else ", ".join(concepts)

    def wording(self, template: str, concept: str, style: str | None = None, background: str = "white") -> str:
        """A concept in another template than this world's own."""
        from .emojinette.art import caption

        return caption(template, concept, style, background)

    def anchor(self, concept: str) -> str:
        """The retained object whose prompt is nearest to the concept's in the text encoder, by cosine."""
        candidates = [o for o in self.groups["retained"] if o != concept]
        own, *others = encode(self.pipe, [self.prompt(concept), *map(self.prompt, candidates)]).flatten(1)
        return candidates[int(torch.cosine_similarity(torch.stack(others), own[None]).argmax())]

    def anchors(self, concept: str) -> list[str]:
        """For each of its subjects, what this world does draw: the nearest retained object, or the same object in no style."""
        return [towards or self.prompt(self.anchor(concept)) for _, towards in self.subjects(concept)]

    def concept_tokens(self, concept: str) -> torch.Tensor:
        """The text encoder's outputs (n, d_ctx) at the concept's own tokens, from which a learnable prompt starts."""
        count = len(self.pipe.tokenizer(concept, truncation=True).input_ids) - 2  # without start and end
        return encode(self.pipe, [concept])[0, 1 : 1 + count]

    def autocast(self):
        """The precision training runs in: bf16 where the processor multiplies it in hardware, else float32."""
        if self.precision == "bf16":
            return torch.autocast(self.pipe.device.type, dtype=torch.bfloat16)
        return nullcontext()


def load(world: str = "emojinette", device: str | None = None, precision: str = "auto") -> World:
    """Load a world by name onto a device (default: the GPU if there is one), float32 weights.

    Raises ValueError for an unknown world or precision, and FileNotFoundError where its weights are missing.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}: accepted are {', '.join(WORLDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: accepted are {', '.join(PRECISIONS)}")
    folder = MODELS / "emojinette-sd"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"there are no weights in {folder}: `python -m erasekit.emojinette.train` makes them")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    # diffusers notes at every load that a pipeline without a safety checker should not face the public.
    logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").setLevel(logging.ERROR)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    from .emojinette.art import load_art

    art = load_art()
    groups = {"all": tuple(art.objects)} | {name: tuple(names) for name, names in art.category.items()}
    return World("emojinette", pipe.to(device), groups | SPLITS | LISTS, tuple(art.styles), precision)


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are done in hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
