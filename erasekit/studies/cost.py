"""13: what each method costs, what a key costs while sampling, and how many sampling steps a measurement needs."""

from dataclasses import dataclass

import pandas as pd

from .operating_points import METHOD_NAMES

NOTEBOOK, VERSION, UNIT = "13_cost", 1, "images a class"
VERIFY = {"methods": ("uce", "kpop"), "sampled": ("kpop",)}


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"
    training_seed: int = 0
    seeds: int = 25
    sampling_steps: int = 15
    # Public models that are sampled with several numbers of steps; of those with a key, sampling is timed too.
    sampled: tuple[str, ...] = ("kpop", "esd-x", "uce", "ca")
    step_counts: tuple[int, ...] = (4, 8, 15, 25, 50)
    repeats: int = 15  # of each timed sampling
    training_steps: int | None = None


SHORT = {"seeds": 1, "sampling_steps": 2, "step_counts": (2,), "repeats": 1, "training_steps": 1}
PRESETS = {
    "smoke": Settings(("uce", "kpop"), sampled=("kpop",), **SHORT),
    "quick": Settings(("esd-x", "uce", "kpop"), sampled=("uce", "kpop"), step_counts=(8, 15), repeats=5),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For each method: U-Net evaluations, seconds, memory, parameters and bytes shipped, and its rates in percent.

    Each method pays for its own pool of latents. Then rates by the number of sampling steps, and seconds of sampling with and
    without a key.
    """
    from tqdm.auto import tqdm

    from ..baselines import erase
    from ..evaluation.profiling import count_evaluations, measure
    from ..evaluation.protocol import rates
    from ..sampling import sample
    from .kit.cache import cached, settings_dict
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = s.operating_points or operating_points()
    require_operating_points(points, *s.methods, *s.sampled)
    erased = list(world.concepts(s.split))
    kept = [c for c in world.concepts("classes") if c not in erased]
    prompts = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(s.seeds)]
    num_erased = len(erased) * s.seeds

    def model(method):
        config, scale = points[method]["settings"], points[method]["scale"]
        return make_config(world, method, s.training_seed, s.sampling_steps, config, s.training_steps), scale

    def cost(method, config, scale):
        world.trajectories.clear()
        with measure(world.pipe.device) as usage, count_evaluations(world.pipe.unet) as training:
            erasure = erase(world, erased, method, config, progress=False)
        row = {"evaluations": training.evaluations, "with gradient": training.with_gradient}
        row |= {"seconds": round(usage.seconds, 1), "peak MB": round(usage.peak_mb)} | shipped(erasure)
        with count_evaluations(world.pipe.unet) as sampling:
            sample(world, [prompts[0][0]], [0], erasure=erasure, num_inference_steps=s.sampling_steps)
        row["evaluations a sampling step"] = sampling.evaluations / s.sampling_steps
        scaled = erasure.scaled(world.pipe.unet, scale) if scale != 1 else erasure
        return row | rates(world, scaled, prompts, num_erased, s.sampling_steps), None

    # What only the first training of a process pays, no method shall pay.
    warm_up = make_config(world, "esd-x", s.training_seed, s.sampling_steps, {}, 1)
    erase(world, erased[:1], "esd-x", warm_up, progress=False)
    rows = []
    for method in tqdm(s.methods, desc="cost"):
        config, scale = model(method)
        parts = method, settings_dict(config), scale, s.split, s.seeds, s.sampling_steps
        own = method, config, scale
        row, _ = cached("cost", VERSION, world, lambda own=own: cost(*own), *parts)
        rows.append({"method": method} | row)

    def by_steps(erasure):
        found = {"points": []}
        for count in s.step_counts:
            found["points"].append({"steps": count} | rates(world, erasure, prompts, num_erased, count))
        return found | (
            {"timed": timing(world, erasure, erased[0], s.repeats)} if erasure and erasure.keys else {}
        ), None

    parts = s.split, s.seeds, s.step_counts, s.repeats
    base, _ = cached("cost", VERSION, world, lambda: by_steps(None), "by steps", "base", *parts)
    sampled = [{"method": "base"} | base]
    for method in tqdm(s.sampled, desc="sampling steps"):
        numbers, _ = measured("cost", VERSION, world, erased, method, *model(method), by_steps, *parts)
        sampled.append({"method": method} | numbers)
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "split": s.split}
    about |= {"sampling_steps": s.sampling_steps, "operating_points": {m: points[m] for m in (*s.methods, *s.sampled)}}
    return about | {"rows": rows, "sampled": sampled}, {}


def shipped(erasure) -> dict:
    """Size of the public delta or adapters, and of the keys."""
    public = [*(erasure.delta | erasure.adapters).values()]
    keys = [half for key in erasure.keys.values() for half in (key.k, key.v)]
    return {
        "parameters shipped": sum(t.numel() for t in (*public, *keys)),
        "bytes, public": sum(t.numel() * t.element_size() for t in public),
        "bytes, keys": sum(t.numel() * t.element_size() for t in keys),
    }


def timing(world, erasure, concept: str, repeats: int, images: int = 8, steps: int = 10) -> dict:
    """Median seconds of sampling `images` by the base, by the public model, and with the key.

    The three take turns, so that other load on the machine falls on all alike.
    """
    import time
    from contextlib import nullcontext
    from statistics import median

    from ..sampling import sample

    prompts, seeds = [world.prompt(concept)] * images, list(range(images))
    models = {"base": (nullcontext, None), "erased": (erasure.applied, None)}
    models["with the key"] = (erasure.applied, erasure.key(concept))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, (applied, key) in models.items():
            with applied(world.pipe.unet):
                start = time.perf_counter()
                sample(world, prompts, seeds, key, num_inference_steps=steps)
                if turn:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def relative_times(record) -> dict[str, float]:
    """Seconds of sampling in percent of the base's; empty if no model with a key was sampled."""
    seconds = next((each["timed"] for each in record.data["sampled"] if "timed" in each), {})
    return {name: 100 * each / seconds["base"] for name, each in seconds.items()}


def figures(record) -> dict:
    """Above: evaluations and rates by method. Below: rates by sampling steps, and the time of sampling."""
    import matplotlib.pyplot as plt

    rows = pd.DataFrame(record.data["rows"]).sort_values("evaluations", kind="stable", ascending=False)
    height = 0.24 * len(rows) + 0.9
    figure = plt.figure(figsize=(9.4, height + 3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[height, 3])
    _draw_training(above, rows, record.data["sampling_steps"])
    _draw_sampling(below, record.data["sampled"], relative_times(record))
    return {"cost": figure}


def _draw_training(figure, rows: pd.DataFrame, sampling_steps: int) -> None:
    from .kit.plots import percent_axis, style, weight

    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
    without = rows.evaluations - rows["with gradient"]
    left.barh(rows.method, without, color="#bbbbbb", label="forward only")
    bars = left.barh(rows.method, rows["with gradient"], left=without, color="#444444", label="with gradient")
    left.bar_label(bars, [f"{n:,}" for n in rows.evaluations], padding=3, fontsize=7.5)
    left.set(xlabel="U-Net evaluations of the training", xlim=(0, 1.15 * rows.evaluations.max()))
    left.xaxis.set_major_formatter("{x:,.0f}")
    for label, method in zip(left.get_yticklabels(), rows.method):
        label.set(color=style(method)["color"], weight=weight(method))
    for rate, look in (("ESR-1", {"marker": "o"}), ("PSR-1", {"marker": "s", "mfc": "none"})):
        right.plot(rows[rate], rows.method, ls="", ms=6, color="black", label=rate, **look)
    right.grid(axis="y", color="#dddddd", lw=0.6)
    percent_axis(right, "x", f"rate at {sampling_steps} sampling steps")
    for ax in (left, right):
        ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def _draw_sampling(figure, sampled: list[dict], times: dict[str, float]) -> None:
    from .kit.plots import COLORS, is_ours, percent_axis, style

    axes = figure.subplots(1, 3 if times else 2, width_ratios=[1, 1, 0.8] if times else None)
    lines = {each["method"]: pd.DataFrame(each["points"]).set_index("steps") for each in sampled}
    lowest = min(line[["ESR-1", "PSR-1"]].min().min() for method, line in lines.items() if method != "base")
    for ax, rate, title in zip(axes, ("ESR-1", "PSR-1"), ("erased concepts", "kept classes")):
        for method, line in lines.items():
            if rate == "PSR-1" or method != "base":
                ax.plot(line[rate], ms=5, lw=2 if is_ours(method) else 1.2, label=method, **style(method))
        ax.set(xscale="log", xlabel="sampling steps", title=title)
        ax.set_xticks(line.index, line.index)
        ax.minorticks_off()
        percent_axis(ax, "y", rate, (lowest - 3, 102))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(lines))
    if times:
        bars = axes[2].bar(times.keys(), times.values(), width=0.6, color=["#777777", "#bbbbbb", COLORS["blue"]])
        axes[2].bar_label(bars, fmt="%.1f", fontsize=8)
        axes[2].set(ylabel="sampling time, % of the base's", ylim=(0, 120), title="cost of a key")


def table(record) -> pd.DataFrame:
    """One row a method."""
    rows = pd.DataFrame(record.data["rows"]).set_index("method")
    counts = ["evaluations", "with gradient", "parameters shipped", "peak MB"]
    rows[counts] = rows[counts].astype(int).astype(str)
    for part in ("public", "keys"):
        rows[f"MB, {part}"] = (rows.pop(f"bytes, {part}") / 1e6).map("{:.2f}".format)
    columns = ["evaluations", "with gradient", "seconds", "peak MB", "parameters shipped", "MB, public", "MB, keys"]
    return rows[[*columns, "evaluations a sampling step", "ESR-1", "PSR-1"]].rename_axis(record.data["split"])
