"""Every study, with its figures and table, on Stable Diffusion 1, 2 and XL at toy size."""

import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from erasekit import paths
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
    monkeypatch.setitem(sd.groups, "all", (*sorted(named), "acorn", "zebra", "volcano"))
    return sd


# Each study on 1, and on 2 or XL in turn; attacks optimise tokens for two text encoders on XL.
RUNS = [("1", study) for study in STUDIES]
RUNS += [("XL" if n % 2 or study in ("recovery", "attacks") else "2", study) for n, study in enumerate(STUDIES)]
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
