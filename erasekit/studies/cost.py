"""13: what each method costs to train, and what a key costs while sampling."""

from dataclasses import dataclass

import pandas as pd

from .operating_points import METHOD_NAMES

NOTEBOOK, VERSION, UNIT = "13_cost", 2, "timed samplings"  # raise VERSION when the numbers should change
VERIFY = {"methods": ("uce", "kpop")}


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"
    training_seed: int = 0
    sampling_steps: int = 15
    m: int = 10  # tokens of the key that is timed while sampling
    repeats: int = 15  # of each timed sampling
    training_steps: int | None = None


PRESETS = {
    "smoke": Settings(("uce", "kpop"), sampling_steps=2, repeats=1, training_steps=1),
    "quick": Settings(("esd-x", "uce", "rece", "speed", "oce", "adavd")),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For each method: U-Net evaluations, seconds, memory, parameters and bytes shipped; then sampling with and without a key.

    Each method pays for its own pool of latents. What its erasure is worth stands in the study `objects`.
    """
    from tqdm.auto import tqdm

    from ..baselines import erase
    from ..evaluation.profiling import count_evaluations, measure
    from ..sampling import sample
    from .kit.cache import cached, settings_dict
    from .kit.erasures import make_config, method_points

    points = method_points(s.operating_points, s.methods)
    erased = list(world.concepts(s.split))

    def model(method):
        settings = points[method]["settings"]
        return make_config(world, method, s.training_seed, s.sampling_steps, settings, s.training_steps)

    def cost(method, config):
        world.trajectories.clear()
        with measure(world.pipe.device) as usage, count_evaluations(world.pipe.unet) as training:
            erasure = erase(world, erased, method, config, progress=False)
        row = {"evaluations": training.evaluations, "with gradient": training.with_gradient}
        row |= {"seconds": round(usage.seconds, 1), "peak MB": round(usage.peak_mb)} | shipped(erasure)
        with count_evaluations(world.pipe.unet) as sampling:
            sample(world, [world.prompt(erased[0])], [0], erasure=erasure, num_inference_steps=s.sampling_steps)
        return row | {"evaluations a sampling step": sampling.evaluations / s.sampling_steps}, None

    # What only the first training of a process pays, no method shall pay.
    warm_up = make_config(world, "esd-x", s.training_seed, s.sampling_steps, {}, 1)
    erase(world, erased[:1], "esd-x", warm_up, progress=False)
    rows = []
    for method in tqdm(s.methods, desc="cost"):
        own = method, model(method)
        row, _ = cached("cost", VERSION, world, lambda own=own: cost(*own), method, settings_dict(own[1]), s.split)
        rows.append({"method": method} | row)

    timed, _ = cached("cost", VERSION, world, lambda: (timing(world, erased[0], s.m, s.repeats), None), s.m, s.repeats)
    about = {"N": s.repeats, "training_seeds": 1, "split": s.split, "sampling_steps": s.sampling_steps}
    about |= {"operating_points": {m: points[m] for m in s.methods}}
    return about | {"rows": rows, "timed": {"m": s.m, "seconds": timed}}, {}


def shipped(erasure) -> dict:
    """Size of the public delta or adapters, and of the keys."""
    public = [*(erasure.delta | erasure.adapters).values()]
    keys = [half for key in erasure.keys.values() for half in (key.k, key.v)]
    return {
        "parameters shipped": sum(t.numel() for t in (*public, *keys)),
        "bytes, public": sum(t.numel() * t.element_size() for t in public),
        "bytes, keys": sum(t.numel() * t.element_size() for t in keys),
    }


def timing(world, concept: str, m: int, repeats: int, images: int = 8, steps: int = 10) -> dict:
    """Median seconds of sampling `images` without and with a key of `m` tokens, untrained: its numbers take no time.

    The two take turns, so that other load on the machine falls on both alike.
    """
    import time
    from statistics import median

    from ..attention import initial_prompt
    from ..sampling import sample

    prompts, seeds = [world.prompt(concept)] * images, list(range(images))
    keys = {"without a key": None, "with a key": initial_prompt(world.concept_tokens(concept), m=m)}
    seconds: dict[str, list[float]] = {name: [] for name in keys}
    for turn in range(repeats + 1):
        for name, key in keys.items():
            start = time.perf_counter()
            sample(world, prompts, seeds, key, num_inference_steps=steps)
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def relative_times(record) -> dict[str, float]:
    """Seconds of sampling in percent of those without a key."""
    seconds = record.data["timed"]["seconds"]
    return {name: 100 * each / seconds["without a key"] for name, each in seconds.items()}


def figures(record) -> dict:
    """U-Net evaluations of each method's training, and the time of sampling with a key."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, style, weight

    rows = pd.DataFrame(record.data["rows"]).sort_values("evaluations", kind="stable", ascending=False)
    times = relative_times(record)
    size = {"figsize": (9.4, 0.22 * len(rows) + 1.1), "width_ratios": [2.4, 1]}
    figure, (left, right) = plt.subplots(1, 2, layout="constrained", **size)
    without = rows.evaluations - rows["with gradient"]
    left.barh(rows.method, without, color="#bbbbbb", label="forward only")
    bars = left.barh(rows.method, rows["with gradient"], left=without, color="#444444", label="with gradient")
    left.bar_label(bars, [f"{n:,}" for n in rows.evaluations], padding=3, fontsize=7.5)
    left.set(xlabel="U-Net evaluations of the training", xlim=(0, 1.15 * max(1, rows.evaluations.max())))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.locator_params(axis="x", nbins=6)
    left.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for label, method in zip(left.get_yticklabels(), rows.method):
        label.set(color=style(method)["color"], weight=weight(method))
    bars = right.bar(times.keys(), times.values(), width=0.6, color=["#777777", COLORS["blue"]])
    right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set(ylabel="sampling time, %", ylim=(0, 120), title="cost of a key")
    return {"cost": figure}


def table(record) -> pd.DataFrame:
    """One row a method."""
    rows = pd.DataFrame(record.data["rows"]).set_index("method")
    counts = ["evaluations", "with gradient", "parameters shipped", "peak MB"]
    rows[counts] = rows[counts].astype(int).astype(str)
    for part in ("public", "keys"):
        rows[f"MB, {part}"] = (rows.pop(f"bytes, {part}") / 1e6).map("{:.2f}".format)
    columns = ["evaluations", "with gradient", "seconds", "peak MB", "parameters shipped", "MB, public", "MB, keys"]
    return rows[[*columns, "evaluations a sampling step"]].rename_axis(record.data["split"])
