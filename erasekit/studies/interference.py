"""16: what does erasing one object do to every other, and which similarity tells beforehand?"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .interference_similarities import SIMILARITIES, similarities

NOTEBOOK, VERSION, UNIT = "16_scale_and_interference", 1, "image of each receiver"

PREDICTORS = (*SIMILARITIES, "fragility")
OUTCOMES = {"fall": "tells which objects are lost?", "changed": "tells whose images change?"}
LABELS = {"text": "similar text", "picture": "similar picture", "attention": "similar attention"}
LABELS |= {"fragility": "harmed by other\nerasures, too"}
BLANK = 255  # in a matrix: the base does not draw this receiver
WORST = 3  # receivers that are named for each emitter
LARGE = 50  # points of the judge's probability: a large fall
NAMED = 6  # of the receivers with most large falls, in the figure


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = ("uce", "esd-x", "spm", "kpop", "kpop-anchor")
    # Method -> n: it erases every nth reportable object too. UCE takes no training.
    every: dict[str, int] = field(
        default_factory=lambda: {"uce": 2} | dict.fromkeys(("esd-x", "spm", "kpop", "kpop-anchor"), 8)
    )
    few: str = "S1"  # whose objects every method erases, one at a time
    emitters: tuple[str, ...] | None = None  # of these only some; None: all
    operating_points: dict | None = None  # by method; None: of the record of "operating_points", chosen on five at once
    receivers: int | None = None  # so many of the objects, and the emitters; None: all
    pictures: int = 5  # of the art, whose features are compared
    trajectories: int = 2  # of the empty prompt, at whose latents attention is compared
    trajectory_steps: int = 8
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


SMALL = {"pictures": 1, "trajectories": 1, "trajectory_steps": 2, "sampling_steps": 2, "training_steps": 1}
PRESETS = {
    "full": Settings(),
    "quick": Settings(("uce", "kpop-anchor"), every={}, receivers=60),
    "smoke": Settings(("uce", "kpop"), every={}, few="church", receivers=4, **SMALL),
}
VERIFY = {"methods": ("uce",), "every": {}}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For each method and emitter, the object that is erased: what all other objects, the receivers, lose.

    One image a receiver, with the same seed from the base and from the erased model. Neither emitters nor receivers are tuned
    on or retained. `matrix`: an image for each method, emitters by receivers, of the fall of the judge's probability for the
    receiver in percent; `BLANK` where the base does not draw the receiver.
    """
    from functools import cache, partial

    from PIL import Image
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import judge_images, perceptual_distance
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points

    points, every = method_points(s.operating_points, s.methods), reportable(world)
    store = partial(cached, "interference", VERSION, world)
    plan = emitters(world, s, every)
    needed = {*world.split(s.few)}.union(*plan.values())
    objects = [c for n, c in enumerate(every) if s.receivers is None or n < s.receivers or c in needed]
    number = {c: n for n, c in enumerate(world.concepts("all"))}  # a receiver's seed
    prompts = [(world.prompt(c), c, number[c]) for c in objects]
    about = objects, s.sampling_steps

    def draw(erasure):
        return sample_images(world, erasure, prompts, s.sampling_steps)

    def judged(images):
        """Of each receiver: its probability in percent, and whether it is what the judge sees first."""
        probabilities, names = judge_images(world, images)[0], world.judge.objects
        own = [names.index(c) for c in objects]
        return {
            "probability": [round(100 * p.item(), 1) for p in probabilities[range(len(own)), own]],
            "shown": [int(n == c) for n, c in zip(probabilities.argmax(1).tolist(), own)],
        }

    base_images = cache(lambda: draw(None))

    def measure(erasure):
        images = draw(erasure)
        changed = perceptual_distance(world, base_images(), images)
        return judged(images) | {"changed": [round(d.item(), 4) for d in changed]}, None

    base, _ = store(lambda: (judged(base_images()), None), "base", about)
    where = s.pictures, s.trajectories, s.trajectory_steps
    alike, _ = store(lambda: (similarities(world, objects, *where), None), objects, where)
    alike = {name: np.array(rows) for name, rows in alike.items()}
    found = {method: [] for method in s.methods}
    for method, concept in tqdm([(m, c) for m, names in plan.items() for c in names], desc="interference"):
        point = points[method]
        config = make_config(world, method, s.training_seed, s.sampling_steps, point["settings"], s.training_steps)
        how = [concept], method, config, point["scale"], measure
        found[method].append(measured("interference", VERSION, world, *how, about)[0])
    runs, images = [], {}
    for method, rows in found.items():
        own, matrix = effects(objects, plan[method], base, rows, alike)
        runs += [{"method": method} | run for run in own]
        images[method] = Image.fromarray(matrix)
    return {
        "N": 1,
        "training_seeds": 1,
        "objects": objects,
        "groups": [group(world, c) for c in objects],
        "few": list(world.split(s.few)),
        "base": round(100 * float(np.mean(base["shown"])), 1),
        "operating_points": {m: points[m] for m in s.methods},
        "runs": runs,
    }, images


