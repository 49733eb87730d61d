"""01: a model that never saw five classes: does it draw them, is it otherwise as good, and how fast does it learn them?

The oracle is the world's U-Net trained without split S1. What an attack reaches on it is the floor of every attack.
"""

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "01_world", 1, "images a class"

WORLD, LEFT_OUT = "emojinette", "S1"
MODELS = {"base": {}, "second base": {"seed": 1}, "oracle": {"without": LEFT_OUT}}  # name -> options of `load`
BY_NAME, STYLED, HELD_OUT = f"{LEFT_OUT}, by name", "kept objects in each style", "pairs never trained on"
PER_CLASS = (BY_NAME, f"{LEFT_OUT}, seen synonyms", f"{LEFT_OUT}, unseen words", "the other five classes")
GROUPS = (*PER_CLASS, "all other objects", STYLED, HELD_OUT)
DASHES = {
    "textual inversion": "-",
    "optimized key": "--",
}  # new words in the prompt, and a learnable prompt in attention
SEARCHES = tuple(DASHES)
VERIFY = {"groups": GROUPS, "models": ("oracle",), "searches": ()}
SHOWN = 3  # images of each class that a record keeps, for each model


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = tuple(MODELS)
    classes: tuple[str, ...] | None = None  # of S1; None: all five
    groups: tuple[str, ...] = GROUPS
    searches: tuple[str, ...] = SEARCHES
    seeds: int = 50  # of a class by its name
    word_seeds: int = 10  # of each synonym and unseen word
    few_seeds: int = 4  # of each other object and held-out pair
    objects: int = 1000  # other objects, and held-out pairs, at most
    budgets: tuple[int, ...] = (10, 50, 200)  # attack steps
    attack_lrs: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    attack_seeds: tuple[int, ...] = (0,)  # each with pictures, and order and noise of training, of its own
    attack_images: int = 5
    judged: int = 20  # images after each attack
    sampling_steps: int = 15


QUICK = Settings(seeds=20, word_seeds=4, few_seeds=1, budgets=(10, 50), attack_seeds=(0,), judged=10)
SHORT = {"seeds": 1, "word_seeds": 1, "objects": 2, "budgets": (2,), "attack_lrs": (1e-2,), "judged": 1}
PRESETS = {"smoke": replace(QUICK, classes=("church",), sampling_steps=2, **SHORT), "quick": QUICK, "full": Settings()}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent by model, group and unit, a word, object or pair; and by attack, class, seed and steps.

    Images: for each model, the first seeds of each class of S1. Raises ValueError for a world that has no oracle.
    """
    from PIL import Image
    from tqdm.auto import tqdm

    from .kit.attack_sweep import best_lr
    from .kit.cache import cached

    check(world, s)
    models = {name: load_model(world, name) for name in s.models}
    asked, sizes, strips, runs, attacks, sweep = questions(world, s), {}, {}, [], [], []
    for group in s.groups:
        units, seeds = asked[group]
        sizes[group] = {"units": [name for name, _ in units], "images": seeds * len(units[0][1])}

    for name, model in tqdm(models.items(), desc="rates"):
        for group in s.groups:
            units, seeds = asked[group]
            found = {measure: [] for measure in ("top-1", "top-5", "style")}
            for part in parts(units, group in PER_CLASS):

                def measure(model=model, part=part, seeds=seeds):
                    return judged_units(model, part, seeds, s.sampling_steps)

                about = "rates", part, seeds, s.sampling_steps, model.sampler
                numbers, strip = cached("oracle", VERSION, model, measure, *about)
                for key, rates in numbers.items():
                    found[key] += rates
                if group == BY_NAME:
                    strips.setdefault(name, []).append(np.asarray(strip))
            runs.append({"model": name, "group": group} | {key: rates for key, rates in found.items() if rates})

    if s.searches and len(s.attack_lrs) > 1:
        # On a class that is reported, as the oracle knows all others, but with pictures, training and images of other seeds.
        sweep = sweep_rates(models.get("oracle") or load_model(world, "oracle"), s)
    lrs = {search: best_lr(sweep, search) if sweep else s.attack_lrs[0] for search in s.searches}
    for name, model in tqdm(models.items(), desc="attacks"):
        for search in s.searches:
            for concept in classes(world, s):
                for seed in s.attack_seeds:
                    row = {"model": name, "attack": search, "concept": concept, "attack_seed": seed}
                    attacks += [row | found for found in learned(model, s, search, concept, seed, lrs[search])]
    data = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": len(s.attack_seeds)}
    data |= {"models": {name: identity(name, model) for name, model in models.items()}}
    data |= {"objects": len(world.judge.objects), "groups": sizes, "runs": runs}
    data |= {"attack_lrs": lrs, "sweep": sweep, "attacks": attacks, "judged": s.judged}
    return data, {name: Image.fromarray(np.hstack(own)) for name, own in strips.items()}


def check(world, s: Settings) -> None:
    """Raise ValueError for a world that has no oracle, and for an unknown model, class, group or search."""
    from ..checks import check_choice

    if world.name != WORLD:
        raise ValueError(f"{world.name!r} has no model trained without {LEFT_OUT}: the study 'oracle' accepts {WORLD}")
    for name, values, accepted in (
        ("model", s.models, MODELS),
        ("class", s.classes or (), world.concepts(LEFT_OUT)),
        ("group", s.groups, GROUPS),
        ("search", s.searches, SEARCHES),
    ):
        for value in values:
            check_choice(name, value, accepted)


def load_model(world, name: str):
    """One of `MODELS` on the world's device and in its precision; the base is the world itself."""
    from ..worlds import load

    return load(world.name, str(world.pipe.device), world.precision, **MODELS[name]) if MODELS[name] else world


