"""What a training costs at Stable Diffusion 1.4's full size, with random weights: seconds, and the most memory it took.

python benchmarks/full_size.py [--steps 3] [--device cpu] writes records/benchmarks/full_size.<device>.json. Each way runs in a
model of its own at 512 x 512 pixels (64 x 64 latents), with the text encoder at its real size: a training step on one sample of
what is erased and one of what is retained, the latents given; and on a GPU whole trainings, latents and all, of five concepts
beside ten that are kept, and drawing with and without a key.
"""

import argparse
import copy
import gc
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit import losses, paths
from erasekit.baselines import erase, settings
from erasekit.counting import counted, spending
from erasekit.emojinette import networks
from erasekit.results import provenance
from erasekit.sampling import sample
from erasekit.stable_diffusion import StableDiffusion
from erasekit.studies import recipes
from erasekit.text import encode, predict
from erasekit.training import GROUPS, update
from erasekit.worlds import World, fast_bf16

WAYS = ("kpop", "kpop-anchor", "esd-x", "esd-x, two U-Nets")
CONCEPT, RETAINED = "church", ("castle",)
# Whole trainings: method, settings, and how many of the recipe's steps are taken. Steps of the paper's recipe cost by where on
# a trajectory they stop: its first eight do at 24.4 of 50 on average (ESD's at 24.5), all thousand at 24.5 (24.6).
TRAININGS = {
    "kpop, ours": ("kpop", recipes.OURS, 15),
    "kpop, paper's recipe": ("kpop", recipes.PAPER, 8),
    "esd-x, paper's recipe": ("esd-x", recipes.PAPER | {"retain": ()}, 8),
}
STEPS = {name: recipes.RECIPES[name][2][-1] for name in TRAININGS}
FIVE, TEN = [f"erased {n}" for n in range(5)], tuple(f"kept {n}" for n in range(10))
DRAWING = "drawing"
SECONDS_AN_IMAGE = {"base": (False, False), "without the key": (True, False), "with the key": (True, True)}
IMAGES, ROUNDS, SAMPLING_STEPS = 4, 4, 20


def build(device: str, vae: dict | None = None) -> World:
    """A pipeline of Stable Diffusion 1.4's sizes; the VAE is small, since no training step meets it, or of the given config."""
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer([f"Image of {name}" for name in (CONCEPT, *RETAINED, *FIVE, *TEN)])
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=networks.TOKENS, **sizes, **ends)
    )
    half = torch.float16 if device.startswith("cuda") else torch.float32
    # The defaults of diffusers' class are 1.4's, but for these.
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(half)
    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**four, **vae or {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8}).to(half),
        text_encoder=text.to(half),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.enable_gradient_checkpointing()
    precision = "bf16" if fast_bf16(device) else ("fp16" if device.startswith("cuda") else "fp32")
    world = World("full size", pipe.to(device), {"retained": RETAINED}, (), precision, template="Image of {}")
    world.batch = StableDiffusion.batch
    return world


def measure(way: str, steps: int, device: str) -> dict:
    """Seconds a step, the first left out, and the peak in gigabytes."""
    world = build(device)
    stamps = []
    if way == "esd-x, two U-Nets":
        two_unets(world, steps + 1, stamps)
    else:
        # A few latents to train on; what rolling costs is another question.
        short = {"steps": steps + 1, "batch": 1, "retain": RETAINED, "rolled": 1, "roll_steps": 2}
        with Clock(stamps):
            erase(world, [CONCEPT], way, settings(way, **short), progress=False)
    took = [b - a for a, b in pairwise(stamps)][1:]
    cuda = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(p.numel() for p in world.pipe.unet.parameters())
    return {
        "way": way,
        "seconds a step": round(sum(took) / len(took), 2),
        "peak GB": round(peak / 1e9, 2),
        "U-Net": count,
        "precision": world.precision,
    }


def measure_training(name: str, device: str) -> dict:
    """Evaluations, seconds and the peak in gigabytes of a whole training; steps not taken cost what those taken did."""
    world, stamps = build(device), []
    method, changes, steps = TRAININGS[name]
    config = settings(method, **{"retain": TEN} | changes | {"lr": 1e-5, "steps": 1})
    short = {"rolled": 1, "rolled_retained": 1} if config.recipe == "pool" else {}
    erase(world, FIVE, method, replace(config, **short), progress=False)  # warms up
    world.trajectories.clear()
    held = torch.cuda.memory_allocated()
    with spending(device) as spent, counted(world.pipe.unet) as count, Clock(stamps):
        erase(world, FIVE, method, replace(config, steps=steps), progress=False)
    a_step, pool = (stamps[-1] - stamps[0]) / steps, pooled(world)
    return {
        "training": name,
        "steps": STEPS[name],
        "steps measured": steps,
        "evaluations": round(pool + (count.evaluations - pool) * STEPS[name] / steps),
        "with gradient": round(count.with_gradient * STEPS[name] / steps),
        "seconds": round(spent.seconds + (STEPS[name] - steps) * a_step, 1),
        "seconds a step": round(a_step, 3),
        "peak GB": round(held / 1e9 + spent.peak_mb / 1e3, 2),
        "precision": world.precision,
    }


