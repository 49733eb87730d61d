"""The losses against numbers worked out by hand."""

import pytest
import torch

from erasekit import losses


def flat(*values):
    """Predictions (B, 1, 1, 2)."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 2)


EPS_C, EPS_NULL = flat([1.0, 2.0], [0.0, 4.0]), flat([0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("loss", [losses.transfer, losses.removal, losses.retain, losses.squared_error])
def test_one_mean_square_for_each_sample(loss):
    expected = torch.tensor([(1 + 4) / 2, (1 + 9) / 2], dtype=torch.float64)
    assert torch.equal(loss(EPS_C, EPS_NULL), expected)


@pytest.mark.parametrize(
    "eta, expected",
    [
        (1.0, flat([-1.0, -2.0], [2.0, -2.0])),
        (2.5, flat([-2.5, -5.0], [3.5, -6.5])),
        (0.0, EPS_NULL),
        (-1.0, EPS_C),
    ],
)
def test_neutral_target(eta, expected):
    assert torch.equal(losses.neutral_target(EPS_C, EPS_NULL, eta), expected)


def test_the_recoverable_reading_holds_the_prompted_output_to_the_concept():
    assert losses.prompted_target("recoverable", EPS_C, EPS_NULL) is EPS_C


def test_the_adversarial_reading_holds_it_to_the_neutral_target():
    assert losses.prompted_target("adversarial", EPS_C, EPS_NULL) is EPS_NULL


def test_an_error_on_eps_has_weight_one():
    assert torch.equal(losses.error_weight("eps", torch.tensor([0.1, 0.9])), torch.ones(2))


def test_a_weighted_error_on_eps_is_the_error_on_x0():
    generator = torch.Generator().manual_seed(0)
    z, a, b = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    alpha_bar = torch.tensor([0.9, 0.02], dtype=torch.float64)
    alpha = alpha_bar[:, None, None, None]

    def x0(eps):
        return (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()

    weighted = losses.error_weight("x0", alpha_bar) * losses.squared_error(a, b)
    torch.testing.assert_close(weighted, losses.squared_error(x0(a), x0(b)))


def test_an_unknown_reading_is_refused(sentence):
    with pytest.raises(ValueError, match="unknown reading 'v4': accepted are recoverable, adversarial") as error:
        losses.prompted_target("v4", EPS_C, EPS_NULL)
    sentence(error)


def test_an_unknown_error_space_is_refused(sentence):
    with pytest.raises(ValueError, match="unknown error space 'v': accepted are eps, x0") as error:
        losses.error_weight("v", torch.tensor([0.5]))
    sentence(error)
