"""A training step at Stable Diffusion 1.4's full size, with random weights: seconds, and the most memory it took.

python benchmarks/full_size.py [--steps 3] [--device cpu] writes records/benchmarks/full_size.<device>.json. Each way runs in a
process of its own, on one sample of what is erased and one of what is retained, at 512 x 512 pixels (64 x 64 latents), with the
text encoder at its real size and the latents given.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit import losses, paths, trajectories
from erasekit.baselines import erase, settings
from erasekit.emojinette import networks
from erasekit.results import provenance
from erasekit.text import encode, predict
from erasekit.training import GROUPS, update
from erasekit.worlds import World, fast_bf16

WAYS = ("kpop", "kpop-anchor", "esd-x", "esd-x, two U-Nets")
CONCEPT, RETAINED = "church", ("castle",)


def build(device: str) -> World:
    """A pipeline of Stable Diffusion 1.4's sizes; the VAE is small, since no training step meets it."""
    torch.manual_seed(0)
    tokenizer = networks.make_tokenizer([f"Image of {name}" for name in (CONCEPT, *RETAINED)])
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=networks.TOKENS, **sizes, **ends)
    )
    half = torch.float16 if device.startswith("cuda") else torch.float32
    # The defaults of diffusers' class are 1.4's, but for these.
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(half)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=8,
        ),
        text_encoder=text,
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
    return World("full size", pipe.to(device), {"retained": RETAINED}, (), precision, template="Image of {}")


def measure(way: str, steps: int, device: str) -> dict:
    """Seconds a step, the first left out, and the peak in gigabytes."""
    world = build(device)
    trajectories.ROLL.update(seeds=1, steps=2)  # latents to train on; what rolling costs is another question
    stamps = []
    if way == "esd-x, two U-Nets":
        two_unets(world, steps + 1, stamps)
    else:
        short = {"steps": steps + 1, "batch": 1, "retain": RETAINED}
        with Clock(stamps):
            erase(world, [CONCEPT], way, settings(way, **short), progress=False)
    took = [b - a for a, b in pairwise(stamps)]
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


class Clock:
    """Stamps the time after each step of `Bench.fit`."""

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
    parser.add_argument("--way", choices=WAYS, help="measure one way and print it")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.steps, args.device)))
        return
    began, rows = time.time(), []
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--steps", str(args.steps), "--device", args.device]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(rows[-1], flush=True)
    path = paths.RECORDS / "benchmarks" / f"full_size.{args.device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"steps": args.steps, "rows": rows, "made": provenance(args.device, time.time() - began)}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
