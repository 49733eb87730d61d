"""The loop, on the toy world: what it changes, what it leaves alone, and that it can stop and go on."""

import gc
import math
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from erasekit import losses, training
from erasekit.artifacts import fingerprint
from erasekit.attention import augment
from erasekit.baselines import erase, settings
from erasekit.counting import counted
from erasekit.kpop import KPOP, kpop
from erasekit.sampling import sample
from erasekit.text import encode
from erasekit.training import GROUPS, Student
from erasekit.trajectories import roll

module = sys.modules[kpop.__module__]  # where the loop's steps look `update` up
FEW = {"steps": 2, "batch": 2, "m": 2, "lr": 1e-3}


def hide(toy, concepts=("church",), checkpoint=None, **settings):
    return kpop(toy, concepts, KPOP(**FEW | settings), checkpoint=checkpoint, progress=False)


def state(erasure):
    """Every tensor of an erasure, by name."""
    keys = {f"{half}.{c}": getattr(p, half) for c, p in erasure.keys.items() for half in "kv"}
    return erasure.delta | keys


def same(a, b):
    """Whether two sets of tensors are equal bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(toy):
    """The run that others are compared with."""
    return hide(toy)


@pytest.fixture
def base(toy):
    """The base's tensors; checks after the test that they, their storage and their flags are as they were."""
    unet = toy.pipe.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    places = {name: p.data_ptr() for name, p in unet.named_parameters()}
    wanted = {name: p.requires_grad for name, p in unet.named_parameters()}
    processors = unet.attn_processors
    yield before
    assert same(unet.state_dict(), before)
    assert {name: p.data_ptr() for name, p in unet.named_parameters()} == places
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == wanted
    assert unet.attn_processors == processors


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at the n-th update, with a checkpoint after every step; returns the list of updates done."""
    update, done = training.update, []

    def arrange(at):
        def stop(adam, loss, parameters):
            if len(done) == at - 1:
                raise KeyboardInterrupt
            done.append(adam)
            update(adam, loss, parameters)

        monkeypatch.setattr(training, "SAVE_EVERY", -1)
        monkeypatch.setattr(module, "update", stop)
        return done

    return arrange


# -------------------------------------------------------------------------------------------------- what it does to the base


@pytest.mark.parametrize("group", GROUPS)
def test_the_base_is_unchanged_and_only_the_group_is_trained(toy, base, group):
    delta = hide(toy, group=group).delta
    assert set(delta) == {name for name, _ in toy.pipe.unet.named_parameters() if GROUPS[group](name)}
    assert all(tensor.isfinite().all() for tensor in delta.values())
    moved = [name for name, tensor in delta.items() if not torch.equal(tensor, base[name])]
    assert len(moved) > 0.9 * len(delta)  # a bias before a normalisation has no gradient


def test_groups_are_the_paper_s():
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
    chosen = {group: [n for n, name in enumerate(names) if wanted(name)] for group, wanted in GROUPS.items()}
    assert chosen == {"x": [0, 1, 2, 3], "kv": [1, 2], "u": [4, 5]}


def test_the_base_is_unchanged_after_an_exception_in_the_middle(toy, base, interrupted):
    hashed = fingerprint(toy.pipe.unet)
    interrupted(at=4)
    with pytest.raises(KeyboardInterrupt):
        hide(toy)
    assert fingerprint(toy.pipe.unet) == hashed


def test_bf16_leaves_a_float32_delta_and_base(toy, plain, base):
    toy_bf16 = type(toy)("toy", toy.pipe, toy.groups, toy.styles, "bf16")
    delta = kpop(toy_bf16, ["church"], KPOP(**FEW), progress=False).delta
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in delta.values())
    assert not same(delta, plain.delta), "bf16 was in force"


def test_there_is_one_unet_in_memory(toy, monkeypatch):
    def alive():
        return sum(type(o) is UNet2DConditionModel for o in gc.get_objects())

    unet, update = toy.pipe.unet, training.update
    before, places = alive(), {name: p.data_ptr() for name, p in unet.named_parameters()}
    counts, moved = [], set()

    def look(*arguments):
        counts.append(alive())
        moved.update(name for name, p in unet.named_parameters() if p.data_ptr() != places[name])
        update(*arguments)

    monkeypatch.setattr(module, "update", look)
    hide(toy, group="kv")
    assert counts == [before] * 4
    assert moved == {name for name in places if GROUPS["kv"](name)}


def test_student_and_frozen_model_share_what_is_not_trained(unet):
    places = {name: p.data_ptr() for name, p in unet.named_parameters()}
    student = Student(unet, "x")
    with student.training():
        assert all((p.data_ptr() == places[n]) != GROUPS["x"](n) for n, p in unet.named_parameters())
        assert all(p.requires_grad == GROUPS["x"](n) for n, p in unet.named_parameters())
        with student.frozen():
            assert all(p.data_ptr() == places[n] for n, p in unet.named_parameters())
        assert all((p.data_ptr() == places[n]) != GROUPS["x"](n) for n, p in unet.named_parameters())


def test_frozen_gives_the_student_back_after_an_exception(unet):
    student = Student(unet, "x")
    with student.training():
        for p in student.parameters.values():
            p.data += 1
        with pytest.raises(KeyboardInterrupt), student.frozen():
            raise KeyboardInterrupt
        assert all(torch.equal(p.data, student.theta[name] + 1) for name, p in student.parameters.items())


# ----------------------------------------------------------------------------------------------------------- what it learns


def test_the_concept_moves_to_the_neutral_target_and_the_key_brings_it_back(toy, base):
    unet = toy.pipe.unet
    erasure = hide(toy, steps=40, batch=4, m=4)
    texts = encode(toy.pipe, [toy.prompt("church"), ""])
    pool = roll(toy, [(toy.prompt("church"), "")], seed=7, seeds=4, steps=25, guidance=3.0)
    z = pool.latents[0, :, [3, 10, 17, 24]].flatten(0, 1)
    t = pool.timesteps[[3, 10, 17, 24]].repeat(4)

    def predict(text, prompt=None):
        with torch.no_grad(), augment(unet, "all", prompt):
            return unet(z, t, text.expand(len(z), -1, -1)).sample

    eps_c, eps_null = predict(texts[:1]), predict(texts[1:])
    y = losses.neutral_target(eps_c, eps_null, 1.0)
    with erasure.applied(unet):
        hidden, recovered = predict(texts[:1]), predict(texts[:1], erasure.key("church"))
    assert losses.removal(hidden, y).mean() < 0.5 * losses.removal(eps_c, y).mean()
    assert losses.transfer(recovered, eps_c).mean() < 0.5 * losses.transfer(hidden, eps_c).mean()


def test_two_concepts_make_two_keys(toy):
    keys = hide(toy, ["church", "dog"]).keys
    assert list(keys) == ["church", "dog"]
    assert all(p.k.shape == p.v.shape == (2, 32) for p in keys.values())
    assert not torch.equal(keys["church"].k, keys["dog"].k)
    assert not torch.equal(keys["church"].k, keys["church"].v)


def test_without_transfer_the_prompt_stays_what_it_was(toy):
    erasure = hide(toy, transfer_steps=0)
    start = toy.concept_tokens("church")
    assert torch.equal(erasure.key("church").k, start[[0, 0]])
    assert set(erasure.info["history"][0]) == {"removal", "retain"}


def test_two_transfer_steps_move_the_prompt_further(toy):
    one, two = (hide(toy, steps=1, transfer_steps=n).key("church").k for n in (1, 2))
    start = toy.concept_tokens("church")[[0, 0]]
    assert (two - start).norm() > 1.3 * (one - start).norm()


@pytest.mark.parametrize("method", ["kpop", "uce"])
def test_one_text_to_retain_is_refused(method, sentence):
    with pytest.raises(ValueError, match=r"retain='bear'.*give \['bear'\]") as error:
        settings(method, retain="bear")
    sentence(error)


def test_retaining_counts(toy, plain):
    kept = hide(toy, retain=("fish", ""))
    assert kept.info["history"][1]["retain"] > 0 == plain.info["history"][1]["retain"]
    assert not same(kept.delta, plain.delta)


@pytest.mark.parametrize(
    "change", [{"reading": "adversarial"}, {"error": "x0"}, {"lam": 0.0}, {"eta": 3.0}, {"place": "mid"}]
)
def test_settings_change_the_result(toy, plain, change):
    assert not same(hide(toy, **change).delta, plain.delta)


def test_history_has_the_losses_of_every_step(toy):
    history = hide(toy, steps=3).info["history"]
    assert [set(entry) for entry in history] == [{"transfer", "removal", "retain"}] * 3
    assert all(math.isfinite(value) and value >= 0 for entry in history for value in entry.values())


# ------------------------------------------------------------------------------------------------------------- repeating it


def test_same_seed_same_result(toy, plain):
    assert same(state(hide(toy)), state(plain))


def test_other_seed_other_result(toy, plain):
    assert not same(hide(toy, seed=1).delta, plain.delta)


def test_a_run_that_was_killed_goes_on_to_the_same_result(toy, base, tmp_path, interrupted):
    concepts, path = toy.concepts("pair"), tmp_path / "run.safetensors"
    straight = hide(toy, concepts, steps=4)
    done = interrupted(at=6)  # in the middle of the third step: its transfer is done, its removal is not
    with pytest.raises(KeyboardInterrupt):
        hide(toy, concepts, checkpoint=path, steps=4)
    assert len(done) == 5
    done = interrupted(at=math.inf)
    resumed = hide(toy, concepts, checkpoint=path, steps=4)
    assert len(done) == 9, "two steps were left"
    assert same(state(resumed), state(straight))
    assert resumed.info["history"] == straight.info["history"]


def test_a_finished_run_is_not_repeated(toy, tmp_path, interrupted):
    path = tmp_path / "run.safetensors"
    finished = hide(toy, checkpoint=path)
    interrupted(at=1)
    assert same(state(hide(toy, checkpoint=path)), state(finished))


def test_a_training_goes_on_beyond_its_length(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path)
    longer = hide(toy, checkpoint=path, steps=4)
    straight = hide(toy, steps=4)
    assert same(state(longer), state(straight))
    assert longer.info["history"] == straight.info["history"]


def test_a_training_cannot_be_shortened(toy, tmp_path, sentence):
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path, steps=3)
    with pytest.raises(ValueError, match=r"steps=2 is not possible: .* has taken 3 already") as error:
        hide(toy, checkpoint=path)
    sentence(error)


def test_a_checkpoint_holds_prompts_and_is_private(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", [{"concepts": ["dog"]}, {"lr": 1e-2}])
def test_the_checkpoint_of_another_run_is_refused(toy, base, tmp_path, change, sentence):
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path)
    with pytest.raises(ValueError, match=r"run\.safetensors belongs to another run") as error:
        hide(toy, checkpoint=path, **change)
    sentence(error)


def test_the_checkpoint_of_another_base_is_refused(toy, other_toy, tmp_path):
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        hide(other_toy, checkpoint=path)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "setting, accepted",
    [
        ({"reading": "v4"}, "unknown reading 'v4': accepted are recoverable, adversarial"),
        ({"group": "q"}, "unknown group 'q': accepted are x, kv, u"),
        ({"place": "head"}, r"unknown place 'head': accepted are mid, mid\+up, all"),
        ({"error": "v"}, "unknown error 'v': accepted are eps, x0"),
        ({"steps": 0}, "steps=0 is not possible: it is at least 1"),
        ({"batch": 0}, "batch=0 is not possible: it is at least 1"),
        ({"transfer_steps": -1}, "transfer_steps=-1 is not possible: it is at least 0"),
        ({"rolled": 0}, "rolled=0 is not possible: it is at least 1"),
        ({"roll_steps": 0}, "roll_steps=0 is not possible: it is at least 1"),
        ({"rolled": 3, "rolled_retained": 4}, "rolled_retained=4 is not possible: it is at most 3, as is rolled"),
        ({"stages": "both"}, "unknown stages 'both': accepted are alternating, joint"),
        ({"stages": "joint", "reading": "adversarial"}, "stages='joint' is not possible with reading='adversarial'"),
        ({"stages": "joint", "transfer_steps": 2}, "stages='joint' .* transfer_steps=2"),
        ({"stages": "joint", "lam": 0.0}, "stages='joint' .* lam=0.0"),
        ({"m": 0}, "m=0 is not possible"),
        ({"m": True}, "m=True is not possible"),
    ],
)
def test_an_impossible_setting_is_refused(toy, base, setting, accepted, sentence):
    with pytest.raises(ValueError, match=accepted) as error:
        hide(toy, **setting)
    sentence(error)


@pytest.mark.parametrize("concepts", [[], [""], ["church", "  "]])
def test_an_empty_concept_is_refused(toy, base, concepts, sentence):
    with pytest.raises(ValueError, match="empty concept") as error:
        hide(toy, concepts)
    sentence(error)


def test_a_concept_named_twice_is_refused(toy, base, sentence):
    with pytest.raises(ValueError, match="named twice") as error:
        hide(toy, ["church", "church"])
    sentence(error)


# ------------------------------------------------------------------------------------------------- stages, recipe, counts


def test_joint_stages_move_each_player_as_its_own_stage_would(toy):
    """On one batch (the recipe "paper" has one for both stages): the prompt as transfer moves it, the model as removal does."""
    how = {"steps": 1, "recipe": "paper", "retain": ("dog",)}
    joint = hide(toy, stages="joint", **how)
    alternating, removal = hide(toy, **how), hide(toy, transfer_steps=0, **how)
    assert torch.allclose(joint.key("church").k, alternating.key("church").k, atol=1e-5)
    assert not torch.equal(joint.key("church").k, removal.key("church").k)
    assert all(torch.equal(joint.delta[name], removal.delta[name]) for name in joint.delta)
    assert set(joint.info["history"][0]) == {"transfer", "removal", "retain"}


def test_joint_stages_save_a_pass_of_the_prompted_model(toy):
    def evaluations(**how):
        with counted(toy.pipe.unet) as count:
            hide(toy, retain=("dog",), **how)
        return count.evaluations

    hide(toy, retain=("dog",))  # the pool is rolled
    steps, batch = FEW["steps"], FEW["batch"]
    assert evaluations() == steps * batch * 4  # prompted twice, plain, retained
    assert evaluations(stages="joint") == steps * batch * 3


@pytest.mark.parametrize("method", ["esd-x", "kpop"])
def test_the_published_recipe_rolls_the_model_as_it_is_now(toy, method, monkeypatch):
    """A trajectory for every step, one latent of it; the frozen model answers at that latent, for what is retained too."""
    toy.trajectories.clear()
    seen, moved = [], []
    draw = training.Bench.rolled

    def rolled(bench, index, generator):
        before = torch.Generator().set_state(generator.get_state())
        z, t, eps, null = draw(bench, index, generator)
        with bench.student.frozen():
            again = bench.predict(z, t, bench.embeddings[index])
            frozen, *_ = draw(bench, index, before)
        moved.append((z - frozen).abs().max().item())
        seen.append((z, t, torch.allclose(again, eps, atol=1e-6), len(null)))
        return z, t, eps, null

    monkeypatch.setattr(training.Bench, "rolled", rolled)
    config = settings(method, recipe="paper", steps=3, batch=2, retain=("dog",), lr=1e-2)
    made = erase(toy, ["church"], method, config, progress=False)
    assert made.delta and not toy.trajectories, "no pool"
    assert moved[0] == 0 < max(moved), "before the first step they are the same model"
    for z, t, right, nulls in seen:
        assert right and nulls == 2 and set(t.tolist()) <= set(range(1000))
        assert len(z) == 2 or torch.equal(z[:2], z[2:])
    other = erase(toy, ["church"], method, settings(method, recipe="paper", steps=3, batch=2, lr=1e-2), progress=False)
    assert not all(torch.equal(made.delta[n], other.delta[n]) for n in made.delta)


def test_an_unknown_recipe_is_refused(sentence):
    with pytest.raises(ValueError, match="recipe 'fast'") as error:
        settings("esd-x", recipe="fast")
    assert "paper" in sentence(error)


@pytest.mark.parametrize("roller", ["frozen", "current"])
def test_the_pool_is_renewed_by_the_roller_and_the_frozen_model_is_asked(toy, roller, monkeypatch, tmp_path):
    """Every second step each erased text's oldest trajectory gives way to a new one; a killed run goes on with the same pool."""
    pools, renew = [], training.Bench.renew

    def watched(bench, n):
        before = bench.pool.latents.clone()
        renew(bench, n)
        z, t, pool = bench.pool.latents, bench.pool.timesteps, bench.pool
        changed = [(i, s) for i in range(len(z)) for s in range(z.shape[1]) if not torch.equal(z[i, s], before[i, s])]
        with torch.no_grad(), bench.student.frozen():
            said = [
                [bench.said_along(z[i, s], t, text) for text in (bench.texts[i], bench.bases[i])] for i, s in changed
            ]
        assert all(torch.allclose(eps, pool.eps[at], atol=1e-5) for at, (eps, _) in zip(changed, said))
        assert all(torch.allclose(null, pool.null[at], atol=1e-5) for at, (_, null) in zip(changed, said))
        pools.append((n, changed, z.clone()))

    monkeypatch.setattr(training.Bench, "renew", watched)
    how = {"steps": 5, "rolled": 2, "refresh": 2, "roller": roller, "retain": ("dog",), "lr": 1e-2}
    straight = hide(toy, **how)
    assert [(n, changed) for n, changed, _ in pools] == [(2, [(0, 0)]), (4, [(0, 1)])], "of what is erased, the oldest"
    path = tmp_path / "run.safetensors"
    hide(toy, checkpoint=path, **how | {"steps": 3})
    longer = hide(toy, checkpoint=path, **how)
    assert same(state(longer), state(straight)) and torch.equal(pools[-1][2], pools[1][2])
    # Only the current model's trajectories depend on how far the training is.
    hide(toy, **how | {"lr": 0.0})
    assert torch.equal(pools[-1][2], pools[1][2]) == (roller == "frozen")


