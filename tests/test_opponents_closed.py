"""SPEED, OCE, AdaVD and diverse prompts: identities, and closed forms against independent derivations."""

import copy

import pytest
import torch

from erasekit.baselines import METHODS, erase, method_config
from erasekit.baselines.adavd import ValueDecomposer
from erasekit.baselines.masks import concept_positions
from erasekit.baselines.oce import nearest_rotation, span
from erasekit.baselines.speed import SPEED, constrained_edit, fixed_vectors, null_space, retained_last_words
from erasekit.baselines.uce import concept_vectors, edit_vectors, value_weights
from erasekit.checkpoints import seeded
from erasekit.conditioning import token_embeddings, token_ids
from erasekit.pipelines import files
from erasekit.training import TrainConfig, Trainer
from erasekit.world import CONTEXTS


@pytest.fixture(scope="module")
def small(toy):
    """The toy world with retained objects and a style."""
    world = copy.copy(toy)
    world.retained, world.styles, world.trajectories = ("fish", "dog"), ("noto",), {}
    return world


def erased(world, method, concepts=("church",), **changes):
    return erase(world, list(concepts), method, method_config(method, **changes), progress=False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def towards_itself(monkeypatch, world):
    """Concepts are replaced by themselves."""
    monkeypatch.setattr(type(world), "paraphrases", lambda self, c: [(self.format_prompt("a {}", c),) * 2])


def base_of(world, erasure):
    return {name: p for name, p in world.pipe.unet.named_parameters() if name in erasure.delta}


# ------------------------------------------------------------------------------------------------------------------- SPEED


@pytest.mark.parametrize("retain", [(), ("",), ("fish", "")])
def test_speed_changes_values_alone_and_keeps_the_start_token_and_the_centres_of_the_empty_prompt(small, retain):
    erasure, K = erased(small, "speed", retain=retain), fixed_vectors(small.pipe)
    C, _ = edit_vectors(small, ["church"], "last")
    for name, W in value_weights(small.pipe.unet).items():
        new = erasure.delta[name].double()
        assert ((new - W) @ K.T).norm() < 1e-6 * (W @ K.T).norm()
        assert ((new - W) @ C.T).norm() > 0.1 * (W @ C.T).norm()
    assert set(erasure.delta) == set(value_weights(small.pipe.unet))


def test_speed_towards_the_concept_itself_changes_nothing(small, monkeypatch):
    towards_itself(monkeypatch, small)
    erasure = erased(small, "speed", retain=("fish", ""))
    for name, W in base_of(small, erasure).items():
        assert torch.equal(erasure.delta[name], W)


@pytest.mark.parametrize("method", ["speed", "oce", "adavd"])
def test_several_concepts_and_styles_are_erased_at_once(small, method):
    erasure = erased(small, method, ("church", "noto"))
    assert erasure.moved(small) > 0


def test_speed_keeps_what_is_retained_up_to_its_threshold(small):
    """One retained vector, which the filter cannot leave out; without it, its image moves."""
    world = copy.copy(small)
    world.train_templates = ("a {}",)
    R, moved = retained_last_words(world, ("fish",)), {}
    for retain in ((), ("fish",)):
        delta = erased(world, "speed", retain=retain, threshold=1e-6).delta
        edits = [delta[name].double() - W for name, W in value_weights(world.pipe.unet).items()]
        moved[retain] = max((R @ X.T).norm().item() for X in edits)
    assert moved["fish",] < 1e-2 * moved[()]


def test_speed_minimises_its_objective_as_a_linear_solver_does():
    """Independently: X = Z N^T for an orthonormal basis N of what P allows and K does not use, and Z by the normal equations."""
    W, C, target, K, s = random(4, 6), random(2, 6, seed=1), random(2, 6, seed=2), random(2, 6, seed=3), 0.7
    allowed = torch.linalg.qr(random(6, 5, seed=4)).Q
    P = allowed @ allowed.T
    found = constrained_edit(W, C.T @ C, target.T @ C, P, K, s)
    inside = allowed @ torch.linalg.svd(K @ allowed, full_matrices=True).Vh[2:].T
    wanted, seen = (target - C) @ W.T, C @ inside
    Z = torch.linalg.solve(seen.T @ seen + s * torch.eye(3, dtype=W.dtype), seen.T @ wanted).T
    assert torch.allclose(found, Z @ inside.T, atol=1e-10)
    assert torch.allclose(found @ K.T, torch.zeros(4, 2, dtype=W.dtype), atol=1e-10)


def test_speed_s_null_space_filters_and_augments_by_hand():
    """Two retained vectors, of which a plain edit moves one: the other, and every copy of it, is free to change."""
    C, target = torch.tensor([[0, 0, 2.0]]).double(), torch.zeros(1, 3).double()
    W = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))  # passes the second direction on least
    R = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    P = null_space(W, R, C.T @ C, target.T @ C, SPEED(augmentations=50), seeded("test"))
    assert torch.allclose(P, torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)), atol=1e-9)
    P = null_space(W, R[:0], C.T @ C, target.T @ C, SPEED(), seeded("test"))
    assert torch.allclose(P, torch.eye(3, dtype=torch.float64), atol=1e-12), "nothing is retained"


