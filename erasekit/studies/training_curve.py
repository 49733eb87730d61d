"""11: does knowledge transfer make removal gentler, as the paper claims? Measured along the training."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "11_training_curve", 1, "images a class"

# The second is removal alone, with the same latents, target and retained objects.
ARMS = {"with transfer": {}, "removal alone": {"transfer_steps": 0, "lam": 0.0}}


@dataclass(frozen=True)
class Settings:
    arms: tuple[str, ...] = tuple(ARMS)
    operating_point: dict | None = None  # of kpop; None takes that of the record "operating_points"
    split: str = "S1"
    # Nothing in a training depends on its length: each of these is the same training, stopped earlier.
    stop_after: tuple[int, ...] = (5, 10, 20, 40, 80, 150)
    training_seeds: int = 3
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15


PRESETS = {
    "full": Settings(),
    "quick": Settings(stop_after=(10, 40, 150), training_seeds=1),
    "smoke": Settings(stop_after=(1,), training_seeds=1, seeds=1, key_seeds=1, sampling_steps=2),
}
VERIFY = {"stop_after": (20, 40), "arms": ("with transfer",), "training_seeds": 1}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """After each number of steps: top-1 in percent, CLIP alignment with the prompt, and the distance the weights moved."""
    import torch
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import clip_alignment, percent
    from ..evaluation.protocol import correct
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = {"kpop": s.operating_point or operating_points().get("kpop")}
    require_operating_points(points, "kpop")
    point, erased = points["kpop"], world.concepts(s.split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    theta = {name: p.detach().clone() for name, p in world.pipe.unet.named_parameters()}

    def generate(erasure, concepts, count, key=None):
        prompts = [(world.prompt(c), c, n) for c in concepts for n in range(count)]
        return sample_images(world, erasure, prompts, s.sampling_steps, key)

    def scores(images, concepts, count):
        labels = [c for c in concepts for _ in range(count)]
        alignment = clip_alignment(world, images, [world.prompt(c) for c in labels]).mean().item()
        return {"top-1": percent(correct(world, images, labels)), "CLIP": round(alignment, 3)}

    def measure(erasure):
        moved = sum((tensor - theta[name].to(tensor)).square().sum() for name, tensor in erasure.delta.items())
        keyed = torch.cat([generate(erasure, [c], s.key_seeds, erasure.key(c)) for c in erased])
        return {
            "erased": scores(generate(erasure, erased, s.seeds), erased, s.seeds),
            "with the key": scores(keyed, erased, s.key_seeds),
            "kept": scores(generate(erasure, kept, s.seeds), kept, s.seeds),
            "distance": round(moved.sqrt().item(), 4),
        }, None

    runs = []
    sizes = s.split, s.seeds, s.key_seeds, s.sampling_steps
    for seed, arm, steps in tqdm(list(product(range(s.training_seeds), s.arms, s.stop_after)), desc="training curve"):
        config = make_config(world, "kpop", seed, s.sampling_steps, point["settings"] | ARMS[arm], steps)
        found, _ = measured("training_curve", VERSION, world, erased, "kpop", config, 1.0, measure, *sizes)
        runs.append({"arm": arm, "training_seed": seed, "step": steps} | found)
    base = {"erased": erased, "kept": kept}
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": s.training_seeds,
        "prompted_target": config.prompted_target,
        "split": s.split,
        "operating_point": point,
        "base": {part: scores(generate(None, names, s.seeds), names, s.seeds) for part, names in base.items()},
        "runs": runs,
    }, {}


def figures(record) -> dict:
    """Left: CLIP along the training. Middle and right: what is kept and how far the weights moved, at the same erasure."""
    import matplotlib.pyplot as plt

    from .kit import plots

    frame, base = pd.json_normalize(record.data["runs"]), record.data["base"]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.4, 3.2), width_ratios=[1.1, 1, 1], layout="constrained"
    )
    lines = {"with transfer": {"ls": "-", "marker": "o"}, "removal alone": {"ls": "--", "marker": "s", "mfc": "white"}}
    parts = {"kept": "kept classes", "with the key": "erased classes,\nwith their keys", "erased": "erased classes"}
    colors = {"kept": "grey", "with the key": "green", "erased": "red"}
    colors = {label: plots.COLORS[colors[part]] for part, label in parts.items()}
    ends = {}
    for part, label in parts.items():
        for arm, own in frame.groupby("arm", sort=False):
            if part == "with the key" and arm != "with transfer":
                continue  # without transfer the prompt is not trained
            grid = own.pivot_table(index="training_seed", columns="step", values=f"{part}.CLIP")
            plots.mean_band(left, grid.columns, grid.to_numpy(), color=colors[label], **lines[arm])
            ends.setdefault(label, grid.iloc[:, -1].mean())
    for part, height in (("kept", base["kept"]["CLIP"]), ("erased", base["erased"]["CLIP"])):
        left.axhline(height, color=colors[parts[part]], lw=0.8, ls=":")
    left.set(xlabel="training step", ylabel="CLIP alignment (100 × cosine)", ylim=(0, None))
    left.set_title("fit to the prompt (dotted: base model)")
    for arm, own in frame.groupby("arm", sort=False):
        mean = own.groupby("step")[["erased.top-1", "kept.top-1", "distance"]].mean()
        for ax, y in ((middle, "kept.top-1"), (right, "distance")):
            ax.plot(100 - own["erased.top-1"], own[y], lines[arm]["marker"], color="black", ms=3, alpha=0.25, mew=0)
            ax.plot(100 - mean["erased.top-1"], mean[y], color="black", ms=4.5, label=arm, **lines[arm])
    for ax in (middle, right):
        plots.percent_axis(ax, "x", "erased (ESR-1)")
    plots.percent_axis(middle, "y", "kept (PSR-1)", (min(90.0, frame["kept.top-1"].min() - 2), 100.6))
    middle.set_title("what is kept")
    right.set(ylabel="L2 distance from the base weights", title="how far the weights moved", ylim=(0, None))
    figure.legend(*middle.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=3)
    plots.label_ends(left, ends, colors=colors)
    return {"training_curve": figure}


def table(record) -> pd.DataFrame:
    """At the same erasure, linear between the measured steps: what is kept, and how far the weights moved."""
    frame, rows = pd.json_normalize(record.data["runs"]), {}
    for esr in (50, 80, 95):
        for arm, own in frame.groupby("arm", sort=False):
            found = [at_erasure(run, esr) for _, run in own.groupby("training_seed")]
            rows[f"ESR-1 {esr}, {arm}"] = {name: np.mean([f[name] for f in found]) for name in found[0]}
    return pd.DataFrame(rows).T.rename_axis(f"{record.data['split']}, means over training seeds")


def at_erasure(run: pd.DataFrame, esr: float) -> dict:
    """PSR-1 and the distance where a run first erases `esr` percent; NaN where it never does."""
    x = np.maximum.accumulate([0.0, *(100 - run["erased.top-1"])])
    curves = {"PSR-1, %": [run["kept.top-1"].iloc[0], *run["kept.top-1"]], "distance moved": [0.0, *run["distance"]]}
    return {name: float(np.interp(esr, x, y)) if x[-1] >= esr else np.nan for name, y in curves.items()}