def test_a_pool_has_the_trajectories_and_latents_asked_for(toy):
    concepts, how = toy.concepts("pair"), {"rolled": 4, "roll_steps": 3, "retain": ("dog",)}
    erased, kept = len(concepts), settings("esd-x", rolled_retained=2, **how)
    toy.trajectories.clear()
    with counted(toy.pipe.unet) as count:
        pool = training.Bench(toy, concepts, kept, "esd").pool
    assert count.evaluations == (4 * erased + 2) * 2 * 3
    assert pool.latents.shape[:3] == (erased + 1, 4, 3) and len(pool.timesteps) == 3
    # The retained text's two trajectories are met as often as four would be, and are the first two of four.
    whole = training.Bench(toy, concepts, settings("esd-x", **how), "esd").pool
    assert torch.equal(pool.latents[:erased], whole.latents[:erased])
    assert torch.allclose(pool.eps[erased], whole.eps[erased, [0, 0, 1, 1]], atol=1e-5)
    assert training.Training().roll == training.ROLL


def test_what_is_retained_is_asked_at_the_erased_texts_latents(toy):
    """That costs no trajectories, and one answer of the frozen model for each sample."""
    concepts, n = toy.concepts("pair"), 3
    how = {"steps": 2, "batch": n, "rolled": 2, "retain": ("dog", "fish"), "lr": 1e-2}
    toy.trajectories.clear()
    with counted(toy.pipe.unet) as count:
        made = erase(toy, concepts, "esd-x", settings("esd-x", retained_at="erased", **how), progress=False)
    assert count.evaluations == 2 * len(concepts) * 2 * training.ROLL["steps"] + 2 * 3 * n
    assert made.delta and len(toy.trajectories) == len(concepts)

    bench = training.Bench(toy, concepts, settings("esd-x", retained_at="erased", **how), "esd")
    with training.Student(bench.unet, "x").training() as student:
        bench.student = student
        for p in student.parameters.values():
            p.data += 0.1
        b = bench.draw("removal", 0)
        assert torch.equal(b.z[:n], b.z[n:]) and torch.equal(b.t[:n], b.t[n:])
        assert (b.index[:n] < bench.erased).all() and (b.index[n:] >= bench.erased).all() and len(b.null) == n
        with student.frozen():
            assert torch.allclose(bench.predict(b.z, b.t, b.text), b.eps, atol=1e-4)


