"""Stable Diffusion 1, 2 and XL at toy size: the real classes with a toy vocabulary, loaded from folders."""

from dataclasses import fields

import pytest
import torch
from conftest import make_toy
from diffusers import DDIMScheduler

from erasekit import losses
from erasekit.attention import Prompt, augment
from erasekit.baselines import METHODS, erase, method_config
from erasekit.conditioning import encode, pooled_width, token_embeddings
from erasekit.evaluation.attacks import (
    Attack,
    AttackImages,
    add_tokens,
    embedding_table,
    hard_prompt_search,
    optimize_key,
    placeholder_tokens,
    textual_inversion,
)
from erasekit.kpop import KPOP, kpop
from erasekit.mechanisms import CHOICES
from erasekit.sampling import sample
from erasekit.studies import efficiency
from erasekit.studies.kit.erasures import make_config
from erasekit.studies.objects import PRESETS
from erasekit.studies.overrides import overrides
from erasekit.training import optimizer_step
from erasekit.worlds import load

KINDS = ("1", "2", "XL")
PROMPTS, SEEDS = ["Image of church", "a photo of a dog"], [3, 1]
STEPS = {"num_inference_steps": 2}
POOL = {"num_trajectories": 2, "trajectory_steps": 4}
FAST = ("esd-x", "uce", "sld", "spm", "kpop")  # one of each kind: weights, closed form, guidance, adapter, keys
EACH_METHOD = [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in METHODS]


def short_config(method: str):
    """Two steps of a method."""
    names = {field.name for field in fields(METHODS[method].config)}
    short = {"steps": 2, "batch_size": 2, "retain": ("church", "dog"), "m": 3} | POOL
    short |= {"rounds": 1, "round_steps": 1, "inner": 1}
    return method_config(method, **{name: value for name, value in short.items() if name in names})


# ---------------------------------------------------------------------------------------------------------------- training

ANY = [(kind, method) for kind in KINDS for method in METHODS]
ANY = [pytest.param(k, m, marks=() if k == "1" and m in FAST else pytest.mark.slow) for k, m in ANY]


@pytest.mark.parametrize("sd, method", ANY, indirect=["sd"])
def test_every_method_erases_any_stable_diffusion(sd, method):
    before = {name: p.clone() for name, p in sd.pipe.unet.state_dict().items()}
    erasure = erase(sd, ["fish"], method, short_config(method), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in sd.pipe.unet.state_dict().items())
    base, public = (sample(sd.pipe, PROMPTS, SEEDS, erasure=e, **STEPS) for e in (None, erasure))
    assert base.shape == public.shape == (2, 3, 16, 16)
    if erasure.keys:
        recovered = sample(sd.pipe, PROMPTS, SEEDS, erasure=erasure, key=erasure.key("fish"), **STEPS)
        assert not torch.equal(public, recovered)


@pytest.fixture(scope="module", params=["bf16", "fp16"] if torch.cuda.is_available() else ["bf16"])
def half(request, tmp_path_factory):
    """Half-precision weights under autocast, as on a GPU."""
    folder = tmp_path_factory.mktemp("half")
    make_toy(seed=2).pipe.save_pretrained(folder)
    world = load(str(folder), precision=request.param)
    if world.pipe.device.type == "cpu":
        world.pipe.to(torch.bfloat16)
    return world


@pytest.mark.parametrize("method", EACH_METHOD)
def test_every_method_trains_in_half_precision(half, method):
    erasure = erase(half, ["fish"], method, short_config(method), progress=False)
    trained = [*erasure.delta.values(), *erasure.adapters.values()]
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in trained)
    images = sample(half.pipe, PROMPTS, SEEDS, erasure=erasure, autocast=half.autocast, **STEPS)
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [POOL | {"num_retain_trajectories": 1}, {"latents": "on_policy"}])
def test_latents_of_every_kind_in_half_precision(half, changes):
    config = method_config("kpop", steps=3, batch_size=2, m=3, retain=("church", "dog"), **changes)
    erasure = erase(half, ["fish"], "kpop", config, progress=False)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in erasure.delta.values())


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", CHOICES)
def test_every_mechanism_trains_in_half_precision(half, mechanism):
    erasure = kpop(half, ["fish"], KPOP(steps=2, batch_size=2, m=3, mechanism=mechanism, **POOL), progress=False)
    key = erasure.key("fish")
    assert key.k.dtype == torch.float32 and torch.isfinite(key.k).all()
    sample(half.pipe, PROMPTS, SEEDS, erasure=erasure, key=key, autocast=half.autocast, **STEPS)


