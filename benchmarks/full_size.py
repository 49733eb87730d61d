"""Cost of training at Stable Diffusion 1.4's full size, with random weights: seconds, and peak memory.

python benchmarks/full_size.py [--steps 3] [--device cpu] writes records/benchmarks/full_size.<device>.json. Each part builds
a model at 512 x 512 pixels (64 x 64 latents), with the text encoder at its real size. Measured are a training step on one
erased and one retained sample, with latents given; on a GPU also whole trainings, latents included, of five erased concepts
and ten retained ones, and sampling with and without a key.
"""

import argparse
import copy
import gc
import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit import losses, paths
from erasekit.baselines import erase, method_config
from erasekit.conditioning import Conditioning, encode, predict_noise
from erasekit.evaluation.profiling import count_evaluations, measure
from erasekit.provenance import provenance
from erasekit.sampling import sample
from erasekit.studies import efficiency
from erasekit.training import TRAIN_METHODS, Trainer, optimizer_step
from erasekit.world import World
from erasekit.worlds.device import choose_precision
from erasekit.worlds.emojinette import networks
from erasekit.worlds.stable_diffusion import StableDiffusion

METHODS = ("kpop", "kpop-anchor", "esd-x", "esd-x, two U-Nets")
CONCEPT, RETAINED = "church", ("castle",)
# Whole trainings, by procedure: how many of its steps are taken. On-policy steps cost by where their trajectories stop: the
# first eight of KPOP stop at 24.4 of 50 on average (ESD at 24.5), all thousand at 24.5 (24.6).
TRAININGS = {"kpop, ours": 15, "kpop, as published": 8, "esd-x, as published": 8}
FIVE, TEN = [f"erased {n}" for n in range(5)], tuple(f"kept {n}" for n in range(10))
SAMPLING = "sampling"
MODELS = {"base": (False, False), "without the key": (True, False), "with the key": (True, True)}
IMAGES, ROUNDS, SAMPLING_STEPS = 4, 4, 20
SHORT_POOL = {"num_trajectories": 1, "trajectory_steps": 2}  # where the cost of the pool is not measured


def build(device: str, vae: dict | None = None) -> World:
    """A pipeline of Stable Diffusion 1.4's sizes; the VAE, which no training step uses, is small or of the given config."""
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer([f"Image of {name}" for name in (CONCEPT, *RETAINED, *FIVE, *TEN)])
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": networks.MAX_TOKENS}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    half = torch.float16 if device.startswith("cuda") else torch.float32
    with torch.device(device):  # diffusers' defaults are 1.4's, except for these
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(half)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**blocks, **vae or {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8}).to(half),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **ends)).to(half),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.enable_gradient_checkpointing()
    world = World(pipe.to(device), "full size", "Image of {}", retained=RETAINED, precision=choose_precision(device))
    world.batch_size = StableDiffusion.batch_size
    return world


def measure_step(method: str, steps: int, device: str) -> dict:
    """Mean seconds of a training step, without the first, and peak memory in GB."""
    world, times = build(device), []
    if method == "esd-x, two U-Nets":
        train_two_unets(world, steps + 1, times)
    else:
        config = method_config(method, steps=steps + 1, batch_size=1, retain=RETAINED, **SHORT_POOL)
        with timed_steps(times):
            erase(world, [CONCEPT], method, config, progress=False)
    seconds = [after - before for before, after in pairwise(times)][1:]
    cuda = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "method": method,
        "seconds a step": round(sum(seconds) / len(seconds), 2),
        "peak GB": round(peak / 1e9, 2),
        "U-Net": sum(p.numel() for p in world.pipe.unet.parameters()),
        "precision": world.precision,
    }


def measure_training(name: str, device: str) -> dict:
    """Evaluations, seconds and peak memory of a whole training; its other steps are assumed to cost what those taken did."""
    world, times, taken = build(device), [], TRAININGS[name]
    method, changes, (*_, steps) = efficiency.PROCEDURES[name]
    config = method_config(method, **{"retain": TEN} | changes | {"lr": 1e-5, "steps": 1})
    short = {"num_trajectories": 1, "num_retain_trajectories": 1} if config.latents == "pool" else {}
    erase(world, FIVE, method, replace(config, **short), progress=False)  # warm-up
    world.trajectories.clear()
    before = torch.cuda.memory_allocated()
    with measure(device) as usage, count_evaluations(world.pipe.unet) as count, timed_steps(times):
        erase(world, FIVE, method, replace(config, steps=taken), progress=False)
    seconds, pool = (times[-1] - times[0]) / taken, pool_evaluations(world)
    return {
        "training": name,
        "steps": steps,
        "steps measured": taken,
        "evaluations": round(pool + (count.evaluations - pool) * steps / taken),
        "with gradient": round(count.with_gradient * steps / taken),
        "seconds": round(usage.seconds + (steps - taken) * seconds, 1),
        "seconds a step": round(seconds, 3),
        "peak GB": round(before / 1e9 + usage.peak_mb / 1e3, 2),
        "precision": world.precision,
    }


