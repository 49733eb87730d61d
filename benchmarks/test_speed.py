"""How long the pieces take in the bundled world: `pytest benchmarks`, with pytest-benchmark.

Compare two states of the code with `pytest benchmarks --benchmark-autosave` and `pytest benchmarks --benchmark-compare`.
"""

import pytest

import erasekit as ek
from erasekit.metrics import judged
from erasekit.studies.reach import untouched
from erasekit.trajectories import trajectory

CONCEPT, IMAGES, STEPS = "church", 8, 5
SHORT = {"steps": 5, "rolled": 1, "retain": ("castle", "bear")}
PAPER = {"recipe": "paper", "batch": 1, "rolled": None}  # it keeps no pool
WAYS = {
    "kpop": ("kpop", {}),
    "kpop, joint": ("kpop", {"stages": "joint"}),
    "kpop, paper's recipe": ("kpop", PAPER),
    "esd-x": ("esd-x", {}),
    "esd-x, paper's recipe": ("esd-x", PAPER),
}


@pytest.fixture(scope="module")
def world():
    return ek.load("emojinette")


@pytest.fixture(scope="module")
def hidden(world):
    return ek.erase(world, [CONCEPT], "kpop", ek.settings("kpop", **SHORT), progress=False)


@pytest.mark.parametrize("way", WAYS)
def test_five_training_steps(benchmark, world, way):
    """The pool, where there is one, is rolled before."""
    method, changes = WAYS[way]
    config = ek.settings(method, **SHORT | changes)
    benchmark.pedantic(ek.erase, (world, [CONCEPT], method, config, None, False), rounds=3, warmup_rounds=1)


def test_a_text_of_the_pool(benchmark, world):
    """One trajectory of 25 steps."""
    benchmark.pedantic(trajectory, (world, world.prompt(CONCEPT), "", 0, 1, 25, 3.0), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("who", ["base", "hidden", "with the key"])
def test_drawing(benchmark, world, hidden, who):
    """Eight images in five steps."""
    erasure = untouched(world) if who == "base" else hidden
    how = {"erasure": erasure, "key": hidden.key(CONCEPT) if who == "with the key" else None, "steps": STEPS}
    asked = [world.prompt(CONCEPT)] * IMAGES, list(range(IMAGES))
    benchmark.pedantic(ek.sample, (world.pipe, *asked), how | {"autocast": world.autocast}, rounds=5, warmup_rounds=1)


def test_judging(benchmark, world):
    """A hundred images."""
    images = ek.sample(world.pipe, ["a picture"], [0], steps=1).repeat(100, 1, 1, 1)
    benchmark.pedantic(judged, (world, images), rounds=3, warmup_rounds=1)
