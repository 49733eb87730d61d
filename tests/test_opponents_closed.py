"""SPEED, OCE and AdaVD: identities, and closed forms against independent derivations."""

import copy

import pytest
import torch

from erasekit.baselines import erase, method_config
from erasekit.baselines.oce import nearest_rotation, span
from erasekit.baselines.speed import SPEED, constrained_edit, fixed_vectors, null_space, retained_last_words
from erasekit.baselines.uce import edit_vectors, value_weights
from erasekit.checkpoints import seeded


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


@pytest.mark.parametrize("method", ["speed", "oce"])
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
