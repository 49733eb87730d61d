"""A world: a base pipeline, the concepts in it, how to ask for them, and judges that were trained apart from it."""

import copy
import difflib
import hashlib
import importlib
import json
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

from .artifacts import fingerprint
from .processes import shares
from .text import encode, tokens

WORLDS = ("emojinette", "sd14", "sd15", "sd21", "sdxl")
OTHERS = "or a pipeline in diffusers' format, by its folder or as owner/name on the hub"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class World:
    """See `load`. What is a world's own beyond these fields is in its class, such as `emojinette.world.Emojinette`:
    `judge` (object and style logits, and the names of both), `clip` (model and tokeniser), and where pictures come from.

    `groups`: name of a group -> its concepts. Every world that studies run on has "classes" (the ten that are reported),
    "S1" to "S4" (what is erased of them at once), "retained", "tuning", "tuning kept" and "all". `neighbours`: class -> what is
    nearest to it. `told`: the wordings that methods are given; `forms`: name -> (template, style, background) of others.
    """

    name: str
    pipe: DiffusionPipeline
    groups: dict[str, tuple[str, ...]]
    styles: tuple[str, ...]
    precision: str
    template: str = "a picture of a {}"
    told: tuple[str, ...] = ("a picture of a {}", "a {}", "{}")
    forms: dict[str, tuple[str, str | None, str]] = field(default_factory=dict, repr=False)
    neighbours: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    # What `trajectories.roll` has rolled.
    trajectories: dict = field(default_factory=dict, repr=False)
    # The world that earlier erasures were made on, see `after`.
    before: "World | None" = field(default=None, repr=False)

    # A world's own training: times the bundled world's learning rates, and settings in place of a method's defaults.
    lr_scale = 1.0
    # Images of a batch, and whether studies keep them in the build folder, so that a long drawing goes on where it stopped.
    batch = 100
    # The guidance scale that unsafe prompts are drawn with, where it is not `sample`'s.
    unsafe_guidance: ClassVar[float | None] = None
    keeps_images = False
    training: ClassVar[dict] = {}

    def settings(self, study: str, scale: str) -> dict:
        """Settings of a study that are this world's own."""
        return {}

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
        checked = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        next_ = copy.copy(self)  # with its judges, which no erasure touches
        next_.pipe, next_.trajectories, next_.before = type(self.pipe)(**parts, **checked), {}, self.origin
        next_.pipe.set_progress_bar_config(disable=True)
        return next_

    @property
    def version(self) -> str:
        """Hash of all that decides what this world draws and is asked: its networks, and files it was given."""
        return self.networks

    @property
    def networks(self) -> str:
        """Hash of all that decides an image: the U-Net as it is now, and what stands beside it."""
        return hashlib.sha256(f"{self.fingerprint} {self.beside}".encode()).hexdigest()

    @cached_property
    def beside(self) -> str:
        """Hash of the text encoders, the VAE and the sampler's settings, none of which an erasure touches."""
        parts = sorted(
            (n, p) for n, p in self.pipe.components.items() if isinstance(p, torch.nn.Module) and n != "unet"
        )
        config = self.pipe.scheduler.config
        sampler = {name: str(config[name]) for name in sorted(config) if not name.startswith("_")}
        return hashlib.sha256(json.dumps([[n, fingerprint(p)] for n, p in parts] + [sampler]).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of the U-Net as it is now; artefacts carry that of their base."""
        return fingerprint(self.pipe.unet)

    def concepts(self, group: str) -> tuple[str, ...]:
        """The concepts of a group. Raises ValueError naming the groups there are."""
        if group not in self.groups:
            raise ValueError(f"unknown concept group {group!r}: accepted are {', '.join(self.groups)}")
        return self.groups[group]

    def bystanders(self, *groups: str) -> list[str]:
        """The objects that no method is told about: neither in these groups, nor retained, nor used to choose strengths."""
        known = set().union(*map(self.concepts, ("retained", "tuning", "tuning kept", *groups)))
        return [o for o in self.concepts("all") if o not in known]

    def kept_prompts(self, seeds: int) -> list[tuple[str, str, int]]:
        """(prompt, object, seed) triples of everything else, for when the unsafe category is erased."""
        return [(self.prompt(c), c, seed) for c in self.bystanders(self.category) for seed in range(seeds)]

    def known_pictures(self, placements: int) -> tuple[torch.Tensor | None, list[str], list[str], int]:
        """Real pictures (N, 3, H, W), uint8, that judges were not trained on, their objects and styles, and how many come first
        that show each just once. None, and empty, where a world has none."""
        return None, [], [], 0

    def other_clips(self) -> dict[str, tuple]:
        """Name -> open_clip model and tokeniser: others than `clip`, to ask whether what CLIP says depends on which CLIP."""
        return {}

    def held_out(self) -> list[tuple[str, str]]:
        """(object, style) pairs that the generator never saw, where that is known."""
        return []

    def disk_bytes(self) -> int:
        """What the pipeline's weights take on disk, as they are in memory."""
        parts = (part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module))
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def check(self, names: list[str]) -> None:
        """Raise ValueError for a name that this world's judge does not know."""
        for name in names:
            if name not in self.groups["all"]:
                near = difflib.get_close_matches(name, self.groups["all"], 3, 0.5) or self.groups["classes"][:3]
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
            return [(self.wording(t, concept), "") for t in self.told]
        return self.subjects(concept)

    def unsafe_text(self, concepts: list[str]) -> str:
        """Several concepts in one text, for methods that steer away from one: "church, dog"."""
        styles = [c for c in concepts if c in self.styles]
        return "in the style of " + ", ".join(styles) if styles else ", ".join(concepts)

    def wording(self, template: str, concept: str, style: str | None = None, background: str = "white") -> str:
        """A concept in another template than this world's own."""
        text = template.format(concept) + (f" in the style of {style}" if style else "")
        return text + (f" on a {background} background" if background != "white" else "")

    def anchor(self, concept: str) -> str:
        """The retained object whose prompt is nearest to the concept's in the text encoder, by cosine."""
        candidates = [o for o in self.groups["retained"] if o != concept]
        own, *others = tokens(self.pipe, [self.prompt(concept), *map(self.prompt, candidates)]).float().flatten(1)
        return candidates[int(torch.cosine_similarity(torch.stack(others), own[None]).argmax())]

    def anchors(self, concept: str) -> list[str]:
        """For each of its subjects, what this world does draw: the nearest retained object, or the same object in no style."""
        return [towards or self.prompt(self.anchor(concept)) for _, towards in self.subjects(concept)]

    def concept_tokens(self, concept: str) -> torch.Tensor:
        """The text encoder's outputs (n, d_ctx) at the concept's own tokens, from which a learnable prompt starts."""
        count = len(self.pipe.tokenizer(concept, truncation=True).input_ids) - 2  # without start and end
        return encode(self.pipe, [concept])[0, 1 : 1 + count]

    def autocast(self):
        """The precision that training runs in."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.pipe.device.type, dtype=half) if half else nullcontext()


def load(world: str = "emojinette", device: str | None = None, precision: str = "auto", **own) -> World:
    """Load a world onto a device (default: the GPU if there is one): a name of `WORLDS`, or a Stable Diffusion in diffusers'
    format, as a hub id or a local folder.

    `precision`: of training and drawing; "auto" is bf16 where the processor multiplies it in hardware, else fp16 on a GPU and
    fp32 on a CPU. `own`: what else the world takes; for Stable Diffusion `revision` and files, see `StableDiffusion`. Raises
    ValueError for an unknown world, precision or option, and FileNotFoundError where weights are missing.
    """
    if not possible(world):
        raise ValueError(f"unknown world {world!r}: accepted are {', '.join(WORLDS)}, {OTHERS}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: accepted are {', '.join(PRECISIONS)}")
    device = device or own_device()
    if precision == "fp16" and not device.startswith("cuda"):
        raise ValueError("precision 'fp16' is for a GPU: accepted on a CPU are auto, fp32, bf16")
    if precision == "auto":
        slow = "fp16" if device.startswith("cuda") else "fp32"
        precision = "bf16" if fast_bf16(device) else slow
    # By name, not by import: a record depends on the code of its own world alone.
    module = "emojinette.world" if world == "emojinette" else "stable_diffusion"
    return importlib.import_module(f".{module}", __package__).load(world, device, precision, **own)


def possible(world: str) -> bool:
    """Whether this may name a world: one of `WORLDS`, a folder with a pipeline, or owner/name on the hub."""
    path = Path(world)
    return (
        world in WORLDS or (path / "model_index.json").exists() or (bool(HUB_ID.fullmatch(world)) and not path.exists())
    )


def called(world: str) -> str:
    """The name a world's records lie under: a folder's last part, or owner--name."""
    return world if world in WORLDS else Path(world).name if Path(world).exists() else world.replace("/", "--")


def own_device() -> str:
    """A GPU if there is one; each of several processes has its own."""
    if not torch.cuda.is_available():
        return "cpu"
    rank, processes = shares()
    return f"cuda:{rank % torch.cuda.device_count()}" if processes > 1 else "cuda"


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are done in hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
