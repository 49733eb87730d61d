"""Training of the bundled world's judges, a classifier of object and style and a CLIP model; both are the second world's.

Both are trained on the art with noise and blur, the classifier also on VAE reconstructions, so that they accept images softer
than the art. Neither has seen an image of the U-Net.
"""

import torch
import torch.nn.functional as F

from ...checkpoints import seeded
from ..emojinette2.fit import autocast
from ..emojinette2.judges import Clip, Judge, reconstructed, softened
from .art import TEMPLATES, Art, caption
from .loop import fit

SEED = 1  # the generator's is 0
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.05, "ema": 0.99}


def train_judge(art: Art, vae, device: str, steps: int, batch_size: int = 96) -> Judge:
    """Cross-entropy on both heads over all the art, including the pairs held out from the generator."""
    torch.manual_seed(SEED)
    judge = Judge(art.objects, art.styles).to(device).train()

    def loss(step: int) -> torch.Tensor:
        generator = seeded("judge", SEED, step)
        rows = torch.randint(len(art.object_id), (batch_size,), generator=generator)
        images, _ = art.render(rows, generator, mirror=0.5, white=0.5)
        with autocast(device):
            images = softened(reconstructed(images.to(device), vae, generator), generator)
            objects, styles = judge(images)
        return F.cross_entropy(objects.float(), art.object_id[rows].to(device), label_smoothing=0.05) + F.cross_entropy(
            styles.float(), art.style_id[rows].to(device), label_smoothing=0.05
        )

    return fit("judge", judge, loss, steps, **OPTIMIZER)


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
            images = softened(images.to(device), generator)
            image = clip.model.encode_image(images, normalize=True).float()
            text = clip.model.encode_text(clip.tokenizer(texts).to(device), normalize=True).float()
        logits = clip.model.logit_scale.exp().clamp(max=100) * image @ text.T
        # Equal captions match each other's images.
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return fit(checkpoint, clip, loss, steps, **OPTIMIZER)
