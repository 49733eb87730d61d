"""Erasures that a study is given, another project's or one's own: methods whose training is done."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from ...artifacts import Erasure
from ...base import check_base
from ...baselines import METHODS, Method
from .cache import digest

ACCEPTED = re.compile(r"[\w ,+()-]+")  # in names, which become parts of file names


@dataclass(frozen=True)
class Given:
    """The config of such a method: what decides its numbers."""

    digest: str
    concepts: tuple[str, ...]


def given_configs(erasures: dict) -> dict[str, Given]:
    """Name -> config. Raises ValueError for a name that is taken or no file could have, and for what is no erasure."""
    configs = {}
    for name, erasure in erasures.items():
        if name in METHODS or name == "base" or not ACCEPTED.fullmatch(name):
            raise ValueError(
                f"an erasure cannot be named {name!r}: accepted are letters, digits, spaces and ,+()- but no method's name"
            )
        if not isinstance(erasure, Erasure) or not erasure.info.get("concepts"):
            raise ValueError(
                f"{name!r} is no erasure that says what it erases: ek.read(path, base, concepts=[...]) does"
            )
        keys = {concept: key.digest() for concept, key in erasure.keys.items()}
        concepts = tuple(erasure.info["concepts"])
        configs[name] = Given(digest(erasure.digest(), keys, concepts), concepts)
    return configs


@contextmanager
def given_methods(world, erasures: dict) -> Iterator[None]:
    """Each erasure is a method by its name inside the block. Raises ValueError for an erasure of another base."""
    methods = {}
    for name, config in given_configs(erasures).items():
        erasure = erasures[name]
        check_base(world, erasure.info, f"erasure {name!r}")
        keys = erasure.keys if set(config.concepts) <= set(erasure.keys) else {}  # some alone serve no rate
        methods[name] = Method(partial(replace, erasure, keys=keys), Given, vars(config), ({},))
    METHODS.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del METHODS[name]


def is_given(method: str) -> bool:
    return method in METHODS and METHODS[method].config is Given


def erases(method: str, concepts) -> bool:
    """Whether a method has a row where these concepts are erased at once: a given erasure has only if they are its own."""
    return not is_given(method) or set(METHODS[method].defaults["concepts"]) == set(concepts)


def check_given(methods, groups, setting: str | None = None) -> None:
    """Raise ValueError for a given erasure that erases none of the groups of concepts that a study measures.

    `setting`: the study's setting that chooses them, if it has one.
    """
    for name in filter(is_given, methods):
        if not any(erases(name, group) for group in groups):
            own, measured = ", ".join(METHODS[name].defaults["concepts"]), "; ".join(map(", ".join, groups))
            hint = f": its setting {setting!r} chooses others" if setting else ""
            raise ValueError(f"{name!r} erases {own}, and this study measures erasures of {measured}{hint}")
