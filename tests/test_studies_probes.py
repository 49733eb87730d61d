"""Notebook 15's studies: which models are probed, that each is probed once, and what is counted of what is drawn."""

import copy
import re
from dataclasses import asdict, replace
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
from erasekit.evaluation.intervals import bootstrap
from erasekit.sampling import sample
from erasekit.studies import probes, probes_weights
from erasekit.studies.kit import given, probed
from erasekit.studies.kit.plots import style_sheet

POINTS = {m: {"settings": {}, "scale": 1.0} for m in ("uce", "kpop", "sld")}
NAMES = ("church", "dog", "fish")


class LinearJudge(torch.nn.Module):
    """Three objects, each the brighter in one colour."""

    objects, styles = NAMES, ("plain",)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.weight * x.mean((2, 3)), torch.zeros(len(x), 1)


class ColourClip(torch.nn.Module):
    """An image is as its mean colour, a text as the colour of its object."""

    def encode_image(self, images, normalize=False):
        return images.mean((2, 3))

    def encode_text(self, tokens, normalize=False):
        return torch.eye(3)[tokens]


def coloured(*names):
    """Uint8 pictures (N, 3, 16, 16), each brightest in its object's colour."""
    images = torch.zeros(len(names), 3, 16, 16, dtype=torch.uint8)
    for image, name in zip(images, names):
        image[NAMES.index(name)] = 200
    return images


@pytest.fixture
def world(toy, tmp_path, monkeypatch):
    """The toy as a benchmark that is judged by colour, with pictures of its objects."""
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    world = copy.copy(toy)
    world.groups = {"classes": NAMES[:2], "all": NAMES, "S1": NAMES[:1], "tuning": NAMES[2:], "tuning kept": ()}
    world.groups |= {"retained": ()}
    world.judge, world.trajectories = LinearJudge(), {}
    world.clip = ColourClip(), lambda texts: torch.tensor([NAMES.index(text.split()[-1]) for text in texts])
    pictures = {name: coloured(name).float() / 127.5 - 1 for name in NAMES}
    monkeypatch.setattr(
        type(world),
        "concept_images",
        lambda self, c, count, seed=0: (
            pictures[c].expand(min(count, 2), -1, -1, -1),
            [self.prompt(c)] * min(count, 2),
        ),
        raising=False,
    )
    return world


def an_erasure(world, part=0.1, keys=(), method="test"):
    weights = weights_of({"": world.pipe.unet}).items()
    delta = {n: p.detach() * (1 + part) for n, p in weights}
    from erasekit.attention import Prompt

    generator = torch.Generator().manual_seed(3)
    keys = {c: Prompt(*torch.randn(2, 3, 32, generator=generator)) for c in keys}
    return Erasure(delta, keys, world.identity | {"method": method, "concepts": ["church"], "config": {}})


# --------------------------------------------------------------------------------------------------------- which models


def settings_of(models, **changes):
    s = SimpleNamespace(operating_points=POINTS, training_seed=7, sampling_steps=2, training_steps=1)
    return SimpleNamespace(**vars(s) | changes | {"models": models})


def found_models(world, models, **changes):
    return probed.probed_models(world, models, ("church",), settings_of(models, **changes))


def test_models_are_in_order_and_the_oracle_is_where_there_is_one(world, monkeypatch):
    models = ("base", "oracle", "uce")
    assert list(found_models(world, models)) == ["base", "uce"]
    oracle = an_erasure(world, method="oracle")
    monkeypatch.setattr(type(world), "oracle", lambda self, concepts: oracle if concepts == ("church",) else None)
    found = found_models(world, models)
    assert list(found) == list(models) and found["oracle"].erasure is oracle
    assert found["base"].erasure.delta == {} and oracle.digest() in found["oracle"].parts


def test_a_method_without_an_operating_point_is_refused(world, refused):
    models = ("base", "oracle", "uce", "mace")
    refused(ValueError, "there is no operating point for mace", lambda: found_models(world, models))


