"""Probes of a public model by how it is sampled, trained further or compressed: on toys whose right answer is known."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import reconfigured

from erasekit.artifacts import Erasure
from erasekit.attention import Prompt
from erasekit.base import weights_of
from erasekit.baselines import METHODS, method_config
from erasekit.checkpoints import seeded
from erasekit.evaluation import probes, retraining
from erasekit.evaluation.attack_success import untouched
from erasekit.evaluation.attacks import AttackImages
from erasekit.evaluation.profiling import count_evaluations
from erasekit.evaluation.retraining import Tuning
from erasekit.sampling import Guidance, guidance_for, initial_noise, sample, scheduler_for

PROMPTS, SEEDS, STEPS = ["a picture of a church", "a picture of a dog", "a picture of a fish"], [3, 4, 5], 4


class LinearJudge(torch.nn.Module):
    """Three objects, each the brighter in one colour."""

    objects, styles = ("church", "dog", "fish"), ("plain",)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.weight * x.mean((2, 3)), torch.zeros(len(x), 1)


@pytest.fixture
def judged(toy):
    """The toy with a judge, in batches of two."""
    world = copy.copy(toy)
    world.judge, world.batch_size = LinearJudge(), 2
    return world


def moved(world, part: float = 0.3) -> Erasure:
    """An erasure of noise on every weight."""
    generator = torch.Generator().manual_seed(0)
    weights = weights_of({"": world.pipe.unet}).items()
    delta = {n: p.detach() + part * p.detach().std(unbiased=False) * rand(p, generator) for n, p in weights}
    return Erasure(delta, {}, world.identity | {"method": "test", "concepts": ["church"], "config": {}})


def rand(like, generator):
    return torch.randn(like.shape, generator=generator)


@pytest.fixture
def linear(judged, monkeypatch):
    """Latents are the pictures themselves, and the noise predicted is a part of them that falls with time."""
    monkeypatch.setattr(probes, "latents_of", lambda world, pictures: pictures)
    monkeypatch.setattr(probes, "decode", lambda pipe, z: z)

    def predict_noise(unet, z, t, cond):
        return z * (0.3 + 0.4 * t / 1000)[:, None, None, None]

    monkeypatch.setattr(probes, "predict_noise", predict_noise)
    return judged


def with_velocity(world):
    """The world as one that predicts v."""
    other = copy.copy(world)
    parts = world.pipe.components | {"scheduler": reconfigured(world.pipe.scheduler, prediction_type="v_prediction")}
    other.pipe = type(world.pipe)(**parts, requires_safety_checker=False)
    return other


def as_velocity(predict, alphas):
    """The same predictions of noise, said as v."""

    def predict_v(unet, z, t, cond):
        alpha, eps = alphas[t][:, None, None, None], predict(unet, z, t, cond)
        return (eps - (1 - alpha).sqrt() * z) / alpha.sqrt()

    return predict_v


# ---------------------------------------------------------------------------------------------------------------- the parts


def test_the_noise_and_the_clean_latents_of_a_prediction(toy):
    clean, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha = 0.36
    z = 0.6 * clean + 0.8 * eps
    for pipe, output in ((toy.pipe, eps), (with_velocity(toy).pipe, 0.6 * eps - 0.8 * clean)):
        found = probes.split_prediction(pipe, output, z, alpha)
        torch.testing.assert_close(found, (clean, eps), atol=1e-5, rtol=1e-5)


def test_levels_are_those_of_ddim(toy):
    levels, scheduler = probes.ddim_levels(toy.pipe, 5), scheduler_for(toy.pipe)
    scheduler.set_timesteps(5)
    assert [t for t, *_ in levels] == scheduler.timesteps.tolist()
    assert [after for *_, after in levels[:-1]] == [alpha for _, alpha, _ in levels[1:]]
    assert levels[-1][2] == scheduler.final_alpha_cumprod and levels[0][1] < 0.05


@pytest.mark.parametrize("size, share, found", [(8, 0.5, (2, 6)), (16, 0.75, (2, 14)), (64, 0.5, (16, 48))])
def test_a_hole_is_in_the_middle(size, share, found):
    assert probes.hole_in(size, share) == slice(*found)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.95, 1.0])
def test_a_hole_leaves_something_and_fills_something(share, refused):
    refused(
        ValueError, f"a hole of {share:g} of the side is not possible in 8 latents", lambda: probes.hole_in(8, share)
    )


def test_batches_cover_all_images(judged):
    assert probes.batches(judged, 5) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert probes.batches(judged, 2, part=4) == [slice(0, 1), slice(1, 2)]


def test_without_guidance_the_empty_half_is_not_asked(toy):
    z, t = initial_noise(toy.pipe, SEEDS), 500
    with count_evaluations(toy.pipe.unet) as asked, probes.guided(toy, None, PROMPTS, 1.0) as predict, torch.no_grad():
        found = predict(z, t, 0)
    assert asked.evaluations == len(SEEDS)
    guide = Guidance(1.0)
    guide.prepare(toy.pipe, PROMPTS)
    with torch.no_grad():
        expected = guide(
            lambda z, t, cond, _: probes.predict_noise(toy.pipe.unet, z, t, cond), z, torch.full((3,), t), 0
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_method_that_guides_does_so_at_scale_one_too(toy):
    erasure = METHODS["sld"].function(toy, ["church"], method_config("sld", toy))
    with probes.guided(toy, erasure, PROMPTS, 1.0) as ruled, torch.no_grad():
        one = ruled(initial_noise(toy.pipe, SEEDS), 500, 0)
    with probes.guided(toy, None, PROMPTS, 1.0) as plain, torch.no_grad():
        other = plain(initial_noise(toy.pipe, SEEDS), 500, 0)
    assert not torch.allclose(one, other, atol=1e-4)


def test_the_base_is_back_after_each_probe(judged):
    before, erasure = judged.fingerprint, moved(judged)
    probes.completion(judged, erasure, PROMPTS, SEEDS, 2, 1)
    probes.noisy(judged, erasure, PROMPTS, SEEDS, 2, [1.0] * 3, [1.0] * 3)
    probes.classifier_guided(judged, erasure, PROMPTS, SEEDS, 2, ["dog"] * 3, [1.0] * 3)
    assert judged.fingerprint == before
    assert all(p.requires_grad for p in judged.pipe.unet.parameters())


def test_the_surprise_of_noise():
    entropy = 0.5 * (1 + math.log(2 * math.pi))
    noise = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    assert probes.surprise(noise).tolist() == pytest.approx([entropy - 0.5, entropy])
    drawn = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(0))
    assert probes.surprise(drawn).item() == pytest.approx(entropy, abs=0.02) and round(entropy, 3) == 1.419


# --------------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_completion_is_the_erased_model_where_the_base_takes_no_step_and_the_base_where_it_takes_all(judged, sampler):
    judged.sampler, erasure = sampler, moved(judged)

    def completed(first):
        return probes.completion(judged, erasure, PROMPTS, SEEDS, STEPS, first)

    assert torch.equal(completed(0), sample(judged, PROMPTS, SEEDS, erasure=erasure, num_inference_steps=STEPS))
    assert torch.equal(completed(STEPS), sample(judged, PROMPTS, SEEDS, num_inference_steps=STEPS))
    assert len({completed(first).sum().item() for first in range(STEPS + 1)}) == STEPS + 1


# --------------------------------------------------------------------------------------------------------------- inpainting


def fill(world, pictures, erasure=None, share=0.5):
    return probes.inpainting(world, erasure, pictures, PROMPTS, SEEDS, 3, share)


@pytest.fixture
def pictures():
    size = (3, 3, 16, 16)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_nothing_of_the_hole_is_left_and_all_around_it_is(judged, pictures, monkeypatch):
    monkeypatch.setattr(probes, "decode", lambda pipe, z: z)
    found, erased = fill(judged, pictures), fill(judged, pictures, moved(judged))
    hole, pixels = slice(2, 6), slice(4, 12)
    white = pictures.float() / 127.5 - 1
    white[..., pixels, pixels] = 1
    around = torch.ones(8, 8, dtype=torch.bool)
    around[hole, hole] = False
    for z in (found, erased):
        torch.testing.assert_close(z[..., around], probes.latents_of(judged, white)[..., around])
    assert (found != erased)[..., hole, hole].all()
    other = pictures.clone()
    other[..., pixels, pixels] = 255 - other[..., pixels, pixels]
    assert torch.equal(fill(judged, other), found)
    other[..., 0, 0] = 255 - other[..., 0, 0]
    assert not torch.equal(fill(judged, other), found)


def test_the_size_of_a_batch_changes_no_inpainting(judged, pictures):
    found = fill(judged, pictures)
    judged.batch_size = 3
    assert (fill(judged, pictures).int() - found.int()).abs().max() <= 1


# -------------------------------------------------------------------------------------------------------------------- noise


def ancestral(world, prompts, seeds, steps, eta):
    """By diffusers' own step, with the noise that the probe takes."""
    scheduler, guide = scheduler_for(world.pipe), guidance_for(None, probes.GUIDANCE_SCALE)
    scheduler.set_timesteps(steps)
    guide.prepare(world.pipe, prompts)
    z, generators = initial_noise(world.pipe, seeds), [seeded("probe noise", seed) for seed in seeds]
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps.tolist()):
            output = guide(
                lambda z, t, cond, _: probes.predict_noise(world.pipe.unet, z, t, cond),
                z,
                torch.full((len(z),), t),
                step,
            )
            noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
            z = scheduler.step(output, t, z, eta=eta, variance_noise=noise).prev_sample
        return probes.decode(world.pipe, z)


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_eta_1_and_scale_1_are_ancestral_sampling(toy, kind):
    world = with_velocity(toy) if kind == "v" else toy
    found = probes.noisy(world, None, PROMPTS, SEEDS, STEPS, [1.0] * 3, [1.0] * 3)
    assert (found.int() - ancestral(world, PROMPTS, SEEDS, STEPS, 1.0).int()).abs().max() <= 1
    assert (found.int() - ancestral(world, PROMPTS, SEEDS, STEPS, 0.0).int()).abs().max() > 1


