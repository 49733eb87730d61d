"""What the studies of the prompt rest on."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.artifacts import Erasure
from erasekit.baselines import erase, settings
from erasekit.paths import RECORDS
from erasekit.results import Record
from erasekit.sampling import sample
from erasekit.studies.clip_models import scored
from erasekit.studies.clip_study import FORMS, auc, ranks
from erasekit.studies.continual import together
from erasekit.studies.hidden import known
from erasekit.studies.mechanisms import choose
from erasekit.studies.reach import quickest


def test_the_area_under_the_curve_is_the_chance_to_rank_right():
    assert auc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert auc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    assert auc([1, 1, 1], [True, False, False]) == 0.5
    assert auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False]) == 0.75
    assert math.isnan(auc([1.0, 2.0], [True, True]))


def test_a_drop_from_the_base_ranks_where_styles_differ_in_level():
    """One style scores high with or without it, so raw scores rank worse than drops do."""

    def run(method, erased, scores, there):
        forms = {form: scores for form in ("whole prompt", "name only", "without the name")}
        return {"method": method, "erased": erased, "judge": [float(t) for t in there], "there": there} | forms

    runs = [
        run("base", "a", [90.0, 91.0], [True, True]),
        run("base", "b", [50.0, 51.0], [True, True]),
        run("m", "a", [80.0, 91.0], [False, True]),
        run("m", "b", [40.0, 51.0], [False, True]),
    ]
    found = ranks(runs)["whole prompt"]
    assert found["drop from the base"] == 1.0 == found["within a style"]
    assert found["all"] == pytest.approx(1 - 3 / 12)
    assert found["by method"] == {"m": 0.75}  # of its own four images


def test_a_clip_scores_a_records_images_as_it_did_when_they_were_drawn(world):
    """What other CLIPs are held against is the same images, in the same order, with the same texts."""
    study = Record.read(RECORDS / "emojinette" / "full" / "clip_study.json")
    run = next(r for r in study.data["runs"] if (r["method"], r["erased"]) == ("kpop", "openmoji"))
    again = scored(world, world.clip, study, run)
    for form in FORMS:
        assert np.allclose(again[form], run[form], atol=0.05), form
    assert again["judge"] == run["judge"]


def test_spm_adapters_side_by_side_do_what_each_does(toy):
    config = settings("spm", steps=2, batch=2)
    made = [erase(toy, [c], "spm", config, progress=False) for c in ("church", "dog")]
    both = together(made)
    asked = ["a picture of a church"], [0]
    with both.applied(toy.pipe.unet):
        both.guide(5.0).begin(toy.pipe, asked[0])
        assert both._adapter.multiplier.shape == (1, 2)
    for layer in {name.rsplit(".", 1)[0] for name in both.adapters}:
        whole = both.adapters[f"{layer}.up"] @ both.adapters[f"{layer}.down"]
        parts = sum(m.adapters[f"{layer}.up"] @ m.adapters[f"{layer}.down"] for m in made)
        assert torch.allclose(whole, parts, atol=1e-6)
    zero = torch.zeros_like
    alone = Erasure(
        {},
        {},
        both.info,
        {n: torch.cat([t, zero(t)], 1 if n.endswith(".up") else 0) for n, t in made[0].adapters.items()},
    )
    twice = together([made[0], made[0]])
    assert not torch.equal(
        sample(toy.pipe, *asked, erasure=twice, steps=2), sample(toy.pipe, *asked, erasure=alone, steps=2)
    )
    assert torch.equal(
        sample(toy.pipe, *asked, erasure=alone, steps=2), sample(toy.pipe, *asked, erasure=made[0], steps=2)
    )


def test_an_attacks_learning_rate_is_the_one_that_ends_highest():
    def row(way, lr, steps, rate, method="m"):
        return {"way": way, "lr": lr, "steps": steps, "rate": rate, "method": method}

    sweep = [row("a", 0.1, 5, 90), row("a", 0.1, 9, 40), row("a", 0.2, 5, 10), row("a", 0.2, 9, 40)]
    sweep += [row("a", 0.3, 5, 0), row("a", 0.3, 9, 50), row("b", 0.1, 9, 100)]
    assert quickest(sweep, "a") == 0.3  # the highest at the end
    sweep.append(row("a", 0.3, 9, 0, "other"))
    sweep += [row("a", lr, 9, 30, "other") for lr in (0.1, 0.2)]
    assert quickest(sweep, "a") == 0.1  # a mean over methods; of equals, the sooner
    assert quickest(sweep, "b") == 0.1


def test_a_mechanisms_learning_rate_is_the_one_whose_keys_open_most():
    rows = [("a", 0.1, 90, 50, 50), ("a", 0.2, 90, 60, 50), ("a", 0.3, 80, 100, 100)]
    sweep = [{"mechanism": m, "prompt_lr": lr, "with the key": k, "ESR-1": e, "PSR-1": p} for m, lr, k, e, p in rows]
    assert choose(sweep) == 0.2


def test_a_missing_strength_is_named(sentence):
    with pytest.raises(ValueError) as error:
        known({"uce": {"settings": {}, "scale": 1.0}}, "uce", "kpop")
    assert "kpop" in sentence(error) and "uce" not in sentence(error)


def test_the_slider_shows_the_images_of_its_weight_and_method(tmp_path):
    from erasekit.sliding import key_slider

    def strip(first):  # two images a weight, each of one grey
        greys = np.repeat([first + 10 * n for n in range(3)], 2).astype(np.uint8)
        return Image.fromarray(np.repeat(np.tile(greys.repeat(4), (4, 1))[..., None], 3, axis=2))

    images = {"objects.kpop": strip(0), "style.kpop": strip(100)}
    box = key_slider(Record(tmp_path / "recovery.json", {}, {"log_weights": [-8, 0]}, images, {}, {}))
    choice, slider, screen = box.children

    def seen():
        return set(np.unique(Image.open(io.BytesIO(screen.value))))

    assert seen() == {0}
    slider.value = 2
    assert seen() == {20}
    choice.value = "style.kpop"
    assert seen() == {120}
    slider.value = 1
    assert seen() == {110}


def test_the_slider_comes_up_again_and_refuses_another_record(tmp_path, sentence):
    import erasekit as ek

    image = Image.fromarray(np.zeros((4, 12, 3), dtype=np.uint8))
    for _ in range(2):
        ek.slider(Record(tmp_path / "recovery.json", {}, {"log_weights": [-8, 0]}, {"objects.kpop": image}, {}, {}))
    with pytest.raises(ValueError, match="recovery") as error:
        ek.slider(Record(tmp_path / "styles.json", {}, {}, {}, {}, {}))
    sentence(error)
