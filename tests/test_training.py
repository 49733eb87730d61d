"""Training on the toy world: what it changes, what it restores, and that it can stop and resume."""

import copy
import gc
import math
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from erasekit import losses, training
from erasekit.attention import augment
from erasekit.baselines import erase, method_config
from erasekit.conditioning import encode, predict_noise
from erasekit.evaluation.profiling import count_evaluations
from erasekit.kpop import KPOP, kpop
from erasekit.provenance import fingerprint
from erasekit.training import TRAIN_METHODS, TrainableWeights, Trainer
from erasekit.trajectories import TRAJECTORIES, make_pool

module = sys.modules[kpop.__module__]  # where kpop looks `optimizer_step` up; `erasekit.kpop` is the function
POOL = {"num_trajectories": 2, "trajectory_steps": 5}
SHORT = {"steps": 2, "batch_size": 2, "lr": 1e-3}


def train(toy, concepts=("church",), checkpoint=None, **changes):
    pool = {} if changes.get("latents") == "on_policy" else POOL
    return kpop(toy, concepts, KPOP(**SHORT | pool | {"m": 2} | changes), checkpoint=checkpoint, progress=False)


def state(erasure):
    """Every tensor of an erasure, by name."""
    return erasure.delta | {f"{half}.{c}": getattr(p, half) for c, p in erasure.keys.items() for half in "kv"}


