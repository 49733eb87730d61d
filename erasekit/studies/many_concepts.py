"""07: can one network make keys it was not trained for? Twenty concepts are erased at once, sixteen with trained keys."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .mechanisms import best_prompt_lrs

NOTEBOOK, VERSION, UNIT = "07_mechanisms", 1, "images a class"

EVERY = 5  # of the erased concepts, in order, each fifth has an untrained key


@dataclass(frozen=True)
class Settings:
    mechanisms: tuple[str, ...] = ("shared", "network")
    operating_point: dict | None = None  # of kpop; None takes that of the record "operating_points"
    prompt_lrs: dict | None = None  # of each mechanism; None takes those of the record "mechanisms"
    others: int = 10  # objects erased beside the ten classes
    training_seed: int = 0
    training_steps: int = 300
    seeds: int = 5
    sampling_steps: int = 8


PRESETS = {
    "full": Settings(),
    "quick": Settings(mechanisms=("network",)),
    "smoke": Settings(mechanisms=("network",), others=0, training_steps=1, seeds=1, sampling_steps=2),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """ESR-1 over all erased concepts, recovery with trained and untrained keys, and top-1 of other objects, in percent."""
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import percent
    from ..evaluation.protocol import correct, recovery_rate
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = {"kpop": s.operating_point or operating_points(world).get("kpop")}
    require_operating_points(points, "kpop")
    point, prompt_lrs = points["kpop"], tuned_prompt_lrs() if s.prompt_lrs is None else s.prompt_lrs
    rest = world.unseen_classes("classes")
    concepts = (*world.concepts("classes"), *rest[:: len(rest) // max(1, s.others)][: s.others])
    untrained = concepts[EVERY - 1 :: EVERY]
    trained = tuple(c for c in concepts if c not in untrained)
    kept = [c for c in rest if c not in concepts]

    def top1(erasure, names, count):
        prompts = [(world.prompt(c), c, n) for c in names for n in range(count)]
        images = sample_images(world, erasure, prompts, s.sampling_steps)
        return percent(correct(world, images, [c for _, c, _ in prompts]))

    def measure(erasure):
        return {
            "ESR-1": round(100 - top1(erasure, concepts, s.seeds), 1),
            "kept": top1(erasure, kept, 1),
            "key, trained": recovery_rate(world, erasure, trained, s.seeds, s.sampling_steps),
            "key, untrained": recovery_rate(world, erasure, untrained, s.seeds, s.sampling_steps),
        }, None

    runs = []
    for mechanism in tqdm(s.mechanisms, desc="many concepts"):
        changes = {"mechanism": mechanism, "prompt_lr": prompt_lrs.get(mechanism, 3e-2), "train_keys_for": trained}
        changes = point["settings"] | changes | {"steps": s.training_steps}
        config = make_config(world, "kpop", s.training_seed, s.sampling_steps, changes)
        how = "kpop", config, point["scale"], measure, s.seeds, s.sampling_steps
        found, _ = measured("many_concepts", VERSION, world, list(concepts), *how)
        runs.append({"mechanism": mechanism} | found)
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": 1,
        "kept": len(kept),
        "trained": list(trained),
        "untrained": list(untrained),
        "operating_point": point,
        "prompt_lrs": prompt_lrs,
        "runs": runs,
    }, {}


def tuned_prompt_lrs() -> dict[str, float]:
    """Each mechanism's prompt learning rate by the committed record of "mechanisms"; empty where there is none."""
    from ..paths import RECORDS
    from .kit.records import Record

    path = RECORDS / "emojinette" / "full" / "mechanisms.json"
    return best_prompt_lrs(Record.read(path).data["sweep"]) if path.exists() else {}


def figures(record) -> dict:
    """Erased, kept, and brought back with trained and untrained keys, for each mechanism."""
    import matplotlib.pyplot as plt

    from .kit import plots

    data, runs = record.data, record.data["runs"]
    trained, untrained = len(data["trained"]), len(data["untrained"])
    groups = {
        "ESR-1": f"erased:\n{trained + untrained} concepts",
        "kept": f"kept:\n{data['kept']} other objects",
        "key, trained": f"with the key:\n{trained} trained",
        "key, untrained": f"with the key:\n{untrained} not trained",
    }
    looks = {"shared": ("a prompt for each concept", "grey"), "network": ("one network makes all prompts", "blue")}
    figure, ax = plt.subplots(figsize=(6.6, 3.0), layout="constrained")
    for n, run in enumerate(runs):
        name, color = looks.get(run["mechanism"], (run["mechanism"], "gold"))
        x, width = np.arange(len(groups)) + (n - (len(runs) - 1) / 2) * 0.4, 0.37
        bars = ax.bar(x, [run[rate] for rate in groups], width, color=plots.COLORS[color], label=name)
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.set_xticks(range(len(groups)), groups.values())
    ax.tick_params(axis="x", length=0)
    plots.percent_axis(ax, "y", "images, %", (0, 108))
    figure.legend(loc="outside upper center", ncols=2)
    return {"many_concepts": figure}


def table(record) -> pd.DataFrame:
    data = record.data
    runs = pd.DataFrame(data["runs"]).set_index("mechanism").drop(columns="training_seconds")
    total = len(data["trained"] + data["untrained"])
    return runs.rename(columns={"kept": f"{data['kept']} other objects"}).rename_axis(f"{total} erased at once, %")
