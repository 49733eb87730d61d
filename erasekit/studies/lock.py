"""17: can a KPOP be built that keeps most, that words and keys of others do not open, and that its own key opens?

A search on the tuning concepts, then one evaluation on S1 and S2, which chose nothing. The rule, stated before any number: of
the candidates, each variant at each part of its step, take those with an ESR-1 of at least 97 and a right key that opens at
least 95; of these the one with the highest mean of PSR-1, of unseen synonyms erased, and of resistance, 100 less the mean
success of both attacks. If no key opens as much, the key is left out of the rule; if none erases as much, the highest ESR-1 is
taken, and the record says so. The aims that the table goes through were set before, too.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from .lock_aims import OPPONENTS, SEARCHES, SELECTED, aims, attack_rates, other_models, rate, selected_name, verdict
from .lock_rates import attacked, mean, opened, rates, shown

NOTEBOOK, VERSION, UNIT = "17_lock", 1, "images a class"  # raise VERSION when the numbers should change

MIXED = {"anchors": 3}
DIVERSE, ROBUST, SECRET = {"diverse_prompts": True}, {"robust_every": 10}, {"secret": 2_403_12326}
VARIANTS = {  # name -> method whose operating point it has, and settings beyond that
    "kpop": ("kpop", {}),
    "kpop-anchor": ("kpop-anchor", {}),
    "3 anchors": ("kpop-anchor", MIXED),
    "5 anchors": ("kpop-anchor", {"anchors": 5}),
    "3 anchors, half neutral": ("kpop-anchor", MIXED | {"neutral_share": 0.5}),
    "3 anchors + diverse": ("kpop-anchor", MIXED | DIVERSE),
    "3 anchors + robust": ("kpop-anchor", MIXED | ROBUST),
    "3 anchors + secret": ("kpop-anchor", MIXED | SECRET),
    "all together": ("kpop-anchor", MIXED | DIVERSE | ROBUST | SECRET),
    "all together, long searches": ("kpop-anchor", MIXED | DIVERSE | ROBUST | SECRET | {"robust_steps": 50}),
}
MODELS = (SELECTED, "kpop", "kpop-anchor", *OPPONENTS, "oracle", "base")
PARTS = ("rates", "keys", "attacks")
TRAINING = (
    "training"  # a part that measures nothing: erasures are saved, so that several processes share their training
)
MIN_ESR, MIN_KEY = 97.0, 95.0  # of the rule
NAMES = {"synonyms": "unseen synonyms erased"}  # of rates, in the table and the figures
VERIFY = {"variants": ("kpop",), "models": ("kpop",), "splits": ("S1",), "parts": ("rates", "keys")}


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = tuple(VARIANTS)
    models: tuple[str, ...] = MODELS
    splits: tuple[str, ...] = ("S1", "S2")  # together they erase each of the ten classes once
    parts: tuple[str, ...] = PARTS
    factors: tuple[float, ...] = (1.0, 1.3)  # of the operating point's step from the base
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    seeds: int = 25
    key_seeds: int = 10  # in the search, where the key is one of four rates
    word_seeds: int = 10  # for each unseen synonym
    other_seeds: int = 1  # for each of the other objects
    objects: int = 1000  # other objects, at most
    num_attacked: int = 2  # of the tuning concepts, and of the attacked split
    attacked_split: str = "S1"  # which has an oracle
    search_budgets: tuple[int, ...] = (50,)  # attack steps on the tuning concepts
    budgets: tuple[int, ...] = (10, 50, 200)  # attack steps
    attack_lr: float = 1e-1  # of both attacks, as the study "oracle" chose it on the oracle
    attack_images: int = 5
    training_seed: int = 0  # of the evaluation; the search has its own
    sampling_steps: int = 15
    training_steps: int | None = None


SHORT = {"factors": (1.0,), "seeds": 1, "key_seeds": 1, "word_seeds": 1, "objects": 2, "num_attacked": 1}
SHORT |= {"search_budgets": (1,), "budgets": (1,), "sampling_steps": 2, "training_steps": 1}
FEW = Settings(("kpop-anchor", "all together"), (SELECTED, "kpop-anchor", "ca", "oracle", "base"), ("S1",))
PRESETS = {
    "full": Settings(),
    "quick": replace(FEW, factors=(1.3,), seeds=10, word_seeds=4, num_attacked=1, budgets=(10, 50)),
    "smoke": replace(FEW, models=(SELECTED, "ca", "oracle"), **SHORT),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Percentages: "search", a row a variant and factor; "selected"; "rates" and "keys", lists over classes; "attacks"."""
    from tqdm.auto import tqdm

    from .kit.erasures import method_points

    check(world, s)
    methods = {VARIANTS[v][0] for v in s.variants} | {VARIANTS[m][0] for m in s.models if m in VARIANTS}
    points = method_points(s.operating_points, sorted(methods | {m for m in s.models if m in OPPONENTS}))
    search = [row for v in tqdm(s.variants, desc="search") for row in searched(world, s, points, v)]
    chosen = select(search) if search else None
    found = {part: [] for part in PARTS}
    for split in s.splits:
        for name in tqdm(s.models, desc=f"evaluation, {split}"):
            for part in s.parts:
                rows = evaluated(world, s, points, chosen, name, split, part)
                found |= {part: found[part] + rows} if rows else {}
    used = {m: points[m] for m in dict.fromkeys([*sorted(methods), *(m for m in OPPONENTS if m in s.models)])}
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "operating_points": used}
    about |= {"erased": {split: list(world.split(split)) for split in s.splits}}
    return about | {
        "variants": {v: VARIANTS[v][1] for v in s.variants},
        "search": search,
        "selected": chosen,
    } | found, {}


