"""Notebook 16: interference between objects, many concepts at once, and background and style of what is kept."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.artifacts import Erasure
from erasekit.attention import initial_prompt
from erasekit.evaluation.intervals import bootstrap_mean
from erasekit.sampling import sample
from erasekit.studies import binding, interference, many_concepts, scale
from erasekit.studies.kit.plots import style_sheet

COLOURS = {"white": (255, 255, 255), "red": (226, 122, 122), "blue": (132, 178, 240)}


# ---------------------------------------------------------------------------------------------------------- interference


def some_effects(base_shown=(1, 1, 1, 1, 0)):
    """Five objects, of which "a" and "b" are erased; "e" is not drawn by the base."""
    base = {"shown": [*base_shown], "probability": [90.0, 90.0, 90.0, 90.0, 10.0]}
    rows = [
        {"shown": [0, 1, 1, 0, 0], "probability": [0.0, 80.0, 70.0, 10.0, 90.0], "changed": [9.0, 0.1, 0.2, 0.3, 5.0]},
        {"shown": [1, 0, 1, 1, 0], "probability": [90.0, 0.0, 90.0, 90.0, 90.0], "changed": [0.1, 9.0, 0.2, 0.3, 5.0]},
    ]
    rows = [row | {"training_seconds": 1.0} for row in rows]
    alike = np.array([[1.0, 0.1, 0.2, 0.3, 0.9]] * 5)
    return interference.effects([*"abcde"], ["a", "b"], base, rows, {"text": alike, "picture": -alike})


def test_effects_are_on_receivers_that_the_base_draws_and_not_on_the_emitter():
    (a, b), matrix = some_effects()
    assert (a["emitter"], a["erased"], a["lost"], a["fall"]) == (
        "a",
        1,
        33.33,
        pytest.approx((10 + 20 + 80) / 3, abs=1e-3),
    )
    assert a["changed"] == pytest.approx(0.2) and list(a["worst"]) == ["d", "c", "b"]
    assert b["lost"] == 0.0 == b["fall"]
    assert matrix.tolist() == [[90, 10, 20, 80, interference.BLANK], [0, 90, 0, 0, interference.BLANK]]


def test_rank_correlations_of_effects():
    (a, b), _ = some_effects()
    assert a["rho"]["fall"] == {"text": 1.0, "picture": -1.0, "fragility": pytest.approx(-0.866, abs=1e-3)}
    assert set(b["rho"]["fall"].values()) == {None}, "nothing falls: there is nothing to rank"
    assert interference.correlations([a, b], "fall")["text"][0] == 1.0


def test_a_method_with_one_emitter_has_no_fragility():
    base = {"shown": [1, 1, 1], "probability": [9.0, 9.0, 9.0]}
    row = {"shown": [0, 1, 1], "probability": [0.0, 8.0, 7.0], "changed": [1, 2, 3], "training_seconds": 1.0}
    [run], _ = interference.effects([*"abc"], ["a"], base, [row], {"text": np.eye(3) + np.arange(3)})
    assert run["rho"]["fall"] == {"text": 1.0}


def test_emitters_are_objects_that_no_method_sees(world, refused):
    full, every = interference.PRESETS["full"], interference.reportable(world)
    assert len(every) == len(world.concepts("all")) - 20
    plan = interference.emitters(world, full, every)
    assert set(world.split("S1")) < set(plan["kpop"]) == set(plan["spm"]) < set(plan["uce"]) < set(every)
    assert set(interference.emitters(world, interference.Settings(every={}), every)["uce"]) == set(world.split("S1"))
    narrowed = interference.Settings(emitters=("church", "owl"))
    refused(ValueError, "'owl' cannot be an emitter", lambda: interference.emitters(world, narrowed, every))


def test_similarities_are_symmetric_and_largest_to_oneself(world):
    names = ["dog", "wolf", "church"]
    for matrix in map(np.array, interference.similarities(world, names, 1, 1, 2).values()):
        assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1, atol=1e-4)
        assert (matrix - np.eye(3)).max() < 0.9999
    text = np.array(interference.similarities(world, names, 1, 1, 2)["text"])
    assert text[0, 1] > text[0, 2], "a dog is nearer to a wolf than to a church"


def test_the_figures_and_the_table_of_interference():
    runs, matrix = some_effects()
    rows = [*({"method": "uce"} | run for run in runs), {"method": "kpop"} | runs[0] | {"lost": 0.0}]
    data = {"runs": rows, "objects": [*"abcde"], "few": ["a"], "base": 80.0}
    data["groups"] = ["x", "x", "x", "", ""]
    images = {"uce": Image.fromarray(matrix), "kpop": Image.fromarray(matrix[:1])}
    record = SimpleNamespace(data=data, settings={"methods": ["uce", "kpop"]}, images=images)
    table = interference.table(record)
    assert list(table.index) == ["uce", "uce, all 2", "kpop"] and table["emitters"].tolist() == ["1", "2", "1"]
    assert table["others lost, less kpop's, points"].tolist() == ["33.33", "", ""]
    with style_sheet():
        figures = interference.figures(record)
    [dots] = figures["interference"].axes[0].collections[:1]
    assert dots.get_offsets().tolist() == []  # of one kind nothing falls by 50 points
    assert [c.get_offsets().tolist() for c in figures["interference"].axes[0].collections[1:]] == [[[3.0, 0.0]]]
    assert [ax.get_xlim()[0] < 0 for ax in figures["interference_predictors"].axes] == [True, True]


# ----------------------------------------------------------------------------------------------------------------- scale


def test_few_classes_have_more_images():
    assert [scale.images_of_each(5, 100, n) for n in (1, 5, 20, 100)] == [100, 20, 5, 5]


def test_what_is_kept_is_never_erased(world):
    candidates, kept = many_concepts.candidates_and_kept(world)
    assert candidates[:10] == world.concepts("classes") and len(candidates) >= max(scale.PRESETS["full"].counts)
    assert not set(candidates) & set(kept)


def test_a_batch_of_many_keys_draws_what_each_key_draws_alone(world, monkeypatch):
    drawn = []

    def object_correct(world, images, labels):
        drawn.append(images)
        return torch.tensor([label == "dog" for label in labels])

    monkeypatch.setattr("erasekit.evaluation.metrics.object_correct", object_correct)
    keys = {c: initial_prompt(world.concept_tokens(c), 2) for c in ("church", "dog")}
    erasure = Erasure({}, keys, world.identity | {"method": "kpop", "concepts": [*keys], "config": {}})
    assert scale.rates_with_keys(world, erasure, [*keys], 2, 2) == {"church": 0.0, "dog": 100.0}
    for n, concept in enumerate(keys):
        how = {"erasure": erasure, "num_inference_steps": 2}
        one, other = (sample(world, [world.prompt(concept)] * 2, [0, 1], key=keys[c], **how) for c in keys)
        own = drawn[0][2 * n : 2 * n + 2].int()
        near = [(own - images.int()).abs().max() <= 2 for images in (one, other)]
        assert near == [concept == "church", concept == "dog"]


def test_the_figure_and_the_table_of_scale():
    def run(method, count, **more):
        by_class = {"ESR-1": dict.fromkeys(range(count), 10.0), "kept": {"x": 80.0, "y": 60.0}}
        by_class |= {"with the key": dict.fromkeys(range(count), 100.0)} if more else {}
        rates = {"ESR-1": 90.0, "kept": 70.0, "training_seconds": 3.0} | more
        return {"method": method, "count": count, "by_class": by_class} | rates

    runs = [run("uce", 1), run("spm", 1), run("kpop", 1, **{"with the key": 100.0})]
    settings = {"seeds": 5, "images": 10, "kept_seeds": 2}
    data = {"runs": runs, "base": {"1": {"ESR-1": 5.0, "kept": 95.0}}, "kept": 2}
    record = SimpleNamespace(data=data, settings=settings)
    table = scale.table(record)
    assert list(table.index) == ["base, 1", "uce, 1", "spm, 1", "kpop, 1"] and table["with the key"]["uce, 1"] == ""
    assert table["2 other objects"]["kpop, 1"].startswith("70.0 (")
    low, high = scale.intervals(record, runs[0])["ESR-1"]
    assert low < 90 < high
    with style_sheet():
        [figure] = scale.figures(record).values()
    assert [ax.get_title() for ax in figure.axes] == [*scale.RATES.values(), "seconds of training"]
    assert [len(ax.texts) for ax in figure.axes] == [3, 3, 1, 3]  # the names at the lines' ends
    assert {t.get_text() for t in figure.axes[0].texts if t.get_color() == scale.GREY} == {"spm"}


# --------------------------------------------------------------------------------------------------------------- binding


def test_the_background_is_what_most_of_the_frame_shows():
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    images[0] = torch.tensor([230, 118, 126])[:, None, None]
    images[1] = torch.tensor(COLOURS["blue"])[:, None, None]
    images[:, :, :30] = 255  # an object that reaches the frame on three sides
    images[:, :, 10:54, 10:54] = 255
    assert binding.border_colours(images, COLOURS) == ["red", "blue"]


def test_every_colour_is_asked_for_in_every_style_equally_often_and_nothing_that_is_erased(world):
    asked = binding.questions(world, world.split("S1"), binding.PRESETS["full"].images)
    pairs = [(style, colour) for _, style, colour, _ in asked]
    assert {pairs.count(pair) for pair in pairs} == {8} and len({*pairs}) == 35 and "white" not in {c for _, c in pairs}
    assert not {name for name, *_ in asked} & {*world.split("S1"), *world.retained, *world.concepts("tuning")}
    assert all(
        style in text and f"on a{'n' * (colour == 'orange')} {colour} background" in text
        for _, style, colour, (text, *_) in asked
    )


def test_differences_are_paired_by_image():
    base, same = {"object": "1101", "style": "1100"}, {"object": "1101", "style": "0011"}
    found = binding.compare(base, same)
    assert found["object"]["difference interval"] == [0.0, 0.0] and found["object"]["rate"] == 75.0
    low, high = found["style"]["difference interval"]
    assert found["style"]["difference"] == 0.0 and low <= -50 and high >= 50


def test_the_figures_and_the_table_of_binding():
    outcomes = dict.fromkeys(binding.RATES, "1100")
    runs = [
        {"method": "base"} | binding.compare(outcomes, outcomes),
        {"method": "uce"} | binding.compare(outcomes, outcomes),
    ]
    data = {"runs": runs, "asked": [["dog", "noto", "red"]]}
    images = {name: Image.new("RGB", (8, 8)) for name in ("base", "uce")}
    record = SimpleNamespace(data=data, settings={"split": "S1"}, images=images)
    table = binding.table(record)
    assert table["style"].to_dict() == {"base": "50.0", "uce": "50.0 (+0.0: +0.0 to +0.0)"}
    with style_sheet():
        figures = binding.figures(record)
    assert [label.get_text() for label in figures["binding"].axes[0].get_yticklabels()] == ["uce"]


def test_the_bootstrap_of_a_mean():
    low, high = bootstrap_mean([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert bootstrap_mean([3.0, 3.0]) == (3.0, 3.0) and bootstrap_mean([1.0]) == (-math.inf, math.inf)