def identity(name: str, model) -> dict:
    """The hashes of a model and its U-Net, and how the U-Net was trained."""
    from ..worlds.emojinette import oracles

    how = MODELS[name]
    about = oracles.folder(oracles.names(how.get("without", ())), how.get("seed", 0)) / "training.json"
    training = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
    return {"pipeline_hash": model.pipeline_hash, "unet": model.fingerprint, "training": training}


def classes(world, s: Settings) -> tuple[str, ...]:
    return s.classes or world.concepts(LEFT_OUT)


def questions(world, s: Settings) -> dict[str, tuple[list, int]]:
    """Group -> units and seeds of each. A unit is its name and its (prompt, object, style or None), as many for each."""
    from ..worlds.emojinette import groups

    five, unseen = classes(world, s), groups.left_out([LEFT_OUT])
    kept = [c for c in world.concepts("classes") if c not in unseen]
    others = [o for o in world.concepts("all") if o not in (*kept, *unseen)][: s.objects]
    pairs = [(o, style) for o, style in world.held_out_pairs() if o not in unseen][: s.objects]
    words = {c: world.synonyms(c) for c in five}

    def plain(asked):
        return [(word, [(world.prompt(word), label, None)]) for word, label in asked]

    def styled(name, pairs):
        return name, [(world.prompt(o, style), o, style) for o, style in pairs]

    units = {
        BY_NAME: (plain((c, c) for c in five), s.seeds),
        PER_CLASS[1]: (plain((w, c) for c in five for w in words[c].seen), s.word_seeds),
        PER_CLASS[2]: (plain((w, c) for c in five for w in words[c].unseen), s.word_seeds),
        PER_CLASS[3]: (plain((c, c) for c in kept), s.seeds),
        "all other objects": (plain((o, o) for o in others), s.few_seeds),
        STYLED: ([styled(o, [(o, style) for style in world.styles]) for o in (*kept, *others)], 1),
        HELD_OUT: ([styled(f"{o}, {style}", [(o, style)]) for o, style in pairs], s.few_seeds),
    }
    return {group: units[group] for group in s.groups}


def parts(units: list, per_class: bool) -> list[list]:
    """The units that are one entry of the cache: those of a class, or all."""
    if not per_class:
        return [units]
    labels = dict.fromkeys(prompts[0][1] for _, prompts in units)
    return [[unit for unit in units if unit[1][0][1] == label] for label in labels]