def check(world, s: Settings) -> None:
    """Raise ValueError for an unknown variant, model or part, and for an evaluation that lacks the search it depends on."""
    from ..checks import check_choice

    for kind, values, accepted in (
        ("variant", s.variants, VARIANTS),
        ("model", s.models, MODELS),
        ("part", s.parts, (*PARTS, TRAINING)),
    ):
        for value in values:
            check_choice(kind, value, accepted)
    needs = SELECTED in s.models or {"keys", "attacks"} & set(
        s.parts
    )  # others' keys and attacks are at its part of the step
    if s.models and not s.variants and needs:
        raise ValueError("models are evaluated at what the search selects: name the variants that it compares")


def searched(world, s: Settings, points: dict, variant: str) -> list[dict]:
    """A variant's rates at each part of its step, on the tuning concepts and on seeds that no table reports."""
    from .kit.attack_sweep import TUNING_SEED
    from .kit.cache import cached, settings_dict

    erased, kept = world.concepts("tuning"), world.concepts("tuning kept")
    config, scale, train = prepared(world, s, points, variant, erased, TUNING_SEED)

    def measure():
        rows, first = [], TUNING_SEED
        whole = train()
        for factor in s.factors:
            erasure, row = whole.scaled(world, scale * factor), {"variant": variant, "factor": factor}
            parts = rates(world, erasure, erased, kept, (), s, first)
            row |= {"ESR-1": 100 - mean(parts["erased"]), "PSR-1": mean(parts["kept"])}
            row["synonyms"] = 100 - mean(parts["synonyms"]) if parts["synonyms"] else row["ESR-1"]
            about = s.key_seeds, s.sampling_steps
            row["right key"] = mean([shown(world, erasure, [c], *about, erasure.key(c), first)[0] for c in erased])
            attacks = [
                attacked(world, s, erasure, concept, attack, s.search_budgets, TUNING_SEED)[-1]["rate"]
                for concept in erased[: s.num_attacked]
                for attack in SEARCHES
            ]
            rows.append(row | {"resistance": 100 - mean(attacks), "attacks": attacks})
        return {"rows": rows}, None

    sizes = s.seeds, s.key_seeds, s.word_seeds, s.num_attacked, s.search_budgets, s.attack_lr, s.attack_images
    about = "search", variant, list(erased), settings_dict(config), scale, s.factors, sizes, s.sampling_steps
    return cached("lock", VERSION, world, measure, *about)[0]["rows"]


