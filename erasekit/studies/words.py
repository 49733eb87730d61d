"""01: does the model read words? Where a word stands, where attention looks, and what words of no caption draw.

How well the model draws its objects, styles and held-out pairs is in the study `world`.
"""

from dataclasses import dataclass

import pandas as pd

from .words_attention import attention_figure, pair_attention, single_attention

NOTEBOOK, VERSION, UNIT = "01_world", 1, "images a word"

CLOSE = 0.3  # of the norm: two words nearer than this are hardly told apart
NONSENSE = ("blorfin", "quimble", "zaxter", "frondle")
SHOWN_WORDS = 36  # unseen words in their figure
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
