"""07: how many concepts can be erased at once, and can one network make keys it was not trained for?"""

from dataclasses import dataclass
from itertools import product

import pandas as pd

from .mechanisms import best_prompt_lrs

NOTEBOOK, VERSION, UNIT = "07_mechanisms", 1, "images a class"

EVERY = 5  # of the erased concepts, in order, each fifth has an untrained key


@dataclass(frozen=True)
class Settings:
    mechanisms: tuple[str, ...] = ("shared", "network")
    operating_point: dict | None = None  # of kpop; None takes that of the record "operating_points"
    prompt_lrs: dict | None = None  # of each mechanism; None takes those of the record "mechanisms"
    counts: tuple[int, ...] = (1, 5, 20, 50, 100)  # of concepts erased at once: the ten classes, then other objects
    training_seed: int = 0
    training_steps: int = 300
    seeds: int = 25
    kept_seeds: int = 3
    sampling_steps: int = 15


PRESETS = {
    "full": Settings(),
    "quick": Settings(mechanisms=("network",), counts=(5, 20), seeds=5),
    "smoke": Settings(("network",), counts=(5,), training_steps=1, seeds=1, kept_seeds=1, sampling_steps=2),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """ESR-1 over all erased concepts, recovery with trained and untrained keys, and top-1 of other objects, in percent.

    Half of the objects that no method sees are never erased: they are the same for all counts.
    """
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import percent
    from ..evaluation.protocol import correct, recovery_rate
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = {"kpop": s.operating_point or operating_points().get("kpop")}
    require_operating_points(points, "kpop")
    point, prompt_lrs = points["kpop"], tuned_prompt_lrs() if s.prompt_lrs is None else s.prompt_lrs
    candidates, kept = candidates_and_kept(world)
    counts = [n for n in s.counts if n <= len(candidates)]  # smaller worlds have fewer

    def top1(erasure, names, count):
        prompts = [(world.prompt(c), c, n) for c in names for n in range(count)]
        images = sample_images(world, erasure, prompts, s.sampling_steps)
        return percent(correct(world, images, [c for _, c, _ in prompts]))

    def measure(erasure, concepts, trained):
        found = {
            "ESR-1": round(100 - top1(erasure, concepts, s.seeds), 1),
            "kept": top1(erasure, kept, s.kept_seeds),
            "key, trained": recovery_rate(world, erasure, trained, s.seeds, s.sampling_steps),
        }
        if untrained := [c for c in concepts if c not in trained]:
            found["key, untrained"] = recovery_rate(world, erasure, untrained, s.seeds, s.sampling_steps)
        return found, None

    runs = []
    for mechanism, count in tqdm(list(product(s.mechanisms, counts)), desc="many concepts"):
        concepts = candidates[:count]
        trained = tuple(c for n, c in enumerate(concepts, 1) if n % EVERY)
        changes = {"mechanism": mechanism, "prompt_lr": prompt_lrs.get(mechanism, 3e-2), "train_keys_for": trained}
        changes = point["settings"] | changes | {"steps": s.training_steps}
        config = make_config(world, "kpop", s.training_seed, s.sampling_steps, changes)
        how = "kpop", config, point["scale"], lambda e, own=(concepts, trained): measure(e, *own)
        sizes = s.seeds, s.kept_seeds, s.sampling_steps
        found, _ = measured("many_concepts", VERSION, world, list(concepts), *how, *sizes)
        runs.append({"mechanism": mechanism, "count": count, "trained": len(trained)} | found)
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": 1,
        "kept": len(kept),
        "erased": list(candidates[: max(counts)]),
        "operating_point": point,
        "prompt_lrs": prompt_lrs,
        "runs": runs,
    }, {}


def candidates_and_kept(world) -> tuple[tuple[str, ...], list[str]]:
    """What is erased, in this order, and what never is: the ten classes and half of the other objects, and the other half."""
    rest = world.unseen_classes("classes")
    return (*world.concepts("classes"), *rest[::2]), rest[1::2]


def tuned_prompt_lrs() -> dict[str, float]:
    """Each mechanism's prompt learning rate by the committed record of "mechanisms"; empty where there is none."""
    from ..paths import RECORDS
    from .kit.records import Record

    path = RECORDS / "emojinette" / "full" / "mechanisms.json"
    return best_prompt_lrs(Record.read(path).data["sweep"]) if path.exists() else {}


def figures(record) -> dict:
    """Erased, kept, and recovered with trained and untrained keys, by the number of concepts erased at once.

    Dotted: what of the erased concepts is drawn without any key.
    """
    from .kit import plots

    frame = pd.DataFrame(record.data["runs"])
    titles = {"ESR-1": "erased: ESR-1", "kept": f"kept: {record.data['kept']} other objects"}
    titles |= {"key, trained": "with the key, trained", "key, untrained": "with the key, not trained"}
    looks = {"shared": ("a prompt for each concept", "grey", "s"), "network": ("one network", "blue", "o")}
    counts = sorted(frame["count"].unique())
    titles = {rate: title for rate, title in titles.items() if rate in frame}  # the key of a single concept is trained
    figure, axes = plots.panels(len(titles), columns=4, height=2.6)
    for ax, (rate, title) in zip(axes, titles.items()):
        for mechanism, own in frame.groupby("mechanism", sort=False):
            label, color, marker = looks.get(mechanism, (mechanism, "gold", "d"))
            where = [counts.index(n) for n in own["count"]]
            ax.plot(where, own[rate], marker=marker, ms=5, color=plots.COLORS[color], label=label)
            if "key" in rate:
                ax.plot(
                    where,
                    100 - own["ESR-1"],
                    ls=":",
                    lw=1.2,
                    color=plots.COLORS[color],
                    label=f"{label}, without its key",
                )
        ax.set_title(title)
        ax.set_xticks(range(len(counts)), counts)
    plots.percent_axis(axes[0], "y", "images")
    figure.supxlabel("concepts erased at once; every fifth key is not trained", fontsize=9)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return {"many_concepts": figure}


def table(record) -> pd.DataFrame:
    runs = pd.DataFrame(record.data["runs"]).drop(columns="training_seconds")
    runs.index = [f"{mechanism}, {count} erased" for mechanism, count in zip(runs.pop("mechanism"), runs.pop("count"))]
    runs = runs.astype(object).where(runs.notna(), "")
    return runs.rename(columns={"kept": f"{record.data['kept']} other objects", "trained": "keys trained"}).rename_axis(
        "%"
    )