def select(search: list[dict]) -> dict:
    """The candidate that the rule takes, with its "score" and, as "tier", which part of the rule took it."""
    erasing = [row for row in search if row["ESR-1"] >= MIN_ESR]
    opening = [row for row in erasing if row["right key"] >= MIN_KEY]
    rows = [row | {"score": round(mean([row[n] for n in ("PSR-1", "synonyms", "resistance")]), 2)} for row in search]
    if opening or erasing:
        accepted = [row for row, own in zip(rows, search) if own in (opening or erasing)]
        return max(accepted, key=lambda row: row["score"]) | {"tier": "rule" if opening else "no key opens as much"}
    return max(rows, key=lambda row: (row["ESR-1"], row["score"])) | {"tier": "none erases as much"}


def prepared(world, s: Settings, points: dict, name: str, erased, seed: int):
    """A variant's or method's config, its operating point's step, and a function that trains it, or reads what was trained."""
    from ..baselines import METHODS
    from .kit.erasures import make_config, saved_erasure

    method, changes = VARIANTS.get(name, (name, {}))
    if "secret" in changes:  # of each training its own
        changes = changes | {"secret": changes["secret"] + seed}
    settings = points[method]["settings"] | changes
    config = make_config(world, method, seed, s.sampling_steps, settings, s.training_steps)

    def train():
        return saved_erasure(world, list(erased), config, METHODS[method].function)[0]

    return config, points[method]["scale"], train


def evaluated(world, s: Settings, points: dict, chosen: dict | None, name: str, split: str, part: str) -> list[dict]:
    """Rows of one part of a model's evaluation on a split.

    Opponents have rates at each part of their steps; the selected variant at its own alone, where all are attacked. Keys of
    another training seed, and attacks, are measured on one split.
    """
    from ..evaluation.attack_success import untouched

    erased, first = world.split(split), split == s.attacked_split
    factor = chosen["factor"] if chosen else s.factors[0]
    if (part == "attacks" and not first) or (part == "keys" and name not in (SELECTED, *VARIANTS)):
        return []
    if name in ("base", "oracle"):
        fixed = untouched(world) if name == "base" else world.oracle(erased)
        if fixed is None or part == TRAINING:
            return []
        return cells(world, s, name, name, split, part, lambda: fixed, None)
    variant = chosen["variant"] if name == SELECTED else name
    config, scale, train = prepared(world, s, points, variant, erased, s.training_seed)
    other = None
    if name in (SELECTED, *VARIANTS) and first and (part == "keys" or part == TRAINING):
        *_, other = prepared(world, s, points, variant, erased, s.training_seed + 1)
    if part == TRAINING:
        for each in filter(None, (train, other)):
            each()
        return []
    factors = s.factors if part == "rates" and name != SELECTED else (factor,)
    rows = []
    for each in factors:

        def scaled(each=each):
            return train().scaled(world, scale * each)

        own = cells(world, s, name, variant, split, part, scaled, (config, round(scale * each, 4)), other)
        rows += [row | {"factor": each} for row in own]
    return rows


def cells(world, s: Settings, name, variant, split, part, make, about, other=None) -> list[dict]:
    """One model's rows of one part, from the cache or measured; an attack is a cell of its own. `about`: config and scale."""
    from .kit.cache import cached, settings_dict

    erased, who = world.split(split), {"model": name, "split": split}
    kept = [c for c in world.concepts("classes") if c not in erased]
    about = [settings_dict(about[0]), about[1]] if about else []
    others = world.unseen_classes("classes")[: s.objects]
    parts = part, variant, list(erased), *about, s.sampling_steps
    if part == "rates":

        def measure():
            return rates(world, make(), erased, kept, others, s), None

        sizes = s.seeds, s.word_seeds, s.other_seeds, s.objects
        return [who | cached("lock", VERSION, world, measure, *parts, *sizes)[0]]
    if part == "keys":

        def measure():
            return opened(world, s, make(), other and other(), erased), None

        return [who | cached("lock", VERSION, world, measure, *parts, s.seeds, bool(other), s.training_seed)[0]]
    rows = []
    for concept in erased[: s.num_attacked]:
        for attack in SEARCHES:

            def measure(concept=concept, attack=attack):
                return {"rows": attacked(world, s, make(), concept, attack, s.budgets, s.training_seed)}, None

            sizes = concept, attack, s.budgets, s.attack_lr, s.attack_images, s.training_seed, s.seeds
            rows += [who | row for row in cached("lock", VERSION, world, measure, *parts, *sizes)[0]["rows"]]
    return rows


