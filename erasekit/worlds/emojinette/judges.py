"""Independent judges of the bundled world: a classifier of object and style, and a CLIP model.

Both are trained on the art with noise and blur, the classifier also on VAE reconstructions, so that they accept images softer
than the art. Neither has seen an image of the U-Net.
"""

import json
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

from ...checkpoints import read_tensors, seeded, write_tensors
from .art import RESOLUTION, TEMPLATES, Art, caption
from .loop import autocast, fit

SEED = 1  # the generator's is 0
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.05, "ema": 0.99}


class Judge(nn.Module):
    """A small convolutional classifier with two heads: object and style.

    `forward` takes images (B, 3, 64, 64) in [-1, 1] and returns object logits (B, objects) and style logits (B, styles);
    `features` returns the downsampled layers (list of (B, C, h, w)), for a perceptual distance.
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
        outputs, x = [], images
        for layer in self.layers:
            outputs.append(x := layer(x))
        return outputs[1::2]

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
        """Raises ValueError for a damaged file."""
        judge = cls(**json.loads((folder / "config.json").read_text()))
        tensors, _ = read_tensors(folder / "model.safetensors")
        judge.load_state_dict(tensors)
        return judge.eval()


def soften(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise to all images of a batch (B, 3, 64, 64) and blur some: generated images are softer than the art."""
    count = len(images)
    blur = (torch.rand(count, generator=generator) < 0.3).to(images.device)[:, None, None, None]
    images = torch.where(blur, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    noise = 0.15 * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    return images + noise * torch.randn(images.shape, generator=generator).to(images.device)


def reconstruct(images: torch.Tensor, vae, generator: torch.Generator) -> torch.Tensor:
    """Pass the first quarter of a batch (B, 3, 64, 64) through the VAE, with noise on the latents."""
    part = len(images) // 4
    with torch.no_grad():
        latents = vae.encode(images[:part]).latent_dist.mean
        spread = 0.35 * torch.rand(part, 1, 1, 1, generator=generator).to(latents)
        latents = latents + spread * torch.randn(latents.shape, generator=generator).to(latents)
        return torch.cat([vae.decode(latents).sample.to(images.dtype), images[part:]])


def train_judge(art: Art, vae, device: str, steps: int, batch_size: int = 96) -> Judge:
    """Cross-entropy on both heads over all the art, including the pairs held out from the generator."""
    torch.manual_seed(SEED)
    judge = Judge(art.objects, art.styles).to(device).train()

    def loss(step: int) -> torch.Tensor:
        generator = seeded("judge", SEED, step)
        rows = torch.randint(len(art.object_id), (batch_size,), generator=generator)
        images, _ = art.render(rows, generator, mirror=0.5, white=0.5)
        with autocast(device):
            images = soften(reconstruct(images.to(device), vae, generator), generator)
            objects, styles = judge(images)
        return F.cross_entropy(objects.float(), art.object_id[rows].to(device), label_smoothing=0.05) + F.cross_entropy(
            styles.float(), art.style_id[rows].to(device), label_smoothing=0.05
        )

    return fit("judge", judge, loss, steps, **OPTIMIZER)


CLIP_CONFIG = {
    "embed_dim": 128,
    # Four layer counts select open_clip's ResNet; a ViT does not learn from 700 icons of 64 pixels.
    "vision_cfg": {"image_size": RESOLUTION, "layers": (2, 2, 2, 1), "width": 20, "head_width": 64},
    # Nearly all parameters of the text tower are the embeddings of 49,408 tokens, hence the small width.
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 3},
}


class Clip(nn.Module):
    """An open_clip model with its tokeniser; see `load_clip`."""

    def __init__(self):
        super().__init__()
        vision, text = (
            open_clip.CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]),
            open_clip.CLIPTextCfg(**CLIP_CONFIG["text_cfg"]),
        )
        self.model = open_clip.CLIP(embed_dim=CLIP_CONFIG["embed_dim"], vision_cfg=vision, text_cfg=text)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=text.context_length)

    def save(self, folder: Path) -> None:
        """Write the folder that open_clip loads by the name "local-dir:<folder>"."""
        folder.mkdir(parents=True, exist_ok=True)
        # Mean and std of 0.5 map images to [-1, 1].
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
        state = {k: v.half() for k, v in self.model.state_dict().items()}
        write_tensors(folder / "open_clip_model.safetensors", state, {})


def train_clip(art: Art, device: str, steps: int, batch_size: int = 128, checkpoint: str = "clip") -> Clip:
    """Contrastive training on captions of object, style and background; the icons of a batch are distinct."""
    torch.manual_seed(SEED)
    clip = Clip().to(device).train()

    def loss(step: int) -> torch.Tensor:
        generator = seeded("clip", SEED, step)
        rows = torch.randperm(len(art.object_id), generator=generator)[:batch_size]
        images, backgrounds = art.render(rows, generator, mirror=0.5, white=0.5)
        u = torch.rand(batch_size, 3, generator=generator).tolist()
        texts = []
        for n, row in enumerate(rows.tolist()):
            name = art.objects[art.object_id[row]]
            if name in art.category["weapon"] and u[n][0] < 0.15:
                name = "weapon"
            style = art.styles[art.style_id[row]] if u[n][1] < 0.8 else None
            texts.append(caption(TEMPLATES[int(u[n][2] * len(TEMPLATES))], name, style, backgrounds[n]))
        with autocast(device):
            images = soften(images.to(device), generator)
            image = clip.model.encode_image(images, normalize=True).float()
            text = clip.model.encode_text(clip.tokenizer(texts).to(device), normalize=True).float()
        logits = clip.model.logit_scale.exp().clamp(max=100) * image @ text.T
        # Equal captions match each other's images.
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit(checkpoint, clip, loss, steps, **OPTIMIZER)


def load_clip(folder: Path):
    """The open_clip model and tokeniser of a folder."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")
