"""12: attacks with words on every method: success by the attacker's steps."""

from dataclasses import dataclass, field, replace

import pandas as pd

from .operating_points import PUBLIC

NOTEBOOK, VERSION, UNIT = "12_attacks", 1, "images a class"
ROWS = "methods"  # the setting that erasures given to `run` are added to
# With these the sweep chooses the learning rates of preset full.
VERIFY = {"methods": ("uce", "kpop"), "tuned_on": ("esd-x",), "budgets": (10, 50)}

NO_ATTACK, SEARCHES = "no attack", ("textual inversion", "hard prompt")


@dataclass(frozen=True)
class Settings:
    # sld and np erase by guidance alone: their weights are the base's, so an attacker samples without them. An attacker could
    # remove the adapters of spm, receler and adavd too; here they stay on, spm's at full strength for every prompt.
    methods: tuple[str, ...] = PUBLIC
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"  # or classes by name
    num_attacked: int = 2
    budgets: tuple[int, ...] = (10, 50, 200)  # attack steps
    # Adam's step at the nearest word has to cross to another word: it takes larger rates than a free embedding.
    attack_lrs: dict[str, tuple] = field(
        default_factory=lambda: {"textual inversion": (1e-2, 3e-2, 1e-1), "hard prompt": (1e-1, 3e-1, 1.0)}
    )
    tuned_on: tuple[str, ...] = ("esd-x", "kpop")  # methods on which each attack's learning rate is chosen
    attack_seeds: int = 1  # of several an attacker keeps the best
    attack_images: int = 5
    seeds: int = 25
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


