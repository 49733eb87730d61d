"""17: can a KPOP be built that keeps most, that words and keys of others do not open, and that its own key opens?

A search on the tuning concepts, then one evaluation on S1 and S2, which chose nothing. The rule, stated before any number: of
the candidates, each variant at each part of its step, take those with an ESR-1 of at least 97 and a right key that opens at
least 95; of these the one with the highest mean of PSR-1, of unseen synonyms erased, and of resistance, 100 less the mean
success of both attacks. If no key opens as much, the key is left out of the rule; if none erases as much, the highest ESR-1 is
taken, and the record says so. The aims that the table goes through were set before, too. A variant that erases less than 97 at
the last part of its step goes further, as a baseline's strength does that is the edge of its grid.
"""

from dataclasses import dataclass, replace

from .kit.probed import BASE, ORACLE
from .lock_aims import MIN_ESR, MIN_KEY, OPPONENTS, SCORED, SEARCHES, SELECTED
from .lock_figures import figures, search_table, table  # noqa: F401  of every study
from .lock_rates import attacked, mean, opened, probed, rates, shown

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
MODELS = (SELECTED, "kpop", "kpop-anchor", *OPPONENTS, ORACLE, BASE)
PARTS = ("rates", "keys", "attacks", "probes")
# A part that measures nothing: erasures are saved, so that several processes share their training.
TRAINING = "training"
VERIFY = {"variants": ("kpop",), "models": ("kpop",), "splits": ("S1",), "parts": ("rates", "keys")}


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = tuple(VARIANTS)
    models: tuple[str, ...] = MODELS
    splits: tuple[str, ...] = ("S1", "S2")  # together they erase each of the ten classes once
    parts: tuple[str, ...] = PARTS
    factors: tuple[float, ...] = (1.0, 1.3)  # of the operating point's step from the base
    further: tuple[float, ...] = (1.6, 2.0)  # in the search, while a variant erases less than the rule asks for
    compared: float = 1.3  # where keys and attacks are measured of every model but the selected one
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
    attack_lr: float = 1e-1  # of both attacks, as the study "oracle" chose it on the first oracle
    attack_images: int = 5
    first_steps: int = 2  # of `sampling_steps`, by the base, as in the study "probes"
    finetune_steps: int = 100  # on other objects, as in the study "probes_weights"
    training_seed: int = 0  # of the evaluation; the search has its own
    sampling_steps: int = 15
    training_steps: int | None = None


