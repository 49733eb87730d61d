"""Probes of a public model that change how it samples, not what it is asked: no filter of prompts sees them.

Completion, inpainting, noisier sampling and classifier guidance after Lu et al. (arXiv 2505.17013), the inversion of pictures
after Rusanovsky et al. (arXiv 2412.00782), all written anew for latents of any number of channels. Each takes one prompt and
seed for an image and returns images (N, 3, H, W), uint8; noise has one generator for each image, so that the batch size changes
nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from ..checkpoints import seeded
from ..conditioning import predict_noise
from ..sampling import Guidance, decode, denoise, guidance_for, initial_noise, scheduler_for
from ..training import gradients_off

GUIDANCE_SCALE = 5.0  # that of `sampling.sample`


@contextmanager
def guided(world, erasure, prompts: list[str], scale: float = GUIDANCE_SCALE) -> Iterator[Callable]:
    """`predict(z, t, step)`, the guided U-Net output (B, C, h, w), of the public model in force inside the block.

    `erasure` None is the base. `t` is one time step, an int, for the batch, `step` its number from the noisy end.
    """
    pipe = world.pipe
    with erasure.applied(pipe) if erasure else nullcontext() as public:
        guide = guidance_for(public, scale)
        guide.prepare(pipe, prompts)

        def one(z, t, cond, conditional):
            with world.autocast():
                return predict_noise(pipe.unet, z, t, cond).to(z.dtype)

        plain = scale == 1 and type(guide) is Guidance  # then the empty half counts for nothing

        def predict(z, t, step):
            times = torch.full((len(z),), t, device=z.device)
            return one(z, times, guide.c, True) if plain else guide(one, z, times, step)

        yield predict


def batches(world, count: int, part: int = 1) -> list[slice]:
    """Slices of `count` images, each a `part`-th of the world's batch."""
    size = max(1, world.batch_size // part)
    return [slice(n, n + size) for n in range(0, count, size)]


def in_batches(world, prompts: list[str], seeds: list[int], draw: Callable, part: int = 1) -> Tensor:
    """Images of `draw(prompts, noise, rows)`, which returns latents, batch by batch; see `batches`."""
    images = []
    for rows in batches(world, len(seeds), part):
        z = draw(prompts[rows], initial_noise(world.pipe, seeds[rows]), rows)
        with world.autocast():
            images.append(decode(world.pipe, z))
    return torch.cat(images)


def scheduler_of(world, steps: int):
    """The world's sampler at `steps` steps."""
    scheduler = scheduler_for(world.pipe, world.sampler)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def completion(world, erasure, prompts: list[str], seeds: list[int], steps: int, first: int) -> Tensor:
    """The base takes the first of `steps` steps, the public model the others, by the same prompts."""

    def draw(texts, z, rows):
        scheduler = scheduler_of(world, steps)
        for model, own in ((None, range(first)), (erasure, range(first, steps))):
            with guided(world, model, texts) as predict:
                for step in own:
                    t = int(scheduler.timesteps[step])
                    z = scheduler.step(predict(z, t, step), t, z).prev_sample
        return z

    return in_batches(world, prompts, seeds, draw)


def hole_in(size: int, share: float) -> slice:
    """The middle `share` of a side of `size` positions. Raises ValueError where nothing or everything would be left."""
    margin = round(size * (1 - share) / 2)
    if not 0 < margin < size / 2:
        raise ValueError(
            f"a hole of {share:g} of the side is not possible in {size} latents: take one between 0.2 and 0.8"
        )
    return slice(margin, size - margin)


@torch.no_grad()
def inpainting(
    world, erasure, pictures: Tensor, prompts: list[str], seeds: list[int], steps: int, share: float
) -> Tensor:
    """Pictures (N, 3, H, W), uint8, whose middle square of `share` of the side the public model fills.

    The square is painted white before the VAE sees it: nothing of it is left in the latents around it. After each step the
    latents outside are those of the picture with that step's noise, as diffusers does with a U-Net that takes no mask
    (blended latents, Avrahami et al., arXiv 2206.02779).
    """
    pipe, alphas = world.pipe, world.pipe.scheduler.alphas_cumprod
    pixels, places = hole_in(pictures.shape[-1], share), hole_in(pipe.unet.config.sample_size, share)
    masked = pictures.float() / 127.5 - 1
    masked[..., pixels, pixels] = 1
    inside = torch.zeros((pipe.unet.config.sample_size,) * 2, dtype=torch.bool, device=pipe.device)
    inside[places, places] = True

    def draw(texts, noise, rows):
        scheduler, z, known = scheduler_of(world, steps), noise, latents_of(world, masked[rows])
        with guided(world, erasure, texts) as predict:
            for step, t in enumerate(scheduler.timesteps.tolist()):
                z = scheduler.step(predict(z, t, step), t, z).prev_sample
                alpha = alphas[scheduler.timesteps[step + 1]] if step + 1 < steps else torch.ones(())
                z = torch.where(inside, z, alpha.sqrt().item() * known + (1 - alpha).sqrt().item() * noise)
        return z

    return in_batches(world, prompts, seeds, draw)


@torch.no_grad()
def latents_of(world, pictures: Tensor) -> Tensor:
    """Latents (N, C, h, w) of pictures (N, 3, H, W) in [-1, 1]."""
    vae = world.pipe.vae
    return vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor


def split_prediction(pipe, output: Tensor, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a U-Net output, noise or v, says are in z at alpha_bar = `alpha`."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        return signal * z - noise * output, signal * output + noise * z
    return (z - noise * output) / signal, output


def ddim_levels(pipe, steps: int) -> list[tuple[int, float, float]]:
    """(time step, its alpha_bar, that after the step) of DDIM from the noisy end."""
    scheduler = scheduler_for(pipe, "ddim")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    alphas = [float(scheduler.alphas_cumprod[t]) for t in times] + [float(scheduler.final_alpha_cumprod)]
    return list(zip(times, alphas, alphas[1:]))


@torch.no_grad()
def noisy(
    world, erasure, prompts: list[str], seeds: list[int], steps: int, etas: list[float], scales: list[float]
) -> Tensor:
    """DDIM from noise times `scales`, with `etas` times the noise that eta = 1, ancestral sampling, adds; one of each an image.

    The step itself is that of eta = 1: beyond 1 an eta inside it has no real solution near the end.
    """
    pipe = world.pipe

    def draw(texts, z, rows):
        generators = [seeded("probe noise", seed) for seed in seeds[rows]]
        eta, scale = (torch.tensor(x[rows], device=z.device)[:, None, None, None].to(z) for x in (etas, scales))
        z = scale * z
        with guided(world, erasure, texts) as predict:
            for step, (t, alpha, after) in enumerate(ddim_levels(pipe, steps)):
                clean, eps = split_prediction(pipe, predict(z, t, step), z, alpha)
                variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
                added = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)
                z = math.sqrt(after) * clean + math.sqrt(max(1 - after - variance, 0)) * eps
                z = z + eta * math.sqrt(variance) * added
        return z

    return in_batches(world, prompts, seeds, draw)


def classifier_guided(
    world, erasure, prompts: list[str], seeds: list[int], steps: int, concepts: list[str], scales: list[float]
) -> Tensor:
    """Sampling with eps - scale sqrt(1 - alpha_bar) grad_z log p(concept | decoded clean latents), p by the world's judge.

    One concept and scale for each image. Dhariwal and Nichol (arXiv 2105.05233), with a judge of clean images on what the
    present latents promise, so that it needs no training on noise (Bansal et al., arXiv 2302.07121). The gradient passes the
    judge, the VAE's decoder and the U-Net.
    """
    pipe, judge = world.pipe, world.judge
    alphas = pipe.scheduler.alphas_cumprod
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"

    def gradient_at(z, output, alpha, index):
        clean, _ = split_prediction(pipe, output, z, alpha)
        with world.autocast():
            image = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
        shown = judge(image.float())[0].log_softmax(1).gather(1, index)
        return torch.autograd.grad(shown.sum(), z)[0]

    def draw(texts, z, rows):
        scheduler = scheduler_of(world, steps)
        index = torch.tensor([[judge.objects.index(c)] for c in concepts[rows]], device=z.device)
        scale = torch.tensor(scales[rows], device=z.device)[:, None, None, None].to(z)
        with guided(world, erasure, texts) as predict:
            for step, t in enumerate(scheduler.timesteps.tolist()):
                alpha, z = alphas[t].item(), z.detach().requires_grad_()
                output = predict(z, t, step)
                # A change of the noise by d changes v by d / sqrt(alpha_bar).
                change = math.sqrt(1 - alpha) / (math.sqrt(alpha) if velocity else 1) * scale
                gradient = gradient_at(z, output, alpha, index)
                with torch.no_grad():
                    z = scheduler.step(output - change * gradient, t, z).prev_sample
        return z.detach()

    with torch.enable_grad(), ExitStack() as stack:
        for network in (pipe.unet, pipe.vae, judge):
            stack.enter_context(gradients_off(network))
        return in_batches(world, prompts, seeds, draw, 2)  # gradients take memory


@torch.no_grad()
def invert(world, erasure, pictures: Tensor, texts: list[str], steps: int, rounds: int = 3) -> Tensor:
    """The noise (N, C, h, w) that DDIM without guidance, by each one's text, draws pictures (N, 3, H, W) in [-1, 1] from.

    A step backwards needs the prediction at its own end: it starts from the prediction where the step begins, and is then
    repeated from its result, `rounds` in all.
    """
    pipe, found = world.pipe, []
    for part in batches(world, len(pictures)):
        z = latents_of(world, pictures[part])
        with guided(world, erasure, texts[part], 1.0) as predict:
            for step, (t, alpha, after) in reversed(list(enumerate(ddim_levels(pipe, steps)))):
                at = z
                for n in range(rounds):
                    # Where the step begins, the latents have the noise of the level that they are at.
                    _, eps = split_prediction(pipe, predict(at, t, step), at, alpha if n else after)
                    clean = (z - math.sqrt(1 - after) * eps) / math.sqrt(after)
                    at = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * eps
                z = at
        found.append(z)
    return torch.cat(found)


@torch.no_grad()
def redraw(world, erasure, noise: Tensor, texts: list[str], steps: int, scale: float) -> Tensor:
    """Images of DDIM from given noise (N, C, h, w), by each one's text at a guidance scale."""
    images = []
    for part in batches(world, len(noise)):
        with guided(world, erasure, texts[part], scale) as predict:

            def guide(z, t, step, predict=predict):
                return predict(z, t[0].item(), step)

            z = denoise(world.pipe, guide, noise[part], steps, texts[part])
        with world.autocast():
            images.append(decode(world.pipe, z))
    return torch.cat(images)


def surprise(noise: Tensor) -> Tensor:
    """Minus the log-likelihood (N,) of noise (N, C, h, w) under the unit Gaussian, in nats a number; 1.419 is expected."""
    return 0.5 * (noise.float().square().flatten(1).mean(1) + math.log(2 * math.pi)).cpu()