def reportable(world) -> list[str]:
    """Every object that is neither tuned on nor retained, by groups of meaning."""
    names = [*world.concepts("classes"), *world.unseen_classes("classes")]
    return sorted(names, key=lambda c: (group(world, c) == "", group(world, c)))


def group(world, concept: str) -> str:
    """The widest hypernym of an object; "" for one without any."""
    return max(world.kinds(concept), key=lambda kind: len(world.concepts(kind)), default="")


def emitters(world, s: Settings, every: list[str]) -> dict[str, list[str]]:
    """Method -> what it erases, one at a time. Raises ValueError for an emitter that is tuned on, retained or unknown."""
    for name in s.emitters or ():
        if name not in every:
            accepted = f"the {len(every)} objects that no method sees"
            raise ValueError(f"{name!r} cannot be an emitter: accepted are {accepted}")
    few = world.split(s.few)
    plan = {
        m: [c for n, c in enumerate(every) if c in few or (m in s.every and n % s.every[m] == 0)] for m in s.methods
    }
    return {m: [c for c in names if s.emitters is None or c in s.emitters] for m, names in plan.items()}


def effects(objects: list, erased: list, base: dict, rows: list, alike: dict) -> tuple[list[dict], np.ndarray]:
    """What each emitter of one method does to the receivers that the base draws, and the method's matrix, uint8.

    "lost": receivers that are not drawn any more, in percent. "fall" and "changed": means of the judge's probability lost, in
    points, and of the perceptual distance to the base's image. "rho": Spearman's rank correlations over receivers of these two
    with each similarity to the emitter, and with "fragility", the mean effect of the method's other emitters on the receiver;
    None where one of the two is the same for all receivers.
    """
    drawn, n = np.array(base["shown"], dtype=bool), len(objects)
    names = "shown", "probability", "changed"
    shown, probability, changed = (np.array([row[name] for row in rows]).reshape(-1, n) for name in names)
    outcomes, runs = {"fall": np.array(base["probability"]) - probability, "changed": changed}, []
    for row, concept in enumerate(erased):
        emitter = objects.index(concept)
        receivers = drawn & (np.arange(n) != emitter)
        others = np.arange(len(erased)) != row
        run = {"emitter": concept, "erased": int(not shown[row, emitter])}
        run["lost"] = round(100 * float(np.mean(~shown[row, receivers].astype(bool))), 2)
        run["rho"] = {}
        for name, values in outcomes.items():
            run[name] = round(float(values[row, receivers].mean()), 4)
            predictors = {k: m[emitter, receivers] for k, m in alike.items()}
            if others.any():
                predictors["fragility"] = values[others][:, receivers].mean(0)
            run["rho"][name] = {k: spearman(v, values[row, receivers]) for k, v in predictors.items()}
        order = np.argsort(np.where(receivers, -outcomes["fall"][row], np.inf))[:WORST]
        run["worst"] = {objects[r]: round(float(outcomes["fall"][row, r]), 1) for r in order}
        run["training_seconds"] = rows[row]["training_seconds"]
        runs.append(run)
    matrix = np.where(drawn, outcomes["fall"].clip(0, 100).round(), BLANK).astype(np.uint8)
    return runs, matrix


def spearman(x, y) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    rho = pd.Series(x).rank().corr(pd.Series(y).rank()) if len({*x}) > 1 and len({*y}) > 1 else np.nan
    return None if np.isnan(rho) else round(float(rho), 4)


