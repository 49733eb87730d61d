"""01: what a world is and how good: its judges, its drawings, what it composes, what it costs."""

import time

import torch

from ..metrics import clip_alignment, object_rate, percent, style_rate
from ..sampling import sample
from .common import strip

# The sweeps over every object and style take fewer steps: the judge sees no difference, and there are 4,000 images.
QUICK = {"seeds": 20, "placements": 8, "sampling_steps": 25, "sweep_steps": 12, "objects": 141}
SCALES = {
    "smoke": {"seeds": 1, "placements": 1, "sampling_steps": 2, "sweep_steps": 2, "objects": 4},
    "quick": QUICK,
    "full": QUICK | {"seeds": 50},
}


def compute(world, seeds, placements, sampling_steps, sweep_steps, objects):
    """Measure the world's bars; each with N and seeds. What needs real pictures is left out where the world has none."""
    seeds = list(range(seeds))
    names, ten = list(world.concepts("all"))[:objects], list(world.concepts("classes"))[:objects]
    how, sweep = {"steps": sampling_steps}, {"steps": sweep_steps}

    data = {"seeds": [seeds[0], seeds[-1]], "styles": list(world.styles)}
    images, labels, styles, once = world.known_pictures(placements)
    if labels:
        data["judge"] = {
            "N": len(labels),
            "object_top1": percent(object_rate(world, images, labels)),
            "style_top1": percent(style_rate(world, images, styles)),
        }
        data["clip"] = {"N": once} | zero_shot(world, world.clip, images[:once], labels[:once], styles[:once])

    # The base model, judged: plain prompts for the ten classes and for every object, styled prompts for the ten.
    def rates(chosen, **how):
        """Each name's top-1, the names' mean, and their mean alignment with the prompt."""
        labels = [name for name in chosen for _ in seeds]
        prompts = [world.prompt(n) for n in labels]
        images = sample(world.pipe, prompts, seeds * len(chosen), progress=f"{len(chosen)} objects", **how)
        hits = object_rate(world, images, labels)
        by_class = {name: percent(hits[[label == name for label in labels]]) for name in chosen}
        return by_class, percent(hits), round(clip_alignment(world, images, prompts).mean().item(), 2)

    ten_by_class, ten_mean, _ = rates(ten, **how)
    by_class, mean, alignment = rates(names, **sweep)
    data["base"] = {
        "N_a_class": len(seeds),
        "top1_emojinette": ten_mean,
        "top1_all": mean,
        "emojinette_by_class": ten_by_class,
        "top1_by_class": by_class,
        "clip_alignment": alignment,
        "steps": {"ten classes": sampling_steps, "everything else": sweep_steps},
    }
    pairs = [(c, s, seed) for c in ten for s in world.styles for seed in seeds]
    styled = sample(
        world.pipe, [world.prompt(c, s) for c, s, _ in pairs], [n for *_, n in pairs], progress="styles", **sweep
    )
    data["styled"] = {
        "N": len(pairs),
        "style_top1": percent(style_rate(world, styled, [s for _, s, _ in pairs])),
        "object_top1": percent(object_rate(world, styled, [c for c, _, _ in pairs])),
    }

    pictures = {"styles": strip(styled[:: len(seeds)])}
    # Pairs of object and style that training never showed.
    held = world.held_out()[:objects]
    if held:
        shown = [(o, s, seed) for o, s in held for seed in seeds]
        composed = sample(
            world.pipe,
            [world.prompt(o, s) for o, s, _ in shown],
            [n for *_, n in shown],
            progress="held-out pairs",
            **sweep,
        )
        object_hits = object_rate(world, composed, [o for o, _, _ in shown])
        style_hits = style_rate(world, composed, [s for _, s, _ in shown])
        data["held_out"] = {
            "N": len(shown),
            "pairs": [f"{o}, {s}" for o, s in held],
            "object_top1": percent(object_hits),
            "style_top1": percent(style_hits),
            "both": percent(object_hits & style_hits),
        }
        pictures["held_out"] = strip(composed[:: len(seeds)])

    began = time.time()
    sample(world.pipe, [world.prompt(c) for c in ten], list(range(len(ten))), **how)
    data["cost"] = {
        "seconds_for_ten_images": round(time.time() - began, 2),
        "sampling_steps": sampling_steps,
        "megabytes": round(world.disk_bytes() / 1e6, 1),
        "parameters_millions": {
            part: round(sum(p.numel() for p in getattr(world.pipe, part).parameters()) / 1e6, 2)
            for part in ("unet", "vae", "text_encoder")
        },
    }
    coloured = sample(
        world.pipe,
        [
            world.wording(world.told[0], c, None, b)
            for c, b in zip(ten, ("red", "orange", "yellow", "green", "blue") * 2)
        ],
        [0] * len(ten),
        **how,
    )
    return data, pictures | {"backgrounds": strip(coloured)}


def zero_shot(world, clip, images, labels, styles) -> dict:
    """Share of images whose own caption is the nearest by a CLIP model, among all objects and among all styles."""
    model, tokenizer = clip
    device = next(model.parameters()).device
    images = images.to(device)
    names, kinds = list(dict.fromkeys(labels)), list(world.styles)
    with torch.no_grad():
        image = model.encode_image(images.float() / 127.5 - 1, normalize=True)
        by_object = model.encode_text(tokenizer([world.prompt(n) for n in names]).to(device), normalize=True)
        nearest = (image @ by_object.T).argmax(1)
        hits = torch.tensor([names[i] == label for i, label in zip(nearest.tolist(), labels)])
        by_style = torch.stack(
            [
                model.encode_text(tokenizer([world.prompt(n, s) for n in names]).to(device), normalize=True)
                for s in kinds
            ],
            dim=1,
        )
        index = torch.tensor([names.index(label) for label in labels], device=device)
        style = torch.einsum("nd,nsd->ns", image, by_style[index]).argmax(1)
        style_hits = torch.tensor([kinds[i] == s for i, s in zip(style.tolist(), styles)])
    return {"object_top1": percent(hits), "style_top1": percent(style_hits)}
