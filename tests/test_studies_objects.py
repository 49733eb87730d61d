"""The comparison of methods: what it is tuned on, its frontier, its operating points, and what its figures are laid out by."""

import copy
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from erasekit import paths
from erasekit.artifacts import Erasure
from erasekit.base import weights_of
from erasekit.baselines import METHODS
from erasekit.evaluation.intervals import wilson
from erasekit.studies import ablations, objects, operating_points, second_base, stronger, style_operating_points, unsafe
from erasekit.studies.kit import erasures
from erasekit.studies.kit.plots import pareto_front, spread, style_sheet
from erasekit.studies.kit.records import Record


def test_no_concept_that_is_tuned_on_or_retained_is_reported(world):
    reported = set(world.concepts("classes")).union(*world.neighbours.values())
    assert not any(reported & set(world.concepts(group)) for group in ("tuning", "tuning kept", "retained"))


def test_methods_are_compared_in_order_and_swept():
    # The tables have a method when its operating point is chosen.
    assert tuple(m for m in METHODS if m in operating_points.METHOD_NAMES) == operating_points.METHOD_NAMES
    assert all(method.sweep for method in METHODS.values())
    assert set(style_operating_points.SWEEP) <= set(METHODS)


def test_variants_change_settings_that_their_methods_have():
    rows = list(ablations.VARIANTS.values())
    rows += [(method, changes) for method, changes, _ in unsafe.VARIANTS.values()]
    assert all(objects.has_setting(method, name) for method, changes in rows for name in changes)


@pytest.mark.parametrize(
    "method, option, seed, expected",
    [
        ("kpop", "named", 2, True),
        ("uce", "named", 1, False),  # no randomness
        ("uce", "empty", 0, True),
        ("kpop", "empty", 1, False),
        ("np", "empty", 0, False),  # retains nothing
    ],
)
def test_only_runs_that_can_differ_are_computed(method, option, seed, expected):
    assert objects.worth_running(method, option, seed) == expected


def test_a_baseline_is_ahead_only_if_it_erases_more_and_keeps_more():
    def run(method, esr, psr):
        return {"method": method, "split": "S1", "ESR-1": esr, "PSR-1": psr, "others": 50.0}

    runs = [run("kpop", 90, 90), run("a", 95, 95), run("b", 99, 90), run("c", 80, 99)]
    assert objects.frontier(runs) == {"kpop": {"S1": {"PSR-1": ["a"], "others": []}}}


def test_the_recorded_frontier_follows_from_the_recorded_runs():
    data = Record.read(paths.RECORDS / "emojinette" / "full" / "objects.json").data
    assert objects.frontier([run for run in data["runs"] if run["retain"] == "named"]) == data["frontier"]


def test_points_along_the_step():
    def erasure(scale, delta):
        return SimpleNamespace(scale=scale, delta=delta, adapters={}, scaled=lambda _, x: erasure(scale * x, delta))

    measure = operating_points.along_step(None, (0.5, 1.0), lambda erasure: {"ESR-1": 100 * erasure.scale})
    assert measure(erasure(1, {"weight": 0}))[0]["points"] == [
        {"scale": 0.5, "ESR-1": 50},
        {"scale": 1.0, "ESR-1": 100},
    ]
    assert measure(erasure(1, {}))[0]["points"] == [{"scale": 1.0, "ESR-1": 100}]  # guidance alone has no step


def test_points_of_several_splits_are_averaged_by_scale():
    curves = [
        [{"scale": 0.5, "ESR-1": 10.0}, {"scale": 1.0, "ESR-1": 50.0}],
        [{"scale": 0.5, "ESR-1": 20.0}, {"scale": 1.0, "ESR-1": 60.0}],
    ]
    assert operating_points.mean_points(curves) == [{"scale": 0.5, "ESR-1": 15.0}, {"scale": 1.0, "ESR-1": 55.0}]


def test_interpolation_of_the_ablations():
    curve = [
        {"scale": x, "ESR-1": esr, "ESR-5": 0.0, "PSR-1": psr}
        for x, esr, psr in ((0.7, 90.0, 100.0), (1.0, 100.0, 80.0))
    ]
    short = [point | {"ESR-1": 50.0} for point in curve]
    runs = [{"variant": name, "curve": points} for name, points in (("kpop", curve), ("spm", short))]
    table = ablations.table(SimpleNamespace(data={"runs": runs}))
    assert table["PSR-1 at ESR-1 95"].to_dict() == {"kpop": 90.0, "spm": ""}  # too little is erased: no value


