"""RECE (Gong et al., arXiv 2407.12383): UCE, then rounds that find what still acts like the concept and edit that away."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Erasure
from .registry import method, untrained_erasure
from .uce import UCE, WORDINGS, edited_weights, key_value_weights, retained_vectors, ridge, sequence_vectors, to_delta


@dataclass(frozen=True)
class RECE(UCE):
    """Published, nudity: 3 rounds, ridge 0.1, then UCE with beta 0.1 and lambda 0.1."""

    rounds: int = 3
    rho: float = 0.1  # ridge of the embedding search
    round_beta: float = 0.1
    round_lam: float = 0.1


LAMBDAS = [{"lam": x, "round_lam": x, "rounds": 1, "wordings": w} for w in WORDINGS for x in (2000.0, 500.0, 125.0)]


@method("rece", RECE, sweep=LAMBDAS)
def rece(world, concepts: list[str], config: RECE | None = None) -> Erasure:
    """Per round: c~ = (rho I + sum W^T W)^-1 (sum W^T W_0) c over all layers and tokens, then the edit c~ -> "" (eqs. 7 to 9).

    The released script returns the round its detector likes best; here it is the last, so that no judge takes part.
    """
    config, began = config or RECE(), time.time()
    weights, original = edited_weights(world, concepts, config), key_value_weights(world.pipe.unet)
    olds, news = zip(*(pair for concept in concepts for pair in world.paraphrases(concept)))
    c, empty = sequence_vectors(world.pipe, list(olds)), sequence_vectors(world.pipe, list(news))
    P = retained_vectors(world, config.retain)
    for _ in range(config.rounds):
        found = equivalent_vectors(c, weights, original, config.rho)
        weights = {
            name: ridge(W, [(1.0, found, empty @ W.T), (config.round_beta, P, P @ W.T)], config.round_lam)
            for name, W in weights.items()
        }
    return untrained_erasure(world, concepts, config, "rece", began, to_delta(weights))


def equivalent_vectors(c: Tensor, weights: dict, original: dict, rho: float) -> Tensor:
    """The embeddings (n, d_ctx) for which the edited projections act most like the original ones on c (n, d_ctx)."""
    pairs = [(weights[name], original[name]) for name in weights]
    right = rho * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + sum(W.T @ W for W, _ in pairs)
    return torch.linalg.solve(right, sum(W.T @ W0 for W, W0 in pairs) @ c.T).T
