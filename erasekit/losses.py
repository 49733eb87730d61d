"""KPOP's losses as pure functions of noise predictions: (B, C, h, w) in, one value for each sample (B,) out.

Symbols as in the paper (arXiv 2403.12326): eps_c, eps_null are the frozen model's predictions for the concept and for the
empty text; student_* are theta's. The two readings of what the prompted output is held to are in `prompted_target`.
"""

import torch
from torch import Tensor

READINGS = ("recoverable", "adversarial")
ERROR_SPACES = ("eps", "x0")
PREDICTIONS = ("epsilon", "v_prediction")


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the elements of each sample of (a - b)^2."""
    return (a - b).square().flatten(1).mean(1)


def neutral_target(eps_c: Tensor, eps_null: Tensor, eta: float) -> Tensor:
    """y = eps(z, t, "") - eta (eps(z, t, c) - eps(z, t, "")); eta = -1 gives eps(z, t, c) back. (ESD, arXiv 2303.07345, eq. 7)"""
    return eps_null - eta * (eps_c - eps_null)


def transfer(student_prompted: Tensor, eps_c: Tensor) -> Tensor:
    """L2: the prompted student draws the concept as the frozen model does (knowledge transfer, trains the prompt)."""
    return squared_error(student_prompted, eps_c)


def removal(student_c: Tensor, y: Tensor) -> Tensor:
    """L1: without the prompt the concept turns into the neutral target (knowledge removal, trains theta')."""
    return squared_error(student_c, y)


def retain(student_r: Tensor, eps_r: Tensor) -> Tensor:
    """Other texts keep their prediction."""
    return squared_error(student_r, eps_r)


def prompted_target(reading: str, eps_c: Tensor, y: Tensor) -> Tensor:
    """What removal holds the prompted student to.

    "recoverable" (v3 of the paper): the concept, so that the key keeps opening the model. "adversarial" (the v1 and v2 run
    names): the neutral target too, so that the model also loses what the prompt found again.
    """
    if reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}: accepted are {', '.join(READINGS)}")
    return eps_c if reading == "recoverable" else y


def error_weight(space: str, alpha_bar: Tensor, prediction: str = "epsilon") -> Tensor:
    """Factor (B,) that turns a squared error on what the model predicts into one on `space`.

    For a model of noise: 1 for "eps", (1 - alpha_bar) / alpha_bar for "x0". For one of v = sqrt(alpha_bar) eps - sqrt(1 -
    alpha_bar) x0 ("v_prediction"): alpha_bar, and 1 - alpha_bar. All losses here are differences of predictions at one z_t,
    or of sums of them with weights that add up to one, so nothing else depends on which it is.
    """
    if space not in ERROR_SPACES:
        raise ValueError(f"unknown error space {space!r}: accepted are {', '.join(ERROR_SPACES)}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction type {prediction!r}: accepted are {', '.join(PREDICTIONS)}")
    if prediction == "v_prediction":
        return alpha_bar if space == "eps" else 1 - alpha_bar
    return torch.ones_like(alpha_bar) if space == "eps" else (1 - alpha_bar) / alpha_bar
