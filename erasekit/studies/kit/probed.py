"""What the studies of probes share: their settings, the models they measure, each trained once, and tables of their rates.

The models are the base, the oracle, and methods at their operating points.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .cache import cached, settings_dict
from .erasures import make_config, method_points, saved_erasure, train_cached
from .given import is_given

BASE, ORACLE = "base", "oracle"


@dataclass(frozen=True)
class ProbeSettings:
    models: tuple[str, ...] = ()  # base, oracle and methods, each study's own
    probes: tuple[str, ...] = ()  # each study's own
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"  # or classes by name
    seeds: int = 25
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


@dataclass
class Probed:
    """A model by name, its erasure when that is first needed, and what decides it, for the names of its cells."""

    world: object
    make: Callable
    parts: list

    @cached_property
    def erasure(self):
        return self.make()

    def measured(self, study: str, version: int, measure: Callable, *parts):
        """The rows of `measure(erasure)`, and its image, cached under the model and `parts`."""

        def compute():
            rows, image = measure(self.erasure)
            return {"rows": rows}, image

        numbers, image = cached(study, version, self.world, compute, *self.parts, *parts)
        return numbers["rows"], image


def measure_probes(study: str, version: int, world, s: ProbeSettings, cells) -> tuple[dict, list[dict], dict]:
    """What a record says of its models; a row for each model, probe, setting and class; each probe's images, one a model.

    `cells`: what is computed at once, each a probe, the settings that its numbers depend on, and `measure(erasure)`.
    """
    from tqdm.auto import tqdm

    concepts, runs, images = world.split(s.split), [], {}
    for name, model in tqdm(probed_models(world, s.models, concepts, s).items(), desc=study):
        for probe, parts, measure in cells:
            rows, image = model.measured(study, version, measure, probe, *parts)
            runs += [{"model": name, "probe": probe} | row for row in rows]
            images.setdefault(probe, []).append(image)
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "erased": list(concepts)}
    return about | {"models": list(dict.fromkeys(run["model"] for run in runs))}, runs, images


def asked(world, concepts, seeds: int) -> tuple[list[str], list[str], list[int]]:
    """Prompts, labels and seeds: each concept by each seed."""
    labels = [c for c in concepts for _ in range(seeds)]
    return [world.prompt(c) for c in labels], labels, list(range(seeds)) * len(concepts)


def class_rows(world, images, labels: list[str], **about) -> list[dict]:
    """A row for each class: in how many percent of its images the judge sees it first."""
    from ...evaluation.metrics import object_correct, percent

    correct = object_correct(world, images, labels)
    return [about | {"concept": c, "rate": percent(correct[where(labels, c)])} for c in dict.fromkeys(labels)]


def where(labels: list[str], concept: str) -> list[int]:
    return [n for n, label in enumerate(labels) if label == concept]


def probed_models(world, models, concepts, s) -> dict[str, Probed]:
    """Model -> `Probed`, for those of the names that this world has: not every world has an oracle of these concepts.

    Raises ValueError for a method without an operating point.
    """
    from ...evaluation.attack_success import references

    methods, found = methods_of(models), {}
    points, fixed = method_points(s.operating_points, methods, [concepts], "split"), references(world, concepts)
    for name in models:
        if name in methods:
            found[name] = trained_model(world, name, concepts, points[name], s, s.training_seed)
        elif name in fixed:
            parts = [ORACLE, list(concepts), fixed[ORACLE].digest()] if name == ORACLE else [BASE]
            found[name] = Probed(world, lambda name=name: fixed[name], parts)
    return found


def methods_of(models) -> list[str]:
    return [name for name in models if name not in (BASE, ORACLE)]


def trained_model(world, method: str, concepts, point: dict, s, seed: int) -> Probed:
    """A method at its operating point. Several studies and processes probe it, so it is saved in the build folder."""
    from ...baselines import METHODS as REGISTERED

    config = make_config(world, method, seed, s.sampling_steps, point["settings"], s.training_steps)
    scale = point["scale"]

    def make():
        if is_given(method):
            return train_cached(world, concepts, method, config, scale)[0]
        erasure, _ = saved_erasure(world, list(concepts), config, REGISTERED[method].function)
        return erasure if scale == 1 else erasure.scaled(world, scale)

    return Probed(world, make, [method, list(concepts), settings_dict(config), scale])


def rate_grids(frame, models) -> tuple:
    """Mean rates by model and "column", as numbers, and as text with their 95 % intervals over classes and images."""
    from ...evaluation.intervals import bootstrap

    def cell(rows) -> str:
        low, high = bootstrap([rows.rate.to_numpy()], int(rows.n.iloc[0]))
        return f"{rows.rate.mean():.1f} ({low:.0f} to {high:.0f})"

    order = list(dict.fromkeys(frame["column"]))
    groups = frame.groupby(["model", "column"], sort=False)
    numbers = groups.rate.mean().unstack().reindex(index=models, columns=order)
    texts = groups[["rate", "n"]].apply(cell).unstack().reindex(index=models, columns=order)
    return numbers, texts.fillna("")


def draw_grids(grids: dict, labels: dict, starts: list[int]):
    """A heat map for each title: models by settings, as wide as its settings are many. `labels`: what the settings are.

    Gaps are before the rows of `starts`, see `by_rate`.
    """
    import matplotlib.pyplot as plt

    from .plots import heatmap, rows_with_gaps

    widths, models = [grid.shape[1] for grid in grids.values()], list(next(iter(grids.values())).index)
    size = {"figsize": (9.4, 0.25 * len(models) + 1.7), "width_ratios": widths, "squeeze": False}
    figure, axes = plt.subplots(1, len(grids), sharey=True, layout="constrained", **size)
    for ax, (title, grid) in zip(axes[0], grids.items()):
        # Halves round up, as in the text.
        image = heatmap(ax, grid + 1e-6, "", cmap="cividis", colorbar=False, vmin=0, vmax=100)
        rows_with_gaps(ax, models, starts)
        ax.set_title(title)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel(labels[title], fontsize=8)
    figure.colorbar(image, ax=axes, label="images that show the concept, %", aspect=40, pad=0.01)
    note = "Above the first gap: shown in more than 50 % of the images without a probe. Below: hidden in at least 50 %."
    figure.supxlabel(note, fontsize=8)
    return figure
