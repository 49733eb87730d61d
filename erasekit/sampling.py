"""Prompts and seeds in, images out: one deterministic sampling loop for every method."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm.auto import tqdm

from .attention import Prompt, augment, check_key, check_keyless
from .checks import as_texts, check_choice, check_number
from .conditioning import Conditioning, encode, predict_noise

KEY_HALVES = ("conditional", "both")
SAMPLERS = {"ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
PREDICTIONS = ("epsilon", "v_prediction")
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
NOISE += ("prediction_type",)


class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): eps_null + s_g (eps_p - eps_null)."""

    uses_adapter = False  # whether the rule sets the strength of the erasure's adapter

    def __init__(self, scale: float = 5.0):
        self.scale = scale

    def prepare(self, pipe, prompts: list[str]) -> None:
        """Encode the prompts of a new batch."""
        self.c, self.null = encode(pipe, prompts), encode(pipe, [""] * len(prompts))

    def __call__(self, predict: Callable, latents: Tensor, t: Tensor, step: int) -> Tensor:
        """The noise (B, C, h, w) to remove at a step, counted from the noisy end.

        `predict(latents, t, cond, conditional)` is called once for each half, so that a key on one half does not pad the
        other.
        """
        eps_null = predict(latents, t, self.null, False)
        return eps_null + self.scale * (predict(latents, t, self.c, True) - eps_null)


GUIDANCE: dict[str, type[Guidance]] = {"plain": Guidance}  # methods that erase by guidance register theirs


def guidance_for(public, scale: float) -> Guidance:
    """How a public model, an erasure `Applied`, is guided: plainly, unless its method has a rule. None: the base."""
    rule = dict(public.info.get("guidance", {"kind": "plain"})) if public else {"kind": "plain"}
    kind = rule.pop("kind")
    check_choice("guidance", kind, GUIDANCE)
    if GUIDANCE[kind].uses_adapter:
        rule["adapter"] = public.adapter
    return GUIDANCE[kind](scale, **rule)


def initial_noise(pipe, seeds: list[int]) -> Tensor:
    """Unit Gaussian latents (B, C, h, w), one CPU generator per image, so that the batch size changes nothing."""
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, size, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe.device, pipe.unet.dtype)


def scheduler_for(pipe, sampler: str = "ddim"):
    """A deterministic scheduler of `SAMPLERS` with a pipeline's noise schedule; NotImplementedError if DDIM has none such."""
    if sampler != "ddim":  # steps from the end of the schedule, which the noise they start from is that of
        return SAMPLERS[sampler](**noise_schedule(pipe), timestep_spacing="trailing")
    # The schedule is named: DDIM would replace what is another class's default by its own.
    return DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **noise_schedule(pipe))


def noise_schedule(pipe) -> dict:
    """What decides a scheduler's noise schedule, and what the U-Net predicts, whatever the solver."""
    config = pipe.scheduler.config
    values = {name: getattr(config[name], "tolist", lambda v=config[name]: v)() for name in NOISE if name in config}
    return {name: value for name, value in values.items() if value}  # not every class has all that are off


@torch.no_grad()
def denoise(pipe, guide: Callable, latents: Tensor, steps: int, prompts: list[str] = (), sampler="ddim") -> Tensor:
    """Denoise latents (B, C, h, w) without noise of its own; `guide(latents, t, step)` returns the noise to remove, t being (B,).

    Raises FloatingPointError with the prompt and the step at which latents stopped being finite. `prompts` serve that sentence.
    """
    scheduler = scheduler_for(pipe, sampler)
    most = scheduler.config.num_train_timesteps - scheduler.config.steps_offset
    check_number("number of sampling steps", steps, 1, whole=True, most=most)
    scheduler.set_timesteps(steps)
    finite = torch.zeros(len(latents), dtype=torch.long, device=latents.device)  # steps, read once at the end
    for step, t in enumerate(scheduler.timesteps.tolist()):
        eps = guide(latents, torch.full((len(latents),), t, device=latents.device), step)
        latents = scheduler.step(eps, t, latents).prev_sample
        finite += (finite == step) & latents.isfinite().flatten(1).all(dim=1)
    for prompt, step in zip(prompts or [f"image {n}" for n in range(len(latents))], finite.tolist()):
        if step < steps:
            raise FloatingPointError(
                f"the latents of {prompt!r} are not finite from step {step + 1} of {steps} on: a weight or key has NaN or "
                "infinite numbers, or the precision is too low (use bf16 or fp32)"
            )
    return latents