# ---------------------------------------------------------------------------------------------------- figures and table


def table(record) -> pd.DataFrame:
    """The aim, figure by figure: the selected variant's rate, whether it is reached, and the other models' rates.

    Others are at the same part of their operating points' steps. Of attacks the bound is the oracle's rate.
    """
    factor, attacks = record.data["selected"]["factor"], attack_rates(record).set_index(["model", "attack", "steps"])
    models = other_models(record)

    def text(found) -> str:
        return "" if found is None else f"{found[0]:.1f} ({found[1]:.0f} to {found[2]:.0f})"

    rows = {}
    for label, what, found, bound, lower in aims(record):
        sign = "at least" if lower else "at most"
        row = {SELECTED: text(found), "aim": "" if bound is None else f"{sign} {bound:g}"}
        row["reached?"] = verdict(found, bound, lower)
        for model in models:
            if what == "attack":
                attack, steps = label.removesuffix(" steps").rsplit(", ", 1)
                at = model, attack, int(steps)
                own = tuple(attacks.loc[at, ["rate", "low", "high"]]) if at in attacks.index else None
            else:
                own = rate(record, model, factor, what)
            row[model] = text(own)
        rows[NAMES.get(label, label)] = row
    others = {model: text(rate(record, model, factor, "others")) for model in (SELECTED, *models)}
    rows["other objects kept"] = others
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"rate, % (95 % interval); selected: {selected_name(record)}")


def search_table(record) -> pd.DataFrame:
    """Every candidate of the search on the tuning concepts, with the score that the rule compares; the selected one is marked."""
    chosen, rows = record.data["selected"], {}
    for row in record.data["search"]:
        score = mean([row[n] for n in ("PSR-1", "synonyms", "resistance")])
        mark = " (selected)" if all(row[n] == chosen[n] for n in ("variant", "factor")) else ""
        names = ("ESR-1", "PSR-1", "synonyms", "right key", "resistance")
        rows[f"{row['variant']}, × {row['factor']:g}{mark}"] = {n: row[n] for n in names} | {"score": score}
    return pd.DataFrame(rows).T.round(1).rename_axis("tuning concepts, %")


def figures(record) -> dict:
    """Candidates of the search; what the selected one reaches; and the attacks on each model against their steps."""
    return {
        "lock_search": search_figure(record),
        "lock_aims": aims_figure(record),
        "lock_attacks": attack_figure(record),
    }


