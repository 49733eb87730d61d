"""The bundled world on a GPU, where there is one; Stable Diffusion's own tests run there too then."""

from dataclasses import fields

import pytest
import torch

from erasekit import METHODS, Erasure, erase, load, sample, settings
from erasekit.metrics import clip_alignment, judged
from erasekit.studies.world import zero_shot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS, SEEDS = ["a picture of a church", "a picture of a dog"], [0, 1]


def test_it_draws_what_a_cpu_draws(world):
    there = load("emojinette", precision="fp32")
    assert there.pipe.device.type == "cuda" and there.fingerprint == world.fingerprint
    here, on_gpu = (sample(w.pipe, PROMPTS, SEEDS, steps=8) for w in (world, there))
    assert (here.int() - on_gpu.int()).abs().float().mean() < 1
    assert torch.allclose(judged(world, here)[0], judged(there, on_gpu)[0], atol=0.05)
    assert torch.allclose(clip_alignment(world, here, PROMPTS), clip_alignment(there, here, PROMPTS), atol=0.05)
    known = world.known_pictures(1)
    once = [part[:32] for part in known[:3]]
    assert zero_shot(there, there.clip, *once) == zero_shot(world, world.clip, *once)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_there_and_a_cpu_reads_what_it_leaves(method, world, tmp_path):
    there, has = load("emojinette"), {field.name for field in fields(METHODS[method][1])}
    short = {"steps": 2, "batch": 2, "retain": ("castle", "bear"), "rolled": 1}
    config = settings(method, **{k: v for k, v in short.items() if k in has})
    made = erase(there, ["church"], method, config, progress=False)
    made.save(tmp_path / method)
    read = Erasure.load(tmp_path / method, world.pipe.unet)
    both = (sample(w.pipe, PROMPTS, SEEDS, erasure=e, steps=2).int() for w, e in ((there, made), (world, read)))
    assert (next(both) - next(both)).abs().float().mean() < 10