def test_impossible_settings_of_speed_are_refused(refused):
    refused(ValueError, "s=0 is not possible: it is above 0", lambda: method_config("speed", s=0))
    refused(ValueError, "retain='fish' is one text", lambda: method_config("speed", retain="fish"))
    refused(ValueError, "augmentations=0 is not possible", lambda: method_config("speed", augmentations=0))


# --------------------------------------------------------------------------------------------------------------------- OCE


def test_oce_rotates_the_values_so_that_lengths_and_angles_stay(small):
    erasure, (C, _) = (
        erased(small, "oce", ("church", "noto"), retain=("fish", "")),
        edit_vectors(small, ["church"], "last"),
    )
    for name, W in value_weights(small.pipe.unet).items():
        new = erasure.delta[name].double()
        assert torch.allclose(new.T @ new, W.T @ W, atol=1e-5)
        assert ((new - W) @ C.T).norm() > 0.01 * (W @ C.T).norm()
    assert set(erasure.delta) == set(value_weights(small.pipe.unet))


@pytest.mark.parametrize("changes", [{"erase_weight": 0.0}, {"erase_weight": 0.0, "retain": ("fish", "")}])
def test_oce_without_an_erasing_term_changes_nothing(small, changes):
    """M is then positive semidefinite, and its nearest rotation the identity on its range, where all values are."""
    erasure = erased(small, "oce", **changes)
    for name, W in base_of(small, erasure).items():
        assert torch.allclose(erasure.delta[name], W, atol=1e-6)


