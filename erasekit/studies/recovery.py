"""09: who gets an erased concept back: the right key, wrong keys, and attackers who optimize a key or word embeddings."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "09_recovery", 1, "images a class"
ROWS = "methods"  # the setting that erasures given to `run` are added to
# With these the sweep chooses the learning rates of preset full.
VERIFY = {
    "methods": ("kpop",),
    "cases": ("objects",),
    "tuned_on": ("esd-x",),
    "budgets": (10, 50),
    "attack_images": (5,),
}

# Case -> the study that chose its operating points.
CASES = {"objects": "operating_points", "category": "operating_points", "style": "style_operating_points"}
METHODS = ("kpop", "kpop-anchor", "esd-x", "uce", "speed", "oce", "adavd", "ace", "ant", "stereo", "race")
SEARCHES = ("optimized key", "textual inversion")
WEIGHTED = "right key, weighted"  # its rows have a log_weight
STRIP_IMAGES = 5  # that a record keeps for each log-weight
NUM_NAMED = 3  # methods that the figure of attack steps names beside the base, the oracle and ours


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHODS
    cases: tuple[str, ...] = tuple(CASES)
    num_attacked: int = 2  # of the objects erased at once
    style: str = "fluent"
    operating_points: dict | None = None  # by method, for all cases; None: of the records of the studies in CASES
    budgets: tuple[int, ...] = (10, 50, 200)  # attack steps
    attack_lrs: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    tuned_on: tuple[str, ...] = ("esd-x", "kpop")  # methods on which each attack's learning rate is chosen
    attack_images: tuple[int, ...] = (1, 5)
    log_weights: tuple[int, ...] = (-8, -6, -5, -4, -3, -2, -1, 0, 1, 2)
    num_random_keys: int = 3
    seeds: int = 25
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


QUICK = Settings(
    ("kpop", "esd-x"), ("objects",), budgets=(10, 50), attack_lrs=(1e-2, 3e-2), tuned_on=("kpop",), seeds=10
)
SHORT = {"budgets": (1,), "attack_lrs": (1e-2,), "log_weights": (0,), "num_random_keys": 1}
SHORT |= {"seeds": 1, "sampling_steps": 2, "training_steps": 1}
PRESETS = {
    "smoke": replace(QUICK, methods=("kpop",), attack_images=(1,), **SHORT),
    "quick": replace(QUICK, attack_images=(5,)),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For the base and each method, case and concept: the share of images that show the concept, in percent, by access.

    Step 0 of a search is its start: the concept's own tokens, as an untrained key or as repeated word embeddings. Images: for
    each method with keys and each case, the first concept without its key, then with it at each log-weight.
    """
    from tqdm.auto import tqdm

    from ..evaluation.attack_success import references
    from ..evaluation.attacks import Attack
    from .kit.attack_sweep import best_lr, sweep_learning_rates
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points, train_cached
    from .kit.given import erases, is_given

    five = world.concepts("S1")
    erased = {"objects": five, "category": (world.category,), "style": (s.style,)}  # at once
    studies, points = dict.fromkeys(["operating_points", *(CASES[case] for case in s.cases)]), {}
    for study in studies:
        methods = *s.methods, *(s.tuned_on if study == "operating_points" else ())
        groups = [erased[case] for case in s.cases]
        points[study] = method_points(s.operating_points, methods, groups, "cases", study)
    attack = Attack(budgets=tuple(s.budgets), seed=s.training_seed)
    sizes = max(s.attack_images), s.seeds, s.sampling_steps, s.training_steps
    sweep = sweep_learning_rates(world, s.tuned_on, points["operating_points"], s.attack_lrs, SEARCHES, attack, *sizes)
    lrs = {search: best_lr(sweep, search) for search in SEARCHES}
    attacks = {search: replace(attack, lr=lr) for search, lr in lrs.items()}
    sizes = s.budgets, lrs, s.attack_images, s.log_weights, s.num_random_keys
    sizes += s.seeds, s.training_seed, s.sampling_steps

    runs, images = [], {}
    for case in s.cases:
        concepts = erased[case]
        targets = concepts[: s.num_attacked]

        for name, model in references(world, concepts).items():

            def untrained(model=model, targets=targets):
                return {"rows": success_rows(world, s, attacks, model, None, targets)}, None

            numbers, _ = cached("recovery", VERSION, world, untrained, name, model.digest(), list(targets), *sizes)
            runs += [{"case": case, "method": name} | row for row in numbers["rows"]]
        for method in tqdm([m for m in s.methods if erases(m, concepts)], desc=f"recovery, {case}"):
            point = points[CASES[case]][method]
            config = make_config(world, method, s.training_seed, s.sampling_steps, point["settings"], s.training_steps)
            model = world, concepts, method, config, point["scale"]

            def measure(erasure, method=method, targets=targets, config=config, model=model):
                if not erasure.keys:
                    return {"rows": success_rows(world, s, attacks, erasure, None, targets)}, None
                *same, _, scale = model
                other = None
                if not is_given(method):
                    other, _ = train_cached(*same, replace(config, seed=config.seed + 1), scale)
                rows = success_rows(world, s, attacks, erasure, other, targets)
                return {"rows": rows}, weight_strip(world, s, erasure, targets[0])

            numbers, strip = measured("recovery", VERSION, *model, measure, list(targets), *sizes)
            runs += [{"case": case, "method": method} | row for row in numbers["rows"]]
            images |= {f"{case}.{method}": strip} if strip else {}
    used = {study: {m: p for m, p in own.items() if m in (*s.methods, *s.tuned_on)} for study, own in points.items()}
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "operating_points": used}
    return about | {"attack_lrs": lrs, "sweep": sweep, "log_weights": list(s.log_weights), "runs": runs}, images


