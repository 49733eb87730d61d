"""04, before all tables: the cheapest sampler that gives the rates of DDIM at 100 steps."""

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "04_objects", 1, "images a class"  # raise VERSION when the numbers should change
RATES = ("ESR-1", "ESR-5", "PSR-1")
MULTISTEP = (8, 10, 12, 15, 20, 25)  # DPM-Solver++ and UniPC


@dataclass(frozen=True)
class Settings:
    # Methods at their default settings: operating points are chosen later, with the sampler that this study chooses.
    models: tuple[str, ...] = ("base", "kpop", "kpop-anchor", "esd-x", "uce", "ca", "spm")
    candidates: tuple[tuple[str, int], ...] = (
        *(("ddim", steps) for steps in (8, 25, 50)),
        *((sampler, steps) for sampler in ("dpm-solver++", "unipc") for steps in MULTISTEP),
    )
    reference: tuple[str, int] = ("ddim", 100)
    tolerance: float = 1.0  # points that a rate may differ from the reference's
    split: str = "S1"
    seeds: int = 50
    training_seed: int = 0
    training_steps: int | None = None


FEW = (("ddim", 8), ("ddim", 25), ("dpm-solver++", 8), ("dpm-solver++", 15), ("unipc", 8), ("unipc", 15))
SMOKE = {"candidates": (("ddim", 1), ("dpm-solver++", 2)), "reference": ("ddim", 3)}
PRESETS = {
    "full": Settings(),
    "quick": Settings(models=("base", "kpop", "uce"), candidates=FEW, seeds=10),
    "smoke": Settings(models=("base", "kpop"), seeds=1, training_steps=1, **SMOKE),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent for each model and sampler, and their differences to the reference's, from the same noise."""
    from tqdm.auto import tqdm

    from .kit.cache import cached, settings_dict
    from .kit.erasures import make_config, train_cached

    erased = list(world.split(s.split))
    classes = [*erased, *(c for c in world.concepts("classes") if c not in erased)]
    prompts = [(world.prompt(c), c, seed) for c in classes for seed in range(s.seeds)]
    drawn = {sampler: copy.copy(world) for sampler, _ in (s.reference, *s.candidates)}
    for sampler, own in drawn.items():
        own.sampler = sampler

    def config(model):
        return make_config(world, model, s.training_seed, s.reference[1], {}, s.training_steps)

    @cache  # trained once for all samplers, and only if one is not in the cells' cache
    def erasure(model):
        return None if model == "base" else train_cached(world, erased, model, config(model))[0]

    def outcomes(model, sampler, steps):
        """For each rate whether each of its images counts, in the order of the prompts."""
        own = drawn[sampler]
        parts = model, erased, None if model == "base" else settings_dict(config(model)), steps, s.seeds
        found, _ = cached("samplers", VERSION, own, lambda: (hits(own, erasure(model), prompts, steps), None), *parts)
        top1, top5, count = np.array(found["top-1"]), np.array(found["top-5"]), len(erased) * s.seeds
        return dict(zip(RATES, (1 - top1[:count], 1 - top5[:count], top1[count:])))

    reference, runs = {}, []
    for model in tqdm(s.models, desc="samplers"):
        exact = outcomes(model, *s.reference)
        reference[model] = percents(exact)
        for sampler, steps in s.candidates:
            found = outcomes(model, sampler, steps)
            run = {"model": model, "sampler": sampler, "steps": steps, "evaluations": evaluations(steps)}
            runs.append(run | percents(found) | {"differences": compare(found, exact)})
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seed": s.training_seed,
        "erased": erased,
        "tolerance": s.tolerance,
        "reference": {"sampler": s.reference[0], "steps": s.reference[1], "evaluations": evaluations(s.reference[1])},
        "rates": reference,
        "runs": runs,
        **choose(runs, s.tolerance),
    }, {}


def hits(world, erasure, prompts, steps: int) -> dict[str, list[int]]:
    """For each prompt 1 where its label is among the judge's first choice, or first five."""
    from ..evaluation.images import sample_images
    from ..evaluation.metrics import in_top_k, judge_images

    probabilities = judge_images(world, sample_images(world, erasure, prompts, steps))[0]
    labels, names = [label for _, label, _ in prompts], world.judge.objects
    return {f"top-{k}": in_top_k(probabilities, names, labels, k).int().tolist() for k in (1, 5)}


def evaluations(steps: int) -> int:
    """Of the U-Net for one image: both halves of guidance in each step. All samplers here are multistep: one each."""
    return 2 * steps


def percents(outcomes: dict) -> dict[str, float]:
    return {rate: round(100 * float(counts.mean()), 4) for rate, counts in outcomes.items()}


def compare(outcomes: dict, reference: dict) -> dict[str, dict[str, float]]:
    """For each rate the difference in points, and its standard error over images paired by prompt and initial noise."""
    pairs = {rate: 100 * (outcomes[rate] - reference[rate]) for rate in RATES}
    return {
        rate: {"mean": round(float(d.mean()), 4), "standard error": round(float(d.std(ddof=1)) / len(d) ** 0.5, 4)}
        for rate, d in pairs.items()
    }


