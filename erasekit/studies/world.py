"""01: how well the base model generates, how well the judges recognise, and what both cost."""

import time
from dataclasses import dataclass

import pandas as pd

NOTEBOOK, VERSION, UNIT = "01_world", 1, "images a class"


@dataclass(frozen=True)
class Settings:
    seeds: int = 50
    placements: int = 8  # of each test image of the judges
    sampling_steps: int = 15
    sweep_steps: int = 12  # for every object and style: 11,000 images
    objects: int = 224


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=20),
    "smoke": Settings(seeds=1, placements=1, sampling_steps=2, sweep_steps=2, objects=4),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent, each with its N. What needs test images is left out in a world that has none."""
    from ..evaluation.images import image_strip
    from ..evaluation.metrics import clip_alignment, object_correct, percent, style_correct
    from ..sampling import sample

    seeds = list(range(s.seeds))
    names, classes = list(world.concepts("all"))[: s.objects], list(world.concepts("classes"))[: s.objects]
    data = {"seeds": [0, s.seeds - 1], "styles": list(world.styles)}

    images, labels, styles, first = world.test_images(s.placements)
    if labels:
        data["judge"] = {
            "N": len(labels),
            "object_top1": percent(object_correct(world, images, labels)),
            "style_top1": percent(style_correct(world, images, styles)),
        }
        data["clip"] = {"N": first} | zero_shot(world, world.clip, images[:first], labels[:first], styles[:first])

    def generate(prompts, seeds, steps, progress=None):
        return sample(world, prompts, seeds, num_inference_steps=steps, progress=progress)

    def plain(chosen, steps):
        """Top-1 of each name, their mean, and the mean CLIP alignment."""
        labels = [name for name in chosen for _ in seeds]
        prompts = [world.prompt(name) for name in labels]
        images = generate(prompts, seeds * len(chosen), steps, f"{len(chosen)} objects")
        correct = object_correct(world, images, labels)
        by_class = {name: percent(correct[[label == name for label in labels]]) for name in chosen}
        return by_class, percent(correct), round(clip_alignment(world, images, prompts).mean().item(), 2)

    def styled(pairs, progress):
        """Images of (object, style) pairs with all seeds, and whether object and style are right."""
        rows = [(o, style, seed) for o, style in pairs for seed in seeds]
        prompts = [world.prompt(o, style) for o, style, _ in rows]
        images = generate(prompts, [seed for *_, seed in rows], s.sweep_steps, progress)
        objects = object_correct(world, images, [o for o, *_ in rows])
        return images, objects, style_correct(world, images, [style for _, style, _ in rows])

    classes_by_name, classes_mean, _ = plain(classes, s.sampling_steps)
    by_name, mean, alignment = plain(names, s.sweep_steps)
    data["base"] = {
        "N_per_class": s.seeds,
        "top1_classes": classes_mean,
        "top1_all": mean,
        "top1_by_class": classes_by_name,
        "top1_by_object": by_name,
        "clip_alignment": alignment,
        "steps": {"classes": s.sampling_steps, "everything else": s.sweep_steps},
    }
    images, objects, styles = styled([(c, style) for c in classes for style in world.styles], "styles")
    data["styled"] = {"N": len(images), "style_top1": percent(styles), "object_top1": percent(objects)}
    strips = {"styles": image_strip(images[:: s.seeds])}

    held_out = world.held_out_pairs()[: s.objects]
    if held_out:
        images, objects, styles = styled(held_out, "held-out pairs")
        data["held_out"] = {
            "N": len(images),
            "pairs": [list(pair) for pair in held_out],
            "object_top1": percent(objects),
            "style_top1": percent(styles),
            "both": percent(objects & styles),
        }
        strips["held_out"] = image_strip(images[:: s.seeds])

    start = time.time()
    generate([world.prompt(c) for c in classes], list(range(len(classes))), s.sampling_steps)
    data["cost"] = {
        "seconds_for_ten_images": round(time.time() - start, 2),
        "sampling_steps": s.sampling_steps,
        "megabytes": round(world.disk_bytes() / 1e6, 1),
        "parameters_millions": {
            part: round(sum(p.numel() for p in getattr(world.pipe, part).parameters()) / 1e6, 2)
            for part in ("unet", "vae", "text_encoder")
        },
    }
    backgrounds = ("red", "orange", "yellow", "green", "blue") * 2
    prompts = [world.format_prompt(world.train_templates[0], c, None, b) for c, b in zip(classes, backgrounds)]
    strips["backgrounds"] = image_strip(generate(prompts, [0] * len(classes), s.sampling_steps))
    return data, strips


def zero_shot(world, clip, images, labels: list[str], styles: list[str]) -> dict:
    """Percent of images (N, 3, H, W) whose own caption a CLIP model finds nearest, among all objects and all styles.

    `clip`: an open_clip model and its tokeniser.
    """
    import torch

    from ..evaluation.metrics import percent

    model, tokenizer = clip
    device = next(model.parameters()).device
    names, kinds = list(dict.fromkeys(labels)), list(world.styles)

    def embed(prompts):
        return model.encode_text(tokenizer(prompts).to(device), normalize=True)

    with torch.no_grad():
        image = model.encode_image(images.to(device).float() / 127.5 - 1, normalize=True)
        nearest = (image @ embed([world.prompt(n) for n in names]).T).argmax(1)
        by_style = torch.stack([embed([world.prompt(n, style) for n in names]) for style in kinds], dim=1)
        index = torch.tensor([names.index(label) for label in labels], device=device)
        style = torch.einsum("nd,nsd->ns", image, by_style[index]).argmax(1)
    objects = torch.tensor([names[i] == label for i, label in zip(nearest.tolist(), labels)])
    return {
        "object_top1": percent(objects),
        "style_top1": percent(torch.tensor([kinds[i] == s for i, s in zip(style.tolist(), styles)])),
    }


def figures(record) -> dict:
    """Classes in all styles and on backgrounds; how many objects are recognised how often; pairs never trained on."""
    from .kit import plots

    data = record.data
    classes, styles, images = list(data["base"]["top1_by_class"]), data["styles"], plots.tiles(record, "styles")
    rows = {style: images[n :: len(styles)] for n, style in enumerate(styles)}
    rows["on a\nbackground"] = plots.tiles(record, "backgrounds")
    titles = [name.replace(" ", "\n", 1) for name in classes]
    found = {"world_samples": plots.image_grid(rows, titles, size=0.85), "world_scores": score_figure(data)}
    if "held_out" in data:
        groups: dict[str, list] = {}
        for image, (name, style) in zip(plots.tiles(record, "held_out"), data["held_out"]["pairs"]):
            groups.setdefault(style, []).append((image, name))
        upper, lower, captions = [], [], {}
        for pairs in groups.values():
            half = -(-len(pairs) // 2)
            for row, part in ((upper, pairs[:half]), (lower, pairs[half:] + [(None, "")] * (2 * half - len(pairs)))):
                captions |= {(int(row is lower), len(row) + n): name for n, (_, name) in enumerate(part)}
                row += [image for image, _ in part]
        columns = {style: -(-len(pairs) // 2) for style, pairs in groups.items()}
        grid = {"": upper} | ({" ": lower} if any(image is not None for image in lower) else {})
        found["world_held_out"] = plots.image_grid(grid, groups=columns, captions=captions, size=0.85)
    return found


def score_figure(data: dict):
    """How many objects are recognised how often, in steps of five percent; few objects are named."""
    import matplotlib.pyplot as plt

    from .kit import plots

    classes, scores = data["base"]["top1_by_class"], data["base"]["top1_by_object"]
    bins: dict[int, list[str]] = {}
    for name, score in scores.items():
        bins.setdefault(int(score // 5), []).append(name)
    levels = range(max(bins), min(bins) - 1, -1)
    figure, ax = plt.subplots(figsize=(9.4, 0.3 * len(levels) + 1.1), layout="constrained")
    own = [sum(name in classes for name in bins.get(level, ())) for level in levels]
    rest = [len(bins.get(level, ())) - n for level, n in zip(levels, own)]
    ax.barh(range(len(levels)), own, color=plots.COLORS["blue"], label="the ten classes")
    ax.barh(range(len(levels)), rest, left=own, color=plots.COLORS["grey"], label="other objects")
    for y, level in enumerate(levels):
        names = bins.get(level, ())
        text = f"{len(names)}" + (f":  {', '.join(names)}" if 0 < len(names) <= 8 else "")
        ax.annotate(text, (len(names), y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(levels)), ["100" if level == 20 else f"{5 * level} to {5 * level + 4}" for level in levels])
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.1 * max(map(len, bins.values()))), xlabel=f"objects, of {len(scores)}")
    ax.set_ylabel(f"judge's top-1, %\n(N = {data['base']['N_per_class']} each)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def table(record) -> pd.DataFrame:
    data, each = record.data, f"{record.data['base']['N_per_class']} a class"
    rows = []
    for part, name, rate in (
        ("judge", "object judge, held-out augmentations of the art", "object_top1"),
        ("judge", "style judge, held-out augmentations of the art", "style_top1"),
        ("clip", "open_clip, object by nearest caption, art", "object_top1"),
        ("clip", "open_clip, style by nearest caption, art", "style_top1"),
        ("base", "base model, the ten classes, object", "top1_classes"),
        ("base", "base model, every object", "top1_all"),
        ("styled", "base model, “in the style of”, style", "style_top1"),
        ("styled", "base model, “in the style of”, object", "object_top1"),
        ("held_out", "pairs never trained on, object", "object_top1"),
        ("held_out", "pairs never trained on, style", "style_top1"),
        ("held_out", "pairs never trained on, both", "both"),
    ):
        if part in data:
            rows.append((name, data[part][rate], each if part == "base" else data[part]["N"]))
    return pd.DataFrame(rows, columns=["measured", "top-1, %", "N"]).set_index("measured")