SHORT = {
    "factors": (1.0,),
    "further": (),
    "compared": 1.0,
    "seeds": 1,
    "key_seeds": 1,
    "word_seeds": 1,
    "objects": 2,
    "num_attacked": 1,
}
SHORT |= {"search_budgets": (1,), "budgets": (1,), "first_steps": 1, "finetune_steps": 1}
SHORT |= {"sampling_steps": 2, "training_steps": 1}
FEW = Settings(("kpop-anchor", "all together"), (SELECTED, "kpop-anchor", "ca", "oracle", "base"), ("S1",))
PRESETS = {
    "full": Settings(),
    "quick": replace(FEW, factors=(1.3,), further=(1.6,), seeds=10, word_seeds=4, num_attacked=1, budgets=(10, 50)),
    "smoke": replace(FEW, models=(SELECTED, "ca", "oracle"), **SHORT),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Percentages: "search", a row a variant and factor; "selected"; "attacks"; over classes "rates", "keys" and "probes"."""
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
    about |= {"variants": {v: VARIANTS[v][1] for v in s.variants}, "search": search, "selected": chosen}
    return about | found, {}


def check(world, s: Settings) -> None:
    """Raise ValueError for an unknown variant, model or part, and for an evaluation that lacks the search it depends on."""
    from ..checks import check_choice

    accepted = {"variant": VARIANTS, "model": MODELS, "part": (*PARTS, TRAINING)}
    for kind, values in (("variant", s.variants), ("model", s.models), ("part", s.parts)):
        for value in values:
            check_choice(kind, value, accepted[kind])
    if SELECTED in s.models and not s.variants:
        raise ValueError("the selected variant is what the search selects: name the variants that it compares")


def searched(world, s: Settings, points: dict, variant: str) -> list[dict]:
    """A variant's candidates: each part of its step, and further ones while it erases less than the rule asks for."""
    rows = candidates(world, s, points, variant, s.factors)
    for factor in s.further:
        if rows[-1]["ESR-1"] < MIN_ESR:
            rows += candidates(world, s, points, variant, (factor,))
    return rows


def candidates(world, s: Settings, points: dict, variant: str, factors: tuple[float, ...]) -> list[dict]:
    """A variant's rates at parts of its step, on the tuning concepts and on seeds that no table reports."""
    from .kit.attack_sweep import TUNING_SEED
    from .kit.cache import cached, settings_dict

    erased, kept = world.concepts("tuning"), world.concepts("tuning kept")
    config, scale, train = prepared(world, s, points, variant, erased, TUNING_SEED)

    def measure():
        rows, first = [], TUNING_SEED
        whole = train()
        for factor in factors:
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
    about = "search", variant, list(erased), settings_dict(config), scale, factors, sizes, s.sampling_steps
    return cached("lock", VERSION, world, measure, *about)[0]["rows"]


def select(search: list[dict]) -> dict:
    """The candidate that the rule takes, with its "score" and, as "tier", which part of the rule took it."""
    rows = [row | {"score": round(mean([row[n] for n in SCORED]), 2)} for row in search]
    erasing = [row for row in rows if row["ESR-1"] >= MIN_ESR]
    opening = [row for row in erasing if row["right key"] >= MIN_KEY]
    if erasing:
        tier = "rule" if opening else "no key opens as much"
        return max(opening or erasing, key=lambda row: row["score"]) | {"tier": tier}
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

    Opponents have rates at each part of their steps, and are attacked at one of them; the selected variant has all at its own.
    Keys of another training seed, attacks and probes are measured on one split.
    """
    from ..evaluation.attack_success import references
    from .kit.cache import settings_dict

    erased, first = world.split(split), split == s.attacked_split
    if (part in ("attacks", "probes") and not first) or (part == "keys" and name not in (SELECTED, *VARIANTS)):
        return []
    if name in (BASE, ORACLE):
        fixed = references(world, erased).get(name)
        if fixed is None or part == TRAINING:
            return []
        return cells(world, s, name, name, split, part, lambda: fixed, (fixed.digest(),) if name == ORACLE else ())
    variant, factor = (chosen["variant"], chosen["factor"]) if name == SELECTED else (name, s.compared)
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

        about = settings_dict(config), round(scale * each, 4)
        own = cells(world, s, name, variant, split, part, scaled, about, other)
        rows += [row | {"factor": each} for row in own]
    return rows


def cells(world, s: Settings, name, variant, split, part, make, about, other=None) -> list[dict]:
    """One model's rows of one part, from the cache or measured; an attack is a cell of its own.

    `about`: what identifies the model beside its name: config and scale, or the oracle's digest.
    """
    from .kit.cache import cached

    erased, who = world.split(split), {"model": name, "split": split}
    kept = [c for c in world.concepts("classes") if c not in erased]
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
    if part == "probes":

        def measure():
            return {"rows": probed(world, s, make(), erased)}, None

        sizes = s.seeds, s.first_steps, s.finetune_steps, s.training_seed
        return [who | row for row in cached("lock", VERSION, world, measure, *parts, *sizes)[0]["rows"]]
    rows = []
    for concept in erased[: s.num_attacked]:
        for attack in SEARCHES:

            def measure(concept=concept, attack=attack):
                return {"rows": attacked(world, s, make(), concept, attack, s.budgets, s.training_seed)}, None

            sizes = concept, attack, s.budgets, s.attack_lr, s.attack_images, s.training_seed, s.seeds
            rows += [who | row for row in cached("lock", VERSION, world, measure, *parts, *sizes)[0]["rows"]]
    return rows