def pool_evaluations(world: World) -> int:
    """Evaluations of the cached trajectories: for each latent that of the prompt and that of the empty one."""
    return sum(2 * latents.shape[:2].numel() for latents, *_ in world.trajectories.values())


def measure_sampling(device: str) -> dict:
    """Median seconds an image of the base, and of a public model without and with its key, in turn."""
    world = build(device, {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512})
    config = method_config("kpop", steps=1, batch_size=1, retain=RETAINED, **SHORT_POOL)
    erasure = erase(world, [CONCEPT], "kpop", config, progress=False)
    prompts, seconds = [f"Image of {CONCEPT}"] * IMAGES, {name: [] for name in MODELS}
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 7.5, "batch_size": IMAGES}
    for turn in range(1 + ROUNDS):
        seeds = [IMAGES * turn + n for n in range(IMAGES)]
        for name, (erased, keyed) in MODELS.items():
            own = {"erasure": erasure if erased else None, "key": erasure.key(CONCEPT) if keyed else None}
            with measure(device) as usage:
                sample(world.pipe, prompts, seeds, **own, **options, autocast=world.autocast)
            seconds[name] += [usage.seconds / IMAGES] if turn else []  # the first is a warm-up
    return {
        "seconds an image": {name: round(median(each), 3) for name, each in seconds.items()},
        "rounds": seconds,
        "images": IMAGES,
        "sampling steps": SAMPLING_STEPS,
        "precision": world.precision,
    }


@contextmanager
def timed_steps(times: list[float]):
    """Append the time before the first step of `Trainer.fit`, and after each step."""
    fit = Trainer.fit

    def timed_fit(trainer, step, *arguments, **options):
        def timed_step(n):
            step_losses = step(n)
            times.append(time.time())
            return step_losses

        times.append(time.time())
        return fit(trainer, timed_step, *arguments, **options)

    with patch.object(Trainer, "fit", timed_fit):
        yield


def train_two_unets(world: World, steps: int, times: list[float]) -> None:
    """ESD-x as its family trains it: with a frozen copy of the whole U-Net, evaluated at every step."""
    unet, device = world.pipe.unet, world.pipe.device
    frozen = copy.deepcopy(unet).requires_grad_(False)
    unet.requires_grad_(False)
    theta = [p for name, p in unet.named_parameters() if TRAIN_METHODS["xattn"](name)]
    for p in theta:
        p.data = p.data.float()
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(theta, lr=1e-5)
    c, null, r = (encode(world.pipe, [text]) for text in (f"Image of {CONCEPT}", "", f"Image of {RETAINED[0]}"))
    times.append(time.time())
    for n in range(steps):
        generator = torch.Generator().manual_seed(n)
        z = torch.randn(2, 4, 64, 64, generator=generator).to(device, frozen.dtype)
        t = torch.randint(1000, (2,), generator=generator).to(device)
        with torch.no_grad(), world.autocast():
            eps = predict_noise(frozen, z[[0, 0, 1]], t[[0, 0, 1]], Conditioning.cat([c, null, r])).float()
        with world.autocast():
            eps_theta = predict_noise(unet, z, t, Conditioning.cat([c, r])).float()
        eps_c, eps_null, eps_r = eps.chunk(3)
        removal = losses.removal(eps_theta[:1], losses.neutral_target(eps_c, eps_null, 1.0))
        optimizer_step(optimizer, (removal + losses.retain(eps_theta[1:], eps_r)).mean(), theta)
        times.append(time.time())


def measure_part(part: str, steps: int, device: str) -> dict:
    """Any part, by its name."""
    if part in METHODS:
        return measure_step(part, steps, device)
    return measure_training(part, device) if part in TRAININGS else measure_sampling(device)


def measure_all(steps: int, device: str) -> None:
    """All parts, and their record. On a CPU each has its own process, since memory is measured as the process's."""
    start, cuda = time.time(), device.startswith("cuda")

    def result(part: str) -> dict:
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return measure_part(part, steps, device)
        command = [sys.executable, __file__, "--part", part, "--steps", str(steps), "--device", device]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(output.splitlines()[-1])

    path = paths.RECORDS / "benchmarks" / f"full_size.{device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = {"rows": METHODS} | ({"trainings": TRAININGS, SAMPLING: (SAMPLING,)} if cuda else {})
    record = {"steps": steps} | {name: [] for name in groups}
    for name, parts in groups.items():
        for part in parts:
            record[name].append(result(part))
            print(record[name][-1], flush=True)
            # Written after each part, so that an interrupted run loses nothing.
            record["made"] = provenance(device, time.time() - start)
            path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=(*METHODS, *TRAININGS, SAMPLING), help="measure one part and print it")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure_part(args.part, args.steps, args.device)))
    else:
        measure_all(args.steps, args.device)


if __name__ == "__main__":
    main()
