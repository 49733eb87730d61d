"""Sampling against diffusers' own pipeline; seeds, batches and keys."""

from dataclasses import replace

import pytest
import torch

from erasekit.attention import Prompt
from erasekit.conditioning import encode
from erasekit.sampling import SAMPLERS, denoise, initial_noise, sample, sample_batches, scheduler_for

PROMPTS = ["a picture of a church", "a dog", "a picture of a church in the style of noto"]
SEEDS = [3, 1, 2**40]


def difference(a, b):
    """Largest difference in 8-bit steps."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().max().item()


def by_diffusers(pipe, **inputs):
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    how = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": generator, "output_type": "pt"}
    return pipe(**inputs, **how).images.mul(255).round().to(torch.uint8)


def images(toy, prompts=("a church", "a dog"), seeds=(0, 1), **kwargs):
    return sample(toy.pipe, list(prompts), list(seeds), num_inference_steps=3, **kwargs)


@pytest.mark.parametrize("name", ["toy", "world"])
def test_images_are_those_of_diffusers(name, request):
    pipe = request.getfixturevalue(name).pipe
    ours = sample(pipe, PROMPTS, SEEDS, num_inference_steps=4, guidance_scale=5.0)
    assert difference(ours, by_diffusers(pipe, prompt=PROMPTS)) <= 1


def test_a_key_on_both_halves_is_diffusers_on_longer_text(toy, prompt):
    key = Prompt(prompt.k, prompt.k)
    ours = sample(toy.pipe, PROMPTS, SEEDS, key=key, key_half="both", num_inference_steps=4)
    texts = (encode(toy.pipe, prompts).tokens for prompts in (PROMPTS, [""] * 3))
    longer, longer_null = (torch.cat([text, key.k.expand(3, -1, -1)], dim=1) for text in texts)
    theirs = by_diffusers(toy.pipe, prompt_embeds=longer, negative_prompt_embeds=longer_null)
    assert difference(ours, theirs) <= 1


def test_batch_size_changes_no_pixel_by_more_than_one_step(world, toy):
    """Convolutions add in another order for another batch size; seeds and the loop do not depend on it."""
    prompts, seeds = [f"a picture of a {c}" for c in world.concepts("classes")[:4]], list(range(4))
    one, four = (sample(world.pipe, prompts, seeds, num_inference_steps=2, batch_size=n) for n in (1, 4))
    assert difference(one, four) <= 1
    three = ["a church", "a dog", "a fish"], [0, 1, 2]
    assert difference(images(toy, *three, batch_size=2), images(toy, *three)) <= 1, "a short last batch"
    assert difference(images(toy)[1:], images(toy, ["a dog"], [1])) <= 1


def test_only_the_requested_batches_are_sampled(toy):
    arguments = toy.pipe, ["a church", "a dog", "a fish"], [0, 1, 2]
    whole = sample(*arguments, num_inference_steps=2, batch_size=1)
    [(part, found)] = sample_batches(*arguments, num_inference_steps=2, batches=[slice(1, 2)])
    assert part == slice(1, 2) and torch.equal(found, whole[1:2])


def test_images_follow_seed_and_prompt(toy):
    a, b, c = images(toy, ["a church", "a church", "a dog"], [0, 1, 0])
    assert not torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    first = images(toy)
    assert torch.equal(torch.rand(()), expected), "the global generator is not used"
    assert torch.equal(images(toy), first)
    assert first.shape == (2, 3, 16, 16) and first.float().std() > 1


def test_noise_is_unit_gaussian(toy):
    noise = initial_noise(toy.pipe, list(range(64)))
    assert noise.shape == (64, 4, 8, 8)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_equal_prompts_have_equal_conditioning(toy):
    a, b, c = encode(toy.pipe, ["a dog", "a church", "a dog"]).tokens
    assert torch.equal(a, c) and not torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------------- keys


def test_keys_on_one_half_on_both_and_none_differ(toy, prompt):
    plain, processors = images(toy), toy.pipe.unet.attn_processors
    assert torch.equal(images(toy, key_half="both"), plain)
    conditional, both = images(toy, key=prompt), images(toy, key=prompt, key_half="both")
    assert not torch.equal(plain, conditional) and not torch.equal(conditional, both) and not torch.equal(both, plain)
    assert not torch.equal(images(toy, key=replace(prompt, layers="mid")), conditional)
    assert toy.pipe.unet.attn_processors == processors
    assert torch.equal(images(toy), plain), "the pipeline is unchanged"


def test_without_guidance_a_key_on_the_conditional_half_has_no_effect(toy, prompt):
    """A guidance scale of 0 leaves the unconditional half alone."""
    plain = images(toy, guidance_scale=0.0)
    assert torch.equal(images(toy, key=prompt, guidance_scale=0.0), plain)
    assert not torch.equal(images(toy, key=prompt, key_half="both", guidance_scale=0.0), plain)


def test_an_empty_prompt_takes_the_key_on_one_half_only(toy, prompt):
    """The conditional half is identified by its position, not by its text."""
    plain, conditional = images(toy, ["", ""]), images(toy, ["", ""], key=prompt)
    assert not torch.equal(conditional, plain)
    assert not torch.equal(conditional, images(toy, ["", ""], key=prompt, key_half="both"))


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": "cat"}, "prompts='cat' is one text"),
        ({"prompts": [], "seeds": []}, "prompts is empty"),
        ({"seeds": [0]}, "2 prompts and 1 seeds"),
        ({"key_half": "left"}, "unknown key_half 'left': accepted are conditional, both"),
        ({"key": Prompt(torch.zeros(3, 48), torch.zeros(3, 48))}, "48 wide .* 32"),
    ],
)
def test_impossible_requests_are_refused(toy, changes, message, sentence):
    with pytest.raises(ValueError, match=message) as error:
        sample(**{"pipe": toy.pipe, "prompts": ["a church", "a dog"], "seeds": [0, 1]} | changes)
    sentence(error)


def gaussian_error(pipe, sampler: str, steps: int) -> float:
    """Relative error of the clean latents where the data are Gaussian, for which noise and solution are known exactly."""
    variance = 0.25
    alphas = scheduler_for(pipe).alphas_cumprod.double()
    noise = initial_noise(pipe, [0, 1]).double()

    def guide(z, t, step):
        a = alphas[t.long()][:, None, None, None]
        return (1 - a).sqrt() * z / (a * variance + 1 - a)

    found = denoise(pipe, guide, noise, steps, sampler=sampler)
    exact = noise * (variance / (alphas[-1] * variance + 1 - alphas[-1])).sqrt()
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_converges_to_the_exact_solution(toy, sampler):
    errors = {steps: gaussian_error(toy.pipe, sampler, steps) for steps in (10, 20, 100)}
    assert errors[10] > errors[20] > errors[100] and errors[100] < 0.03


def test_a_world_is_drawn_by_its_own_sampler(toy, monkeypatch):
    options = {"num_inference_steps": 3}
    other = sample(toy, PROMPTS, SEEDS, sampler="dpm-solver++", **options)
    assert not torch.equal(sample(toy, PROMPTS, SEEDS, **options), other)
    monkeypatch.setattr(toy, "sampler", "dpm-solver++")
    assert torch.equal(sample(toy, PROMPTS, SEEDS, **options), other)
