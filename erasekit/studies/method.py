"""02: the mechanism on one layer, the losses of both stages, and what the prompt has captured."""

import torch

from ..attention import augment
from ..kpop import kpop
from ..metrics import object_rate, percent
from ..sampling import ddim, decode, initial_noise, sample
from ..text import encode, predict, said
from .common import erasure, rounded, strip
from .strength import configured

QUICK = {
    "concept": "church",
    "texts": ["a picture of a church", "a picture of a dog", "a picture of a fish", ""],
    "seeds": 20,
    "steps": 150,
    "batch": 8,
    "sampling_steps": 25,
    "layer": "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
}
SCALES = {
    "smoke": QUICK | {"seeds": 1, "steps": 2, "batch": 2, "sampling_steps": 3},
    "quick": QUICK,
    "full": QUICK | {"seeds": 50},
}


def compute(world, concept, texts, seeds, steps, batch, sampling_steps, layer):
    """Attention with and without the key, the training's losses, and the key under other texts."""
    world.check([concept])
    config = configured(world, "kpop", 0, sampling_steps, {"steps": steps, "batch": batch})
    made, _ = erasure(world, [concept], config, kpop)
    key, unet = made.key(concept), world.pipe.unet
    words = world.pipe.tokenizer.tokenize(world.prompt(concept))
    word = 1 + words.index(world.pipe.tokenizer.tokenize(concept)[-1])

    ways = {"base": (False, None), "hidden": (True, None), "with the key": (True, key)}
    maps, mass, pictures = {}, {}, []
    for name, (apply, prompt) in ways.items():
        if apply:
            made.apply(unet)
        try:
            maps[name], mass[name], picture = watch(world, concept, prompt, sampling_steps, layer, word)
        finally:
            if apply:
                made.remove(unet)
        pictures.append(picture)

    count = list(range(seeds))
    captured, shown = {}, []
    with made.applied(unet):
        for text in texts:
            images = sample(world.pipe, [text] * seeds, count, key=key, progress=f"key, {text!r}", steps=sampling_steps)
            captured[text] = percent(object_rate(world, images, [concept] * seeds))
            shown.append(images[:4])
    data = {
        "concept": concept,
        "N": seeds,
        "seeds": [0, seeds - 1],
        "reading": config.reading,
        "m": config.m,
        "history": {name: rounded(h[name] for h in made.info["history"]) for name in made.info["history"][0]},
        "layer": layer,
        "word": words[word - 1].removesuffix("</w>"),
        "maps": maps,
        "mass": mass,
        "captured": captured,
    }
    return data, {"watched": strip(torch.cat(pictures)), "captured": strip(torch.cat(shown))}


def watch(world, concept, prompt, steps, layer, word):
    """One image with attention recorded on the conditional half.

    Returns, averaged over steps and heads: the layer's maps (rows of pixels) of the concept's word and of the prompt's
    tokens together; each layer's mass on start token, other text tokens and prompt; and the image (1, 3, H, W).
    """
    c, null = encode(world.pipe, [world.prompt(concept)]), encode(world.pipe, [""])
    text = said(world.pipe.unet, c).shape[1]
    seen: dict[str, list[torch.Tensor]] = {}

    with augment(world.pipe.unet) as slot:

        def guide(latents, t, step):
            eps_null = predict(world.pipe.unet, latents, t, null)
            with slot.holding(prompt), slot.watching() as weights:
                eps = predict(world.pipe.unet, latents, t, c)
                for name, w in weights.items():
                    seen.setdefault(name, []).append(w[0].mean(0).cpu())  # (pixels, tokens + m)
            return eps_null + 5.0 * (eps - eps_null)

        image = decode(world.pipe, ddim(world.pipe, guide, initial_noise(world.pipe, [0]), steps))
    mean = {name: torch.stack(w).mean(0) for name, w in seen.items()}
    side = int(len(mean[layer]) ** 0.5)
    maps = {
        "word": [rounded(row) for row in mean[layer][:, word].reshape(side, side)],
        "prompt": [rounded(row) for row in mean[layer][:, text:].sum(1).reshape(side, side)],
    }
    mass = {
        name.replace(".transformer_blocks.0.attn2", "").replace("attentions.", ""): {
            "start token": round(w[:, 0].mean().item(), 4),
            "text": round(w[:, 1:text].sum(1).mean().item(), 4),
            "prompt": round(w[:, text:].sum(1).mean().item(), 4),
        }
        for name, w in mean.items()
    }
    return maps, mass, image
