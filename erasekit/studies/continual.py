"""10: concepts erased one after another, each step from the last public model."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "10_continual", 1, "images a class"
VERIFY = {"variants": ("uce", "kpop")}

# Variant -> the method, and whether stored keys are rehearsed while later concepts are erased.
VARIANTS = {"kpop": ("kpop", False), "kpop, rehearsed": ("kpop", True)}
VARIANTS |= {name: (name, False) for name in ("kpop-anchor", "esd-x", "uce", "spm")}


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = tuple(VARIANTS)
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"
    training_seeds: int = 1
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "smoke": Settings(("kpop, rehearsed", "uce"), seeds=1, key_seeds=1, sampling_steps=2, training_steps=1),
    "quick": Settings(("kpop", "kpop, rehearsed", "uce")),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """After each step, top-1 in percent of the concepts erased so far, of the others, and of erased concepts with their keys.

    Each concept gets its share of the training steps that all concepts together take when they are erased at once; that is
    measured too.
    """
    from tqdm.auto import tqdm

    from ..baselines import erase
    from ..evaluation.images import sample_images
    from ..evaluation.metrics import percent
    from ..evaluation.protocol import correct
    from ..kpop import kpop
    from .kit.cache import cached, settings_dict
    from .kit.erasures import make_config, operating_points, require_operating_points, train_cached

    points = s.operating_points or operating_points()
    require_operating_points(points, *(VARIANTS[variant][0] for variant in s.variants))
    concepts = list(world.concepts(s.split))
    kept = [c for c in world.concepts("classes") if c not in concepts]

    def top1(model, erasure, names, count, keys=None):
        """Top-1 by concept: of the public model in one batch, or with each concept's key."""
        rates = {}
        for group in [[c] for c in names] if keys else [names]:
            prompts = [(world.prompt(c), c, n) for c in group for n in range(count)]
            images = sample_images(model, erasure, prompts, s.sampling_steps, keys[group[0]] if keys else None)
            right = correct(world, images, [c for _, c, _ in prompts]).split(count)
            rates |= {c: percent(r) for c, r in zip(group, right)}
        return rates

    def state(model, erasure, erased, keys):
        """Rates of a public model."""
        waiting = [c for c in concepts if c not in erased]
        return {
            "erased": top1(model, erasure, erased, s.seeds),
            "waiting": top1(model, erasure, waiting, s.seeds) if waiting else {},
            "kept": top1(model, erasure, kept, s.seeds),
        } | ({"with the key": top1(model, erasure, erased, s.key_seeds, keys)} if keys else {})

    def sequence(method, rehearsed, config, scale):
        current, keys, states, adapters = world, {}, [], []
        for n, concept in enumerate(concepts):
            if method == "kpop":
                rehearse = dict(keys) if rehearsed and keys else None
                erasure = kpop(current, [concept], config, progress=False, rehearse=rehearse)
            else:
                erasure = erase(current, [concept], method, config, progress=False)
            erasure = erasure.scaled(current.pipe.unet, scale) if scale != 1 else erasure
            keys |= erasure.keys
            if erasure.adapters:  # SPM's are trained on the base, each on its own, and used together
                adapters.append(erasure)
                states.append(state(world, merge_adapters(adapters), concepts[: n + 1], keys))
            else:
                current = current.with_erasure(erasure)
                states.append(state(current, None, concepts[: n + 1], keys))
        return {"after": states}, None

    def at_once(method, config, scale):
        erasure, _ = train_cached(world, concepts, method, config, scale)
        return state(world, erasure, concepts, erasure.keys), None

    runs = []
    for seed, variant in tqdm(list(product(range(s.training_seeds), s.variants)), desc="continual"):
        method, rehearsed = VARIANTS[variant]
        point = points[method]
        scale = point["scale"]
        config = make_config(world, method, seed, s.sampling_steps, point["settings"], s.training_steps)
        short = {"steps": max(1, config.steps // len(concepts))} if hasattr(config, "steps") else {}
        sizes = settings_dict(config), scale, s.split, s.seeds, s.key_seeds, s.sampling_steps
        one = method, rehearsed, replace(config, **short), scale
        after, _ = cached("continual", VERSION, world, lambda one=one: sequence(*one), variant, *sizes)
        all_ = method, config, scale
        once, _ = cached("continual", VERSION, world, lambda all_=all_: at_once(*all_), "at once", method, *sizes)
        runs.append({"variant": variant, "method": method, "training_seed": seed, "at once": once} | after)
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": s.training_seeds}
    used = {run["method"]: points[run["method"]] for run in runs}
    return about | {"operating_points": used, "concepts": concepts, "kept": kept, "runs": runs}, {}


def merge_adapters(erasures: list):
    """SPM erasures of one base as one: their adapters side by side, each with its own concept."""
    import torch

    from ..artifacts import Erasure

    first, rules = erasures[0], [erasure.info["guidance"] for erasure in erasures]
    rule = rules[0] | {name: [x for r in rules for x in r[name]] for name in ("concepts", "texts")}
    tensors = {}
    for name in first.adapters:
        parts = [erasure.adapters[name] for erasure in erasures]
        tensors[name] = torch.cat(
            parts, dim=1 if name.endswith(".up") else 0
        )  # up (out, concepts), down (concepts, in)
    return Erasure({}, {}, first.info | {"guidance": rule, "concepts": rule["concepts"]}, tensors)


def mean_rates(record) -> dict[str, pd.DataFrame]:
    """By variant, means over training seeds. Rows: number of concepts erased, and last "at once"."""
    variants: dict[str, list] = {}
    for run in record.data["runs"]:
        rows = []
        for state in (*run["after"], run["at once"]):
            erased, kept, keyed = (list(state.get(part, {}).values()) for part in ("erased", "kept", "with the key"))
            row = {"erased so far": np.mean(erased), "just erased": erased[-1], "kept": np.mean(kept)}
            rows.append(row | ({"with the first key": keyed[0], "with their keys": np.mean(keyed)} if keyed else {}))
        rows[-1]["just erased"] = np.nan
        variants.setdefault(run["variant"], []).append(pd.DataFrame(rows, [*range(1, len(rows)), "at once"]))
    return {variant: sum(parts) / len(parts) for variant, parts in variants.items()}


def figures(record) -> dict:
    """A panel for each measure, a line for each variant; at the right, all concepts erased at once."""
    from .kit.plots import panels, percent_axis, style

    methods, variants = {run["variant"]: run["method"] for run in record.data["runs"]}, mean_rates(record)
    titles = {"erased so far": "concepts erased so far\n(lower is better)", "kept": "kept classes\n(higher is better)"}
    if any("with their keys" in rates for rates in variants.values()):
        titles["with their keys"] = "concepts erased so far, with their keys\n(higher is better)"
    count, (figure, axes) = len(record.data["concepts"]), panels(len(titles), columns=3, height=3)
    for ax, (measure, title) in zip(axes, titles.items()):
        for n, (variant, rates) in enumerate((v, r) for v, r in variants.items() if measure in r):
            rehearsed = VARIANTS[variant][1]
            look = style(methods[variant]) | ({"ls": "--", "mfc": "white"} if rehearsed else {})
            ax.plot(range(1, count + 1), rates[measure].iloc[:-1], label=variant, ms=6, **look)
            if not rehearsed:
                ax.plot(count + 0.75 + 0.17 * n, rates[measure].iloc[-1], ms=6, clip_on=False, **look)
        ax.axvline(count + 0.4, color="#cccccc", lw=0.8)
        ax.set_xticks([*range(1, count + 1), count + 1.2], [*range(1, count + 1), "all at\nonce"])
        ax.set_title(title)
    percent_axis(axes[0], "y", "images that show the concept")
    figure.supxlabel("concepts erased, one after another", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return {"continual": figure}


def table(record) -> pd.DataFrame:
    """Rates after the last step, and of all concepts erased at once."""
    rows = {}
    for variant, rates in mean_rates(record).items():
        rows[variant] = rates.iloc[-2]
        if not VARIANTS[variant][1]:
            rows[f"{variant}, all at once"] = rates.iloc[-1]
    frame = pd.DataFrame(rows).T.round(1)
    blank = frame.astype(object).where(frame.notna(), "")
    return blank.rename_axis(f"judge's top-1, %, after {len(record.data['concepts'])} concepts")
