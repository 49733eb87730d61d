"""The autoencoder: 64 x 64 images to 16 x 16 latents and back."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ...checkpoints import seeded
from . import fit, networks
from .art import Art

BATCH = 32
WORKERS = 8  # processes that draw the crops for a GPU
CROP = 32  # pixels
KL = 1e-4  # weight of the posterior's divergence a latent number
PAIRS = 0.25  # share of the batch with two icons
NEW_LOG_VARIANCE = -6.0  # of the posterior in channels that `widen` adds


def widen(vae: AutoencoderKL, smaller: AutoencoderKL) -> None:
    """Start `vae` from one with as many latent channels or fewer: shared channels mean the same, new ones start small.

    The bundled one has six. It was started from a predecessor with as many, trained on a CPU, and that from one with four.
    """
    old, new = smaller.config.latent_channels, vae.config.latent_channels
    # Mean and log-variance are stacked: channel n of either half stays channel n of that half.
    both = torch.cat([torch.arange(old), new + torch.arange(old)])
    one = torch.arange(old)
    index = {
        "encoder.conv_out": (both, None),
        "quant_conv": (both, both),
        "post_quant_conv": (one, one),
        "decoder.conv_in": (None, one),
    }
    state, source = vae.state_dict(), smaller.state_dict()
    for name, target in state.items():
        value = source[name].float()
        out, into = index.get(name.rsplit(".", 1)[0], (None, None))
        if out is None and into is None:
            target.copy_(value)
            continue
        rows = torch.arange(len(target)) if out is None else out
        if target.ndim == 1 or into is None:
            target[rows] = value
        else:
            # What the new channels add to old outputs starts at a tenth, so that the old image is found at once.
            target[rows] = 0.1 * target[rows]
            target[rows[:, None], into[None]] = value
    # New channels with much noise are never used: L1 was the same with and without them after 300 steps.
    state["quant_conv.weight"][new + old :] = 0
    state["quant_conv.bias"][new + old :] = NEW_LOG_VARIANCE
    vae.load_state_dict(state)


def batch_of(art: Art, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` crops (B, 3, 32, 32) in [-1, 1], a quarter of them from pictures of two icons."""
    pairs = int(PAIRS * size)
    rows = torch.randint(len(art.object_id), (size + pairs,), generator=generator)
    single, _ = art.draw(rows[: size - pairs], generator, mirror=0.5, white=0.5)
    double, _ = art.draw_pairs(rows[size - pairs : size], rows[size:], generator, white=0.5)
    y, x = torch.randint(0, (64 - CROP) // 2 + 1, (2,), generator=generator).mul(2).tolist()
    return torch.cat([single, double])[:, :, y : y + CROP, x : x + CROP].contiguous()


def normalise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold each latent channel's mean and spread over `images` into the 1 x 1 convolutions, so that scaling_factor is 1."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk.to(vae.device)).latent_dist.mean for chunk in images.split(64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:channels] /= std[:, None, None, None]
        vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
        vae.quant_conv.bias[channels:] -= 2 * std.log()


def train_vae(
    art: Art,
    steps: int,
    seed: int,
    minutes: float | None = None,
    start: Path | None = None,
    device: str = "cpu",
    size: int = BATCH,
) -> AutoencoderKL | None:
    """L1, L1 of the gradients and a little KL on crops; None where the time was up first."""
    torch.manual_seed(seed)
    vae = networks.make_vae().train()
    if start:
        widen(vae, AutoencoderKL.from_pretrained(start, dtype=torch.float32))
    vae = vae.to(device)

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        generator = seeded("vae", seed, step)
        images = batch_of(art, size, generator)
        noise = torch.randn(len(images), vae.config.latent_channels, CROP // 4, CROP // 4, generator=generator)
        return images, noise

    def loss(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with fit.autocast(device):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + edges + KL * posterior.kl().float().mean() / posterior.mean[0].numel()

    how = {"lr": 4e-4, "weight_decay": 0.0, "ema": 0.995, "minutes": minutes, "batch": batch}
    how["workers"] = WORKERS if device.startswith("cuda") else 0
    if fit.fit("vae", vae, loss, steps, **how) < steps:
        return None
    images, _ = art.draw(torch.arange(len(art.object_id)), seeded("vae", "statistics"), mirror=0.5, white=0.5)
    normalise(vae, images)
    return vae


@torch.no_grad()
def measure(vae: AutoencoderKL, art: Art) -> dict[str, float]:
    """L1 in [-1, 1] of whole images at placements no training saw: over all, by style, and for two icons in a picture."""
    generator = seeded("vae", "measure")
    everything = torch.arange(len(art.object_id))

    def l1(images: torch.Tensor) -> torch.Tensor:
        chunks = (chunk.to(vae.device) for chunk in images.split(32))
        again = [vae.decode(vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1).cpu() for chunk in chunks]
        return (torch.cat(again) - images).abs().mean((1, 2, 3))

    images, _ = art.draw(everything, generator, mirror=0.5, white=0.5)
    errors = l1(images)
    found = {"all": errors.mean().item()}
    found |= {style: errors[art.style_id == n].mean().item() for n, style in enumerate(art.styles)}
    shuffled = everything[torch.randperm(len(everything), generator=generator)]
    pairs, _ = art.draw_pairs(shuffled[:200], shuffled[200:400], generator, white=0.5)
    return found | {"two icons": l1(pairs).mean().item()}