@torch.no_grad()
def decode(pipe, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W), uint8. Raises FloatingPointError for images that are not finite."""
    vae = pipe.vae
    # A VAE in another precision than the latents is there because half precision is too little for it (SDXL).
    exact = torch.autocast(latents.device.type, enabled=False) if vae.dtype != latents.dtype else nullcontext()
    with exact:
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    if not images.isfinite().all():
        raise FloatingPointError("the VAE's images are not finite: use it in float32, pipe.vae.to(torch.float32)")
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def sample(pipe, prompts: list[str], seeds: list[int], *arguments, progress: str | None = None, **options) -> Tensor:
    """Images (N, 3, H, W), uint8, one for each (prompt, seed) pair, by a pipeline's or a world's networks.

    Arguments are those of `sample_batches`. `progress` names a progress bar; None shows none.
    """
    prompts, seeds = check_request(prompts, seeds)
    images, bar = [], tqdm(total=len(seeds), desc=progress, disable=progress is None, mininterval=1, unit="image")
    # Closed at once, also after an exception, so that the base model is restored.
    with bar, closing(sample_batches(pipe, prompts, seeds, *arguments, **options)) as batches:
        for _, part in batches:
            images.append(part)
            bar.update(len(part))
    return torch.cat(images)


@torch.no_grad()
def sample_batches(
    pipe,
    prompts: list[str],
    seeds: list[int],
    key: Prompt | None = None,
    key_half: str = "conditional",
    erasure=None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 50,
    autocast: Callable | None = None,
    batches: list[slice] | None = None,
    sampler: str | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Images batch by batch, each with the slice of prompts it is for.

    `erasure`: sample from its public model, whatever the method (weights, adapters or guidance). `key`: a learnable prompt on
    the "conditional" half of guidance or on "both"; guidance subtracts the unconditional half, so a key on both cancels part
    of itself. `autocast` makes the context the networks run in, by default a world's own. `batches`: only these slices.
    `sampler`: one of `SAMPLERS`, with the noise schedule of the pipeline's own scheduler; None, the default, is a world's own
    or "ddim", with a warning where a pipeline's scheduler is of another kind. Raises ValueError for an impossible request, key
    or pipeline, and FloatingPointError for latents or images that are not finite.
    """
    sampler = sampler or getattr(pipe, "sampler", None)
    autocast, pipe = autocast or getattr(pipe, "autocast", nullcontext), getattr(pipe, "pipe", pipe)
    prompts, seeds = check_request(prompts, seeds)
    check_choice("key_half", key_half, KEY_HALVES)
    check_choice("sampler", sampler or "ddim", SAMPLERS)
    check_number("num_inference_steps", num_inference_steps, 1, whole=True)
    check_number("guidance_scale", guidance_scale, -math.inf)
    batch_size = check_number("batch_size", batch_size, 1, whole=True)
    check_pipe(pipe)
    if not sampler and not isinstance(pipe.scheduler, DDIMScheduler):
        kind = type(pipe.scheduler).__name__
        warnings.warn(f"drawn by DDIM, not by {kind}: say sampler='ddim', or call the pipeline", stacklevel=2)
    if key is not None:
        check_key(pipe.unet, key)
    if not (erasure is None or hasattr(erasure, "applied")):
        raise ValueError(
            f"erasure is not possible as {type(erasure).__name__}: it is an Erasure, from ek.Erasure.load(folder)"
        )
    if batches is None:
        batches = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    applied = erasure.applied(pipe) if erasure else nullcontext(getattr(pipe.unet, "erasekit_public", None))
    with applied as public, augment(pipe.unet, key.layers if key else "all") as state:
        guide = guidance_for(public, guidance_scale)

        def predict(latents, t, cond: Conditioning, conditional: bool):
            keyed = key is not None and (conditional or key_half == "both")
            with state.use(key.at(t, len(pipe.scheduler.alphas_cumprod)) if keyed else None), autocast():
                return predict_noise(pipe.unet, latents, t, cond).to(latents.dtype)

        for part in batches:
            guide.prepare(pipe, prompts[part])
            noise = initial_noise(pipe, seeds[part])
            about = num_inference_steps, prompts[part], sampler or "ddim"
            latents = denoise(pipe, lambda z, t, i: guide(predict, z, t, i), noise, *about)
            with autocast():
                images = decode(pipe, latents)
            yield part, images


def check_pipe(pipe) -> None:
    """Raise ValueError for a pipeline that images cannot be sampled with by `sample`, or an erasure be trained on."""
    parts = ("unet", "vae", "tokenizer", "text_encoder", "scheduler")
    if missing := [name for name in parts if getattr(pipe, name, None) is None]:
        raise ValueError(
            f"{type(pipe).__name__} has no {missing[0]}: accepted are worlds and diffusers pipelines of Stable Diffusion 1, 2, XL"
        )
    scheduler, kind = pipe.scheduler, getattr(pipe.scheduler.config, "prediction_type", None)
    own = getattr(scheduler, "alphas_cumprod", None) if kind in PREDICTIONS else None
    if own is None or (own.cpu() - scheduler_for(pipe).alphas_cumprod).abs().max() > 1e-6:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction type {kind!r} has no noise schedule that DDIM can follow: accepted are "
            f"schedulers with alphas_cumprod and prediction type {' or '.join(PREDICTIONS)}"
        )
    if getattr(pipe.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ValueError(
            "this U-Net has an IP-Adapter loaded, which takes an image: call pipe.unload_ip_adapter() first"
        )
    if (found := pipe.unet.config.in_channels) != (latents := pipe.vae.config.latent_channels):
        raise ValueError(
            f"this U-Net takes {found} channels and the VAE's latents have {latents}: use the model's text-to-image pipeline"
        )
    check_keyless(pipe.unet)


def check_request(prompts: list[str], seeds: list[int]) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of Python's own. Raises ValueError for an impossible request of images."""
    prompts = list(as_texts("prompts", prompts))
    if isinstance(seeds, str) or not hasattr(seeds, "__iter__"):
        raise ValueError(f"seeds={seeds!r} is not possible: it is a list with a seed for each prompt")
    seeds = [check_number("seed", seed, -(2**63), whole=True, most=2**64 - 1) for seed in seeds]
    if not prompts:
        raise ValueError("prompts is empty: give at least one, with a seed")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    return prompts, seeds
