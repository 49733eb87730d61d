"""The losses against numbers worked out by hand."""

import pytest
import torch

from erasekit import losses


def predictions(*values):
    """(B, 1, 1, 2)."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 2)


EPS_C, EPS_NULL = predictions([1.0, 2.0], [0.0, 4.0]), predictions([0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("loss", [losses.transfer, losses.removal, losses.retain, losses.squared_error])
def test_one_mean_square_per_sample(loss):
    expected = torch.tensor([(1 + 4) / 2, (1 + 9) / 2], dtype=torch.float64)
    assert torch.equal(loss(EPS_C, EPS_NULL), expected)


@pytest.mark.parametrize(
    "eta, expected",
    [
        (1.0, predictions([-1.0, -2.0], [2.0, -2.0])),
        (2.5, predictions([-2.5, -5.0], [3.5, -6.5])),
        (0.0, EPS_NULL),
        (-1.0, EPS_C),
    ],
)
def test_neutral_target(eta, expected):
    assert torch.equal(losses.neutral_target(EPS_C, EPS_NULL, eta), expected)


def test_prompted_target_of_both_readings():
    assert losses.prompted_target("concept", EPS_C, EPS_NULL) is EPS_C
    assert losses.prompted_target("neutral", EPS_C, EPS_NULL) is EPS_NULL


def test_loss_in_eps_has_weight_one():
    assert torch.equal(losses.loss_weight("eps", torch.tensor([0.1, 0.9])), torch.ones(2))


def test_weighted_eps_error_is_the_x0_error():
    generator = torch.Generator().manual_seed(0)
    z, a, b = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    alpha_bar = torch.tensor([0.9, 0.02], dtype=torch.float64)
    alpha = alpha_bar[:, None, None, None]

    def x0(eps):
        return (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()

    weighted = losses.loss_weight("x0", alpha_bar) * losses.squared_error(a, b)
    torch.testing.assert_close(weighted, losses.squared_error(x0(a), x0(b)))


def test_weighted_v_error_is_the_error_in_eps_and_x0():
    generator = torch.Generator().manual_seed(0)
    z, v, w = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    alpha_bar = torch.tensor([0.9, 0.02], dtype=torch.float64)
    a, s = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
    in_space = {"eps": lambda v: a * v + s * z, "x0": lambda v: a * z - s * v}
    for space, convert in in_space.items():
        weighted = losses.loss_weight(space, alpha_bar, "v_prediction") * losses.squared_error(v, w)
        torch.testing.assert_close(weighted, losses.squared_error(convert(v), convert(w)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.prompted_target("v4", EPS_C, EPS_C), "prompted_target 'v4': accepted are concept, neutral"),
        (lambda: losses.loss_weight("v", torch.ones(1)), "loss_space 'v': accepted are eps, x0"),
    ],
)
def test_unknown_choices_are_refused(call, message, sentence):
    with pytest.raises(ValueError, match=message) as error:
        call()
    sentence(error)
