"""Two processes under accelerate's launcher draw, judge and record what one does; a stopped drawing goes on."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from erasekit import paths, sampling
from erasekit.baselines import settings
from erasekit.kpop import KPOP, kpop
from erasekit.sampling import sample
from erasekit.studies import common, panel
from erasekit.studies.strength import trained

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import make_toy
from erasekit import results
from erasekit.processes import shares
from erasekit.sampling import sample
from erasekit.studies import panel
from erasekit.studies.common import strip

out = Path(sys.argv[1])
results.RECORDS, panel.BUILD = out / "records", out / "build"
torch.set_num_threads(1)
toy = make_toy(0)
asked = [("a picture of a church", "church", n) for n in range(5)]

def compute():
    def draw():
        images = sample(toy.pipe, [p for p, _, _ in asked], [n for *_, n in asked], steps=2, batch_size=2)
        torch.save(images, out / f"images.{{shares()[0]}}.pt")
        return {{"mean": images.float().mean().item()}}, strip(images)
    numbers, image = panel.cell("test", toy, draw, "erasekit.sampling")
    return numbers, {{"drawn": image}}

results.compute_or_load(toy, "smoke", "objects", {{}}, compute)
"""


def run(folder, processes, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(paths.ROOT / "tests")))
    folder.mkdir()
    # What accelerate's launcher starts on several GPUs; on CPUs it wants MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), str(folder)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((folder / "records" / "toy" / "smoke" / "objects.json").read_text())
    picture = (folder / "records" / "toy" / "smoke" / "objects.drawn.png").read_bytes()
    cells = list((folder / "build" / "cells" / "test").glob("*.json"))
    return (
        [torch.load(folder / f"images.{n}.pt", weights_only=True) for n in range(processes)],
        record["data"],
        picture,
        cells,
    )


def test_two_processes_make_the_images_and_the_record_of_one(tmp_path):
    [alone], record, picture, _ = run(tmp_path / "one", 1, tmp_path)
    both, shared_record, shared_picture, cells = run(tmp_path / "two", 2, tmp_path)
    assert len(alone) == 5 and all(torch.equal(images, alone) for images in both)
    assert record == shared_record and picture == shared_picture and len(cells) == 1


def test_a_stopped_drawing_goes_on_and_draws_the_same(toy, tmp_path, monkeypatch):
    prompts, seeds = ["a church", "a dog", "a church", "a dog", "a fish"], [0, 0, 1, 1, 2]
    how = {"steps": 2, "batch_size": 2}
    expected = sample(toy.pipe, prompts, seeds, **how)
    decode, drawn = sampling.decode, []

    def stopping(pipe, latents):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(latents))
        return decode(pipe, latents)

    monkeypatch.setattr(sampling, "decode", stopping)
    with pytest.raises(KeyboardInterrupt):
        sample(toy.pipe, prompts, seeds, folder=tmp_path, **how)
    assert len(list(tmp_path.glob("*.png"))) == 4
    drawn.clear()
    assert torch.equal(sample(toy.pipe, prompts, seeds, folder=tmp_path, **how), expected)
    assert drawn == [1], "only what was missing"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("method", ["esd-x", "uce"])
def test_where_images_are_kept_so_are_erasures(toy, tmp_path, monkeypatch, method):
    monkeypatch.setattr(common, "BUILD", tmp_path)
    keeping = copy.copy(toy)
    keeping.keeps_images = True
    config = settings(method, **({"steps": 2, "batch": 2} if method == "esd-x" else {}))
    once, _ = trained(keeping, ["church"], method, config)
    monkeypatch.setattr(common, "inspect", None)  # training again would look at the method's signature
    again, _ = trained(keeping, ["church"], method, config)
    assert once.digest() == again.digest() != trained(toy, ["dog"], method, config)[0].digest()


def test_images_kept_are_those_of_their_key(toy, tmp_path, monkeypatch):
    """No key, a key, and the same key at another weight each have a folder of their own; each is drawn once."""
    monkeypatch.setattr(panel, "BUILD", tmp_path)
    keeping = copy.copy(toy)
    keeping.keeps_images = True
    made = kpop(toy, ["church"], KPOP(steps=2, batch=2, m=2, prompt_lr=1.0), progress=False)
    key = made.key("church")
    keys, asked = (None, key, replace(key, log_weight=-1.0)), [("a picture of a church", "church", 0)]
    expected = [panel.drawn(toy, made, asked, 2, k) for k in keys]
    first = [panel.drawn(keeping, made, asked, 2, k) for k in keys]
    monkeypatch.setattr(sampling, "decode", None)
    again = [panel.drawn(keeping, made, asked, 2, k) for k in keys]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, first, again))
    assert len({images.numpy().tobytes() for images in expected}) == 3
    assert len(list((tmp_path / "images").iterdir())) == 3
