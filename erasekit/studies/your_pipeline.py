"""14: how often a concept is drawn in plain diffusers calls: by the base, the public model, and the public model with the key."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

NOTEBOOK, VERSION, UNIT = "14_your_pipeline", 1, "images a rate"

SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)
COLUMNS = ("base", "public", "with the key")
RANK = 8  # of the exported LoRA, as in the notebook
LORA = f"text to image, LoRA of rank {RANK}"  # the row whose public model is the base with that file


@dataclass(frozen=True)
class Settings:
    concept: str = "church"
    other: str = "house"  # the negative prompt, and what is on the pictures given to img2img and inpainting
    seeds: int = 50
    training_steps: int = 150
    batch_size: int = 8
    sampling_steps: int = 15
    strength: float = 0.9  # of img2img; inpainting redraws its mask from noise


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=10),
    "smoke": Settings(seeds=1, training_steps=2, batch_size=2, sampling_steps=2),
}


def calls(world, given, s: Settings) -> dict:
    """Row -> (pipeline, options of its call). `given`: pictures (N, 3, H, W) in [0, 1] of something else."""
    import diffusers
    import torch

    from ..sampling import initial_noise

    pipe = world.pipe
    noise = {"latents": initial_noise(pipe, list(range(s.seeds)))}
    side = given.shape[-1]
    mask = torch.zeros(s.seeds, 1, side, side)
    mask[..., side // 8 : -side // 8, side // 8 : -side // 8] = 1  # all but a frame of an eighth
    found = {}
    for name in SCHEDULERS:
        changed = getattr(diffusers, name).from_config(pipe.scheduler.config)
        found[f"text to image, {name.removesuffix('Scheduler')}"] = (
            type(pipe)(**{**pipe.components, "scheduler": changed}, **_unchecked(pipe)),
            noise,
        )
    solver = found[f"text to image, {SCHEDULERS[1].removesuffix('Scheduler')}"][0]
    found["with a negative prompt"] = (solver, noise | {"negative_prompt": [world.prompt(s.other)] * s.seeds})
    found["image to image"] = (
        diffusers.AutoPipelineForImage2Image.from_pipe(solver),
        {"image": given, "strength": s.strength},
    )
    if pipe.unet.config.in_channels == 4:  # diffusers inpaints with four latent channels alone
        found["inpainting"] = (
            diffusers.AutoPipelineForInpainting.from_pipe(solver),
            {"image": given, "mask_image": mask, "height": side, "width": side, "strength": 1.0},
        )
    torch.manual_seed(0)
    # Untrained: its output layers are zero, so that it runs and changes nothing by itself.
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if scale != 8:  # the embedding of the condition expects latents of an eighth
        net.controlnet_cond_embedding = torch.nn.Conv2d(3, pipe.unet.config.block_out_channels[0], scale, scale)
        torch.nn.init.zeros_(net.controlnet_cond_embedding.weight)
    net = net.to(pipe.device, pipe.unet.dtype).eval()
    found["ControlNet"] = (
        diffusers.AutoPipelineForText2Image.from_pipe(solver, controlnet=net),
        noise | {"image": given},
    )
    # A U-Net of its own, as peft wraps the layers that the file changes.
    elsewhere = {**solver.components, "unet": copy.deepcopy(pipe.unet)}
    found[LORA] = type(pipe)(**elsewhere, **_unchecked(pipe)), noise
    return found


def _unchecked(pipe) -> dict:
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}


@contextmanager
def lora_loaded(pipe, file: Path) -> Iterator[None]:
    """Inside the block, `pipe` has the LoRA of a file, by diffusers' own loader (which needs peft), as for anybody's LoRA."""
    pipe.load_lora_weights(str(file))
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Top-1 of the object judge, in percent, for each call; and whether DDIM in the call equals `ek.sample` in every bit."""
    import torch

    from ..evaluation.images import image_strip
    from ..evaluation.metrics import object_correct, percent
    from ..kpop import kpop
    from ..pipelines.files import to_lora
    from ..pipelines.unlocked import unlocked
    from ..sampling import sample
    from .kit.erasures import make_config, saved_erasure

    world.check_concepts([s.concept, s.other])
    changes = {"steps": s.training_steps, "batch_size": s.batch_size}
    config = make_config(world, "kpop", 0, s.sampling_steps, changes)
    erasure, _ = saved_erasure(world, [s.concept], config, kpop)
    key, seeds = erasure.key(s.concept), list(range(s.seeds))
    common = {"num_inference_steps": s.sampling_steps, "batch_size": s.seeds}
    labels, prompts = [s.concept] * s.seeds, [world.prompt(s.concept)] * s.seeds
    given = sample(world.pipe, [world.prompt(s.other)] * s.seeds, seeds, **common).float() / 255

    rates, firsts, ddim = {}, {column: [] for column in COLUMNS}, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        error = to_lora(erasure, world.pipe, file, RANK)
        lora = {"rank": RANK, "relative error": round(error, 4), "MB": round(file.stat().st_size / 1e6, 2)}
        for row, (pipe, options) in calls(world, given, s).items():
            pipe.set_progress_bar_config(disable=True)
            rates[row], kept = {}, []
            for column in COLUMNS:
                with ExitStack() as stack:
                    if column != "base":
                        stack.enter_context(lora_loaded(pipe, file) if row == LORA else erasure.applied(pipe))
                    if column == "with the key":
                        stack.enter_context(unlocked(pipe, key))
                    out = pipe(
                        prompts,
                        num_inference_steps=s.sampling_steps,
                        guidance_scale=5.0,
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                        output_type="pt",
                        **options,
                    ).images
                images = (255 * out).round().to(torch.uint8).cpu()
                rates[row][column] = percent(object_correct(world, images, labels))
                kept.append(images)
                firsts[column].append(images[:1])
            ddim = ddim or kept
    ours = [
        sample(world.pipe, prompts, seeds, **common, **options)
        for options in ({}, {"erasure": erasure}, {"erasure": erasure, "key": key})
    ]
    equal = {column: bool(torch.equal(a, b)) for column, a, b in zip(COLUMNS, ddim, ours)}
    data = {"concept": s.concept, "N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1}
    strips = {column.replace(" ", "_"): image_strip(torch.cat(images)) for column, images in firsts.items()}
    return data | {"rates": rates, "equal to ek.sample": equal, "LoRA": lora}, strips


def figures(record) -> dict:
    """A row for each call: the three rates with their intervals, and the first image of each."""
    import matplotlib.pyplot as plt
    import numpy as np

    from ..evaluation.intervals import wilson
    from .kit import plots

    rates, count = record.data["rates"], record.data["N"]
    colors = dict(zip(COLUMNS, (plots.COLORS[name] for name in ("grey", "red", "green"))))
    figure, (left, *pictures) = plt.subplots(
        1, 4, figsize=(9.4, 0.56 * len(rates) + 1), layout="constrained", width_ratios=(8.5, 1, 1, 1)
    )
    for n, (column, color) in enumerate(colors.items()):
        for row, y in zip(rates.values(), np.arange(len(rates)) + 0.2 * (n - 1)):
            left.plot(wilson(row[column], count), (y, y), color=color, lw=1.5, alpha=0.6)
            left.plot(row[column], y, "o", color=color, ms=6, zorder=3, label=None if y > 0.5 else column)
    left.set_yticks(range(len(rates)), rates)
    left.set_ylim(len(rates) - 0.5, -0.5)
    plots.percent_axis(left, "x", f"images judged {record.data['concept']}, %", (-3, 103))
    figure.legend(loc="outside upper left", ncols=3)
    for column, ax in zip(COLUMNS, pictures):
        plots.show_image(ax, np.concatenate(plots.tiles(record, column.replace(" ", "_"))), column)
        ax.set_aspect("auto")
    return {"your_pipeline": figure}


def table(record) -> pd.DataFrame:
    """A row for each call: rates in percent, with 95 % intervals."""
    from ..evaluation.intervals import wilson

    count = record.data["N"]

    def cell(rate: float) -> str:
        low, high = wilson(rate, count)
        return f"{rate:.0f} ({low:.0f} to {high:.0f})"

    rows = {row: {c: cell(r[c]) for c in COLUMNS} for row, r in record.data["rates"].items()}
    return pd.DataFrame(rows).T.rename_axis(f"judged {record.data['concept']}, %")
