"""The evaluation protocol of the studies: prompts of a split, erasure and preservation rates, and recovery with the key.

ESR-k is the share of an erased class's images whose class is not among the judge's first k; PSR-k is the share of a kept
class's images whose class is. All rates are in percent.
"""

import torch
from PIL import Image
from torch import Tensor

from ..worlds.benchmark import Synonyms
from .images import image_strip, sample_images
from .metrics import clip_alignment, features, fid, in_top_k, judge_images, kid, object_correct, percent

Prompts = list[tuple[str, str, int]]  # (prompt, label, seed)
WORDS_A_CLASS = 3  # of its synonyms, seen and unseen, the first so many
SURE = 0.5  # probability above which the judge counts as telling what an image shows
REPLACED = ("still it", "another object", "nothing told")  # what a prompt of an erased class shows

correct = object_correct


def rates(world, erasure, prompts: Prompts, num_erased: int, steps: int) -> dict[str, float]:
    """ESR-1 and -5 over the first `num_erased` prompts, PSR-1 and -5 over the others, whose labels are kept."""
    top1, top5 = _top1_top5(world, sample_images(world, erasure, prompts, steps), prompts)
    return _esr_psr(top1, top5, slice(num_erased), slice(num_erased, None))


def eval_prompts(world, split: tuple[str, ...], seeds: int, few_seeds: int, other_seeds: int) -> dict[str, Prompts]:
    """The prompts of a split by part.

    "erased", "kept", "others", "neighbours", and one part for each of the eval templates; "synonyms seen", "synonyms unseen"
    and "hypernyms", labelled with the hypernym, where the world has such words of an erased class.
    """
    kept = [c for c in world.concepts("classes") if c not in split]
    neighbours = list(dict.fromkeys(n for c in split for n in world.neighbours[c]))
    hypernyms = list(dict.fromkeys(kind for c in split for kind in world.kinds(c)))

    def plain(names, count):
        return [(world.prompt(c), c, seed) for c in names for seed in range(count)]

    def synonyms(which):
        words = [(word, c) for c in split for word in getattr(world.synonyms(c), which)[:WORDS_A_CLASS]]
        return [(world.prompt(word), c, seed) for word, c in words for seed in range(few_seeds)]

    words = {f"synonyms {which}": synonyms(which) for which in Synonyms._fields}
    words["hypernyms"] = plain(hypernyms, seeds)  # as many images as of a class: they are few words
    return (
        {
            "erased": plain(split, seeds),
            "kept": plain(kept, seeds),
            "others": plain(world.unseen_classes("classes"), other_seeds),
            "neighbours": plain(neighbours, few_seeds),
        }
        | {
            name: [(world.format_prompt(*(template, c, *rest)), c, seed) for c in split for seed in range(few_seeds)]
            for name, (template, *rest) in world.eval_templates.items()
        }
        | {name: prompts for name, prompts in words.items() if prompts}
    )


def evaluate_split(
    world, erasure, split: tuple[str, ...], seeds: int, few_seeds: int, other_seeds: int, steps: int
) -> tuple[dict, Image.Image]:
    """Rates of every part of a split, and one image of each of the ten classes, the erased ones first.

    "replaced": what the erased prompts show. "others_found": of each other object, how many images show it.
    """
    parts = eval_prompts(world, split, seeds, few_seeds, other_seeds)
    prompts = [p for part in parts.values() for p in part]
    images = sample_images(world, erasure, prompts, steps)
    probabilities, objects = judge_images(world, images)[0], world.judge.objects
    labels, (best, index) = [label for _, label, _ in prompts], probabilities.max(1)
    shown = [objects[n] for n in index.tolist()]
    top1 = torch.tensor([name == label for name, label in zip(shown, labels)])
    where, start = {}, 0
    for name, part in parts.items():
        where[name] = slice(start, start := start + len(part))
    classes = labels[: where["kept"].stop]
    top5 = in_top_k(probabilities[: len(classes)], objects, classes, 5)
    by_class = {c: top1[: len(classes)][[label == c for label in classes]] for c in dict.fromkeys(classes)}
    still, others = top1[where["erased"]], top1[where["others"]]
    another = ~still & (best[where["erased"]] > SURE)
    found = _esr_psr(top1[: len(classes)], top5, where["erased"], where["kept"]) | {
        "others": percent(others),
        "neighbours": percent(top1[where["neighbours"]]),
        "templates": {name: percent(~top1[where[name]]) for name in world.eval_templates},
        "by_class": {c: percent(found) for c, found in by_class.items()},
        "others_found": others.view(len(others) // other_seeds, other_seeds).sum(1).tolist(),
        "replaced": dict(zip(REPLACED, map(percent, (still, another, ~still & ~another)))),
    }
    found |= {name: percent(~top1[where[name]]) for name in where if name.startswith("synonyms")}
    if "hypernyms" in where:
        pairs = list(zip(shown, labels))[where["hypernyms"]]
        member = torch.tensor([name in world.concepts(kind) for name, kind in pairs])
        erased = torch.tensor([name in split for name, _ in pairs])
        found["hypernyms"] = {"a member": percent(member), "an erased class": percent(erased)}
    return found, image_strip(images[: len(classes) : seeds])


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
