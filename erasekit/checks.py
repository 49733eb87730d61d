"""What is impossible, refused in one sentence before anything is spent: choices, lists of names, numbers, tensors."""

import math
import numbers
from dataclasses import fields
from typing import get_args

LEAST = {"transfer_steps": 0, "inner": 0, "rounds": 0, "seed": -math.inf}  # of whole numbers; 1 for all others
LEAST_REAL = {"eta": -1}  # at -1 the target is the concept itself; 0 for all others
POSITIVE = ("lr", "temperature", "rho")  # endings of names of real numbers that must be above 0


def check_choice(name: str, value, accepted) -> None:
    """Raise ValueError unless the value is one of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"unknown {name} {value!r}: accepted are {', '.join(accepted)}")


def as_tuple(name: str, value) -> tuple:
    """A list as a tuple. Raises ValueError for a bare string, which would be read letter by letter."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is one text, not a list of them: give [{value!r}]")
    return tuple(value)


def check_concepts(concepts: list[str]) -> None:
    """Raise ValueError for no concept, an empty one, one named twice, or a bare string."""
    if isinstance(concepts, str):
        raise ValueError(f"concepts={concepts!r} is one string: give a list, [{concepts!r}]")
    if not concepts or any(not c.strip() for c in concepts):
        raise ValueError(f"there is an empty concept in {concepts!r}: name at least one, each with a word")
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"a concept is named twice in {concepts!r}")


def check_number(name: str, value, least: float = 0, whole: bool = False, above: bool = False) -> None:
    """Raise ValueError unless the value is a finite number, at least `least` or `above` it, and `whole` if it must be."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"{name}={value!r} is not possible: it is a {'whole ' * whole}number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not possible: it is a finite number")
    if value < least or (above and value == least):
        raise ValueError(f"{name}={value!r} is not possible: it is {'above' if above else 'at least'} {least}")


def check_numbers(config) -> None:
    """`check_number` for every number of a config, by its type and name. Raises ValueError."""
    for entry in fields(config):
        name, value, kinds = entry.name, getattr(config, entry.name), get_args(entry.type) or (entry.type,)
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            check_number(name, value, LEAST.get(name, 1), whole=True)
        elif float in kinds:
            check_number(name, value, LEAST_REAL.get(name, 0), above=name.endswith(POSITIVE))


def check_finite(what: str, tensors: dict) -> None:
    """Raise ValueError naming the first tensor with a NaN or an infinite number."""
    import torch

    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} is not finite: {name} has NaN or infinite numbers, so no image would be right")