def test_oce_towards_the_concept_itself_changes_nothing(small, monkeypatch):
    """G (I - G*) = 0 for G* = G."""
    monkeypatch.setattr(type(small), "prompt_pairs", lambda self, c: [(self.prompt(c),) * 2])
    erasure = erased(small, "oce", erase_weight=100.0)
    for name, W in base_of(small, erasure).items():
        assert torch.allclose(erasure.delta[name], W, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_rotation_near_oce_s_or_at_random_serves_its_objective_better(seed):
    """Against rotations from the matrix exponential and from random orthogonal matrices, of matrices of either sign."""
    M = random(5, 5, seed=seed)
    R, identity = nearest_rotation(M), torch.eye(5, dtype=M.dtype)
    assert torch.allclose(R.T @ R, identity, atol=1e-12) and torch.linalg.det(R) == pytest.approx(1.0)
    for n in range(50):
        A = random(5, 5, seed=100 + n)
        Q = torch.linalg.qr(A).Q
        Q[:, 0] *= torch.linalg.det(Q).sign()
        for other in (Q, R @ torch.linalg.matrix_exp(0.1 * (A - A.T))):
            assert torch.linalg.det(other) == pytest.approx(1.0)
            assert (other * M).sum() <= (R * M).sum() + 1e-9


def test_a_span_has_no_direction_that_is_only_rounding():
    a, b = random(2, 6)
    both = span(torch.stack([a, 3 * a, b]))
    assert torch.allclose(both @ a, a) and torch.allclose(both @ b, b) and both.trace().item() == pytest.approx(2)


# ------------------------------------------------------------------------------------------------------------------- AdaVD


def decomposer(concepts, steepness=100.0, centre=0.93, height=2.0):
    """The adapter of one layer "v" for concepts' values (n, d)."""
    unit = torch.nn.functional.normalize(concepts, dim=1)
    parts = unit, torch.linalg.pinv(unit), height * unit, torch.tensor([steepness, centre])
    return ValueDecomposer({f"v.{n}": t for n, t in zip(("directions", "dual", "removed", "gate"), parts)})


def after(adapter, *tokens):
    """What values become behind a start token."""
    values = torch.stack([torch.ones_like(tokens[0]), *tokens])[None].float()
    return (values + adapter.change("v", None, values))[0, 1:]


def test_adavd_removes_the_concept_s_own_value_by_the_height_and_leaves_orthogonal_ones():
    concept, other = random(2, 8)
    orthogonal = other - (other @ concept) / (concept @ concept) * concept
    own, left = after(decomposer(concept[None]), 3 * concept, orthogonal)
    share = 2 / (1 + torch.tensor(-100 * 0.07).exp())
    assert torch.allclose(own, (1 - share) * 3 * concept.float(), atol=1e-5)
    assert torch.allclose(left, orthogonal.float(), atol=1e-6)
    between = 0.93 * concept / concept.norm() + (1 - 0.93**2) ** 0.5 * orthogonal / orthogonal.norm()
    (half,) = after(decomposer(concept[None]), between)
    assert half @ concept.float() == pytest.approx(0.0, abs=1e-3), "at the centre, half of the height 2 is removed"


def test_adavd_of_several_concepts_is_gram_and_schmidt_s_in_any_order():
    """With the gate open, values lose their part in the span; gated, as by orthogonalised concepts, taken one by one."""
    T, v = random(3, 8), random(8, seed=1)
    (found,) = after(decomposer(T, steepness=0.0, height=2.0), v)
    basis = torch.linalg.qr(T.T).Q
    assert torch.allclose(found.double(), v - basis @ (basis.T @ v), atol=1e-5), "a flat sigmoid is half of its height"

    orthogonal, mixing = [], torch.eye(3, dtype=T.dtype)  # orthogonal = mixing T
    for n, t in enumerate(T):
        for m, b in enumerate(orthogonal):
            mixing[n] -= (t @ b) / (b @ b) * mixing[m]
        orthogonal.append(mixing[n] @ T)
    sigma = 2 / (1 + (-5 * (torch.nn.functional.cosine_similarity(T, v[None]) - 0.1)).exp())
    expected = v - sum((v @ b) / (b @ b) * (row * sigma) @ T for b, row in zip(orthogonal, mixing))
    for order in ([0, 1, 2], [2, 0, 1]):
        (found,) = after(decomposer(T[order], steepness=5.0, centre=0.1), v)
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_adavd_acts_on_values_alone_and_not_on_the_start_token(small, unet):
    erasure, text = erased(small, "adavd"), token_embeddings(small.pipe, [small.prompt("church"), ""])
    k, _ = concept_vectors(small, ["church"])
    position = len(token_ids(small.pipe, small.prompt("church"))) - 2
    layers = {name.removesuffix(".weight"): W.float() for name, W in value_weights(unet).items()}
    assert {name.rsplit(".", 1)[0] for name in erasure.adapters} == set(layers)
    before = {name: unet.get_submodule(name)(text) for name in layers}
    with ValueDecomposer(erasure.adapters).attached(unet), torch.no_grad():
        for name, W in layers.items():
            values = unet.get_submodule(name)(text)
            assert torch.equal(values[:, 0], before[name][:, 0])
            share = 2 / (1 + torch.tensor(-100 * 0.07).exp())
            assert torch.allclose(values[0, position], (1 - share) * (k[0].float() @ W.T), atol=1e-5)


def test_adavd_of_height_zero_is_the_base_and_acts_in_a_pipeline_s_own_call(small, tmp_path):
    def images(pipe):
        how = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe("a picture of a church", **how).images

    erasure, base = erased(small, "adavd"), images(small.pipe)
    for other, same in (
        (erasure, False),
        (erased(small, "adavd", height=0.0), True),
        (erasure.scaled(small, 0.0), True),
    ):
        with other.applied(small):
            assert torch.equal(images(small.pipe), base) == same
    assert not files.is_plain(erasure), "so there is nothing to export"


# --------------------------------------------------------------------------------------------------------- diverse prompts

SHORT = {"steps": 2, "batch_size": 2, "retain": ("fish", ""), "num_trajectories": 4, "trajectory_steps": 3}
TRAINED = [name for name, entry in METHODS.items() if issubclass(entry.config, TrainConfig)]


@pytest.mark.parametrize("method", TRAINED)
def test_one_prompt_is_the_method_and_many_are_another_training(small, method):
    small = copy.copy(small)
    small.train_templates = (small.template,)  # MACE's sentences, and STEREO's anchors
    one, many = copy.copy(small), copy.copy(small)
    one.contexts = ((small.template, None, "white"),)
    many.contexts = (*one.contexts, ("a picture of a {}", "noto", "white"), ("a {}", None, "white"))
    own = {"rounds": 1, "round_steps": 1, "inner": 1}  # of those that search
    own = {n: v for n, v in own.items() if n in METHODS[method].config.__dataclass_fields__}
    plain, same = (erased(w, method, diverse_prompts=d, **SHORT | own) for w, d in ((small, False), (one, True)))
    assert plain.digest() == same.digest() and plain.info["history"] == same.info["history"]
    assert erased(many, method, diverse_prompts=True, **SHORT | own).digest() != plain.digest()


def test_contexts_take_turns_with_words_and_styles_with_objects(small, monkeypatch):
    world = copy.copy(small)
    assert world.prompt_pairs("church", True)[2] == ("a photo of a church on a beach", "")
    assert len(set(world.prompt_pairs("church", True))) == len(CONTEXTS) == 20
    world.contexts = (("a {}", None, "white"), ("{}", "noto", "blue"), ("an {}", None, "red"))
    assert world.prompt_pairs("noto", True) == [
        ("a fish in the style of noto", "a fish"),
        ("an fish in the style of noto on a red background", "an fish on a red background"),
        ("dog in the style of noto on a blue background", "dog on a blue background"),
    ]
    monkeypatch.setattr(type(small), "words", lambda self, concept: (concept, "chapel"))
    prompts = ["a church", "an church on a red background", "chapel in the style of noto on a blue background"]
    assert world.prompt_pairs("church", True) == [(prompt, "") for prompt in prompts]
    assert world.prompt_pairs("church") == [("a picture of a church", "")]
    monkeypatch.setattr(type(small), "anchor", lambda self, concept, rank=0: "dog")
    assert world.anchor_prompts("church", True)[2] == "dog in the style of noto on a blue background"
    assert world.anchor_prompts("church") == ["a picture of a dog"]
    ids = token_ids(world.pipe, "a picture of a dog")
    assert concept_positions(world.pipe, "a picture of a dog", "church", "dog") == [len(ids) - 2]


def test_diverse_prompts_share_a_concept_s_trajectories(small):
    config = method_config("esd-x", **SHORT | {"num_retain_trajectories": 2}, diverse_prompts=True)
    world = copy.copy(small)
    world.contexts, world.trajectories = CONTEXTS[:2], {}
    Trainer(world, ["church"], config, "esd")
    assert sorted(len(parts[0]) for parts in world.trajectories.values()) == [2, 2, 2, 2]
    world.contexts = CONTEXTS[:8]
    assert Trainer(world, ["church"], config, "esd").count == 1


def test_the_bundled_world_s_contexts_are_distinct_and_leave_evaluation_its_own(world):
    assert len(set(world.contexts)) == len(CONTEXTS)
    for template, style, background in world.eval_templates.values():
        assert not any(template == t and t not in world.train_templates for t, _, _ in world.contexts)
        assert not any(
            (style and s == style) or (background != "white" and b == background) for _, s, b in world.contexts
        )
