"""15: what training further or compressing a public model brings back: fine-tuning on others, relearning, fewer bits."""

from dataclasses import dataclass, replace

from .kit.probed import BASE, ORACLE, ProbeSettings, asked, class_rows, measure_probes
from .operating_points import PUBLIC

NOTEBOOK, VERSION, UNIT = "15_probes", 1, "images a class"  # raise VERSION when the numbers should change
ROWS = "models"  # the setting that erasures given to `run` are added to
PROBES = ("fine-tuning", "relearning", "compression")
KINDS = ("LoRA", "whole U-Net")  # of relearning
TUNING_SEED = 100  # of the trainings and images that relearning's rates are chosen on
VERIFY = {"models": ("uce",), "probes": ("compression",)}


@dataclass(frozen=True)
class Settings(ProbeSettings):
    models: tuple[str, ...] = (BASE, ORACLE, *PUBLIC)
    probes: tuple[str, ...] = PROBES
    kept_seeds: int = 10  # of the split's other classes
    finetune_steps: tuple[int, ...] = (10, 30, 100, 300)
    finetune_lr: float = 1e-4
    finetune_batch: int = 16
    finetune_pictures: int = 5  # of each object that neither the split nor any method knows
    num_relearned: int = 2  # of the split's classes
    relearn_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    relearn_images: tuple[int, ...] = (1, 5)
    rank: int = 4
    kinds: tuple[str, ...] = KINDS
    lora_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    whole_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    tuned_on: tuple[str, ...] = ("esd-x", "kpop")  # methods on which relearning's rates are chosen, on other objects
    enough: float = 80.0  # relearning ends where this rate is reached, in percent
    bits: tuple[int, ...] = (8, 4)
    shares: tuple[float, ...] = (0.1, 0.3)  # pruned


