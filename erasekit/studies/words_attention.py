"""Of the study `words`, whose settings are `s`: whether attention to a thing's own word lies on the thing, and its figure."""

import numpy as np

SHOWN, SHOWN_PAIRS = 6, 4  # columns of the figure


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


def single_attention(world, names: list[str], s):
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


def pair_attention(world, names: list[str], s):
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
