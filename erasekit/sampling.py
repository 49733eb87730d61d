"""Prompts and seeds in, images out: one deterministic DDIM loop for every method."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

from .attention import Prompt, augment, check_width
from .guidance import Guidance
from .text import predict as predict_noise

KEY_HALVES = ("conditional", "both")


def initial_noise(pipe, seeds: list[int]) -> torch.Tensor:
    """Unit Gaussian latents (B, C, h, w), one CPU generator for each image: the batch size changes nothing."""
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, size, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe.device, pipe.unet.dtype)


@torch.no_grad()
def ddim(pipe, guide: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], latents: torch.Tensor, steps: int):
    """Denoise latents (B, C, h, w) with eta = 0; `guide(latents, t, step)` gives the noise to remove, t being (B,)."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps.tolist()):
        eps = guide(latents, torch.full((len(latents),), t, device=latents.device), step)
        latents = scheduler.step(eps, t, latents, eta=0.0).prev_sample
    return latents


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W), uint8."""
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


@torch.no_grad()
def sample(
    pipe,
    prompts: list[str],
    seeds: list[int],
    key: Prompt | None = None,
    key_half: str = "conditional",
    erasure=None,
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 50,
    autocast: Callable = nullcontext,
    progress: str | None = None,
) -> torch.Tensor:
    """Images (N, 3, H, W), uint8, one for each (prompt, seed) pair.

    `erasure` draws with its public model, whatever the method: trained weights, adapters, or guidance alone. `key` is a
    learnable prompt, given to the conditional half of guidance or to both ("conditional", "both"): guidance subtracts the
    unconditional half, so a key on both cancels much of itself. `autocast` makes the context the networks run in.
    `progress` names the bar, None hides it. Raises ValueError for an unknown half, lists of different lengths, or a key of
    another width.
    """
    if key_half not in KEY_HALVES:
        raise ValueError(f"unknown key_half {key_half!r}: accepted are {', '.join(KEY_HALVES)}")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    check_width(pipe.unet, key)
    images = []
    bar = tqdm(total=len(seeds), desc=progress, disable=progress is None, mininterval=1, unit="image")
    public = erasure.applied(pipe.unet) if erasure else nullcontext()
    with bar, public, augment(pipe.unet, key.place if key else "all") as slot:
        guide = erasure.guide(guidance) if erasure else Guidance(guidance)

        def predict(latents, t, text, conditional):
            held = (
                key.at(t, len(pipe.scheduler.alphas_cumprod)) if key and (conditional or key_half == "both") else None
            )
            with slot.holding(held), autocast():
                return predict_noise(pipe.unet, latents, t, text).to(latents.dtype)

        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            guide.begin(pipe, prompts[part])
            noise = initial_noise(pipe, seeds[part])
            latents = ddim(pipe, lambda z, t, i: guide(predict, z, t, i), noise, steps)
            with autocast():
                images.append(decode(pipe, latents))
            bar.update(len(latents))
    return torch.cat(images)
