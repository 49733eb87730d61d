"""Speed of the main operations in the bundled world: `pytest benchmarks`, with pytest-benchmark.

Compare two states of the code with `pytest benchmarks --benchmark-autosave` and `pytest benchmarks --benchmark-compare`.
"""

import pytest

import erasekit as ek
from erasekit.evaluation.attack_success import untouched
from erasekit.evaluation.metrics import judge_images
from erasekit.studies.efficiency import PUBLISHED
from erasekit.trajectories import trajectory

CONCEPT, IMAGES, STEPS = "church", 8, 5
SHORT = {"steps": 5, "retain": ("castle", "bear")}
TRAININGS = {
    "kpop": ("kpop", {"num_trajectories": 1}),
    "kpop, joint": ("kpop", {"num_trajectories": 1, "schedule": "joint"}),
    "kpop, as published": ("kpop", PUBLISHED),
    "esd-x": ("esd-x", {"num_trajectories": 1}),
    "esd-x, as published": ("esd-x", PUBLISHED),
}


@pytest.fixture(scope="module")
def world():
    return ek.load("emojinette")


@pytest.fixture(scope="module")
def erasure(world):
    return ek.erase(world, [CONCEPT], "kpop", ek.method_config("kpop", **SHORT, num_trajectories=1), progress=False)


@pytest.mark.parametrize("training", TRAININGS)
def test_five_training_steps(benchmark, world, training):
    """Without the pool of latents, which the warm-up samples."""
    method, changes = TRAININGS[training]
    config = ek.method_config(method, **SHORT | changes)
    benchmark.pedantic(ek.erase, (world, [CONCEPT], method, config, None, False), rounds=3, warmup_rounds=1)


def test_one_trajectory_of_the_pool(benchmark, world):
    """25 steps."""
    benchmark.pedantic(trajectory, (world, world.prompt(CONCEPT), "", 0, 1, 25, 3.0), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("model", ["base", "erased", "with the key"])
def test_sampling(benchmark, world, erasure, model):
    """Eight images in five steps."""
    options = {"erasure": untouched(world) if model == "base" else erasure, "num_inference_steps": STEPS}
    options |= {"key": erasure.key(CONCEPT) if model == "with the key" else None, "autocast": world.autocast}
    prompts, seeds = [world.prompt(CONCEPT)] * IMAGES, list(range(IMAGES))
    benchmark.pedantic(ek.sample, (world.pipe, prompts, seeds), options, rounds=5, warmup_rounds=1)


def test_judging(benchmark, world):
    """A hundred images."""
    images = ek.sample(world.pipe, ["a picture"], [0], num_inference_steps=1).repeat(100, 1, 1, 1)
    benchmark.pedantic(judge_images, (world, images), rounds=3, warmup_rounds=1)
