"""Where the losses are measured: latents on the way to an image, rolled by the frozen model and kept with what it predicted.

A trajectory costs two predictions a step, and training needs just these: the text's own and the empty one. So the pool
keeps them, and the frozen model is not asked for them again. (The ESD family rolls a new trajectory for each training
step, uses one of its latents, and asks again at a time step drawn near it.)
"""

from dataclasses import dataclass

import torch

from .checkpoints import seeded
from .sampling import ddim, initial_noise
from .text import encode, predict

ROLL = {"seeds": 12, "steps": 25, "guidance": 3.0}


@dataclass
class LatentPool:
    """Along the trajectories of some texts, each tensor (texts, seeds, steps, C, h, w) except `clean` and `timesteps` (steps,).

    `latents` z_t; `eps` the frozen model's prediction for the text; `null` that for the text it is erased towards; `clean`
    (texts, seeds, C, h, w) what came out.
    """

    latents: torch.Tensor
    eps: torch.Tensor
    null: torch.Tensor
    clean: torch.Tensor
    timesteps: torch.Tensor

    def draw(self, index: torch.Tensor, generator: torch.Generator):
        """For text indices (B,), at a random seed and step each: latents, time steps (B,), eps and null."""
        seed = torch.randint(self.latents.shape[1], index.shape, generator=generator)
        step = torch.randint(self.latents.shape[2], index.shape, generator=generator)
        at = index, seed, step
        return self.latents[at], self.timesteps[step], self.eps[at], self.null[at]


def roll(
    world, subjects: list[tuple[str, str]], seed: int, seeds: int | list[int], steps: int, guidance: float
) -> LatentPool:
    """Roll the model from noise, `seeds` times for each (text, base text), and keep every step.

    `seeds` may differ from text to text: the trajectories of one that has fewer are repeated in the pool.

    Each text is rolled by itself, from noise that depends on `seed` and the text alone, and the world remembers it: many
    methods trained on the same texts meet the same latents and pay once.
    """
    model = world.fingerprint
    parts = []
    counts = [seeds] * len(subjects) if isinstance(seeds, int) else seeds
    for (text, base), count in zip(subjects, counts):
        name = (model, text, base, seed, count, steps, guidance)
        if name not in world.trajectories:
            world.trajectories[name] = trajectory(world, text, base, seed, count, steps, guidance)
        *kept, times = world.trajectories[name]
        rows = torch.arange(max(counts)) * count // max(counts)
        parts.append([x[rows] for x in kept])
    return LatentPool(*(torch.stack(column) for column in zip(*parts)), times)


def trajectory(world, text: str, base: str, seed: int | list[int], seeds: int, steps: int, guidance: float) -> tuple:
    """One text's share of a pool, without the texts' dimension, by what the U-Net holds; its noise depends on `seed` and text."""
    pipe = world.pipe
    starts = [int(torch.randint(2**31, (), generator=seeded("roll", seed, text, n))) for n in range(seeds)]
    asked = ["", text] + ([base] if base else [])
    embeddings = encode(pipe, [a for a in asked for _ in starts])
    kept, times = [], []

    def guide(latents, t, step):
        rows = latents.repeat(len(asked), 1, 1, 1), t.repeat(len(asked)), embeddings
        with world.autocast():  # as many in one batch as drawing has, with both halves of guidance
            batches = zip(*(x.split(2 * world.batch) for x in rows))
            eps = torch.cat([predict(pipe.unet, *batch) for batch in batches])
        eps_null, eps_c, *eps_base = eps.float().chunk(len(asked))
        kept.append([x.cpu() for x in (latents.float(), eps_c, *(eps_base or [eps_null]))])
        times.append(int(t[0]))
        return (eps_null + guidance * (eps_c - eps_null)).to(latents)

    clean = ddim(pipe, guide, initial_noise(pipe, starts), steps).float().cpu()
    return *(torch.stack(column, dim=1) for column in zip(*kept)), clean, torch.tensor(times)