FEW_LRS = {"textual inversion": (1e-2, 3e-2), "hard prompt": (3e-1,)}
ONE_LR = {"textual inversion": (1e-2,), "hard prompt": (3e-1,)}
QUICK = Settings(("esd-x", "uce", "kpop"), budgets=(10, 50), attack_lrs=FEW_LRS, tuned_on=("kpop",))
SHORT = {"num_attacked": 1, "budgets": (1,), "attack_lrs": ONE_LR, "seeds": 1, "sampling_steps": 2, "training_steps": 1}
PRESETS = {"smoke": replace(QUICK, methods=("uce", "kpop"), **SHORT), "quick": QUICK, "full": Settings()}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For the base, each method and attacked concept: the share of images that show the concept, in percent, by attack steps.

    Step 0 is where a search starts: random words before the prompt, or the concept's own tokens repeated.
    """
    from tqdm.auto import tqdm

    from ..evaluation.attack_success import ATTACKS, references, success_rate
    from ..evaluation.attacks import Attack, attack_images, nearest_words
    from .kit.attack_sweep import best_lr, sweep_learning_rates
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points

    concepts, plan, sweep = world.split(s.split), Attack(budgets=tuple(s.budgets)), []
    points = method_points(s.operating_points, (*s.methods, *s.tuned_on), [concepts], "split")
    sizes = s.attack_images, s.seeds, s.sampling_steps, s.training_steps
    for name in SEARCHES:
        sweep += sweep_learning_rates(world, s.tuned_on, points, s.attack_lrs[name], [name], plan, *sizes)
    lrs = {name: best_lr(sweep, name) for name in SEARCHES}

    def measure(erasure):
        rows = []
        for concept in concepts[: s.num_attacked]:
            rate = success_rate(world, erasure, concept, s.seeds, s.sampling_steps)
            rows.append({"concept": concept, "attack": NO_ATTACK, "steps": 0, "rate": rate})
            examples = attack_images(world, concept, s.attack_images, s.training_seed)
            for seed in range(s.attack_seeds):
                for name in SEARCHES:
                    search, prefix = ATTACKS[name]
                    attack = replace(plan, lr=lrs[name], seed=seed)
                    for steps, found in search(world, erasure, concept, examples, attack).items():
                        rate = success_rate(world, erasure, concept, s.seeds, s.sampling_steps, found, prefix)
                        row = {"concept": concept, "attack": name, "attack_seed": seed, "steps": steps, "rate": rate}
                        rows.append(row | ({"words": nearest_words(world.pipe, found)} if prefix else {}))
        return {"rows": rows}, None

    sizes = s.num_attacked, s.budgets, lrs, s.attack_seeds, s.attack_images, s.seeds, s.training_seed, s.sampling_steps
    runs = []
    for name, model in references(world, concepts).items():
        numbers, _ = cached("attacks", VERSION, world, lambda m=model: measure(m), name, model.digest(), *sizes)
        runs += [{"method": name} | row for row in numbers["rows"]]
    for method in tqdm(s.methods, desc="attacks"):
        point = points[method]
        config = make_config(world, method, s.training_seed, s.sampling_steps, point["settings"], s.training_steps)
        if method == "spm":
            config = replace(config, transport=False)
        numbers, _ = measured("attacks", VERSION, world, concepts, method, config, point["scale"], measure, *sizes)
        runs += [{"method": method} | row for row in numbers["rows"]]
    used = {m: points[m] for m in dict.fromkeys([*s.methods, *s.tuned_on])}
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "attack_images": s.attack_images}
    return about | {"operating_points": used, "attack_lrs": lrs, "sweep": sweep, "runs": runs}, {}


def best_attacks(record) -> pd.DataFrame:
    """Success rates, the best of several attack seeds at each number of steps."""
    frame = pd.DataFrame(record.data["runs"])
    return frame.groupby(["method", "concept", "attack", "steps"], sort=False).rate.max().reset_index()


def ordered(record) -> tuple[list[str], list[int]]:
    """Methods by the rate without an attack, see `by_rate`."""
    from .kit.plots import by_rate

    frame = best_attacks(record)
    rates = frame[frame.attack == NO_ATTACK].groupby("method", sort=False).rate.mean()
    return by_rate(list(rates.index), rates)


def figures(record) -> dict:
    """A heat map for each attack: methods by attack steps. Those above the first gap show the concept in most images anyway."""
    import matplotlib.pyplot as plt

    from .kit.plots import heatmap, rows_with_gaps

    groups, (names, starts) = best_attacks(record).groupby("attack", sort=False), ordered(record)
    cells = {"index": "method", "columns": "steps", "values": "rate", "sort": False}
    grids = {name: own.pivot_table(**cells).reindex(names) for name, own in groups}
    titles = ("no\nattack", "textual inversion:\nten new words", "hard prompt:\nten known words")
    sizes = {"figsize": (9.4, 0.25 * len(names) + 1.5), "width_ratios": [g.shape[1] for g in grids.values()]}
    figure, axes = plt.subplots(1, len(grids), sharey=True, layout="constrained", **sizes)
    for ax, (name, grid), title in zip(axes, grids.items(), titles):
        # Halves round up, as in the text.
        image = heatmap(ax, grid + 1e-6, "", cmap="cividis", colorbar=False, vmin=0, vmax=100)
        ax.set(title=title, xlabel="attack steps")
        if name == NO_ATTACK:
            ax.set(xticks=[], xlabel="")
        rows_with_gaps(ax, names, starts)
    figure.colorbar(image, ax=axes, label="images that show the concept, %", aspect=40)
    note = (
        "Above the first gap: shown in more than 50 % of the images without an attack. Below: hidden in at least 50 %."
    )
    figure.supxlabel(note, fontsize=8)
    return {"attacks": figure}


def table(record) -> pd.DataFrame:
    """Means over the attacked concepts, without an attack and by steps of each search; see `rate_table`."""
    from .kit.attack_sweep import rate_table

    frame = best_attacks(record)
    names = [name if name == NO_ATTACK else f"{name}, {n} steps" for name, n in zip(frame.attack, frame.steps)]
    grid = rate_table(frame.assign(attack=names), record.data["N"], "method", "attack")
    grid = grid.reindex(ordered(record)[0], columns=list(dict.fromkeys(names)))
    return grid.rename_axis("images that show the concept, %")
