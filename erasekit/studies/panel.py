"""The panel every method faces: one erasure, trained, drawn and judged, kept in the build folder so that long studies resume."""

import json
import time
from dataclasses import asdict

import torch
from PIL import Image

from ..attention import Prompt
from ..metrics import clip_alignment, features, fid, in_top, judged, kid, percent
from ..paths import BUILD
from ..processes import shares
from ..results import EARLIER, code_hash
from ..sampling import sample
from ..trajectories import ROLL
from .common import digest, strip


def cell(name: str, world, compute, module: str, *parts) -> tuple[dict, Image.Image | None]:
    """`compute()`'s numbers and strip of images, or those kept from an earlier run, whose seconds the record adds to its own.

    The name they are kept under holds `parts` (JSON-able), the world, and the code of `module` and the panel.
    """
    code = code_hash(module, __name__, type(world).__module__)
    path = BUILD / "cells" / name / f"{digest(world.version, world.precision, ROLL, code, parts)}.json"
    picture = path.with_suffix(".png")
    if path.exists():
        kept = json.loads(path.read_text())
        EARLIER.append(kept["seconds"])
        return kept["numbers"], Image.open(picture).copy() if picture.exists() else None
    began = time.time()
    numbers, image = compute()
    if shares()[0]:
        return numbers, image  # the first of several processes keeps it
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is not None:
        image.save(picture)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"numbers": numbers, "seconds": round(time.time() - began, 1)}))
    part.replace(path)
    return numbers, image


def drawn(
    world,
    erasure,
    asked: list[tuple[str, str, int]],
    steps: int,
    key: Prompt | None = None,
    guidance: float | None = None,
) -> torch.Tensor:
    """Images (N, 3, H, W) of (prompt, label, seed) triples by the public model, in the precision training runs in.

    With `key` attached, if there is one; `guidance` is its scale where that is not `sample`'s own.
    """
    prompts, _, seeds = zip(*asked)
    folder = None
    if world.keeps_images:
        code = code_hash("erasekit.sampling", type(world).__module__)
        parts = world.networks, erasure.digest() if erasure else "", steps, world.precision, code
        parts += ((key.digest(),) if key else ()) + ((guidance,) if guidance else ())
        folder = BUILD / "images" / digest(*parts)
    how = {"batch_size": world.batch, "autocast": world.autocast, "folder": folder}
    how |= {"guidance": guidance} if guidance else {}
    return sample(world.pipe, list(prompts), list(seeds), key, erasure=erasure, steps=steps, **how)


def hits(world, images: torch.Tensor, labels: list[str], k: int = 1) -> torch.Tensor:
    """Boolean (N,): the object judge's first k hold the label."""
    return in_top(judged(world, images)[0], world.judge.objects, labels, k)


def as_json(config) -> dict:
    """A method's settings as a record holds them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def rates(world, made, asked: list[tuple[str, str, int]], erased: int, steps: int) -> dict:
    """The rates of the first `erased` images asked for, and of the others, which are kept concepts."""
    images, labels = drawn(world, made, asked, steps), [label for _, label, _ in asked]
    first, five = hits(world, images, labels), hits(world, images, labels, 5)
    return {
        "ESR-1": percent(~first[:erased]),
        "ESR-5": percent(~five[:erased]),
        "PSR-1": percent(first[erased:]),
        "PSR-5": percent(five[erased:]),
    }


def questions(world, split: tuple[str, ...], seeds: int, few_seeds: int) -> dict[str, list[tuple[str, str, int]]]:
    """What is drawn for a split: part -> (prompt, label, seed) triples."""
    ten = world.concepts("classes")
    kept = [c for c in ten if c not in split]
    near = list(dict.fromkeys(n for c in split for n in world.neighbours[c]))

    def plain(names, count):
        return [(world.prompt(c), c, seed) for c in names for seed in range(count)]

    return {
        "erased": plain(split, seeds),
        "kept": plain(kept, seeds),
        "others": plain(world.bystanders("classes"), 1),
        "neighbours": plain(near, few_seeds),
    } | {
        form: [(world.wording(t, c, s, b), c, seed) for c in split for seed in range(few_seeds)]
        for form, (t, s, b) in world.forms.items()
    }


def judged_panel(world, made, split, seeds, few_seeds, sampling_steps):
    """Rates in percent for every question about a split, and one image of each of the ten classes, the erased first."""
    parts = questions(world, split, seeds, few_seeds)
    asked = [q for part in parts.values() for q in part]
    images, labels = drawn(world, made, asked, sampling_steps), [label for _, label, _ in asked]
    first, five = hits(world, images, labels), hits(world, images, labels, 5)
    where, start = {}, 0
    for name, part in parts.items():
        where[name] = slice(start, start := start + len(part))
    rates = {
        "ESR-1": percent(~first[where["erased"]]),
        "ESR-5": percent(~five[where["erased"]]),
        "PSR-1": percent(first[where["kept"]]),
        "PSR-5": percent(five[where["kept"]]),
        "others": percent(first[where["others"]]),
        "neighbours": percent(first[where["neighbours"]]),
        "forms": {name: percent(~first[where[name]]) for name in world.forms},
        "by_class": {
            c: percent(first[[label == c and n < where["kept"].stop for n, label in enumerate(labels)]])
            for c in dict.fromkeys(labels[: where["kept"].stop])
        },
    }
    return rates, strip(images[: where["kept"].stop : seeds])


def opened(world, made, concepts, seeds: int, steps: int, first_seed: int = 0) -> float:
    """Share of a concept's images that are it again when its own key is attached, in percent."""
    found = []
    for c in concepts:
        images = drawn(world, made, [(world.prompt(c), c, first_seed + n) for n in range(seeds)], steps, made.key(c))
        found.append(hits(world, images, [c] * seeds))
    return percent(torch.cat(found))


def kept_images(world, asked: list[tuple[str, str, int]], images: torch.Tensor) -> dict:
    """What the paper reports on COCO captions, on captions of everything kept.

    CLIP; FID and KID against real pictures, where the world has some; and top-1, where the captions name objects.
    """
    prompts, labels, _ = zip(*asked)
    found = {"CLIP": round(clip_alignment(world, images, list(prompts)).mean().item(), 2)}
    real = world.real(set(labels))
    if real is not None:
        ours, theirs = features(world, images), features(world, real)
        found |= {"FID": round(fid(ours, theirs), 3), "KID x 1000": round(1000 * kid(ours, theirs), 3)}
    if all(labels):
        found["top-1"] = percent(hits(world, images, list(labels)))
    return found | {"N": len(asked)}
