"""The bundled world on a GPU, where there is one; Stable Diffusion's tests use it too."""

from dataclasses import fields

import pytest
import torch

from erasekit import METHODS, Erasure, erase, load, method_config, sample
from erasekit.evaluation.metrics import clip_alignment, judge_images
from erasekit.studies.world import zero_shot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS, SEEDS = ["a picture of a church", "a picture of a dog"], [0, 1]


def test_a_gpu_samples_and_judges_as_a_cpu_does(world):
    on_gpu = load("emojinette", precision="fp32")
    assert on_gpu.pipe.device.type == "cuda" and on_gpu.fingerprint == world.fingerprint
    ours, theirs = (sample(w.pipe, PROMPTS, SEEDS, num_inference_steps=8) for w in (world, on_gpu))
    assert (ours.int() - theirs.int()).abs().float().mean() < 1
    assert torch.allclose(judge_images(world, ours)[0], judge_images(on_gpu, theirs)[0], atol=0.05)
    assert torch.allclose(clip_alignment(world, ours, PROMPTS), clip_alignment(on_gpu, ours, PROMPTS), atol=0.05)
    test_images = [part[:32] for part in world.test_images(1)[:3]]
    assert zero_shot(on_gpu, on_gpu.clip, *test_images) == zero_shot(world, world.clip, *test_images)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_a_gpu_and_a_cpu_reads_the_result(method, world, tmp_path):
    on_gpu, accepted = load("emojinette"), {field.name for field in fields(METHODS[method].config)}
    short = {"steps": 2, "batch_size": 2, "retain": ("castle", "bear"), "num_trajectories": 1}
    short |= {"rounds": 1, "round_steps": 1, "inner": 1}
    config = method_config(method, **{name: value for name, value in short.items() if name in accepted})
    erasure = erase(on_gpu, ["church"], method, config, progress=False)
    erasure.save(tmp_path / method)
    read = Erasure.load(tmp_path / method, world)
    ours, theirs = (
        sample(w.pipe, PROMPTS, SEEDS, erasure=e, num_inference_steps=2).int()
        for w, e in ((on_gpu, erasure), (world, read))
    )
    assert (ours - theirs).abs().float().mean() < 10
