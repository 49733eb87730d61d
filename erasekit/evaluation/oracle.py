"""How far an erased model's predicted noise is from the oracle's, the same model trained without the erased concepts.

At latents z_t of the base's and of the oracle's trajectories: sqrt(E|eps_erased - eps_oracle|^2 / E|eps_base - eps_oracle|^2).
0 is the oracle, 1 as far from it as the base. The oracle is one training of many, so what is kept cannot come near to 0.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import predict_noise
from ..sampling import guidance_for
from ..trajectories import TRAJECTORIES, make_pool

SEED = 2000  # of the trajectories: no method is trained on these


@dataclass
class Reference:
    """Latents (N, C, h, w) and time steps (N,) with their prompts, the oracle's predictions, and E|eps_base - eps_oracle|^2."""

    latents: Tensor
    timesteps: Tensor
    prompts: list[str]
    eps: Tensor
    gap: float


def distances(world, erasure, oracle, prompts: dict[str, list[str]], count: int, steps: int) -> dict[str, float | None]:
    """The distance over each part of the prompts; None for a method that works by guidance alone.

    `count` trajectories of `steps` steps for each prompt, of each of the two models.
    """
    if not (erasure.delta or erasure.adapters):
        return dict.fromkeys(prompts)
    found = {}
    for part, texts in prompts.items():
        at = reference(world, oracle, texts, count, steps)
        eps = predictions(world, erasure, at.latents, at.timesteps, at.prompts)
        found[part] = round(((eps - at.eps).square().mean().item() / at.gap) ** 0.5, 3)
    return found


def reference(world, oracle, prompts: list[str], count: int, steps: int) -> Reference:
    """What all methods are compared with on these prompts. The world keeps it beside the trajectories."""
    name = ("oracle", world.pipeline_hash, oracle.digest(), *prompts, count, steps)
    if name not in world.trajectories:
        pairs, how = [(prompt, "") for prompt in prompts], (SEED, count, steps, TRAJECTORIES["guidance"])
        base = make_pool(world, pairs, *how)
        with oracle.applied(world):
            own = make_pool(world, pairs, *how)
        texts = [prompt for prompt in prompts for _ in range(count * steps)]
        times = base.timesteps.repeat(len(prompts) * count)
        z, eps = (
            [getattr(pool, name).flatten(0, 2) for pool in (base, own)] for name in ("latents", "eps")
        )  # conditional; each model's pool has its own predictions already
        eps_oracle = torch.cat([predictions(world, oracle, z[0], times, texts), eps[1]])
        eps_base = torch.cat([eps[0], predictions(world, None, z[1], times, texts)])
        gap = (eps_base - eps_oracle).square().mean().item()
        world.trajectories[name] = Reference(torch.cat(z), times.repeat(2), 2 * texts, eps_oracle, gap)
    return world.trajectories[name]


@torch.no_grad()
def predictions(world, erasure, latents: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
    """The public model's predictions for the prompts, without guidance, on the CPU; `erasure` None is the base."""
    pipe, size, found = world.pipe, 2 * world.batch_size, []
    with erasure.applied(pipe) if erasure else nullcontext() as public:
        guide = guidance_for(public, 1.0)
        for part in (slice(n, n + size) for n in range(0, len(latents), size)):
            guide.prepare(pipe, prompts[part])  # also sets how strong an adapter is for each prompt
            z, t = latents[part].to(pipe.device, pipe.unet.dtype), timesteps[part].to(pipe.device)
            with world.autocast():
                found.append(predict_noise(pipe.unet, z, t, guide.c).float().cpu())
    return torch.cat(found)
