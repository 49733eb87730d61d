"""The latents that losses are measured at: trajectories sampled by the frozen model, stored with its predictions.

A sampling step already evaluates the model for the concept and for the empty prompt, which is what training needs, so the
pool stores both and the frozen model is not evaluated again. (The ESD family samples a new trajectory for each training
step, uses one of its latents, and evaluates the frozen model again.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import seeded
from .conditioning import encode, predict_noise
from .sampling import denoise, initial_noise

TRAJECTORIES = {"count": 12, "steps": 25, "guidance": 3.0}  # defaults of a pool


@dataclass
class LatentPool:
    """Latents of several prompts' trajectories: tensors (prompts, count, steps, C, h, w) except `clean` and `timesteps`.

    `latents`: z_t. `eps`: the frozen model's prediction for the prompt, `eps_null`: for the prompt it is erased towards.
    `clean` (prompts, count, C, h, w): the final latents. `timesteps` (steps,).
    """

    latents: Tensor
    eps: Tensor
    eps_null: Tensor
    clean: Tensor
    timesteps: Tensor

    def sample(self, index: Tensor, generator: torch.Generator):
        """For prompt indices (B,), at a random trajectory and step each: latents, time steps (B,), eps and eps_null."""
        number = torch.randint(self.latents.shape[1], index.shape, generator=generator)
        step = torch.randint(self.latents.shape[2], index.shape, generator=generator)
        at = index, number, step
        return self.latents[at], self.timesteps[step], self.eps[at], self.eps_null[at]


def make_pool(
    world, prompt_pairs: list[tuple[str, str]], seed: int, count: int | list[int], steps: int, guidance: float
) -> LatentPool:
    """Sample `count` trajectories for each (prompt, prompt it is erased towards), and keep every step.

    `count` may differ between prompts: the trajectories of one that has fewer are repeated in the pool. The noise depends on
    `seed` and the prompt alone, and the world caches trajectories of the pipeline as it is now, so methods trained on the same
    prompts pay once.
    """
    model, parts = world.pipeline_hash, []
    counts = [count] * len(prompt_pairs) if isinstance(count, int) else count
    for (prompt, neutral), own in zip(prompt_pairs, counts):
        name = (model, prompt, neutral, seed, own, steps, guidance)
        if name not in world.trajectories:
            world.trajectories[name] = trajectory(world, prompt, neutral, seed, own, steps, guidance)
        *kept, timesteps = world.trajectories[name]
        rows = torch.arange(max(counts)) * own // max(counts)
        parts.append([x[rows] for x in kept])
    return LatentPool(*(torch.stack(column) for column in zip(*parts)), timesteps)


def trajectory(world, prompt: str, neutral: str, seed: int, count: int, steps: int, guidance: float) -> tuple:
    """One prompt's share of a pool, without the prompts' dimension, sampled from the U-Net's present weights."""
    pipe = world.pipe
    seeds = [int(torch.randint(2**31, (), generator=seeded("roll", seed, prompt, n))) for n in range(count)]
    prompts = ["", prompt] + ([neutral] if neutral else [])
    cond = encode(pipe, [p for p in prompts for _ in seeds])
    kept, timesteps = [], []

    def guide(latents, t, step):
        z, times = latents.repeat(len(prompts), 1, 1, 1), t.repeat(len(prompts))
        with world.autocast():  # both halves of guidance in one batch, as large as sampling's
            slices = [slice(n, n + 2 * world.batch_size) for n in range(0, len(z), 2 * world.batch_size)]
            eps = torch.cat([predict_noise(pipe.unet, z[s], times[s], cond[s]) for s in slices])
        eps_null, eps_c, *eps_neutral = eps.float().chunk(len(prompts))
        kept.append([x.cpu() for x in (latents.float(), eps_c, *(eps_neutral or [eps_null]))])
        timesteps.append(int(t[0]))
        return (eps_null + guidance * (eps_c - eps_null)).to(latents)

    clean = denoise(pipe, guide, initial_noise(pipe, seeds), steps, [prompt] * count).float().cpu()
    return *(torch.stack(column, dim=1) for column in zip(*kept)), clean, torch.tensor(timesteps)
