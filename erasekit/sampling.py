"""Prompts and seeds in, images out: one deterministic DDIM loop for every method."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm.auto import tqdm

from .attention import Prompt, augment, check_width
from .guidance import Guidance
from .processes import shares
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
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps.tolist()):
        eps = guide(latents, torch.full((len(latents),), t, device=latents.device), step)
        latents = scheduler.step(eps, t, latents, eta=0.0).prev_sample
    return latents


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W), uint8."""
    vae = pipe.vae
    # A VAE in another precision than the latents is kept apart because half precision is too little for it (SDXL's).
    apart = torch.autocast(latents.device.type, enabled=False) if vae.dtype != latents.dtype else nullcontext()
    with apart:
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
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
    folder: Path | None = None,
) -> torch.Tensor:
    """Images (N, 3, H, W), uint8, one for each (prompt, seed) pair.

    `erasure` draws with its public model, whatever the method: trained weights, adapters, or guidance alone. `key` is a
    learnable prompt, given to the conditional half of guidance or to both ("conditional", "both"): guidance subtracts the
    unconditional half, so a key on both cancels much of itself. `autocast` makes the context the networks run in.
    `progress` names the bar, None hides it. `folder`, one for each model, key and number of steps, keeps the images: a batch
    that lies there is read, so a run that was stopped goes on. Under `accelerate launch` the processes share the batches, and
    each gets all images. Raises ValueError for an unknown half, no list, an empty one, lists of different lengths, or a key of
    another width.
    """
    if key_half not in KEY_HALVES:
        raise ValueError(f"unknown key_half {key_half!r}: accepted are {', '.join(KEY_HALVES)}")
    if isinstance(prompts, str):
        raise ValueError(
            f"prompts={prompts!r} is one text, not a list of them: give [{prompts!r}] and a list with its seed"
        )
    if not len(prompts):
        raise ValueError("prompts is empty: give at least one, with a seed")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    check_width(pipe.unet, key)
    (rank, processes), images = shares(), {}
    if folder and rank == 0:
        announce(pipe, [folder / f"{name}.png" for name in map(file_name, prompts, seeds)])
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

        # Batches are the same however many share them, so the images are too.
        for start in range(0, len(seeds), batch_size)[rank::processes]:
            part = slice(start, start + batch_size)
            files = [folder / f"{name}.png" for name in map(file_name, prompts[part], seeds[part])] if folder else []
            if files and all(file.exists() for file in files):
                images[start] = torch.stack([read_image(file) for file in files])
            else:
                guide.begin(pipe, prompts[part])
                noise = initial_noise(pipe, seeds[part])
                latents = ddim(pipe, lambda z, t, i: guide(predict, z, t, i), noise, steps)
                with autocast():
                    images[start] = decode(pipe, latents)
                for file, image in zip(files, images[start]):
                    write_image(file, image)
            bar.update(len(images[start]))
    if processes > 1:
        from accelerate.utils import gather_object

        images = dict(gather_object(list(images.items())))
    return torch.cat([images[start] for start in sorted(images)])


def announce(pipe, files: list[Path]) -> None:
    """Say how many images are still to draw and what they take on disk. Raises OSError where that is not free."""
    folder, missing = files[0].parent, sum(not file.exists() for file in files)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    need = missing * 3 * side * side  # a photograph's PNG takes less than its pixels
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{missing} of {len(files)} images to draw, up to {need / 1e6:,.0f} MB in {folder}", flush=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{missing} images need up to {need / 1e6:,.0f} MB in {folder} and {free / 1e6:,.0f} MB are free: free some space"
        )


def file_name(prompt: str, seed: int) -> str:
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{seed}"


def read_image(path: Path) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def write_image(path: Path, image: torch.Tensor) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(part, format="png")
    part.replace(path)