def success_rows(world, s: Settings, attacks: dict, erasure, other, targets) -> list[dict]:
    """Success rates on a public model by target and access. `other`: that of another training seed, or None."""
    from ..evaluation.attack_success import success_rate

    rows = []
    for concept in targets:
        for access, images, steps, key in accesses(world, s, attacks, erasure, other, concept):
            rate = success_rate(world, erasure, concept, s.seeds, s.sampling_steps, key)
            row = {"concept": concept, "access": access, "images": images, "steps": steps, "rate": rate}
            rows.append(row | ({"log_weight": key.log_weight} if access == WEIGHTED else {}))
    return rows


def accesses(world, s: Settings, attacks: dict, erasure, other, concept: str):
    """Yield (access, attacker's images, attack steps, key or word embeddings); see `success_rows`."""
    from ..attention import initial_prompt
    from ..checkpoints import seeded
    from ..evaluation.attack_success import ATTACKS
    from ..evaluation.attacks import attack_images, random_key

    yield "no key", 0, 0, None
    with erasure.applied(world.pipe):
        start = initial_prompt(world.concept_tokens(concept).float(), attacks["optimized key"].m)
    yield "concept tokens as key", 0, 0, start
    if erasure.keys:
        key = erasure.key(concept)
        yield "right key", 0, 0, key
        for name in [c for c in erasure.keys if c != concept][:1]:
            yield "another concept's key", 0, 0, erasure.key(name)
        if other:
            yield "key of another seed", 0, 0, other.key(concept)
        for n in range(s.num_random_keys):
            yield "random key", 0, 0, random_key(key, seeded("random key", concept, n))
        for weight in s.log_weights:
            yield WEIGHTED, 0, 0, replace(key, log_weight=float(weight))
    for count in s.attack_images:
        images = attack_images(world, concept, count, s.training_seed)
        for name, attack in attacks.items():
            for steps, found in ATTACKS[name][0](world, erasure, concept, images, attack).items():
                yield name, count, steps, found


def weight_strip(world, s: Settings, erasure, concept: str):
    """Images of a concept without its key, then with the key at each log-weight, as one strip."""
    import torch

    from ..evaluation.attack_success import prompts
    from ..evaluation.images import image_strip, sample_images

    key, triples = erasure.key(concept), [(text, concept, n) for text, n in zip(*prompts(world, concept, STRIP_IMAGES))]
    keys = [replace(key, log_weight=float(weight)) for weight in (-np.inf, *s.log_weights)]
    return image_strip(torch.cat([sample_images(world, erasure, triples, s.sampling_steps, k) for k in keys]))