def correlations(runs: list[dict], outcome: str) -> dict[str, tuple[float, float, float]]:
    """Predictor -> mean over emitters of their rank correlations, and its 95 % interval by bootstrap over emitters."""
    from ..evaluation.intervals import bootstrap_mean

    found = {}
    for name in PREDICTORS:
        values = [r for run in runs if (r := run["rho"][outcome].get(name)) is not None]
        if values:
            found[name] = float(np.mean(values)), *bootstrap_mean(values)
    return found


def groups_of_runs(record) -> dict[str, list[dict]]:
    """Row of the table -> runs: each method on the emitters that all methods have, and on all of its own."""
    rows, by_method = {}, {m: [r for r in record.data["runs"] if r["method"] == m] for m in record.settings["methods"]}
    shared = set.intersection(*({run["emitter"] for run in own} for own in by_method.values()))
    for method, own in by_method.items():
        rows[method] = [run for run in own if run["emitter"] in shared]
        if len(own) > len(rows[method]):
            rows[f"{method}, all {len(own)}"] = own
    return {name: runs for name, runs in rows.items() if runs}


def figures(record) -> dict:
    """The large falls of the method with most emitters; and the rank correlations of every method."""
    return {"interference": pairs_figure(record), "interference_predictors": predictors_figure(record)}


