"""Prompts and seeds in, images out: one deterministic DDIM loop for every method."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

from .attention import Prompt, augment, check_width

KEY_HALVES = ("conditional", "both")


def encode(pipe, texts: list[str]) -> torch.Tensor:
    """Text embeddings (B, tokens, d_ctx) of the pipeline's own encoder; equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    with torch.no_grad():
        embeddings = pipe.encode_prompt(unique, pipe.device, 1, False)[0]
    return embeddings[[unique.index(text) for text in texts]]


def initial_noise(pipe, seeds: list[int]) -> torch.Tensor:
    """Unit Gaussian latents (B, C, h, w), one CPU generator for each image: the batch size changes nothing."""
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, size, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe.device, pipe.unet.dtype)


@torch.no_grad()
def ddim(
    pipe,
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    c: torch.Tensor,
    null: torch.Tensor,
    steps: int,
    guidance: float,
    visit: Callable[[int, int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Denoise latents (B, C, h, w) with eta = 0; c and null are text embeddings (B, tokens, d_ctx).

    `predict(latents, t, text)` is asked once for each half of guidance, apart, so that a prompt on one half does not pad the
    other. `visit(i, t, latents)` sees the latents before each step.
    """
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        if visit:
            visit(i, t, latents)
        time = torch.full((len(latents),), t, device=latents.device)
        eps_null = predict(latents, time, null)
        eps = eps_null + guidance * (predict(latents, time, c) - eps_null)
        latents = scheduler.step(eps, t, latents, eta=0.0).prev_sample
    return latents


@torch.no_grad()
def sample(
    pipe,
    prompts: list[str],
    seeds: list[int],
    key: Prompt | None = None,
    key_half: str = "conditional",
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 50,
    progress: str | None = None,
) -> torch.Tensor:
    """Images (N, 3, H, W), uint8, one for each (prompt, seed) pair.

    `key` is a learnable prompt, given to the conditional half of guidance or to both ("conditional", "both"): guidance
    subtracts the unconditional half, so a key on both cancels much of itself. `progress` names the bar, None hides it.
    Raises ValueError for an unknown half, lists of different lengths, or a key of another width.
    """
    if key_half not in KEY_HALVES:
        raise ValueError(f"unknown key_half {key_half!r}: accepted are {', '.join(KEY_HALVES)}")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    check_width(pipe.unet, key)
    images = []
    bar = tqdm(total=len(seeds), desc=progress, disable=progress is None, mininterval=1, unit="image")
    with bar, augment(pipe.unet, key.place if key else "all") as slot:
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            c = encode(pipe, prompts[part])
            null = encode(pipe, [""] * len(c))

            def predict(latents, t, text, c=c):
                keyed = key if text is c or key_half == "both" else None
                with slot.holding(keyed):
                    return pipe.unet(latents, t, text).sample

            latents = ddim(pipe, predict, initial_noise(pipe, seeds[part]), c, null, steps, guidance)
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
            images.append(decoded.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
            bar.update(len(c))
    return torch.cat(images)