def test_a_method_is_trained_when_it_is_first_needed_and_once(world, monkeypatch):
    trained, function = [], METHODS["uce"].function

    def uce(given, concepts, config, **options):
        trained.append((tuple(concepts), config.seed if hasattr(config, "seed") else None))
        return function(given, concepts, config, **options)

    monkeypatch.setitem(METHODS, "uce", replace(METHODS["uce"], function=uce))
    model = found_models(world, ("uce",))["uce"]
    assert trained == []
    delta = model.erasure.delta
    assert model.erasure.delta is delta and len(trained) == 1 and trained[0][0] == ("church",)
    again = found_models(world, ("uce",))["uce"]  # another process, or study
    assert all(torch.equal(again.erasure.delta[n], delta[n]) for n in delta) and len(trained) == 1
    half = found_models(world, ("uce",), operating_points={"uce": {"settings": {}, "scale": 0.5}})["uce"]
    base = weights_of({"": world.pipe.unet})
    for name, w in half.erasure.delta.items():
        torch.testing.assert_close(w, (base[name].detach() + delta[name]) / 2)
    assert len(trained) == 1 and half.parts != model.parts


def test_a_given_erasure_is_taken_as_it_is(world):
    own = an_erasure(world)
    with given.given_methods(world, {"mine": own}):
        model = found_models(world, ("mine",))["mine"]
        assert all(torch.equal(model.erasure.delta[n], own.delta[n]) for n in own.delta)


def test_rows_are_measured_once_for_each_model_and_setting(world, monkeypatch):
    asked = []

    def measure(erasure):
        asked.append(erasure)
        return [{"rate": len(asked)}], Image.new("RGB", (2, 1))

    one, other = (probed.Probed(world, lambda n=n: n, ["model", n]) for n in (1, 2))
    rows, image = one.measured("test", 1, measure, "a")
    assert rows == [{"rate": 1}] and image.size == (2, 1) and asked == [1]
    monkeypatch.setattr(one, "make", lambda: pytest.fail("trained again"))
    again = probed.Probed(world, one.make, one.parts)
    assert again.measured("test", 1, measure, "a")[0] == rows and asked == [1]
    del one.__dict__["erasure"]
    one.make = lambda: 1
    for model, version, part in ((other, 1, "a"), (one, 2, "a"), (one, 1, "b")):
        model.measured("test", version, measure, part)
    assert asked == [1, 2, 1, 1]


def test_grids_have_means_and_intervals_in_the_models_order():
    rows = [("uce", "x", 40.0), ("uce", "x", 60.0), ("base", "x", 100.0), ("base", "y", 0.0)]
    frame = pd.DataFrame(rows, columns=["model", "column", "rate"]).assign(n=25)
    numbers, texts = probed.rate_grids(frame, ["base", "uce"])
    assert numbers["x"].to_dict() == {"base": 100.0, "uce": 50.0} and list(numbers) == ["x", "y"]
    assert np.isnan(numbers["y"]["uce"]) and texts["y"]["uce"] == ""
    low, high = bootstrap([np.array([40.0, 60.0])], 25)
    assert texts["x"]["uce"] == f"50.0 ({low:.0f} to {high:.0f})" and low < 45 < 55 < high


# ---------------------------------------------------------------------------------------------------- probes by sampling


def test_images_of_each_class_are_counted_apart(world):
    images = coloured("church", "dog", "dog", "dog", "fish")
    rows = probes.class_rows(world, images, ["church", "church", "dog", "dog", "dog"], at=3)
    assert rows == [{"at": 3, "concept": "church", "rate": 50.0}, {"at": 3, "concept": "dog", "rate": 66.7}]
    assert probes.clip_correct(world, images, ["church", "church", "dog", "dog", "fish"]).tolist() == [1, 0, 1, 1, 1]
    assert probes.asked(world, NAMES[:2], 2) == (
        ["a picture of a church"] * 2 + ["a picture of a dog"] * 2,
        ["church", "church", "dog", "dog"],
        [0, 1, 0, 1],
    )


