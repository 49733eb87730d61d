"""The evaluation protocol of the studies: prompts of a split, erasure and preservation rates, and recovery with the key.

ESR-k is the share of an erased class's images whose class is not among the judge's first k; PSR-k is the share of a kept
class's images whose class is. All rates are in percent.
"""

import torch
from PIL import Image
from torch import Tensor

from .images import image_strip, sample_images
from .metrics import clip_alignment, features, fid, in_top_k, judge_images, kid, object_correct, percent

Prompts = list[tuple[str, str, int]]  # (prompt, label, seed)

correct = object_correct


def rates(world, erasure, prompts: Prompts, num_erased: int, steps: int) -> dict[str, float]:
    """ESR-1 and -5 over the first `num_erased` prompts, PSR-1 and -5 over the others, whose labels are kept."""
    top1, top5 = _top1_top5(world, sample_images(world, erasure, prompts, steps), prompts)
    return _esr_psr(top1, top5, slice(num_erased), slice(num_erased, None))


def eval_prompts(world, split: tuple[str, ...], seeds: int, few_seeds: int) -> dict[str, Prompts]:
    """The prompts of a split by part: "erased", "kept", "others", "neighbours", and one part for each of the eval templates."""
    kept = [c for c in world.concepts("classes") if c not in split]
    neighbours = list(dict.fromkeys(n for c in split for n in world.neighbours[c]))

    def plain(names, count):
        return [(world.prompt(c), c, seed) for c in names for seed in range(count)]

    return {
        "erased": plain(split, seeds),
        "kept": plain(kept, seeds),
        "others": plain(world.unseen_classes("classes"), 1),
        "neighbours": plain(neighbours, few_seeds),
    } | {
        name: [(world.format_prompt(*(template, c, *rest)), c, seed) for c in split for seed in range(few_seeds)]
        for name, (template, *rest) in world.eval_templates.items()
    }


def evaluate_split(
    world, erasure, split: tuple[str, ...], seeds: int, few_seeds: int, steps: int
) -> tuple[dict, Image.Image]:
    """Rates of every part of a split, and one image of each of the ten classes, the erased ones first."""
    parts = eval_prompts(world, split, seeds, few_seeds)
    prompts = [p for part in parts.values() for p in part]
    images = sample_images(world, erasure, prompts, steps)
    top1, top5 = _top1_top5(world, images, prompts)
    where, start = {}, 0
    for name, part in parts.items():
        where[name] = slice(start, start := start + len(part))
    classes = [label for _, label, _ in prompts[: where["kept"].stop]]
    by_class = {c: top1[: len(classes)][[label == c for label in classes]] for c in dict.fromkeys(classes)}
    return _esr_psr(top1, top5, where["erased"], where["kept"]) | {
        "others": percent(top1[where["others"]]),
        "neighbours": percent(top1[where["neighbours"]]),
        "templates": {name: percent(~top1[where[name]]) for name in world.eval_templates},
        "by_class": {c: percent(found) for c, found in by_class.items()},
    }, image_strip(images[: len(classes) : seeds])


def recovery_rate(world, erasure, concepts, seeds: int, steps: int, first_seed: int = 0) -> float:
    """Share of images that show the concept when its own key is attached, over all the concepts."""
    found = []
    for c in concepts:
        prompts = [(world.prompt(c), c, first_seed + n) for n in range(seeds)]
        found.append(correct(world, sample_images(world, erasure, prompts, steps, erasure.key(c)), [c] * seeds))
    return percent(torch.cat(found))


def neutral_image_metrics(world, prompts: Prompts, images: Tensor) -> dict:
    """Quality of images of everything that is kept, as the paper reports it on COCO captions.

    CLIP alignment; FID and KID against reference images, where the world has some; top-1, where the labels name objects.
    """
    texts, labels, _ = map(list, zip(*prompts))
    metrics = {"CLIP": round(clip_alignment(world, images, texts).mean().item(), 2)}
    reference = world.reference_images(set(labels))
    if reference is not None:
        ours, theirs = features(world, images), features(world, reference)
        metrics |= {"FID": round(fid(ours, theirs), 3), "KID x 1000": round(1000 * kid(ours, theirs), 3)}
    if all(labels):
        metrics["top-1"] = percent(correct(world, images, labels))
    return metrics | {"N": len(prompts)}


def _top1_top5(world, images: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Boolean (N,), twice: the label is the object judge's first choice, or one of its first five."""
    probabilities, labels = judge_images(world, images)[0], [label for _, label, _ in prompts]
    return tuple(in_top_k(probabilities, world.judge.objects, labels, k) for k in (1, 5))


def _esr_psr(top1: Tensor, top5: Tensor, erased: slice, kept: slice) -> dict[str, float]:
    return {
        "ESR-1": percent(~top1[erased]),
        "ESR-5": percent(~top5[erased]),
        "PSR-1": percent(top1[kept]),
        "PSR-5": percent(top5[kept]),
    }