def test_a_non_finite_gradient_changes_nothing(sentence):
    p = torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.Adam([p])
    for loss, word in (((p * torch.inf).sum(), "loss"), ((p.sqrt()).sum(), "gradient")):
        with pytest.raises(FloatingPointError, match=word) as error:
            optimizer_step(adam, loss, [p])
        sentence(error)
        assert torch.equal(p, torch.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["mid", "all"])
def test_checkpointing_trains_the_same(sd, layers, monkeypatch):
    """What is computed again in the backward pass sees the prompt of the first time."""
    config, calls = KPOP(steps=2, batch_size=2, m=3, layers=layers, retain=("church",), **POOL), []
    unet, plain = sd.pipe.unet, torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    assert any(getattr(m, "gradient_checkpointing", False) for m in unet.modules()), "on as the world is loaded"
    with_checkpointing = kpop(sd, ["fish"], config, progress=False)
    assert calls
    unet.disable_gradient_checkpointing()
    try:
        without = kpop(sd, ["fish"], config, progress=False)
    finally:
        unet.enable_gradient_checkpointing()
    one, other = without.delta, with_checkpointing.delta
    key, other_key = without.key("fish").k, with_checkpointing.key("fish").k
    if unet.device.type == "cpu":
        assert all(torch.allclose(one[n], other[n], atol=1e-7) for n in one)
        assert torch.allclose(key, other_key, atol=1e-7)
    # A GPU adds in another order each time, and Adam's first steps are as long for small gradients as for large ones.
    base = {name: p.cpu() for name, p in unet.state_dict().items()}
    step, difference = (torch.cat([(one[n] - x[n]).flatten() for n in one]) for x in (base, other))
    assert difference.norm() < 0.1 * step.norm()
    start = sd.concept_tokens("fish").cpu()
    start = start[torch.arange(3) % len(start)]
    assert (key - other_key).norm() < 0.1 * (key - start).norm()


def test_augment_restores_checkpointing(sd):
    unet = sd.pipe.unet
    modules = [m for m in unet.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [m._gradient_checkpointing_func for m in modules]
    with augment(unet):
        assert all(m._gradient_checkpointing_func not in before for m in modules)
    assert [m._gradient_checkpointing_func for m in modules] == before


def test_erasures_follow_one_another(sd, monkeypatch):
    monkeypatch.setattr(sd, "i2p", "prompts.csv")
    erasure = erase(
        sd, ["fish"], "esd-x", method_config("esd-x", steps=1, batch_size=2, lr=1e-3, **POOL), progress=False
    )
    later = sd.with_erasure(erasure)
    assert type(later) is type(sd) and type(later.pipe) is type(sd.pipe) and later.root is sd
    assert later.i2p == "prompts.csv" and not later.trajectories
    public = sample(sd.pipe, PROMPTS, SEEDS, erasure=erasure, **STEPS)
    assert torch.equal(sample(later.pipe, PROMPTS, SEEDS, **STEPS), public)


# -------------------------------------------------------------------------------------------------- sampling, conditioning


def test_images_are_those_of_diffusers(sd):
    """The same prompts, noise and steps through the pipeline itself, with a DDIM scheduler."""
    pipe = sd.pipe
    before, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        theirs = pipe(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="pt",
        ).images
    finally:
        pipe.scheduler = before
    ours = sample(pipe, PROMPTS, SEEDS, num_inference_steps=4, guidance_scale=5.0)
    assert (ours.int() - theirs.cpu().mul(255).round().int()).abs().max() <= 1


def test_tokens_and_added_conditions_are_apart(sd):
    """A comparison of prompts must not see the sizes, which are the same for every prompt, and large."""
    one, other = token_embeddings(sd.pipe, ["church", "a photo of a dog"]).flatten(1)
    assert torch.cosine_similarity(one, other, dim=0) < 0.999
    cond, width = encode(sd.pipe, PROMPTS), pooled_width(sd.pipe.unet)
    assert cond.tokens.shape[1] == 24 and (cond.added is None) == (width == 0)
    assert not width or cond.added.shape == (2, width + 6)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"'sample'.*v_prediction"):
        losses.loss_weight("eps", torch.ones(1), "sample")


# ----------------------------------------------------------------------------------------------------------------- attacks


def encoder_outputs(world, vectors):
    """Conditioning (1, ...) of a prompt with new tokens."""
    with add_tokens(world.pipe, vectors):
        return encode(world.pipe, [f"Image of {placeholder_tokens(2)}"])


def random_images(pipe) -> AttackImages:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return AttackImages(latents.to(pipe.device, pipe.unet.dtype), ["Image of fish"] * 2)