def weighted_tiles(record, name: str) -> list[list[np.ndarray]]:
    """The images of a strip by the key's weight: a list for no key, then one for each log-weight."""
    from .kit.plots import tiles

    images, count = tiles(record, name), 1 + len(record.data["log_weights"])
    each = len(images) // count
    return [images[n * each : (n + 1) * each] for n in range(count)]


def rates(record) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row a rate: first those of all accesses but keys at other log-weights, then those."""
    rows = pd.DataFrame(record.data["runs"])
    return rows[rows.access != WEIGHTED], rows[rows.access == WEIGHTED]


def access_grid(frame: pd.DataFrame, images: int | None = None) -> pd.DataFrame:
    """Mean rates by case and method, and by access; of attacks those after the most steps, which a column names.

    As text with their intervals where `images` says how many are behind each row, see `rate_table`.
    """
    from .kit.attack_sweep import rate_table

    steps = frame.steps.max()
    last = frame[(frame.steps == steps) | (frame.images == 0)]
    after = f"{steps} step{'s' if steps > 1 else ''}"
    names = [f"{name}, {after}, {plural(n)}" if n else name for name, n in zip(last.access, last.images)]
    last = last.assign(access=names)
    order = list(dict.fromkeys(last.sort_values("images", kind="stable").access))
    where = {"index": ["case", "method"], "columns": "access"}
    grid = rate_table(last, images, **where) if images else last.pivot_table(values="rate", sort=False, **where)
    rows = [(case, method) for case, (methods, _) in ordered(frame).items() for method in methods]
    return grid.reindex(index=pd.MultiIndex.from_tuples(rows, names=grid.index.names), columns=order)


def ordered(frame: pd.DataFrame) -> dict[str, tuple[list[str], list[int]]]:
    """Case -> methods by the rate without a key, see `by_rate`."""
    from .kit.plots import by_rate

    plain = frame[frame.access == "no key"].groupby(["case", "method"], sort=False).rate.mean()
    return {case: by_rate(list(plain[case].index), plain[case]) for case in frame.case.unique()}


def plural(images: int) -> str:
    return f"{images} image{'s' if images > 1 else ''}"


def figures(record) -> dict:
    frame, weighted = rates(record)
    drawn = {"recovery": _draw_grid(frame), "recovery_budget": _draw_budget(frame)}
    return drawn | ({"recovery_strength": _draw_weights(record, frame, weighted)} if len(weighted) else {})


def _draw_grid(frame: pd.DataFrame):
    """A heat map for each case: methods by access. Dashes: there is no such key."""
    import textwrap

    import matplotlib.pyplot as plt

    from .kit.plots import heatmap, rows_with_gaps

    grid, groups = access_grid(frame), ordered(frame)
    cases, count = list(groups), grid.groupby(level=0).size()
    sizes = {"figsize": (9.4, 0.2 * len(grid) + 0.15 * len(cases) + 1.2), "height_ratios": count[cases]}
    figure, axes = plt.subplots(len(cases), 1, layout="constrained", squeeze=False, **sizes)
    for ax, case in zip(axes[:, 0], cases):
        own = grid.loc[case]
        # Halves round up, as in the text.
        image = heatmap(ax, own + 1e-6, "", cmap="cividis", colorbar=False, vmin=0, vmax=100)
        for y, x in np.argwhere(own.isna().to_numpy()):
            ax.text(x, y, "–", ha="center", va="center", color="#999999")
        rows_with_gaps(ax, *groups[case])
        ax.set_ylabel(case, weight="bold")
        ax.xaxis.tick_top()
        names = ["\n".join(textwrap.fill(part, 10) for part in name.split(", ")) for name in own]
        ax.set_xticks(ax.get_xticks(), names if case == cases[0] else [])
    figure.colorbar(image, ax=axes[:, 0], label="images that show the concept, %", aspect=40, pad=0.01)
    note = "Above each first gap: shown in more than 50 % of the images without a key. Below: hidden in at least 50 %."
    figure.supxlabel(note, fontsize=8)
    return figure


def _draw_budget(frame: pd.DataFrame):
    """Success against attack steps: a row for each attack and number of its images, a column for each case.

    Named are the references, ours, and the three others with the lowest mean rate after an attack.
    """
    from .kit.plots import is_ours, panels, style

    cases, methods = list(frame.case.unique()), list(frame.method.unique())
    success = frame[frame.steps > 0].groupby("method").rate.mean()
    others = [m for m in methods if m not in ("base", "oracle") and not is_ours(m)]
    named = [m for m in methods if m not in others] + sorted(others, key=lambda m: success[m])[:NUM_NAMED]
    rows = [(search, count) for search in SEARCHES for count in sorted(set(frame.images) - {0})]
    figure, axes = panels(len(rows) * len(cases), columns=len(cases), height=1.65)
    for n, ax in enumerate(axes):
        (search, count), case = rows[n // len(cases)], cases[n % len(cases)]
        own = frame[(frame.access == search) & (frame.images == count) & (frame.case == case)]
        for method, rates in own.groupby("method", sort=False):
            line = rates.groupby("steps").rate.mean()
            if method not in named:
                ax.plot(range(len(line)), line, color="#cccccc", lw=1, zorder=1, label="other methods")
                continue
            look = style(method) | {"lw": 2 if is_ours(method) else 1.2, "ls": ":" if method == "base" else "-"}
            # Later markers are smaller, so that none covers another.
            size = 4.5 + 0.8 * (len(named) - 1 - named.index(method))
            ax.plot(range(len(line)), line, ms=size, label=method, **look)
        ax.set_xticks(range(len(line)), line.index)
        ax.set_title("" if n // len(cases) else case)
        if not n % len(cases):
            ax.set(ylabel=f"{search},\n{plural(count)}", ylim=(-6, 106))
    figure.supxlabel("attack steps", fontsize=9)
    figure.supylabel("images that show the concept, %", fontsize=9)
    legend = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))
    names = sorted(legend, key=lambda name: name == "other methods")  # once, and last
    figure.legend([legend[name] for name in names], names, loc="outside right center")
    return figure


def _draw_weights(record, frame: pd.DataFrame, weighted: pd.DataFrame):
    """For each case, success against the key's log-weight from no key on, over an image of the first method at each weight."""
    import matplotlib.pyplot as plt

    from .kit.plots import percent_axis, show_image, style

    weights, cases = record.data["log_weights"], list(weighted.case.unique())
    figure = plt.figure(figsize=(9.4, 2.1 * len(cases) + 0.5), layout="constrained")
    grid = figure.add_gridspec(2 * len(cases), 1 + len(weights), height_ratios=[1.5, 1] * len(cases))
    for row, case in enumerate(cases):
        ax, own = figure.add_subplot(grid[2 * row, :]), weighted[weighted.case == case]
        for method, rows in own.groupby("method", sort=False):
            no_key = frame[(frame.case == case) & (frame.method == method) & (frame.access == "no key")].rate.mean()
            line = [no_key, *rows.groupby("log_weight").rate.mean().reindex(weights)]
            ax.plot(line, ms=5, label=method, **style(method))
        ax.set_xticks(range(1 + len(weights)), ["no key", *(f"{w:+g}" if w else "0 (as trained)" for w in weights)])
        ax.set_xlim(-0.5, len(weights) + 0.5)
        ax.set_title(case, loc="left", weight="bold")
        percent_axis(ax, "y", "images with\nthe concept, %", (-6, 106))
        first = own.method.iloc[0]
        for column, images in enumerate(weighted_tiles(record, f"{case}.{first}")):
            cell = figure.add_subplot(grid[2 * row + 1, column])
            show_image(cell, images[0])
            cell.set_ylabel("" if column else first, color=style(first)["color"], weight="bold")
    figure.supxlabel("log-weight of the key in attention", fontsize=9)
    figure.legend(*ax.get_legend_handles_labels(), ncols=2, loc="outside upper center")
    return figure


def table(record) -> pd.DataFrame:
    """Rates by access, with 95 % intervals; blank where a method has no such key."""
    grid = access_grid(rates(record)[0], record.data["N"])
    grid.index = [f"{case}: {method}" for case, method in grid.index]
    return grid.fillna("").rename_axis("images that show the concept, %")
