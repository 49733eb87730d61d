"""Every study, with its figures and table, on Stable Diffusion 1, 2 and XL at toy size."""

import dataclasses
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erasekit import METHODS, paths, read
from erasekit.studies import STUDIES, run
from erasekit.studies.kit.show import key_slider, show
from erasekit.worlds.judges import ImageNetJudge


class ClipStub(torch.nn.Module):
    """Cheap embeddings of image and text."""

    def encode_image(self, images, normalize=False):
        x = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return torch.nn.functional.normalize(x, dim=1) if normalize else x

    def encode_text(self, text, normalize=False):
        x = torch.sin(torch.arange(48, device=text.device) * (1 + text[:, None]))
        return torch.nn.functional.normalize(x, dim=1) if normalize else x


@pytest.fixture
def anywhere(sd, monkeypatch, tmp_path):
    """A Stable Diffusion with judges that need no weights, and prompts and images as users provide them."""
    for folder in ("BUILD", "RECORDS", "FIGURES"):
        monkeypatch.setattr(paths, folder, tmp_path / folder.lower())
    from torchvision.models import resnet18

    clip = ClipStub(), lambda texts: torch.tensor([float(sum(map(ord, t)) % 97) for t in texts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = ImageNetJudge(resnet18(), clip, sd.styles).eval().to(sd.pipe.device)

    def detector(images):
        return images.float().mean((1, 2, 3))[:, None].repeat(1, 8) / 255

    for name, value in {"clip": clip, "judge": judge, "detector": detector}.items():
        monkeypatch.setitem(sd.__dict__, name, value)
    (tmp_path / "i2p.csv").write_text("prompt,sd_seed\na body,7\nanother body,9\n")
    (tmp_path / "captions.csv").write_text("prompt,evaluation_seed\ntwo boats,7\na dog on grass,9\n")
    (tmp_path / "reference").mkdir()
    for n in range(3):
        Image.fromarray(np.full((20, 20, 3), 60 * n, np.uint8)).save(tmp_path / "reference" / f"{n}.png")
    for name in ("i2p.csv", "captions.csv", "reference"):
        monkeypatch.setattr(sd, name.removesuffix(".csv"), tmp_path / name)
    for group in ("retained", "tuning", "tuning kept"):
        monkeypatch.setitem(sd.groups, group, sd.groups[group][:2])
    monkeypatch.setattr(sd, "retained", sd.groups["retained"])
    # Without this, studies of all classes sample a thousand.
    named = {c for group, names in sd.groups.items() if group not in ("all", "nudity") for c in names}
    named |= {c for names in sd.neighbours.values() for c in names}
    known = named & set(sd.groups["all"])  # other groups have a judge of their own
    monkeypatch.setitem(sd.groups, "all", (*sorted(known), "acorn", "zebra", "volcano"))
    return sd


# Each study on 1, and on 2 or XL in turn; attacks optimise tokens for two text encoders on XL.
ANYWHERE = [study for study in STUDIES if study != "oracle"]  # which asks models that one world alone has
RUNS = [("1", study) for study in ANYWHERE]
RUNS += [("XL" if n % 2 or study in ("recovery", "attacks") else "2", study) for n, study in enumerate(ANYWHERE)]
RUNS = [pytest.param(*run, marks=() if run == ("1", "quickstart") else pytest.mark.slow) for run in RUNS]


@pytest.mark.parametrize("sd, study", RUNS, indirect=["sd"])
def test_every_study_runs_and_is_shown_on_any_stable_diffusion(anywhere, study, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of no values, where two steps recover nothing
        record = run(study, anywhere, "smoke")
        assert json.loads(record.path.read_text())["made"]
        show(record)
        if study == "recovery":
            assert key_slider(record) is not None
    plt.close("all")
    assert len(shown) > 1  # figures, and the table last


# ---------------------------------------------------------------------------------------------------------- given erasures

ESD = "esd, theirs"


def theirs(world, folder, concepts):
    """An erasure as ESD publishes its own: the changed weights of cross-attention, alone in a file."""
    weights = {n: p + 0.1 * p.std() for n, p in world.pipe.unet.state_dict().items() if ".attn2." in n and p.ndim > 1}
    save_file(weights, folder / "esd.safetensors")
    return read(folder / "esd.safetensors", world, "esd", concepts)


GIVEN = {"objects": "S1", "unsafe": "nudity", "styles": "Kelly McKernan", "clip_study": "Kelly McKernan"}
GIVEN |= dict.fromkeys(("attacks", "recovery", "probes", "probes_weights"), "S1")


@pytest.mark.slow
@pytest.mark.parametrize("sd, study", [("XL" if s == "recovery" else "1", s) for s in GIVEN], indirect=["sd"])
def test_given_erasures_are_rows_of_a_study(anywhere, study, monkeypatch, tmp_path):
    shown, group = [], GIVEN[study]
    monkeypatch.setattr("IPython.display.display", shown.append)
    erasure = theirs(anywhere, tmp_path, anywhere.groups.get(group, (group,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = run(study, anywhere, "smoke", erasures={ESD: erasure})
        show(record)
    plt.close("all")
    assert {"kpop" if study != "probes" else "uce", ESD} <= {
        run.get("method", run.get("model")) for run in record.data["runs"]
    }
    names = shown[-1].columns if study.startswith("probes") else shown[-1].index
    assert study == "clip_study" or any(ESD in str(name) for name in names), (
        "a row of the table, or a column of the probes'"
    )


@pytest.mark.parametrize("sd", ["1"], indirect=True)
def test_a_given_erasure_is_measured_on_what_it_erases(anywhere, tmp_path, monkeypatch):
    """One of a single class beside a method that erases the same."""
    monkeypatch.setenv("ERASEKIT_RECORD", "1")
    church, methods = theirs(anywhere, tmp_path, ["church"]), dict(METHODS)
    info = dict(church.info)
    how = {"operating_points": {"uce": {"settings": {}, "scale": 1.0}}, "splits": ["church"], "methods": ["uce"]}
    record = run("objects", anywhere, "smoke", erasures={ESD: church}, **how)
    runs, [classes] = record.data["runs"], [base["by_class"] for base in record.data["base"].values()]
    assert [(run["method"], run["split"]) for run in runs] == [("uce", "church"), (ESD, "church")]
    assert next(iter(classes)) == "church" and len(classes) == 10
    assert runs[0]["training_seconds"] > 0 and runs[1]["training_seconds"] is None
    assert church.info == info and dict(METHODS) == methods, "nothing given is changed or left behind"
    # Not among the committed records, and under a name of its own for each content of the erasures.
    assert record.path.is_relative_to(paths.BUILD) and not list(paths.RECORDS.rglob("*.json"))
    monkeypatch.setattr("erasekit.studies.objects.compute", None)
    assert run("objects", anywhere, "smoke", erasures={ESD: church}, **how).path == record.path
    other = dataclasses.replace(church, delta={name: 1.1 * tensor for name, tensor in church.delta.items()})
    with pytest.raises(TypeError):
        run("objects", anywhere, "smoke", erasures={ESD: other}, **how)


@pytest.mark.parametrize("sd", ["1"], indirect=True)
def test_given_erasures_without_a_place_are_refused_before_anything_is_spent(anywhere, tmp_path, sentence, monkeypatch):
    erasure = theirs(anywhere, tmp_path, ["church"])
    monkeypatch.setattr("erasekit.evaluation.images.sample_batches", None)
    unnamed = dataclasses.replace(erasure, info=erasure.info | {"concepts": []})
    elsewhere = dataclasses.replace(erasure, info=erasure.info | {"base": "0" * 64, "bf16": {}})
    category = dataclasses.replace(erasure, info=erasure.info | {"concepts": ["nudity"]})
    for study, name, given, message in (
        ("many_concepts", ESD, erasure, "are taken by objects, unsafe, styles, clip_study, recovery, attacks"),
        ("objects", ESD, erasure, "'esd, theirs' erases church, and this study measures erasures of.*'splits' chooses"),
        ("objects", "kpop", erasure, "cannot be named 'kpop'"),
        ("objects", "a/b", erasure, "cannot be named 'a/b'"),
        ("objects", ESD, unnamed, r"ek\.read\(path, base, concepts"),
        ("objects", ESD, tmp_path, r"ek\.read\(path, base, concepts"),
        ("objects", ESD, elsewhere, "erasure 'esd, theirs' was made for the base model"),
        ("unsafe", "kpop-u", category, "cannot be named 'kpop-u'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run(
                study,
                anywhere,
                "smoke",
                **({"variants": ["kpop-u"]} if study == "unsafe" else {}),
                erasures={name: given},
            )
        sentence(error)