def judged_units(model, units: list, seeds: int, steps: int):
    """Rates of each unit: the object is the judge's first, or one of its first five, and the style its first. And a strip."""
    from ..evaluation.images import image_strip
    from ..evaluation.metrics import in_top_k, judge_images
    from ..sampling import sample

    rows = [(*prompt, seed) for _, prompts in units for prompt in prompts for seed in range(seeds)]
    prompts, labels, styles, numbers = map(list, zip(*rows))
    images = sample(model, prompts, numbers, num_inference_steps=steps, batch_size=model.batch_size)
    objects, kinds = judge_images(model, images)
    right = {f"top-{k}": in_top_k(objects, model.judge.objects, labels, k) for k in (1, 5)}
    if styles[0]:
        right["style"] = in_top_k(kinds, model.judge.styles, styles)
    rates = {name: 100 * found.float().view(len(units), -1).mean(1) for name, found in right.items()}
    return {name: [round(x, 1) for x in rate.tolist()] for name, rate in rates.items()}, image_strip(images[:SHOWN])


def learned(model, s: Settings, search: str, concept: str, seed: int, lr: float, first_seed: int = 0) -> list[dict]:
    """By attack steps, the rate of images that show a class once new words or a key were learned from a few pictures of it."""
    from ..evaluation.attack_success import ATTACKS, success_rate, untouched
    from ..evaluation.attacks import Attack, attack_images
    from .kit.cache import cached

    attack, (find, before) = Attack(budgets=tuple(s.budgets), lr=lr, seed=seed), ATTACKS[search]

    def measure():
        base, pictures = untouched(model), attack_images(model, concept, s.attack_images, seed)
        results = find(model, base, concept, pictures, attack).items()
        about = model, base, concept, s.judged, s.sampling_steps
        rows = [{"steps": n, "rate": success_rate(*about, found, before, first_seed)} for n, found in results]
        return {"rows": rows}, None

    about = search, concept, asdict(attack), s.attack_images, s.judged, first_seed, s.sampling_steps, model.sampler
    return cached("oracle", VERSION, model, measure, "learned", *about)[0]["rows"]


def sweep_rates(oracle, s: Settings) -> list[dict]:
    """Success on the first class of S1 by search, learning rate and steps."""
    from .kit.attack_sweep import TUNING_SEED

    rows, concept = [], oracle.concepts(LEFT_OUT)[0]
    for search in s.searches:
        for lr in s.attack_lrs:
            found = learned(oracle, s, search, concept, TUNING_SEED, lr, TUNING_SEED)
            rows += [{"attack": search, "lr": lr} | row for row in found]
    return rows


# ---------------------------------------------------------------------------------------------------- figures and table


def rates(record) -> pd.DataFrame:
    """One row a model, group and measure: the mean, its 95 % interval over units and images, and the number of images."""
    from ..evaluation.intervals import bootstrap

    rows = []
    for run in record.data["runs"]:
        images = record.data["groups"][run["group"]]["images"]
        for measure in [m for m in ("top-1", "top-5", "style") if m in run]:
            low, high = bootstrap([np.array(run[measure])], images)
            about = f"{run['group']}: {'style, top-1' if measure == 'style' else measure}"
            about = {"model": run["model"], "group": run["group"], "measure": measure, "about": about}
            mean = float(np.mean(run[measure]))
            rows.append(about | {"rate": mean, "low": low, "high": high, "N": images * len(run[measure])})
    return pd.DataFrame(rows)


def attack_rates(record) -> pd.DataFrame:
    """One row a model, attack and number of steps: the mean over classes and attack seeds, and its 95 % interval."""
    from ..evaluation.intervals import bootstrap

    rows, judged = [], record.data["judged"]
    frame = pd.DataFrame(record.data["attacks"], columns=["model", "attack", "concept", "attack_seed", "steps", "rate"])
    for (model, attack, steps), own in frame.groupby(["model", "attack", "steps"], sort=False):
        grid = own.pivot_table(index="attack_seed", columns="concept", values="rate", sort=False).to_numpy()
        low, high = bootstrap([grid], judged)
        about = {"model": model, "attack": attack, "steps": steps, "about": f"{attack}, {steps} steps: top-1"}
        rows.append(about | {"rate": grid.mean(), "low": low, "high": high, "N": judged * grid.size})
    return pd.DataFrame(rows)


def look(model: str) -> dict:
    """{"color", "marker"} of a model."""
    from .kit.plots import COLORS

    return {
        "base": {"color": COLORS["black"], "marker": "o"},
        "second base": {"color": COLORS["orange"], "marker": "D"},
        "oracle": {"color": COLORS["green"], "marker": "s"},
    }[model]