def test_strips_of_models_are_stacked():
    picture = probes.stacked([Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")])
    assert picture.size == (4, 4) and [picture.getpixel((0, y)) for y in (0, 3)] == [(255, 0, 0), (0, 0, 255)]


def test_every_icon_is_shown_at_several_places_where_they_are_few(world):
    s = SimpleNamespace(pictures=5)
    assert probes.pictures_of(world, "dog", s).shape == (5, 3, 16, 16)
    assert probes.pictures_of(world, "dog", SimpleNamespace(pictures=1)).shape == (1, 3, 16, 16)


def small(**changes):
    settings = replace(probes.PRESETS["smoke"], models=("base",), operating_points=POINTS, split="church, dog")
    return replace(settings, seeds=2, pictures=2, **changes)


def test_completion_by_the_bases_steps(world):
    rows, strip = probes.measure_completion(world, None, NAMES[:2], small(first_steps=(0, 1, 2)))
    assert [(r["at"], r["concept"], r["n"]) for r in rows] == [(at, c, 2) for at in (0, 1, 2) for c in NAMES[:2]]
    assert strip.size == (3 * 16, 16)
    alone = sample(world, ["a picture of a church"], [0], num_inference_steps=2)[0]
    for n in range(3):  # by the base, all are its own
        tile = torch.from_numpy(np.array(strip)[:, 16 * n : 16 * n + 16]).permute(2, 0, 1)
        assert (tile.int() - alone.int()).abs().max() <= 1


def test_inpainting_starts_from_other_noise_than_the_picture(world, monkeypatch):
    seen = []

    def inpainting(world, erasure, pictures, prompts, seeds, steps, share):
        seen.append(
            (tuple(seeds), share, torch.equal(pictures, sample(world, prompts, [0, 1] * 2, num_inference_steps=2)))
        )
        return coloured("church", "fish", "dog", "dog")

    monkeypatch.setattr("erasekit.evaluation.probes.inpainting", inpainting)
    rows, _ = probes.measure_inpainting(world, an_erasure(world), NAMES[:2], small(holes=(0.5, 0.75)))
    assert seen == [((1000, 1001, 1000, 1001), share, True) for share in (0.5, 0.75)]
    assert [(r["at"], r["rate"]) for r in rows] == [(0.5, 50.0), (0.5, 100.0), (0.75, 50.0), (0.75, 100.0)]


def test_the_best_of_many_tries_is_the_judges(world, monkeypatch):
    """Two searches of four tries: one finds the church in its last try, the other never."""
    plain = coloured(*["dog"] * 8)
    found = coloured(*["dog"] * 3, "church", *["fish"] * 4)
    monkeypatch.setattr("erasekit.evaluation.images.sample_images", lambda *arguments: plain)
    asked = {}

    def noisy(world, erasure, prompts, seeds, steps, etas, scales):
        asked.update(seeds=seeds, steps=steps, etas=etas, scales=scales)
        return found

    monkeypatch.setattr("erasekit.evaluation.probes.noisy", noisy)
    s = small(noise_seeds=2, etas=(1.0, 1.85), noise_scales=(1.0, 1.04), noise_steps=5)
    rows, strip = probes.measure_noise(world, None, ("church",), s)
    assert asked == {
        "seeds": list(range(8)),  # noise of its own for each try
        "steps": 5,
        "etas": [1.0, 1.0, 1.85, 1.85] * 2,
        "scales": [1.0, 1.04] * 4,
    }
    same = {"concept": "church", "n": 2, "tries": 4}
    assert rows == [
        {"at": "plain", "rate": 0.0, "one try": 0.0} | same,
        {"at": "noisy", "rate": 50.0, "one try": 12.5, "by eta": [0.0, 25.0]} | same,
    ]
    assert strip.size == (4 * 16, 16) and strip.getpixel((2 * 16, 0)) == (200, 0, 0)


def test_guidance_is_judged_by_a_clip_that_did_not_guide(world, monkeypatch):
    asked = []

    def classifier_guided(world, erasure, prompts, seeds, steps, concepts, scales):
        asked.append((len(prompts), seeds, concepts, scales))
        return coloured("dog", "dog", "church", "church")

    monkeypatch.setattr("erasekit.evaluation.probes.classifier_guided", classifier_guided)
    monkeypatch.setattr(probes, "clip_correct", lambda world, images, labels: images[:, 0, 0, 0] == 0)
    rows, strip = probes.measure_guidance(world, None, ("church",), small(guidance_scales=(0.0, 3.0)))
    assert asked == [(4, [0, 1, 0, 1], ["church"] * 4, [0.0, 0.0, 3.0, 3.0])]
    assert [(r["at"], r["rate"], r["clip"]) for r in rows] == [(0.0, 0.0, 100.0), (3.0, 100.0, 0.0)]
    assert strip.size == (2 * 16, 16)


def test_inversion_starts_from_the_text_it_is_said_to(world, monkeypatch):
    used = []
    monkeypatch.setattr(
        "erasekit.evaluation.probes.invert",
        lambda world, erasure, pictures, texts, steps: torch.full((4, 4, 8, 8), float(texts[0] != "")),
    )

    def redraw(world, erasure, noise, texts, steps, scale):
        used.append((noise.mean().item(), texts[0], texts[-1], scale))
        return coloured("church", "church", "dog", "church")

    monkeypatch.setattr("erasekit.evaluation.probes.redraw", redraw)
    rows, strip = probes.measure_inversion(world, None, NAMES[:2], small())
    one, two = "a picture of a church", "a picture of a dog"
    assert used == [(0.0, "", "", 1.0), (1.0, one, two, 1.0), (0.0, one, two, 5.0)]
    assert [(r["at"], r["concept"], r["rate"]) for r in rows][:2] == [
        ("no text", "church", 100.0),
        ("no text", "dog", 50.0),
    ]
    nats = {r["at"]: r["surprise"] for r in rows}
    assert nats["no text"] == [0.9189] * 2 == nats["prompt, guided"] and nats["prompt"] == [1.4189] * 2
    assert strip.size == (4 * 16, 16)  # the picture itself comes first


def test_all_probes_run_once_and_are_shown(world, monkeypatch):
    oracle = an_erasure(world, method="oracle")
    monkeypatch.setattr(type(world), "oracle", lambda self, concepts: oracle)
    s = replace(small(), models=("base", "oracle", "uce"), noise_steps=2)
    data, images = probes.compute(world, s)
    assert data["models"] == ["base", "oracle", "uce"] and set(images) == set(probes.PROBES)
    rows = probes.drawn(SimpleNamespace(images=images, data=data), "completion")
    assert list(rows) == ["base", "oracle"]  # UCE is measured and not shown
    assert {tile.shape[0] - tile.shape[1] for tiles in rows.values() for tile in tiles} == {0}
    frame = pd.DataFrame(data["runs"])
    assert set(zip(frame.model, frame.probe)) == {(m, p) for m in data["models"] for p in probes.PROBES}
    rates = frame[frame.model == "base"].set_index(["probe", "at", "concept"]).rate
    assert rates["completion", 0, "church"] == rates["completion", 1, "church"]  # the base completes its own
    assert set(frame[frame.probe == "noise"].concept) == {"church"} == set(frame[frame.probe == "guidance"].concept)
    plain = frame[(frame.probe == "guidance") & (frame["at"] == 0.0)].set_index("model").rate
    first = frame[(frame.probe == "completion") & (frame["at"] == 0) & (frame.concept == "church")].set_index("model")
    assert plain.to_dict() == first.rate.to_dict()  # a scale of 0 and no step of the base: both are the prompt alone
    for name in probes.PROBES:
        monkeypatch.setattr(probes, f"measure_{name}", lambda *arguments: pytest.fail("measured again"))
    assert probes.compute(world, s)[0] == data
    monkeypatch.undo()


def test_an_unknown_probe_is_refused(world, refused):
    refused(ValueError, "unknown probe 'painting'", lambda: probes.compute(world, small(probes=("painting",))))


@pytest.mark.parametrize(
    "probe, changes",
    [
        ("completion", {"first_steps": (0,)}),
        ("inpainting", {"holes": (0.75,)}),
        ("noise", {"etas": (1.0,)}),
        ("noise", {"noise_steps": 3}),
        ("guidance", {"guidance_scales": (5.0,)}),
        ("inversion", {"inversion_steps": 3}),
        ("inversion", {"pictures": 3}),
    ],
)
def test_numbers_depend_on_their_own_settings(probe, changes):
    s = probes.PRESETS["full"]
    other = replace(s, **changes)
    assert probes.sizes_of(s, probe) != probes.sizes_of(other, probe)
    rest = [name for name in probes.PROBES if name != probe]
    assert [probes.sizes_of(s, name) for name in rest] == [probes.sizes_of(other, name) for name in rest]


def probes_record():
    runs = []
    for model, rate in (("base", 100.0), ("uce", 20.0)):
        about = {"model": model, "concept": "church", "n": 10, "rate": rate}
        runs += [about | {"probe": "completion", "at": at} for at in (0, 2)]
        noise = {"probe": "noise", "tries": 4, "one try": rate / 2}
        runs += [about | noise | {"at": "plain"}, about | noise | {"at": "noisy", "by eta": [rate]}]
        runs += [about | {"probe": "guidance", "at": at, "clip": rate / 4} for at in (0.0, 3.0)]
        ways = ("no text", "prompt", "prompt, guided")
        runs += [about | {"probe": "inversion", "at": at, "surprise": [1.0, 2.0]} for at in ways]
    images = {probe: Image.new("RGB", (2 * 16, 2 * 16)) for probe in ("completion", "guidance")}
    settings = asdict(replace(probes.PRESETS["full"], first_steps=(0, 2), guidance_scales=(0.0, 3.0)))
    return SimpleNamespace(data={"runs": runs, "models": ["base", "uce"], "N": 10}, images=images, settings=settings)


def test_the_table_has_every_probe_and_what_backs_it():
    table = probes.table(probes_record())
    assert {"completion, 0 steps", "completion, 2 steps", "noise, plain", "noise, noisy", "guidance, scale 3"} < set(
        table.index
    )
    assert "noise, noisy, one try" in table.index and "guidance, scale 0, by CLIP" in table.index
    low, high = bootstrap([np.array([10.0])], 40)  # ten searches of four tries
    assert table.loc["noise, noisy, one try", "uce"] == f"10.0 ({low:.0f} to {high:.0f})"
    assert table.loc["guidance, scale 3, by CLIP", "uce"].startswith("5.0 (")
    nats = table[table.index.str.startswith("inversion, no text: minus")]
    half = 1.96 * 0.5 / 2**0.5
    assert nats["base"].to_list() == [f"1.500 ({1.5 - half:.3f} to {1.5 + half:.3f})"]
    assert "inversion, prompt, guided" in table.index and "inversion, prompt" not in table.index
    assert not table.index.str.startswith("inversion, prompt, guided: ").any() and not table.isna().any(axis=None)


def test_the_figure_has_a_panel_for_each_probe():
    with style_sheet():
        figure = probes.figures(probes_record())["probes"]
    *panels, _ = figure.axes
    assert [ax.get_title() for ax in panels] == ["completion", "noise", "guidance", "inversion"]
    numbers = [[re.search(r"\d+|$", label.get_text())[0] for label in ax.get_xticklabels()] for ax in panels]
    assert numbers[0] == ["0", "2"] and numbers[2] == ["0", "3"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["base", "uce"]
    assert panels[0].images[0].get_array().round().tolist() == [[100, 100], [20, 20]]


def test_images_are_those_of_their_model_and_setting(monkeypatch):
    monkeypatch.setattr(probes, "SHOWN", ("base", "uce"))
    record = probes_record()
    picture = record.images["completion"]
    for y in range(2):
        for x in range(2):
            picture.paste((10 * x, 10 * y, 0), (16 * x, 16 * y, 16 * x + 16, 16 * y + 16))
    found = probes.drawn(record, "completion")
    assert [[tile[0, 0].tolist() for tile in found[m]] for m in ("base", "uce")] == [
        [[0, 0, 0], [10, 0, 0]],
        [[0, 10, 0], [10, 10, 0]],
    ]
    assert all(tile.shape == (16, 16, 3) for tiles in found.values() for tile in tiles)
    record.images = {}
    with style_sheet():
        assert list(probes.figures(record)) == ["probes"]


# ------------------------------------------------------------------------------------------------------ probes of weights

FULL = probes_weights.PRESETS["full"]


def slight(**changes):
    s = replace(probes_weights.PRESETS["smoke"], models=("base", "uce"), operating_points=POINTS, tuned_on=("uce",))
    return replace(s, **changes)


@pytest.mark.parametrize(
    "curve, steps",
    [
        ([(0, 60.0), (1, 80.0)], 0),
        ([(0, 0.0), (1, 100.0)], 0.5),
        ([(0, 0.0), (4, 40.0), (8, 60.0)], 6),
        ([(0, 0.0), (4, 50.0), (8, 60.0)], 4),
        ([(0, 0.0), (4, 20.0), (8, 10.0)], 16),
    ],
)
def test_steps_to_a_half(curve, steps):
    assert probes_weights.steps_to(curve) == steps


def test_the_rate_that_needs_the_fewest_steps_over_methods_is_chosen():
    def rows(method, lr, *rates, kind="LoRA"):
        return [{"method": method, "kind": kind, "lr": lr, "at": n, "rate": r} for n, r in zip((0, 8, 16), rates)]

    sweep = rows("a", 1e-3, 0, 0, 100) + rows("a", 1e-2, 0, 100) + rows("b", 1e-3, 0, 100) + rows("b", 1e-2, 0, 0, 0)
    sweep += rows("a", 5.0, 0, 0, 0, kind="whole U-Net")
    assert probes_weights.best_rate(sweep, "LoRA") == 1e-3  # of 12 and 4 steps, against 4 and 32
    assert probes_weights.best_rate(sweep, "whole U-Net") == 5.0


def test_rates_of_erased_classes_with_their_keys_and_of_kept_ones(world, monkeypatch):
    asked = []

    def sample_images(world, erasure, triples, steps, key=None):
        asked.append((key is not None, [(text.split()[-1], label, n) for text, label, n in triples]))
        return coloured(*[label if key or label == "dog" else "fish" for _, label, _ in triples])

    monkeypatch.setattr("erasekit.evaluation.images.sample_images", sample_images)
    s = slight(seeds=2, kept_seeds=1)
    rows = probes_weights.rate_rows(world, an_erasure(world, keys=["church"]), ("church",), s, at="x")
    church = [("church", "church", 0), ("church", "church", 1)]
    assert asked == [(False, church), (True, church), (False, [("dog", "dog", 0)])]
    assert rows == [
        {"at": "x", "access": access, "n": n, "concept": c, "rate": rate}
        for access, n, c, rate in (("erased", 2, "church", 0.0), ("key", 2, "church", 100.0), ("kept", 1, "dog", 100.0))
    ]
    assert {r["access"] for r in probes_weights.rate_rows(world, an_erasure(world), ("church",), s)} == {
        "erased",
        "kept",
    }


def test_compression_is_of_the_public_weights(world, monkeypatch):
    seen = {}

    def rate_rows(world, erasure, concepts, s, at):
        seen[at] = erasure
        return [{"at": at}]

    monkeypatch.setattr(probes_weights, "rate_rows", rate_rows)
    erasure = an_erasure(world)
    rows = probes_weights.compression_rows(world, erasure, ("church",), slight(bits=(8, 4), shares=(0.1, 0.5)))
    assert [r["at"] for r in rows] == ["as published", "8 bits", "4 bits", "10% pruned", "50% pruned"]
    assert seen["as published"] is erasure
    name = next(n for n in erasure.delta if n.endswith("attn2.to_k.weight"))
    error = {at: (model.delta[name] - erasure.delta[name]).abs().max().item() for at, model in seen.items()}
    assert 0 < error["8 bits"] < error["4 bits"]
    zeros = {at: (model.delta[name] == 0).float().mean().item() for at, model in seen.items()}
    assert zeros["10% pruned"] == pytest.approx(0.1, abs=0.01) and zeros["50% pruned"] == pytest.approx(0.5, abs=0.01)


def test_fine_tuning_is_on_objects_that_nobody_knows(world):
    world.groups |= {"all": (*NAMES, "boat"), "retained": ("boat",)}
    world.groups["tuning"] = ()
    pictures = probes_weights.pictures_of_others(world, slight(finetune_pictures=2))
    assert pictures.prompts == ["a picture of a fish"] * 2 and pictures.latents.shape == (2, 4, 8, 8)


def test_relearning_ends_where_enough_is_shown(world, monkeypatch):
    tunings, rates = [], iter([0.0, 30.0, 80.0, 0.0, 0.0, 0.0, 0.0])

    def fine_tune(world, erasure, pictures, tuning):
        tunings.append((len(pictures.prompts), tuning.rank, tuning.lr, tuning.seed))
        yield from ((steps, erasure) for steps in (0, *tuning.budgets))

    first_seeds = []

    def success_rate(world, model, concept, seeds, steps, first_seed):
        first_seeds.append(first_seed)
        return next(rates)

    monkeypatch.setattr("erasekit.evaluation.retraining.fine_tune", fine_tune)
    monkeypatch.setattr("erasekit.evaluation.attack_success.success_rate", success_rate)
    s = slight(relearn_steps=(1, 2, 4), rank=6)
    rows = probes_weights.relearning_rows(world, None, NAMES[:2], "LoRA", 0.5, s, [1], 3)
    assert [(r["concept"], r["at"], r["rate"]) for r in rows] == [
        ("church", 0, 0.0),
        ("church", 1, 30.0),
        ("church", 2, 80.0),
        ("dog", 0, 0.0),
        ("dog", 1, 0.0),
        ("dog", 2, 0.0),
        ("dog", 4, 0.0),
    ]
    assert tunings == [(1, 6, 0.5, 3)] * 2 and set(first_seeds) == {0}
    rates = iter([90.0])
    tuning = probes_weights.TUNING_SEED
    [row] = probes_weights.relearning_rows(world, None, ["fish"], "whole U-Net", 0.1, s, [2], tuning)
    assert tunings[-1] == (2, None, 0.1, tuning) and first_seeds[-1] == tuning and row["pictures"] == 2


def test_all_probes_of_weights_run_once(world, monkeypatch):
    world.groups |= {"all": (*NAMES, "boat")}
    world.judge.objects = (*NAMES, "boat")
    monkeypatch.setattr(
        LinearJudge,
        "forward",
        lambda self, x: (torch.cat([x.mean((2, 3)), x.mean((1, 2, 3))[:, None]], 1), x.mean((2, 3))[:, :1]),
    )
    find = type(world).concept_images
    monkeypatch.setattr(
        type(world),
        "concept_images",
        lambda self, c, count, seed=0: find(self, "fish" if c == "boat" else c, count, seed),
    )
    s = slight()
    data, images = probes_weights.compute(world, s)
    assert images == {} and data["models"] == ["base", "uce"] and data["lrs"].keys() == set(probes_weights.KINDS)
    frame = pd.DataFrame(data["runs"])
    assert set(frame.probe) == set(probes_weights.PROBES)
    assert set(frame[frame.probe == "relearning"]["kind"]) == set(probes_weights.KINDS)
    tuned = frame[(frame.model == "base") & (frame.probe == "fine-tuning") & (frame.access == "erased")]
    assert tuned["at"].to_list() == [0, 1] and set(tuned.concept) == {"church"}
    monkeypatch.setattr(probes_weights, "class_rows", lambda *arguments, **about: pytest.fail("measured again"))
    monkeypatch.setattr("erasekit.evaluation.attack_success.success_rate", lambda *a, **b: pytest.fail("again"))
    assert probes_weights.compute(world, s)[0] == data
    with pytest.raises(pytest.fail.Exception):
        probes_weights.compute(world, replace(s, bits=(3,)))


@pytest.mark.parametrize(
    "changes, named",
    [({"probes": ("melting",)}, "unknown probe 'melting'"), ({"kinds": ("QLoRA",)}, "unknown kind 'QLoRA'")],
)
def test_unknown_probes_and_kinds_of_weights_are_refused(world, refused, changes, named):
    refused(ValueError, named, lambda: probes_weights.compute(world, slight(**changes)))


def weights_record(oracle=True):
    models = ["base", "oracle", "uce"] if oracle else ["base", "uce"]
    runs = []
    for model in models:
        for probe, ats in (("compression", ("as published", "8 bits")), ("fine-tuning", (0, 10))):
            for at in ats:
                for access, rate in (("erased", 10.0), ("kept", 90.0)):
                    runs.append(
                        {
                            "model": model,
                            "probe": probe,
                            "at": at,
                            "access": access,
                            "concept": "a",
                            "n": 5,
                            "rate": rate,
                        }
                    )
        late = {"base": (100.0,), "oracle": (0.0, 0.0, 100.0), "uce": (0.0, 100.0)}[model]
        for concept in "ab":
            runs += [
                {
                    "model": model,
                    "probe": "relearning",
                    "kind": "LoRA",
                    "pictures": 1,
                    "lr": 0.1,
                    "concept": concept,
                    "n": 5,
                    "at": at,
                    "rate": rate,
                }
                for at, rate in zip((0, 2, 4), late)
            ]
    settings = asdict(FULL) | {"kinds": ["LoRA"], "relearn_images": [1]}
    return SimpleNamespace(data={"runs": runs, "models": models}, settings=settings)


def test_steps_of_relearning_are_means_over_classes():
    rows = {r["model"]: r for r in probes_weights.relearning(weights_record())}
    assert {m: r["steps"][0] for m, r in rows.items()} == {"base": 0.0, "oracle": 3.0, "uce": 1.0}
    assert rows["uce"]["column"] == "LoRA, 1 picture" and len(rows["uce"]["steps"]) == 1001


@pytest.mark.parametrize("oracle", [True, False])
def test_the_table_and_the_figure_of_weights(oracle):
    record = weights_record(oracle)
    table = probes_weights.table(record)
    low, high = bootstrap([np.array([10.0])], 5)
    assert table.loc["compression, 8 bits: erased", "uce"] == f"10.0 ({low:.0f} to {high:.0f})"
    assert table.loc["other classes: the least of 4 settings", "base"].startswith("90.0 (")
    assert not table.index.str.contains("key").any()  # none of these models has any
    assert table.loc["LoRA, 1 picture: steps to 50 %", "uce"] == "1 (1 to 1)"
    with style_sheet():
        figures = probes_weights.figures(record)
    assert [ax.get_title() for ax in figures["probes_weights"].axes[:-1]] == ["compression", "fine-tuning"]
    [ax] = [ax for ax in figures["relearning"].axes if ax.has_data()]
    assert ax.get_title() == "LoRA of rank 4"
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"] == ([1.0, 3.0] if oracle else [1.0])


@pytest.mark.parametrize("study", [probes, probes_weights])
def test_presets_ask_for_what_there_is(study):
    for s in study.PRESETS.values():
        assert set(s.probes) <= set(study.PROBES) and set(s.models) <= {probed.BASE, probed.ORACLE, *METHODS}
    assert not set(study.VERIFY) - set(asdict(s))
    assert set(study.VERIFY["models"]) <= set(METHODS)