def test_pareto_front_has_what_nothing_beats():
    assert pareto_front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5)]) == [(1, 5), (2, 4), (3, 1)]


def test_labels_are_apart_in_order_and_on_the_axis():
    placed = spread([10.0, 9.9, 9.8, 1.0], gap=1.0, low=0.0, high=10.0)
    assert placed[0] == 10.0 and placed == sorted(placed, reverse=True)
    assert all(a - b >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert min(spread([0.1, 0.1, 0.0], gap=1.0, low=0.0, high=10.0)) == 0.0


def made_record(methods=("uce", "np"), splits=("a, b",), oracle=True, **settings):
    """A record with made up rates over four classes, "a, b" erased, and three other objects of two images each."""
    rates = {
        "ESR-1": 90.0,
        "PSR-1": 80.0,
        "others": 50.0,
        "neighbours": 70.0,
        "templates": {"x": 60.0, "y": 80.0},
        "synonyms seen": 40.0,
        "by_class": {"a": 0.0, "b": 20.0, "c": 70.0, "d": 90.0},
        "others_found": [2, 1, 0],
        "replaced": {"still it": 10.0, "another object": 60.0, "nothing told": 30.0},
        "hypernyms": {"a member": 80.0, "an erased class": 30.0},
    }
    far = {"distance erased": 0.5, "distance kept": 1.5}
    runs = [
        {"method": m, "split": split, "training_seed": 0, "retain": "named", "training_seconds": 3.0} | rates
        for m in methods
        for split in splits
    ]
    for run in runs:
        if oracle and run["split"] == splits[0]:
            run |= dict.fromkeys(far) if run["method"] == "np" else far
    data = {
        "N": 10,
        "sizes": {"others": 6},
        "splits": list(splits),
        "erased": {split: ["a", "b"] for split in splits},
        "repeated": [],
        "base": {split: rates for split in splits},
        "runs": runs,
    }
    data |= {"oracle": {splits[0]: rates | dict.fromkeys(far, 0.0)}} if oracle else {}
    return SimpleNamespace(data=data, settings={"few_seeds": 4, "other_seeds": 2, "retain": ["named"]} | settings)


@pytest.mark.parametrize(("split", "erased"), [("b", "b"), ("a, b", "ab"), ("S1", "abc")])
def test_a_splits_rates_are_those_of_what_it_erases(split, erased):
    """One class erased by its name leaves nine kept: its interval was that of five."""
    count, record = len(erased), made_record(splits=(split,))
    record.data["erased"][split] = [*erased]
    by_class = {name: 0.0 if name in erased else 100.0 for name in ("badc" if split == "b" else "abcd")}
    run = record.data["runs"][0] | {"by_class": by_class, "others_found": [2] * 50, "other templates": 50.0}
    found = objects.intervals(record, pd.DataFrame([run]))
    assert objects.num_erased(record, split) == count
    assert found["ESR-1"] == pytest.approx(wilson(100.0, 10 * count))
    assert found["PSR-1"] == pytest.approx(wilson(100.0, 10 * (4 - count)))
    assert found["others"] == pytest.approx(wilson(100.0, 100))
    assert found["other templates"] == wilson(50.0, 2 * 4 * count)


def test_images_of_one_object_are_not_taken_for_independent():
    """Half of 100 objects always drawn, half never: as uncertain as 100 images and not 400."""
    record = made_record(other_seeds=4)
    run = record.data["runs"][0] | {"others_found": [4] * 50 + [0] * 50}
    low, high = objects.intervals(record, objects.run_frame(record, [run]))["others"]
    assert high - low == pytest.approx(np.subtract(*wilson(50.0, 100)[::-1]), rel=0.15)


@pytest.mark.parametrize("splits", [("a, b",), ("a, b", "b, a")])
def test_the_table_has_the_oracle_and_the_distance_to_it(splits):
    table = objects.table(made_record(splits=splits))
    oracle = "oracle (never saw them)" + ", a, b" * (len(splits) > 1)  # only on the first
    assert list(table.index) == ["base", oracle, "uce", "np"]
    assert not any("R-5" in column for column in table) and "synonyms unseen" not in " ".join(table)
    assert table["ESR-1"]["uce"].startswith("90.0 (") and table["ESR-1, synonyms seen"]["uce"] == "40.0"
    assert table["distance to the oracle, erased (base: 1)"].to_dict() == {
        "base": "",
        oracle: "0.00",
        "uce": "0.50",
        "np": "",
    }
    assert table["training, s"].to_dict() == {"base": "", oracle: "", "uce": "3", "np": "3"}


def test_a_table_without_an_oracle_has_none_of_it():
    table = objects.table(made_record(oracle=False))
    assert list(table.index) == ["base", "uce", "np"] and "oracle" not in " ".join(table)


@pytest.mark.parametrize("oracle", [True, False])
def test_figures_of_what_replaces_the_concept_and_of_the_frontier(oracle):
    record = made_record(oracle=oracle)
    bars, hypernyms = objects.replaced_figure(record).axes
    rows = ["base", "oracle", "uce", "np"] if oracle else ["base", "uce", "np"]
    assert [label.get_text() for label in bars.get_yticklabels()] == rows
    assert [next(bar.get_width() for bar in group) for group in bars.containers] == [10, 60, 30]
    assert all(line.get_xdata()[0] in (30, 80) for line in hypernyms.lines)
    for ax in objects.frontier_figure(record).axes:
        assert [line.get_marker() for line in ax.lines].count("*") == oracle
        assert ("oracle" in [text.get_text() for text in ax.texts]) == oracle


def test_an_empty_hypernym_leaves_one_panel():
    record = made_record()
    for rates in (*record.data["runs"], *record.data["base"].values()):
        rates.pop("hypernyms", None)
    assert len(objects.replaced_figure(record).axes) == 1


def test_a_cell_is_the_same_for_the_oracle_and_for_methods(toy, monkeypatch, tmp_path):
    """Same parts, same further numbers; a world without an oracle has neither row nor distance."""
    asked = []

    def evaluate_split(world, erasure, concepts, *sizes):
        asked.append((erasure and erasure.info["method"], concepts, sizes))
        return {"ESR-1": 0.0, "PSR-1": 0.0, "others": 0.0}, Image.new("RGB", (2, 1))

    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr("erasekit.evaluation.protocol.evaluate_split", evaluate_split)
    classes = ("church", "dog")
    world = copy.copy(toy)
    world.groups = {"classes": classes, "all": (*classes, "fish"), "S1": classes[:1]}
    world.groups |= dict.fromkeys(("retained", "tuning", "tuning kept"), ())
    world.neighbours, world.trajectories = {"church": ("fish",)}, {}
    points = {m: {"settings": {}, "scale": 1.0} for m in ("uce", "np")}
    settings = replace(objects.PRESETS["smoke"], methods=("uce", "np"), operating_points=points)
    data, images = objects.compute(world, settings)
    assert "oracle" not in data and not any("distance erased" in run for run in data["runs"])
    delta = {n: p.detach() + 0.01 for n, p in weights_of({"": world.pipe.unet}).items()}
    oracle = Erasure(delta, {}, world.identity | {"method": "oracle", "concepts": ["church"], "config": {}})
    monkeypatch.setattr(type(world), "oracle", lambda world, concepts: oracle)
    data, images = objects.compute(world, settings)
    assert list(images) == ["base", "oracle", "uce", "np"]
    assert data["oracle"]["S1"]["distance erased"] == 0.0 == data["oracle"]["S1"]["distance kept"]
    uce, np_ = data["runs"]
    assert 0 < uce["distance erased"] < 10 and np_["distance erased"] is None
    sizes = (1, 1, 1, 2)
    assert [a for a in asked if a[0] == "oracle"] == [("oracle", ("church",), sizes)]
    assert len({a[1:] for a in asked}) == 1
    before = len(asked)
    objects.compute(world, settings)
    assert len(asked) == before  # all from the cache
    objects.compute(world, replace(settings, trajectory_steps=3))
    assert len(asked) == before + 3  # base's rates do not depend on it


def test_stronger_trains_each_method_once_a_split_and_draws_it_at_every_part_of_its_step(toy, monkeypatch, tmp_path):
    """Only the erased class is ever missing, and only from weights moved by more than the operating point's step."""
    trained, asked = [], []

    def erasure(scale, concepts):
        options = {"delta": {"w": 0}, "adapters": {}, "scaled": lambda _, x: erasure(scale * x, concepts)}
        return SimpleNamespace(scale=scale, concepts=concepts, **options)

    def sample_images(world, erasure, prompts, steps):
        asked.append((erasure and round(erasure.scale, 4), [label for _, label, _ in prompts]))
        return [erasure is None or erasure.scale <= 0.5 or label not in erasure.concepts for _, label, _ in prompts]

    def train(world, concepts, method, config, scale):
        trained.append((method, tuple(concepts)))
        return erasure(scale, tuple(concepts)), 1.0

    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr("erasekit.evaluation.images.sample_images", sample_images)
    monkeypatch.setattr(
        "erasekit.evaluation.metrics.object_correct", lambda world, images, labels: torch.tensor(images)
    )
    monkeypatch.setattr(erasures, "train_cached", train)
    world = copy.copy(toy)
    world.groups = {"classes": ("church", "dog"), "all": ("church", "dog", "fish"), "S1": ("church",), "S2": ("dog",)}
    world.groups |= dict.fromkeys(("retained", "tuning", "tuning kept"), ())
    points = {m: {"settings": {}, "scale": 0.5} for m in ("uce", "kpop")}
    sizes = {"factors": (1.0, 1.3), "seeds": 3, "kept_seeds": 2, "other_seeds": 1, "splits": ("S1", "S2")}
    settings = replace(stronger.PRESETS["smoke"], methods=("uce", "kpop"), operating_points=points, **sizes)
    data, _ = stronger.compute(world, settings)
    assert trained == [(method, erased) for erased in (("church",), ("dog",)) for method in ("uce", "kpop")]
    assert [scale for scale, _ in asked] == [None, 0.5, 0.65, 0.5, 0.65] * 2
    labels = [["church"] * 3 + ["dog"] * 2 + ["fish"], ["dog"] * 3 + ["church"] * 2 + ["fish"]]
    assert [own for _, own in asked] == labels[:1] * 5 + labels[1:] * 5
    assert data["erased"] == {"S1": ["church"], "S2": ["dog"]}
    assert [{name: data["base"][split][name] for name in stronger.RATES} for split in ("S1", "S2")] == [
        {"ESR-1": 0.0, "PSR-1": 100.0, "others": 100.0}
    ] * 2
    assert [
        (run["split"], run["method"], run["factor"], run["ESR-1"], run["PSR-1"], run["others"]) for run in data["runs"]
    ] == [
        (split, method, factor, esr, 100.0, 100.0)
        for split in ("S1", "S2")
        for method in ("uce", "kpop")
        for factor, esr in ((1.0, 0.0), (1.3, 100.0))
    ]
    count = len(asked)
    assert stronger.compute(world, settings)[0] == data and len(asked) == count  # from the cells' cache
    record = SimpleNamespace(data=data, settings=asdict(settings))
    factor, rates = stronger.equal_erasure(record, "kpop")
    assert factor == pytest.approx(1.0 + 0.95 * 0.3) and rates["ESR-1"] == pytest.approx([95.0, 95.0])
    table = stronger.table(record)
    assert list(table.index) == ["base", "uce", "kpop"] and "1 other objects" in table
    assert table["ESR-1"].to_dict()["base"] == "0.0" and table["PSR-1"]["kpop"].startswith("100.0 (")
    assert table["ESR-1 at its own step"]["kpop"] == "0.0"


def strength_record(**lines):
    """Two methods' or more classes "a" and "b" (a split each) by factor; the value is (ESR-1 of both classes, others)."""
    runs = [
        {
            "method": method,
            "split": split,
            "factor": factor,
            "by_class": {"ESR-1": {c: 100.0 - esr}, "PSR-1": {c: 90.0}, "others": {"x": kept, "y": kept}},
        }
        for method, points in lines.items()
        for split, c in (("S1", "a"), ("S2", "b"))
        for factor, (esr, kept) in zip((0.85, 1.0, 1.3), points)
    ]
    settings = {"factors": [0.85, 1.0, 1.3], "methods": [*lines], "splits": ["S1", "S2"], "seeds": 25}
    base = {
        split: {"ESR-1": 0.0, "PSR-1": 100.0, "others": 100.0, "by_class": {"others": {"x": 1, "y": 1}}}
        for split in "12"
    }
    return SimpleNamespace(data={"runs": runs, "base": base}, settings=settings | {"kept_seeds": 10, "other_seeds": 1})


STRENGTHS = {
    "esd-x": ((70.0, 100.0), (80.0, 90.0), (94.0, 80.0)),  # never enough
    "uce": ((90.0, 80.0), (100.0, 60.0), (100.0, 0.0)),  # half way from 0.85 to 1
    "ca": ((97.0, 75.0), (99.0, 50.0), (100.0, 0.0)),  # more than enough at once
    "kpop": ((40.0, 99.0), (60.0, 95.0), (95.0, 90.0)),
}


def test_methods_are_ranked_where_they_erase_as_much():
    record = strength_record(**STRENGTHS)
    found = {m: stronger.equal_erasure(record, m) for m in STRENGTHS}
    assert {m: round(factor, 4) for m, (factor, _) in found.items()} == {
        "esd-x": 1.3,
        "uce": 0.925,
        "ca": 0.85,
        "kpop": 1.3,
    }
    assert {m: rates["others"].mean() for m, (_, rates) in found.items()} == {
        "esd-x": 80,
        "uce": 70,
        "ca": 75,
        "kpop": 90,
    }
    assert stronger.ranking(record) == ["kpop", "ca", "uce", "esd-x"]
    table = stronger.table(record)
    assert list(table.index) == ["base", "kpop", "ca", "uce", "esd-x"]
    assert table["ESR-1"]["esd-x"].startswith("94.0 (") and table["ESR-1 at its own step"]["uce"] == "100.0"


def test_a_difference_is_that_of_what_is_kept_where_both_erase_as_much():
    record = strength_record(**STRENGTHS)
    assert stronger.difference(record, "kpop", "uce") == pytest.approx((20, 20, 20))  # all classes and objects alike
    assert stronger.difference(record, "esd-x", "ca") == pytest.approx(
        (5, 5, 5)
    )  # one at its strongest, one at its gentlest
    column = stronger.table(record)["of these, more than kpop, paired"]
    assert column["uce"] == "-20.0 (-20.0 to -20.0)" and column["kpop"] == column["esd-x"] == ""


def test_a_difference_is_paired():
    """Objects that both methods fail on add no spread; classes do, which decide at what strength each erases enough."""
    lines = {"ca": ((90.0, 80.0), (100.0, 60.0), (100.0, 0.0)), "kpop": ((90.0, 70.0), (100.0, 50.0), (100.0, 0.0))}
    record = strength_record(**lines)
    for run in record.data["runs"]:
        run["by_class"]["others"]["y"] -= 40
    assert stronger.difference(record, "ca", "kpop") == pytest.approx((10, 10, 10))
    for run in record.data["runs"]:  # class "a" of kpop is erased only by more of its step
        if (run["method"], run["split"], run["factor"]) == ("kpop", "S1", 1.0):
            run["by_class"]["ESR-1"] = {"a": 20.0}
    mean, low, high = stronger.difference(record, "ca", "kpop")
    kept = {m: stronger.equal_erasure(record, m)[1]["others"].mean() for m in lines}
    assert mean == pytest.approx(kept["ca"] - kept["kpop"]) and low < mean < high


def test_the_figure_of_equal_erasure_says_who_never_gets_there():
    with style_sheet():
        figure = stronger.figures(strength_record(**STRENGTHS))["objects_stronger"]
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["kpop", "ca", "uce", "esd-x"]
    assert [text.get_text() for text in left.texts if text.get_text()] == ["erases 94 % at most"]
    drawn = {line.get_label(): [*line.get_xdata()] for line in right.lines}
    assert drawn["uce"] == [90, 100, 100] and set(STRENGTHS) <= set(drawn)


def test_a_second_bases_table_has_the_mean_over_trainings_and_pairs_it_on_each_base():
    """Two trainings that keep 10 points more and less than their mean, on two bases that differ by 20."""
    record, runs = strength_record(**{m: STRENGTHS[m] for m in ("uce", "kpop")}), []
    for base, seed, shift in (("bundled", 0, 0), ("bundled", 1, -20), ("second", 0, -20), ("second", 1, -40)):
        for run in record.data["runs"]:
            kept = {
                c: rate + (shift if run["method"] == "kpop" else 0) for c, rate in run["by_class"]["others"].items()
            }
            about = {"base": base, "training_seed": seed, "by_class": run["by_class"] | {"others": kept}}
            runs.append(run | about)
    record.data = {"runs": runs, "bases": {"bundled": {}, "second": {}}, "training_seeds": 2}
    assert second_base.ranking(record) == ["kpop", "uce"]
    table = second_base.table(record)
    paired = table["of these, more than kpop, paired: bundled / second base"]
    assert paired["uce"] == "-10.0 (-10.0 to -10.0) / +10.0 (+10.0 to +10.0)" and paired["kpop"] == ""
    spread = second_base.spread(record, "kpop")["others"]
    assert spread["trainings"] == pytest.approx(20 / 2**0.5) and spread["bases"] == pytest.approx(20 / 2**0.5)
    assert spread["concepts"] == 0
    with style_sheet():
        assert len(second_base.figures(record)["objects_second_base"].axes) == 2