def same(a, b):
    """Whether two sets of tensors are equal bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def default(toy):
    """The run that others are compared with."""
    return train(toy)


@pytest.fixture
def base(toy):
    """The base's tensors; checks after the test that they, their storage and their flags are as before."""
    unet = toy.pipe.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    storage = {name: (p.data_ptr(), p.requires_grad) for name, p in unet.named_parameters()}
    processors = unet.attn_processors
    yield before
    assert same(unet.state_dict(), before)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in unet.named_parameters()} == storage
    assert unet.attn_processors == processors


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C at the n-th update, with a checkpoint after every step; returns the list of updates done."""
    update = training.optimizer_step

    def arrange(at):
        done = []

        def stop(optimizer, loss, parameters):
            if len(done) == at - 1:
                raise KeyboardInterrupt
            done.append(optimizer)
            update(optimizer, loss, parameters)

        monkeypatch.setattr(training, "SAVE_EVERY", -1)
        monkeypatch.setattr(module, "optimizer_step", stop)
        return done

    return arrange


# ------------------------------------------------------------------------------------------------- what it does to the base


@pytest.mark.parametrize("train_method", TRAIN_METHODS)
def test_the_base_is_unchanged_and_only_the_selected_weights_are_trained(toy, base, train_method):
    delta = train(toy, train_method=train_method).delta
    assert set(delta) == {name for name in base if TRAIN_METHODS[train_method](name)}
    assert all(tensor.isfinite().all() for tensor in delta.values())
    changed = [name for name, tensor in delta.items() if not torch.equal(tensor, base[name])]
    assert len(changed) > 0.9 * len(delta)  # a bias before a normalisation has no gradient


def test_train_methods_select_as_esd_does():
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight",
        "up_blocks.1.resnets.0.conv1.weight",
        "time_embedding.linear_1.weight",
        "conv_out.weight",
    ]
    selected = {key: [n for n, name in enumerate(names) if wanted(name)] for key, wanted in TRAIN_METHODS.items()}
    assert selected == {"xattn": [0, 1, 2, 3], "xattn-kv": [1, 2], "noxattn": [4, 5]}


def test_the_base_is_restored_after_an_exception(toy, base, interrupt):
    hashed = fingerprint(toy.pipe.unet)
    interrupt(at=4)
    with pytest.raises(KeyboardInterrupt):
        train(toy)
    assert fingerprint(toy.pipe.unet) == hashed


def test_bf16_leaves_a_float32_delta_and_base(toy, default, base):
    world = copy.copy(toy)
    world.precision, world.trajectories = "bf16", {}
    delta = train(world).delta
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in delta.values())
    assert not same(delta, default.delta)


def test_there_is_one_unet_in_memory(toy, monkeypatch):
    def alive():
        return sum(type(o) is UNet2DConditionModel for o in gc.get_objects())

    unet, update = toy.pipe.unet, training.optimizer_step
    before, storage = alive(), {name: p.data_ptr() for name, p in unet.named_parameters()}
    counts, moved = [], set()

    def look(*arguments):
        counts.append(alive())
        moved.update(name for name, p in unet.named_parameters() if p.data_ptr() != storage[name])
        update(*arguments)

    monkeypatch.setattr(module, "optimizer_step", look)
    train(toy, train_method="xattn-kv")
    assert counts == [before] * 4
    assert moved == {name for name in storage if TRAIN_METHODS["xattn-kv"](name)}


def test_trainable_weights_share_the_rest_and_swap_back(unet):
    storage, trained = {name: p.data_ptr() for name, p in unet.named_parameters()}, TRAIN_METHODS["xattn"]
    weights = TrainableWeights(unet, "xattn")
    with weights.training():
        for p in weights.parameters.values():
            p.data += 1
        with pytest.raises(KeyboardInterrupt), weights.frozen():
            assert all(p.data_ptr() == storage[n] for n, p in unet.named_parameters())
            raise KeyboardInterrupt
        assert all((p.data_ptr() == storage[n]) != trained(n) for n, p in unet.named_parameters())
        assert all(p.requires_grad == trained(n) for n, p in unet.named_parameters())
        assert all(torch.equal(p.data, weights.theta[name] + 1) for name, p in weights.parameters.items())


# ----------------------------------------------------------------------------------------------------------- what it learns


def test_the_concept_moves_to_the_neutral_target_and_the_key_restores_it(toy, base):
    unet = toy.pipe.unet
    erasure = train(toy, steps=20, batch_size=4, m=4, lr=2e-3, num_trajectories=4, trajectory_steps=25)
    cond = encode(toy.pipe, [toy.prompt("church"), ""])
    pool = make_pool(toy, [(toy.prompt("church"), "")], seed=7, count=4, steps=25, guidance=3.0)
    z = pool.latents[0, :, [3, 10, 17, 24]].flatten(0, 1)
    t = pool.timesteps[[3, 10, 17, 24]].repeat(4)

    def predict(which, prompt=None):
        with torch.no_grad(), augment(unet, "all", prompt):
            return predict_noise(unet, z, t, cond[which : which + 1].expand(len(z)))

    eps_c, eps_null = predict(0), predict(1)
    y = losses.neutral_target(eps_c, eps_null, 1.0)
    with erasure.applied(toy):
        erased, recovered = predict(0), predict(0, erasure.key("church"))
    assert losses.removal(erased, y).mean() < 0.5 * losses.removal(eps_c, y).mean()
    assert losses.transfer(recovered, eps_c).mean() < 0.5 * losses.transfer(erased, eps_c).mean()


def test_two_concepts_have_two_keys(toy):
    keys = train(toy, ["church", "dog"]).keys
    assert list(keys) == ["church", "dog"]
    assert all(p.k.shape == p.v.shape == (2, 32) for p in keys.values())
    assert not torch.equal(keys["church"].k, keys["dog"].k)
    assert not torch.equal(keys["church"].k, keys["church"].v)


def test_transfer_steps_decide_how_far_the_prompt_moves(toy):
    start = toy.concept_tokens("church")[[0, 0]]
    none, one, two = (train(toy, steps=1, transfer_steps=n) for n in (0, 1, 2))
    assert torch.equal(none.key("church").k, start)
    assert set(none.info["history"][0]) == {"removal", "retain"}
    distance = [(erasure.key("church").k - start).norm() for erasure in (one, two)]
    assert distance[1] > 1.3 * distance[0]


def test_retaining_counts(toy, default):
    retained = train(toy, retain=("fish", ""))
    assert retained.info["history"][1]["retain"] > 0 == default.info["history"][1]["retain"]
    assert not same(retained.delta, default.delta)


@pytest.mark.parametrize(
    "change", [{"prompted_target": "neutral"}, {"loss_space": "x0"}, {"lam": 0.0}, {"eta": 3.0}, {"layers": "mid"}]
)
def test_settings_change_the_result(toy, default, change):
    assert not same(train(toy, **change).delta, default.delta)


def test_history_has_the_losses_of_every_step(toy):
    history = train(toy, steps=3).info["history"]
    assert [set(entry) for entry in history] == [{"transfer", "removal", "retain"}] * 3
    assert all(math.isfinite(value) and value >= 0 for entry in history for value in entry.values())


# ------------------------------------------------------------------------------------------------- determinism and resuming


def test_the_seed_decides_the_result(toy, default):
    assert same(state(train(toy)), state(default))
    assert not same(train(toy, seed=1).delta, default.delta)


def test_an_interrupted_run_resumes_to_the_same_result(toy, base, tmp_path, interrupt):
    concepts, path = ["church", "dog"], tmp_path / "run.safetensors"
    straight = train(toy, concepts, steps=4)
    done = interrupt(at=6)  # in the middle of the third step: its transfer is done, its removal is not
    with pytest.raises(KeyboardInterrupt):
        train(toy, concepts, checkpoint=path, steps=4)
    assert len(done) == 5
    assert path.stat().st_mode & 0o777 == 0o600, "a checkpoint holds prompts"
    done = interrupt(at=math.inf)
    resumed = train(toy, concepts, checkpoint=path, steps=4)
    assert len(done) == 4, "two steps were left"
    assert same(state(resumed), state(straight))
    assert resumed.info["history"] == straight.info["history"]


def test_a_finished_run_is_not_repeated_but_may_be_prolonged(toy, tmp_path, interrupt, sentence):
    path = tmp_path / "run.safetensors"
    finished = train(toy, checkpoint=path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "optimizer_step", None)
        assert same(state(train(toy, checkpoint=path)), state(finished))
    longer, straight = train(toy, checkpoint=path, steps=4), train(toy, steps=4)
    assert same(state(longer), state(straight))
    assert longer.info["history"] == straight.info["history"]
    with pytest.raises(ValueError, match=r"steps=2 is not possible: .* has taken 4 already") as error:
        train(toy, checkpoint=path)
    sentence(error)


@pytest.mark.parametrize("change", ["concepts", "lr", "base"])
def test_the_checkpoint_of_another_run_is_refused(toy, other_toy, base, tmp_path, change, sentence):
    path = tmp_path / "run.safetensors"
    train(toy, checkpoint=path)
    changes = {"concepts": {"concepts": ["dog"]}, "lr": {"lr": 1e-2}, "base": {}}[change]
    with pytest.raises(ValueError, match=r"run\.safetensors belongs to another run") as error:
        train(other_toy if change == "base" else toy, checkpoint=path, **changes)
    sentence(error)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_method": "q"}, "unknown train_method 'q': accepted are xattn, xattn-kv, noxattn"),
        ({"steps": 0}, "steps=0 is not possible: it is at least 1"),
        ({"transfer_steps": -1}, "transfer_steps=-1 is not possible: it is at least 0"),
        ({"num_trajectories": 3, "num_retain_trajectories": 4}, "num_retain_trajectories=4 is not possible"),
        (
            {"latents": "on_policy", "num_trajectories": 3},
            "num_trajectories=3 is not possible with latents='on_policy'",
        ),
        ({"schedule": "joint", "transfer_steps": 2}, "schedule='joint' .* transfer_steps=2"),
        ({"retain": "bear"}, r"retain='bear'.*give \['bear'\]"),
        ({"concepts": []}, "empty concept"),
        ({"concepts": ["church", "church"]}, "named twice"),
        ({"concepts": "church"}, "concepts='church' is one text"),
    ],
)
def test_impossible_settings_are_refused(toy, base, changes, message, sentence):
    with pytest.raises(ValueError, match=message) as error:
        train(toy, **changes)
    sentence(error)


# ------------------------------------------------------------------------------------------------ schedule, latents, counts


def test_the_joint_schedule_updates_as_each_stage_would(toy):
    """On one batch, which on-policy latents share between the stages: the prompt as transfer, the model as removal."""
    how = {"steps": 1, "latents": "on_policy", "retain": ("dog",)}
    joint = train(toy, schedule="joint", **how)
    alternating, removal = train(toy, **how), train(toy, transfer_steps=0, **how)
    assert torch.allclose(joint.key("church").k, alternating.key("church").k, atol=1e-5)
    assert not torch.equal(joint.key("church").k, removal.key("church").k)
    assert same(joint.delta, removal.delta)
    assert set(joint.info["history"][0]) == {"transfer", "removal", "retain"}


def test_the_joint_schedule_saves_one_prompted_pass(toy):
    def evaluations(**how):
        with count_evaluations(toy.pipe.unet) as count:
            train(toy, retain=("dog",), **how)
        return count.evaluations

    evaluations()  # fills the pool
    samples = SHORT["steps"] * SHORT["batch_size"]
    assert evaluations() == samples * 4  # prompted twice, without a prompt, retained
    assert evaluations(schedule="joint") == samples * 3


@pytest.mark.parametrize("method", ["esd-x", "kpop"])
def test_on_policy_latents_come_from_the_present_model_and_targets_from_the_frozen_one(toy, method, monkeypatch):
    toy.trajectories.clear()
    monkeypatch.setattr(training, "ON_POLICY_STEPS", 8)
    seen, distances = [], []
    on_policy = Trainer.on_policy

    def watch(trainer, index, generator):
        before = torch.Generator().set_state(generator.get_state())
        z, t, eps, eps_null = on_policy(trainer, index, generator)
        with trainer.weights.frozen():
            again = trainer.predict(z, t, trainer.cond[index])
            frozen, *_ = on_policy(trainer, index, before)
        distances.append((z - frozen).abs().max().item())
        seen.append((z, t, torch.allclose(again, eps, atol=1e-6), len(eps_null)))
        return z, t, eps, eps_null

    monkeypatch.setattr(Trainer, "on_policy", watch)
    how = {"latents": "on_policy", "steps": 3, "batch_size": 2, "lr": 1e-2}
    retained = erase(toy, ["church"], method, method_config(method, retain=("dog",), **how), progress=False)
    assert not toy.trajectories, "no pool"
    assert distances[0] == 0 < max(distances), "before the first step they are the same model"
    for z, t, from_frozen, nulls in seen:
        assert from_frozen and nulls == 2 and set(t.tolist()) <= set(range(1000))
        assert torch.equal(z[:2], z[2:]), "retained prompts share the latents"
    other = erase(toy, ["church"], method, method_config(method, **how), progress=False)
    assert not same(retained.delta, other.delta)


def test_a_pool_has_the_trajectories_and_steps_it_was_configured_with(toy):
    concepts, how = ["church", "dog"], {"num_trajectories": 4, "trajectory_steps": 3, "retain": ("dog",)}
    toy.trajectories.clear()
    with count_evaluations(toy.pipe.unet) as count:
        pool = Trainer(toy, concepts, method_config("esd-x", num_retain_trajectories=2, **how), "esd").pool
    assert count.evaluations == (4 * 2 + 2) * 2 * 3
    assert pool.latents.shape[:3] == (3, 4, 3) and len(pool.timesteps) == 3
    # The retained prompt's two trajectories are sampled as often as four would be, and are the first two of four.
    whole = Trainer(toy, concepts, method_config("esd-x", **how), "esd").pool
    assert torch.equal(pool.latents[:2], whole.latents[:2])
    assert torch.allclose(pool.eps[2], whole.eps[2, [0, 0, 1, 1]], atol=1e-5)
    assert training.TrainConfig().trajectories == TRAJECTORIES


@pytest.mark.parametrize("count, steps", [(TRAJECTORIES["count"], TRAJECTORIES["steps"]), (1, 5)])
def test_a_pool_costs_two_evaluations_a_step_and_training_one_a_sample(toy, count, steps):
    toy.trajectories.clear()
    how = {} if count > 1 else {"num_trajectories": count, "trajectory_steps": steps}
    with count_evaluations(toy.pipe.unet) as found:
        erase(toy, ["church"], "esd-x", method_config("esd-x", steps=5, batch_size=2, **how), progress=False)
    assert (found.evaluations, found.with_gradient) == (2 * count * steps + 5 * 2, 5 * 2)


def test_on_policy_latents_cost_a_trajectory_a_sample(toy, monkeypatch):
    monkeypatch.setattr(training, "ON_POLICY_STEPS", 8)
    with count_evaluations(toy.pipe.unet) as found:
        config = method_config("esd-x", steps=5, batch_size=2, latents="on_policy")
        erase(toy, ["church"], "esd-x", config, progress=False)
    assert 5 * 2 * 3 <= found.evaluations <= 5 * 2 * (3 + 2 * 7)
