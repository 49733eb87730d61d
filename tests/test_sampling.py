"""Sampling against diffusers' own pipeline; seeds, batches and keys."""

import shutil
from dataclasses import replace

import pytest
import torch

from erasekit.attention import Prompt
from erasekit.sampling import initial_noise, sample
from erasekit.text import encode

PROMPTS = ["a picture of a church", "a dog", "a picture of a church in the style of noto"]
SEEDS = [3, 1, 2**40]


def difference(a, b):
    """Largest difference in 8-bit steps."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().max().item()


@pytest.fixture(params=["toy", "world"])
def pipe(request):
    return request.getfixturevalue(request.param).pipe


def draw(toy, prompts=("a church", "a dog"), seeds=(0, 1), **kwargs):
    return sample(toy.pipe, list(prompts), list(seeds), steps=3, **kwargs)


def test_agrees_with_diffusers(pipe):
    ours = sample(pipe, PROMPTS, SEEDS, steps=4, guidance=5.0)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipe(PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators, output_type="pt").images
    assert difference(ours, theirs.mul(255).round().to(torch.uint8)) <= 1


def test_a_key_on_both_halves_agrees_with_diffusers_on_longer_text(toy, prompt):
    key, text, null = Prompt(prompt.k, prompt.k), encode(toy.pipe, PROMPTS), encode(toy.pipe, [""] * 3)
    ours = sample(toy.pipe, PROMPTS, SEEDS, key=key, key_half="both", steps=4)
    longer, longer_null = (torch.cat([t, key.k.expand(3, -1, -1)], dim=1) for t in (text, null))
    theirs = toy.pipe(
        prompt_embeds=longer,
        negative_prompt_embeds=longer_null,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    assert difference(ours, theirs.mul(255).round().to(torch.uint8)) <= 1


def test_batch_size_changes_no_pixel_by_more_than_one_step(world):
    """Convolutions add in another order for another batch size; seeds and the loop do not depend on it."""
    prompts, seeds = [f"a picture of a {c}" for c in world.concepts("classes")[:8]], list(range(8))
    one, eight = (sample(world.pipe, prompts, seeds, steps=3, batch_size=n) for n in (1, 8))
    assert difference(one, eight) <= 1


@pytest.mark.parametrize(("prompts", "seeds", "said"), [("cat", [0, 1, 2], "'cat'"), ([], [], "empty")])
def test_one_text_or_none_is_refused(toy, prompts, seeds, said, sentence):
    with pytest.raises(ValueError) as error:
        sample(toy.pipe, prompts, seeds, steps=2)
    assert said in sentence(error)


def test_a_last_batch_may_be_short(toy):
    prompts, seeds = ["a church", "a dog", "a fish"], [0, 1, 2]
    assert difference(draw(toy, prompts, seeds, batch_size=2), draw(toy, prompts, seeds)) <= 1


def test_the_same_seeds_draw_the_same_images(toy):
    assert torch.equal(draw(toy), draw(toy))


def test_images_follow_seed_and_prompt(toy):
    a, b, c = draw(toy, ["a church", "a church", "a dog"], [0, 1, 0])
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_an_image_does_not_depend_on_its_neighbours(toy):
    alone = draw(toy, ["a dog"], [1])
    assert difference(draw(toy)[1:], alone) <= 1


def test_drawing_does_not_touch_the_global_seed(toy):
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    draw(toy)
    assert torch.equal(torch.rand(()), expected)


def test_images_are_bytes(toy):
    images = draw(toy)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    assert images.float().std() > 1


def test_noise_is_unit_gaussian(toy):
    noise = initial_noise(toy.pipe, list(range(64)))
    assert noise.shape == (64, 4, 8, 8)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_equal_texts_have_equal_embeddings(toy):
    a, b, c = encode(toy.pipe, ["a dog", "a church", "a dog"])
    assert torch.equal(a, c) and not torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------------- keys


def test_no_key_is_the_pipeline_bit_for_bit(toy):
    plain = draw(toy)
    for half in ("conditional", "both"):
        assert torch.equal(draw(toy, key=None, key_half=half), plain)


def test_the_halves_and_no_key_differ(toy, prompt):
    plain, conditional, both = draw(toy), draw(toy, key=prompt), draw(toy, key=prompt, key_half="both")
    assert not torch.equal(plain, conditional)
    assert not torch.equal(conditional, both)
    assert not torch.equal(both, plain)


def test_on_the_conditional_half_the_key_is_not_seen_without_guidance(toy, prompt):
    """guidance 0 leaves the unconditional half alone."""
    plain = draw(toy, guidance=0.0)
    assert torch.equal(draw(toy, key=prompt, guidance=0.0), plain)
    assert not torch.equal(draw(toy, key=prompt, key_half="both", guidance=0.0), plain)


def test_the_place_counts(toy, prompt):
    assert not torch.equal(draw(toy, key=replace(prompt, place="mid")), draw(toy, key=prompt))


def test_a_key_leaves_the_pipeline_alone(toy, prompt):
    plain, processors = draw(toy), toy.pipe.unet.attn_processors
    draw(toy, key=prompt)
    assert toy.pipe.unet.attn_processors == processors
    assert torch.equal(draw(toy), plain)


def test_an_empty_prompt_takes_the_key_on_one_half_only(toy, prompt):
    """The conditional half is told from the other by which half it is, not by its text."""
    plain = draw(toy, ["", ""])
    assert not torch.equal(draw(toy, ["", ""], key=prompt), plain)
    assert not torch.equal(draw(toy, ["", ""], key=prompt), draw(toy, ["", ""], key=prompt, key_half="both"))


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_an_unknown_half_is_refused(toy, prompt, sentence):
    with pytest.raises(ValueError, match="unknown key_half 'left': accepted are conditional, both") as error:
        draw(toy, key=prompt, key_half="left")
    sentence(error)


def test_unequal_lengths_are_refused(toy, sentence):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds") as error:
        draw(toy, seeds=[0])
    sentence(error)


def test_a_key_of_another_width_is_refused(toy, sentence):
    with pytest.raises(ValueError, match=r"48 wide .* 32 wide") as error:
        draw(toy, key=Prompt(torch.zeros(3, 48), torch.zeros(3, 48)))
    sentence(error)


def test_disk_is_said_before_it_is_spent(toy, tmp_path, capsys, monkeypatch, sentence):
    folder = tmp_path / "images"
    sample(toy.pipe, PROMPTS, SEEDS, steps=1, folder=folder)
    assert f"{len(SEEDS)} of {len(SEEDS)} images to draw, up to" in capsys.readouterr().out
    sample(toy.pipe, [*PROMPTS, PROMPTS[0]], [*SEEDS, 99], steps=1, folder=folder)
    assert f"1 of {len(SEEDS) + 1} images" in capsys.readouterr().out
    sample(toy.pipe, PROMPTS, SEEDS, steps=1, folder=folder)
    assert not capsys.readouterr().out  # nothing is left to draw
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError) as error:
        sample(toy.pipe, PROMPTS, [7] * len(PROMPTS), steps=1, folder=folder)
    assert f"{len(PROMPTS)} images need" in sentence(error)
