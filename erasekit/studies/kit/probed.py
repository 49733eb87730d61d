"""The models that probes are measured on: the base, the oracle, and methods at their operating points, each trained once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .cache import cached, settings_dict
from .erasures import make_config, method_points, saved_erasure, train_cached
from .given import is_given

BASE, ORACLE = "base", "oracle"
METHODS = ("esd-x", "ca", "uce", "mace", "adavd", "rece", "age", "stereo", "kpop", "kpop-anchor")
MODELS = (BASE, ORACLE, *METHODS)


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


def probed_models(world, models, concepts, s) -> dict[str, Probed]:
    """Model -> `Probed`, for those of the names that this world has: not every world has an oracle of these concepts.

    `s`: settings with operating_points, training_seed, sampling_steps and training_steps. Raises ValueError for a method
    without an operating point.
    """
    found, points = {}, method_points(s.operating_points, methods_of(models), [concepts], "split")
    for name in models:
        if name == BASE:
            found[name] = untouched_model(world)
        elif name == ORACLE:
            if (oracle := world.oracle(concepts)) is not None:
                found[name] = Probed(world, lambda oracle=oracle: oracle, [ORACLE, list(concepts), oracle.digest()])
        else:
            found[name] = trained_model(world, name, concepts, points[name], s, s.training_seed)
    return found


def methods_of(models) -> list[str]:
    return [name for name in models if name not in (BASE, ORACLE)]


def untouched_model(world) -> Probed:
    from ...evaluation.attack_success import untouched

    return Probed(world, lambda: untouched(world), [BASE])


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


def draw_grids(grids: dict, labels: dict):
    """A heat map for each title: models by settings, as wide as its settings are many. `labels`: what the settings are.

    A gap divides the base and the oracle from the methods.
    """
    import matplotlib.pyplot as plt

    from .plots import heatmap, style, weight

    widths, rows = [grid.shape[1] for grid in grids.values()], next(iter(grids.values())).index
    size = {"figsize": (9.4, 0.25 * len(rows) + 1.6), "width_ratios": widths, "squeeze": False}
    figure, axes = plt.subplots(1, len(grids), sharey=True, layout="constrained", **size)
    for ax, (title, grid) in zip(axes[0], grids.items()):
        # Halves round up, as in the text.
        image = heatmap(ax, grid + 1e-6, "", cmap="cividis", colorbar=False, vmin=0, vmax=100)
        ax.axhline(len(rows) - len(methods_of(rows)) - 0.5, color="white", lw=5)
        ax.set_title(title)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel(labels[title], fontsize=8)
    for label, model in zip(axes[0, 0].get_yticklabels(), grid.index):
        label.set(color=style(model)["color"], weight=weight(model))
    figure.colorbar(image, ax=axes, label="images that show the concept, %", aspect=40)
    return figure
