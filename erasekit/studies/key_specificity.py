"""00: which keys bring an erased concept back, and what the public model still generates of the other classes."""

from dataclasses import dataclass

import pandas as pd

NOTEBOOK, VERSION, UNIT = "00_quickstart", 1, "images a class"


@dataclass(frozen=True)
class Settings:
    concept: str = "church"
    other: str = "dog"  # the concept of the wrong key
    seeds: int = 50
    training_steps: int = 150
    batch_size: int = 8
    training_seeds: int = 1
    sampling_steps: int = 15


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=20),
    "smoke": Settings(seeds=1, training_steps=2, batch_size=2, training_seeds=1, sampling_steps=2),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Top-1 of the object judge, in percent: of the concept with each key, and of the classes that are kept."""
    import torch

    from ..checkpoints import seeded
    from ..evaluation.attacks import random_key
    from ..evaluation.metrics import object_correct, percent
    from ..kpop import kpop
    from ..sampling import sample
    from .kit.erasures import make_config, saved_erasure

    world.check_concepts([s.concept, s.other])
    kept = [c for c in world.concepts("classes") if c != s.concept]
    parameters = dict(world.pipe.unet.named_parameters())

    def top1(name, names, **options):
        labels = [c for c in names for _ in range(s.seeds)]
        seeds, batch_size = list(range(s.seeds)) * len(names), min(50, world.batch_size)
        options |= {"num_inference_steps": s.sampling_steps, "batch_size": batch_size, "progress": name}
        correct = object_correct(world, sample(world, list(map(world.prompt, labels)), seeds, **options), labels)
        return {c: percent(correct[[label == c for label in labels]]) for c in names}

    base, runs = top1("base", [s.concept, *kept]), []
    for seed in range(s.training_seeds):
        changes = {"steps": s.training_steps, "batch_size": s.batch_size}
        config = make_config(world, "kpop", seed, s.sampling_steps, changes)
        erasure, seconds = saved_erasure(world, [s.concept], config, kpop)
        wrong, _ = saved_erasure(world, [s.other], config, kpop)
        key = erasure.key(s.concept)
        keys = {
            "with the key": (key, "conditional"),
            "with the key on both halves": (key, "both"),
            f"with the key of {s.other}": (wrong.key(s.other), "conditional"),
            "with a random key": (random_key(key, seeded("random key", seed)), "conditional"),
        }
        erased = top1("erased", [s.concept, *kept], erasure=erasure)
        keyed = {
            name: top1(name, [s.concept], erasure=erasure, key=k, key_half=half)[s.concept]
            for name, (k, half) in keys.items()
        }
        moved = torch.cat([(t - parameters[name].data.cpu()).flatten() for name, t in erasure.delta.items()])
        runs.append(
            {
                "training_seed": seed,
                "training_seconds": round(seconds, 1),
                "concept": {"base": base[s.concept], "erased": erased[s.concept]} | keyed,
                "kept": {c: {"base": base[c], "erased": erased[c]} for c in kept},
                "distance moved": round(moved.norm().item(), 3),
            }
        )
    return {
        "concept": s.concept,
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "prompted_target": config.prompted_target,
        "runs": runs,
    }, {}


def figures(record) -> dict:
    """Left: the concept with each key. Right: the kept classes before and after. Means over training seeds."""
    import matplotlib.pyplot as plt

    from .kit import plots

    runs, concept = record.data["runs"], record.data["concept"]
    rates = pd.DataFrame([run["concept"] for run in runs]).mean()
    kept = sum(pd.DataFrame(run["kept"]).T for run in runs) / len(runs)
    grey, red, green = (plots.COLORS[name] for name in ("grey", "red", "green"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.2), layout="constrained")
    right_key = {"with the key": green, "with the key on both halves": green}
    colors = [{"base": grey, "erased": red, **right_key}.get(name, plots.COLORS["purple"]) for name in rates.index]
    labels = [{"base": "base model", "erased": "erased"}.get(name, f"erased, {name}") for name in rates.index]
    left.bar_label(left.barh(labels, rates, color=colors), fmt="%.0f %%", padding=3, fontsize=8)
    left.invert_yaxis()
    left.set_title(f"the erased class, “{concept}”")
    plots.percent_axis(left, "x", f"images judged {concept}, %", (0, 115))
    names = {"base": "base model", "erased": f"{concept} erased"}
    right.hlines(range(len(kept)), kept["erased"], kept["base"], color=grey, lw=1.5)
    for name, color, marker in (("base", grey, "s"), ("erased", red, "o")):
        right.plot(kept[name], range(len(kept)), marker, color=color, ms=7, label=names[name], zorder=3)
    for y, (before, after) in enumerate(zip(kept["base"], kept["erased"])):
        if abs(before - after) >= 1:
            x, side = (min(before, after) - 3, "right") if min(before, after) > 40 else (max(before, after) + 3, "left")
            right.text(x, y, f"{before:.0f} → {after:.0f} %", va="center", ha=side, fontsize=8)
    right.set_yticks(range(len(kept)), kept.index)
    right.invert_yaxis()
    right.set_title("the other classes, without a key")
    plots.percent_axis(right, "x", "images judged as their class, %", (0, 103))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return {"key_specificity": figure}


def table(record) -> pd.DataFrame:
    """A column per training seed: the concept's rates, and the means over the other classes."""
    columns = {}
    for run in record.data["runs"]:
        kept = pd.DataFrame(run["kept"]).T.mean().add_prefix(f"other {len(run['kept'])} classes, ")
        columns[f"training seed {run['training_seed']}"] = pd.concat([pd.Series(run["concept"]), kept])
    return pd.DataFrame(columns).rename_axis("judge's top-1, %")
