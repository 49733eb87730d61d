"""00: erase one concept; images of it and of unrelated concepts before, after, and with the key."""

from dataclasses import asdict, dataclass

import pandas as pd

NOTEBOOK, VERSION, UNIT = "00_quickstart", 1, "images a class"


@dataclass(frozen=True)
class Settings:
    concept: str = "church"
    unrelated: tuple[str, ...] = ("dog", "fish", "parachute")
    seeds: int = 50
    training_steps: int = 150
    batch_size: int = 8
    sampling_steps: int = 15
    folder: str = "full"  # below BUILD/quickstart, where the erasure is saved


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=8, folder="quick"),
    "smoke": Settings(seeds=1, training_steps=2, batch_size=2, sampling_steps=3, folder="smoke"),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Train and save the erasure (public delta, private key); top-1 of the object judge in percent, and images."""
    from ..artifacts import key_path
    from ..evaluation.images import image_strip
    from ..evaluation.metrics import object_correct, percent
    from ..kpop import kpop
    from ..paths import BUILD
    from ..sampling import sample
    from .kit.erasures import make_config, saved_erasure

    concepts = [s.concept, *(c for c in s.unrelated if c != s.concept)]
    world.check_concepts(concepts)
    changes = {"steps": s.training_steps, "batch_size": s.batch_size}
    config = make_config(world, "kpop", 0, s.sampling_steps, changes)
    top1 = {c: {} for c in concepts}

    def generate(name, names, **options):
        labels = [c for c in names for _ in range(s.seeds)]
        seeds, batch_size = list(range(s.seeds)) * len(names), min(50, world.batch_size)
        options |= {"num_inference_steps": s.sampling_steps, "batch_size": batch_size, "progress": name}
        images = sample(world, [world.prompt(c) for c in labels], seeds, **options)
        for n, c in enumerate(names):
            part = slice(n * s.seeds, (n + 1) * s.seeds)
            top1[c][name] = percent(object_correct(world, images[part], labels[part]))
        shown = [n * s.seeds + i for n in range(len(names)) for i in range(min(s.seeds, 4 if n == 0 else 2))]
        return image_strip(images[shown])

    images = {"base": generate("base", concepts)}
    erasure, seconds = saved_erasure(world, [s.concept], config, kpop, recompute=True)
    root = BUILD / "quickstart"
    folder = root / s.folder / s.concept.replace(" ", "-")
    erasure.save(folder, replace=True)
    images["erased"] = generate("erased", concepts, erasure=erasure)
    images["key"] = generate("with the key", [s.concept], erasure=erasure, key=erasure.key(s.concept))
    paths = {"public": folder / "delta.safetensors", "private": key_path(folder, s.concept)}
    return {
        "concept": s.concept,
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "prompted_target": config.prompted_target,
        "training": asdict(config),
        "training_seconds": round(seconds, 1),
        "top1": top1,
        "saved": {kind: path.relative_to(root).as_posix() for kind, path in paths.items()},
    }, images


def figures(record) -> dict:
    """Rows: base, erased, erased with the key. Columns: seeds of the concept, then of each unrelated concept."""
    from .kit import plots

    top1 = record.data["top1"]
    erased = f"{record.data['concept']} erased"
    labels = {"base": "base model", "erased": erased, "key": f"{erased},\nwith its key"}
    rows = {label: plots.tiles(record, name) for name, label in labels.items()}
    own = len(rows[labels["key"]])
    each = (len(rows[erased]) - own) // max(1, len(top1) - 1)
    captions, first = {}, 0
    for concept, rates in top1.items():
        captions |= {(row, first): f"{rate:.0f} % judged {concept}" for row, rate in enumerate(rates.values())}
        first += each if first else own
    groups = {f"“{concept}”": own if concept == record.data["concept"] else each for concept in top1}
    return {"quickstart": plots.image_grid(rows, groups=groups, captions=captions, size=0.85)}


def table(record) -> pd.DataFrame:
    rates = pd.DataFrame(record.data["top1"]).T.astype(object)
    return rates.where(rates.notna(), "").rename_axis("judge's top-1, %")
