"""A world's rates are its defaults, whatever the way of calling: what is given is taken as given, what is not is the world's."""

import copy
from dataclasses import asdict, replace

import pytest

from erasekit import paths
from erasekit.artifacts import Erasure
from erasekit.baselines import METHODS, erase, method_config
from erasekit.kpop import KPOP, kpop
from erasekit.studies.kit.erasures import train_cached
from erasekit.tools import cli

RATES = {"steps": 2, "batch_size": 1, "lr": pytest.approx(1e-5), "num_trajectories": 2, "trajectory_steps": 3}
ON_POLICY = {"latents": "on_policy"}


@pytest.fixture
def own(toy, monkeypatch, tmp_path):
    """The toy with a published training, which `load` returns."""
    world = copy.copy(toy)
    world.train_defaults, world.lr_scale = {"steps": 2, "batch_size": 1}, 0.1
    world.pool_defaults = {"num_trajectories": 2, "trajectory_steps": 3}
    world.keeps_images = True  # studies keep what they train in the build folder
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr("erasekit.worlds.load", lambda *_, **__: world)
    return world


def command_line(method, config, folder):
    settings = {n: v for n, v in asdict(config or METHODS[method].config()).items() if isinstance(v, (int, float))}
    changes = [part for name, value in settings.items() if name in RATES for part in ("--set", f"{name}={value}")]
    assert cli.main(["erase", "dog", "--method", method, *changes, "--out", str(folder), "--quiet"]) == 0
    return Erasure.load(folder)


CASES = [None, {}, {"lr": 1e-4}, {"steps": 1, "num_trajectories": 1}, ON_POLICY]


@pytest.mark.parametrize("given", CASES)
@pytest.mark.parametrize("method, call", [("kpop", "kpop"), ("kpop", "erase"), ("esd-x", "erase"), ("kpop", "study")])
def test_a_worlds_rates_are_its_defaults(own, method, call, given):
    config = None if given is None else METHODS[method].config(**given)
    if call == "kpop":
        erasure = kpop(own, ["dog"], config, progress=False)
    elif call == "erase":
        erasure = erase(own, ["dog"], method, config, progress=False)
    else:
        erasure, _ = train_cached(own, ["dog"], method, config or method_config(method))
    pool = {"num_trajectories": None, "trajectory_steps": None} if given == ON_POLICY else {}
    found = erasure.info["config"]
    assert {name: found[name] for name in RATES} == RATES | pool | {
        n: v for n, v in (given or {}).items() if n in RATES
    }


@pytest.mark.parametrize("given", CASES[1:-1])
def test_the_command_lines_too(own, given, tmp_path):
    found = command_line("esd-x", METHODS["esd-x"].config(**given), tmp_path / "out").info["config"]
    assert {name: found[name] for name in RATES} == RATES | given


def test_a_world_without_rates_of_its_own_takes_the_methods(toy):
    """Those of every committed record."""
    found = {m: method_config(m, toy) for m in METHODS if hasattr(METHODS[m].config, "RATES")}
    assert all((c.batch_size, c.num_trajectories, c.trajectory_steps) == (8, None, None) for c in found.values())
    steps = dict.fromkeys(("kpop", "kpop-anchor", "kpop-adversarial"), 150) | {"mace": 50}
    lrs = {"spm": 3e-3, "receler": 1e-3, "mace": 3e-4}
    assert {m: c.steps for m, c in found.items()} == dict.fromkeys(found, 100) | steps
    assert {m: c.lr for m, c in found.items()} == dict.fromkeys(found, 1e-4) | lrs
    assert replace(KPOP(), m=3).lr is None, "a changed copy leaves open what was open"
