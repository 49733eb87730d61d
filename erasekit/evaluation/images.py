"""Images of a public model for (prompt, label, seed) triples: cached on disk where sampling is slow, shared by processes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import paths
from ..attention import Prompt
from ..sampling import sample_batches
from ..worlds.distributed import rank_and_count

VERSION = 1  # part of the cache's key: raise it when sampling should give other images


def sample_images(
    world,
    erasure,
    prompts: list[tuple[str, str, int]],
    steps: int,
    key: Prompt | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """Images (N, 3, H, W), uint8, of (prompt, label, seed) triples by the public model; `erasure` None is the base.

    `guidance_scale`: None for that of `sampling.sample`. A world that keeps its images has them in the build folder: a batch
    found there is read, so an interrupted run continues. Under `accelerate launch` the processes share the batches and each
    gets all images. Raises OSError, before it samples, if the missing images do not fit on the disk.
    """
    texts, _, seeds = map(list, zip(*prompts))
    options = {"erasure": erasure, "num_inference_steps": steps, "autocast": world.autocast, "sampler": world.sampler}
    options |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    files = cache_files(world, erasure, texts, seeds, steps, key, guidance_scale) if world.keeps_images else []
    if files:
        check_disk_space(world.pipe, files)
    # The batches do not depend on the number of processes, so neither do the images.
    rank, processes = rank_and_count()
    batches = [slice(n, n + world.batch_size) for n in range(0, len(seeds), world.batch_size)][rank::processes]
    cached = [part for part in batches if files and all(file.exists() for file in files[part])]
    images = {part.start: torch.stack([read_image(file) for file in files[part]]) for part in cached}
    missing = [part for part in batches if part.start not in images]
    total = sum(len(seeds[part]) for part in batches)
    with tqdm(total=total, unit="image", leave=False, mininterval=1, disable=not world.keeps_images) as bar:
        bar.update(sum(map(len, images.values())))
        for part, batch in sample_batches(world.pipe, texts, seeds, key, batches=missing, **options) if missing else ():
            images[part.start] = batch
            for file, image in zip(files[part], batch):
                write_image(file, image)
            bar.update(len(batch))
    if processes > 1:
        from accelerate.utils import gather_object

        images = dict(gather_object(list(images.items())))
    return torch.cat([images[start] for start in sorted(images)])


def cache_files(world, erasure, texts, seeds, steps, key, guidance_scale) -> list[Path]:
    """A PNG for each (prompt, seed), in a folder for each model, key and sampler."""
    parts = [VERSION, world.pipeline_hash, erasure.digest() if erasure else None, steps, world.precision]
    parts += [key.digest() if key else None, guidance_scale]
    parts += [world.sampler] * (world.sampler != "ddim")  # which images were kept by before there were others
    folder = paths.BUILD / "images" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    names = (f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{seed}.png" for text, seed in zip(texts, seeds))
    return [folder / name for name in names]


def check_disk_space(pipe, files: list[Path]) -> None:
    """Raise OSError if the images that are missing might not fit on the disk."""
    folder, missing = files[0].parent, sum(not file.exists() for file in set(files))
    folder.mkdir(parents=True, exist_ok=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    needed, free = missing * 3 * side * side, shutil.disk_usage(folder).free  # a PNG is smaller than its pixels
    if missing and free < needed:
        raise OSError(
            f"{missing} images need up to {needed / 1e6:,.0f} MB in {folder} but {free / 1e6:,.0f} MB are free: free some "
            "space or set ERASEKIT_BUILD to another disk"
        )


def read_image(path: Path) -> Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def write_image(path: Path, image: Tensor) -> None:
    """Write a PNG completely or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(part, format="png")
    part.replace(path)


def image_strip(images: Tensor) -> Image.Image:
    """Images (N, 3, H, W) side by side."""
    return Image.fromarray(np.ascontiguousarray(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()))