def choose(runs: list[dict], tolerance: float) -> dict:
    """ "chosen": the cheapest candidate whose rates are all within `tolerance` for every model, or None; "nearest" of all.

    By point estimates. Of equally cheap ones, the one with the smaller largest difference.
    """
    largest: dict[tuple[str, int], float] = {}
    for run in runs:
        name = run["sampler"], run["steps"]
        largest[name] = max(largest.get(name, 0.0), abs(largest_difference([run])["mean"]))
    enough = [name for name in largest if largest[name] <= tolerance]
    chosen = min(enough, key=lambda name: (name[1], largest[name]), default=None)
    nearest = min(largest, key=lambda name: (largest[name], name[1]))
    return {
        "chosen": chosen and dict(zip(("sampler", "steps"), chosen)),
        "nearest": dict(zip(("sampler", "steps"), nearest)),
    }


def largest_difference(runs: list[dict]) -> dict:
    """The difference of the largest size, with the model and rate it is of."""
    each = [{"model": run["model"], "rate": rate} | found for run in runs for rate, found in run["differences"].items()]
    return max(each, key=lambda found: abs(found["mean"]))


def figures(record) -> dict:
    """The largest difference of the three rates against steps, with its 95 % interval: over all models, and for each."""
    from .kit import plots

    data, runs = record.data, pd.DataFrame(record.data["runs"])
    models, steps = list(dict.fromkeys(runs.model)), sorted(set(runs.steps))
    looks = dict(zip(dict.fromkeys(runs.sampler), zip(("grey", "blue", "orange"), "so^")))
    figure, axes = plots.panels(1 + len(models), columns=4, height=2.1)
    most = 0.0
    for ax, group in zip(axes, [models, *([model] for model in models)]):
        band = f"all three rates within {data['tolerance']:g} point"
        ax.axhspan(0, data["tolerance"], color=plots.COLORS["green"], alpha=0.15, lw=0, label=band)
        for shift, (sampler, (color, marker)) in zip((1, 0.988, 1.012), looks.items()):  # intervals beside each other
            own = runs[(runs.sampler == sampler) & runs.model.isin(group)]
            found = {n: largest_difference(part.to_dict("records")) for n, part in own.groupby("steps")}
            sizes = np.array([abs(each["mean"]) for each in found.values()])
            errors = 1.96 * np.array([each["standard error"] for each in found.values()])
            line = {"color": plots.COLORS[color], "marker": marker, "ms": 4, "lw": 2 if len(group) > 1 else 1.2}
            x = shift * np.array(list(found))
            ax.plot(x, sizes, label=sampler, clip_on=False, **line)
            bars = {"fmt": "none", "ecolor": line["color"], "elinewidth": 0.8, "alpha": 0.5}
            ax.errorbar(x, sizes, [np.minimum(errors, sizes), errors], **bars)
            most = max(most, (sizes + errors).max())
        title = f"all {len(models)} models" if len(group) > 1 else group[0]
        color = "black" if len(group) > 1 else plots.style(group[0])["color"]
        ax.set_title(title, color=color, weight="bold" if len(group) > 1 else plots.weight(group[0]))
    if data["chosen"]:
        name, count = data["chosen"]["sampler"], data["chosen"]["steps"]
        for ax in axes:
            color = plots.COLORS[looks[name][0]]
            ax.axvline(count, color=color, lw=1.2, ls=":", zorder=0, label=f"chosen: {name}, {count} steps")
    axes[0].set(xscale="log", ylim=(0, 1.3 * most + 1))
    axes[0].set_yscale("symlog", linthresh=max(data["tolerance"], 0.1), linscale=0.6)
    axes[0].set_xticks(steps, steps)
    axes[0].minorticks_off()
    ticks = [0, data["tolerance"], *(n for n in (2, 5, 10, 20, 50, 100) if data["tolerance"] < n <= 1.3 * most + 1)]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    where = data["reference"]
    figure.supxlabel("sampling steps", fontsize=9)
    figure.supylabel(f"largest difference to {where['sampler']}\nat {where['steps']} steps, points", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return {"samplers": figure}


def table(record) -> pd.DataFrame:
    """For each candidate and model the largest difference to the reference and its rate; ± 1.96 standard errors."""
    data, rows = record.data, {}
    where = data["reference"]
    name = f"{where['sampler']}, {where['steps']} steps: {', '.join(RATES)} in %"
    rates = {m: " / ".join(f"{found[r]:.1f}" for r in RATES) for m, found in data["rates"].items()}
    rows[name] = {"evaluations": where["evaluations"]} | rates
    candidates = dict.fromkeys((run["sampler"], run["steps"]) for run in data["runs"])
    for sampler, steps in sorted(candidates, key=lambda candidate: candidate[1]):
        runs = [run for run in data["runs"] if (run["sampler"], run["steps"]) == (sampler, steps)]
        row = {run["model"]: difference(largest_difference([run])) for run in runs}
        most, here = largest_difference(runs), {"sampler": sampler, "steps": steps}
        row |= {"largest": f"{difference(most)}, {most['model']}", "evaluations": runs[0]["evaluations"]}
        row["choice"] = "chosen" if here == data["chosen"] else "nearest" if here == data["nearest"] else ""
        rows[f"{sampler}, {steps} steps"] = row
    columns = ["evaluations", "choice", "largest", *data["rates"]]
    frame = pd.DataFrame(rows).T.reindex(columns=columns).fillna("")
    titles = {"evaluations": "U-Net evaluations an image", "largest": "largest of all models"}
    return frame.rename(columns=titles).rename_axis("difference to the reference, points")


def difference(found: dict) -> str:
    return f"{found['mean']:+.1f} ± {1.96 * found['standard error']:.1f} ({found['rate']})"
