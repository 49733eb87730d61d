"""A world: a pipeline, how it is prompted for a concept, and the settings its trainings share."""

import copy
import hashlib
import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

from .base import networks_of, part_hashes
from .checks import as_texts, check_choice, check_concepts
from .conditioning import encode, token_embeddings, token_ids
from .provenance import fingerprint
from .sampling import check_pipe, noise_schedule

PRECISIONS = ("fp32", "bf16", "fp16")
SCENES = "in a park, on a beach, at night, in the snow, on a table, in a city street, in a forest, by a lake, in a room"
SCENES += ", under a clear sky"
CONTEXTS = tuple(
    (f"{kind} of a {{}} {s}", None, "white") for s in SCENES.split(", ") for kind in ("a photo", "a drawing")
)


@dataclass
class World:
    """A diffusers pipeline of Stable Diffusion 1, 2 or XL with its prompts: `World(pipe, template="a photo of a {}")`.

    Nothing but the pipeline is needed, and it may be changed between calls: hashes are those of its parts as they are now.
    `template` asks for a concept, `train_templates` are the wordings methods train on. `retained`: concepts whose prediction
    may be kept while training, which anchors are taken from too. `styles`: concepts that are styles. `precision`: of training
    and sampling, "fp32", "bf16" or "fp16". `contexts`: (template, style, background) of each of the `diverse_prompts`.
    """

    pipe: DiffusionPipeline
    name: str = "custom"
    template: str = "a picture of a {}"
    train_templates: tuple[str, ...] = ("a picture of a {}", "a {}", "{}")
    retained: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    precision: str = "fp32"
    contexts: tuple[tuple[str, str | None, str], ...] = field(default=CONTEXTS, repr=False)
    trajectories: dict = field(default_factory=dict, repr=False)  # cache of trajectories.make_pool
    parent: "World | None" = field(default=None, repr=False)  # the world an erasure was applied to, see `with_erasure`
    chain: tuple[dict, ...] = field(default=(), repr=False)  # the erasures that lead here from `root`, in order
    # Defaults of trained methods in this world: all of them, and those that train weights, whose rate is also scaled.
    pool_defaults: dict = field(default_factory=dict, repr=False)
    train_defaults: ClassVar[dict] = {}
    lr_scale: ClassVar[float] = 1.0
    sampler: ClassVar[str] = "ddim"  # of `sample`, whatever the pipeline's scheduler
    batch_size: ClassVar[int] = 100  # images sampled at once
    keeps_images: ClassVar[bool] = False  # whether studies store images and erasures, so that long sampling resumes

    def __post_init__(self):
        check_pipe(self.pipe)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("train_templates", "retained", "styles"):
            setattr(self, name, as_texts(name, getattr(self, name)))
        for template in (self.template, *(self.train_templates or [None])):
            if not isinstance(template, str) or re.sub(r"[^{}]", "", template) != "{}" or "{}" not in template:
                raise ValueError(f"template {template!r} is not possible: it has one {{}}, where the concept stands")

    @property
    def root(self) -> "World":
        """The world before any erasure."""
        return self.parent.root if self.parent else self

    def with_erasure(self, erasure) -> "World":
        """A copy of this world with an erasure's public model as its model, for the next erasure to start from.

        Raises ValueError for an erasure that is more than weights.
        """
        if not erasure.delta:
            raise ValueError(f"{erasure.info['method']!r} does not end in weights: no other erasure can start from it")
        networks = networks_of(self.pipe, erasure.delta).items()
        parts = self.pipe.components | {prefix.rstrip(".") or "unet": copy.deepcopy(n) for prefix, n in networks}
        unchecked = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        child = copy.copy(self)  # shares the judges, which no erasure touches
        child.pipe, child.trajectories, child.parent = type(self.pipe)(**parts, **unchecked), {}, self.root
        erasure.apply(child.pipe)
        child.pipe.set_progress_bar_config(disable=True)
        link = {name: erasure.info.get(name) for name in ("method", "concepts", "base")}
        child.chain = (*self.chain, link | {"digest": erasure.digest()})
        return child

    @property
    def version(self) -> str:
        """Hash of everything that decides what this world draws and is asked."""
        return self.pipeline_hash

    @property
    def pipeline_hash(self) -> str:
        """Hash of everything that decides an image: the U-Net as it is now, and the other components."""
        return hashlib.sha256(f"{self.fingerprint} {self.components_hash}".encode()).hexdigest()

    @property
    def components_hash(self) -> str:
        """Hash of the text encoders, the VAE and the scheduler's settings as they are now."""
        networks = [part for part in sorted(part_hashes(self.pipe).items()) if part[0] != "unet"]
        return hashlib.sha256(json.dumps([*networks, scheduler_settings(self.pipe)]).encode()).hexdigest()

    @property
    def identity(self) -> dict:
        """What artefacts name: the world, the hashes of its U-Net ("base"), its other parts and of all in bf16, its noise
        schedule, and the erasures before it, if any."""
        parts = {name: value for name, value in part_hashes(self.pipe).items() if name != "unet"}
        parts["scheduler"] = hashlib.sha256(json.dumps(scheduler_settings(self.pipe)).encode()).hexdigest()
        about = {"world": self.name, "base": self.fingerprint, "components": parts, "noise": noise_schedule(self.pipe)}
        about["bf16"] = part_hashes(self.pipe, torch.bfloat16)
        return about | ({"chain": [dict(link) for link in self.chain]} if self.chain else {})

    @property
    def fingerprint(self) -> str:
        """Hash of the U-Net as it is now; artefacts carry that of their base."""
        return fingerprint(self.pipe.unet)

    def is_style(self, concept: str) -> bool:
        return concept in self.styles

    def check_names(self, concepts: list[str]) -> None:
        """Warn of concepts this model may not know, because its tokeniser splits each of their words."""
        for concept in concepts:
            words = [self.pipe.tokenizer.tokenize(word) for word in concept.split()]
            if all(len(pieces) > 1 for pieces in words):
                split = " ".join("-".join(p.removesuffix("</w>") for p in pieces) for pieces in words)
                warnings.warn(f"this model reads {concept!r} as {split!r}: is it spelled right?", stacklevel=3)

    def check_request(self, concepts: list[str], retain=()) -> list[str]:
        """The concepts as a list of texts.

        Raises ValueError for no such list, an unknown one, and one the same for this model as another or a retained one.
        """
        concepts = check_concepts(concepts)
        self.check_names([*concepts, *filter(None, retain)])
        if not self.retained and (styles := [c for c in concepts if self.is_style(c)]):
            raise ValueError(
                f"{styles[0]!r} is a style, erased on retained objects: give the world some, retained=[...]"
            )
        seen = {}
        for name in (*filter(None, retain), *concepts):
            prompt, _ = self.prompt_pairs(name)[0]
            other = seen.setdefault(tuple(token_ids(self.pipe, prompt)), name)
            if name in concepts and other in retain:
                raise ValueError(
                    f"{name!r} is to be erased and {other!r} retained, which this model reads as the same: drop one"
                )
            if name in concepts and other != name:
                raise ValueError(
                    f"{other!r} and {name!r} are the same to this model, which reads "
                    f"{self.pipe.tokenizer.model_max_length} tokens at most: drop one"
                )
        return concepts

    def prompt(self, concept: str, style: str | None = None) -> str:
        """The prompt for a concept: "a picture of a church"."""
        return self.format_prompt(self.template, concept, style)

    def format_prompt(self, template: str, concept: str, style: str | None = None, background: str = "white") -> str:
        """The prompt for a concept in any template."""
        text = template.format(concept) + (f" in the style of {style}" if style else "")
        return text + (f" on a {background} background" if background != "white" else "")

    def words(self, concept: str) -> tuple[str, ...]:
        """The words for a concept that `contexts` are filled with."""
        return (concept,)

    def forms(self, concept: str, diverse: bool) -> list[tuple[str, str, str | None, str]]:
        """(word, template, style, background) of each of `prompt_pairs`; the word stands for the concept, or a style's object."""
        words = self.retained if self.is_style(concept) else self.words(concept) if diverse else (concept,)
        contexts = self.contexts if diverse else ((self.template, None, "white"),)
        return [(word, *c) for n, word in enumerate(words) for c in contexts[n :: len(words)] or contexts[:1]]

    def prompt_pairs(self, concept: str, diverse: bool = False) -> list[tuple[str, str]]:
        """The prompts a concept is erased by, each with the prompt it is erased towards.

        An object or a category: its prompt, towards "". A style: retained objects in that style, towards the same objects in
        no style, so that the style goes and the object stays. `diverse`: in many contexts instead of the world's template, and
        by all its words (Diversified Unlearning, arXiv 2603.18767; published: prompts by a language model).
        """
        forms = self.forms(concept, diverse)
        if not self.is_style(concept):
            return [(self.format_prompt(t, word, style, ground), "") for word, t, style, ground in forms]
        return [(self.format_prompt(t, o, concept, g), self.format_prompt(t, o, None, g)) for o, t, _, g in forms]

    def paraphrases(self, concept: str) -> list[tuple[str, str]]:
        """`prompt_pairs` in all training templates, for methods that edit by text alone."""
        if not self.is_style(concept):
            return [(self.format_prompt(t, concept), "") for t in self.train_templates]
        return self.prompt_pairs(concept)

    def anchor(self, concept: str, rank: int = 0) -> str:
        """The retained concept whose prompt is nearest in the text encoder, by cosine; of `rank` 1 the next, and so on.

        Raises ValueError without so many.
        """
        if len(candidates := [o for o in self.retained if o != concept]) <= rank:
            wanted = "another concept as its anchor" if rank == 0 else f"{rank + 1} other concepts as its anchors"
            raise ValueError(f"{concept!r} needs {wanted}: give the world some, retained=[...]")
        own, *others = token_embeddings(self.pipe, [self.prompt(concept), *map(self.prompt, candidates)])
        own, others = own.float().flatten(), torch.stack(others).float().flatten(1)
        return candidates[int(torch.cosine_similarity(others, own[None]).argsort(descending=True, stable=True)[rank])]

    def anchor_prompts(self, concept: str, diverse: bool = False, rank: int = 0) -> list[str]:
        """For each of its prompt pairs: the prompt of the anchor, or of the same object in no style."""
        if self.is_style(concept):
            return [neutral for _, neutral in self.prompt_pairs(concept, diverse)]
        anchor = self.anchor(concept, rank)
        return [self.format_prompt(t, anchor, style, ground) for _, t, style, ground in self.forms(concept, diverse)]

    def concept_tokens(self, concept: str) -> torch.Tensor:
        """Text encoder outputs (n, d_ctx) at the concept's own tokens, where a learnable prompt starts from."""
        count = len(token_ids(self.pipe, concept)) - 2  # without start and end
        return encode(self.pipe, [concept]).tokens[0, 1 : 1 + count]

    def autocast(self):
        """The context that networks run in."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.pipe.device.type, dtype=half) if half else nullcontext()


def as_world(model) -> World:
    """A world as it is, and a diffusers pipeline as a world. Raises ValueError for anything else, and as `check_pipe` does."""
    if isinstance(model, World):
        check_pipe(model.pipe)
        return model
    if not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"{type(model).__name__} is not a model: accepted are worlds, ek.load(...), and diffusers pipelines"
        )
    return World(model)


def scheduler_settings(pipe) -> dict[str, str]:
    config = pipe.scheduler.config
    return {name: str(config[name]) for name in sorted(config) if not name.startswith("_")}