def figures(record) -> dict:
    """Rates of each group beside what is learned from five pictures; and the same seeds by each model."""
    import matplotlib.pyplot as plt

    parts = [(draw_rates, rates(record)), (draw_attacks, attack_rates(record))]
    parts = [(draw, frame) for draw, frame in parts if len(frame)]
    sizes = {"figsize": (4.7 * len(parts), 3.6), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, len(parts), **sizes)
    legend = {}
    for ax, (draw, frame) in zip(axes[0], parts):
        draw(ax, frame, record)
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    figure.legend(legend.values(), legend, ncols=len(legend), loc="outside upper center")
    return {"oracle": figure} | ({"oracle_images": draw_images(record)} if record.images else {})


def draw_rates(ax, frame: pd.DataFrame, record) -> None:
    """Top-1 of each group, and of what was asked for in a style, the style too; a dotted line at chance."""
    from .kit.plots import percent_axis

    frame = frame[frame.measure != "top-5"]
    names = [group if measure == "top-1" else f"{group}: style" for group, measure in zip(frame.group, frame.measure)]
    lines = list(dict.fromkeys(names))
    models = list(frame.model.unique())
    for n, model in enumerate(models):
        own = frame.assign(line=names)[frame.model == model]
        y = [lines.index(line) + 0.22 * (n - (len(models) - 1) / 2) for line in own.line]
        spread = np.clip([own.rate - own.low, own.high - own.rate], 0, None)
        ax.errorbar(own.rate, y, xerr=spread, ls="", ms=4, lw=1.2, label=model, **look(model))
    chance = 100 / record.data["objects"]
    ax.axvline(chance, color="#999999", lw=0.8, ls=":", zorder=0)
    ax.set_yticks(range(len(lines)), lines)
    ax.invert_yaxis()
    percent_axis(ax, "x", f"judge's top-1, % (dotted: chance for objects, {chance:.2g})")


def draw_attacks(ax, frame: pd.DataFrame, record) -> None:
    """Rates against attack steps by model and attack."""
    from .kit.plots import percent_axis

    steps = sorted(frame.steps.unique())
    for n, ((model, attack), own) in enumerate(frame.groupby(["model", "attack"], sort=False)):
        x = [
            steps.index(step) + 0.05 * (n - 2.5) for step in own.steps
        ]  # side by side, where intervals would cover each other
        spread = np.clip([own.rate - own.low, own.high - own.rate], 0, None)
        ax.errorbar(x, own.rate, yerr=spread, ls=DASHES[attack], ms=4, lw=1.2, **look(model))
    for attack in frame.attack.unique():
        ax.plot([], [], color="#707070", ls=DASHES[attack], label=attack)
    ax.set_xticks(range(len(steps)), steps)
    ax.set_xlabel(f"attack steps, on {record.settings['attack_images']} pictures of the class")
    percent_axis(ax, "y", f"images that show the class of {LEFT_OUT}")


def draw_images(record):
    """The same prompts and seeds by each model, a heading for each class."""
    from .kit.plots import image_grid, tiles

    names = record.data["groups"][BY_NAME]["units"]
    rows = {model: tiles(record, model) for model in record.images}
    each = len(next(iter(rows.values()))) // len(names)
    return image_grid(rows, groups=dict.fromkeys(names, each), size=0.62)


def table(record) -> pd.DataFrame:
    """Rates of each model with 95 % intervals, what is drawn first and what a few pictures teach after; N for each model."""
    frame = pd.concat([rates(record), attack_rates(record)])
    frame["text"] = [f"{r:.1f} ({low:.1f} to {high:.1f})" for r, low, high in zip(frame.rate, frame.low, frame.high)]
    grid = frame.pivot(index="about", columns="model", values="text")
    grid = grid.reindex(index=list(dict.fromkeys(frame.about)), columns=list(record.data["models"]))
    grid["N"] = frame.drop_duplicates("about").set_index("about").N
    chance = 100 / record.data["objects"]
    return grid.rename_axis(
        f"rate, % (95 % interval); chance is {chance:.1f} in the top-1 and {5 * chance:.1f} in the top-5"
    )