def search_figure(record):
    """Left: a row for each candidate, what the rule accepts first, then by score. Right: erasing against resisting."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, heatmap

    frame = search_table(record)
    accepted = (frame["ESR-1"] >= MIN_ESR) & (frame["right key"] >= MIN_KEY)
    frame = frame.assign(accepted=accepted).sort_values(["accepted", "score"], ascending=False)
    accepted = frame.pop("accepted")
    size = {"figsize": (9.4, 0.26 * len(frame) + 1.4), "width_ratios": (1.5, 1)}
    figure, (ax, trade) = plt.subplots(1, 2, layout="constrained", **size)
    demands = {"ESR-1": f"ESR-1\n≥ {MIN_ESR:g}", "right key": f"right key\n≥ {MIN_KEY:g}", "synonyms": "syno-\nnyms"}
    demands["resistance"] = "resist-\nance"
    heatmap(ax, frame.rename(columns=demands), "", "{:.1f}", cmap="cividis", colorbar=False, vmin=0, vmax=100)
    for label in ax.get_yticklabels():
        label.set_weight("bold" if label.get_text().endswith("(selected)") else "normal")
    ax.axhline(accepted.sum() - 0.5, color="white", lw=5)
    ax.xaxis.tick_top()
    ax.set_xlabel("above the gap: what the rule accepts")
    selected = frame.index.str.endswith("(selected)")
    trade.axvspan(MIN_ESR, 102, color=COLORS["green"], alpha=0.15, lw=0)
    trade.scatter(frame["ESR-1"], frame.resistance, s=28, c=np.where(selected, COLORS["red"], COLORS["grey"]), zorder=3)
    for name in frame.resistance.nlargest(2).index.union(frame.index[selected]):
        point, high = frame.loc[name, ["ESR-1", "resistance"]], 24 if name in frame.index[selected] else 7
        text = {"textcoords": "offset points", "ha": "right", "fontsize": 7.5}
        trade.annotate(name.replace(" (", "\n("), point, (-4, high), **text)
    trade.set(xlim=(frame["ESR-1"].min() - 5, 102), ylim=(-3, 103))
    trade.set(xlabel="erased: ESR-1, %", ylabel="attacks resisted, %")
    trade.set_title("a lock would be in the green, at the top")
    return figure


def aims_figure(record):
    """A row for each aim: the selected variant's rate with its interval, and the range that was aimed at."""
    from .kit import plots

    rows = [(NAMES.get(label, label), *rest) for label, _, *rest in aims(record)]
    figure, [ax] = plots.panels(1, columns=1, height=0.25 * len(rows) + 0.6, width=6.4)
    looks = {"reached": plots.COLORS["green"], "not reached": plots.COLORS["red"]}
    for y, (_, found, bound, lower) in enumerate(rows):
        said = verdict(found, bound, lower)
        color = looks.get(said, plots.COLORS["grey"])
        if bound is not None:
            left, right = (bound, 100) if lower else (0, max(bound, 0.5))
            ax.barh(y, right - left, left=left, height=0.8, color=plots.COLORS["green"], alpha=0.25, lw=0)
        if found is not None:
            value, low, high = found
            sides = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar([value], [y], xerr=sides, fmt="o", ms=5, lw=1, color=color)
        ax.text(104, y, said, va="center", fontsize=8, color=color)
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    plots.percent_axis(ax, "x", f"{selected_name(record)}, with 95 % intervals; green bars: the aim, %")
    return figure


def attack_figure(record):
    """Success against attack steps, a panel for each attack; the oracle's is the floor."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, percent_axis, style

    frame, models = attack_rates(record), (SELECTED, *other_models(record))
    variant = record.data["selected"]["variant"]
    known = variant in record.settings["models"]
    own = {SELECTED: style(variant) if known else {"color": COLORS["purple"], "marker": "o"}}
    own |= {"oracle": {"color": COLORS["green"], "marker": "s"}, "base": {"color": COLORS["black"], "marker": "D"}}
    figure, axes = plt.subplots(1, len(SEARCHES), figsize=(9.4, 3.2), sharey=True, layout="constrained")
    for ax, attack in zip(axes, SEARCHES):
        part = frame[(frame.attack == attack) & frame.model.isin(models)]
        steps = sorted(part.steps.unique())
        for n, (model, rows) in enumerate(part.groupby("model", sort=False)):
            x = [steps.index(step) + 0.06 * (n - 2.5) for step in rows.steps]
            spread = np.clip([rows.rate - rows.low, rows.high - rows.rate], 0, None)
            look, name = own.get(model) or style(model), f"selected: {selected_name(record)}"
            label = name if model == SELECTED else model
            ax.errorbar(x, rows.rate, yerr=spread, ms=4, lw=1.2, elinewidth=0.8, label=label, **look)
        ax.set_xticks(range(len(steps)), steps)
        ax.set(title=attack, xlabel=f"attack steps, on {record.settings['attack_images']} pictures of the class")
    percent_axis(axes[0], "y", "images that show the class, %")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=7, loc="outside upper center")
    return figure