def pooled(world: World) -> int:
    """Evaluations that the trajectories in memory took: at each latent the text's and the empty one's."""
    return sum(2 * latents.shape[:2].numel() for latents, *_ in world.trajectories.values())


def measure_drawing(device: str) -> dict:
    """Median seconds an image: the base, and a public model without and with its key, in turn."""
    world = build(device, {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512})
    short = {"steps": 1, "batch": 1, "rolled": 1, "roll_steps": 2, "retain": RETAINED}
    made = erase(world, [CONCEPT], "kpop", settings("kpop", **short), progress=False)
    asked, took = [f"Image of {CONCEPT}"] * IMAGES, {name: [] for name in SECONDS_AN_IMAGE}
    how = {"steps": SAMPLING_STEPS, "guidance": 7.5, "batch_size": IMAGES, "autocast": world.autocast}
    torch.cuda.reset_peak_memory_stats()
    for seed in range(1 + ROUNDS):
        for name, (erased, opened) in SECONDS_AN_IMAGE.items():
            own = {"erasure": made if erased else None, "key": made.key(CONCEPT) if opened else None}
            with spending(device) as spent:
                sample(world.pipe, asked, [IMAGES * seed + n for n in range(IMAGES)], **own, **how)
            took[name] += [spent.seconds / IMAGES] if seed else []  # the first warms up
    return {
        "seconds an image": {name: round(sorted(times)[len(times) // 2], 3) for name, times in took.items()},
        "rounds": took,
        "images": IMAGES,
        "sampling steps": SAMPLING_STEPS,
        "precision": world.precision,
    }


class Clock:
    """Stamps the time before the first step of `Bench.fit` and after each."""

    def __init__(self, stamps: list[float]):
        self.stamps = stamps

    def __enter__(self):
        from erasekit.training import Bench

        self.bench, self.fit = Bench, Bench.fit

        def fit(bench, step, *more, **how):
            def timed(n):
                said = step(n)
                self.stamps.append(time.time())
                return said

            self.stamps.append(time.time())
            return self.fit(bench, timed, *more, **how)

        Bench.fit = fit

    def __exit__(self, *_):
        self.bench.fit = self.fit


def two_unets(world: World, steps: int, stamps: list[float]) -> None:
    """ESD-x as its family trains it: a frozen copy of the whole U-Net beside the trained one, asked at every step."""
    unet, device = world.pipe.unet, world.pipe.device
    frozen = copy.deepcopy(unet).requires_grad_(False)
    theta = {name: p for name, p in unet.named_parameters() if GROUPS["x"](name)}
    unet.requires_grad_(False)
    for p in theta.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    adam = torch.optim.Adam(theta.values(), lr=1e-5)
    c, null, r = (encode(world.pipe, [text]) for text in (f"Image of {CONCEPT}", "", f"Image of {RETAINED[0]}"))
    stamps.append(time.time())
    for n in range(steps):
        generator = torch.Generator().manual_seed(n)
        z = torch.randn(2, 4, 64, 64, generator=generator).to(device, frozen.dtype)
        t = torch.randint(1000, (2,), generator=generator).to(device)
        with torch.no_grad(), world.autocast():
            eps_c, eps_null, eps_r = (
                predict(frozen, z[[0, 0, 1]], t[[0, 0, 1]], torch.cat([c, null, r])).float().chunk(3)
            )
        with world.autocast():
            said = predict(unet, z, t, torch.cat([c, r])).float()
        y = losses.neutral_target(eps_c, eps_null, 1.0)
        update(adam, (losses.removal(said[:1], y) + losses.retain(said[1:], eps_r)).mean(), theta.values())
        stamps.append(time.time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", choices=(*WAYS, *TRAININGS, DRAWING), help="measure one way and print it")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measured(args.way, args.steps, args.device)))
    else:
        measure_all(args.steps, args.device)


def measured(way: str, steps: int, device: str) -> dict:
    """Any way, by its name."""
    if way in WAYS:
        return measure(way, steps, device)
    return measure_training(way, device) if way in TRAININGS else measure_drawing(device)


def measure_all(steps: int, device: str) -> None:
    """Every way, and the record of all. Each has a process of its own where memory is the process's, and not the GPU's."""
    began, cuda = time.time(), device.startswith("cuda")

    def ran(way: str) -> dict:
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found = measured(way, steps, device)
        else:
            command = [sys.executable, __file__, "--way", way, "--steps", str(steps), "--device", device]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(out.splitlines()[-1])
        print(found, flush=True)
        return found

    path = paths.RECORDS / "benchmarks" / f"full_size.{device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"steps": steps, "rows": []} | ({"trainings": [], DRAWING: []} if cuda else {})
    for name, ways in zip(list(record)[1:], (WAYS, TRAININGS, (DRAWING,))):
        for way in ways:
            record[name].append(ran(way))
            # What was measured is kept, also where the rest is stopped.
            record["made"] = provenance(device, time.time() - began)
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