@pytest.mark.slow
def test_tokens_are_learned_in_half_precision(half):
    erasure = erase(half, ["fish"], "esd-x", method_config("esd-x", steps=1, batch_size=2, **POOL), progress=False)
    images, attack = random_images(half.pipe), Attack(budgets=(2,), m=2, batch_size=2)
    for search in (textual_inversion, hard_prompt_search):
        found = search(half, erasure, "fish", images, attack)
        assert torch.isfinite(found[2]).all() and torch.isfinite(encoder_outputs(half, found[2]).tokens).all()


@pytest.mark.slow
def test_attacks_on_any_stable_diffusion(sd):
    """Keys are as wide as cross-attention's text; new tokens as all encoders' embeddings, and removed afterwards."""
    erasure = erase(sd, ["fish"], "esd-x", method_config("esd-x", steps=1, batch_size=2, **POOL), progress=False)
    images, attack = random_images(sd.pipe), Attack(budgets=(2,), m=2, batch_size=2)
    assert optimize_key(sd, erasure, "fish", images, attack)[2].k.shape == (2, 32)
    plain, width = encode(sd.pipe, ["Image of fish"]).tokens, embedding_table(sd.pipe).shape[1]
    for search in (textual_inversion, hard_prompt_search):
        found = search(sd, erasure, "fish", images, attack)
        assert found[2].shape == (2, width)
        assert torch.equal(encode(sd.pipe, ["Image of fish"]).tokens, plain), "removed"
    # The gradient passes through every encoder, and all of the conditioning depends on the new tokens.
    found = textual_inversion(sd, erasure, "fish", images, attack)
    assert (found[2] != found[0]).any(0).all()
    one, other = encoder_outputs(sd, found[0]), encoder_outputs(sd, found[2])
    assert (one.tokens != other.tokens)[0, -3:].any(1).all()
    pooled = pooled_width(sd.pipe.unet)
    assert not pooled or (one.added != other.added)[0, :pooled].all()


@pytest.mark.parametrize("sd", ["XL"], indirect=True)
def test_pooled_text_with_new_tokens_is_taken_at_its_end(sd):
    with add_tokens(sd.pipe, embedding_table(sd.pipe)[:2] + 1):
        fish, church = encode(sd.pipe, [f"{placeholder_tokens(2)} a {name}" for name in ("fish", "church")]).added
    width = pooled_width(sd.pipe.unet)
    assert (fish[:width] != church[:width]).all()


def test_a_key_of_another_width_is_refused(sd):
    key = Prompt(torch.zeros(2, 31), torch.zeros(2, 31))
    with pytest.raises(ValueError, match="31 wide"):
        sample(sd.pipe, PROMPTS, SEEDS, key=key, num_inference_steps=1)


# ------------------------------------------------------------------------------------------------------ settings and groups


def test_learning_rates_and_steps_are_the_papers(sd):
    config = make_config(sd, "esd-x", 0, 50, {})
    assert (config.lr, config.steps, config.batch_size) == (pytest.approx(1e-5), 1000, 1)
    assert make_config(sd, "kpop", 0, 50, {"lr": 2e-4}).lr == 2e-4
    assert make_config(sd, "mace", 0, 50, {}).steps == METHODS["mace"].config.RATES["steps"]
    lrs = overrides(sd, "efficiency", "smoke", efficiency.PRESETS["smoke"]).lrs
    assert list(lrs.values()) == 3 * [(pytest.approx(1e-4),)], "a study's own are for the bundled world"
    assert overrides(sd, "objects", "quick", PRESETS["quick"]).sampling_steps == 50


def test_artists_may_be_given(sd, tmp_path, sentence):
    assert sd.prompt_pairs("Hokusai") == [("Image of Hokusai", "")]
    sd.pipe.save_pretrained(tmp_path, safe_serialization=True)
    world = load(str(tmp_path), styles=["Hokusai"])
    first = world.concepts("retained")[0]
    assert world.prompt_pairs("Hokusai")[0] == (f"Image of {first} in the style of Hokusai", f"Image of {first}")
    assert world.styles == ("Hokusai",) and world.version != sd.version
    assert erase(world, ["Hokusai"], "uce").delta
    with pytest.raises(ValueError, match="'Hokusai'") as error:
        load(str(tmp_path), styles="Hokusai")
    sentence(error)


def test_splits_are_five_of_ten_and_no_tuning_concept_is_reported(sd):
    ten = set(sd.concepts("classes"))
    assert len(ten) == 10
    for one, other in (("S1", "S2"), ("S3", "S4")):
        assert set(sd.concepts(one)) | set(sd.concepts(other)) == ten
    used = [*sd.concepts("retained"), *sd.concepts("tuning"), *sd.concepts("tuning kept")]
    assert len(set(used)) == 20 and not set(used) & ten.union(*sd.neighbours.values())
    assert set(sd.neighbours) == ten and ten.union(used, *sd.neighbours.values()) <= set(sd.concepts("all"))
