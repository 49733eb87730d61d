"""The choice of the sampler: its rule, pairs of images, and that a model is trained once and drawn by every candidate."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from erasekit import paths
from erasekit.sampling import SAMPLERS
from erasekit.studies import samplers
from erasekit.studies.kit import cache, erasures, plots
from erasekit.studies.samplers import PRESETS, RATES, choose


def run(sampler, steps, *differences, model="kpop"):
    found = {rate: {"mean": d, "standard error": 0.5} for rate, d in zip(RATES, differences)}
    rates = dict.fromkeys(RATES, 90.0)
    return {"model": model, "sampler": sampler, "steps": steps, "evaluations": 2 * steps, "differences": found} | rates


RUNS = [
    run("ddim", 8, 9.0, 9.0, -9.0),
    run("dpm-solver++", 15, 0.8, -1.0, 0.0),
    run("unipc", 15, 0.4, 0.4, -0.4),
    run("unipc", 20, 0.0, 0.0, 0.0),
]


def test_the_cheapest_sampler_within_the_tolerance_is_chosen():
    assert choose(RUNS, 1.0) == {
        "chosen": {"sampler": "unipc", "steps": 15},  # as cheap as the other, and nearer
        "nearest": {"sampler": "unipc", "steps": 20},
    }
    assert choose(RUNS[:2], 1.0)["chosen"] == {"sampler": "dpm-solver++", "steps": 15}


def test_one_rate_of_one_model_is_enough_to_refuse_a_sampler():
    other = [run("dpm-solver++", 15, 0.0, 0.0, -1.2, model="base"), run("unipc", 15, 0.0, 1.2, 0.0, model="base")]
    assert choose([*RUNS, *other], 1.0)["chosen"] == {"sampler": "unipc", "steps": 20}
    none = choose([RUNS[0], RUNS[1], *other], 0.1)
    assert none == {"chosen": None, "nearest": {"sampler": "dpm-solver++", "steps": 15}}


def test_differences_are_paired_by_image():
    """Two images of four change sides in opposite directions: no difference, and an error; the same ones: neither."""
    one, other = np.array([0, 1, 1, 1]), np.array([1, 0, 1, 1])
    found = samplers.compare(dict.fromkeys(RATES, one), dict.fromkeys(RATES, other))["ESR-1"]
    assert found == {"mean": 0.0, "standard error": pytest.approx(100 * np.std([-1, 1, 0, 0], ddof=1) / 2, abs=1e-4)}
    same = samplers.compare(dict.fromkeys(RATES, one), dict.fromkeys(RATES, one))
    assert same["PSR-1"] == {"mean": 0.0, "standard error": 0.0}


def test_presets_name_samplers_there_are():
    for s in PRESETS.values():
        assert {sampler for sampler, _ in (*s.candidates, s.reference)} <= set(SAMPLERS)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)


def test_a_model_is_trained_once_and_drawn_by_all_samplers(world, build, monkeypatch):
    trained, drawn, erased = [], [], list(world.concepts("S1"))

    def train(given, concepts, method, config):
        trained.append((given.sampler, method, concepts))
        return method, 1.0

    def hits(given, erasure, prompts, steps):
        drawn.append((erasure, given.sampler, steps))
        kept = [int(label not in erased) for _, label, _ in prompts]  # what is erased is not recognised
        return {"top-1": [0] * len(kept) if erasure == "uce" and steps == 8 else kept, "top-5": kept}

    monkeypatch.setattr(erasures, "train_cached", train)
    monkeypatch.setattr(samplers, "hits", hits)
    small = {"models": ("base", "uce"), "candidates": (("ddim", 8), ("unipc", 8), ("unipc", 12))}
    s = replace(PRESETS["full"], seeds=2, **small)
    data, _ = samplers.compute(world, s)
    assert trained == [(world.sampler, "uce", erased)]  # by the world as it is
    asked = [("ddim", 100), ("ddim", 8), ("unipc", 8), ("unipc", 12)]
    assert drawn == [(model, *how) for model in (None, "uce") for how in asked]
    assert data["rates"]["uce"] == {"ESR-1": 100.0, "ESR-5": 100.0, "PSR-1": 100.0}
    assert data["chosen"] == {"sampler": "unipc", "steps": 12}
    assert samplers.compute(world, s)[0] == data and len(trained) == 1 and len(drawn) == 8  # from the cells' cache


def test_what_one_sampler_drew_is_not_anothers(world, build):
    other = copy.copy(world)
    other.sampler = "unipc"
    found = [cache.cached("test", 1, w, lambda w=w: ({"by": w.sampler}, None))[0]["by"] for w in (world, other, world)]
    assert found == [world.sampler, "unipc", world.sampler]


@pytest.mark.parametrize("runs, word", [(RUNS, "chosen"), (RUNS[:1], "nearest")])
def test_figure_and_table_say_what_was_chosen(runs, word):
    data = {"tolerance": 1.0, "reference": {"sampler": "ddim", "steps": 100, "evaluations": 200}, "runs": runs}
    record = SimpleNamespace(data=data | {"rates": {"kpop": dict.fromkeys(RATES, 90.0)}} | choose(runs, 1.0))
    table = samplers.table(record)
    assert len(table) == 1 + len(runs) and word in set(table.choice)
    with plots.style_sheet():
        (figure,) = samplers.figures(record).values()
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
    matplotlib.pyplot.close(figure)
    assert any(label.startswith("chosen: unipc, 15") for label in labels) == (word == "chosen")
