"""The world's judges, trained apart from the generator: what object, what style, and how well a text fits.

Both learn from the art with noise and blur, the classifier also from VAE reconstructions, so that a drawing is not marked down
for its softness; neither has ever seen an image of the U-Net.
"""

import json
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

from ... import paths
from ...checkpoints import read_tensors, seeded, write_tensors
from ...provenance import fingerprint
from . import fit, pictures
from .art import RESOLUTION, Art

SEED = 1  # the generator's is 0


class Judge(nn.Module):
    """A small convolutional classifier with two heads: object and style.

    `forward` takes images (B, 3, 64, 64) in [-1, 1] and returns object logits (B, objects) and style logits (B, styles);
    `features` returns the pooled layers (list of (B, C, h, w)), for a perceptual distance.
    """

    def __init__(self, objects: list[str], styles: list[str], width: int = 48):
        super().__init__()
        self.objects, self.styles, self.width = objects, styles, width
        channels = [3, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2 if n % 2 == 0 else 1, padding=1, bias=False), nn.GroupNorm(8, b), nn.SiLU()
            )
            for n, (a, b) in enumerate(pairwise(channels))
        )
        self.object_head = nn.Linear(channels[-1] * 16, len(objects))
        self.style_head = nn.Linear(channels[-1], len(styles))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        kept, x = [], images
        for n, layer in enumerate(self.layers):
            x = layer(x)
            if n % 2 == 1:
                kept.append(x)
        return kept

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.features(images)[-1]
        return self.object_head(F.adaptive_avg_pool2d(x, 4).flatten(1)), self.style_head(x.mean((2, 3)))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"objects": self.objects, "styles": self.styles, "width": self.width}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_tensors(folder / "model.safetensors", {k: v.half() for k, v in self.state_dict().items()}, config)

    @classmethod
    def load(cls, folder: Path) -> "Judge":
        """Raises ValueError if the weights are damaged or are not this judge's."""
        judge = cls(**json.loads((folder / "config.json").read_text()))
        tensors, _ = read_tensors(folder / "model.safetensors")
        judge.load_state_dict(tensors)
        return judge.eval()


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little noise for all of a batch (B, 3, 64, 64), and blur for some: what is drawn is never as sharp as the art."""
    count = len(images)
    blur = (torch.rand(count, generator=generator) < 0.3).to(images.device)[:, None, None, None]
    images = torch.where(blur, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    noise = 0.15 * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    return images + noise * torch.randn(images.shape, generator=generator).to(images.device)


def halves(images: torch.Tensor) -> torch.Tensor:
    """Left and right half of pictures (B, 3, 64, 64) of two things, widened by their own edges: (2, B, 3, 64, 64)."""
    quarter = RESOLUTION // 4
    parts = images.unflatten(-1, (2, RESOLUTION // 2)).unbind(-2)
    return torch.stack([F.pad(part, (quarter, quarter, 0, 0), mode="replicate") for part in parts])


def reconstructed(images: torch.Tensor, vae, generator: torch.Generator) -> torch.Tensor:
    """A quarter of a batch (B, 3, 64, 64) through the VAE, with noise on the latents."""
    part = len(images) // 4
    with torch.no_grad():
        latents = vae.encode(images[:part]).latent_dist.mean
        spread = 0.35 * torch.rand(part, 1, 1, 1, generator=generator).to(latents)
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
        return torch.cat([vae.decode(latents).sample.to(images.dtype), images[part:]])


def train_judge(
    art: Art, vae, steps: int, minutes: float | None = None, batch: int = 80, device: str = "cpu"
) -> Judge | None:
    """Cross-entropy on both heads over all the art, the generator's held-out pairs included; None where the time was up first.

    A fifth of the batch is halves of pictures of two things, for questions about one beside another.
    """
    torch.manual_seed(SEED)
    judge, vae = Judge(art.objects, art.styles).train().to(device), vae.to(device)
    weights = torch.ones(len(art.object_id))

    def loss(step: int) -> torch.Tensor:
        generator = seeded("judge", SEED, step)
        rows = torch.randint(len(art.object_id), (batch,), generator=generator)
        images, _ = art.draw(rows, generator, mirror=0.5, white=0.5)
        left = torch.randint(len(art.object_id), (batch // 10,), generator=generator)
        right = pictures.partners(art, weights, left, generator)
        double, _ = art.draw_pairs(left, right, generator, white=0.5)
        rows = torch.cat([rows, left, right])
        images = torch.cat([images, halves(double).flatten(0, 1)])
        order = torch.randperm(len(rows), generator=generator)
        with fit.autocast(device):
            objects, styles = judge(softened(reconstructed(images[order].to(device), vae, generator), generator))
        right = art.object_id[rows[order]].to(device), art.style_id[rows[order]].to(device)
        return F.cross_entropy(objects.float(), right[0], label_smoothing=0.05) + F.cross_entropy(
            styles.float(), right[1], label_smoothing=0.05
        )

    how = {"lr": 2e-3, "weight_decay": 0.05, "ema": 0.99, "minutes": minutes, "identity": fingerprint(vae)[:16]}
    return judge if fit.fit("judge", judge, loss, steps, **how) >= steps else None


# --------------------------------------------------------------------------------------------------------------- CLIP

CLIP_CONFIG = {
    "embed_dim": 128,
    # Four numbers of layers make open_clip build its ResNet: at 64 pixels and 700 icons it learns what a ViT does not.
    "vision_cfg": {"image_size": RESOLUTION, "layers": (2, 2, 2, 1), "width": 20, "head_width": 64},
    # Nearly all of the text tower is its table of 49,408 tokens, so it is narrow.
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 3},
}


class Clip(nn.Module):
    """An open_clip model with its tokeniser; see `load_clip`."""

    def __init__(self):
        super().__init__()
        self.model = open_clip.CLIP(
            embed_dim=CLIP_CONFIG["embed_dim"],
            vision_cfg=open_clip.CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]),
            text_cfg=open_clip.CLIPTextCfg(**CLIP_CONFIG["text_cfg"]),
        )
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])

    def save(self, folder: Path) -> None:
        """The folder open_clip loads with the name "local-dir:<folder>"."""
        folder.mkdir(parents=True, exist_ok=True)
        # Images in [-1, 1]: mean and std of a half.
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
        state = {k: v.half() for k, v in self.model.state_dict().items()}
        write_tensors(folder / "open_clip_model.safetensors", state, {})


def train_clip(
    art: Art, steps: int, minutes: float | None = None, batch: int = 128, part: str = "clip", device: str = "cpu"
) -> Clip | None:
    """Contrastive learning on the world's captions, in the weights of a model of its own; None where the time was up first.

    `part` names its checkpoint.
    """
    torch.manual_seed(SEED)
    clip, covers = Clip().train().to(device), pictures.coverage()
    weights = torch.ones(len(art.object_id))

    def loss(step: int) -> torch.Tensor:
        generator = seeded("clip", SEED, step)
        images, shown = pictures.draw(art, weights, batch, generator)
        said = [pictures.describe(picture, generator) for picture in shown]
        ids = clip.tokenizer([c.text for c in said]).to(device)
        with fit.autocast(device):
            image = clip.model.encode_image(softened(images.to(device), generator), normalize=True).float()
            text = clip.model.encode_text(ids, normalize=True).float()
        fits = torch.tensor([[c.fits(p, covers) for p in shown] for c in said], dtype=torch.float32).to(device)
        logits = clip.model.logit_scale.exp().clamp(max=100) * text @ image.T
        return (pictures.agreement(logits, fits) + pictures.agreement(logits.T, fits.T)) / 2

    how = {"lr": 2e-3, "weight_decay": 0.05, "ema": 0.99, "minutes": minutes}
    return clip if fit.fit(part, clip, loss, steps, **how) >= steps else None


def load_clip(folder: Path):
    """The open_clip model and tokeniser of a folder, through open_clip itself."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


def run_judge(art: Art, folder: Path, steps: int, minutes: float | None, device: str) -> None:
    """Train the judge on the pipeline folder's VAE, into models/."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval()
    if judge := train_judge(art, vae, steps, minutes, device=device):
        judge.save(paths.MODELS / "emojinette-judge")


def run_clip(art: Art, steps: int, minutes: float | None, device: str) -> None:
    """Train the alignment study's CLIP, into models/."""
    if clip := train_clip(art, steps, minutes, device=device):
        clip.save(paths.MODELS / "emojinette-clip")
