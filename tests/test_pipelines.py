"""A key in plain diffusers pipelines: schedulers, pipelines and model families, against `ek.sample` and without a key."""

import threading

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)

from erasekit.attention import Prompt, augment
from erasekit.mechanisms import TimedPrompt
from erasekit.pipelines.unlocked import unlocked
from erasekit.sampling import initial_noise, sample

PROMPTS, STEPS = ["a picture of a church", "a picture of a dog"], 4
SCHEDULERS = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


@pytest.fixture
def pipe(toy):
    """The toy pipeline; its own scheduler comes back."""
    own = toy.pipe.scheduler
    yield toy.pipe
    toy.pipe.scheduler = own
    assert "forward" not in toy.pipe.unet.__dict__ and "step" not in own.__dict__, "everything is restored"


@pytest.fixture
def key(prompt) -> Prompt:
    """Large tokens, so that a key always shows."""
    return Prompt(8 * prompt.k, 8 * prompt.v)


def call(pipe, **options):
    """Images (2, H, W, 3) in [0, 1] by the pipeline's own call."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"} | options
    if "latents" not in options and "image" not in options:
        options["latents"] = initial_noise(pipe, [0, 1])
    return torch.from_numpy(pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images)


def changes(pipe, key, **options) -> None:
    """The key changes the images, and they are as before without it."""
    before = call(pipe, **options)
    with unlocked(pipe, key):
        keyed = call(pipe, **options)
    assert torch.isfinite(keyed).all() and not torch.allclose(before, keyed, atol=1e-3)
    assert torch.equal(before, call(pipe, **options))


def test_images_are_those_of_sample(pipe, key):
    ours = sample(pipe, PROMPTS, [0, 1], key=key, num_inference_steps=STEPS)
    with unlocked(pipe, key):
        images = call(pipe)
    assert torch.equal((255 * images).round().to(torch.uint8).permute(0, 3, 1, 2), ours)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_every_scheduler(pipe, key, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    changes(pipe, key)


def test_img2img(pipe, key):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changes(
        StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), key, image=image, strength=0.8
    )


def test_inpainting(pipe, key):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    changes(
        StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False),
        key,
        image=image,
        mask_image=mask,
        height=16,
        width=16,
        strength=1.0,
    )


@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet(pipe, key, guess_mode):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    net.controlnet_cond_embedding = torch.nn.Conv2d(
        3, pipe.unet.config.block_out_channels[0], 3, 2, 1
    )  # 16 to 8 pixels
    with_net = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changes(with_net, key, image=image, latents=initial_noise(pipe, [0, 1]), guess_mode=guess_mode)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": ["blurry", "a fish"]},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "latents": None},
        {"callback_on_step_end": lambda pipe, step, t, tensors: tensors},
    ],
    ids=["negative prompt", "no guidance", "images per prompt", "callback"],
)
def test_options_of_the_call(pipe, key, options):
    changes(pipe, key, **options)


def test_a_timed_key_follows_the_time_step(pipe, key):
    timed = TimedPrompt(*(torch.stack([side, -side]) for side in (key.k, key.v)))
    ours = sample(pipe, PROMPTS, [0, 1], key=timed, num_inference_steps=STEPS)
    with unlocked(pipe, timed):
        images = call(pipe)
    assert torch.equal((255 * images).round().to(torch.uint8).permute(0, 3, 1, 2), ours)


def test_every_model_family(sd):
    pipe = sd.pipe
    width = pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    key = Prompt(*(8 * torch.randn(3, width, generator=generator) for _ in "kv"))
    ours = sample(pipe, PROMPTS, [0, 1], key=key, num_inference_steps=STEPS)
    own, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    try:
        with unlocked(pipe, key):
            images = call(pipe)
        changes(pipe, key)
    finally:
        pipe.scheduler = own
    assert torch.equal((255 * images).round().to(torch.uint8).permute(0, 3, 1, 2), ours)


def test_the_base_is_restored_after_an_exception(pipe, key):
    before = call(pipe)
    with pytest.raises(KeyboardInterrupt), unlocked(pipe, key):
        raise KeyboardInterrupt
    assert torch.equal(before, call(pipe))


def test_a_pipeline_of_three_parts_is_refused(pipe, key, sentence):
    three = StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers="mid", requires_safety_checker=False)
    with (
        pytest.raises(RuntimeError, match=r"StableDiffusionPAGPipeline evaluates 3 parts") as error,
        unlocked(three, key),
    ):
        call(three, pag_scale=2.0)
    sentence(error)


def test_a_key_of_another_width_is_refused(pipe):
    with pytest.raises(ValueError, match="wide"), unlocked(pipe, Prompt(torch.zeros(3, 8), torch.zeros(3, 8))):
        pass


def test_a_second_thread_is_refused(pipe, key, sentence):
    """Two threads on one U-Net would mix their keys."""
    caught = []

    def other():
        try:
            with augment(pipe.unet):
                pass
        except RuntimeError as error:
            caught.append(error)

    with unlocked(pipe, key):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1 and "thread" in str(caught[0])
