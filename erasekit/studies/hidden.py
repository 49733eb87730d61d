"""What many studies share: one method's erasure, trained, measured, and kept in the build folder so that long studies resume."""

from .panel import as_json, cell
from .strength import trained


def hidden(study: str, world, concepts: list[str], method: str, config, scale: float, measure, *parts):
    """`measure(erasure)`'s numbers, with the seconds it took to train, and strip of images, for a scale of the erasure's step.

    `parts` are the JSON-able settings that `measure` depends on; its code is the study's.
    """

    def compute():
        made, seconds = trained(world, concepts, method, config, scale)
        numbers, picture = measure(made)
        return numbers | {"training_seconds": seconds}, picture

    return cell(
        study, world, compute, f"erasekit.studies.{study}", method, list(concepts), as_json(config), scale, *parts
    )


def known(strengths: dict, *methods: str) -> None:
    """Raise ValueError naming the methods that no strength was chosen for."""
    missing = [m for m in methods if not strengths.get(m)]
    if missing:
        raise ValueError(
            f"no strength was chosen for {', '.join(missing)}: run the study that chooses it, 'strength' (of styles "
            "'style_strength'), at scale 'full' first"
        )
