"""Where the losses are measured: latents on the way to a concept's image, rolled once and kept in a pool."""

from dataclasses import dataclass

import torch

from .checkpoints import seeded
from .sampling import ddim, encode, initial_noise


@dataclass
class LatentPool:
    """Latents along DDIM trajectories: `latents` (texts, seeds, steps, C, h, w), `timesteps` (steps,)."""

    latents: torch.Tensor
    timesteps: torch.Tensor

    def draw(self, text: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """For text indices (B,): latents (B, C, h, w) at a random seed and step, and their time steps (B,).

        The time step is drawn inside the sampler's interval, as the ESD family does (`fine_t` in its terms).
        """
        seed = torch.randint(self.latents.shape[1], text.shape, generator=generator)
        step = torch.randint(self.latents.shape[2], text.shape, generator=generator)
        stride = int(self.timesteps[0] - self.timesteps[1])
        jitter = torch.randint(stride, text.shape, generator=generator)
        t = (self.timesteps[step] - self.timesteps[-1] + jitter).clamp(max=999)
        return self.latents[text, seed, step], t


def roll(world, texts: list[str], seed: int, seeds: int = 12, steps: int = 25, guidance: float = 3.0) -> LatentPool:
    """Roll the frozen model from noise, `seeds` times for each text, and keep every step."""
    pipe = world.pipe
    prompts = [text for text in texts for _ in range(seeds)]
    c = encode(pipe, prompts)
    null = encode(pipe, [""] * len(prompts))
    starts = [int(torch.randint(2**31, (), generator=seeded("roll", seed, n))) for n in range(len(prompts))]
    kept, times = [], []

    def predict(latents, t, text):
        with world.autocast():
            return pipe.unet(latents, t, text).sample.to(latents.dtype)

    def visit(i, t, latents):
        kept.append(latents.float().cpu())
        times.append(t)

    ddim(pipe, predict, initial_noise(pipe, starts), c, null, steps, guidance, visit)
    latents = torch.stack(kept, dim=1).unflatten(0, (len(texts), seeds))
    return LatentPool(latents, torch.tensor(times))