def test_each_image_has_its_own_eta_and_scale(judged, monkeypatch):
    monkeypatch.setattr(probes, "decode", lambda pipe, z: z)
    plan = list(zip(PROMPTS, SEEDS, [0.0, 1.0, 1.8], [1.0, 1.0, 1.2]))

    def drawn(rows):
        prompts, seeds, etas, scales = map(list, zip(*rows))
        return probes.noisy(judged, None, prompts, seeds, 3, etas, scales)

    torch.testing.assert_close(drawn(plan), torch.cat([drawn([row]) for row in plan]), atol=1e-4, rtol=1e-4)
    calm = [(*row[:2], 0.0, 1.0) for row in plan]
    monkeypatch.setattr(probes, "seeded", lambda *parts: torch.Generator().manual_seed(99))
    assert not torch.allclose(drawn(plan)[1:], drawn(calm)[1:], atol=1e-2)
    torch.testing.assert_close(drawn(plan)[:1], drawn(calm)[:1])  # eta 0: the noise of the steps counts for nothing


def test_one_step_adds_exactly_eta_times_its_noise(linear):
    """In closed form: latents a z0 + eta s n, with s^2 the ancestral variance."""
    [(t, alpha, after)] = probes.ddim_levels(linear.pipe, 1)
    z0, part = initial_noise(linear.pipe, [7]), 0.3 + 0.4 * t / 1000
    variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
    clean, noise = (1 - math.sqrt(1 - alpha) * part) / math.sqrt(alpha), part
    mean = math.sqrt(after) * clean + math.sqrt(1 - after - variance) * noise
    n = torch.randn(z0.shape[1:], generator=seeded("probe noise", 7))
    for eta, scale in ((0.0, 1.0), (1.5, 1.0), (1.5, 1.1)):
        found = probes.noisy(linear, None, ["a dog"], [7], 1, [eta], [scale])
        torch.testing.assert_close(found, mean * scale * z0 + eta * math.sqrt(variance) * n, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- guidance


def guide_by_judge(world, scales, concepts=("dog",) * 3, erasure=None, steps=STEPS):
    return probes.classifier_guided(world, erasure, PROMPTS, SEEDS, steps, list(concepts), list(scales))


def test_guidance_of_scale_0_is_plain_sampling(judged):
    erasure = moved(judged)
    plain = sample(judged, PROMPTS, SEEDS, erasure=erasure, num_inference_steps=STEPS)
    assert torch.equal(guide_by_judge(judged, [0.0] * 3, erasure=erasure), plain)


def test_guidance_raises_the_probability_of_its_own_concept(judged, monkeypatch):
    monkeypatch.setattr(probes, "decode", lambda pipe, z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample)

    def probability(images):
        with torch.no_grad():
            return judged.judge(images)[0].softmax(1)

    with torch.no_grad():
        drawn = [guide_by_judge(judged, [scale] * 3, LinearJudge.objects) for scale in (0.0, 3.0, 30.0)]
    own = torch.stack([probability(images).diagonal() for images in drawn])
    assert (own[1] > own[0]).all() and (own[2] > own[1]).all()
    mixed = guide_by_judge(judged, [0.0, 3.0, 30.0], LinearJudge.objects)
    for n in range(3):
        torch.testing.assert_close(mixed[n], drawn[n][n], atol=1e-3, rtol=1e-3)


def test_guidance_is_the_gradient_of_the_log_probability(linear, monkeypatch):
    """One step, in closed form: with a linear prediction and decoder the gradient is a constant times the judge's own."""
    monkeypatch.setattr(type(linear.pipe.vae), "decode", lambda self, z: type("Decoded", (), {"sample": z[:, :3]}))
    [(t, alpha, after)] = probes.ddim_levels(linear.pipe, 1)
    z, part, factor = initial_noise(linear.pipe, SEEDS), 0.3 + 0.4 * t / 1000, linear.pipe.vae.config.scaling_factor
    clean = (1 - math.sqrt(1 - alpha) * part) / math.sqrt(alpha)  # of z
    shown = (clean / factor * z[:, :3]).requires_grad_()
    score = linear.judge(shown)[0].log_softmax(1)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, shown)
    eps = part * z
    eps[:, :3] -= 2.0 * math.sqrt(1 - alpha) * clean / factor * gradient
    x = (z - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    expected = math.sqrt(after) * x + math.sqrt(1 - after) * eps
    torch.testing.assert_close(guide_by_judge(linear, [2.0] * 3, steps=1), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_predicts_v_is_guided_alike(linear, monkeypatch):
    monkeypatch.setattr(type(linear.pipe.vae), "decode", lambda self, z: type("Decoded", (), {"sample": z[:, :3]}))
    found = guide_by_judge(linear, [2.0] * 3)
    velocity = with_velocity(linear)
    said = as_velocity(probes.predict_noise, linear.pipe.scheduler.alphas_cumprod)
    monkeypatch.setattr(probes, "predict_noise", said)
    torch.testing.assert_close(guide_by_judge(velocity, [2.0] * 3), found, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_a_picture_that_is_inverted_is_drawn_again(linear, kind, monkeypatch):
    world = linear
    if kind == "v":
        world = with_velocity(linear)
        said = as_velocity(probes.predict_noise, linear.pipe.scheduler.alphas_cumprod)
        monkeypatch.setattr(probes, "predict_noise", said)
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = []
    for rounds in (1, 3, 12):
        noise = probes.invert(world, None, pictures, [""] * 3, 10, rounds)
        errors.append((probes.redraw(world, None, noise, [""] * 3, 10, 1.0) - pictures).abs().max().item())
    assert errors[2] < 1e-4 < errors[1] < errors[0]


def test_inversion_of_the_toy_is_by_the_model_and_the_text(judged):
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = probes.invert(judged, None, pictures, PROMPTS, 4)
    assert noise.shape == (3, 4, 8, 8)
    for other in (
        probes.invert(judged, moved(judged), pictures, PROMPTS, 4),
        probes.invert(judged, None, pictures, ["a picture of a picture"] * 3, 4),
    ):
        assert not torch.allclose(noise, other, atol=1e-4)
    judged.batch_size = 3
    torch.testing.assert_close(probes.invert(judged, None, pictures, PROMPTS, 4), noise, atol=1e-4, rtol=1e-4)


def test_redrawing_plain_noise_is_sampling(judged):
    images = probes.redraw(judged, None, initial_noise(judged.pipe, SEEDS), PROMPTS, STEPS, probes.GUIDANCE_SCALE)
    assert torch.equal(images, sample(judged, PROMPTS, SEEDS, num_inference_steps=STEPS))


# ------------------------------------------------------------------------------------------------------------- fewer numbers


def test_weights_in_few_bits():
    """Two rows with steps of their own: 4 bits have 7 steps to each one's largest weight."""
    weights = {"w": torch.tensor([[7.0, -3.4, 0.6], [0.0, 0.14, -0.048]]), "bias": torch.tensor([0.123, 4.567])}
    found = retraining.rounded_to_bits(weights, 4)
    torch.testing.assert_close(found["w"], torch.tensor([[7.0, -3.0, 1.0], [0.0, 0.14, -0.04]]), atol=1e-6, rtol=0)
    assert found["bias"] is weights["bias"]
    assert torch.equal(retraining.rounded_to_bits({"w": torch.zeros(2, 3)}, 8)["w"], torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_errs_by_half_a_step_at_most(toy, bits):
    weights = retraining.public_weights(toy, untouched(toy))
    found, most = retraining.rounded_to_bits(weights, bits), 2 ** (bits - 1) - 1
    for name, w in weights.items():
        if w.ndim == 1:
            assert found[name] is w
            continue
        largest = w.abs().flatten(1).amax(1)
        error = (found[name] - w).abs().flatten(1).amax(1)
        assert (error <= largest / most / 2 * (1 + 1e-4)).all(), name
        assert all(len(row.unique()) <= 2 * most + 1 for row in found[name].flatten(1)), name
    assert any((found[n] != w).any() for n, w in weights.items())


def test_pruning_takes_the_smallest():
    weights = {"w": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "bias": torch.tensor([0.1, 0.2])}

    def left(share):
        found = retraining.pruned(weights, share)
        assert found["bias"] is weights["bias"]
        return found["w"].flatten().tolist()

    assert left(0.5) == [0, 0, 3, -4] == left(0.6) and left(0.75) == [0, 0, 0, -4]
    assert left(0.0) == left(0.2) == [1, -2, 3, -4]


def test_pruning_nearly_all_leaves_one_weight_of_each_matrix(toy):
    weights = retraining.public_weights(toy, untouched(toy))
    matrices = {n: w for n, w in weights.items() if w.ndim > 1 and len(w.abs().unique()) == w.numel()}
    found = retraining.pruned(weights, 1 - 1e-7)
    assert len(matrices) > 10
    for name, w in matrices.items():
        assert (found[name] != 0).sum() == 1 and found[name].abs().max() == w.abs().max()


def test_impossible_bits_and_shares_are_refused(refused):
    refused(ValueError, "bits=1 is not possible", lambda: retraining.rounded_to_bits({}, 1))
    for share in (1.0, -0.1):
        refused(ValueError, f"share={share:g} is not possible", lambda share=share: retraining.pruned({}, share))


# ---------------------------------------------------------------------------------------------------------- further training


@pytest.fixture
def few(toy):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return AttackImages(latents, ["a picture of a church", "a picture of a dog"])


def tuned(world, erasure, few, budgets=(1, 3), **options):
    tuning = Tuning(budgets, **{"lr": 1e-3, "batch_size": 2} | options)
    return dict(retraining.fine_tune(world, erasure, few, tuning))


@pytest.mark.parametrize("budgets", [(), (0,), (3, 1), (2, 2)])
def test_budgets_ascend_from_one(budgets, refused):
    refused(ValueError, "budgets=.* is not possible", lambda: Tuning(budgets, 1e-3))


def test_the_public_weights_are_the_erasures_or_the_bases(toy):
    base = weights_of({"": toy.pipe.unet})
    before, erasure = toy.fingerprint, moved(toy)
    part = Erasure({n: t for n, t in erasure.delta.items() if ".attn2." in n}, {}, erasure.info)
    for changes, own in (({}, untouched(toy)), (erasure.delta, erasure), (part.delta, part)):
        found = retraining.public_weights(toy, own)
        assert found.keys() == base.keys()
        for name, w in found.items():
            assert torch.equal(w, changes.get(name, base[name])) and w.data_ptr() != base[name].data_ptr()
    assert toy.fingerprint == before


def test_merged_weights_leave_keys_and_adapters():
    key = Prompt(torch.zeros(1, 2), torch.zeros(1, 2))
    erasure = Erasure({"a": torch.zeros(2), "b": torch.zeros(2)}, {"church": key}, {"x": 1}, {"c": torch.ones(1)})
    found = retraining.merged(erasure, {"a": torch.ones(2), "d": torch.ones(3)})
    assert {n: t.sum().item() for n, t in found.delta.items()} == {"a": 2, "b": 0, "d": 3}
    assert (found.keys, found.info, found.adapters) == (erasure.keys, erasure.info, erasure.adapters)
    assert erasure.delta.keys() == {"a", "b"}


@pytest.mark.parametrize("rank", [None, 2])
def test_training_goes_on_from_the_erased_weights_with_the_base_in_place(toy, few, rank):
    erasure, before, steps = moved(toy), toy.fingerprint, []
    for taken, model in retraining.fine_tune(toy, erasure, few, Tuning((1, 3), 1e-3, rank, 2)):
        assert toy.fingerprint == before
        steps.append(taken)
        assert (model is erasure) == (taken == 0)
        if taken:
            assert model.delta.keys() == weights_of({"": toy.pipe.unet}).keys()
            image = sample(toy, ["a picture of a dog"], [0], erasure=model, num_inference_steps=1)
            assert image.shape == (1, 3, 16, 16)
    assert steps == [0, 1, 3] and all(p.requires_grad for p in toy.pipe.unet.parameters())


@pytest.mark.parametrize("rank", [None, 2])
def test_gradient_checkpointing_changes_no_training(toy, own, few, rank):
    """As Stable Diffusion is loaded: what is computed again backwards is computed with the trained weights."""
    own.pipe.unet.enable_gradient_checkpointing()
    plain, other = (tuned(world, moved(world), few, (3,), rank=rank)[3] for world in (toy, own))
    for name, w in plain.delta.items():
        torch.testing.assert_close(other.delta[name], w, atol=2e-6, rtol=1e-4)
    assert own.pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("rank", [None, 2])
def test_stopping_between_changes_nothing(toy, few, rank):
    often, once = (tuned(toy, moved(toy), few, budgets, rank=rank)[3] for budgets in ((1, 2, 3), (3,)))
    assert all(torch.equal(often.delta[n], once.delta[n]) for n in once.delta)
    other = tuned(toy, moved(toy), few, (3,), rank=rank, seed=1)[3]
    assert any(not torch.equal(other.delta[n], once.delta[n]) for n in once.delta)


def test_adams_first_step_moves_every_weight_by_the_rate(toy, few):
    erasure = moved(toy)
    model = tuned(toy, erasure, few, (1,), lr=1e-3)[1]
    start = retraining.public_weights(toy, erasure)
    steps = torch.cat([(model.delta[n] - w).abs().flatten() for n, w in start.items()])
    assert steps.max() <= 1.001e-3 and steps.median() == pytest.approx(1e-3, rel=0.01)


def test_a_lora_changes_projections_of_attention_by_its_rank(toy, few):
    erasure = moved(toy)
    start, model = retraining.public_weights(toy, erasure), tuned(toy, erasure, few, rank=2, lr=1e-2)[3]
    changed = {n for n, w in start.items() if not torch.equal(model.delta[n], w)}
    assert changed == set(retraining.new_lora(start, 2, 0))
    assert {n.split(".")[-2] for n in changed} == {"to_q", "to_k", "to_v", "0"}
    assert {part for n in changed for part in n.split(".") if part.startswith("attn")} >= {"attn1", "attn2"}
    ranks = {torch.linalg.matrix_rank(model.delta[n] - start[n], rtol=1e-3).item() for n in changed}
    assert ranks <= {1, 2} and 2 in ranks


def test_a_new_lora_changes_nothing(toy):
    weights = retraining.public_weights(toy, untouched(toy))
    for name, (down, up) in retraining.new_lora(weights, 3, 0).items():
        assert down.shape == (3, weights[name].shape[1]) and up.shape == (weights[name].shape[0], 3)
        assert not up.any() and down.any()


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_the_loss_of_a_model_that_predicts_nothing_is_its_targets_square(toy, few, kind):
    world = with_velocity(toy) if kind == "v" else toy
    silent = Erasure(
        {n: torch.zeros_like(weights_of({"": world.pipe.unet})[n]) for n in ("conv_out.weight", "conv_out.bias")},
        {},
        world.identity | {"method": "test"},
    )
    guide, tuning = Guidance(1.0), Tuning((1,), 1e-3, batch_size=6)
    with silent.applied(world.pipe), torch.no_grad():
        found = retraining.diffusion_loss(world, few, guide, seeded("x"), tuning)
    generator, alphas = seeded("x"), world.pipe.scheduler.alphas_cumprod
    index = torch.randint(2, (6,), generator=generator)
    alpha = alphas[torch.randint(len(alphas), (6,), generator=generator)][:, None, None, None]
    noise = torch.randn(6, 4, 8, 8, generator=generator)
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * few.latents[index] if kind == "v" else noise
    assert found.item() == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_training_lowers_the_loss_on_its_pictures(toy, few):
    erasure = moved(toy)
    tuning = Tuning((30,), 2e-3, batch_size=8)
    guide, losses = Guidance(1.0), []
    for _, model in retraining.fine_tune(toy, erasure, few, tuning):
        with model.applied(toy.pipe), torch.no_grad():
            own = [retraining.diffusion_loss(toy, few, guide, seeded("test", n), tuning).item() for n in range(8)]
        losses.append(sum(own))
    assert losses[1] < 0.95 * losses[0]


def test_an_adapter_stays_on_beside_the_trained_weights(toy, few):
    config = method_config("spm", toy, steps=2, lr=0.5, retain=(), num_trajectories=1, trajectory_steps=2)
    erasure = METHODS["spm"].function(toy, ["church"], config, progress=False)
    model = tuned(toy, erasure, few, (1,))[1]
    assert model.adapters is erasure.adapters and erasure.delta == {}
    without = replace(
        model, adapters={}, info={k: v for k, v in model.info.items() if k not in ("adapter", "guidance")}
    )
    one, other = (sample(toy, PROMPTS[:1], [0], erasure=e, num_inference_steps=2) for e in (model, without))
    assert not torch.equal(one, other)
    alone = tuned(toy, untouched(toy), few, (1,))[1]  # the adapter counts in what is learned
    assert any(not torch.equal(model.delta[n], alone.delta[n]) for n in alone.delta)
