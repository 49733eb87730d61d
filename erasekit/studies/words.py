"""01: does the model read words? Where a word stands, where attention looks, and what words of no caption draw.

How well the model draws its objects, styles and held-out pairs is in the study `world`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "01_world", 1, "images a word"

CLOSE = 0.3  # of the norm: two words nearer than this are hardly told apart
NONSENSE = ("blorfin", "quimble", "zaxter", "frondle")
SHOWN, SHOWN_PAIRS, SHOWN_WORDS = 6, 4, 36  # columns of the figure of attention, and unseen words in theirs
# What a world that reads words should reach: of a rate or an area the least, of the others the most.
BARS = {"closer": 0, "auc": 0.75, "below half": 10, "pair auc": 0.75, "both": 60, "top-1": 50, "top-5": 70, "l1": 0.03}


@dataclass(frozen=True)
class Settings:
    seeds: int = 4  # of each word
    samples: int = 12  # objects that are drawn in every style
    objects: int = 40  # whose attention is read
    pairs: int = 100  # of two things in a picture
    unseen: int = 1000  # words of no caption, at most
    sampling_steps: int = 25
    vae_images: int = 2000  # at most


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=2, objects=20, pairs=40),
    "smoke": Settings(seeds=1, samples=2, objects=3, pairs=2, unseen=4, sampling_steps=2, vae_images=16),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Every measure with its N. What a world does not have, pairs or test images, is left out."""
    import torch

    from ..evaluation.images import image_strip
    from ..evaluation.metrics import object_correct, percent, style_correct
    from ..sampling import sample

    names = [name for name in world.concepts("all") if name in world.judge.objects]
    classes, strips = list(world.concepts("classes")), {}
    data = {"N": s.seeds, "seeds": [0, s.seeds - 1], "styles": list(world.styles), "own token": own_tokens(world)}

    def generate(rows, progress):
        """Images of (prompt, seed) pairs."""
        prompts, seeds = map(list, zip(*rows))
        return sample(world, prompts, seeds, num_inference_steps=s.sampling_steps, progress=progress)

    grid = [name for name in names if name not in classes][:: max(1, len(names) // s.samples)][: s.samples]
    rows = [(name, style) for style in world.styles for name in grid]
    images = generate([(world.prompt(*row), 0) for row in rows], "objects in styles")
    data["styled"] = {
        "N": len(rows),
        "objects": grid,
        "object_top1": percent(object_correct(world, images, [name for name, _ in rows])),
        "style_top1": percent(style_correct(world, images, [style for _, style in rows])),
    }
    strips["samples"] = image_strip(images)

    some = names[:: max(1, len(names) // s.objects)][: s.objects]
    data["attention"], shown = single_attention(world, some, s)
    if world.pair_prompt(*classes[:2]):
        data["pairs"], pictures = pair_attention(world, names, s)
        shown = torch.cat([shown, pictures])
    strips["attention"] = image_strip(shown)

    if asked := unseen_pairs(world)[: s.unseen]:
        images = generate([(world.prompt(w), seed) for w, _ in asked for seed in range(s.seeds)], "unseen words")
        data["unseen"] = judge_unseen(world, images, asked, s.seeds)
        strips["unseen"] = image_strip(images[:: s.seeds])

    rows = [(name, word) for name in classes for word in NONSENSE[: s.seeds]]
    images = generate([(world.prompt(f"{word} {name}"), seed) for seed, (name, word) in enumerate(rows)], "nonsense")
    data["nonsense"] = {"N": len(rows), "top-1": percent(object_correct(world, images, [name for name, _ in rows]))}

    images, _, styles, first = world.test_images(1)
    if first:
        data["vae"] = reconstruction(world, images[:first][: s.vae_images], styles[:first][: s.vae_images])
    return data, strips


def own_tokens(world) -> dict:
    """How far the text encoder's outputs at objects' own tokens are apart, as a share of their norm, and what is nearest.

    Objects of one token, each in its prompt.
    """
    import torch

    from ..baselines.masks import concept_positions
    from ..conditioning import encode, token_ids

    pipe, names = world.pipe, [name for name in world.concepts("all") if len(token_ids(world.pipe, name)) == 3]
    tokens = encode(pipe, [world.prompt(name) for name in names]).tokens.float().cpu()
    where = [concept_positions(pipe, world.prompt(name), name)[0] for name in names]
    own = tokens[torch.arange(len(names)), where]
    distance = (torch.cdist(own, own) / own.norm(dim=1).mean()).fill_diagonal_(torch.inf)
    least = distance.min(1).values
    chosen = [name for name in (*world.concepts("classes"), *world.concepts("retained")) if name in names][:10]
    return {
        "objects": len(names),
        "median": round(least.median().item(), 3),
        "smallest": round(least.min().item(), 3),
        "closer": [name for name, d in zip(names, least.tolist()) if d < CLOSE],
        "neighbours": {
            name: [names[n] for n in distance[names.index(name)].topk(min(3, len(names) - 1), largest=False).indices]
            for name in chosen
        },
    }


def sample_with_attention(world, prompts: list[str], words: list[tuple], seeds: list[int], steps: int):
    """Images (N, 3, H, W), uint8, and the attention (N, words, side, side) to the own tokens of each prompt's `words`.

    Attention on the conditional half of guidance, averaged over heads, steps and the layers whose maps are not coarser than a
    quarter of the latents, at the latents' size.
    """
    import torch
    from torch.nn.functional import interpolate

    from ..attention import augment
    from ..baselines.masks import concept_positions
    from ..conditioning import encode, predict_noise
    from ..sampling import decode, denoise, initial_noise

    pipe, unet = world.pipe, world.pipe.unet
    size = unet.config.sample_size
    images, found = [], []
    for start in range(0, len(seeds), batch := 16 if size <= 32 else 2):
        part = slice(start, start + batch)
        where = [[concept_positions(pipe, p, w) for w in own] for p, own in zip(prompts[part], words[part])]
        cond, null = encode(pipe, prompts[part]), encode(pipe, [""] * len(prompts[part]))
        maps = []

        def guide(latents, t, step, where=where, cond=cond, null=null, maps=maps):
            eps_null = predict_noise(unet, latents, t, null)
            with state.record() as recorded:
                eps = predict_noise(unet, latents, t, cond)
            for probabilities in recorded.values():  # (B, heads, pixels, tokens)
                mean = probabilities.float().mean(1)
                side = int(mean.shape[1] ** 0.5)
                if 4 * side >= size:
                    own = torch.stack([torch.stack([m[:, at].mean(1) for at in each]) for m, each in zip(mean, where)])
                    own = own.unflatten(-1, (side, side)).cpu()
                    maps.append(interpolate(own, (size, size), mode="bilinear", align_corners=False))
            return eps_null + 5.0 * (eps - eps_null)

        with torch.no_grad(), augment(unet) as state:
            about = initial_noise(pipe, seeds[part]), steps, prompts[part], world.sampler
            images.append(decode(pipe, denoise(pipe, guide, *about)))
        found.append(torch.stack(maps).mean(0))
    return torch.cat(images), torch.cat(found)


def single_attention(world, names: list[str], s: Settings):
    """Whether attention to an object's own tokens ranks its pixels above the white ground: areas under the ROC.

    Returns the measures, with maps of the first objects, and their images.
    """
    from ..evaluation.metrics import roc_auc

    labels, seeds = [n for n in names for _ in range(s.seeds)], list(range(s.seeds)) * len(names)
    prompts = [world.prompt(name) for name in labels]
    images, maps = sample_with_attention(world, prompts, [(n,) for n in labels], seeds, s.sampling_steps)
    maps = maps[:, 0]
    ink = object_pixels(images, maps.shape[-1])
    areas = [roc_auc(m.flatten().tolist(), i.flatten().tolist()) for m, i in zip(maps, ink)]
    first = slice(0, SHOWN * s.seeds, s.seeds)
    return {"shown": names[:SHOWN], "maps": rounded_maps(maps[first])} | summary(areas), images[first]


def object_pixels(images, side: int):
    """Whether each pixel of maps (N, side, side) over images (N, 3, H, W), uint8, is of the object, not of the white ground."""
    from torch.nn.functional import adaptive_avg_pool2d

    dark = (images.amin(1, keepdim=True) < 230).float()
    return adaptive_avg_pool2d(dark, side)[:, 0] > 0.5


def pair_attention(world, names: list[str], s: Settings):
    """Two things in a picture: whether each word's attention ranks its own half above the other, and whether both are drawn."""
    import torch

    from ..checkpoints import seeded
    from ..evaluation.metrics import object_correct, percent, roc_auc

    order = torch.randperm(len(names), generator=seeded("two things")).tolist()
    pairs = [(names[a], names[b]) for a, b in zip(order[: s.pairs], order[s.pairs : 2 * s.pairs])]
    prompts = [world.pair_prompt(*pair) for pair in pairs]
    images, maps = sample_with_attention(world, prompts, pairs, list(range(len(pairs))), s.sampling_steps)
    left = torch.arange(maps.shape[-1]) < maps.shape[-1] // 2
    left = left.expand(maps.shape[-1], -1).flatten().tolist()
    own = [left, [not x for x in left]]
    areas = [roc_auc(m.flatten().tolist(), half) for pair in maps for m, half in zip(pair, own)]
    right = [object_correct(world, half, list(of)) for half, of in zip(world.halves(images), zip(*pairs))]
    shown = {
        "shown": [list(pair) for pair in pairs[:SHOWN_PAIRS]],
        "maps": [rounded_maps(m) for m in maps[:SHOWN_PAIRS]],
    }
    rates = {"both": percent(right[0] & right[1]), "one": percent(torch.cat(right))}
    return shown | rates | summary(areas), images[:SHOWN_PAIRS]


def summary(areas: list[float]) -> dict:
    """N, mean and share below a half, in percent, of areas under the ROC; images of one kind of pixel alone have none."""
    areas = np.array([a for a in areas if not np.isnan(a)])
    if not len(areas):
        return {"N": 0, "auc": 0.0, "below half": 100.0}
    return {
        "N": len(areas),
        "auc": round(float(areas.mean()), 3),
        "below half": round(100 * float((areas < 0.5).mean()), 1),
    }


def rounded_maps(maps) -> list:
    """Attention maps (N, side, side) as a record keeps them, each divided by its largest value."""
    return (maps / maps.amax((1, 2), keepdim=True)).mul(1000).round().div(1000).tolist()


def unseen_pairs(world) -> list[tuple[str, str]]:
    """(word, object) pairs whose word stands in no caption of the bundled world, of the objects that this world has."""
    from ..worlds.emojinette.words import UNSEEN

    return [(w, name) for name, words in UNSEEN.items() if name in world.judge.objects for w in words]


def judge_unseen(world, images, asked: list[tuple[str, str]], seeds: int) -> dict:
    """Top-1 and top-5 over all words, and over those that are one token; for each word what the judge sees first."""
    import torch

    from ..conditioning import token_ids
    from ..evaluation.metrics import in_top_k, judge_images, percent

    probabilities, objects = judge_images(world, images)[0], world.judge.objects
    labels = [name for _, name in asked for _ in range(seeds)]
    right = {k: in_top_k(probabilities, objects, labels, k) for k in (1, 5)}
    whole = torch.tensor([len(token_ids(world.pipe, word)) == 3 for word, _ in asked for _ in range(seeds)])
    first = [objects[n] for n in probabilities.argmax(1).tolist()]
    rates = {f"top-{k}": percent(found) for k, found in right.items()}
    if whole.any():
        rates |= {f"whole top-{k}": percent(found[whole]) for k, found in right.items()}
    rows = {
        w: {"object": name, "top-1": percent(r), "seen": seen}
        for (w, name), r, seen in zip(asked, right[1].split(seeds), first[::seeds])
    }
    return {"N": len(asked), "whole": int(whole.sum()) // seeds} | rates | {"words": rows}


def reconstruction(world, images, styles: list[str]) -> dict:
    """Mean absolute error, in [-1, 1], of test images (N, 3, H, W), uint8, through the VAE."""
    import torch

    vae, errors = world.pipe.vae, []
    with torch.no_grad():
        for chunk in images.split(32):
            x = chunk.to(vae.device, vae.dtype) / 127.5 - 1
            errors.append(
                (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).abs().mean((1, 2, 3)).cpu()
            )
    errors = torch.cat(errors).float()
    by_style = {s: round(errors[[own == s for own in styles]].mean().item(), 4) for s in dict.fromkeys(styles)}
    return {"N": len(errors), "l1": round(errors.mean().item(), 4), "by style": by_style}


def figures(record) -> dict:
    """Objects in all styles; words of no caption, and what the judge sees; attention over images."""
    from .kit import plots

    data, found = record.data, {}
    objects, images = data["styled"]["objects"], plots.tiles(record, "samples")
    rows = {style: images[n * len(objects) : (n + 1) * len(objects)] for n, style in enumerate(data["styles"])}
    found["words_samples"] = plots.image_grid(rows, [name.replace(" ", "\n", 1) for name in objects], size=0.75)
    if "unseen" in data:
        found["words_unseen"] = unseen_figure(record)
    found["words_attention"] = attention_figure(record)
    return found


def unseen_figure(record, columns: int = 12):
    """The first words' first images; below, the word and what the judge sees. Outlined: not the object meant."""
    from .kit import plots

    words, images = record.data["unseen"]["words"], plots.tiles(record, "unseen")
    rows, captions, outlined = {}, {}, []
    for n, ((word, about), image) in enumerate([*zip(words.items(), images)][:SHOWN_WORDS]):
        row, column = divmod(n, columns)
        rows.setdefault(" " * (row + 1), []).append(image)
        captions[row, column] = f"{word}:\n{about['seen'].replace(' ', chr(10), 1)}"
        outlined += [(row, column)] if about["seen"] != about["object"] else []
    return plots.image_grid(rows, captions=captions, outlined=outlined, size=0.75)


def attention_figure(record):
    """Images, and the attention to each thing's word laid over them; below a map, its area under the ROC.

    Of one thing, over its pixels against the ground; of two, over the word's half against the other.
    """
    import matplotlib.pyplot as plt

    from .kit import plots

    data, images, singles = record.data, plots.tiles(record, "attention"), record.data["attention"]["shown"]
    rows = {
        "image": images,
        "attention to\nthe word": [overlay(i, m) for i, m in zip(images, data["attention"]["maps"])],
    }
    titles, groups = [name.replace(" ", "\n", 1) for name in singles], {"one thing": len(singles)}
    if "pairs" in data:
        both = [[overlay(i, m) for m in maps] for i, maps in zip(images[len(singles) :], data["pairs"]["maps"])]
        rows["attention to\nthe word"] += [left for left, _ in both]
        rows["to the\nright word"] = [None] * len(singles) + [right for _, right in both]
        titles += ["\n".join(pair) for pair in data["pairs"]["shown"]]
        groups["two things"] = len(both)
    captions = {(row, column): f"{area:.2f}" for (row, column), area in shown_areas(record).items()}
    figure = plots.image_grid(rows, titles, groups=groups, captions=captions, size=0.9)
    colors = plt.cm.ScalarMappable(plt.Normalize(0, 1), "viridis")
    bar = figure.colorbar(colors, cax=figure.add_axes((1.015, 0.12, 0.012, 0.5)), ticks=[0, 1])
    bar.ax.set_yticklabels(["least", "most"], fontsize=7)
    bar.set_label("attention, in each map", fontsize=8)
    figure.text(0.5, -0.01, "below a map: area under ROC, 0.5 is chance", ha="center", va="top", fontsize=8)
    return figure


def shown_areas(record) -> dict[tuple[int, int], float]:
    """(row, column) of the figure of attention -> the map's area under the ROC, measured as in `compute`."""
    import torch

    from ..evaluation.metrics import roc_auc
    from .kit import plots

    data, found = record.data, {}
    images = torch.from_numpy(np.stack(plots.tiles(record, "attention"))).permute(0, 3, 1, 2)
    maps = np.array(data["attention"]["maps"])
    for column, (values, own) in enumerate(zip(maps, object_pixels(images[: len(maps)], maps.shape[-1]))):
        found[1, column] = roc_auc(values.flatten().tolist(), own.flatten().tolist())
    for n, pair in enumerate(np.array(data["pairs"]["maps"]) if "pairs" in data else []):
        left = np.broadcast_to(np.arange(pair.shape[-1]) < pair.shape[-1] // 2, pair[0].shape).flatten()
        for row, (values, half) in enumerate(zip(pair, (left, ~left)), 1):
            found[row, len(maps) + n] = roc_auc(values.flatten().tolist(), half.tolist())
    return found


def overlay(image: np.ndarray, values: list) -> np.ndarray:
    """A map in colours, from its least to its largest value, over a grey image (H, W, 3), uint8."""
    import matplotlib
    from PIL import Image

    grey = image.mean(2, keepdims=True) / 255
    small = Image.fromarray(np.array(values, dtype=np.float32))
    large = np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    large = (large - large.min()) / max(np.ptp(large), 1e-9)
    colors = matplotlib.colormaps["viridis"](large)[..., :3]
    return (255 * (0.4 * grey + 0.6 * colors)).astype(np.uint8)


def table(record) -> pd.DataFrame:
    """What was measured, the bar that it should pass, and N."""
    data, rows = record.data, []
    own = data["own token"]
    rows.append(("distance to the nearest other word, median, of the norm", own["median"], "", own["objects"]))
    rows.append((f"words closer than {CLOSE} to another", len(own["closer"]), "closer", own["objects"]))
    for part, name, key, bar in (
        ("attention", "attention to the word, area under ROC over its object", "auc", "auc"),
        ("attention", "images where it is below 0.5, %", "below half", "below half"),
        ("pairs", "two things: attention to a word, area under ROC over its half", "auc", "pair auc"),
        ("pairs", "two things: both drawn, %", "both", "both"),
        ("unseen", "words of no caption, top-1, %", "top-1", "top-1"),
        ("unseen", "words of no caption, top-5, %", "top-5", "top-5"),
        ("styled", "object in a style, object top-1, %", "object_top1", ""),
        ("styled", "object in a style, style top-1, %", "style_top1", ""),
        ("nonsense", "object beside a nonsense word, top-1, %", "top-1", ""),
        ("vae", "VAE, mean absolute error in [-1, 1]", "l1", "l1"),
    ):
        if part in data:
            rows.append((name, data[part][key], bar, data[part]["N"]))
    frame = pd.DataFrame(rows, columns=["measured", "value", "bar", "N"]).set_index("measured")
    return frame.assign(
        bar=[f"{BARS[bar]:g}" if bar else "" for bar in frame["bar"]], value=[f"{v:g}" for v in frame["value"]]
    )