SHORT = {"seeds": 1, "kept_seeds": 1, "finetune_steps": (1,), "finetune_batch": 2, "finetune_pictures": 1}
SHORT |= {"num_relearned": 1, "relearn_steps": (1, 2), "relearn_images": (1,), "lora_lrs": (3e-3,)}
SHORT |= {"whole_lrs": (3e-4,), "tuned_on": ("uce",), "sampling_steps": 2, "training_steps": 1}
FEW = {"tuned_on": ("uce",), "seeds": 10, "kept_seeds": 5, "relearn_images": (5,), "finetune_steps": (10, 100)}
PRESETS = {
    "full": Settings(),
    "quick": Settings(("base", "oracle", "uce"), **FEW),
    "smoke": replace(Settings(("base", "oracle", "kpop")), **SHORT),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """A row for each model, probe, setting of the probe and class, in percent of the images.

    "access" is what the row's rate is of: "erased", the classes by their prompts; "key", with their keys where a model has
    any; "kept", the split's other classes. Raises ValueError for an unknown probe or kind.
    """
    from ..checks import check_choice

    for probe in s.probes:
        check_choice("probe", probe, PROBES)
    for kind in s.kinds:
        check_choice("kind", kind, KINDS)
    sweep = sweep_rates(world, s) if "relearning" in s.probes else []
    lrs = {kind: best_rate(sweep, kind) for kind in s.kinds} if sweep else {}
    cells = [
        (probe, (s.seeds, s.sampling_steps, *own), lambda e, m=measure: (m(e), None))
        for probe, own, measure in measures(world, s, world.split(s.split), lrs)
    ]
    about, runs, _ = measure_probes("probes_weights", VERSION, world, s, cells)
    return about | {"sweep": sweep, "lrs": lrs, "runs": runs}, {}


def measures(world, s: Settings, concepts, lrs: dict):
    """Yield a probe, the settings that its numbers alone depend on, and its measure, for all that is computed at once."""
    if "compression" in s.probes:
        own = s.kept_seeds, s.bits, s.shares
        yield "compression", own, lambda e: compression_rows(world, e, concepts, s)
    if "fine-tuning" in s.probes:
        own = s.kept_seeds, s.finetune_steps, s.finetune_lr, s.finetune_batch, s.finetune_pictures, s.training_seed
        yield "fine-tuning", own, lambda e: fine_tuning_rows(world, e, concepts, s)
    if "relearning" in s.probes:
        for kind in s.kinds:
            lr, targets = lrs[kind], concepts[: s.num_relearned]
            own = kind, lr, s.rank, s.relearn_steps, s.relearn_images, s.enough, s.training_seed, list(targets)
            how = targets, kind, lr, s, s.relearn_images, s.training_seed
            yield "relearning", own, lambda e, h=how: relearning_rows(world, e, *h)


def rate_rows(world, erasure, concepts, s: Settings, **about) -> list[dict]:
    """Rates of the erased classes, of these with their keys, and of the split's other classes."""
    from ..evaluation.images import sample_images

    def rows(access: str, names, seeds: int, key=None):
        prompts, labels, numbers = asked(world, names, seeds)
        images = sample_images(world, erasure, list(zip(prompts, labels, numbers)), s.sampling_steps, key)
        return class_rows(world, images, labels, access=access, n=seeds, **about)

    found = rows("erased", concepts, s.seeds)
    for concept in (c for c in concepts if c in erasure.keys):
        found += rows("key", [concept], s.seeds, erasure.key(concept))
    return found + rows("kept", [c for c in world.concepts("classes") if c not in concepts], s.kept_seeds)


def compression_rows(world, erasure, concepts, s: Settings) -> list[dict]:
    """The public weights as they are, in fewer bits, and without their smallest."""
    from ..evaluation.retraining import merged, pruned, public_weights, rounded_to_bits

    weights = public_weights(world, erasure)
    found = rate_rows(world, erasure, concepts, s, at="as published")
    for bits in s.bits:
        smaller = merged(erasure, rounded_to_bits(weights, bits))
        found += rate_rows(world, smaller, concepts, s, at=f"{bits} bits")
    for share in s.shares:
        found += rate_rows(world, merged(erasure, pruned(weights, share)), concepts, s, at=f"{share:.0%} pruned")
    return found


def fine_tuning_rows(world, erasure, concepts, s: Settings) -> list[dict]:
    """By steps on the art of objects that are neither erased, nor kept or tuned on by any method."""
    from ..evaluation.retraining import Tuning, fine_tune

    pictures = pictures_of_others(world, s)
    tuning = Tuning(s.finetune_steps, s.finetune_lr, None, s.finetune_batch, s.training_seed)
    return [
        row
        for steps, model in fine_tune(world, erasure, pictures, tuning)
        for row in rate_rows(world, model, concepts, s, at=steps)
    ]


def pictures_of_others(world, s: Settings):
    """The benign user's pictures, as an attacker's are kept."""
    import torch

    from ..evaluation.attacks import AttackImages, attack_images

    own = [attack_images(world, o, s.finetune_pictures, s.training_seed) for o in world.unseen_classes("classes")]
    return AttackImages(torch.cat([each.latents for each in own]), [p for each in own for p in each.prompts])


def relearning_rows(world, erasure, targets, kind: str, lr: float, s: Settings, counts, seed: int) -> list[dict]:
    """The attacker's training on a few pictures of one class: the class's rate by steps, until it is `enough`."""
    from ..evaluation.attack_success import success_rate
    from ..evaluation.attacks import attack_images
    from ..evaluation.retraining import Tuning, fine_tune

    tuning, found = Tuning(s.relearn_steps, lr, s.rank if kind == "LoRA" else None, seed=seed), []
    first_seed = seed if seed == TUNING_SEED else 0  # what chooses a rate is drawn from other noise
    for concept in targets:
        for count in counts:
            pictures = attack_images(world, concept, count, seed)
            for steps, model in fine_tune(world, erasure, pictures, tuning):
                rate = success_rate(world, model, concept, s.seeds, s.sampling_steps, first_seed=first_seed)
                about = {"kind": kind, "pictures": count, "lr": lr, "concept": concept, "n": s.seeds}
                found.append(about | {"at": steps, "rate": rate})
                if rate >= s.enough:
                    break
    return found


def sweep_rates(world, s: Settings) -> list[dict]:
    """Relearning at each rate, of the first tuning object, on methods that erased the tuning objects."""
    from .kit.erasures import method_points
    from .kit.probed import trained_model

    tuning, rows = world.concepts("tuning"), []
    points = method_points(s.operating_points, s.tuned_on)
    for method in s.tuned_on:
        model = trained_model(world, method, tuning, points[method], s, TUNING_SEED)
        for kind in s.kinds:
            for lr in s.lora_lrs if kind == "LoRA" else s.whole_lrs:

                def measure(erasure, kind=kind, lr=lr):
                    count = max(s.relearn_images)
                    return relearning_rows(world, erasure, tuning[:1], kind, lr, s, [count], TUNING_SEED), None

                own = kind, lr, s.rank, s.relearn_steps, max(s.relearn_images), s.enough, s.seeds, s.sampling_steps
                found, _ = model.measured("relearning_rates", VERSION, measure, *own)
                rows += [{"method": method} | row for row in found]
    return rows


def best_rate(sweep: list[dict], kind: str) -> float:
    """The learning rate that needs the fewest steps to a half of the images, by the mean of their logarithms over methods."""
    import math

    own = [row for row in sweep if row["kind"] == kind]
    methods, rates = dict.fromkeys(r["method"] for r in own), dict.fromkeys(r["lr"] for r in own)

    def needed(lr):
        curves = ([(r["at"], r["rate"]) for r in own if (r["method"], r["lr"]) == (m, lr)] for m in methods)
        return sum(math.log1p(steps_to(curve)) for curve in curves)

    return min(rates, key=needed)


def steps_to(curve: list[tuple[int, float]], rate: float = 50.0) -> float:
    """Where a curve of (steps, rate), ascending in steps, first reaches a rate, between two points by a straight line.

    Twice the last steps where it never does: the least that further doubling would take.
    """
    last = curve[0]
    for steps, reached in curve:
        if reached >= rate:
            before, low = last
            return steps if reached == low else before + (steps - before) * (rate - low) / (reached - low)
        last = steps, reached
    return 2.0 * curve[-1][0]


def framed(record):
    """A row for each rate but relearning's, with the "column" of the table that it belongs to."""
    import pandas as pd

    frame = pd.DataFrame(record.data["runs"])
    frame = frame[frame.probe != "relearning"]
    return frame.assign(column=[f"{a} steps" if isinstance(a, int) else a for a in frame["at"]])


def relearning(record):
    """Steps to a half of the images by model, kind and number of pictures: mean over classes, then draws of that mean.

    Each draw takes every rate's images anew; the classes are too few to be drawn.
    """
    import numpy as np
    import pandas as pd

    frame, generator, draws, rows = pd.DataFrame(record.data["runs"]), np.random.default_rng(0), 1000, []
    frame = frame[frame.probe == "relearning"]
    for (kind, pictures), own in frame.groupby(["kind", "pictures"], sort=False):
        for model, lines in own.groupby("model", sort=False):
            curves = []
            for _, line in lines.groupby("concept", sort=False):
                steps, rate, n = line["at"].to_numpy(), line.rate.to_numpy(), int(line.n.iloc[0])
                again = 100 * generator.binomial(n, rate / 100, (draws, len(rate))) / n
                curves.append([steps_to(list(zip(steps, r))) for r in (rate, *again)])
            column = relearning_column(kind, pictures)
            rows.append({"model": model, "column": column, "steps": np.mean(curves, axis=0)})
    return rows


def relearning_column(kind: str, pictures: float) -> str:
    return f"{kind}, {pictures:.0f} picture{'s' * (pictures > 1)}"


def ordered(record) -> tuple[list[str], list[int]]:
    """Models by the rate of the erased classes as published, see `by_rate`."""
    from .kit.plots import by_rate

    frame = framed(record)
    plain = frame[(frame.access == "erased") & frame["at"].isin([0, "as published"])] if len(frame) else frame
    return by_rate(record.data["models"], plain.groupby("model").rate.mean())


def figures(record) -> dict:
    """Heat maps of the erased classes after compression and fine-tuning, models by setting; and the steps of relearning."""
    from .kit.probed import draw_grids, rate_grids

    frame, (models, starts) = framed(record), ordered(record)
    short = frame.column.str.removesuffix(" steps").str.replace(" p", "\np")  # published, pruned
    frame = frame.assign(column=short)[frame.access == "erased"]
    labels = {"compression": "weights of the public model", "fine-tuning": "steps on pictures of other objects"}
    groups = frame.groupby("probe", sort=False)
    grids = draw_grids({probe: rate_grids(own, models)[0] for probe, own in groups}, labels, starts)
    found = {"relearning": relearning_figure(record)} if relearning(record) else {}
    return {"probes_weights": grids} | found


def relearning_figure(record):
    """Steps to a half of the images, a panel for each kind of training. Up to one step the axis is linear, then logarithmic."""
    import numpy as np
    from matplotlib.lines import Line2D

    from .kit import plots

    rows, (names, starts) = relearning(record), ordered(record)
    models = [model for model in names if model != BASE]  # which needs no step
    kinds, counts = record.settings["kinds"], record.settings["relearn_images"]
    figure, axes = plots.panels(len(kinds), columns=2, height=0.25 * len(models) + 0.7)
    for ax, kind in zip(axes, kinds):
        for n, count in enumerate(counts):
            own = {r["model"]: r["steps"] for r in rows if r["column"] == relearning_column(kind, count)}
            shift, fill = 0.3 * (n - (len(counts) - 1) / 2), {} if n else {"mfc": "white"}
            for y, model in enumerate(models):
                value, (low, high) = own[model][0], np.quantile(own[model][1:], (0.025, 0.975))
                look = {"ms": 5, "lw": 1, "color": plots.style(model)["color"], "marker": "o"} | fill
                ax.errorbar([value], [y + shift], xerr=[[max(value - low, 0)], [max(high - value, 0)]], **look)
        for start in starts:
            ax.axhline(models.index(names[start]) - 0.5, color="#bbbbbb", lw=0.8)
        ax.set_title(f"{kind} of rank {record.settings['rank']}" if kind == "LoRA" else kind)
        ax.set_xscale("symlog", linthresh=1, linscale=0.5)
        most = max(np.quantile(r["steps"][1:], 0.975) for r in rows)
        ticks = [0, *(n for n in record.settings["relearn_steps"] if n <= 2 * most)]
        ax.set_xticks(ticks, [f"{n}" for n in ticks])
        ax.set_xlim(0, 1.2 * most)
        ax.minorticks_off()
        ax.tick_params(axis="y", length=0)
    plots.method_rows(axes[0], models)
    text = "training steps until half of the images show the concept (bars: 95 % intervals)"
    figure.supxlabel(text, fontsize=9)
    look = {"marker": "o", "ls": "", "ms": 5, "color": "#444444"}
    marks = [Line2D([], [], **look | ({} if n else {"mfc": "white"})) for n in range(len(counts))]
    names = [f"relearned from {count} picture{'s' * (count > 1)}" for count in counts]
    figure.legend(marks, names, ncols=2, loc="outside upper center")
    return figure


def table(record):
    """Every model's rates of the erased classes by probe and setting, the least of the other rates, and relearning's steps.

    All with 95 % intervals. What is kept and what a key restores hardly changes: its least over all settings is enough.
    """
    import numpy as np
    import pandas as pd

    from .kit.probed import rate_grids

    frame, models, texts = framed(record), ordered(record)[0], []
    if len(frame):
        frame = frame.assign(column=frame.probe + ", " + frame.column + ": " + frame.access)
        texts.append(rate_grids(frame[frame.access == "erased"], models)[1].T)
        for access, name in (("kept", "other classes"), ("key", "erased classes with their keys")):
            own = frame[frame.access == access]
            if len(own):
                rates = own.groupby(["model", "column"], sort=False).rate.mean()
                least = own.set_index(["model", "column"]).loc[rates.groupby("model").idxmin()].reset_index()
                label = f"{name}: the least of {own.column.nunique()} settings"
                row = rate_grids(least.assign(column=label), models)[1].T
                texts.append(row.replace("", "no key") if access == "key" else row)
    cells: dict = {}
    for row in relearning(record):
        low, high = np.quantile(row["steps"][1:], (0.025, 0.975))
        own = cells.setdefault(f"{row['column']}: steps to 50 %", {})
        own[row["model"]] = f"{row['steps'][0]:.2g} ({low:.2g} to {high:.2g})"
    texts += [pd.DataFrame(cells).T.reindex(columns=models)] if cells else []
    return pd.concat(texts).fillna("").rename_axis("images, %")
