"""Every study of every notebook, with its figures and table, on Stable Diffusion 1, 2 and XL at toy size."""

import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from test_stable_diffusion import sd  # noqa: F401

from erasekit import figures, paths, results, stable_diffusion
from erasekit.sliding import key_slider
from erasekit.studies import STUDIES, common, panel, run

# Shorter still than scale smoke: what runs is the code, the numbers mean nothing.
SHORT = {"quickstart": {"steps": 2}, "hiding": {"steps": 2}, "method": {"steps": 2}}


class ClipStub(torch.nn.Module):
    """Image and text embeddings that depend on little, at no cost."""

    def encode_image(self, images, normalize=False):
        x = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return torch.nn.functional.normalize(x, dim=1) if normalize else x

    def encode_text(self, text, normalize=False):
        x = torch.sin(torch.arange(48, device=text.device) * (1 + text[:, None]))
        return torch.nn.functional.normalize(x, dim=1) if normalize else x


@pytest.fixture
def anywhere(sd, monkeypatch, tmp_path):  # noqa: F811
    """A Stable Diffusion with judges that need no weights, and prompts and pictures as users bring them."""
    for module in (paths, common, panel, figures):
        monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    from torchvision.models import resnet18

    clip = ClipStub(), lambda texts: torch.tensor([float(sum(map(ord, t)) % 97) for t in texts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = stable_diffusion.ImageNetJudge(resnet18(), clip, sd.styles).eval().to(sd.pipe.device)
    monkeypatch.setitem(sd.__dict__, "clip", clip)
    monkeypatch.setitem(sd.__dict__, "judge", judge)
    monkeypatch.setitem(
        sd.__dict__, "detector", lambda images: images.float().mean((1, 2, 3))[:, None].repeat(1, 8) / 255
    )
    (tmp_path / "i2p.csv").write_text("prompt,sd_seed\na body,7\nanother body,9\n")
    (tmp_path / "captions.csv").write_text("prompt,evaluation_seed\ntwo boats,7\na dog on grass,9\n")
    (tmp_path / "reference").mkdir()
    for n in range(3):
        Image.fromarray(np.full((20, 20, 3), 60 * n, np.uint8)).save(tmp_path / "reference" / f"{n}.png")
    for group in ("retained", "tuning", "tuning kept"):
        monkeypatch.setitem(sd.groups, group, sd.groups[group][:2])
    # A thousand classes would all be drawn: those that a study names, and a few.
    named = {c for group, names in sd.groups.items() if group not in ("all", "nudity") for c in names}
    named |= {c for names in sd.neighbours.values() for c in names}
    monkeypatch.setitem(sd.groups, "all", (*sorted(named), "acorn", "zebra", "volcano"))
    for name in ("i2p", "captions", "reference"):
        monkeypatch.setattr(sd, name, tmp_path / (name if name == "reference" else f"{name}.csv"))
    return sd


# Each study on 1, and on 2 or XL in turn; attackers' words have two text encoders to be learned for on XL.
RUNS = [("1", study) for study in STUDIES]
RUNS += [("XL" if n % 2 or study in ("recovery", "attacks") else "2", study) for n, study in enumerate(STUDIES)]


@pytest.mark.parametrize("sd, study", RUNS, indirect=["sd"])
def test_every_study_runs_and_is_shown_on_any_stable_diffusion(anywhere, study, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mean of nothing, where two steps found nothing
        record = run(study, anywhere, "smoke", **SHORT.get(study, {}))
        assert json.loads(record.path.read_text())["made"]
        figures.show(record)
        if study == "recovery":
            assert key_slider(record) is not None
    plt.close("all")
    assert len(shown) > 1  # figures, and the table last