def falls(record, method: str, runs: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The method's matrix for these of its runs, NaN at blanks and emitters; and which pairs are of one kind."""
    objects, groups = record.data["objects"], record.data["groups"]
    emitted = [run["emitter"] for run in record.data["runs"] if run["method"] == method]
    rows = [emitted.index(run["emitter"]) for run in runs]
    matrix, at = np.asarray(record.images[method]).astype(float)[rows], [objects.index(emitted[r]) for r in rows]
    matrix[matrix == BLANK] = np.nan
    matrix[range(len(at)), at] = np.nan
    return matrix, np.array([[groups[e] == own != "" for own in groups] for e in at])


def large_falls(record, method: str, runs: list[dict]) -> dict[str, list[float]]:
    """How many percent of the pairs of one kind, and of two, fall by `LARGE` points, with 95 % intervals over emitters."""
    matrix, same = falls(record, method, runs)
    drawn, large = np.isfinite(matrix), matrix >= LARGE
    chosen, found = np.random.default_rng(0).integers(len(runs), size=(2000, len(runs))), {}
    for name, part in (("one kind", drawn & same), ("two kinds", drawn & ~same)):
        counts, pairs = (large & part).sum(1), part.sum(1)
        if pairs.sum():
            draws = counts[chosen].sum(1) / np.maximum(pairs[chosen].sum(1), 1)
            found[name] = [100 * float(x) for x in (counts.sum() / pairs.sum(), *np.quantile(draws, (0.025, 0.975)))]
    return found


def pairs_figure(record):
    """A dot for each large fall, emitters by receivers, by kinds; above, the receivers that most emitters harm."""
    from .kit import plots

    methods = [run["method"] for run in record.data["runs"]]
    method = max(dict.fromkeys(methods), key=methods.count)
    runs = [run for run in record.data["runs"] if run["method"] == method]
    matrix, same = falls(record, method, runs)
    objects, groups = record.data["objects"], record.data["groups"]
    rows = [objects.index(run["emitter"]) for run in runs]
    large, drawn, count = matrix >= LARGE, np.isfinite(matrix), len(objects)
    figure, [ax] = plots.panels(1, columns=1, height=1.6 + 5.2 * len(matrix) / count, width=7.4)
    for name in dict.fromkeys(groups):  # a band of receivers by a band of emitters
        x, y = [n for n, own in enumerate(groups) if own == name], [n for n, r in enumerate(rows) if groups[r] == name]
        if name and y:
            corner = x[0] - 0.5, y[0] - 0.5
            ax.add_patch(plots.plt.Rectangle(corner, len(x), len(y), color="#dddddd", lw=0, zorder=0))
    ax.plot(rows, range(len(rows)), ls="", marker=".", ms=1.5, color="#999999", label="the emitter itself")
    for part, name, color in (
        (drawn & same, "of the emitter's kind", "red"),
        (drawn & ~same, "of another kind", "blue"),
    ):
        if part.any():
            y, x = np.nonzero(large & part)
            text = f"{name}: {len(x)} of {part.sum():,} pairs ({len(x) / part.sum():.1%})".replace("%", " %")
            ax.scatter(x, y, s=9, color=plots.COLORS[color], lw=0, label=text)
    for axis, names in (("x", groups), ("y", [groups[r] for r in rows])):
        places = {name: [n for n, own in enumerate(names) if own == name] for name in dict.fromkeys(names) if name}
        shown = {name: own for name, own in places.items() if len(own) >= max(2, 0.03 * len(names))}
        (ax.set_xticks if axis == "x" else ax.set_yticks)([np.mean(own) for own in shown.values()], [*shown])
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(length=0)
    hit = large.sum(0)
    most = sorted(n for n in np.argsort(-hit, kind="stable")[:NAMED] if hit[n])
    above = ax.secondary_xaxis("top")
    above.set_xticks(most, [f"{objects[n]}: {hit[n]}" for n in most], rotation=90)
    above.set_xlabel(f"fall most often, of {len(rows)} times", fontsize=9)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set(xlabel="receiver: every other object, by kinds", ylabel=f"emitter: the object that {method} erased")
    title = f"dots: the judge's probability of the receiver falls by {LARGE} points or more"
    figure.legend(*ax.get_legend_handles_labels(), title=title, loc="outside upper center", ncols=3, markerscale=1.6)
    return figure


def predictors_figure(record):
    """A panel for each outcome: mean rank correlation with each predictor, a dot for each method on all of its emitters."""
    from .kit import plots

    by_method = {
        name.split(",")[0]: runs for name, runs in groups_of_runs(record).items()
    }  # all of its emitters come last
    figure, axes = plots.panels(len(OUTCOMES), columns=2, height=2.9)
    for ax, (outcome, title) in zip(axes, OUTCOMES.items()):
        for n, (method, runs) in enumerate(by_method.items()):
            found = correlations(runs, outcome)
            y = [PREDICTORS.index(k) + 0.16 * (n - (len(by_method) - 1) / 2) for k in found]
            x, low, high = np.array([*found.values()]).T.reshape(3, -1)
            sides = np.nan_to_num([x - low, high - x], posinf=0)  # a single emitter has no interval
            text = f"{method}, {len(runs)} erased object{'s' * (len(runs) > 1)}"
            ax.errorbar(x, y, xerr=sides, ls="", ms=5, elinewidth=1, label=text, **plots.style(method))
        ax.axvline(0, color="#777777", lw=0.8)
        ax.set_yticks(range(len(PREDICTORS)), [LABELS[k] for k in PREDICTORS])
        ax.set(xlim=(-0.15, 1.02), ylim=(len(PREDICTORS) - 0.5, -0.5))
        ax.set_xticks([0, 0.5, 1], ["0: tells\nnothing", "0.5", "1: right\norder"])
        ax.set_title(title)
    figure.supxlabel("rank correlation over the other objects; bars: 95 % intervals", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(by_method), columnspacing=1
    )
    return figure


def table(record) -> pd.DataFrame:
    """What each method's emitters do to the other objects, on average, with 95 % intervals over emitters; and correlations."""
    from ..evaluation.intervals import bootstrap, bootstrap_mean

    def mean(values, low, high, digits=1):
        interval = f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite([low, high]).all() else ""
        return f"{np.mean(values):.{digits}f}{interval}"

    rows, receivers = {}, round(len(record.data["objects"]) * record.data["base"] / 100)
    groups = groups_of_runs(record)
    for name, runs in groups.items():
        erased, lost, fall = (np.array([run[k] for run in runs], dtype=float) for k in ("erased", "lost", "fall"))
        rows[name] = {
            "emitters": str(len(runs)),
            "emitter erased, %": mean(100 * erased, *bootstrap([100 * erased], 1)),
            "others lost, %": mean(lost, *bootstrap([lost], receivers)),
            "fall, points": mean(fall, *bootstrap_mean(fall)),
        }
        ours = groups.get("kpop", ())
        if name != "kpop" and len(runs) == len(ours):  # paired: the same emitters, in order
            more = lost - [run["lost"] for run in ours]
            rows[name]["others lost, less kpop's, points"] = mean(more, *bootstrap_mean(more), digits=2)
        large = large_falls(record, runs[0]["method"], runs).items()
        rows[name] |= {f"pairs of {part} that fall by {LARGE}, %": mean([v], *between) for part, (v, *between) in large}
        found = correlations(runs, "fall")
        rows[name] |= {f"rank correlation, {k}": mean([v], *between, digits=2) for k, (v, *between) in found.items()}
    return pd.DataFrame(rows).T.fillna("").rename_axis("one object erased")
