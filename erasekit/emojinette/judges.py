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

from ..checkpoints import read_tensors, seeded, write_tensors
from .art import RESOLUTION, TEMPLATES, Art, caption

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


def reconstructed(images: torch.Tensor, vae, generator: torch.Generator) -> torch.Tensor:
    """A quarter of a batch (B, 3, 64, 64) through the VAE, with noise on the latents."""
    part = len(images) // 4
    with torch.no_grad():
        latents = vae.encode(images[:part]).latent_dist.mean
        spread = 0.35 * torch.rand(part, 1, 1, 1, generator=generator).to(latents)
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
        return torch.cat([vae.decode(latents).sample.to(images.dtype), images[part:]])


def train_judge(art: Art, vae, device: str, steps: int, batch: int = 96) -> Judge:
    """Cross-entropy on both heads over all the art, the generator's held-out pairs included."""
    from .train import autocast, fit

    torch.manual_seed(SEED)
    judge = Judge(art.objects, art.styles).to(device).train()

    def loss(step: int) -> torch.Tensor:
        generator = seeded("judge", SEED, step)
        rows = torch.randint(len(art.object_id), (batch,), generator=generator)
        images, _ = art.draw(rows, generator, mirror=0.5, white=0.5)
        with autocast(device):
            images = softened(reconstructed(images.to(device), vae, generator), generator)
            objects, styles = judge(images)
        return F.cross_entropy(objects.float(), art.object_id[rows].to(device), label_smoothing=0.05) + F.cross_entropy(
            styles.float(), art.style_id[rows].to(device), label_smoothing=0.05
        )

    return fit("judge", judge, loss, steps, lr=2e-3, weight_decay=0.05, ema=0.99)


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


def train_clip(art: Art, device: str, steps: int, batch: int = 128, part: str = "clip") -> Clip:
    """Contrastive learning on captions of object, style and background; no two images of a batch share icon and place.

    `part` names its checkpoint.
    """
    from .train import autocast, fit

    torch.manual_seed(SEED)
    clip = Clip().to(device).train()

    def loss(step: int) -> torch.Tensor:
        generator = seeded("clip", SEED, step)
        rows = torch.randperm(len(art.object_id), generator=generator)[:batch]
        images, backgrounds = art.draw(rows, generator, mirror=0.5, white=0.5)
        u = torch.rand(batch, 3, generator=generator).tolist()
        texts = []
        for n, row in enumerate(rows.tolist()):
            name = art.objects[art.object_id[row]]
            if name in art.category["weapon"] and u[n][0] < 0.15:
                name = "weapon"
            style = art.styles[art.style_id[row]] if u[n][1] < 0.8 else None
            texts.append(caption(TEMPLATES[int(u[n][2] * len(TEMPLATES))], name, style, backgrounds[n]))
        with autocast(device):
            images = softened(images.to(device), generator)
            image = clip.model.encode_image(images, normalize=True).float()
            text = clip.model.encode_text(clip.tokenizer(texts).to(device), normalize=True).float()
        logits = clip.model.logit_scale.exp().clamp(max=100) * image @ text.T
        # Captions that say the same are right for each other's images.
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit(part, clip, loss, steps, lr=2e-3, weight_decay=0.05, ema=0.99)


def load_clip(folder: Path):
    """The open_clip model and tokeniser of a folder, through open_clip itself."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")