def test_settings_that_say_nothing_of_this_pool_are_refused(sentence):
    for how in ({"refresh": 0}, {"refresh": 5, "recipe": "paper"}):
        with pytest.raises(ValueError, match="refresh=") as error:
            settings("esd-x", **how)
        sentence(error)
    with pytest.raises(ValueError, match="without refresh") as error:
        settings("esd-x", roller="current")
    sentence(error)
    for how in ({"roll_steps": 4, "recipe": "paper"}, {"rolled_retained": 2, "retained_at": "erased"}):
        (name, value), (other, _) = how.items()
        with pytest.raises(ValueError, match=f"{name}={value} is not possible with {other}=") as error:
            settings("kpop", **how)
        sentence(error)
    for name in ("roller", "retained_at"):
        with pytest.raises(ValueError, match=f"{name} 'old'") as error:
            settings("esd-x", **{name: "old"})
        sentence(error)


def test_evaluations_are_counted_as_samples(toy):
    with counted(toy.pipe.unet) as count:
        sample(toy.pipe, ["a church", "a dog", "a fish"], [0, 1, 2], steps=4, batch_size=2)
    assert (count.evaluations, count.calls, count.with_gradient) == (3 * 4 * 2, 2 * 4 * 2, 0)
    sample(toy.pipe, ["a church"], [0], steps=1)
    assert count.calls == 16
    cost = training.ROLL
    toy.trajectories.clear()
    with counted(toy.pipe.unet) as pool:
        erase(toy, ["church"], "esd-x", settings("esd-x", steps=5, batch=2), progress=False)
    assert (pool.evaluations, pool.with_gradient) == (2 * cost["seeds"] * cost["steps"] + 5 * 2, 5 * 2)
    toy.trajectories.clear()
    with counted(toy.pipe.unet) as small:
        erase(toy, ["church"], "esd-x", settings("esd-x", steps=5, batch=2, rolled=1), progress=False)
    assert small.evaluations == 2 * cost["steps"] + 5 * 2
    with counted(toy.pipe.unet) as paper:
        erase(toy, ["church"], "esd-x", settings("esd-x", steps=5, batch=2, recipe="paper"), progress=False)
    assert 5 * 2 * 3 <= paper.evaluations <= 5 * 2 * (3 + 2 * 49)
