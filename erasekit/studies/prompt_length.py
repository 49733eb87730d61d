"""03: how long must the prompt be, and in which layers?"""

from dataclasses import dataclass
from itertools import product

import pandas as pd

NOTEBOOK, VERSION, UNIT = "03_prompt_length", 1, "images a class"


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 77)
    layers: tuple[str, ...] = ("mid", "mid+up", "all")
    operating_point: dict | None = None  # of kpop; None takes that of the record "operating_points"
    split: str = "S1"
    training_seeds: int = 3
    training_steps: int | None = None
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15


PRESETS = {
    "full": Settings(),
    "quick": Settings(lengths=(1, 10, 77), layers=("mid", "all"), training_seeds=1),
    "smoke": Settings(
        lengths=(1,), layers=("mid",), training_seeds=1, training_steps=1, seeds=1, key_seeds=1, sampling_steps=2
    ),
}
VERIFY = {"lengths": (10, 1), "layers": ("all",), "training_seeds": 1}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """ESR, PSR and the recognised images with the key, in percent, for each length, layers and training seed."""
    from tqdm.auto import tqdm

    from ..evaluation.protocol import rates, recovery_rate
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = {"kpop": s.operating_point or operating_points().get("kpop")}
    require_operating_points(points, "kpop")
    point, erased = points["kpop"], world.concepts(s.split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    prompts = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(s.seeds)]
    num_erased, sizes = len(erased) * s.seeds, (s.split, s.seeds, s.key_seeds, s.sampling_steps)

    def measure(erasure):
        found = rates(world, erasure, prompts, num_erased, s.sampling_steps)
        return found | {"with the key": recovery_rate(world, erasure, erased, s.key_seeds, s.sampling_steps)}, None

    runs = []
    for seed, layers, m in tqdm(list(product(range(s.training_seeds), s.layers, s.lengths)), desc="prompt length"):
        changes = point["settings"] | {"m": m, "layers": layers}
        config = make_config(world, "kpop", seed, s.sampling_steps, changes, s.training_steps)
        how = "kpop", config, point["scale"], measure, *sizes
        found, _ = measured("prompt_length", VERSION, world, erased, *how)
        runs.append({"m": m, "layers": layers, "training_seed": seed} | found)
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": s.training_seeds,
        "prompted_target": config.prompted_target,
        "split": s.split,
        "sizes": {"erased": num_erased, "kept": len(prompts) - num_erased, "with a key": len(erased) * s.key_seeds},
        "operating_point": point,
        "base": rates(world, None, prompts, num_erased, s.sampling_steps),
        "runs": runs,
    }, {}


def figures(record) -> dict:
    """ESR, PSR and recovery against the prompt's length; a line for each choice of layers, the band its training seeds."""
    import matplotlib.pyplot as plt

    from .kit import plots

    frame = pd.DataFrame(record.data["runs"])
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.1), sharey=True, layout="constrained")
    titles = {"ESR-1": "erased (ESR-1)", "PSR-1": "kept (PSR-1)", "with the key": "brought back by its key"}
    # More layers, darker: each choice contains the one before.
    looks = {"mid": ("#7fb8d8", "s"), "mid+up": ("#2f8ac4", "^"), "all": ("#003f6b", "o")}
    lowest = frame[list(titles)].min().min()
    for ax, (rate, title) in zip(axes, titles.items()):
        for layers, own in frame.groupby("layers", sort=False):
            color, marker = looks[layers]
            grid = own.pivot_table(index="training_seed", columns="m", values=rate)
            plots.mean_band(ax, grid.columns, grid.to_numpy(), color=color, marker=marker, ms=5, label=layers)
        ax.set(xscale="log", xlabel="prompt length m (tokens)", title=title, ylim=(lowest - 2, 101.5))
        ax.set_xticks(lengths := sorted(frame.m.unique()), lengths)
        ax.minorticks_off()
    axes[0].set_ylabel("images, %")
    handles, labels = axes[0].get_legend_handles_labels()
    names = {"mid": "middle block", "mid+up": "middle and up blocks", "all": "all blocks"}
    figure.legend(handles, [names[x] for x in labels], loc="outside upper center", ncols=3, title="prompted layers")
    return {"prompt_length": figure}


def table(record) -> pd.DataFrame:
    """Means over training seeds; in brackets 95 % intervals, over training seeds and images, see `intervals.bootstrap`."""
    from ..evaluation.intervals import bootstrap

    frame, rows = pd.DataFrame(record.data["runs"]), {}
    sizes = {"ESR-1": "erased", "ESR-5": "erased", "PSR-1": "kept", "PSR-5": "kept", "with the key": "with a key"}
    for (layers, m), own in frame.groupby(["layers", "m"], sort=False):
        between = {c: bootstrap([own[[c]].to_numpy()], record.data["sizes"][part]) for c, part in sizes.items()}
        cells = {c: f"{own[c].mean():.1f} ({low:.0f} to {high:.0f})" for c, (low, high) in between.items()}
        rows[f"{layers}, m = {m}"] = cells
    return pd.DataFrame(rows).T.rename_axis(f"{record.data['split']}, %")
