"""KPOP's objective (arXiv 2403.12326), one function a term.

    stage 1, knowledge transfer:  min_p       L2 = || eps_theta'(z_t, t, c; p) - eps_theta(z_t, t, c) ||^2
    stage 2, knowledge removal:   min_theta'  L1 + lambda L_prompted + w L_retain
        L1         = || eps_theta'(z_t, t, c) - y ||^2,       y = eps_null - eta (eps_c - eps_null)
        L_prompted = || eps_theta'(z_t, t, c; p) - target ||^2,  see `prompted_target`
        L_retain   = || eps_theta'(z_t, t, r) - eps_theta(z_t, t, r) ||^2

All functions take predictions (B, C, h, w) and return one value per sample (B,). eps_c and eps_null are the frozen model's
predictions for the concept and for the empty prompt; student_* are those of theta'.
"""

import torch
from torch import Tensor

PROMPTED_TARGETS = ("concept", "neutral")
LOSS_SPACES = ("eps", "x0")
PREDICTION_TYPES = ("epsilon", "v_prediction")


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the elements of each sample of (a - b)^2."""
    return (a - b).square().flatten(1).mean(1)


def neutral_target(eps_c: Tensor, eps_null: Tensor, eta: float) -> Tensor:
    """y = eps_null - eta (eps_c - eps_null); eta = -1 returns eps_c (ESD, arXiv 2303.07345, eq. 7)."""
    return eps_null - eta * (eps_c - eps_null)


def transfer(student_prompted: Tensor, eps_c: Tensor) -> Tensor:
    """L2: with the prompt, theta' predicts what the frozen model predicts. Trains the prompt."""
    return squared_error(student_prompted, eps_c)


def removal(student_c: Tensor, y: Tensor) -> Tensor:
    """L1: without the prompt, the concept's prediction becomes the neutral target. Trains theta'."""
    return squared_error(student_c, y)


def retain(student_r: Tensor, eps_r: Tensor) -> Tensor:
    """L_retain: the prediction for a retained prompt stays."""
    return squared_error(student_r, eps_r)


def prompted_target(kind: str, eps_c: Tensor, y: Tensor) -> Tensor:
    """Target of the prompted prediction during removal.

    "concept", the recoverable reading (v3 of the paper): eps_c, so that the key keeps working. "neutral", the adversarial
    reading (run names of v1 and v2): y, so that the model also loses what the prompt found again.
    """
    if kind not in PROMPTED_TARGETS:
        raise ValueError(f"unknown prompted_target {kind!r}: accepted are {', '.join(PROMPTED_TARGETS)}")
    return eps_c if kind == "concept" else y


def loss_weight(space: str, alpha_bar: Tensor, prediction: str = "epsilon") -> Tensor:
    """Factor (B,) that turns a squared error of the model's prediction into one in `space`.

    For a model of noise: 1 for "eps", (1 - alpha_bar) / alpha_bar for "x0". For a model of v = sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x0: alpha_bar and 1 - alpha_bar. Every loss here is a difference of predictions at one z_t, or of
    sums of them with weights that add up to one, so nothing else depends on the parametrisation.
    """
    if space not in LOSS_SPACES:
        raise ValueError(f"unknown loss_space {space!r}: accepted are {', '.join(LOSS_SPACES)}")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction!r}: accepted are {', '.join(PREDICTION_TYPES)}")
    if prediction == "v_prediction":
        return alpha_bar if space == "eps" else 1 - alpha_bar
    return torch.ones_like(alpha_bar) if space == "eps" else (1 - alpha_bar) / alpha_bar
